"""Measure every metric of every variant on every slice, with paired intervals over tasks: evaluation.json.

docs/evaluation.md shows the layout of the document.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from gmeta.core.files import write_text
from gmeta.core.numbers import shown
from gmeta.evaluation.baselines import BASELINES
from gmeta.evaluation.metrics import (
    BINARY_METRICS,
    HIGHER_IS_BETTER,
    LABEL_MARK,
    MAX_NDCG_LABEL,
    NDCG_METRICS,
    RATING_METRICS,
    RELEVANCE_METRICS,
    Bootstrap,
    Estimate,
    calibration_curve,
    make_rows,
    without_label,
)

COLDNESS = ("warm", "user_cold", "item_cold", "both_cold")
"""The four slices that part the rows by what training has seen."""

SUPPORT_SIZES = ((0, 0), (1, 5), (6, 10), (11, 20), (21, 50), (51, None))
"""Inclusive ranges of the number of support rows, one slice each."""

BOUNDS = ("posterior", "oracle")
"""Variants that know the truth of a synthetic log: no model is expected to beat them."""

MIN_VERDICT_TASKS = 20
"""With fewer tasks there is no verdict: too few resamples differ, and the interval is too narrow."""

_PIPE_WIDTH = 110
_MAX_TABLE_WIDTH = 10_000
_UNITS = {"logloss": "nat", "mae": "label", "task_mae": "label", "rmse": "label"}


SCENARIO = "scenario="
"""Begins the name of a slice of one scenario."""
OTHER = f"{SCENARIO}other"


@dataclass(frozen=True)
class Scenarios:
    """The scenario of each query row."""

    names: tuple[str, ...]  # those that have a slice of their own
    index: NDArray[Any]  # int [N], position in `names`; len(names): another scenario, or an unknown one

    def slices(self) -> list[tuple[str, str, NDArray[np.bool_]]]:
        """Return (case, description, rows) of each of them, and of all others."""
        named = [
            (f"{SCENARIO}{name}", f"rows of scenario {name}", self.index == i) for i, name in enumerate(self.names)
        ]
        return [*named, (OTHER, "rows of other or unknown scenarios", self.index == len(self.names))]


@dataclass(frozen=True)
class _Query:
    scores: dict[str, NDArray[Any]]  # variant -> [N]
    ranking: dict[str, NDArray[Any]]  # variant -> [N], where it is not the score
    label: NDArray[Any]  # [N]
    task: NDArray[Any]  # int [N]
    support_size: NDArray[Any]  # int [N]
    item_cold: NDArray[np.bool_]  # [N]
    task_cold: NDArray[np.bool_]  # [N]
    reference: str  # the variant whose differences to all others are measured
    relevant_label: float | None  # ratings of at least this are relevant; None: clicks are, or it is not known
    weight: NDArray[Any] | None  # [N], how much each row counts; None: once
    scenario: Scenarios | None  # of each row; None where the schema names none

    def __post_init__(self) -> None:
        sizes = {name: len(score) for name, score in self.scores.items()}
        sizes |= {f"ranking of {name}": len(values) for name, values in self.ranking.items()}
        columns = ("label", "task", "support_size", "item_cold", "task_cold")
        sizes |= {name: len(getattr(self, name)) for name in columns}
        sizes |= {} if self.weight is None else {"weight": len(self.weight)}
        sizes |= {} if self.scenario is None else {"scenario": len(self.scenario.index)}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"columns of query rows have different lengths: {sizes}")
        if len(self.label) == 0:
            raise ValueError("there are no query rows to measure: choose a split that has tasks")


def evaluation_records(
    scores: dict[str, NDArray[Any]],
    *,
    label: NDArray[Any],
    task: NDArray[Any],
    support_size: NDArray[Any],
    item_cold: NDArray[Any],
    task_cold: NDArray[Any] | bool,
    binary: bool,
    resamples: int,
    seed: int,
    ranking: dict[str, NDArray[Any]] | None = None,
    relevant_label: float | None = None,
    weight: NDArray[Any] | None = None,
    scenario: Scenarios | None = None,
) -> dict[str, Any]:
    """Return the content of evaluation.json, but for what only the caller knows (`write_evaluation` adds it).

    Args:
        scores: variant -> unrounded score of each query row, [N]; variants named in `BASELINES` are baselines.
            Differences are those of `after` to each other variant (of the first variant where there is no `after`).
        label, task: label, and integer key of the task, of each row, [N].
        support_size: support rows of each row's task, [N].
        item_cold: the row's item is in no training task, [N]; False where unknown.
        task_cold: the row's task is in no training task, [N] or the same for all.
        binary: labels are 0/1 and scores are probabilities.
        resamples, seed: bootstrap resamples per slice, and their seed.
        ranking: variant -> what ranking metrics sort by, [N], where it is not the score: logits, unclipped baselines.
        relevant_label: ratings of at least this are relevant to precision@k and its like; of clicks those labelled 1
            are.
        weight: how much each row counts, [N], in all metrics but those at k; None: once.
        scenario: the scenario of each row, for slices; None where there are none.

    Raises ValueError for columns of different lengths, no rows, and values that a metric does not take.
    """
    if not scores:
        raise ValueError("there are no scores to measure: name at least one variant")
    query = _Query(
        scores,
        ranking or {},
        label,
        task,
        support_size,
        item_cold.astype(np.bool_),
        task_cold if isinstance(task_cold, np.ndarray) else np.full(len(label), task_cold),
        reference="after" if "after" in scores else next(iter(scores)),
        relevant_label=relevant_label,
        weight=weight,
        scenario=scenario,
    )
    metrics, notes = metrics_for(label, task, binary, relevant_label)
    headline = "auc" if binary else "mae"
    return {
        "headline": {"metric": headline, "higher_is_better": headline in HIGHER_IS_BETTER},
        "reference": query.reference,
        "variants": list(scores),
        "baselines": [name for name in scores if name in BASELINES],
        "resamples": resamples,
        **_measure_cases(query, metrics, resamples, seed),
        "curves": {name: calibration_curve(score, label, weight=weight) for name, score in scores.items()},
        "notes": [*weight_notes(weight), *notes],
    }


def of_labels(evaluations: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the evaluations of several labels as one: metrics are called `<metric>/<label>`, and all else is that of
    the first label. Cases have `labels`, what each counts of its own rows. One evaluation stays as it is.
    """
    names, (first, *_) = list(evaluations), evaluations.values()
    if len(names) == 1:
        return first
    headline = {**first["headline"], "metric": f"{first['headline']['metric']}{LABEL_MARK}{names[0]}"}
    counted = ("tasks", "rows", "label_mean")
    return {
        **first,
        "headline": headline,
        "labels": names,
        "cases": [
            {**case, "labels": {n: {key: e["cases"][i][key] for key in counted} for n, e in evaluations.items()}}
            for i, case in enumerate(first["cases"])
        ],
        **relabelled({name: {kind: e[kind] for kind in ("records", "differences")} for name, e in evaluations.items()}),
        "curves": {
            variant if name == names[0] else f"{variant}{LABEL_MARK}{name}": bins
            for name, evaluation in evaluations.items()
            for variant, bins in evaluation["curves"].items()
        },
        "notes": [f"{name}: {note}" for name, evaluation in evaluations.items() for note in evaluation["notes"]],
    }


