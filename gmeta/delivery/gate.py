"""`gmeta gate`: may a candidate serve in place of the current version?

Both score the same raw query rows of held-out tasks of the newest day. Rules (`delivery/rules.py`) look at the paired
differences, by slice, and at the day's data themselves. verdict.json says what each found:

    {"format": "gmeta-gate", "version": 1, "passed", "candidate": id, "current": id,
     "pack":  {"path", "xxh3", "day", "split", "tasks", "rows"},
     "rules": [{"rule", "passed", "judged", "reason", "metric", "slice", "value", "bound"}, …],
     "data":  {"label_mean", "usual_label_mean", "numeric", "unknown", "current_now", "current_before", "before_from"},
     "metrics": what the candidate scored, by slice: for the manifest of its version,
     "evaluation": as evaluation.json, of candidate, current and baselines; null where scores are no finite numbers}
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gmeta.config.delivery import GateConfig
from gmeta.config.train import TrainConfig
from gmeta.core.files import make_folder, write_text
from gmeta.data.coverage import FEW_VALUES, unknown_fraction
from gmeta.data.pack import TaskPack, open_pack
from gmeta.data.schema import ITEM_STATISTICS, OOV, STATISTICS_COLUMNS
from gmeta.data.shards import PackSplit
from gmeta.delivery.gate_next_item import Ranked, evaluation_of, rank_day
from gmeta.delivery.gate_page import WORDS, verdict_page, word_of
from gmeta.delivery.rule_files import judged_by, read_rules, scenarios_named
from gmeta.delivery.rules import CANDIDATE, CURRENT, Measured, Rule, apply_rules
from gmeta.evaluation.baselines import fit_baselines
from gmeta.evaluation.documents import Json, read_evaluation
from gmeta.evaluation.evaluate import cold_tasks, support_used
from gmeta.evaluation.predictions import Variants, scenarios_of
from gmeta.evaluation.score import Scores, score_split
from gmeta.evaluation.slices import BEFORE, SCENARIO, evaluation_records, headline_metrics, of_labels
from gmeta.evaluation.variants import baseline_rows, training_rows
from gmeta.parallel.collectives import broadcast_from_rank_0, on_rank_0
from gmeta.parallel.launch import EXIT_REFUSED, report_error
from gmeta.parallel.mesh import Mesh, close_mesh, open_mesh
from gmeta.recommender.build import load_system, require_trusted, version_of
from gmeta.runs.bundle import is_bundle, read_manifest
from gmeta.runs.directory import read_config, read_schema
from gmeta.runs.translation import Translation, translation_of

FORMAT, VERSION = "gmeta-gate", 1
HELD_OUT: tuple[Literal["test", "valid"], ...] = ("test", "valid")
"""Splits whose tasks no training has seen; the first that a pack has is judged on."""

Earlier = tuple[dict[str, dict[str, Any]], str]
"""What a version scored on a day before its candidate's, by slice, and words that say where that is from."""


@dataclass(frozen=True)
class Verdict:
    """What a gate found; `document` is the content of verdict.json, empty on other ranks than 0."""

    passed: bool
    document: Json


@dataclass(frozen=True)
class _Day:
    """A pack and its held-out tasks, as one model reads them."""

    pack: TaskPack
    split: PackSplit
    translation: Translation


@dataclass(frozen=True)
class _Scored:
    """What one version scored on the held-out tasks of a day; on rank 0."""

    id: str
    loss: str
    day: _Day
    adapts: bool
    scores: Scores
    support_size: NDArray[np.int64]  # [tasks]

    def variants(self, name: str) -> Variants:
        """Name what it scored, and where it adapts what it scored before that."""
        logits = {name: self.scores.after, f"{name}-{BEFORE}": self.scores.before}
        return Variants.of(logits if self.adapts else {name: self.scores.before}, self.loss)

    def of_labels(self) -> dict[str, _Scored]:
        """Return by label what was scored on the rows that have it."""
        schema = self.day.pack.schema
        if not schema.labels:
            return {schema.label: self}
        return {
            label.name: replace(self, loss=label.loss, scores=self.scores.of_label(number).labelled())
            for number, label in enumerate(schema.labels)
        }

    def first(self) -> _Scored:
        """Return what was scored of the first label."""
        return next(iter(self.of_labels().values()))

    def not_finite(self) -> int:
        """Count the query rows whose score, or one of them, is no finite number."""
        finite = np.isfinite(self.scores.before + self.scores.after)
        return int((~finite.reshape(len(finite), -1).all(1)).sum())

    def item_cold(self) -> NDArray[np.bool_]:
        """Say of each query row whether the version has not seen its item, [N]."""
        rows, item = self.scores.row, self.day.pack.schema.item
        cold: NDArray[np.bool_] = self.day.split.columns(()).item_cold[rows]
        features = {f.name for f in self.day.pack.schema.features if f.kind == "categorical"}
        if item in features and item is not None:
            cold = cold | (self.day.translation.of_feature(item, self.day.split.feature_ids(item)[rows]) == OOV)
        return cold


