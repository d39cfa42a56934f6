"""`gmeta report`: make one self-contained HTML page of a run directory, which can be read offline and on a phone.

Where a run does not hold something yet, the page names the command that makes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

import numpy as np

from gmeta.core.files import write_text
from gmeta.evaluation import charts
from gmeta.evaluation.charts import Points
from gmeta.evaluation.documents import Json, read_evaluation, read_log, read_object
from gmeta.evaluation.metrics import HIGHER_IS_BETTER
from gmeta.evaluation.slices import HeadlineRow, headline_rows
from gmeta.runs.directory import read_settings
from gmeta.runs.log import METRICS_FILE

_COLD = ("warm", "user_cold", "item_cold", "both_cold")
_MAX_POINTS = 300  # a longer curve is averaged down to this
_MAX_CURVES = 4
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


def build_report(run_dir: Path | str) -> Path:
    """Write `report.html` into the run directory and return its path.

    Raises:
        ValueError: `run_dir` is not a run, or one of its files is damaged.
    """
    run_dir = Path(run_dir)
    config = read_settings(run_dir)
    environment = read_object(run_dir / "environment.json", "train the run again to write it")
    evaluation = read_evaluation(run_dir / "evaluation.json")
    records = read_log(run_dir / METRICS_FILE)
    sections = (
        _headline_section(evaluation, run_dir),
        _adaptation_section(evaluation),
        _training_section([r for r in records if r["kind"] == "train"], [r for r in records if r["kind"] == "valid"]),
        _communication_section([r.get("comm") for r in records if r["kind"] == "train"]),
        _all_metrics_section(evaluation),
        _settings_section(config, environment, evaluation),
    )
    template = resources.files("gmeta.evaluation").joinpath("report_template.html").read_text(encoding="utf-8")
    page = Template(template).substitute(
        title=escape(run_dir.resolve().name), subtitle=_subtitle(config), body="\n".join(sections)
    )
    path = run_dir / "report.html"
    write_text(path, page)
    return path


def _subtitle(config: Json) -> str:
    """Say in one line what was trained."""
    meta, model = config.get("meta", {}), config.get("model", {})
    adapt = meta.get("adapt") or []
    steps = meta.get("inner_steps", 1)
    how = f"adapts {', '.join(adapt)} by {steps} {meta.get('order')}-order step{'s' * (steps != 1)}"
    parts = [f"model {model.get('name')}", how if adapt else "trained plainly", f"loss {config.get('loss')}"]
    return escape(" · ".join([*parts, f"pack {config.get('pack')}", f"seed {config.get('seed')}"]))


# The headline


def _headline_section(evaluation: Json | None, run_dir: Path) -> str:
    if evaluation is None:
        command = f"gmeta evaluate --run_dir {run_dir}"
        return _missing("This run has not been measured yet. What adaptation bought will stand here after", command)
    rows = headline_rows(evaluation)
    metric, reference = _name(evaluation["headline"]["metric"]), evaluation["reference"]
    case = evaluation["cases"][0]
    by_name = {row.variant: row for row in rows}
    cards = [_value_card(f"{metric} of {reference}", by_name[reference])]
    rivals = ["before", _best_baseline(evaluation), "plain", "plain-finetuned"]
    cards += [
        _difference_card(by_name[name], reference, name in evaluation["baselines"])
        for name in rivals
        if name in by_name and name != reference
    ]
    better = "higher" if evaluation["headline"]["higher_is_better"] else "lower"
    note = (
        f"{escape(metric)}, {better} is better, over {case['rows']:,} query rows of {case['tasks']:,} tasks. "
        f"Intervals are 95 %, from {evaluation['resamples']:,} resamples of tasks; "
        "differences are paired on the same resamples. "
        "The best baseline is the one that does best on these very rows."
    )
    chart = _variant_chart(evaluation, rows)
    table = _headline_table(rows, metric, reference)
    return (
        f'<p class="lead">{_verdict_sentence(by_name, metric, reference, case)}</p>'
        f'<div class="cards">{"".join(cards)}</div><p class="note" style="margin-top:12px">{note}</p>'
        f'<div class="grid">{_figure("Every variant", chart)}<div>{table}</div></div>'
    )


def _verdict_sentence(by_name: dict[str, HeadlineRow], metric: str, reference: str, case: Json) -> str:
    if reference != "after" or "before" not in by_name:
        return f"{escape(metric)} on {case['tasks']:,} tasks: <b>{_number(by_name[reference].record['value'])}</b>."
    before, after = by_name["before"], by_name["after"]
    assert before.difference is not None
    if before.record["value"] is None:
        return f"{escape(metric)} is undefined on these rows: {case['rows']:,} rows of {case['tasks']:,} tasks."
    words = {
        "better": "improves",
        "worse": "worsens",
        "not distinguishable": "does not measurably change",
        "too few tasks": "cannot be said to change",
    }
    return (
        f"On {case['tasks']:,} tasks, adapting to the support set {words[before.verdict]} {escape(metric)}: "
        f"<b>{_number(before.record['value'])}</b> before, <b>{_number(after.record['value'])}</b> after "
        f"({_interval(before.difference, '+', 'difference ')})."
    )


def _value_card(name: str, row: HeadlineRow) -> str:
    return (
        f'<div class="card"><div class="name">{escape(name)}</div><div class="big">{_number(row.record["value"])}</div>'
        f'<div class="interval">{_interval(row.record)}</div></div>'
    )


def _difference_card(row: HeadlineRow, reference: str, is_baseline: bool) -> str:
    assert row.difference is not None
    what = f"best baseline, {row.variant}" if is_baseline else row.variant
    return (
        f'<div class="card"><div class="name">{escape(reference)} minus {escape(what)}</div>'
        f'<div class="big">{_number(row.difference["value"], "+")}</div>'
        f'<div class="interval">{_interval(row.difference, "+")} {_badge(row.verdict)}</div></div>'
    )


def _headline_table(rows: Sequence[HeadlineRow], metric: str, reference: str) -> str:
    cells = []
    for row in rows:
        difference = row.difference
        gain = "" if difference is None else _stacked(difference, "+")
        tag = ' class="reference"' if row.variant == reference else ""
        cells.append(
            f"<tr{tag}><td>{escape(row.variant)}</td><td>{_stacked(row.record)}</td><td>{gain}</td>"
            f"<td>{_badge(row.verdict) if row.verdict else ''}</td></tr>"
        )
    shown = escape(reference)
    head = f"<tr><th>variant</th><th>{escape(metric)}</th><th>{shown} − variant</th><th>{shown} is</th></tr>"
    return f'<div class="scroll" style="margin-top:0"><table>{head}{"".join(cells)}</table></div>'


def _variant_chart(evaluation: Json, rows: Sequence[HeadlineRow]) -> str:
    """Draw each variant on a line of its own, in its own colour."""
    series = [_points(row.variant, [i], [row.record]) for i, row in enumerate(rows)]
    names = [row.variant for row in rows]
    return charts.dot_chart(
        "Every variant", names, series, x_label=_name(evaluation["headline"]["metric"]), separate=False
    )


# What adaptation bought, by support size and by coldness


def _adaptation_section(evaluation: Json | None) -> str:
    if evaluation is None:
        return ""
    metric = evaluation["headline"]["metric"]
    cases = {case["case"]: case for case in evaluation["cases"]}
    sizes = [name for name in cases if name.startswith("support_") and cases[name]["rows"]]
    cold = [name for name in _COLD if name in cases and cases[name]["rows"]]
    absent = [cases[name]["about"] for name in _COLD if name in cases and not cases[name]["rows"]]
    compared = _compared(evaluation)
    labels = [name.removeprefix("support_").replace("-", "–") for name in sizes]
    by_size = [_points(name, range(len(sizes)), _records(evaluation, sizes, name, metric)) for name in compared]
    by_cold = [_points(name, range(len(cold)), _records(evaluation, cold, name, metric)) for name in compared]
    curves = [
        Points(name, [b["predicted"] for b in bins], [b["observed"] for b in bins])
        for name, bins in evaluation["curves"].items()
        if name in compared and len(bins) > 1
    ]
    figures = [
        _figure(
            "By support size",
            charts.category_chart(
                "By support size", labels, by_size, x_label="support rows of the task", y_label=_name(metric)
            ),
            _counts(sizes, labels, cases),
        ),
        _figure(
            "By coldness",
            charts.dot_chart("By coldness", [name.replace("_", "-") for name in cold], by_cold, x_label=_name(metric)),
            "; ".join(f"{name.replace('_', '-')}: {cases[name]['about']}" for name in cold),
        ),
    ]
    if curves:
        figures.append(
            _figure("Calibration", charts.calibration_chart("Calibration", curves), "Bins of equally many rows.")
        )
    note = f'<p class="note">No query rows here with: {escape("; ".join(absent))}.</p>' if absent else ""
    return (
        "<h2>What adaptation bought</h2>"
        f'<div class="grid">{"".join(figures)}</div>{_case_table(evaluation, ["all", *cold, *sizes], metric)}{note}'
    )


def _compared(evaluation: Json) -> list[str]:
    """Choose the variants that charts show: more would hide each other. The table has them all."""
    wanted = ["before", "after", "plain-finetuned", _best_baseline(evaluation)]
    return [name for name in evaluation["variants"] if name in wanted]


def _counts(names: Sequence[str], labels: Sequence[str], cases: dict[str, Json]) -> str:
    counts = (f"{label}: {cases[name]['tasks']:,}" for name, label in zip(names, labels, strict=True))
    return f"Tasks by support rows: {'; '.join(counts)}."


def _case_table(evaluation: Json, names: Sequence[str], metric: str) -> str:
    """Make a table with slices down and variants across."""
    cases = {case["case"]: case for case in evaluation["cases"]}
    rows = []
    for case in names:
        cells = _row_cells([_record(evaluation, case, variant, metric) for variant in evaluation["variants"]], metric)
        label = f"{escape(case.replace('_', ' '))}<small>{cases[case]['rows']:,} rows</small>"
        rows.append(f"<tr><td>{label}</td>{cells}</tr>")
    return _variant_table(f"{_name(metric)}, by slice", evaluation["variants"], rows)


def _all_metrics_section(evaluation: Json | None) -> str:
    if evaluation is None:
        return ""
    metrics = list(dict.fromkeys(record["metric"] for record in evaluation["records"]))
    rows = []
    for metric in metrics:
        records = [_record(evaluation, "all", variant, metric) for variant in evaluation["variants"]]
        tasks = max((record["n"] for record in records if record), default=0)
        rows.append(
            f"<tr><td>{escape(_name(metric))}<small>{tasks:,} tasks</small></td>{_row_cells(records, metric)}</tr>"
        )
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in evaluation["notes"])
    return "<h2>All metrics</h2>" + _variant_table("metric", evaluation["variants"], rows) + notes


def _variant_table(corner: str, variants: Iterable[str], rows: Iterable[str]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in variants)
    return f'<div class="scroll"><table><tr><th>{escape(corner)}</th>{head}</tr>{"".join(rows)}</table></div>'


def _row_cells(records: Sequence[Json | None], metric: str) -> str:
    """Make one cell a variant, the best in bold."""
    values = [None if record is None else record["value"] for record in records]
    defined = [_badness(value, metric) for value in values if value is not None]
    best = min(defined, default=None)
    cells = []
    for record, value in zip(records, values, strict=True):
        mark = ' class="best"' if value is not None and _badness(value, metric) == best else ""
        cells.append(f"<td{mark}>{_stacked(record) if record else '–'}</td>")
    return "".join(cells)


def _badness(value: float, metric: str) -> float:
    """Turn a value into one of which lower is better, whatever the metric."""
    if metric == "calibration":
        return abs(value - 1)
    return -value if metric in HIGHER_IS_BETTER else value


def _best_baseline(evaluation: Json) -> str | None:
    metric = evaluation["headline"]["metric"]
    scored = []
    for name in evaluation["baselines"]:
        record = _record(evaluation, "all", name, metric)
        if record is not None and record["value"] is not None:
            scored.append((_badness(record["value"], metric), name))
    return min(scored)[1] if scored else None


def _record(evaluation: Json, case: str, variant: str, metric: str) -> Json | None:
    wanted = (case, variant, metric)
    for record in evaluation["records"]:
        if (record["case"], record["variant"], record["metric"]) == wanted:
            return dict(record)
    return None


def _records(evaluation: Json, cases: Iterable[str], variant: str, metric: str) -> list[Json | None]:
    return [_record(evaluation, case, variant, metric) for case in cases]


def _points(name: str, x: Iterable[float], records: Sequence[Json | None]) -> Points:
    def column(key: str) -> list[float | None]:
        return [None if record is None else record[key] for record in records]

    return Points(name, list(x), column("value"), column("low"), column("high"))


# Training


def _training_section(train: list[Json], valid: list[Json]) -> str:
    if not train:
        return "<h2>Training</h2>" + _missing(
            "No step has been logged yet. Curves will stand here after", "gmeta train"
        )
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
                _figure(
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
        title = f"Validation {_name(name)}"
        figures.append(_figure(title, charts.line_chart(title, series, x_label="step", y_label=_name(name))))
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
    return _figure(title, charts.fraction_chart(title, x, fractions), f"Of all time in steps: {', '.join(means)}.")


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


# Communication


def _communication_section(records: list[Json | None]) -> str:
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


# Settings


def _settings_section(config: Json, environment: Json | None, evaluation: Json | None) -> str:
    parts = [_details("Configuration", config)]
    if environment is not None:
        parts.append(_details("Environment", environment))
    if evaluation is not None and evaluation.get("settings"):
        parts.append(_details("Evaluation settings", evaluation["settings"]))
    return f"<h2>Configuration and environment</h2>{''.join(parts)}"


def _details(title: str, values: Json) -> str:
    rows = "".join(f"<tr><td>{escape(key)}</td><td>{escape(value)}</td></tr>" for key, value in _flat(values))
    return f'<details><summary>{title}</summary><div class="scroll"><table class="keys">{rows}</table></div></details>'


def _flat(values: Json, prefix: str = "") -> Iterable[tuple[str, str]]:
    """Yield nested keys with their values, dotted as on the command line."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", ", ".join(map(str, value)) if isinstance(value, list) else str(value)


