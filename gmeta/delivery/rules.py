"""The rules of `gmeta gate`: each looks at what was measured, and says in plain words whether it passes, and why.

A rule that has nothing to look at (too few rows in a slice, nothing recorded of the day before) is not judged: it
passes and says so. docs/delivery.md explains every rule.

To add one: a frozen dataclass with `check`, and its name in `RULES` of `rule_files`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from gmeta.core.errors import nearest, require, require_numbers
from gmeta.core.numbers import shown
from gmeta.evaluation.documents import Json
from gmeta.evaluation.metrics import (
    BINARY_METRICS,
    HIGHER_IS_BETTER,
    LABEL_MARK,
    NO_INTERVAL,
    RATING_METRICS,
    is_metric,
)
from gmeta.evaluation.next_item import NEXT_ITEM_HEADLINE, NEXT_ITEM_SLICES
from gmeta.evaluation.next_item_baselines import POPULARITY
from gmeta.evaluation.ranking import PLACE_METRICS
from gmeta.evaluation.slices import BEFORE, COLDNESS, HEADLINE_METRICS, SCENARIO, SLICES, unit_of

CANDIDATE, CURRENT = "candidate", "current"
_NAMES = {CANDIDATE: "the candidate", CURRENT: "the current version"}
TRIVIAL = ("global-mean", "task-mean", "item-mean", "item-mean+task-bias", POPULARITY)
"""Baselines that a version must beat. Factor analysis is a model of its own: it stands beside, and refuses nothing."""
_CURE = "write it as `gmeta gate --help` shows"
_SEEN_ITEMS = ("warm", "user_cold")
_Metrics: TypeAlias = dict[str, dict[str, Any]]  # slice -> metric -> value, of headline_metrics


@dataclass(frozen=True)
class Measured:
    """What the rules look at: query rows of the newest day, scored by both versions."""

    tasks: int
    rows: int
    not_finite: dict[str, int]  # version -> rows whose score is no finite number
    evaluation: Json | None  # as in evaluation.json, of candidate, current and baselines; None: scores are not finite
    label_mean: float
    label_std: float
    usual_label_mean: float | None  # of the day before, else of what the current version was trained on; None: unknown
    numeric: dict[str, dict[str, float]]  # column -> "mean" and "std", in standard deviations of the base
    unknown: dict[str, dict[str, float]]  # feature -> version -> share of ids that it does not know
    current_now: _Metrics  # headline_metrics of the current version, by what it has seen itself
    current_before: _Metrics | None  # the same of a day before; None: nobody recorded it
    before_from: str  # where the latter is from
    label_stds: dict[str, float] = field(default_factory=dict)  # by label

    def named(self, metric: str) -> str:
        """Return a metric's name in the evaluation: of several labels it is the first one's unless it names one."""
        labels = (self.evaluation or {}).get("labels")
        return f"{metric}{LABEL_MARK}{labels[0]}" if labels and LABEL_MARK not in metric else metric

    def record(self, kind: str, metric: str, case: str, variant: str) -> Json | None:
        """Return the record of a variant, or of the candidate's difference to it; None where it was not measured."""
        key, metric = "variant" if kind == "records" else "against", self.named(metric)
        for found in self.evaluation[kind] if self.evaluation else []:
            if (found["metric"], found["case"], found[key]) == (metric, case, variant):
                return dict(found)
        return None

    def rows_of(self, case: str) -> int:
        """Return the query rows of a slice."""
        cases = self.evaluation["cases"] if self.evaluation else []
        return next((int(found["rows"]) for found in cases if found["case"] == case), 0)

    def unit(self, metric: str) -> float:
        """Return what margins of a metric are counted in: standard deviations of the labels, or 1."""
        _, mark, label = metric.partition(LABEL_MARK)
        deviation = self.label_stds.get(label, self.label_std) if mark else self.label_std
        return (deviation or 1.0) if unit_of(metric) == "label" else 1.0