def gate(config: GateConfig) -> int:
    """Run `gmeta gate` on this rank: 0 where the candidate may serve, `EXIT_REFUSED` where it may not."""
    if judge(config).passed:
        return 0
    report_error(f"gmeta gate: the candidate is refused; {Path(config.out) / 'verdict.html'} says why")
    return EXIT_REFUSED


def judge(config: GateConfig, before: Earlier | None = None) -> Verdict:
    """Judge a candidate; rank 0 prints the rules and writes verdict.json and verdict.html.

    Args:
        config: settings of `gmeta gate`.
        before: what the current version scored on a day before, where that is known better than its manifest says it.

    Raises:
        ValueError: a version or a pack is missing or damaged; the pack's columns mean something else to one of them;
            the versions were trained on labels of different kinds; or a rule is not understood.
    """
    mesh = open_mesh(config.device, config.timeout_s)
    try:
        return judge_on(mesh, config, before)
    finally:
        close_mesh(mesh)


def judge_on(mesh: Mesh, config: GateConfig, before: Earlier | None = None) -> Verdict:
    """`judge` on a mesh that is open; collective."""
    candidate, current = Path(config.candidate), Path(config.current)
    pack = open_pack(config.pack)
    trained = {source: read_config(source) for source in (candidate, current)}
    for source in trained:
        require_trusted(trained[source].model.name, f"{source} has", trust_model=config.trust_model)
    loss = _one_loss(trained)
    rules = read_rules(config.rules, kind=judged_by(pack.schema, loss), labels=pack.schema.labels)
    _require_scenario(rules, pack)
    days = {source: _day(source, pack) for source in (candidate, current)}  # mistakes come before the work
    earlier = [] if config.previous_pack is None else [_day(current, open_pack(config.previous_pack))]
    on_rank_0(lambda: make_folder("out", config.out), mesh)
    if pack.schema.next_item:
        versions = [(candidate, days[candidate]), (current, days[current]), *((current, day) for day in earlier)]
        ranked = [rank_day(mesh, config, of, day.pack, day.split, day.translation) for of, day in versions]

        def measure() -> tuple[str, str, Measured]:
            return _measure_ranked(config, list(days.values()), [one for one in ranked if one is not None], before)

    else:
        theirs = _score(mesh, config, current, [days[current], *earlier])
        ours = _score(mesh, config, candidate, [days[candidate]])

        def measure() -> tuple[str, str, Measured]:
            found = _measure(config, ours[0], theirs, loss == "bce", before, scenarios_named(rules))
            return ours[0].id, theirs[0].id, found

    document = on_rank_0(lambda: _verdict(config, rules, days[candidate], *measure()), mesh) or {}
    # the others wait until the verdict is written: a launcher ends all when one ends with a code
    passed = broadcast_from_rank_0(float(document.get("passed", False)), mesh)
    return Verdict(bool(passed), document)


def _require_scenario(rules: Sequence[tuple[str, Rule]], pack: TaskPack) -> None:
    if pack.schema.scenario is None and (names := scenarios_named(rules)):
        raise ValueError(
            f"a rule looks at the slice {SCENARIO}{names[0]}, but the schema of {pack.path} names no scenario: leave "
            "the slice out, or prepare with the key scenario"
        )


