"""verdict.html: one self-contained page that says what a gate found, and why."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from gmeta.delivery.rules import CANDIDATE, CURRENT
from gmeta.evaluation import charts
from gmeta.evaluation.charts import Points
from gmeta.evaluation.documents import Json
from gmeta.evaluation.pages import (
    all_metrics_section,
    case_name,
    case_table,
    figure,
    metric_name,
    number_text,
    page,
    points_of,
    records_of,
    stacked,
    variant_table,
)
from gmeta.evaluation.slices import COLDNESS

WORDS = ("passed", "not judged", "refused")
_BADGES = {"refused": "worse", "passed": "better", "not judged": ""}
"""Colours of verdicts are those of comparisons."""


def word_of(rule: Json) -> str:
    """Return which of `WORDS` a rule earned."""
    return "refused" if not rule["passed"] else "passed" if rule["judged"] else "not judged"


def verdict_page(document: Json) -> str:
    """Return the page of a verdict, the content of verdict.json."""
    pack, evaluation = document["pack"], document["evaluation"]
    refused = [rule for rule in document["rules"] if not rule["passed"]]
    subtitle = f"{document['candidate']} in place of {document['current']} · pack {pack['path']}, day {pack['day']}"
    lead = (
        "<b>Passed.</b> The candidate may serve."
        if document["passed"]
        else "<b>Refused.</b> The current version stays."
    )
    counts = (
        f"{pack['rows']:,} query rows of {pack['tasks']:,} {pack['split']} tasks, which no training has seen; both "
        "versions scored the same raw rows."
    )
    reasons = "".join(f"<li>{escape(rule['rule'])}: {escape(rule['reason'])}</li>" for rule in refused)
    body = [
        f'<p class="lead">{lead}</p>{f"<ul>{reasons}</ul>" if reasons else ""}<p class="note">{escape(counts)}</p>',
        f"<h2>Rules</h2>{_rules_table(document['rules'])}",
    ]
    if evaluation is not None:
        body += [_quality_section(evaluation), all_metrics_section(evaluation)]
    return page("Gate", subtitle, [*body, _data_section(document["data"])])


def _rules_table(rules: Iterable[Json]) -> str:
    rows = []
    for rule in rules:
        word = word_of(rule)
        mark = f'<span class="badge {_BADGES[word]}">{word}</span>'
        rows.append(f"<tr><td>{escape(rule['rule'])}</td><td>{mark}</td><td>{escape(rule['reason'])}</td></tr>")
    return f'<div class="scroll"><table class="keys">{"".join(rows)}</table></div>'


def _quality_section(evaluation: Json) -> str:
    """Show both versions beside the baselines: the headline metric by slice, its differences, and calibration."""
    metric = evaluation["headline"]["metric"]
    cases = {case["case"]: case for case in evaluation["cases"] if case["rows"]}
    cold = [name for name in ("all", *COLDNESS) if name in cases]
    compared = (CURRENT, CANDIDATE)
    series = [points_of(name, range(len(cold)), records_of(evaluation, cold, name, metric)) for name in compared]
    names = [name.replace("_", "-") for name in cold]
    figures = [figure("By coldness", charts.dot_chart("By coldness", names, series, x_label=metric_name(metric)))]
    curves = [
        Points(
            name,
            [bin["predicted"] for bin in evaluation["curves"][name]],
            [bin["observed"] for bin in evaluation["curves"][name]],
        )
        for name in compared
        if len(evaluation["curves"].get(name, ())) > 1
    ]
    if curves:
        chart = charts.calibration_chart("Calibration", curves)
        figures.append(figure("Calibration", chart, "Bins of equally many rows."))
    note = (
        f"Intervals are 95 %, from {evaluation['resamples']:,} resamples of tasks; differences are paired on the same "
        "resamples."
    )
    return (
        f'<h2>Quality</h2><p class="note">{note}</p><div class="grid">{"".join(figures)}</div>'
        f"{_difference_table(evaluation, list(cases))}{case_table(evaluation, list(cases), metric)}"
    )


def _difference_table(evaluation: Json, cases: list[str]) -> str:
    """Make a table of candidate - current, slices down and metrics across."""
    found = {(d["case"], d["metric"]): d for d in evaluation["differences"] if d["against"] == CURRENT}
    metrics = list(dict.fromkeys(metric for _, metric in found))
    rows = []
    for case in cases:
        cells = "".join(
            f"<td>{stacked(found[case, metric], '+')}</td>" for metric in metrics if (case, metric) in found
        )
        rows.append(f"<tr><td>{escape(case_name(case))}</td>{cells}</tr>")
    return variant_table("candidate − current", map(metric_name, metrics), rows)


def _data_section(data: Json) -> str:
    """Show what was found in the day's data."""
    rows = [("mean label", f"{number_text(data['label_mean'])}, usually {number_text(data['usual_label_mean'])}")]
    rows += [
        (f"numeric {name}", f"mean {found['mean']:+.3f} of old standard deviations, spread × {found['std']:.3f}")
        for name, found in data["numeric"].items()
    ]
    rows += [
        (f"unknown {name}", ", ".join(f"{share:.1%} to the {who}" for who, share in found.items()))
        for name, found in data["unknown"].items()
    ]
    cells = "".join(f"<tr><td>{escape(name)}</td><td>{escape(text)}</td></tr>" for name, text in rows)
    return f'<h2>The day\'s data</h2><div class="scroll"><table class="keys">{cells}</table></div>'
