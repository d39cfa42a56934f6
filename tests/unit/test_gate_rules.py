"""The rules of a gate on made-up measurements, and how they are read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gmeta.cli import command_parser, run
from gmeta.delivery.gate_page import verdict_page
from gmeta.delivery.rule_files import RULES, read_rules
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
    Measured,
    NumericDrift,
    Rule,
    UnknownIds,
    apply_rules,
)
from gmeta.evaluation.slices import evaluation_records, headline_metrics

ROWS, TASKS = 3000, 150


def measured(noise: float = 1.0, *, binary: bool = True, shift: float = 0.0, turned: bool = False) -> Measured:
    """A candidate that reads the truth through `noise`, moved by `shift`, and a current version through 1."""
    rng = np.random.default_rng(0)
    task = np.repeat(np.arange(TASKS), ROWS // TASKS)
    truth = rng.normal(size=ROWS)
    chance = 1 / (1 + np.exp(-truth))
    label = (rng.random(ROWS) < chance).astype(float) if binary else 3 + truth
    label = 1 - label if turned else label
    hazy = {"candidate": noise, "current": 1.0, "current-before": 1.5}
    scores = {name: truth / (1 + by) + by * rng.normal(size=ROWS) * 0.4 for name, by in hazy.items()}
    scores["candidate"] += shift
    scores = {name: 1 / (1 + np.exp(-score)) if binary else 3 + score for name, score in scores.items()}
    scores["global-mean"] = np.full(ROWS, label.mean())
    scores["item-mean"] = np.full(ROWS, label.mean()) + 1e-9 * rng.normal(size=ROWS)
    evaluation = evaluation_records(
        scores,
        label=label,
        task=task,
        support_size=np.full(ROWS, 3),
        item_cold=np.arange(ROWS) % 10 == 0,
        task_cold=True,
        binary=binary,
        resamples=100,
        seed=0,
    )
    now = headline_metrics(evaluation, "current")
    return Measured(
        tasks=TASKS,
        rows=ROWS,
        not_finite={"candidate": 0, "current": 0},
        evaluation=evaluation,
        label_mean=float(label.mean()),
        label_std=float(label.std()),
        usual_label_mean=0.5 if binary else 3.0,
        numeric={"age": {"mean": 0.1, "std": 1.0}, "price": {"mean": -0.2, "std": 1.1}},
        unknown={"item": {"candidate": 0.0, "current": 0.2}},
        current_now=now,
        current_before=now,
        before_from="as it says",
    )


GOOD = measured(0.5)
WORSE = measured(2.0)
RATINGS = measured(0.5, binary=False)
TURNED = measured(0.5, turned=True)
BETTER_ONCE = {case: {**found, "mae": found["mae"] - 0.2} for case, found in RATINGS.current_now.items()}


def words(name: str, rule: Any, found: Measured) -> list[str]:
    """What a rule says of each thing that it refuses."""
    assert RULES[name] is type(rule)
    return [outcome.reason for _, outcome in apply_rules([(name, rule)], found) if not outcome.passed]


REFUSALS: list[tuple[str, Rule, Measured, str]] = [
    ("evidence", Evidence(min_tasks=151), GOOD, "150 tasks"),
    ("evidence", Evidence(min_rows=3001), GOOD, "3,000 query rows"),
    (
        "finite",
        Finite(),
        replace(GOOD, not_finite={"candidate": 2, "current": 0}),
        "2 of 3,000 scores of the candidate",
    ),
    ("label_mean", LabelMean(), replace(GOOD, usual_label_mean=0.2), "usually 0.2000"),
    ("label_mean", LabelMean(), replace(RATINGS, usual_label_mean=9.0), "standard deviations"),
    ("numeric_drift", NumericDrift(), replace(GOOD, numeric={"age": {"mean": -3.1, "std": 1.0}}), "'age'"),
    ("numeric_drift", NumericDrift(), replace(GOOD, numeric={"age": {"mean": 0.0, "std": 5.1}}), "5.10 times"),
    ("unknown_ids", UnknownIds(), replace(GOOD, unknown={"item": {"current": 0.95}}), "to the current version"),
    ("current_chance", CurrentChance(), TURNED, "turned round?"),
    ("current_drop", CurrentDrop(), replace(TURNED, current_before=GOOD.current_now), "are suspect"),
    ("current_drop", CurrentDrop(metric="mae", max_drop=0.1), replace(RATINGS, current_before=BETTER_ONCE), "mae"),
    ("current_calibration", CurrentCalibration(max_error=1e-6), GOOD, "of what is seen on this day"),
    ("difference", Difference(metric="auc", margin=0.01), WORSE, "cannot be ruled out"),
    ("difference", Difference(metric="logloss", margin=0.01), WORSE, "cannot be ruled out"),
    ("difference", Difference(metric="ece", margin=0.01), measured(1.0, shift=0.5), "ece on all"),
    ("difference", Difference(metric="auc", margin=0.01, slices=["both_cold"]), WORSE, "both_cold (300 rows)"),
    ("calibration", Calibration(), measured(0.5, shift=0.5), "the candidate predicts"),
    ("baselines", BaselineRule(min_gain=0.5), WORSE, "the current version, with"),
]


@pytest.mark.parametrize(("name", "rule", "found", "reason"), REFUSALS)
def test_a_rule_refuses_and_says_why(name: str, rule: Rule, found: Measured, reason: str) -> None:
    refused = words(name, rule, found)
    assert refused
    assert any(reason in text for text in refused), refused


@pytest.mark.parametrize("binary", [True, False])
def test_a_good_candidate_passes_the_default_rules(binary: bool) -> None:
    rules = read_rules(None, kind="clicks" if binary else "ratings")
    good = GOOD if binary else RATINGS
    outcomes = apply_rules(rules, good)
    assert [outcome.reason for _, outcome in outcomes if not outcome.passed] == []
    assert sum(outcome.judged for _, outcome in outcomes) >= 10
    kinds = {name for name, _ in rules}
    assert kinds == {*RULES} - (set() if binary else {"current_chance", "current_calibration"})


def test_scores_that_are_no_numbers_are_refused_by_all() -> None:
    found = replace(GOOD, not_finite={"candidate": 3, "current": 0}, evaluation=None)
    outcomes = apply_rules(read_rules(None, kind="clicks"), found)
    assert {name for name, outcome in outcomes if outcome.passed} == {"evidence", "finite"}


def test_what_the_current_version_fails_too_refuses_nothing_that_is_better() -> None:
    """A version that is off must be replaceable by one that is less so."""
    off = measured(0.5, shift=0.5)
    assert off.evaluation is not None
    swap = {"candidate": "current", "current": "candidate"}
    records = [{**r, "variant": swap.get(r["variant"], r["variant"])} for r in off.evaluation["records"]]
    better = replace(off, evaluation={**off.evaluation, "records": records})
    tight = Calibration(max_error=0.001)
    assert words("calibration", tight, off)
    assert words("calibration", tight, better) == []
    assert words("baselines", BaselineRule(min_gain=0.9), GOOD) == []


def test_new_items_are_no_drop() -> None:
    """A day with more rows of new items lowers the AUC over all rows, and not that on items that were seen."""
    seen, new = {"auc": 0.8, "rows": 1000}, {"auc": 0.5, "rows": 3000}
    before = {"user_cold": seen, "both_cold": {**new, "rows": 10}, "all": {"auc": 0.8, "rows": 1010}}
    now = {"user_cold": {**seen, "auc": 0.79}, "both_cold": new, "all": {"auc": 0.6, "rows": 4000}}
    rule = CurrentDrop(max_drop=0.05)
    (outcome,) = rule.check(replace(GOOD, current_before=before, current_now=now))
    assert outcome.passed
    assert outcome.value == pytest.approx(0.01)
    (outcome,) = rule.check(replace(GOOD, current_before={"all": before["all"]}, current_now={"all": now["all"]}))
    assert not outcome.passed
    for unknown in (None, {}, {"all": {"auc": None, "rows": 4000}}, {"all": {"auc": 0.9, "rows": 3}}):
        (outcome,) = rule.check(replace(GOOD, current_before=unknown, current_now=now))
        assert (outcome.passed, outcome.judged) == (True, False)


def test_a_slice_of_few_rows_is_not_judged() -> None:
    slices = ["warm", "user_cold", "both_cold"]
    found = Difference(metric="auc", margin=0.0, slices=slices, min_rows=1000).check(WORSE)
    assert [(one.slice, one.passed, one.judged) for one in found] == [
        ("warm", True, False),
        ("user_cold", False, True),
        ("both_cold", True, False),
    ]


def test_margins_of_ratings_count_in_deviations_of_labels() -> None:
    """Labels that are ten times as large are judged alike."""
    assert RATINGS.evaluation is not None
    large = json.loads(json.dumps(RATINGS.evaluation))
    for record in (*large["records"], *large["differences"]):
        if record["unit"] == "label":
            record |= {key: record[key] * 10 for key in ("value", "low", "high")}
    (one,) = Difference(metric="mae", margin=0.1).check(RATINGS)
    (two,) = Difference(metric="mae", margin=0.1).check(
        replace(RATINGS, evaluation=large, label_std=10 * RATINGS.label_std)
    )
    assert one.value == pytest.approx(two.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rules: []", "rules is []: must be a list of rules, at least one"),
        ("rule: []", "key is 'rule': the one key is 'rules'"),
        ("rules: [{metric: auc}]", "rule 1 is {'metric': 'auc'}: must be a mapping with a key rule"),
        ("rules: [{rule: diference}]", "rule 1: there is no rule 'diference': did you mean 'difference'?"),
        ("rules: [{rule: difference, metric: acu, margin: 0}]", "'acu', which is unknown: did you mean 'auc'?"),
        ("rules: [{rule: difference, metric: auc}]", "margin"),
        ("rules: [{rule: difference, metric: auc, margin: -1}]", "margin is -1.0: must not be negative"),
        ("rules: [{rule: difference, metric: auc, margin: x}]", "margin is 'x': must be of type float"),
        ("rules: [{rule: difference, metric: mae, margin: 1}]", "mae is no metric of clicks: choose one of auc"),
        ("rules: [{rule: difference, metric: calibration, margin: 1}]", "use the rule calibration"),
        ("rules: [{rule: calibration, slice: [all]}]", "unknown key slice: did you mean slices?"),
        ("rules: [{rule: calibration, slices: [item-cold]}]", "did you mean 'item_cold'?"),
        ("rules: [{rule: current_drop, metric: ece}]", "metric is 'ece': must be one of auc"),
        ("rules: [{rule: unknown_ids, max_share: 2}]", "max_share is 2.0: must be in [0, 1]"),
        ("rules: [{rule: evidence, min_rows: .nan}]", "min_rows"),
        ("- a", "holds no mapping"),
    ],
)
def test_rules_that_are_not_understood_are_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "rules.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"rules\.yaml") as caught:
        read_rules(str(file), kind="clicks")
    assert message in str(caught.value)


def test_the_rules_that_the_help_shows_can_be_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["gate", "--help"]) == 0
    shown = capsys.readouterr().out
    file = tmp_path / "rules.yaml"
    clicks = shown[shown.index("rules:\n") :].partition("\n\n")[0]
    file.write_text(clicks)
    assert read_rules(str(file), kind="clicks") == read_rules(None, kind="clicks")
    assert "--previous_pack" in command_parser("gate").format_help()


def test_names_in_a_verdict_never_become_markup() -> None:
    evaluation = GOOD.evaluation
    pack = {"path": "<b>pack</b>", "day": 3, "split": "test", "tasks": 1, "rows": 2}
    rules = [{"rule": "unknown_ids", "passed": False, "judged": True, "reason": "<script>alert()</script>"}]
    data = {"label_mean": 0.5, "usual_label_mean": None, "numeric": {"<i>": {"mean": 0, "std": 1}}, "unknown": {}}
    document = {"passed": False, "candidate": "<u>", "current": "b", "pack": pack, "rules": rules, "data": data}
    for one in (evaluation, None):
        page = verdict_page({**document, "evaluation": one})
        assert [text for text in ("<b>pack", "<script", "<i>", "<u>") if text in page] == []
        assert "&lt;script&gt;" in page