def relabelled(records: Mapping[str, Mapping[str, list[dict[str, Any]]]]) -> dict[str, list[dict[str, Any]]]:
    """Return lists of records by kind, of label -> kind -> records; metrics get the name of their label."""
    kinds = next(iter(records.values()))
    return {
        kind: [
            {**record, "metric": f"{record['metric']}{LABEL_MARK}{name}"}
            for name, of_label in records.items()
            for record in of_label[kind]
        ]
        for kind in kinds
    }


def write_evaluation(path: Path | str, evaluation: dict[str, Any], settings: dict[str, Any]) -> None:
    """Write evaluation.json; `settings` (checkpoint, split, tuned steps, …) go under their own key."""
    text = json.dumps({"settings": settings, **evaluation}, allow_nan=False, indent=1)
    write_text(Path(path), text + "\n")


@dataclass(frozen=True)
class HeadlineRow:
    """The headline metric of one variant on one case, and what the reference gains on it."""

    variant: str
    record: dict[str, Any]
    difference: dict[str, Any] | None  # reference - variant; None for the reference itself
    verdict: str
    """better, worse, not distinguishable, too few tasks or undefined, of the reference; a bound; "" for itself"""


def headline_rows(evaluation: dict[str, Any], case: str = "all") -> list[HeadlineRow]:
    """Return the headline metric of every variant on `case`; nothing when the case has no rows."""
    metric = evaluation["headline"]["metric"]
    higher = evaluation["headline"]["higher_is_better"]
    differences = {d["against"]: d for d in evaluation["differences"] if d["case"] == case and d["metric"] == metric}
    rows = []
    for record in evaluation["records"]:
        if record["case"] == case and record["metric"] == metric:
            difference = differences.get(record["variant"])
            verdict = "" if difference is None else verdict_of(difference, higher)
            verdict = "a bound" if record["variant"] in BOUNDS else verdict
            rows.append(HeadlineRow(record["variant"], record, difference, verdict))
    return rows


def verdict_of(difference: dict[str, Any], higher_is_better: bool) -> str:
    """Say what a difference's interval allows: better, worse, not distinguishable, or too few tasks; undefined where
    there is no difference.
    """
    low, high = difference["low"], difference["high"]
    if difference["value"] is None:
        return "undefined"
    if difference["n"] < MIN_VERDICT_TASKS:
        return "too few tasks"
    if low is None or low <= 0 <= high:
        return "not distinguishable"
    return "better" if (low > 0) == higher_is_better else "worse"


