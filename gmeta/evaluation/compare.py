"""`gmeta compare`: the stored predictions of several runs, measured on the same query rows and paired over tasks.

docs/evaluation.md shows the layout of comparison.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from rich.table import Table

from gmeta.config.evaluation import CompareConfig
from gmeta.core.files import make_folder, write_text
from gmeta.data.sources import Connection, database, only_file, reading
from gmeta.evaluation import charts
from gmeta.evaluation.charts import Points
from gmeta.evaluation.compare_next_item import RANK_COLUMNS, compare_places, read_places, read_ranked_rows
from gmeta.evaluation.documents import Json
from gmeta.evaluation.metrics import HIGHER_IS_BETTER, LABEL_MARK, NO_INTERVAL, Bootstrap, make_rows
from gmeta.evaluation.next_item import MODEL, NEXT_ITEM, RANKED_AMONG
from gmeta.evaluation.pages import badge, figure, metric_name, page, row_cells, stacked, variant_table
from gmeta.evaluation.predictions import PREDICTIONS_FILE, RANKING_SUFFIX
from gmeta.evaluation.score import Floats, Ints
from gmeta.evaluation.slices import (
    SCENARIO,
    Scenarios,
    cells_of,
    estimate_fields,
    metrics_for,
    print_table,
    relabelled,
    unit_of,
    verdict_of,
    weight_notes,
)

_SHOWN_KEYS = 3
"""Rows that a refusal shows of those that only one run has."""


@dataclass(frozen=True)
class _Run:
    name: str
    file: Path
    variant: str  # after adaptation, or before where the run adapts nothing
    loss: str  # empty of a next-item run
    step: str
    columns: tuple[str, ...]
    scenarios: tuple[str, ...]  # those that have a slice of their own
    labels: dict[str, str]  # the losses of several labels by name; empty: there is one
    among: tuple[tuple[str, str], ...]  # who was ranked, of a next-item run; empty for one that scores rows

    def of_label(self, name: str) -> _Run:
        """Return the same run, whose variant is of one of several labels."""
        if not self.labels:
            return self
        return replace(self, variant=f"{self.variant}{LABEL_MARK}{name}", loss=self.labels[name])


def compare(config: CompareConfig) -> int:
    """Run `gmeta compare`: print metrics and paired differences to the first run; with `out` write them too.

    Raises:
        ValueError: a run has no stored predictions, or not of the same query rows; with what differs.
    """
    runs = _open_runs(config.runs)
    binary = all(loss == "bce" for run in runs for loss in (*run.labels.values(), run.loss))
    ranked = bool(runs[0].among)
    if (binary or ranked) and config.relevant_label is not None:
        of = "next items" if ranked else "clicks"
        which = "each target is the relevant one" if ranked else "those labelled 1 are"
        raise ValueError(f"relevant_label is {config.relevant_label:g}: it is for ratings, of {of} {which}")
    for other in runs[1:]:
        _require_same_ranking(runs[0], other)
        _require_same_rows(runs[0], other)
    document = _of_ranks(config, runs) if ranked else _comparison(config, runs, binary)
    _print(document)
    if config.out is not None:
        folder = make_folder("out", config.out)
        write_text(folder / "comparison.json", json.dumps(document, allow_nan=False, indent=1) + "\n")
        write_text(folder / "comparison.html", _page(document))
        print(f"written to {folder}: comparison.json, comparison.html")
    return 0


def _open_runs(given: Sequence[str]) -> list[_Run]:
    """Find the predictions of each run; names are those of the folders, or the paths where two have one name."""
    short = [Path(path).resolve().name for path in given]
    names = short if len(set(short)) == len(short) else list(given)
    if len(set(names)) < len(names):
        raise ValueError(f"runs are {', '.join(given)}: one is named twice; name each once")
    return [_open_run(name, path) for name, path in zip(names, given, strict=True)]


def _open_run(name: str, given: str) -> _Run:
    file = Path(given)
    file = file if file.suffix == ".parquet" else file / PREDICTIONS_FILE
    if not file.is_file():
        raise ValueError(
            f"{file} is missing: run `gmeta evaluate --run_dir {given}` first, or name the folder that its --out wrote"
        )
    try:
        schema = pq.read_schema(file)
        told = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
        variants = json.loads(told["variants"])
        among = tuple((key, told[key]) for key in RANKED_AMONG) if told.get("objective") == NEXT_ITEM else ()
        variant = MODEL if among else "after" if "after" in variants else "before"
        scenarios, labels = tuple(json.loads(told.get("scenarios", "[]"))), json.loads(told.get("labels", "{}"))
        loss = "" if among else told["loss"]
        run = _Run(name, file, variant, loss, told["step"], tuple(schema.names), scenarios, labels, among)
        needed = {f"{column}{LABEL_MARK}{label}" for column in ("label", variant) for label in labels}
        lacking = {"task", "row", *(RANK_COLUMNS if among else needed or ("label", variant))} - set(run.columns)
    except (pa.ArrowInvalid, KeyError, ValueError) as error:
        raise ValueError(f"{file} is damaged, or of an earlier release ({error}): run `gmeta evaluate` again") from None
    if lacking:
        raise ValueError(f"{file} lacks the column {sorted(lacking)[0]!r}: run `gmeta evaluate` again")
    return run


def _require_same_ranking(first: _Run, other: _Run) -> None:
    """Raise ValueError unless both runs score rows, or both ranked targets among the same candidates."""
    if bool(first.among) != bool(other.among):
        ranking, scoring = (first, other) if first.among else (other, first)
        raise ValueError(f"{ranking.name} ranks next items, {scoring.name} scores rows: compare runs of one kind")
    for (name, ours), (_, theirs) in zip(first.among, other.among, strict=True):
        if ours != theirs:
            option = "seed" if name == "sample_seed" else name
            raise ValueError(
                f"{other.name} ranked with {option} {theirs}, {first.name} with {ours}: run `gmeta evaluate` on both "
                f"with the same --{option}"
            )


def _require_same_rows(first: _Run, other: _Run) -> None:
    """Raise ValueError with what differs, unless both runs predicted the same query rows, and the same labels."""
    if list(first.labels) != list(other.labels):
        told = [", ".join(run.labels) or "one label" for run in (first, other)]
        raise ValueError(f"{first.name} predicted {told[0]}, {other.name} {told[1]}: compare runs of the same labels")
    for column, what in (("item", "name items"), ("weight", "have weights")):
        if (column in first.columns) != (column in other.columns):
            having, lacking = (first, other) if column in first.columns else (other, first)
            raise ValueError(
                f"the predictions of {having.name} {what}, those of {lacking.name} do not: evaluate both on one pack"
            )
    with database() as con, reading(str(other.file)):
        only = [_rows_only_in(con, *pair) for pair in ((first, other), (other, first))]
    told = [
        f"{count:,} rows only in {run.name} (first: {'; '.join(rows)})"
        for run, (count, rows) in zip((first, other), only, strict=True)
        if count
    ]
    if told:
        raise ValueError(
            f"{other.name} was not measured on the query rows of {first.name}: {', '.join(told)}. Only the same rows "
            "can be compared: evaluate both runs on one pack and split"
        )


def _rows_only_in(con: Connection, run: _Run, other: _Run) -> tuple[int, list[str]]:
    """Count the rows that `other` lacks, and return the first of them as text."""
    labels = [f"label{LABEL_MARK}{name}" for name in run.labels] or ["label"]
    kinds = {
        "task": "VARCHAR",
        "item": "VARCHAR",
        "row": "BIGINT",
        "candidates": "BIGINT",
        **dict.fromkeys(labels, "DOUBLE"),
        "weight": "DOUBLE",
    }
    kinds = {name: kind for name, kind in kinds.items() if name in run.columns}
    keys = ", ".join(f'CAST("{name}" AS {kind}) AS "{name}"' for name, kind in kinds.items())
    mine, theirs = (f"SELECT {keys} FROM read_parquet({only_file(one.file)})" for one in (run, other))
    con.execute(f"CREATE OR REPLACE TEMP TABLE only_here AS {mine} EXCEPT ALL {theirs}")
    (count,) = con.execute("SELECT count(*) FROM only_here").fetchall()[0]
    rows = con.execute(f'SELECT * FROM only_here ORDER BY "row" LIMIT {_SHOWN_KEYS}').fetchall()
    return count, [", ".join(f"{name} {value}" for name, value in zip(kinds, row, strict=True)) for row in rows]


def _read(run: _Run) -> tuple[Floats, Floats]:
    """Return predictions, and what ranking metrics sort by, each [N], in the order of the rows' numbers."""
    ranking = run.variant + RANKING_SUFFIX
    names = [run.variant, ranking] if ranking in run.columns else [run.variant]
    table = pq.read_table(run.file, columns=["row", *names])
    order = np.argsort(table["row"].to_numpy(), kind="stable")
    score = table[run.variant].to_numpy()[order]
    return score, table[names[-1]].to_numpy()[order]