def _one_loss(trained: Mapping[Path, TrainConfig]) -> str:
    """Return the loss of the versions. ValueError where only one of them predicts clicks."""
    if len({config.loss == "bce" for config in trained.values()}) > 1:
        losses = ", ".join(f"{source} with {config.loss!r}" for source, config in trained.items())
        raise ValueError(
            f"the versions were trained with losses of two kinds ({losses}): clicks and ratings cannot be compared; "
            "train the candidate with the loss of the current version"
        )
    return next(iter(trained.values())).loss


def _day(source: Path, pack: TaskPack) -> _Day:
    name = next((name for name in HELD_OUT if name in pack.splits), None)
    if name is None:
        raise ValueError(
            f"{pack.path} has no test and no valid tasks: nothing was held out to judge by; prepare it with some"
        )
    return _Day(pack, pack.split(name), translation_of(source, pack))


def _score(mesh: Mesh, config: GateConfig, source: Path, days: Sequence[_Day]) -> list[_Scored]:
    """Score the held-out tasks of some days by one version; collective. Nothing is returned on other ranks than 0."""
    found: list[_Scored] = []
    for number, day in enumerate(days):
        if not number or day.pack.text_tables():  # a pack has texts of its own
            texts = day.pack.text_tables()
            system, trained, step = load_system(source, "best", mesh, trust_model=config.trust_model, text_tables=texts)
            name = version_of(source, step)
        scores = score_split(
            system,
            day.split,
            tasks_per_batch=config.tasks_per_batch,
            max_support_rows=trained.loader.max_support_rows,
            translate=day.translation,
        )
        if scores is not None:
            adapts, support = bool(trained.meta.adapt), support_used(day.split, trained)
            found.append(_Scored(name, trained.loss, day, adapts, scores, support))
    return found


def _measure(
    config: GateConfig,
    ours: _Scored,
    theirs: Sequence[_Scored],
    binary: bool,
    known: Earlier | None,
    scenarios: Sequence[str],
) -> Measured:
    """Measure what the rules look at, the slices of `scenarios` too; `theirs` has what the current version scored, on
    the day and on one before.
    """
    current, *earlier = theirs
    by_label = {name: one.scores.label for name, one in ours.of_labels().items()}
    scores, labels = ours.scores, next(iter(by_label.values()))
    if len(scores.row) == 0:
        raise ValueError(f"{config.pack} has no query rows in split {ours.day.split.name}: prepare it with some")
    not_finite = {CANDIDATE: ours.not_finite(), CURRENT: current.not_finite()}
    finite = not any(not_finite.values())
    measured = earlier and len(earlier[0].scores.row) and not earlier[0].not_finite()
    before, before_from = _before(config, _own_metrics(config, earlier[0], binary) if measured else None, known)
    usual = (before or {}).get("all", {}).get("label_mean") or read_schema(Path(config.current))[0].label_mean or None
    return Measured(
        tasks=len(np.unique(scores.task)),
        rows=len(scores.row),
        not_finite=not_finite,
        evaluation=_evaluation(config, ours, current, scenarios) if finite else None,
        label_mean=float(labels.mean()),
        label_std=float(labels.std()),
        label_stds={name: float(values.std()) for name, values in by_label.items()},
        usual_label_mean=usual,
        numeric=_numeric_moments(ours),
        unknown=_unknown_shares(ours.day, {CANDIDATE: ours.day.translation, CURRENT: current.day.translation}),
        current_now=_own_metrics(config, current, binary) if finite else {},
        current_before=before,
        before_from=before_from,
    )


def _measure_ranked(
    config: GateConfig, days: Sequence[_Day], found: Sequence[Ranked], known: Earlier | None
) -> tuple[str, str, Measured]:
    """Return the ids of candidate and current version, and what the rules look at. `found` has them both, and the
    current version on a day before where one is named; `days` has how both read the newest day.
    """
    ours, theirs, *earlier = found
    if not len(ours.ranks.row):
        raise ValueError(f"{config.pack} has no targets in split {ours.split.name}: prepare it with some")
    not_finite = {CANDIDATE: ours.not_finite(), CURRENT: theirs.not_finite()}
    evaluation = None if any(not_finite.values()) else evaluation_of(config, {CANDIDATE: ours, CURRENT: theirs})
    measured = earlier and len(earlier[0].ranks.row) and not earlier[0].not_finite()
    older = headline_metrics(evaluation_of(config, {CURRENT: earlier[0]})) if measured else None
    before, before_from = _before(config, older, known)
    users = len(np.unique(ours.ranks.task)) if evaluation is None else evaluation["cases"][0]["tasks"]
    return (
        ours.id,
        theirs.id,
        Measured(
            tasks=users,
            rows=len(ours.ranks.row),
            not_finite=not_finite,
            evaluation=evaluation,
            label_mean=1.0,  # an event has no other
            label_std=0.0,
            usual_label_mean=None,
            numeric={},
            unknown=_unknown_shares(days[0], {CANDIDATE: days[0].translation, CURRENT: days[1].translation}),
            current_now={} if evaluation is None else headline_metrics(evaluation, CURRENT),
            current_before=before,
            before_from=before_from,
        ),
    )


