"""The rules of `gmeta gate` as a YAML file writes them, or the default ones of what a version does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import yaml

from gmeta.config.parse import parse_mapping
from gmeta.core.errors import nearest, require
from gmeta.core.files import read_mapping
from gmeta.data.schema import LabelColumn, PackSchema
from gmeta.delivery.default_rules import CLICK_RULES, NEXT_ITEM_RULES, RATING_RULES
from gmeta.delivery.rules import (
    BaselineRule,
    Calibration,
    CurrentCalibration,
    CurrentChance,
    CurrentDrop,
    Difference,
    Evidence,
    Finite,
    LabelMean,
    NumericDrift,
    Rule,
    UnknownIds,
)
from gmeta.evaluation.metrics import BINARY_METRICS, LABEL_MARK, RATING_METRICS, is_metric
from gmeta.evaluation.ranking import PLACE_METRICS
from gmeta.evaluation.slices import OTHER, SCENARIO

Judged: TypeAlias = Literal["clicks", "ratings", "next items"]
"""What versions predict."""
_METRICS = {"clicks": BINARY_METRICS, "ratings": RATING_METRICS, "next items": PLACE_METRICS}
_DEFAULT = {"clicks": CLICK_RULES, "ratings": RATING_RULES, "next items": NEXT_ITEM_RULES}
_OF_SCORES = ("label_mean", "current_calibration", "calibration")
"""Rules that versions which find next items have nothing for."""
_CURE = "write it as `gmeta gate --help` shows"

RULES: dict[str, Callable[..., Rule]] = {
    "evidence": Evidence,
    "finite": Finite,
    "label_mean": LabelMean,
    "numeric_drift": NumericDrift,
    "unknown_ids": UnknownIds,
    "current_chance": CurrentChance,
    "current_drop": CurrentDrop,
    "current_calibration": CurrentCalibration,
    "difference": Difference,
    "calibration": Calibration,
    "baselines": BaselineRule,
}


def judged_by(schema: PackSchema, loss: str) -> Judged:
    """Return what versions predict that were trained on such a pack with a loss."""
    if schema.next_item:
        return "next items"
    return "clicks" if loss == "bce" else "ratings"


def read_rules(file: str | None, *, kind: Judged, labels: Sequence[LabelColumn] = ()) -> list[tuple[str, Rule]]:
    """Return the rules of a YAML file, or the default ones for what the versions predict, with their names.

    Of several `labels`, metrics may name one (auc/pay), and are of the first else.

    Raises ValueError that names the rule and the key, with the nearest name of what is unknown.
    """
    if file is None:
        values = yaml.safe_load(_DEFAULT[kind])
    else:
        values = read_mapping(Path(file), _CURE)
    for key in values:
        require(key == "rules", f"{file}: key", key, f"the one key is 'rules', a list: {_CURE}")
    given = values.get("rules")
    if not isinstance(given, list) or not given:
        raise ValueError(f"{file}: rules is {given!r}: must be a list of rules, at least one: {_CURE}")
    where = f"{file or 'default rules'}, rule"
    return [_rule(entry, f"{where} {i}", kind, labels) for i, entry in enumerate(given, start=1)]


def _rule(entry: Any, where: str, judged: Judged, labels: Sequence[LabelColumn]) -> tuple[str, Rule]:
    if not isinstance(entry, dict) or not isinstance(entry.get("rule"), str):
        raise ValueError(f"{where} is {entry!r}: must be a mapping with a key rule: {_CURE}")
    name = entry["rule"]
    if name not in RULES:
        raise ValueError(f"{where}: there is no rule {name!r}: {nearest(name, RULES)}")
    if judged == "next items" and name in _OF_SCORES:
        raise ValueError(
            f"{where} ({name}): it is for versions that score rows, and these find next items: leave it out"
        )
    make: Any = RULES[name]
    rule: Rule = parse_mapping(make, {key: value for key, value in entry.items() if key != "rule"}, f"{where} ({name})")
    metric = getattr(rule, "metric", "auc" if name == "current_chance" else None)
    _, mark, label = (metric or "").partition(LABEL_MARK)
    if mark:
        losses = {one.name: one.loss for one in labels}
        if label not in losses:
            hint = nearest(label, losses) if losses else "the pack has one label: leave it out"
            raise ValueError(f"{where} ({name}): {metric} names the label {label!r}: {hint}")
        judged = "clicks" if losses[label] == "bce" else "ratings"
    known = _METRICS[judged]
    if metric is not None and not is_metric(metric, known):
        raise ValueError(f"{where} ({name}): {metric} is no metric of {judged}: choose one of {', '.join(known)}")
    return name, rule


def scenarios_named(rules: Iterable[tuple[str, Rule]]) -> list[str]:
    """Return the scenarios whose slices some rules look at, but for those that are all others together."""
    slices = [case for _, rule in rules for case in getattr(rule, "slices", ())]
    return [case.removeprefix(SCENARIO) for case in slices if case.startswith(SCENARIO) and case != OTHER]