@dataclass(frozen=True)
class _Rows:
    """The query rows that all runs predicted, in the order of their numbers."""

    label: Floats  # [N], NaN where the row lacks one of several
    task: Ints  # [N], number of the task
    weight: Floats | None  # [N]; None where rows have none
    scenario: Scenarios | None  # None where there are none

    def slices(self) -> list[tuple[str, str, NDArray[np.bool_]]]:
        """Return (case, description, rows) of all rows that have the label, and of those of each scenario."""
        known = ~np.isnan(self.label)
        of_scenarios = [] if self.scenario is None else self.scenario.slices()
        return [("all", "every query row", known), *((case, about, mask & known) for case, about, mask in of_scenarios)]


def _read_rows(run: _Run, label: str) -> _Rows:
    optional = [name for name in ("weight", "scenario") if name in run.columns]
    column = f"label{LABEL_MARK}{label}" if run.labels else "label"
    table = pq.read_table(run.file, columns=["row", column, "task", *optional])
    order = np.argsort(table["row"].to_numpy(), kind="stable")
    task = table["task"].combine_chunks().dictionary_encode().indices.to_numpy()
    weight = table["weight"].to_numpy()[order] if "weight" in optional else None
    scenario = None
    if "scenario" in optional:
        names = run.scenarios
        place = {name: number for number, name in enumerate(names)}
        texts = table["scenario"].cast(pa.string()).to_pylist()
        scenario = Scenarios(names, np.array([place.get(text, len(names)) for text in texts])[order])
    return _Rows(table[column].to_numpy()[order], task[order].astype(np.int64), weight, scenario)