def _evaluation(config: GateConfig, ours: _Scored, theirs: _Scored, scenarios: Sequence[str]) -> Json:
    """Return the evaluation of candidate, current version and baselines, by the coldness that the pack knows."""
    pack, split = ours.day.pack, ours.day.split
    pairs = zip(ours.of_labels().items(), theirs.of_labels().values(), strict=True)
    evaluation = of_labels(
        {name: _of_label(config, one, two, scenarios, n) for n, ((name, one), two) in enumerate(pairs)}
    )
    notes = pack.warnings()
    if "train" not in pack.splits:
        notes.append("baselines are left out: the pack has no train tasks")
    return {**evaluation, "notes": [*evaluation["notes"], *notes], "left_out": pack.left_out(split.name)}


def _of_label(config: GateConfig, ours: _Scored, theirs: _Scored, scenarios: Sequence[str], label: int) -> Json:
    """Return the evaluation on the rows that have one label."""
    pack, split, scores = ours.day.pack, ours.day.split, ours.scores
    found = ours.variants(CANDIDATE).joined(theirs.variants(CURRENT))
    if "train" in pack.splits:
        fitted = fit_baselines(training_rows(pack, label), seed=config.seed)
        raw = fitted.score(baseline_rows(pack, split, label))
        known = np.isin(np.flatnonzero(_query_rows(split)), scores.row)
        found = found.joined(Variants(fitted.clip(raw), raw).where(known))
    return evaluation_records(
        found.predictions,
        ranking=found.ranking,
        label=scores.label,
        task=scores.task,
        support_size=ours.support_size[scores.task],
        item_cold=split.columns(()).item_cold[scores.row],
        task_cold=cold_tasks(pack, split)[scores.task] if "train" in pack.splits else True,
        binary=ours.loss == "bce",
        resamples=config.resamples,
        seed=config.seed,
        weight=scores.weight,
        scenario=scenarios_of(pack, split, scores.row, scenarios),
    )


def _own_metrics(config: GateConfig, scored: _Scored, binary: bool) -> dict[str, dict[str, Any]]:
    """Return what a version scored, of the first label, by slices of what it has seen itself."""
    scored = scored.first()
    pack, split, scores = scored.day.pack, scored.day.split, scored.scores
    found = scored.variants(CURRENT)
    return headline_metrics(
        evaluation_records(
            found.predictions,
            ranking=found.ranking,
            label=scores.label,
            task=scores.task,
            support_size=scored.support_size[scores.task],
            item_cold=scored.item_cold(),
            task_cold=cold_tasks(pack, split)[scores.task] if "train" in pack.splits else True,
            binary=binary,
            resamples=1,  # values alone are asked for
            seed=config.seed,
            weight=scores.weight,
        )
    )


def _before(
    config: GateConfig, measured: dict[str, dict[str, Any]] | None, known: Earlier | None
) -> tuple[dict[str, dict[str, Any]] | None, str]:
    """Return what the current version scored on a day before, with where it is from; None where nobody knows. It is
    what was `measured` on the pack that is named, where there is one.
    """
    if measured is not None:
        return measured, f"on {config.previous_pack}"
    if known is not None:
        return known
    current = Path(config.current)
    if is_bundle(current):
        recorded = read_manifest(current).get("metrics")
        return (recorded, "as its manifest says") if _is_metrics(recorded) else (None, "")
    evaluation = read_evaluation(current / "evaluation.json")
    return (None, "") if evaluation is None else (headline_metrics(evaluation), "as its evaluation.json says")


