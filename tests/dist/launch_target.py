"""What the launch tests run in every worker: `python -m launch_target BEHAVIOUR FOLDER`."""

import atexit
import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

from gmeta.parallel.launch import EXIT_PEER_LOST, EXIT_STOPPED, EXIT_USER_ERROR, leave, report_error


def _collectives(folder: Path) -> int:
    import torch

    from gmeta.parallel.collectives import PeerLost, all_reduce_sum
    from gmeta.parallel.mesh import close_mesh, open_mesh

    mesh = open_mesh("cpu", timeout_s=60)
    total = all_reduce_sum(torch.ones(1), mesh).item()
    (folder / f"rank-{mesh.rank}").write_text(f"{total} {mesh.world_size} {os.environ['OMP_NUM_THREADS']}")
    if sys.argv[1] == "killed" and mesh.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[1] == "killed":
        try:
            all_reduce_sum(torch.ones(1), mesh)
        except PeerLost as error:
            report_error(str(error))
            close_mesh(mesh)  # must not wait for the dead
            return EXIT_PEER_LOST
    close_mesh(mesh)
    return 0


def _stoppable(folder: Path, rank: str) -> int:
    if sys.argv[1] == "late" and rank == "1":
        (folder / "ready-1").touch()
        time.sleep(60)  # the signal finds it before it can save
    received = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda n, _frame: received.append(n))
    (folder / f"ready-{rank}").touch()
    while not received or sys.argv[1] == "stubborn":
        time.sleep(0.02)
    if sys.argv[1] == "late":
        report_error("gmeta train: error: rank 0 of 2 could not join the others")
        return EXIT_PEER_LOST
    time.sleep(0.5 * int(rank))  # ranks do not end at the same moment
    (folder / f"saved-{rank}").touch()
    return EXIT_STOPPED


class _Module:
    """What the interpreter would take apart at its end."""

    def __init__(self, file: Path) -> None:
        self._write = file.touch

    def __del__(self) -> None:
        self._write()


def _leaving(folder: Path, rank: str) -> NoReturn:
    globals()["module"] = _Module(folder / f"taken-apart-{rank}")
    atexit.register((folder / f"exit-function-{rank}").touch)
    print("the last words", end="")
    leave(0)


def main() -> int:
    behaviour, folder, rank = sys.argv[1], Path(sys.argv[2]), os.environ["RANK"]
    if behaviour in ("collectives", "killed"):
        return _collectives(folder)
    if behaviour in ("stoppable", "stubborn", "late"):
        return _stoppable(folder, rank)
    if behaviour == "leaving":
        _leaving(folder, rank)
    if behaviour == "mistake" or (behaviour == "mistake-on-1" and rank == "1"):
        report_error("gmeta train: error: dense.lr is -1: must not be negative")
        return EXIT_USER_ERROR
    if behaviour == "bug" and rank == "1":
        return 3
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    time.sleep(60)
    return 0


if __name__ == "__main__":
    sys.exit(main())