@dataclass(frozen=True)
class Outcome:
    """What a rule found. `value` and `bound` are the numbers that were compared, where there are two."""

    passed: bool
    reason: str
    judged: bool = True
    metric: str | None = None
    slice: str | None = None
    value: float | None = None
    bound: float | None = None


class Rule(Protocol):
    """Looks at what was measured."""

    def check(self, measured: Measured) -> list[Outcome]:
        """Return an outcome for each thing that it looks at, at least one."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """There are enough tasks and query rows to judge by."""

    min_tasks: int = 50
    """Tasks with query rows."""
    min_rows: int = 1000
    """Query rows."""

    def __post_init__(self) -> None:
        _require_positive(self, "min_tasks", "min_rows")

    def check(self, measured: Measured) -> list[Outcome]:
        """Count tasks and rows."""
        passed = measured.tasks >= self.min_tasks and measured.rows >= self.min_rows
        reason = (
            f"there are {measured.rows:,} query rows of {measured.tasks:,} tasks, at least {self.min_rows:,} rows of "
            f"{self.min_tasks:,} tasks are asked for"
        )
        return [Outcome(passed, reason, value=measured.rows, bound=self.min_rows)]


@dataclass(frozen=True, kw_only=True)
class Finite:
    """Every score of both versions is a finite number."""

    def check(self, measured: Measured) -> list[Outcome]:
        """Judge each version for itself."""
        return [
            Outcome(
                count == 0,
                f"{count:,} of {measured.rows:,} scores of {_NAMES[name]} are no finite numbers",
                value=count,
                bound=0,
            )
            for name, count in measured.not_finite.items()
        ]


@dataclass(frozen=True, kw_only=True)
class LabelMean:
    """The mean label is about that of the day before, or of what the current version was trained on."""

    max_change: float = 0.3
    """Most that it may change: of clicks as a share of the usual mean, of others in standard deviations of labels."""

    def __post_init__(self) -> None:
        _require_positive(self, "max_change")

    def check(self, measured: Measured) -> list[Outcome]:
        """Compare the mean label with the usual one."""
        usual, found = measured.usual_label_mean, measured.label_mean
        binary = measured.evaluation is not None and is_metric(measured.evaluation["headline"]["metric"], {"auc"})
        scale = usual if binary else measured.label_std
        if not usual or not scale:
            return [_not_judged("the usual mean label is not known")]
        change = abs(found - usual) / scale
        unit = "of it" if binary else "standard deviations"
        reason = (
            f"the mean label is {shown(found)}, usually {shown(usual)}: a change of {shown(change)} {unit}, at most "
            f"{self.max_change:g} is allowed"
        )
        return [Outcome(change <= self.max_change, reason, value=change, bound=self.max_change)]


@dataclass(frozen=True, kw_only=True)
class NumericDrift:
    """No numeric column has moved far from what the models were trained on."""

    max_shift: float = 3.0
    """Most that a column's mean may be off, in its standard deviations of old."""
    max_spread: float = 5.0
    """Most that its standard deviation may be, in units of that of old."""

    def __post_init__(self) -> None:
        _require_positive(self, "max_shift", "max_spread")

    def check(self, measured: Measured) -> list[Outcome]:
        """Name each column that moved too far; else the one that moved furthest."""
        bad = [
            Outcome(
                False,
                f"numeric column {name!r} has its mean {found['mean']:+.2f} standard deviations off (allowed "
                f"{self.max_shift:g}) and {found['std']:.2f} times the usual one (allowed {self.max_spread:g})",
                value=abs(found["mean"]),
                bound=self.max_shift,
            )
            for name, found in measured.numeric.items()
            if not (abs(found["mean"]) <= self.max_shift and found["std"] <= self.max_spread)
        ]
        if not measured.numeric:
            return [_not_judged("there are no numeric columns")]
        worst = max(measured.numeric, key=lambda name: abs(measured.numeric[name]["mean"]))
        mean = measured.numeric[worst]["mean"]
        return bad or [
            Outcome(
                True,
                f"no mean of {len(measured.numeric)} numeric columns is more than {self.max_shift:g} standard "
                f"deviations off; {worst!r} is {mean:+.2f}",
                value=abs(mean),
                bound=self.max_shift,
            )
        ]