def _comparison(config: CompareConfig, runs: Sequence[_Run], binary: bool) -> Json:
    """Return the content of comparison.json; of several labels metrics are called `<metric>/<label>`, and numbers of
    rows and tasks are those of the first.
    """
    labels = runs[0].labels
    if not labels:
        return _of_label(config, runs, binary, "")
    found = {
        name: _of_label(config, [run.of_label(name) for run in runs], loss == "bce", name)
        for name, loss in labels.items()
    }
    first = next(iter(found.values()))
    named = {
        **first,
        "headline": {**first["headline"], "metric": f"{first['headline']['metric']}/{next(iter(labels))}"},
    }
    kinds = ("records", "differences")
    named |= relabelled({name: {kind: one[kind] for kind in kinds} for name, one in found.items()})
    named["runs"] = [{**told, "variant": run.variant} for told, run in zip(first["runs"], runs, strict=True)]
    if "slices" in first:
        named["slices"] = [
            part | relabelled({name: {kind: one["slices"][i][kind] for kind in kinds} for name, one in found.items()})
            for i, part in enumerate(first["slices"])
        ]
    return named | {"notes": [f"{name}: {note}" for name, one in found.items() for note in one["notes"]]}


def _of_ranks(config: CompareConfig, runs: Sequence[_Run]) -> Json:
    """Return the content of comparison.json of next-item runs."""
    found = {run.name: read_places(run.file) for run in runs}
    rows = read_ranked_rows(runs[0].file, runs[0].scenarios)
    return {"runs": _told(runs)} | compare_places(found, rows, resamples=config.resamples, seed=config.seed)


def _told(runs: Sequence[_Run]) -> list[Json]:
    return [{"run": r.name, "file": str(r.file), "variant": r.variant, "step": int(r.step)} for r in runs]


