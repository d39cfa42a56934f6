"""`gmeta report`: make one self-contained HTML page of a run directory, which can be read offline and on a phone.

Where a run does not hold something yet, the page names the command that makes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from gmeta.core.files import write_text
from gmeta.evaluation import charts
from gmeta.evaluation.charts import Points
from gmeta.evaluation.documents import Json, read_evaluation, read_log, read_object
from gmeta.evaluation.pages import (
    all_metrics_section,
    badge,
    badness,
    case_table,
    figure,
    interval_text,
    metric_name,
    missing,
    number_text,
    page,
    points_of,
    record_of,
    records_of,
    row_cells,
    stacked,
    variant_table,
)
from gmeta.evaluation.report_training import communication_section, training_section
from gmeta.evaluation.slices import COLDNESS, SCENARIO, HeadlineRow, headline_rows
from gmeta.evaluation.support_curve import curve_records
from gmeta.runs.directory import read_settings
from gmeta.runs.log import METRICS_FILE


def build_report(run_dir: Path | str, folder: Path | None = None) -> Path:
    """Write `report.html` into the run directory and return its path.

    With `folder` the evaluation is read there, and the page written there.

    Raises:
        ValueError: `run_dir` is not a run, or one of its files is damaged.
    """
    run_dir = Path(run_dir)
    folder = run_dir if folder is None else folder
    config = read_settings(run_dir)
    environment = read_object(run_dir / "environment.json", "train the run again to write it")
    evaluation = read_evaluation(folder / "evaluation.json")
    records = read_log(run_dir / METRICS_FILE)
    sections = (
        _headline_section(evaluation, run_dir),
        _adaptation_section(evaluation),
        _curve_section(evaluation),
        training_section([r for r in records if r["kind"] == "train"], [r for r in records if r["kind"] == "valid"]),
        communication_section([r.get("comm") for r in records if r["kind"] == "train"]),
        "" if evaluation is None else all_metrics_section(evaluation),
        _settings_section(config, environment, evaluation),
    )
    path = folder / "report.html"
    write_text(path, page(run_dir.resolve().name, _subtitle(config), sections))
    return path


def _subtitle(config: Json) -> str:
    """Say in one line what was trained."""
    meta, model = config.get("meta", {}), config.get("model", {})
    adapt = meta.get("adapt") or []
    steps = meta.get("inner_steps", 1)
    how = f"adapts {', '.join(adapt)} by {steps} {meta.get('order')}-order step{'s' * (steps != 1)}"
    parts = [f"model {model.get('name')}", how if adapt else "trained plainly", f"loss {config.get('loss')}"]
    return " · ".join([*parts, f"pack {config.get('pack')}", f"seed {config.get('seed')}"])


# The headline


def _headline_section(evaluation: Json | None, run_dir: Path) -> str:
    if evaluation is None:
        command = f"gmeta evaluate --run_dir {run_dir}"
        return missing("This run has not been measured yet. What adaptation bought will stand here after", command)
    rows = headline_rows(evaluation)
    metric, reference = metric_name(evaluation["headline"]["metric"]), evaluation["reference"]
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
    left_out = "".join(f'<p class="note">{escape(text)}.</p>' for text in evaluation.get("left_out", []))
    chart = _variant_chart(evaluation, rows)
    table = _headline_table(rows, metric, reference)
    return (
        f'<p class="lead">{_verdict_sentence(by_name, metric, reference, case)}</p>'
        f'<div class="cards">{"".join(cards)}</div><p class="note" style="margin-top:12px">{note}</p>{left_out}'
        f'<div class="grid">{figure("Every variant", chart)}<div>{table}</div></div>'
    )


def _verdict_sentence(by_name: dict[str, HeadlineRow], metric: str, reference: str, case: Json) -> str:
    if reference != "after" or "before" not in by_name:
        return f"{escape(metric)} on {case['tasks']:,} tasks: <b>{number_text(by_name[reference].record['value'])}</b>."
    before, after = by_name["before"], by_name["after"]
    assert before.difference is not None
    if before.record["value"] is None:
        return f"{escape(metric)} is undefined on these rows: {case['rows']:,} rows of {case['tasks']:,} tasks."
    words = {
        "better": "improves",
        "worse": "worsens",
        "not distinguishable": "does not measurably change",
        "too few tasks": "cannot be said to change",
        "undefined": "cannot be said to change",
    }
    return (
        f"On {case['tasks']:,} tasks, adapting to the support set {words[before.verdict]} {escape(metric)}: "
        f"<b>{number_text(before.record['value'])}</b> before, <b>{number_text(after.record['value'])}</b> after "
        f"({interval_text(before.difference, '+', 'difference ')})."
    )


def _value_card(name: str, row: HeadlineRow) -> str:
    value = number_text(row.record["value"])
    return (
        f'<div class="card"><div class="name">{escape(name)}</div><div class="big">{value}</div>'
        f'<div class="interval">{interval_text(row.record)}</div></div>'
    )


def _difference_card(row: HeadlineRow, reference: str, is_baseline: bool) -> str:
    assert row.difference is not None
    what = f"best baseline, {row.variant}" if is_baseline else row.variant
    return (
        f'<div class="card"><div class="name">{escape(reference)} minus {escape(what)}</div>'
        f'<div class="big">{number_text(row.difference["value"], "+")}</div>'
        f'<div class="interval">{interval_text(row.difference, "+")} {badge(row.verdict)}</div></div>'
    )


def _headline_table(rows: Sequence[HeadlineRow], metric: str, reference: str) -> str:
    cells = []
    for row in rows:
        difference = row.difference
        gain = "" if difference is None else stacked(difference, "+")
        tag = ' class="reference"' if row.variant == reference else ""
        cells.append(
            f"<tr{tag}><td>{escape(row.variant)}</td><td>{stacked(row.record)}</td><td>{gain}</td>"
            f"<td>{badge(row.verdict) if row.verdict else ''}</td></tr>"
        )
    shown = escape(reference)
    head = f"<tr><th>variant</th><th>{escape(metric)}</th><th>{shown} − variant</th><th>{shown} is</th></tr>"
    return f'<div class="scroll" style="margin-top:0"><table>{head}{"".join(cells)}</table></div>'


def _variant_chart(evaluation: Json, rows: Sequence[HeadlineRow]) -> str:
    """Draw each variant on a line of its own, in its own colour."""
    series = [points_of(row.variant, [i], [row.record]) for i, row in enumerate(rows)]
    names = [row.variant for row in rows]
    return charts.dot_chart(
        "Every variant", names, series, x_label=metric_name(evaluation["headline"]["metric"]), separate=False
    )


# What adaptation bought, by support size and by coldness


def _adaptation_section(evaluation: Json | None) -> str:
    if evaluation is None:
        return ""
    metric = evaluation["headline"]["metric"]
    cases = {case["case"]: case for case in evaluation["cases"]}
    if not any(name in cases for name in COLDNESS):  # of a next-item run, which has slices of its own
        return f"<h2>Slices</h2>{case_table(evaluation, [name for name in cases if cases[name]['rows']], metric)}"
    sizes = [name for name in cases if name.startswith("support_") and cases[name]["rows"]]
    cold = [name for name in COLDNESS if name in cases and cases[name]["rows"]]
    absent = [cases[name]["about"] for name in COLDNESS if name in cases and not cases[name]["rows"]]
    compared = _compared(evaluation)
    labels = [name.removeprefix("support_").replace("-", "–") for name in sizes]
    by_size = [points_of(name, range(len(sizes)), records_of(evaluation, sizes, name, metric)) for name in compared]
    by_cold = [points_of(name, range(len(cold)), records_of(evaluation, cold, name, metric)) for name in compared]
    curves = [
        Points(name, [b["predicted"] for b in bins], [b["observed"] for b in bins])
        for name, bins in evaluation["curves"].items()
        if name in compared and len(bins) > 1
    ]
    scenarios = [name for name in cases if name.startswith(SCENARIO) and cases[name]["rows"]]
    figures = [
        figure(
            "By support size",
            charts.category_chart(
                "By support size", labels, by_size, x_label="support rows of the task", y_label=metric_name(metric)
            ),
            _counts(sizes, labels, cases),
        ),
        figure(
            "By coldness",
            charts.dot_chart(
                "By coldness", [name.replace("_", "-") for name in cold], by_cold, x_label=metric_name(metric)
            ),
            "; ".join(f"{name.replace('_', '-')}: {cases[name]['about']}" for name in cold),
        ),
    ]
    if scenarios:
        series = [points_of(n, range(len(scenarios)), records_of(evaluation, scenarios, n, metric)) for n in compared]
        names = [name.removeprefix(SCENARIO) for name in scenarios]
        figures.append(
            figure("By scenario", charts.dot_chart("By scenario", names, series, x_label=metric_name(metric)))
        )
    if curves:
        figures.append(
            figure("Calibration", charts.calibration_chart("Calibration", curves), "Bins of equally many rows.")
        )
    note = f'<p class="note">No query rows here with: {escape("; ".join(absent))}.</p>' if absent else ""
    return (
        "<h2>What adaptation bought</h2>"
        f'<div class="grid">{"".join(figures)}</div>'
        f"{case_table(evaluation, ['all', *cold, *sizes, *scenarios], metric)}{note}"
    )


def _compared(evaluation: Json) -> list[str]:
    """Choose the variants that charts show: more would hide each other. The table has them all."""
    wanted = ["before", "after", "plain-finetuned", _best_baseline(evaluation)]
    return [name for name in evaluation["variants"] if name in wanted]


def _counts(names: Sequence[str], labels: Sequence[str], cases: dict[str, Json]) -> str:
    counts = (f"{label}: {cases[name]['tasks']:,}" for name, label in zip(names, labels, strict=True))
    return f"Tasks by support rows: {'; '.join(counts)}."


def _curve_section(evaluation: Json | None) -> str:
    """Show the learning curve: a chart of the usual variants, and all of it as tables."""
    if evaluation is None or "support_curve" not in evaluation:
        return ""
    curve, metric, reference = evaluation["support_curve"], evaluation["headline"]["metric"], evaluation["reference"]
    sizes = [point["size"] for point in curve["sizes"]]
    records, differences = curve_records(evaluation), curve_records(evaluation, "differences")
    labels = [str(size) for size in sizes]
    series = [
        points_of(name, range(len(sizes)), [records.get((size, name)) for size in sizes])
        for name in _compared(evaluation)
    ]
    title = "Learning curve"
    chart = charts.category_chart(title, labels, series, x_label="support rows seen", y_label=metric_name(metric))
    short = "; ".join(f"{point['size']}: {point['short_tasks']:,}" for point in curve["sizes"])
    caption = (
        f"Each variant sees no more than the last so many support rows of each of {curve['tasks']:,} tasks; the query "
        f"rows are the same at every size. Tasks that have fewer use what they have: {short}."
    )
    others = [name for name in evaluation["variants"] if name != reference]
    names = evaluation["variants"]
    values = [_curve_row(size, row_cells([records.get((size, name)) for name in names], metric)) for size in sizes]
    gains = [_curve_row(size, _difference_cells([differences.get((size, name)) for name in others])) for size in sizes]
    tables = variant_table(f"{metric_name(metric)}, by support rows", names, values)
    if others:
        tables += variant_table(f"{reference} − variant, by support rows", others, gains)
    return f'<h2>{title}</h2><div class="grid">{figure(title, chart, caption)}</div>{tables}'


def _curve_row(size: int, cells: str) -> str:
    return f"<tr><td>{size:,}</td>{cells}</tr>"


def _difference_cells(records: Sequence[Json | None]) -> str:
    return "".join(f"<td>{stacked(record, '+') if record else '–'}</td>" for record in records)


def _best_baseline(evaluation: Json) -> str | None:
    metric = evaluation["headline"]["metric"]
    scored = []
    for name in evaluation["baselines"]:
        record = record_of(evaluation, "all", name, metric)
        if record is not None and record["value"] is not None:
            scored.append((badness(record["value"], metric), name))
    return min(scored)[1] if scored else None


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