@dataclass(frozen=True, kw_only=True)
class UnknownIds:
    """Neither version meets a column whose values it does not know."""

    max_share: float = 0.9
    """Largest share of a feature's ids that may be unknown."""

    def __post_init__(self) -> None:
        require_numbers(self)
        require(0 <= self.max_share <= 1, "max_share", self.max_share, "must be in [0, 1]")

    def check(self, measured: Measured) -> list[Outcome]:
        """Name each column that is too unknown; else the least known one."""
        shares = {(name, who): share for name, by in measured.unknown.items() for who, share in by.items()}
        bad = [
            Outcome(
                False,
                f"{share:.0%} of {name!r} are unknown to {_NAMES[who]} (allowed {self.max_share:.0%}): they are new, "
                "or written in another way than before",
                value=share,
                bound=self.max_share,
            )
            for (name, who), share in shares.items()
            if share > self.max_share
        ]
        if not shares:
            return [_not_judged("no feature has a vocabulary")]
        (name, who), share = max(shares.items(), key=lambda item: item[1])
        reason = f"at most {share:.0%} of a feature's ids ({name!r}, to {_NAMES[who]}) are unknown"
        return bad or [Outcome(True, f"{reason}, {self.max_share:.0%} are allowed", value=share, bound=self.max_share)]


@dataclass(frozen=True, kw_only=True)
class CurrentChance:
    """The current version does not order the newest day's rows worse than chance: else labels are damaged."""

    min: float = 0.48
    """AUC that its 95 % interval must reach, before adaptation too: a task adapts to labels that are turned round."""

    def __post_init__(self) -> None:
        require_numbers(self)
        require(0 <= self.min <= 1, "min", self.min, "must be in [0, 1]")

    def check(self, measured: Measured) -> list[Outcome]:
        """Look at the upper end of the interval of its AUC."""
        after = measured.record("records", "auc", "all", CURRENT)
        before = measured.record("records", "auc", "all", f"{CURRENT}-{BEFORE}")
        return [self._check(after, "after"), *([] if before is None else [self._check(before, BEFORE)])]

    def _check(self, found: Json | None, when: str) -> Outcome:
        if found is None or found["value"] is None:
            return _undefined("auc", "all", found)
        value = found["value"] if found["high"] is None else found["high"]
        passed = value >= self.min
        reason = f"the AUC of the current version {when} adaptation is {_interval(found)}; it must reach {self.min:g}"
        reason += "" if passed else ": are the labels turned round?"
        return Outcome(passed, reason, metric="auc", slice="all", value=value, bound=self.min)


