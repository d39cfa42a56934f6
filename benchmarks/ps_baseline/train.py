"""Train with our PS-style baseline, from gmeta's own settings, into a run directory that `gmeta evaluate` takes.

    python benchmarks/ps_baseline/train.py --config FILE --workers N --servers M [--task_files DIR] [--key VALUE] …

Settings are those of `gmeta train`; the run ends after schedule.epochs or max_steps with one checkpoint, the last
(there is no validation on the way). Tasks are read from one file each, written at first use beside the pack
(PACK-task-files) or in --task_files. Exit codes: 0 done, 2 the user's mistake, 76 a worker or server was lost.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch
from jsonargparse import ArgumentError
from torch import distributed

from gmeta.cli import command_parser
from gmeta.config.train import TrainConfig
from gmeta.parallel.launch import EXIT_PEER_LOST, EXIT_USER_ERROR
from gmeta.parallel.mesh import Mesh, PeerLost
from gmeta.recommender.build import build_system
from gmeta.runs import checkpoint
from gmeta.runs.directory import prepare_run_dir, run_lock
from gmeta.runs.log import RunLog
from ps_baseline.plan import only_table
from ps_baseline.server import serve
from ps_baseline.session import Session, open_session
from ps_baseline.taskfiles import TaskFiles, open_task_files
from ps_baseline.wire import Links, Place, meet
from ps_baseline.worker import Client, StepRecord, work

CONTEXT = multiprocessing.get_context("forkserver")  # processes are forked from one that has imported torch once
CONTEXT.set_forkserver_preload(["torch._dynamo", "gmeta.training.loop", "ps_baseline.worker"])
_GRACE_S = 3.0  # for the others to notice a lost peer and say so


@dataclass(frozen=True)
class Options:
    """The baseline's own settings."""

    workers: int
    servers: int
    task_files: Path


def main(argv: Sequence[str]) -> int:
    """Run one command line; returns its exit code."""
    try:
        options, config = parse(argv)
        files = open_task_files(config.pack, options.task_files)
        open_session(config, files.schema, files.num_tasks, Place(0, 1, options.servers))  # mistakes, before any start
        return launch(config, files, options)
    except (ArgumentError, ValueError, TypeError, OSError) as error:
        return _fail(str(error), EXIT_USER_ERROR)


def _fail(message: str, code: int) -> int:
    print(f"ps_baseline: error: {message}", file=sys.stderr, flush=True)
    return code


def parse(argv: Sequence[str]) -> tuple[Options, TrainConfig]:
    """Return the baseline's own options, and gmeta's settings; ValueError for either."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--servers", type=int, default=1)
    parser.add_argument("--task_files", type=Path)
    mine, rest = parser.parse_known_args(argv)
    for name in ("workers", "servers"):
        if getattr(mine, name) < 1:
            raise ValueError(f"{name} is {getattr(mine, name)}: must be at least 1")
    settings = command_parser("train")
    values = settings.parse_args(rest)
    if values.pop("nproc", 1) != 1:
        raise ValueError("nproc is a setting of gmeta train: the baseline takes --workers and --servers")
    values.pop("config", None)
    made = settings.instantiate(values)
    config = TrainConfig(**{field.name: made[field.name] for field in fields(TrainConfig)})
    if config.loader.tasks_per_batch < mine.workers:
        raise ValueError(f"loader.tasks_per_batch is {config.loader.tasks_per_batch}: must be at least --workers")
    pack = Path(config.pack)
    folder = mine.task_files or pack.with_name(f"{pack.name}-task-files")
    return Options(mine.workers, mine.servers, folder), config


def launch(config: TrainConfig, files: TaskFiles, options: Options) -> int:
    """Start all processes on this machine and wait; when one fails, the others are given a moment, then ended."""
    places = [Place(r, options.workers, options.servers) for r in range(options.workers + options.servers)]
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="ps-baseline-") as folder:
        words = [Path(folder) / str(place.rank) for place in places]
        processes = [
            CONTEXT.Process(target=_process, args=(config, files, place, store.port, file), daemon=True)
            for place, file in zip(places, words, strict=True)
        ]
        try:
            for process in processes:
                process.start()
            listed = ", ".join(f"{place.name} is {p.pid}" for place, p in zip(places, processes, strict=True))
            print(f"our PS-style baseline; processes: {listed}", file=sys.stderr, flush=True)
            while (codes := [p.exitcode for p in processes]) and None in codes and not any(codes):
                time.sleep(0.05)
            end = time.monotonic() + _GRACE_S
            while None in (codes := [p.exitcode for p in processes]) and time.monotonic() < end:
                time.sleep(0.05)
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()
        return _verdict(places, codes, [file.read_text() if file.exists() else "" for file in words])


def _process(config: TrainConfig, files: TaskFiles, place: Place, port: int, words: Path) -> None:
    """Run one process. Its last words go to a file, so that the launcher tells them once."""
    _follow_launcher()
    code = 0
    try:
        run_rank(config, files, replace(place, timeout_s=config.timeout_s), port)
    except (ValueError, OSError) as error:
        code = _last_words(words, error, EXIT_USER_ERROR)
    except PeerLost as error:
        code = _last_words(words, error, EXIT_PEER_LOST)
    sys.exit(code)


def _last_words(file: Path, error: Exception, code: int) -> int:
    file.write_text(f"ps_baseline: error: {error}\n")
    return code


def _verdict(places: list[Place], codes: list[int | None], words: list[str]) -> int:
    """Return the exit code of the launch, and why: the first process that failed for a reason of its own, and its
    witnesses.
    """
    failed = {rank: code for rank, code in enumerate(codes) if code}
    if not failed:
        return 0
    causes = {rank: code for rank, code in failed.items() if code != EXIT_PEER_LOST} or failed
    rank, code = next(iter(causes.items()))
    if code == EXIT_USER_ERROR:
        print(words[rank], end="", file=sys.stderr, flush=True)
        return code
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
    told = "".join(dict.fromkeys(words[r] for r in failed))
    print(f"{told}ps_baseline: error: {places[rank].name} {how}; the others were stopped", file=sys.stderr, flush=True)
    return 128 - code if code < 0 else code


def run_rank(config: TrainConfig, files: TaskFiles, place: Place, port: int) -> None:
    """Run one worker or server. The launcher's store is at `port`."""
    torch.set_num_threads(1)
    store = distributed.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    session = open_session(config, files.schema, files.num_tasks, place)
    links = meet(place, store)
    if place.server >= 0:
        serve(session, links)
    elif place.rank == 0:
        _lead(session, files, links)
    else:
        client = Client(session, links)
        for _ in work(session, files, client, say=lambda text: None):
            pass
        client.end()