def _of_label(config: CompareConfig, runs: Sequence[_Run], binary: bool, label: str) -> Json:
    """Return the comparison of one label."""
    rows = _read_rows(runs[0], label)
    known, relevant = ~np.isnan(rows.label), None if binary else config.relevant_label
    metrics, notes = metrics_for(rows.label[known], rows.task[known], binary, relevant)
    scores = {run.name: _read(run) for run in runs}
    slices: list[Json] = []
    for case, about, mask in rows.slices():
        measured: Json = {"records": [], "differences": []}
        if mask.any():
            measured = _measured(config, runs, scores, rows, mask, metrics, relevant)
        tasks = len(np.unique(rows.task[mask]))
        slices.append({"case": case, "about": about, "tasks": tasks, "rows": int(mask.sum()), **measured})
    whole, *parts = slices
    headline = "auc" if binary else "mae"
    return {
        "headline": {"metric": headline, "higher_is_better": headline in HIGHER_IS_BETTER},
        "runs": _told(runs),
        "tasks": whole["tasks"],
        "rows": whole["rows"],
        "resamples": config.resamples,
        "records": whole["records"],
        "differences": whole["differences"],
        **({"slices": parts} if parts else {}),
        "notes": [*weight_notes(rows.weight), *notes],
    }


def _measured(
    config: CompareConfig,
    runs: Sequence[_Run],
    scores: Mapping[str, tuple[Floats, Floats]],
    of_rows: _Rows,
    mask: NDArray[np.bool_],
    metrics: Sequence[str],
    relevant: float | None,
) -> Json:
    """Return the records of every run on some rows, and its paired differences to the first."""
    label, task = of_rows.label[mask], of_rows.task[mask]
    weight = None if of_rows.weight is None else of_rows.weight[mask]
    bootstrap = Bootstrap(len(np.unique(task)), resamples=config.resamples, seed=config.seed)
    for run in runs:
        score, ranking = (column[mask] for column in scores[run.name])
        try:
            rows = make_rows(score, label, task, logit=ranking, relevant_label=relevant, weight=weight)
        except ValueError as error:
            raise ValueError(f"{run.file}, column {run.variant!r}: {error}") from None
        for name in metrics:
            bootstrap.add((run.name, name), name, rows)
    bootstrap.run()
    first, records, differences = runs[0], [], []
    for run in runs:
        for name in metrics:
            keys = {"run": run.name, "metric": name, "unit": unit_of(name)}
            records.append(keys | estimate_fields(bootstrap.estimate((run.name, name))))
            if run is not first:
                found = estimate_fields(bootstrap.estimate((run.name, name), against=(first.name, name)))
                differences.append(keys | {"against": first.name, **found, "verdict": _verdict(name, found)})
    return {"records": records, "differences": differences}


def _verdict(metric: str, difference: Json) -> str | None:
    """Say whether a run is better than the first; None of a metric without interval, or without a direction."""
    if metric in NO_INTERVAL or metric == "calibration":
        return None
    return verdict_of(difference, metric in HIGHER_IS_BETTER)


def _of_run(document: Json, kind: str, run: str) -> dict[str, Json]:
    """Return metric -> record of one run."""
    return {record["metric"]: record for record in document[kind] if record["run"] == run}


def _print(document: Json) -> None:
    """Print one table for each run but the first: every metric of both, and the paired difference."""
    first, *others = (run["run"] for run in document["runs"])
    known = _of_run(document, "records", first)
    for other in others:
        found, differences = _of_run(document, "records", other), _of_run(document, "differences", other)
        table = Table(title=f"{other} against {first}, {document['rows']:,} query rows of {document['tasks']:,} tasks")
        table.add_column("metric", no_wrap=True)
        for name in (first, other, f"{other} - {first}"):
            table.add_column(name, justify="right", overflow="fold")
        table.add_column("95 %", justify="right", no_wrap=True)
        table.add_column(f"{other} is", overflow="fold")
        for metric, difference in differences.items():
            values = [cells_of(one[metric], "")[0] for one in (known, found)]
            style = "bold" if metric == document["headline"]["metric"] else ""
            table.add_row(metric, *values, *cells_of(difference, "+"), difference["verdict"] or "", style=style)
        print_table(table)
    _print_slices(document)
    for note in document["notes"]:
        print(note)