def print_headline(evaluation: dict[str, Any], file: TextIO | None = None) -> None:
    """Print the headline metric of every variant, and the reference's paired difference to it, on standard output."""
    metric, reference = evaluation["headline"]["metric"], evaluation["reference"]
    case = evaluation["cases"][0]
    better = "higher" if evaluation["headline"]["higher_is_better"] else "lower"
    table = Table(title=f"{metric} ({better} is better), {case['rows']:,} query rows of {case['tasks']:,} tasks")
    for name in ("variant", metric, "95 %", f"{reference} - variant", "95 %", f"{reference} is"):
        table.add_column(name, justify="left" if name in ("variant", f"{reference} is") else "right", no_wrap=True)
    for row in headline_rows(evaluation):
        cells = [row.variant, *cells_of(row.record, "")]
        cells += cells_of(row.difference, "+") if row.difference else ["", ""]
        table.add_row(*cells, row.verdict, style="bold" if row.variant == reference else "")
    print_table(table, file, (*evaluation.get("left_out", ()), *evaluation["notes"]))


HEADLINE_METRICS = ("auc", "gauc", "logloss", "mae", "rmse", "calibration")
"""What `headline_metrics` keeps of an evaluation."""


BEFORE = "before"
"""Ends the name of a variant, or is all of it, that scores before adaptation."""


def headline_metrics(evaluation: dict[str, Any], variant: str | None = None) -> dict[str, dict[str, Any]]:
    """Return slice -> {metric: value, "rows", "tasks", "label_mean"} of a variant (None: the reference) of an
    evaluation, for the manifest of a version.

    Metrics before adaptation, where they were measured, are called `<metric>_before`; of several labels the first one's
    have no label in their name. Slices without rows are left out,
    and so are those by support size.
    """
    variant = evaluation["reference"] if variant is None else variant
    suffixes = {BEFORE if variant == "after" else f"{variant}-{BEFORE}": f"_{BEFORE}", variant: ""}
    found: dict[str, dict[str, Any]] = {}
    for case in evaluation["cases"]:
        if case["rows"] and case["case"] in ("all", *COLDNESS):
            found[case["case"]] = {key: case.get(key) for key in ("rows", "tasks", "label_mean")}
    first = f"{LABEL_MARK}{evaluation['labels'][0]}" if "labels" in evaluation else ""
    for record in evaluation["records"]:
        known = without_label(record["metric"]) in (*HEADLINE_METRICS, evaluation["headline"]["metric"])
        if record["variant"] in suffixes and record["case"] in found and known:
            name = record["metric"].removesuffix(first)
            found[record["case"]][name + suffixes[record["variant"]]] = record["value"]
    return found


def print_table(table: Table, file: TextIO | None = None, notes: Iterable[str] = ()) -> None:
    """Print a table, and notes under it, on standard output or `file`."""
    console = Console(file=file)
    if console.is_terminal:
        console.print(table)
    else:
        # A pipe has no width of its own; the 80 columns that rich assumes would cut the table.
        width = max(console.width, _PIPE_WIDTH)
        needed = console.measure(table, options=console.options.update(max_width=_MAX_TABLE_WIDTH)).maximum
        console.width = max(width, needed)
        console.print(table)
        console.width = width
    for note in notes:
        console.print(note, markup=False, highlight=False)


def cells_of(record: dict[str, Any], sign: str) -> list[str]:
    """Return value and interval of a record as text."""
    if record["value"] is None:
        return ["undefined", ""]
    interval = "" if record["low"] is None else f"{shown(record['low'], sign)} … {shown(record['high'], sign)}"
    return [shown(record["value"], sign), interval]


def metrics_for(
    label: NDArray[Any], task: NDArray[Any], binary: bool, relevant_label: float | None
) -> tuple[tuple[str, ...], list[str]]:
    """Return the metrics of these labels [N] and their tasks [N], and notes on what is left out."""
    if binary:
        return BINARY_METRICS, _no_relevant_row(label >= 1, task, "precision@k, recall@k, hit rate, MAP, MRR and nDCG")
    names: tuple[str, ...] = RATING_METRICS
    notes: list[str] = []
    if not 0 <= label.min() <= label.max() <= MAX_NDCG_LABEL:
        names = tuple(name for name in names if name not in NDCG_METRICS)
        notes.append(
            f"nDCG is left out: labels span {label.min():g} to {label.max():g}, it takes 0 to {MAX_NDCG_LABEL:g}"
        )
    if relevant_label is None:
        notes.append(
            "Precision@k, recall@k, hit rate, MAP and MRR are left out: name the label from which on a row is "
            "relevant, such as --relevant_label 4"
        )
        return names, notes
    notes += _no_relevant_row(label >= relevant_label, task, "precision@k, recall@k, hit rate, MAP and MRR")
    return names + RELEVANCE_METRICS, notes


