"""Ranks that stay up and run one `gmeta train` after another, so that short runs need no import of torch each.

    with Ranks([[], []]) as ranks:                     # two, each with what its command line starts with
        failure = ranks.train(argv, environments)      # argv as after `gmeta train`; an environment a rank

A rank runs the command through the function that `python -m gmeta` calls, so that what is timed is what a user would
run. Naive ways of the study run through `study.train`. This file also makes the pack that such runs train on, and
reads their step times.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from synthetic import write_tasks

import gmeta
from gmeta.runs.log import METRICS_FILE, read_metrics

SOURCE = Path(gmeta.__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Tasks of `support` + `query` rows, and a MeLU over `features` embedded features of `dim`."""

    tasks: int
    support: int = 10
    query: int = 10
    features: int
    num_ids: int
    dim: int
    hidden: tuple[int, ...]

    def __str__(self) -> str:
        layers = "-".join(str(width) for width in self.hidden)
        return f"{self.support}+{self.query} rows a task, {self.features}x{self.dim}, {layers}"

    @property
    def options(self) -> list[str]:
        """Return options of `gmeta train` for the model. All of it adapts, in one step, second order."""
        return ["--model.embedding_dim", str(self.dim), "--model.args.hidden", json.dumps(list(self.hidden))]


def write_pack(path: Path, load: Workload, seed: int = 0) -> None:
    """Write a pack of `load.tasks` training tasks and nothing else.

    A quarter of the features describe the task, and are the same in all its rows; the others are drawn for each row by
    Zipf's law (exponent 1), so that rows are shared within and between tasks as in click logs. Labels are coin tosses.
    """
    rng = np.random.default_rng(seed)
    of_task = load.features // 4
    size = load.support + load.query
    chance = 1 / np.arange(1, load.num_ids)
    drawn = 1 + rng.choice(load.num_ids - 1, (load.tasks * size, load.features), p=chance / chance.sum())
    drawn[:, :of_task] = np.repeat(rng.integers(1, load.num_ids, (load.tasks, of_task)), size, axis=0)
    label = rng.integers(0, 2, load.tasks * size)
    write_tasks(path, drawn.reshape(load.tasks, size, load.features), label, load.num_ids, load.support)


class Ranks:
    """Processes that wait for command lines; `prefixes` are the words before each one's own (`ip netns exec …`)."""

    def __init__(self, prefixes: Sequence[Sequence[str]]) -> None:
        self._prefixes = prefixes
        self._processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Ranks:
        self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _start(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": _python_path()}
        for prefix in self._prefixes:
            self._processes.append(
                subprocess.Popen(
                    [*prefix, sys.executable, __file__, "serve"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    env=environment,
                    start_new_session=True,  # Ctrl-C is for this process, which then ends them
                )
            )
        for process in self._processes:
            self._hear(process)

    def _stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()
        self._processes = []

    @staticmethod
    def _hear(process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        line = process.stdout.readline()
        return str(json.loads(line)) if line else "the process died"

    def train(
        self,
        argv: Sequence[str],
        environments: Sequence[Mapping[str, str]],
        own: Sequence[Sequence[str]] | None = None,
        switches: Sequence[str] = (),
    ) -> str:
        """Run `gmeta train` + argv (+ its `own` words) on the first ranks, one for each environment (torchrun's).

        `switches` of the study replace parts of the trainer (`study.variants`). Returns why the run failed, or an
        empty text where it did not. After a failure all processes start anew.
        """
        taking_part = self._processes[: len(environments)]
        for process, environment, words in zip(taking_part, environments, own or [[]] * len(environments), strict=True):
            assert process.stdin is not None
            order = {"argv": [*argv, *words], "environment": dict(environment), "switches": list(switches)}
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()
        messages = [self._hear(process) for process in taking_part]
        if not any(messages):
            return ""
        self._stop()
        self._start()
        # a rank that lost its peers is a witness, not the cause
        return min((message for message in messages if message), key=lambda message: "lost its peers" in message)


def _python_path() -> str:
    """Return the same gmeta as this process's, wherever the ranks start."""
    return os.pathsep.join([str(SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])])


def serve() -> None:
    """Serve as a rank: run each command line that stdin brings, and answer with a message, empty when all went well."""
    from study.train import run

    import gmeta.training.loop  # noqa: F401  before the first command line comes, not in its time
    from gmeta import cli
    from gmeta.parallel import launch

    answers, sys.stdout = sys.stdout, sys.stderr
    told: list[str] = []
    launch.report_error = told.append
    cli.command_parser = functools.cache(cli.command_parser)  # 0.25 s of a core each time
    print(json.dumps(""), file=answers, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        os.environ.update(order["environment"])
        told.clear()
        try:
            words, switches = order["argv"], order["switches"]
            code = run(words, switches) if switches else cli.run(["train", *words])
            message = "" if code == 0 else (told[-1] if told else f"exit code {code}")
        except Exception as error:
            message = traceback.format_exception_only(error)[-1].strip()
        print(json.dumps(message), file=answers, flush=True)


def read_steps(run_dir: Path, warm_up: int) -> list[dict[str, Any]]:
    """Return what rank 0 logged of every step but the first `warm_up`, and `seconds`, the step's time."""
    records = [record for record in read_metrics(run_dir / METRICS_FILE) if record["kind"] == "train"]
    ends = [0.0, *(record["time_s"] for record in records)]
    steps = [record | {"seconds": record["time_s"] - start} for record, start in zip(records, ends, strict=False)]
    return steps[warm_up:]


if __name__ == "__main__" and sys.argv[1:] == ["serve"]:
    serve()