@dataclass(frozen=True, kw_only=True)
class CurrentDrop:
    """The current version is about as good on the newest day as on a day before: else the day's data are suspect.

    Rows of items that it has seen are compared alone, slice by slice, each weighted by its rows of the newest day: new
    items lower what a version can know, and no day has as many of them as another.
    """

    metric: str = "auc"
    """auc, gauc, logloss, mae or rmse; measured before adaptation too, because tasks adapt to damaged labels."""
    max_drop: float = 0.05
    """Most that it may lose."""
    min_rows: int = 500
    """Rows that a slice needs on both days."""

    def __post_init__(self) -> None:
        _require_metric(self.metric)
        _require_positive(self, "max_drop", "min_rows")
        known = [*(name for name in HEADLINE_METRICS if name != "calibration"), NEXT_ITEM_HEADLINE]
        require(self.metric in known, "metric", self.metric, f"must be one of {', '.join(known)}")

    def check(self, measured: Measured) -> list[Outcome]:
        """Compare the current version's quality on both days."""
        before, now = measured.current_before, measured.current_now
        if before is None:
            return [
                _not_judged(
                    "nothing is recorded of what the current version scored before, so that damaged labels may pass: "
                    "name a sound day's pack with --previous_pack"
                )
            ]
        metrics = [name for name in (self.metric, f"{self.metric}_{BEFORE}") if self._cases(name, before, now)]
        return [self._check(name, before, now, measured) for name in metrics] or [
            _not_judged(f"no slice has {self.min_rows:,} rows and a {self.metric} on both days")
        ]

    def _check(self, metric: str, before: _Metrics, now: _Metrics, measured: Measured) -> Outcome:
        cases = self._cases(metric, before, now)
        weights = [now[case]["rows"] / sum(now[other]["rows"] for other in cases) for case in cases]
        old, new = (
            sum(weight * float(day[case][metric]) for weight, case in zip(weights, cases, strict=True))
            for day in (before, now)
        )
        unit = old or 1.0 if self.metric in PLACE_METRICS else measured.unit(self.metric)
        drop = (old - new if self.metric in HIGHER_IS_BETTER else new - old) / unit
        passed = drop <= self.max_drop
        what = f"{self.metric} {BEFORE} adaptation" if metric != self.metric else metric
        reason = (
            f"the {what} of the current version on {' and '.join(cases)} was {shown(old)}, "
            f"{measured.before_from}, and is {shown(new)} on this day: a loss of {shown(drop)}, at most "
            f"{self.max_drop:g} is allowed"
        )
        reason += "" if passed else "; this day's data are suspect"
        return Outcome(passed, reason, metric=self.metric, slice=", ".join(cases), value=drop, bound=self.max_drop)

    def _cases(self, metric: str, *days: _Metrics) -> list[str]:
        """Return the slices to compare: those of items that were seen, else all rows."""

        def counts(case: str) -> bool:
            found = [day.get(case, {}) for day in days]
            return all(one.get(metric) is not None and (one.get("rows") or 0) >= self.min_rows for one in found)

        common = [case for case in (*_SEEN_ITEMS, "all") if counts(case)]
        return [case for case in common if case != "all"] or common