def _print_slices(document: Json) -> None:
    """Print the headline metric of each run by slice, and of all but the first the paired difference."""
    first, *others = (run["run"] for run in document["runs"])
    metric = document["headline"]["metric"]
    table = Table(title=f"{metric} by {_slice_word(document)}")
    table.add_column("slice", overflow="fold")
    for name in ("rows", first, *(f"{other} - {first}" for other in others)):
        table.add_column(name, justify="right", overflow="fold")
    for part in document.get("slices", []):
        if part["rows"]:
            found = [cells_of(_of_run(part, "records", first)[metric], "")[0]]
            gains = [_of_run(part, "differences", other)[metric] for other in others]
            found += [f"{cells_of(gain, '+')[0]} ({gain['verdict']})" for gain in gains]
            table.add_row(part["case"], f"{part['rows']:,}", *found)
    if table.row_count:
        print_table(table)


def _page(document: Json) -> str:
    """Return comparison.html: the headline as a chart, metrics and differences as tables."""
    names = [run["run"] for run in document["runs"]]
    metric = document["headline"]["metric"]
    by_run = {kind: {name: _of_run(document, kind, name) for name in names} for kind in ("records", "differences")}
    points = [by_run["records"][name][metric] for name in names]
    series = Points("runs", range(len(names)), *([point[key] for point in points] for key in ("value", "low", "high")))
    chart = charts.dot_chart("Runs", names, [series], x_label=metric_name(metric), separate=False)
    metrics, gains = [], []
    for name in by_run["records"][names[0]]:
        title = escape(metric_name(name))
        metrics.append(f"<tr><td>{title}</td>{row_cells([by_run['records'][run][name] for run in names], name)}</tr>")
        cells = "".join(_difference_cell(by_run["differences"][run][name]) for run in names[1:])
        gains.append(f"<tr><td>{title}</td>{cells}</tr>")
    runs = "".join(
        f"<tr><td>{escape(run['run'])}</td><td>{escape(run['file'])}, {escape(run['variant'])}, step {run['step']}"
        "</td></tr>"
        for run in document["runs"]
    )
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in document["notes"])
    lead = (
        f"{document['rows']:,} query rows of {document['tasks']:,} tasks, the same for every run. Intervals are 95 %, "
        f"from {document['resamples']:,} resamples of tasks; differences are paired on the same resamples."
    )
    body = [
        f'<p class="note" style="margin-top:12px">{lead}</p><div class="grid">{figure("Runs", chart)}</div>',
        f"<h2>Metrics</h2>{variant_table('metric', names, metrics)}",
        f"<h2>Differences</h2>{variant_table(f'run − {names[0]}', names[1:], gains)}{notes}{_slice_tables(document)}",
        f'<h2>Runs</h2><div class="scroll"><table class="keys">{runs}</table></div>',
    ]
    return page("Comparison", " · ".join(names), body)


def _slice_tables(document: Json) -> str:
    """Return the headline metric by slice, and the differences to the first run; nothing without slices."""
    parts = [part for part in document.get("slices", []) if part["rows"]]
    if not parts:
        return ""
    names, metric = [run["run"] for run in document["runs"]], document["headline"]["metric"]
    word = _slice_word(document)
    values, gains = [], []
    for part in parts:
        title = f"<tr><td>{escape(part['case'])}<small>{part['rows']:,} rows</small></td>"
        found = {name: _of_run(part, "records", name)[metric] for name in names}
        values.append(f"{title}{row_cells(list(found.values()), metric)}</tr>")
        cells = "".join(_difference_cell(_of_run(part, "differences", name)[metric]) for name in names[1:])
        gains.append(f"{title}{cells}</tr>")
    return (
        f"<h2>By {word}</h2>{variant_table(f'{metric_name(metric)}, by {word}', names, values)}"
        f"{variant_table(f'run − {names[0]}, by {word}', names[1:], gains)}"
    )


def _slice_word(document: Json) -> str:
    return "scenario" if all(part["case"].startswith(SCENARIO) for part in document.get("slices", [])) else "slice"


def _difference_cell(difference: Json) -> str:
    verdict = badge(difference["verdict"]) if difference["verdict"] else ""
    return f"<td>{stacked(difference, '+')}{verdict}</td>"