# Pieces of HTML


def _name(metric: str) -> str:
    """Return a metric's name as people write it."""
    kind, at, k = metric.partition("@")
    if at and kind in _NAMES_AT_K:
        return f"{_NAMES_AT_K[kind]}@{k}"
    return _NAMES.get(metric, metric)


def _figure(title: str, svg: str, caption: str = "") -> str:
    words = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure><h3>{escape(title)}</h3>{svg}{words}</figure>"


def _missing(text: str, command: str) -> str:
    return f'<div class="missing">{escape(text)} <code>{escape(command)}</code></div>'


def _badge(verdict: str) -> str:
    tag = verdict if verdict in ("better", "worse") else ""
    return f'<span class="badge {tag}">{escape(verdict)}</span>'


def _number(value: float | None, sign: str = "") -> str:
    return "undefined" if value is None else f"{value:{sign}.4f}".replace("-", "−")


def _interval(record: Json, sign: str = "", prefix: str = "") -> str:
    if record["low"] is None:
        return "no interval"
    value = f"{_number(record['value'], sign)}, " if prefix else ""
    return f"{prefix}{value}95 %: {_number(record['low'], sign)} … {_number(record['high'], sign)}"


def _stacked(record: Json, sign: str = "") -> str:
    """Fill a table cell with a value above its interval."""
    if record["low"] is None:
        return _number(record["value"], sign)
    interval = f"{_number(record['low'], sign)} … {_number(record['high'], sign)}"
    return f"{_number(record['value'], sign)}<small>{interval}</small>"