@dataclass(frozen=True, kw_only=True)
class CurrentCalibration:
    """The current version still predicts about what is seen: else the day's labels, or its sample, are others."""

    max_error: float = 0.5
    """Most that predicted / observed may be off 1."""

    def __post_init__(self) -> None:
        _require_positive(self, "max_error")

    def check(self, measured: Measured) -> list[Outcome]:
        """Look at its predictions on all rows."""
        found = measured.record("records", "calibration", "all", CURRENT)
        if found is None or found["value"] is None:
            return [_undefined("calibration", "all", found)]
        error = abs(found["value"] - 1)
        reason = (
            f"the current version predicts {shown(found['value'])} of what is seen on this day, "
            f"{1 - self.max_error:g} to {1 + self.max_error:g} is allowed"
        )
        return [
            Outcome(
                error <= self.max_error, reason, metric="calibration", slice="all", value=error, bound=self.max_error
            )
        ]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The candidate is no worse than the current version: the 95 % interval of the difference, paired over tasks,
    allows no loss beyond a margin.
    """

    metric: str
    """A metric of `gmeta evaluate`, but calibration, which has a rule of its own."""
    margin: float
    """Largest loss that the interval may allow. Of ece, which has no interval, the largest loss."""
    slices: list[str] = field(default_factory=lambda: ["all"])
    """Slices of `gmeta evaluate`, each judged for itself."""
    min_rows: int = 0
    """Slices of fewer query rows are not judged."""

    def __post_init__(self) -> None:
        _require_metric(self.metric)
        _require_slices(self.slices)
        require_numbers(self)
        require(self.margin >= 0, "margin", self.margin, "must not be negative: it is the loss that is allowed")
        require(self.min_rows >= 0, "min_rows", self.min_rows, "must not be negative")
        require(not is_metric(self.metric, {"calibration"}), "metric", self.metric, "use the rule calibration")

    def check(self, measured: Measured) -> list[Outcome]:
        """Judge each slice for itself."""
        return [self._check(measured, case) for case in self.slices]

    def _check(self, measured: Measured, case: str) -> Outcome:
        rows, metric = measured.rows_of(case), self.metric
        if rows < max(1, self.min_rows):
            return _few_rows(rows, self.min_rows, metric, case)
        found = measured.record("differences", metric, case, CURRENT)
        higher = is_metric(metric, HIGHER_IS_BETTER)
        end = None if found is None else found["low" if higher else "high"]
        if found is not None and is_metric(metric, NO_INTERVAL):
            end = found["value"]
        if found is None or end is None:
            return _undefined(metric, case, found)
        unit = measured.unit(metric)
        loss = (-end if higher else end) / unit
        passed = loss <= self.margin
        allowed = f"a loss of {self.margin * unit:g}"
        reason = f"{metric} on {case} ({rows:,} rows): candidate - current is {_interval(found, '+')}; "
        reason += f"{allowed} is allowed" if passed else f"more than {allowed} cannot be ruled out"
        return Outcome(passed, reason, metric=metric, slice=case, value=loss, bound=self.margin)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The candidate predicts what is seen. One that is further off passes where the current version is no better."""

    max_error: float = 0.1
    """Most that predicted / observed may be off 1, unless the current version is as far off."""
    max_loss: float = 0.05
    """Most that it may be further off than the current version, also within `max_error`."""
    slices: list[str] = field(default_factory=lambda: ["all"])
    """Slices of `gmeta evaluate`, each judged for itself."""
    min_rows: int = 0
    """Slices of fewer query rows are not judged."""

    def __post_init__(self) -> None:
        _require_slices(self.slices)
        _require_positive(self, "max_error", "max_loss")
        require(self.min_rows >= 0, "min_rows", self.min_rows, "must not be negative")

    def check(self, measured: Measured) -> list[Outcome]:
        """Judge each slice for itself."""
        return [self._check(measured, case) for case in self.slices]

    def _check(self, measured: Measured, case: str) -> Outcome:
        name, rows = "calibration", measured.rows_of(case)
        if rows < max(1, self.min_rows):
            return _few_rows(rows, self.min_rows, name, case)
        found = [measured.record("records", name, case, who) for who in (CANDIDATE, CURRENT)]
        values = [float(one["value"]) for one in found if one is not None and one["value"] is not None]
        if len(values) < 2:
            return _undefined(name, case, None)
        ours, theirs = (abs(value - 1) for value in values)
        bound = min(max(self.max_error, theirs), theirs + self.max_loss)
        reason = (
            f"on {case} the candidate predicts {shown(values[0])} of what is seen, the current version "
            f"{shown(values[1])}: it may be {shown(bound)} off"
        )
        return Outcome(ours <= bound, reason, metric=name, slice=case, value=ours, bound=bound)


