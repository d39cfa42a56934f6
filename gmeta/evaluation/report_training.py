"""How training went: the curves and tables of a run's metrics.jsonl, as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from gmeta.evaluation import charts
from gmeta.evaluation.charts import Points
from gmeta.evaluation.documents import Json
from gmeta.evaluation.pages import figure, metric_name, missing

_MAX_POINTS = 300  # a longer curve is averaged down to this
_MAX_CURVES = 4


def training_section(train: list[Json], valid: list[Json]) -> str:
    """Show the curves of training and validation, from the records of its steps and its validations."""
    if not train:
        return "<h2>Training</h2>" + missing("No step has been logged yet. Curves will stand here after", "gmeta train")
    steps = [record["step"] for record in train]
    figures = []
    for title, keys, label in (
        ("Training loss", ("loss", "support_loss"), "loss"),
        ("Learning rate", ("lr",), "rate"),
        ("Gradient norm", ("grad_norm",), "norm"),
        ("Speed", ("tasks_per_s",), "tasks a second"),
    ):
        names = {"loss": "query", "support_loss": "support, before adapting"}
        series = [Points(names.get(key, key), *_thinned(steps, train, key)) for key in keys if key in train[-1]]
        if series and any(value is not None for points in series for value in points.y):
            figures.append(
                figure(
                    title, charts.line_chart(title, series, x_label="step", y_label=label, from_zero=title == "Speed")
                )
            )
    figures[1:1] = _validation_figures(valid)
    if all(f"{part}_share" in train[-1] for part in ("input", "exchange", "compute")):
        figures.append(_time_figure(steps, train))
    note = ""
    if len(train) > _MAX_POINTS:
        note = f'<p class="note">Each point averages {-(-len(train) // _MAX_POINTS)} steps.</p>'
    return f'<h2>Training</h2>{_training_cards(train)}<div class="grid">{"".join(figures)}</div>{note}'


def _training_cards(train: list[Json]) -> str:
    seconds = train[-1].get("time_s")
    facts = [("steps", f"{train[-1]['step']:,}"), ("epochs", f"{train[-1].get('epoch', 0) + 1:,}")]
    if seconds is not None:
        facts.append(("time in steps", f"{seconds:,.0f} s" if seconds < 600 else f"{seconds / 60:,.0f} min"))
    for key, name, form in (
        ("tasks_per_s", "tasks a second, median", "{:,.0f}"),
        ("samples_per_s", "samples a second, median", "{:,.0f}"),
        ("padding", "padding, mean", "{:.1%}"),
    ):
        values = [record[key] for record in train if record.get(key) is not None]
        if values:
            value = float(np.mean(values) if key == "padding" else np.median(values))
            facts.append((name, form.format(value)))
    cards = "".join(
        f'<div class="card"><div class="name">{name}</div><div class="big">{value}</div></div>' for name, value in facts
    )
    return f'<div class="cards facts">{cards}</div>'


def _validation_figures(valid: list[Json]) -> list[str]:
    """Draw one chart a metric, before and after adaptation."""
    names = dict.fromkeys(key.removesuffix("_after") for record in valid for key in record if key.endswith("_after"))
    figures = []
    for name in list(names)[:_MAX_CURVES]:
        series = [
            Points(when, [r["step"] for r in valid], [r.get(f"{name}_{when}") for r in valid])
            for when in ("before", "after")
        ]
        title = f"Validation {metric_name(name)}"
        figures.append(figure(title, charts.line_chart(title, series, x_label="step", y_label=metric_name(name))))
    return figures


def _time_figure(steps: Sequence[int], train: list[Json]) -> str:
    fractions: dict[str, list[float]] = {}
    for part in ("input", "exchange", "compute"):
        x, values = _thinned(steps, train, f"{part}_share")
        fractions[part] = [value or 0.0 for value in values]
    clock = np.diff([0.0, *(record.get("time_s") or 0.0 for record in train)])
    weight = clock if (clock > 0).all() else np.ones(len(train))
    means = [
        f"{part} {np.average([r[f'{part}_share'] or 0.0 for r in train], weights=weight):.0%}"
        for part in ("input", "exchange", "compute")
    ]
    title = "Where the time went"
    return figure(title, charts.fraction_chart(title, x, fractions), f"Of all time in steps: {', '.join(means)}.")


def _thinned(steps: Sequence[int], records: list[Json], key: str) -> tuple[list[float], list[float | None]]:
    """Average a column over stretches of equally many records; None where a stretch holds no number."""
    size = -(-len(records) // _MAX_POINTS)
    xs: list[float] = []
    ys: list[float | None] = []
    for begin in range(0, len(records), size):
        values = [r[key] for r in records[begin : begin + size] if r.get(key) is not None]
        xs.append(float(np.mean(steps[begin : begin + size])))
        ys.append(float(np.mean(values)) if values else None)
    return xs, ys


def communication_section(records: list[Json | None]) -> str:
    """Show what rank 0 sent in a step, on average, beside what the formulas say; nothing for a run of one process.

    Only the last steps that made the same calls count: a resumed run may have another number of workers.
    """
    steps: list[Json] = []
    for record in reversed(records):
        if record is None or (steps and _calls(record) != _calls(steps[0])):
            break
        steps.append(record)
    if not steps:
        return ""

    def mean(which: str, kind: str, key: str) -> float:
        return float(np.mean([step[which][kind][key] for step in steps]))

    rows = [
        f"<tr><td>{escape(_TRAFFIC.get(kind, kind))}</td>"
        + "".join(f"<td>{mean(*cell):,.0f}</td>" for cell in _traffic_cells(kind))
        + f"<td>{mean('measured', kind, 'calls'):,.1f}</td></tr>"
        for kind in steps[0]["measured"]
    ]
    head = "<th>bytes, measured</th><th>bytes, predicted</th><th>remote, measured</th><th>remote, predicted</th>"
    return (
        "<h2>Communication</h2>"
        f'<div class="scroll"><table><tr><th>a step of rank 0, mean of the last {len(steps):,}</th>{head}'
        "<th>calls</th></tr>"
        f'{"".join(rows)}</table></div><p class="note">Remote bytes go to other workers. Predictions are formulas over '
        "the rows that a worker needs and the size of the model, not measurements.</p>"
    )


def _calls(record: Json) -> list[int]:
    return [kind["calls"] for kind in record["measured"].values()]


_TRAFFIC = {
    "counts": "counts of rows, ahead of the step",
    "ids": "ids, ahead of the step",
    "rows": "rows (AlltoAll)",
    "gradients": "row gradients (AlltoAll)",
    "dense": "dense gradients",
    "control": "sums of losses and norms",
}


def _traffic_cells(kind: str) -> list[tuple[str, str, str]]:
    return [(which, kind, key) for key in ("bytes", "remote_bytes") for which in ("measured", "predicted")]