def weight_notes(weight: NDArray[Any] | None) -> list[str]:
    """Say that metrics are weighted, where they are."""
    if weight is None:
        return []
    return ["Metrics count rows by their weights, but for those at k and nDCG, which count every row once"]


def _no_relevant_row(relevant: NDArray[np.bool_], task: NDArray[Any], names: str) -> list[str]:
    """Note how many tasks have no relevant row, where there are such."""
    num_tasks, num_with = len(np.unique(task)), len(np.unique(task[relevant]))
    if num_with == num_tasks:
        return []
    return [f"{num_tasks - num_with:,} of {num_tasks:,} tasks have no relevant query row: {names} leave them out"]


def _slices(query: _Query) -> list[tuple[str, str, NDArray[np.bool_]]]:
    """Return (case, description, rows) of every slice; the four cold slices part the rows, so do the support sizes."""
    cold_task, cold_item = query.task_cold, query.item_cold
    slices = [
        ("all", "every query row", np.ones(len(query.label), dtype=np.bool_)),
        ("warm", "task and item seen in training", ~cold_task & ~cold_item),
        ("user_cold", "new task, item seen in training", cold_task & ~cold_item),
        ("item_cold", "task seen in training, new item", ~cold_task & cold_item),
        ("both_cold", "new task, new item", cold_task & cold_item),
    ]
    size = query.support_size
    for low, high in SUPPORT_SIZES:
        mask = (size >= low) & (size <= (math.inf if high is None else high))
        many = f"{low} or more" if high is None else f"{low}" if low == high else f"{low} to {high}"
        slices.append((_support_slice(low, high), f"tasks with {many} support rows", mask))
    return slices if query.scenario is None else [*slices, *query.scenario.slices()]


def _support_slice(low: int, high: int | None) -> str:
    return f"support_{low}+" if high is None else f"support_{low}" if low == high else f"support_{low}-{high}"


SLICES = ("all", *COLDNESS, *(_support_slice(*sizes) for sizes in SUPPORT_SIZES))
"""The names of all slices but those of scenarios."""


def _measure_cases(query: _Query, metrics: Sequence[str], resamples: int, seed: int) -> dict[str, Any]:
    """Return the cases, records and differences of evaluation.json."""
    cases, records, differences = [], [], []
    for case, about, mask in _slices(query):
        task = query.task[mask]
        label_mean = float(np.mean(query.label[mask], dtype=np.float64)) if mask.any() else None
        counts = {"tasks": len(np.unique(task)), "rows": int(mask.sum())}
        cases.append({"case": case, "about": about, **counts, "label_mean": label_mean})
        if mask.any():
            new_records, new_differences = _measure(query, case, mask, metrics, resamples, seed)
            records += new_records
            differences += new_differences
    return {"cases": cases, "records": records, "differences": differences}


def _measure(
    query: _Query, case: str, mask: NDArray[np.bool_], metrics: Sequence[str], resamples: int, seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the records of one slice: values, and paired differences of the reference to every other variant."""
    rows = {}
    for name, score in query.scores.items():
        ranking = query.ranking.get(name, score)[mask]
        rows[name] = make_rows(
            score[mask],
            query.label[mask],
            query.task[mask],
            logit=ranking,
            relevant_label=query.relevant_label,
            weight=None if query.weight is None else query.weight[mask],
        )
    bootstrap = Bootstrap(next(iter(rows.values())).num_tasks, resamples=resamples, seed=seed)
    for variant, sample in rows.items():
        for name in metrics:
            bootstrap.add((variant, name), name, sample)
    bootstrap.run()
    records, differences = [], []
    for variant in rows:
        for name in metrics:
            unit = unit_of(name)
            keys = {"case": case, "variant": variant, "metric": name}
            records.append({**keys, **estimate_fields(bootstrap.estimate((variant, name))), "unit": unit})
            if variant != query.reference:
                estimate = bootstrap.estimate((query.reference, name), against=(variant, name))
                keys = {"case": case, "variant": query.reference, "against": variant, "metric": name}
                differences.append({**keys, **estimate_fields(estimate), "unit": unit})
    return records, differences


def unit_of(metric: str) -> str:
    """Return the unit of a metric: label, nat or 1."""
    return _UNITS.get(without_label(metric), "1")


def estimate_fields(estimate: Estimate) -> dict[str, Any]:
    """Return an estimate as JSON, which knows no nan: what is undefined is null."""
    value, low, high = (x if math.isfinite(x) else None for x in (estimate.value, estimate.low, estimate.high))
    return {"value": value, "low": low, "high": high, "n": estimate.n}