@dataclass(frozen=True, kw_only=True)
class BaselineRule:
    """The candidate beats every trivial baseline, or is no worse than a current version that does not."""

    metric: str = "auc"
    """A metric of `gmeta evaluate`, but calibration."""
    min_gain: float = 0.0
    """What it must gain over the best of them."""

    def __post_init__(self) -> None:
        _require_metric(self.metric)
        require_numbers(self)
        require(not is_metric(self.metric, {"calibration"}), "metric", self.metric, "use the rule calibration")

    def check(self, measured: Measured) -> list[Outcome]:
        """Compare with the best baseline on all rows."""
        sign = 1 if is_metric(self.metric, HIGHER_IS_BETTER) else -1
        found = {name: measured.record("records", self.metric, "all", name) for name in (CANDIDATE, CURRENT, *TRIVIAL)}
        values = {name: one["value"] for name, one in found.items() if one is not None and one["value"] is not None}
        ours, theirs = (values.pop(name, math.nan) for name in (CANDIDATE, CURRENT))
        if not values:
            return [_not_judged("no baseline was measured: the pack has no train tasks", self.metric, "all")]
        best = max(values, key=lambda name: sign * values[name])
        gain = sign * (ours - values[best]) / measured.unit(self.metric)
        beats, no_worse = gain >= self.min_gain, sign * (ours - theirs) >= 0
        reason = (
            f"the {self.metric} of the candidate is {shown(ours)}, that of the best trivial baseline, {best}, "
            f"{shown(values[best])}"
        )
        if not beats:
            told = "no better" if no_worse else "better"
            reason += f"; the current version, with {shown(theirs)}, is {told}"
        passed = beats or no_worse
        return [Outcome(passed, reason, metric=self.metric, slice="all", value=gain, bound=self.min_gain)]


_WITHOUT_SCORES = ("evidence", "finite")
"""Rules that can be judged where scores are no finite numbers."""


def apply_rules(rules: Iterable[tuple[str, Rule]], measured: Measured) -> list[tuple[str, Outcome]]:
    """Return what each rule found. Where scores are no finite numbers, the rules that need them refuse."""
    found = []
    for name, rule in rules:
        if measured.evaluation is None and name not in _WITHOUT_SCORES:
            outcomes = [Outcome(False, "nothing can be compared: scores are no finite numbers", judged=False)]
        else:
            outcomes = rule.check(measured)
        found += [(name, outcome) for outcome in outcomes]
    return found


def _not_judged(reason: str, metric: str | None = None, case: str | None = None) -> Outcome:
    return Outcome(True, reason, judged=False, metric=metric, slice=case)


def _few_rows(rows: int, needed: int, metric: str, case: str) -> Outcome:
    asked = f"has {rows:,} rows, {needed:,} are asked for" if rows else "has no rows"
    return _not_judged(f"{metric} on {case}, which {asked}", metric, case)


def _undefined(metric: str, case: str, found: Json | None) -> Outcome:
    """Say that there is no number to judge. All rows together must have one, a slice need not."""
    what = (
        f"{metric} on {case} is undefined" if found is None or found["value"] is None else f"{metric} has no interval"
    )
    if case == "all":
        return Outcome(False, f"{what}: is there one kind of label only, or one task?", metric=metric, slice=case)
    return _not_judged(what, metric, case)


def _interval(record: Json, sign: str = "") -> str:
    interval = "" if record["low"] is None else f" (95 %: {shown(record['low'], sign)} … {shown(record['high'], sign)})"
    return f"{shown(record['value'], sign)}{interval}"


def _require_metric(metric: str) -> None:
    known = dict.fromkeys((*BINARY_METRICS, *RATING_METRICS, *PLACE_METRICS))
    if not is_metric(metric, known):
        raise ValueError(f"metric is {metric!r}, which is unknown: {nearest(metric, known)}")


def _require_slices(slices: list[str]) -> None:
    require(bool(slices), "slices", slices, f"must name slices, such as all, {', '.join(COLDNESS)}")
    for case in slices:
        of_scenario = isinstance(case, str) and case.startswith(SCENARIO) and case != SCENARIO
        if case not in (*SLICES, *NEXT_ITEM_SLICES) and not of_scenario:
            hint = nearest(str(case), (*SLICES, *NEXT_ITEM_SLICES, f"{SCENARIO}VALUE"))
            raise ValueError(f"slices has {case!r}, which is unknown: {hint}")


def _require_positive(rule: Any, *keys: str) -> None:
    require_numbers(rule)
    for key in keys:
        require(getattr(rule, key) > 0, key, getattr(rule, key), "must be more than 0")
