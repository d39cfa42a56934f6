"""Pieces of the HTML pages of `gmeta report`, `gmeta compare` and `gmeta gate`. Texts of a run never become markup."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from string import Template

from gmeta.core.numbers import shown
from gmeta.evaluation.charts import Points
from gmeta.evaluation.documents import Json
from gmeta.evaluation.metrics import HIGHER_IS_BETTER
from gmeta.evaluation.slices import SCENARIO

_NAMES = {
    "auc": "AUC",
    "gauc": "GAUC",
    "logloss": "log-loss",
    "mae": "MAE",
    "task_mae": "task MAE",
    "rmse": "RMSE",
    "ece": "ECE",
    "calibration": "predicted / observed",
}
_NAMES_AT_K = {
    "ndcg": "nDCG",
    "precision": "precision",
    "recall": "recall",
    "hit_rate": "hit rate",
    "map": "MAP",
    "mrr": "MRR",
}


def page(title: str, subtitle: str, body: Iterable[str]) -> str:
    """Return a self-contained page; `title` and `subtitle` are text, the parts of `body` HTML."""
    template = resources.files("gmeta.evaluation").joinpath("report_template.html").read_text(encoding="utf-8")
    return Template(template).substitute(title=escape(title), subtitle=escape(subtitle), body="\n".join(body))


def metric_name(metric: str) -> str:
    """Return a metric's name as people write it."""
    kind, at, k = metric.partition("@")
    if at and kind in _NAMES_AT_K:
        return f"{_NAMES_AT_K[kind]}@{k}"
    return _NAMES.get(metric, metric)


def figure(title: str, svg: str, caption: str = "") -> str:
    """Frame a chart under its title, with a caption."""
    words = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure><h3>{escape(title)}</h3>{svg}{words}</figure>"


def missing(text: str, command: str) -> str:
    """Name the command that makes what is not there."""
    return f'<div class="missing">{escape(text)} <code>{escape(command)}</code></div>'


def badge(verdict: str) -> str:
    """Mark a verdict."""
    tag = verdict if verdict in ("better", "worse") else ""
    return f'<span class="badge {tag}">{escape(verdict)}</span>'


def number_text(value: float | None, sign: str = "") -> str:
    """Return a value as text, with a true minus."""
    return "undefined" if value is None else shown(value, sign).replace("-", "−")


def interval_text(record: Json, sign: str = "", prefix: str = "") -> str:
    """Return the 95 % interval of a record as text."""
    if record["low"] is None:
        return "no interval"
    value = f"{number_text(record['value'], sign)}, " if prefix else ""
    return f"{prefix}{value}95 %: {number_text(record['low'], sign)} … {number_text(record['high'], sign)}"


def stacked(record: Json, sign: str = "") -> str:
    """Fill a table cell with a value above its interval."""
    if record["low"] is None:
        return number_text(record["value"], sign)
    interval = f"{number_text(record['low'], sign)} … {number_text(record['high'], sign)}"
    return f"{number_text(record['value'], sign)}<small>{interval}</small>"


def variant_table(corner: str, variants: Iterable[str], rows: Iterable[str]) -> str:
    """Make a table with a column a variant; `rows` are HTML."""
    head = "".join(f"<th>{escape(name)}</th>" for name in variants)
    return f'<div class="scroll"><table><tr><th>{escape(corner)}</th>{head}</tr>{"".join(rows)}</table></div>'


def row_cells(records: Sequence[Json | None], metric: str) -> str:
    """Make one cell a variant, the best in bold."""
    values = [None if record is None else record["value"] for record in records]
    defined = [badness(value, metric) for value in values if value is not None]
    best = min(defined, default=None)
    cells = []
    for record, value in zip(records, values, strict=True):
        mark = ' class="best"' if value is not None and badness(value, metric) == best else ""
        cells.append(f"<td{mark}>{stacked(record) if record else '–'}</td>")
    return "".join(cells)


def badness(value: float, metric: str) -> float:
    """Turn a value into one of which lower is better, whatever the metric."""
    if metric == "calibration":
        return abs(value - 1)
    return -value if metric in HIGHER_IS_BETTER else value


def case_table(evaluation: Json, names: Sequence[str], metric: str) -> str:
    """Make a table with slices down and variants across."""
    cases = {case["case"]: case for case in evaluation["cases"]}
    rows = []
    for case in names:
        cells = row_cells([record_of(evaluation, case, variant, metric) for variant in evaluation["variants"]], metric)
        label = f"{escape(case_name(case))}<small>{cases[case]['rows']:,} rows</small>"
        rows.append(f"<tr><td>{label}</td>{cells}</tr>")
    return variant_table(f"{metric_name(metric)}, by slice", evaluation["variants"], rows)


def case_name(case: str) -> str:
    """Return a slice's name as people write it; the value of a scenario stays as it is."""
    return case if case.startswith(SCENARIO) else case.replace("_", " ")


def all_metrics_section(evaluation: Json) -> str:
    """Make a table of every metric of every variant over all rows, with the evaluation's notes."""
    metrics = list(dict.fromkeys(record["metric"] for record in evaluation["records"]))
    rows = []
    for metric in metrics:
        records = [record_of(evaluation, "all", variant, metric) for variant in evaluation["variants"]]
        tasks = max((record["n"] for record in records if record), default=0)
        rows.append(
            f"<tr><td>{escape(metric_name(metric))}<small>{tasks:,} tasks</small></td>{row_cells(records, metric)}</tr>"
        )
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in evaluation["notes"])
    return "<h2>All metrics</h2>" + variant_table("metric", evaluation["variants"], rows) + notes


def record_of(evaluation: Json, case: str, variant: str, metric: str) -> Json | None:
    """Return the record of a variant's metric on a slice; None where there is none."""
    wanted = (case, variant, metric)
    for record in evaluation["records"]:
        if (record["case"], record["variant"], record["metric"]) == wanted:
            return dict(record)
    return None


def records_of(evaluation: Json, cases: Iterable[str], variant: str, metric: str) -> list[Json | None]:
    """Return a record, or None, for each of these slices."""
    return [record_of(evaluation, case, variant, metric) for case in cases]


def points_of(name: str, x: Iterable[float], records: Sequence[Json | None]) -> Points:
    """Return the points of a chart, with their intervals, that some records make."""

    def column(key: str) -> list[float | None]:
        return [None if record is None else record[key] for record in records]

    return Points(name, list(x), column("value"), column("low"), column("high"))
