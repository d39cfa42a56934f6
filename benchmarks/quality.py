"""What adaptation buys on real ratings and clicks of cold users and films, over seeds, beside plain training and means.

    python benchmarks/quality.py [--quick] [--json FILE] [--folder DIR] [--jobs N]
                                 [--case NAME …] [--model NAME …] [--seeds N]

Everything runs through the commands that users run: prepare, train, train again with `meta.adapt: []` (plain),
evaluate. A seed sets the draws of raw rows, the split of tasks, where it is random, the initialisation and the order.

The unit of work is a cell: the baselines, a model, or a plain twin of it, for one seed of a case. With `--folder`
every cell is kept there when it is made, and not made again while its settings stay the same: an end in between costs
the cells that were running (cells/run.py says what is kept). Cases are in cells/cases.py, their protocol in
docs/quality.md.

Data is read from GMETA_DATA (default ../shared/data); a case without its data is left out, and says so.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import active_children, get_context
from pathlib import Path

from cells.cases import CASES, Case
from cells.measure import RESAMPLES, Measured, measure, render
from cells.outcome import Outcome
from cells.run import TUNE_TRIALS, Study, cells_of, tuned_factors
from common import DATA, ROOT, add_json, parse, publish, table


def chosen(args: argparse.Namespace) -> list[Case]:
    """Return the cases that were asked for and can be run, with the models that can; say what is left out."""
    found = []
    for case in (case for case in CASES if not args.case or case.name in args.case):
        if args.quick and not case.quick:
            continue
        if case.data and not (DATA / case.data).is_dir():
            print(f"{case.name} is left out: {DATA / case.data} does not exist; set GMETA_DATA to the data's folder")
            continue
        models = {name: words for name, words in case.models.items() if not args.model or name in args.model}
        for name, words in list(models.items()):
            for path in (str(word) for word in words if str(word).endswith(".yaml")):
                if not (ROOT / path).exists():
                    print(f"{case.name}, {name} is left out: there is no {path}")
                    del models[name]
        if args.quick:
            models, case = dict(list(models.items())[:1]), replace(case, plain=dict(list(case.plain.items())[:1]))
        if models:
            found.append(replace(case, models=models, seeds=1 if args.quick else args.seeds or case.seeds))
    return found


def run(cases: Sequence[Case], kept: Path, scratch: Path, jobs: int, quick: bool) -> list[Measured]:
    """Run the cells that are not kept, some seeds at a time, and measure every view of every case."""
    found = []
    with _pool(jobs) as pool:
        studies = {case.name: [Study(case, seed, kept, quick) for seed in range(case.seeds)] for case in cases}
        tuned = {case.name: pool.submit(tuned_factors, studies[case.name][0], scratch) for case in cases}
        started: dict[str, list[Future[dict[str, Outcome]]]] = {}
        for case in cases:
            words = (cells_of(case, list(case.models)), tuned[case.name].result(), scratch)
            started[case.name] = [pool.submit(study.run, *words) for study in studies[case.name]]
        for case in cases:
            outcomes = [one.result() for one in started[case.name]]
            for view in outcomes[0]:
                name = f"{case.name}, {view}" if view else case.name
                found.append(measure(name, case.metrics, tuple(case.models), [outcome[view] for outcome in outcomes]))
    return found


@contextmanager
def _pool(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Give processes of one thread each, which end with the first error, or with Ctrl-C."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in active_children():
                child.kill()  # a training answers SIGTERM by saving; its files lie in this process's scratch folder
            raise


def costs(cases: Sequence[Case], kept: Path, quick: bool) -> tuple[str, list[str]]:
    """Return what cells took, as a section, and the commits that they were made with."""
    rows, total, commits = [], 0.0, set()
    for case in cases:
        for cell in cells_of(case, list(case.models)):
            made = [Study(case, seed, kept, quick) for seed in range(case.seeds)]
            seconds = [study.seconds(cell) for study in made]
            commits |= {study.commit(cell) for study in made}
            total += sum(seconds)
            rows.append([case.name, cell.name, str(len(seconds)), f"{statistics.mean(seconds):.0f}"])
    said = f"One core, {total / 3600:.1f} hours in all; preparing packs and tuning come on top."
    return "\n\n".join(["## Time", table(["case", "cell", "seeds", "s a seed"], rows), said]), sorted(commits)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Quality on cold users and films, over seeds.")
    parser.add_argument("--quick", action="store_true", help="one seed, one model, 20 steps; writes no result files")
    add_json(parser)
    models = sorted({model for case in CASES for model in case.models})
    parser.add_argument("--seeds", type=int, help="seeds 0 to N - 1; unset: what each case says, 5 or 10")
    parser.add_argument("--jobs", type=int, default=2, help="seeds run at a time, one thread each")
    parser.add_argument("--folder", type=Path, help="keep what is done here, and go on from it")
    parser.add_argument("--case", nargs="+", choices=[case.name for case in CASES], help="only these", metavar="NAME")
    parser.add_argument("--model", nargs="+", choices=models, help="only these, with their twins", metavar="NAME")
    return parse(parser)


def main() -> None:
    args = options()
    cases = chosen(args)
    if not cases:
        return
    with tempfile.TemporaryDirectory() as scratch:
        kept = Path(scratch) if args.folder is None else args.folder
        measured = run(cases, kept, Path(scratch), args.jobs, args.quick)
        took, commits = costs(cases, kept, args.quick)
    bodies = [*map(render, measured), took]
    if args.quick:
        bodies.insert(0, "QUICK: one seed, one model, 20 steps a training; the numbers say only that everything runs.")
    config = {
        "seeds": json.dumps({case.name: case.seeds for case in cases}),
        "values": "mean ± standard deviation over seeds",
        "intervals": f"{RESAMPLES} bootstrap resamples of the test tasks, of the mean over seeds, paired",
        "factor-analysis-tuned": f"{TUNE_TRIALS} settings, ranked on the valid tasks of seed 0",
        "threads": "1 a process",
        "commits of the cells": ", ".join(commits),
        "configs": json.dumps({case.name: case.models for case in cases}),
    }
    records = [record for one in measured for record in one.records]
    publish("quality", "\n\n".join(bodies), records, config, args)


if __name__ == "__main__":
    main()
