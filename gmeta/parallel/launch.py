"""Several workers on this machine, through torch's elastic process contexts; torchrun does the same on clusters.

Workers get the variables that torchrun sets and meet at a store on the loopback interface that this process holds,
so that no port is guessed. torch is imported late, because commands that launch nothing use `report_error` too.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing import SubprocessContext
    from torch.distributed.elastic.multiprocessing.api import RunProcsResult

EXIT_USER_ERROR = 2
"""A worker's exit code for a user's mistake, told through `report_error`."""
EXIT_REFUSED = 3
"""A worker's exit code where a gate refused a model, told through `report_error`: nothing failed."""
EXIT_STOPPED = 75
"""A worker's exit code after a requested stop: saved (EX_TEMPFAIL)."""
EXIT_RESTART = 77
"""A worker's exit code after saving, when one of the group is to be replaced: start all again."""
EXIT_PEER_LOST = 76
"""A worker's exit code after `PeerLost`: it is a witness, not the cause."""

_LAUNCHED = "GMETA_LAUNCHED"
_FOLLOWS = "GMETA_FOLLOWS"
_COORDINATOR = "GMETA_COORDINATOR"
_COORDINATOR_TOKEN = "GMETA_COORDINATOR_TOKEN_FILE"
_TORCH_SIGNALS = "TORCHELASTIC_SIGNALS_TO_HANDLE"
_POLL_S = 0.1
_COMPANION_S = 20.0
"""Seconds that a process beside the workers outlives its launcher: they need it to save."""
_ORPHAN_S = 60.0
"""Seconds that a process has to end in good order when its launcher is gone."""
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def is_worker() -> bool:
    """Whether this process is one of several, started by `launch` or torchrun."""
    return _LAUNCHED in os.environ or "RANK" in os.environ


def own_coordinator() -> tuple[str, Path] | None:
    """Return URL and token file of the coordinator that lives as long as this worker's launcher, where there is one."""
    url = os.environ.get(_COORDINATOR)
    return None if url is None else (url, Path(os.environ[_COORDINATOR_TOKEN]))


def worker_rank() -> int:
    """Return this worker's rank, as its launcher says. It is 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def follow_launcher() -> None:
    """Ask this process to stop, as SIGTERM does, when its launcher is gone: nobody else would watch over it."""
    if not {_LAUNCHED, _FOLLOWS} & os.environ.keys():
        return
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(1.0)
        if _FOLLOWS in os.environ:
            time.sleep(_COMPANION_S)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_ORPHAN_S)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="gmeta-follow-launcher", daemon=True).start()


def report_error(message: str) -> None:
    """Tell the user why this process is about to exit, once, whatever the number of workers.

    A worker leaves the message for its launcher. A process without a launcher prints it, and so does rank 0 under
    torchrun.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        Path(file).write_text(json.dumps({"message": message, "timestamp": str(int(time.time()))}))
    if _LAUNCHED not in os.environ and os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr, flush=True)


def leave(code: int) -> NoReturn:
    """End this process with `code`.

    A worker does so without taking the interpreter apart. A thread of a process group that frees its last tensor just
    then is ended by Python inside code that cannot be left, and the worker dies of SIGABRT (torch 2.13, Python 3.11).
    """
    if is_worker():
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def companion_environment() -> dict[str, str]:
    """Return the environment of a process beside the workers, which ends with this one (`follow_launcher`)."""
    return {**os.environ, _FOLLOWS: "1"}


def module_command(module: str) -> list[str]:
    """Return the words that run a module as `python -m` does, but without the current folder on the path.

    `python -m` would put it first, where a file called random.py replaces Python's own in every worker. (`-P` prevents
    that from Python 3.11 on.) A user's own model is still found there: `find_model` looks in the folder last.
    """
    start = "import sys; sys.path[:] = filter(None, sys.path); import runpy; "
    start += "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
    return [sys.executable, "-c", start, module]


def launch(
    nproc: int,
    argv: Sequence[str],
    *,
    module: str = "gmeta",
    grace_s: float = 120.0,
    coordinator: tuple[str, Path] | None = None,
    asked: list[signal.Signals] | None = None,
    advice: str = "Run it again; training continues from its last checkpoint with --resume true",
) -> int:
    """Run a module with `argv`, as `module_command` does, in `nproc` workers, and return the exit code.

    `coordinator` is what `own_coordinator` returns in the workers, and `advice` says what to do when a worker has died.
    Signals that ask this process to stop are added to `asked`.

    The code is 0 when all workers end well. Workers themselves end with 2 after a user's mistake, 3 where a gate
    refused, 75 after a requested stop and 77 to be started again. It is 128 + n when signal n killed a worker. When one
    worker fails, the others are stopped. SIGTERM, SIGHUP and Ctrl-C are passed on; the workers then have `grace_s`
    seconds to finish their step and save. A second signal kills them.
    """
    if nproc < 1:
        raise ValueError(f"nproc is {nproc}: must be at least 1")
    received = [] if asked is None else asked
    with _recorded_signals(received):
        from torch.distributed import TCPStore
        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SubprocessContext

        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # we say it in one line of our own
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        python, *words = module_command(module)
        with tempfile.TemporaryDirectory(prefix="gmeta-launch-") as folder:
            context = SubprocessContext(
                name=module,
                entrypoint=python,
                args=dict.fromkeys(range(nproc), (*words, *argv)),
                envs={
                    rank: worker_environment(rank, nproc, store.port) | _naming(coordinator) for rank in range(nproc)
                },
                logs_specs=DefaultLogsSpecs(log_dir=folder),
            )
            try:
                with _no_signal_handlers_of_torch():
                    context.start()
                result = _supervise(context, received, grace_s)
                return _verdict(context, result, advice)
            finally:
                _kill(context)