def _follow_launcher() -> None:
    """End this process when its launcher is gone: nobody else would end it."""
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(1.0)
        os._exit(EXIT_PEER_LOST)

    threading.Thread(target=watch, name="follow-launcher", daemon=True).start()


def _lead(session: Session, files: TaskFiles, links: Links) -> None:
    """Run worker 0, which also writes the run directory."""
    config, mesh = session.config, Mesh()
    client = Client(session, links)
    with run_lock(Path(config.run_dir), mesh):
        prepare_run_dir(config, mesh)
        log = RunLog(Path(config.run_dir), rank=0, total_steps=session.total_steps)
        log.start()
        try:
            seconds = 0.0
            for record in work(session, files, client, log.say):
                seconds += sum(record.seconds.values())
                log.train(log_record(record, seconds))
            path = save(session, files, client, record)
            log.say(f"done after step {record.step}: {path}\nnext: gmeta evaluate --run_dir {config.run_dir}")
        finally:
            log.close()
    client.end()


def log_record(record: StepRecord, seconds: float) -> dict[str, float]:
    """Return a line of metrics.jsonl, with the names of `gmeta train`; bytes are worker 0's."""
    total = sum(record.seconds.values())
    return {
        "step": record.step,
        "epoch": record.epoch,
        "loss": record.loss,
        "support_loss": record.support_loss,
        "lr": record.lr,
        "grad_norm": record.grad_norm,
        "tasks_per_s": record.tasks / total,
        "samples_per_s": record.samples / total,
        "padding": 0.0,
        **{f"{phase}_share": spent / total for phase, spent in record.seconds.items()},
        "sent_bytes": record.sent_bytes,
        "received_bytes": record.received_bytes,
        "time_s": seconds,
    }


def save(session: Session, files: TaskFiles, client: Client, last: StepRecord) -> Path:
    """Fetch everything from the servers and write a checkpoint as gmeta's, which any number of processes can load."""
    config = session.config
    whole = build_system(config, files.schema, Mesh())
    parameters = dict(session.system.learner.named_parameters())
    with torch.no_grad():
        for name, p in whole.learner.named_parameters():
            p.copy_(parameters[name])
    table = only_table(session.system.tables)
    ranges = [table.local_range(server) for server in range(session.place.servers)]
    rows = [value for _, value in sorted(whole.tables.state_dict().items())]
    client.pull_state([[value[part.start : part.stop] for value in rows] for part in ranges])
    state = {
        "progress": {"step": last.step},
        "best_step": None,
        "config": asdict(replace(config, pack=str(Path(config.pack).resolve()))),
        "schema": files.schema.to_json(),
        "baseline": {"workers": session.place.workers, "servers": session.place.servers},
    }
    return checkpoint.save(Path(config.run_dir) / "checkpoints", last.step, whole.tensors(), state, Mesh())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
