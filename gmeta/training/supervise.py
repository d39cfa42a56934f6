"""`gmeta train --nproc` with elastic.enabled: a coordinator beside the workers, and restarts of the group.

On clusters torchrun restarts workers, and `gmeta coordinate` runs where all reach it; see docs/elastic.md.
"""

from __future__ import annotations

import hashlib
import json
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from gmeta.config.train import TrainConfig
from gmeta.data.pack import open_pack
from gmeta.parallel.launch import (
    EXIT_RESTART,
    EXIT_STOPPED,
    EXIT_USER_ERROR,
    companion_environment,
    launch,
    module_command,
)
from gmeta.runs import checkpoint

_POLL_S = 0.2
_LAST_ONE_S = 30.0
_START_S = 60.0
"""Seconds that a coordinator has to read its journal and listen."""


def supervise(config: TrainConfig, nproc: int, argv: Sequence[str], module: str = "gmeta") -> int:
    """Run `python -m module argv` in `nproc` workers, again and again until it is done. Return the exit code.

    When a worker dies or is replaced, the group starts again from the last checkpoint. After `elastic.max_restarts`
    restarts in a row without a new checkpoint, the run ends with the code of the last failure.
    """
    open_pack(config.pack)  # a user's mistake shows before anything is started
    with _coordinator(config) as coordinator:
        restarts, fruitless, seen = 0, 0, _last_step(config)
        while True:
            asked: list[signal.Signals] = []
            code = launch(nproc, argv, module=module, coordinator=coordinator, asked=asked, advice="")
            if asked or code in (0, EXIT_STOPPED, EXIT_USER_ERROR):
                return code
            step = _last_step(config)
            fruitless = 0 if code == EXIT_RESTART or step != seen else fruitless + 1
            seen = step
            if fruitless > config.elastic.max_restarts:
                _say(
                    f"{config.elastic.max_restarts} restarts without a new checkpoint: giving up. Once the cause is "
                    "mended, the same command goes on from the last checkpoint"
                )
                return code
            restarts += 1
            origin = "the beginning" if step is None else f"the checkpoint of step {step}"
            _say(f"the group is started again: restart {restarts}, from {origin}")


def _last_step(config: TrainConfig) -> int | None:
    saved = checkpoint.steps_saved(Path(config.run_dir) / "checkpoints")
    return saved[-1] if saved else None


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def _coordinator(config: TrainConfig) -> Iterator[tuple[str, Path] | None]:
    """Start a coordinator that lives as long as this launcher, and give its URL and token file. None where the config
    names one.
    """
    if config.elastic.url is not None:
        yield None
        return
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    keeper = _Keeper(config, run_dir)
    try:
        yield keeper.url, keeper.token_file
    finally:
        keeper.close()


def journal_file(config: TrainConfig) -> Path:
    """Return the journal of a run's own coordinator. Another pack, or another number of epochs, is another job."""
    job = [open_pack(config.pack).manifest["xxh3"], config.schedule.epochs]
    name = hashlib.sha256(json.dumps(job).encode()).hexdigest()[:8]
    return Path(config.run_dir) / f"coordinator-{name}.db"


def start_coordinator(
    words: Sequence[object], port: int, log: Path, timeout_s: float = _START_S, closing: threading.Event | None = None
) -> tuple[subprocess.Popen[str], int]:
    """Start gmeta with `words` and `--port`. Return the process and the port that it listens on; 0 takes a
    free one.

    What it prints is appended to `log`. Raises ValueError, with what it said, when it ends at once. One that does not
    listen within `timeout_s`, or before `closing` is set, is killed, and a ValueError raised too.
    """
    with log.open("a") as out:
        before = out.tell()
        process = subprocess.Popen(
            [*module_command("gmeta"), *map(str, words), "--port", str(port)],
            stdout=subprocess.PIPE,
            stderr=out,
            text=True,
            env=companion_environment(),
            start_new_session=True,  # Ctrl-C is for the workers, who save and need it meanwhile
        )
    assert process.stdout is not None
    end = time.monotonic() + timeout_s
    with process.stdout as stdout:
        while not select.select([stdout], [], [], _POLL_S)[0]:
            if time.monotonic() > end or (closing is not None and closing.is_set()):
                process.kill()
                process.wait()
                raise ValueError(f"it did not listen within {timeout_s:g} s; its log is {log}")
        line = stdout.readline()
    if "listening on http://" not in line:
        process.wait()
        said = log.read_bytes()[before:].decode(errors="replace").strip()
        raise ValueError(said.removeprefix("gmeta coordinate: error: ") or "the coordinator ended at once")
    return process, int(line.strip().rsplit(":", 1)[1])


def end_coordinator(process: subprocess.Popen[str]) -> None:
    """End a coordinator with SIGTERM, and with SIGKILL ten seconds later. It may have ended already."""
    process.terminate()
    try:
        process.wait(10.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class _Keeper:
    """Keeps a coordinator process alive. One that dies is started again on the same journal and port."""

    def __init__(self, config: TrainConfig, run_dir: Path) -> None:
        self.token_file = run_dir / "coordinator.token"
        self._words = ["coordinate", "--journal", journal_file(config), "--token_file", self.token_file]
        self._words += ["--policy", config.elastic.policy]
        self._words += ["--trace", run_dir / "coordinator.jsonl"] if config.elastic.trace else []
        self._closing = threading.Event()
        self._log = run_dir / "coordinator.log"
        self._port = 0
        self._process = self._start_after_the_last()
        self.url = f"http://127.0.0.1:{self._port}"
        self._thread = threading.Thread(target=self._watch, name="gmeta-coordinator", daemon=True)
        self._thread.start()

    def _start(self) -> subprocess.Popen[str]:
        process, self._port = start_coordinator(self._words, self._port, self._log, closing=self._closing)
        return process

    def _start_after_the_last(self) -> subprocess.Popen[str]:
        """Start the coordinator. That of a run whose launcher was killed ends by itself some 20 s later, and is waited
        for.
        """
        end = time.monotonic() + _LAST_ONE_S
        while True:
            try:
                return self._start()
            except ValueError as error:
                if "is in use by another coordinator" not in str(error) or time.monotonic() > end:
                    raise
                _say(f"{error}; if it is of a run that was killed it ends by itself: waiting up to {_LAST_ONE_S:.0f} s")
                time.sleep(5.0)

    def _watch(self) -> None:
        while not self._closing.wait(_POLL_S):
            if self._process.poll() is None:
                continue
            _say(f"the coordinator ended with {self._process.returncode}: starting it again on its journal")
            try:
                self._process = self._start()
            except (ValueError, OSError) as error:
                if not self._closing.is_set():
                    _say(f"the coordinator cannot be started, and is tried again in 5 s: {error}")
                self._closing.wait(5.0)

    def close(self) -> None:
        """End the coordinator."""
        self._closing.set()
        self._thread.join()
        end_coordinator(self._process)
