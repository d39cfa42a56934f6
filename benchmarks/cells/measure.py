"""What cells come to: means over seeds, paired differences with intervals over tasks, and both in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from common import Record, table

from cells.outcome import Floats, Outcome
from cells.run import TUNED
from gmeta.evaluation.baselines import BASELINES
from gmeta.evaluation.metrics import HIGHER_IS_BETTER, Bootstrap, Rows

UNITS = {"mae": "label", "logloss": "nat"}
RESAMPLES = 1000
ROUNDED = ("-after", "-finetuned", "factor-analysis", TUNED, "+task-bias")
"""Ends of the names of variants that are measured in whole stars too, which a mean absolute error favours."""
NETWORK_FREE = (*BASELINES, TUNED)
BOUNDS = ("prior", "posterior", "oracle")
"""What knows the truth of a synthetic log: shown, but not what a model is told to beat."""


@dataclass(frozen=True)
class Difference:
    """The difference of a model after adaptation to another variant: mean over seeds, interval over test tasks."""

    variant: str
    against: str
    metric: str
    value: float
    low: float
    high: float
    spread: float  # standard deviation over seeds

    @property
    def verdict(self) -> str:
        """Return the interval in words."""
        if self.low <= 0 <= self.high:
            return "does NOT beat it: within the interval"
        better = (self.value > 0) == (self.metric in HIGHER_IS_BETTER)
        return "beats it" if better else "does NOT beat it: it is worse"


@dataclass(frozen=True)
class Measured:
    """The numbers of one view of a case."""

    name: str
    metrics: tuple[str, ...]
    models: tuple[str, ...]
    seeds: int
    tasks: int
    records: list[Record]
    differences: list[Difference]


def measure(name: str, metrics: tuple[str, ...], models: tuple[str, ...], outcomes: Sequence[Outcome]) -> Measured:
    """Measure every variant that all seeds have: mean and standard deviation over seeds, and paired differences.

    Intervals are of the mean over seeds: tasks are drawn with replacement, each with their rows of all seeds and of
    both variants.
    """
    if "mae" in metrics:
        outcomes = [_with_rounded(outcome) for outcome in outcomes]
    tasks = np.unique(np.concatenate([o.task for o in outcomes]))
    variants = [v for v in outcomes[0].scores if all(v in o.scores for o in outcomes)]
    bootstrap = Bootstrap(len(tasks), resamples=RESAMPLES, seed=0)
    for seed, outcome in enumerate(outcomes):
        index = np.searchsorted(tasks, outcome.task)
        for variant in variants:
            rows = Rows(outcome.scores[variant], outcome.label, index, len(tasks), outcome.ranking[variant])
            for metric in metrics:
                bootstrap.add((seed, variant, metric), metric, rows)
    bootstrap.run()
    measured = Measured(name, metrics, models, len(outcomes), len(tasks), [], [])
    for metric in metrics:
        drawn = {
            v: np.stack([bootstrap.resampled((s, v, metric)).values for s in range(len(outcomes))]) for v in variants
        }
        for variant in variants:
            values = drawn[variant][:, 0].tolist()
            unit = UNITS.get(metric, "1")
            measured.records.append(Record(name, variant, metric, statistics.mean(values), unit))
            measured.records.append(Record(name, variant, f"{metric}_std", _spread(values), unit))
        for after in (f"{model}-after" for model in models if f"{model}-after" in drawn):
            others = [v for v in variants if _is_compared(v, after)]
            measured.differences.extend(_difference(after, other, metric, drawn) for other in others)
    return measured


def _difference(after: str, other: str, metric: str, drawn: dict[str, Floats]) -> Difference:
    by_seed = drawn[after] - drawn[other]
    resampled = by_seed.mean(0)
    low, high = np.quantile(resampled[1:], [0.025, 0.975])
    spread = _spread(by_seed[:, 0].tolist())
    return Difference(after, other, metric, float(resampled[0]), float(low), float(high), spread)


def _is_compared(variant: str, after: str) -> bool:
    """Say whether a model is compared with a variant: a baseline, its own others, or another model after adaptation."""
    plain = variant.removesuffix("-rounded")
    own = plain.startswith(after.removesuffix("after"))
    others = plain in NETWORK_FREE or plain == "posterior" or variant.endswith("-after")
    return plain != after and (own or others)


def _with_rounded(outcome: Outcome) -> Outcome:
    rounded = {f"{name}-rounded": np.rint(outcome.scores[name]) for name in outcome.scores if name.endswith(ROUNDED)}
    return Outcome(outcome.task, outcome.label, outcome.scores | rounded, outcome.ranking | rounded)


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def render(measured: Measured) -> str:
    """Return a case in Markdown: values, then differences with a verdict each."""
    values = {(r.variant, r.metric): r.value for r in measured.records}
    variants = list(dict.fromkeys(r.variant for r in measured.records))
    others = (*NETWORK_FREE, *BOUNDS)
    rows = [
        [v, *(f"{values[v, m]:.4f} ± {values[v, m + '_std']:.4f}" for m in measured.metrics)]
        for v in sorted(variants, key=lambda v: (v.removesuffix("-rounded") in others, v))
    ]
    compared = [
        [d.metric, f"{d.variant} − {d.against}", f"{d.value:+.4f} ± {d.spread:.4f}", _interval(d), d.verdict]
        for d in measured.differences
    ]
    return "\n\n".join(
        [
            f"## {measured.name}",
            f"{measured.seeds} seeds, {measured.tasks:,} test tasks.",
            table(["variant", *measured.metrics], rows),
            table(["metric", "difference", "mean ± sd over seeds", "95 % over tasks", "after"], compared),
            _in_words(measured),
        ]
    )


def _interval(difference: Difference) -> str:
    return f"{difference.low:+.4f} … {difference.high:+.4f}"


def _in_words(measured: Measured) -> str:
    lines = []
    for model in measured.models:
        for metric in measured.metrics:
            mine = [d for d in measured.differences if d.variant == f"{model}-after" and d.metric == metric]
            lost = [d.against for d in mine if d.verdict != "beats it" and d.against not in BOUNDS]
            said = f"does NOT beat {', '.join(lost)}" if lost else "beats all of them"
            lines.append(f"- {model}, {metric}: after adaptation it {said} outside the 95 % interval.")
    return "\n".join(lines)