def _is_metrics(found: object) -> bool:
    """Whether a manifest's metrics are those of `headline_metrics`: numbers by slice."""
    return isinstance(found, dict) and all(
        isinstance(values, dict) and all(isinstance(value, int | float | None) for value in values.values())
        for values in found.values()
    )


def _query_rows(split: PackSplit) -> NDArray[np.bool_]:
    rows: NDArray[np.bool_] = split.columns(()).is_query
    return rows


def _numeric_moments(scored: _Scored) -> dict[str, dict[str, float]]:
    """Return mean and standard deviation of each numeric column over the query rows, which are all of the day.

    Stored columns count from the base's mean in its standard deviations, so that these are its drift. Item statistics
    are left out: an item's count grows from day to day.
    """
    pack, split, query = scored.day.pack, scored.day.split, _query_rows(scored.day.split)
    moving = STATISTICS_COLUMNS if pack.manifest["data_schema"].get(ITEM_STATISTICS) else ()
    found = {}
    for number, column in enumerate(pack.schema.numeric):
        if column.name in moving:
            continue
        values = split.numeric_column(number)[query].astype(np.float64)
        found[column.name] = {"mean": float(values.mean()), "std": float(values.std())}
    return found


def _unknown_shares(day: _Day, translations: Mapping[str, Translation]) -> dict[str, dict[str, float]]:
    """Return for each feature with a vocabulary which share of its ids in query rows each version does not know.

    The task column is left out, since new tasks are what a version adapts to, and so are columns of few values.
    """
    pack, split, query = day.pack, day.split, _query_rows(day.split)
    found = {}
    for feature in pack.schema.features:
        if feature.name == pack.schema.task or feature.table not in pack.manifest["vocab"]:
            continue
        lengths = split.lengths(feature.name)
        ids = split.feature_ids(feature.name)[query if lengths is None else np.repeat(query, lengths)]
        if len(ids) >= FEW_VALUES:
            found[feature.name] = {
                name: unknown_fraction(translation.of_feature(feature.name, ids))
                for name, translation in translations.items()
            }
    return found


def _verdict(
    config: GateConfig,
    rules: Sequence[tuple[str, Rule]],
    day: _Day,
    candidate: str,
    current: str,
    measured: Measured,
) -> Json:
    """Apply the rules, write the verdict and print it; returns the content of verdict.json."""
    outcomes = apply_rules(rules, measured)
    pack, evaluation = day.pack, measured.evaluation
    keys = ("label_mean", "usual_label_mean", "numeric", "unknown", "current_now", "current_before", "before_from")
    document = {
        "format": FORMAT,
        "version": VERSION,
        "passed": all(outcome.passed for _, outcome in outcomes),
        "candidate": candidate,
        "current": current,
        "pack": {
            "path": str(pack.path),
            "xxh3": pack.manifest["xxh3"],
            "day": pack.manifest.get("day", {}).get("number", 0),
            "split": day.split.name,
            "tasks": measured.tasks,
            "rows": measured.rows,
        },
        "rules": [{"rule": name, **asdict(outcome)} for name, outcome in outcomes],
        "data": {key: getattr(measured, key) for key in keys},
        "metrics": None if evaluation is None else headline_metrics(evaluation, CANDIDATE),
        "evaluation": evaluation,
    }
    folder = Path(config.out)
    write_text(folder / "verdict.json", json.dumps(document, allow_nan=False, indent=1) + "\n")
    write_text(folder / "verdict.html", verdict_page(document))
    _print(document)
    print(f"written to {folder}: verdict.json, verdict.html")
    return document


def _print(document: Json) -> None:
    pack, rules = document["pack"], document["rules"]
    print(
        f"{document['candidate']} in place of {document['current']}, on {pack['rows']:,} query rows of "
        f"{pack['tasks']:,} {pack['split']} tasks of {pack['path']}"
    )
    for rule in sorted(rules, key=lambda rule: WORDS.index(word_of(rule))):
        print(f"  {word_of(rule):10} {rule['rule']}: {rule['reason']}")
    refused = sum(not rule["passed"] for rule in rules)
    print(f"refused, by {refused} of {len(rules)} checks" if refused else "passed: the candidate may serve")
