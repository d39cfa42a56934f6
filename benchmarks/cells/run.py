"""Cells: what one seed of a case is made of, each run once and kept with gmeta's outputs.

    FOLDER/<case>/seed-0/<cell>-<digest>/  cell.json  predictions.npz  evaluation.json  config.yaml  metrics.jsonl
    FOLDER/<case>/tuned-<digest>.json      settings of the factor analysis, tuned on the valid tasks of seed 0

A cell is the baselines, a model, or a plain twin of a model. Its digest is that of its settings: words and config
files, the source of the function that writes its raw rows and, where no setting is given, that of gmeta's recipes; not
of gmeta's other code, so delete the folder of a cell to run it again with another gmeta. A folder appears when it is
whole.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from common import ROOT, environment, here

from cells.cases import Case
from cells.outcome import Outcome, read_outcomes, write_outcomes
from cells.raw import Place, Views, Words
from gmeta.config.evaluation import EvaluateConfig, FactorConfig
from gmeta.data.pack import open_pack
from gmeta.evaluation.predictions import RANKING_SUFFIX, task_keys
from gmeta.evaluation.variants import NetworkFree

BASELINE_CELL = "baselines"
TUNED = "factor-analysis-tuned"
TUNE_TRIALS, TUNE_MINUTES = 24, 20
QUICK = ("--schedule.max_steps", 20, "--dense.warmup_steps", 5)


@dataclass(frozen=True)
class Cell:
    """What is predicted, and made again, at once: all views of one seed of a case."""

    name: str
    train: Words = ()  # of the model
    plain: Words | None = None  # of a plain twin, besides `meta.adapt: []`


def cells_of(case: Case, models: Sequence[str]) -> list[Cell]:
    """Return the cells of each seed: the baselines, these models and their twins."""
    found = [Cell(BASELINE_CELL)]
    for model in models:
        found.append(Cell(model, case.models[model]))
        found += [Cell(f"{model}-{twin}", case.models[model], words) for twin, words in case.plain.items()]
    return found


@dataclass(frozen=True)
class Study:
    """One seed of a case, and where its cells are kept."""

    case: Case
    seed: int
    kept: Path
    quick: bool

    def folder(self, cell: Cell) -> Path:
        """Return the folder of a cell, which is there when it is done."""
        own = (*_tuning(self.case), self.case.truth) if cell.name == BASELINE_CELL else (cell.train, cell.plain)
        digest = _digest(self.case, self.quick, *own)
        return self.kept / slug(self.case.name) / f"seed-{self.seed}" / f"{cell.name}-{digest}"

    def run(self, cells: Sequence[Cell], tuned: FactorConfig, scratch: Path) -> dict[str, Outcome]:
        """Run the cells that are not done, and return what all of them predict, by view.

        Raises ValueError where two cells have other query rows.
        """
        missing = [cell for cell in cells if not self.folder(cell).exists()]
        if missing:
            bench = Bench(self, scratch / f"{slug(self.case.name)}-{self.seed}")
            for cell in missing:
                begun = time.monotonic()
                bench.run(cell, tuned)
                took = time.monotonic() - begun
                print(f"{self.case.name}, seed {self.seed}, {cell.name}: {took:.0f} s", flush=True)
            shutil.rmtree(bench.scratch)
        found: dict[str, Outcome] = {}
        for cell in cells:
            for view, outcome in read_outcomes(self.folder(cell) / "predictions.npz").items():
                found[view] = found[view].joined(outcome) if view in found else outcome
        return found

    def seconds(self, cell: Cell) -> float:
        """Return how long a cell took when it was made."""
        return float(json.loads((self.folder(cell) / "cell.json").read_text())["seconds"])

    def commit(self, cell: Cell) -> str:
        """Return the commit that a cell was made with."""
        return str(json.loads((self.folder(cell) / "cell.json").read_text())["commit"])


def tuned_factors(study: Study, scratch: Path) -> FactorConfig:
    """Return the settings of the factor analysis that do best on the valid tasks of this seed; kept, as cells are."""
    case = study.case
    file = study.kept / slug(case.name) / f"tuned-{_digest(case, study.quick, *_tuning(case))}.json"
    if not file.exists():
        bench = Bench(study, scratch / f"{slug(case.name)}-tuning")
        out, space, pack = bench.scratch / "tuning", bench.scratch / "space.yaml", bench.training_pack
        space.write_text("dense.lr: [0.001]")  # one trial of one step: only the baseline is tuned
        words: Words = ("--loss", case.loss, "--schedule.metric", case.metrics[0], "--schedule.max_steps", 1)
        words += ("--model.name", "melu", "--meta.adapt", "[head]", "--space", space, "--seeds", 1)
        words += ("--trials", TUNE_TRIALS, "--budget_minutes", 0.01 if study.quick else TUNE_MINUTES)
        here("tune", "--pack", pack, "--out", out, "--baselines", "true", *words)
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(out / "baselines.json", file)
        shutil.rmtree(bench.scratch)
        print(f"{case.name}: factor analysis is tuned", flush=True)
    return FactorConfig(**json.loads(file.read_text())["factor-analysis"])


@dataclass
class Bench:
    """The packs of one seed of a case in a scratch folder, and what is trained on them."""

    study: Study
    scratch: Path
    _stubs: dict[Words, Path] = field(default_factory=dict)

    @cached_property
    def packs(self) -> dict[str, Path]:
        """Return the pack of each view, the first one that of training."""
        study = self.study
        place = Place(self.scratch / "raw", study.seed, study.quick)
        place.folder.mkdir(parents=True)
        found = {}
        for number, (view, words) in enumerate(study.case.make(place).items()):
            found[view] = self.scratch / f"pack-{number}"
            here("prepare", *words, "--out", found[view])
        return found

    def run(self, cell: Cell, tuned: FactorConfig) -> None:
        """Make the folder of a cell."""
        begun, folder = time.monotonic(), self.study.folder(cell)
        out = self.scratch / "cell"
        out.mkdir(parents=True)
        if cell.name == BASELINE_CELL:
            found = {view: self._baselines(pack, tuned) for view, pack in self.packs.items()}
        else:
            found = self._predictions(cell, out)
        write_outcomes(out / "predictions.npz", found)
        facts = {"seconds": time.monotonic() - begun, "commit": environment()["commit"]}
        (out / "cell.json").write_text(json.dumps(facts, indent=1) + "\n")
        folder.parent.mkdir(parents=True, exist_ok=True)
        whole = Path(shutil.copytree(out, folder.with_name(f".{folder.name}"), dirs_exist_ok=True))
        whole.rename(folder)
        shutil.rmtree(out)

    def _baselines(self, pack_dir: Path, tuned: FactorConfig) -> Outcome:
        """Return what baselines predict, as `gmeta evaluate` measures them beside a run."""
        pack = open_pack(pack_dir)
        split = pack.split("test")
        truth = str(self.scratch / "raw" / "log") if self.study.case.truth else None
        free = NetworkFree.build(EvaluateConfig(run_dir="", truth=truth), pack, split)
        found = free.variants()
        other = NetworkFree.build(EvaluateConfig(run_dir=""), pack, split, tuned).variants()
        columns, name = split.columns(()), "factor-analysis"
        query = columns.is_query
        users = task_keys(pack, split.task_id[columns.task[query]]).to_pylist()
        return Outcome.of(
            users,
            columns.label[query],
            found.predictions | {TUNED: other.predictions[name]},
            found.predictions | found.ranking | {TUNED: other.ranking[name]},
        )

    def _predictions(self, cell: Cell, out: Path) -> dict[str, Outcome]:
        """Train and evaluate; what gmeta wrote goes to `out`."""
        if cell.plain is None:
            run = trained = self._train(cell.name, *cell.train)
            words: Words = ("--run_dir", run)
            names = {f"{cell.name}-before": "before", f"{cell.name}-after": "after"}
        else:
            run = self._stub(cell.train)
            config = ("--config", run / "config.yaml", "--schedule.max_steps", 0)
            trained = self._train(cell.name, *config, "--meta.adapt", "[]", *cell.plain)
            words = ("--run_dir", run, "--plain_run", trained)
            names = {cell.name: "plain", f"{cell.name}-finetuned": "plain-finetuned"}
        for name in ("config.yaml", "metrics.jsonl"):
            shutil.copy(trained / name, out)
        found = {}
        for view, pack in self.packs.items():
            own = pack == self.training_pack
            here("evaluate", *words, "--pack", pack, "--baselines", "false", "--resamples", 1)
            end = "" if own else f"-{pack.name}-*"  # as gmeta names what it measured on another pack
            (predictions,), (evaluation,) = (run.glob(f"{n}{end}.*") for n in ("predictions", "evaluation"))
            found[view] = _read_predictions(predictions, names)
            shutil.copy(evaluation, out / (f"evaluation-{slug(view)}.json" if view else "evaluation.json"))
        return found

    def _train(self, name: str, *words: object) -> Path:
        run = self.scratch / name
        extra = QUICK if self.study.quick else ()
        own = ("--pack", self.training_pack, "--run_dir", run, "--seed", self.study.seed)
        here("train", *words, *extra, *own)
        return run

    def _stub(self, words: Words) -> Path:
        """Return a run of one step: fine-tuning reads from it what the model adapts, and no weight."""
        if words not in self._stubs:
            run = self.scratch / f"stub-{len(self._stubs)}"
            own = ("--pack", self.training_pack, "--run_dir", run, "--seed", self.study.seed)
            here("train", *words, *own, "--schedule.max_steps", 1)
            self._stubs[words] = run
        return self._stubs[words]

    @property
    def training_pack(self) -> Path:
        """Return the pack that models are trained on."""
        return next(iter(self.packs.values()))


def _read_predictions(file: Path, names: dict[str, str]) -> Outcome:
    """Read the variants that are there; one that diverged is not."""
    found = pq.read_table(file).to_pydict()
    present = {name: key for name, key in names.items() if key in found}
    scores = {name: found[key] for name, key in present.items()}
    ranking = {name: found.get(key + RANKING_SUFFIX, found[key]) for name, key in present.items()}
    return Outcome.of(found["task"], found["label"], scores, ranking)


def slug(text: str) -> str:
    """Return a name of a file or folder."""
    return re.sub(r"[^a-z0-9_]+", "-", text.lower()).strip("-")


def _tuning(case: Case) -> tuple[object, ...]:
    return case.loss, case.metrics[0], TUNE_TRIALS


def _digest(case: Case, quick: bool, *settings: Any) -> str:
    """Return a digest of what decides the numbers of a cell."""
    make: Callable[[Place], Views] = case.make
    function, given = (make.func, make.keywords) if isinstance(make, partial) else (make, {})
    known = [inspect.getsource(function), given, quick, settings]
    named = [ROOT / path for path in re.findall(r"[\w./-]+\.yaml", f"{given} {settings}")]
    if () in settings:  # no word to train with: a recipe chooses
        named += sorted((ROOT / "gmeta" / "recipes").glob("*.py"))
    files = [path.read_text() for path in named if path.is_file()]
    return hashlib.sha256(json.dumps([known, files], default=str).encode()).hexdigest()[:12]