def _naming(coordinator: tuple[str, Path] | None) -> dict[str, str]:
    return {} if coordinator is None else {_COORDINATOR: coordinator[0], _COORDINATOR_TOKEN: str(coordinator[1])}


def worker_environment(rank: int, nproc: int, port: int) -> dict[str, str]:
    """Return what `open_mesh` reads in worker `rank` of `nproc`, whose store listens on loopback `port`."""
    threads = (
        {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // nproc))}
    )
    return {
        **threads,
        _LAUNCHED: "1",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # workers are clients of the launcher's store
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


@contextmanager
def _recorded_signals(received: list[signal.Signals]) -> Iterator[None]:
    """Note the signals that arrive in `received`, so that they do not raise in the middle of something."""
    before = {s: signal.signal(s, lambda number, _frame: received.append(signal.Signals(number))) for s in _FORWARDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _no_signal_handlers_of_torch() -> Iterator[None]:
    """Keep `start()` from installing handlers. They would raise wherever a signal finds them, also between the starts
    of two workers.
    """
    before = os.environ.get(_TORCH_SIGNALS)
    os.environ[_TORCH_SIGNALS] = "SIGQUIT"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_TORCH_SIGNALS]
        else:
            os.environ[_TORCH_SIGNALS] = before


def _supervise(context: SubprocessContext, received: list[signal.Signals], grace_s: float) -> RunProcsResult | None:
    """Wait for the workers. None is returned when they ended because this process was told to stop."""
    # a poll that finds a failed worker also ends the others: SIGTERM, after 30 s SIGKILL
    while (result := context.wait(timeout=0)) is None:
        if received:
            print("stopping: workers in training save first; once more kills them", file=sys.stderr, flush=True)
            _forward(context, received, grace_s)
            return None
        time.sleep(_POLL_S)
    return result


def _forward(context: SubprocessContext, received: list[signal.Signals], grace_s: float) -> None:
    number = signal.SIGINT if received[0] == signal.SIGINT else signal.SIGTERM
    for handler in context.subprocess_handlers.values():
        if handler.proc.poll() is None:
            handler.close(death_sig=number)
    end = time.monotonic() + grace_s
    while len(received) == 1 and time.monotonic() < end:
        if all(handler.proc.poll() is not None for handler in context.subprocess_handlers.values()):
            return
        time.sleep(_POLL_S)
    _kill(context)


def _kill(context: SubprocessContext) -> None:
    for handler in context.subprocess_handlers.values():
        if handler.proc.poll() is None:
            handler.close(death_sig=signal.SIGKILL)
            handler.proc.wait()


def _verdict(context: SubprocessContext, result: RunProcsResult | None, advice: str) -> int:
    """Return the exit code of the launch, and print one message where something failed."""
    failed = {rank: h.proc.returncode for rank, h in context.subprocess_handlers.items() if h.proc.returncode != 0}
    if not failed:
        return 0
    # a worker that we ended, or that lost a peer, is not the cause where there is another
    causes = {rank: code for rank, code in failed.items() if code not in (-signal.SIGTERM, EXIT_PEER_LOST)} or failed
    if result is None and causes is failed:  # all were asked to stop, and some could do it only by losing the others
        causes = {rank: code for rank, code in failed.items() if code != EXIT_PEER_LOST} or failed
    found_first = [*(result.failures if result else ()), *causes]
    first = next(rank for rank in found_first if rank in causes)
    code = causes[first]
    messages = list(dict.fromkeys(text for rank in causes if (text := _last_words(context, rank))))
    expected = code in (EXIT_STOPPED, EXIT_RESTART) or (code in (EXIT_USER_ERROR, EXIT_REFUSED) and messages)
    asked_for = result is None and code in (-signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGINT)
    if not (expected or asked_for):
        pid = context.subprocess_handlers[first].proc.pid
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
        if code == -signal.SIGKILL:
            how += " (out of memory, or it did not end in time)"
        messages.append(
            f"gmeta: error: rank {first} (pid {pid}) {how}; the other workers were stopped. {advice}".rstrip()
        )
        witnesses = [text for rank in failed if rank not in causes and (text := _last_words(context, rank))]
        messages += witnesses[:1]
    if messages:
        print("\n".join(messages), file=sys.stderr, flush=True)
    return 128 - code if code < 0 else code


def _last_words(context: SubprocessContext, rank: int) -> str:
    file = Path(context.error_files[rank])
    return str(json.loads(file.read_text())["message"]) if file.exists() else ""
