"""The evaluation document: slices, paired differences, JSON form."""

import io
import json

import numpy as np
import pytest

from gmeta.evaluation.metrics import Bootstrap, make_rows, metric
from gmeta.evaluation.slices import (
    MIN_VERDICT_TASKS,
    cells_of,
    estimate_fields,
    evaluation_records,
    headline_rows,
    print_headline,
    verdict_of,
    write_evaluation,
)


def columns(binary=True, num_tasks=80, seed=0):
    rng = np.random.default_rng(seed)
    task = np.repeat(np.arange(num_tasks), 6)
    truth = rng.normal(size=len(task))
    label = (truth > 0).astype(float) if binary else np.clip(np.round(3 + truth), 1, 5)
    noisy = {"before": 2.0, "after": 0.7, "global-mean": 0.0}
    scale = (lambda x: 1 / (1 + np.exp(-x))) if binary else (lambda x: 3 + x)
    scores = {name: scale(truth + s * rng.normal(size=len(task)) if s else 0 * truth) for name, s in noisy.items()}
    return {
        "scores": scores,
        "label": label,
        "task": task * 10 + 3,
        "support_size": (task % 30)[:],
        "item_cold": rng.random(len(task)) < 0.3,
        "task_cold": task % 2 == 0,
        "binary": binary,
        "resamples": 100,
        "seed": 0,
    }


def record(document, **keys):
    found = [r for r in document["records"] if all(r[k] == v for k, v in keys.items())]
    assert len(found) == 1
    return found[0]


def test_cold_slices_and_support_sizes_part_the_rows():
    document = evaluation_records(**columns())
    rows = {case["case"]: case["rows"] for case in document["cases"]}
    assert rows["all"] == 480
    assert sum(rows[case] for case in ("warm", "user_cold", "item_cold", "both_cold")) == 480
    assert sum(count for case, count in rows.items() if case.startswith("support_")) == 480
    assert rows["support_51+"] == 0
    assert not [r for r in document["records"] if r["case"] == "support_51+"]


@pytest.mark.parametrize(("binary", "name"), [(True, "gauc"), (True, "auc"), (False, "mae"), (False, "ndcg@5")])
def test_records_hold_the_metric_of_the_slice(binary, name):
    data = columns(binary)
    document = evaluation_records(**data)
    mask = data["task_cold"] & data["item_cold"]
    expected = metric(name, data["scores"]["after"][mask], data["label"][mask], data["task"][mask])
    found = record(document, case="both_cold", variant="after", metric=name)
    assert found["value"] == pytest.approx(expected, abs=1e-14)
    assert found["low"] < found["value"] < found["high"]
    assert set(found) == {"case", "variant", "metric", "value", "unit", "low", "high", "n"}


def test_differences_are_after_minus_each_other_variant():
    document = evaluation_records(**columns())
    for difference in document["differences"]:
        keys = {"case": difference["case"], "metric": difference["metric"]}
        after = record(document, variant="after", **keys)["value"]
        other = record(document, variant=difference["against"], **keys)["value"]
        if after is not None and other is not None:
            assert difference["value"] == pytest.approx(after - other, abs=1e-15)
    assert {d["against"] for d in document["differences"]} == {"before", "global-mean"}
    assert document["baselines"] == ["global-mean"]


def test_auc_sorts_by_logits_and_all_else_measures_probabilities():
    """Adapted logits that all saturate to 1 keep their order; the variant without logits is measured as before."""
    data = columns()
    expected = evaluation_records(**data)
    logits = np.random.default_rng(1).normal(size=480) + 300 + data["label"]
    data["scores"]["after"] = np.ones(480)
    document = evaluation_records(**data, ranking={"after": logits})
    found = record(document, case="all", variant="after", metric="auc")["value"]
    assert found == metric("auc", logits, data["label"], data["task"])
    assert found > 0.7
    for name in ("logloss", "ece", "rmse"):
        value = record(document, case="all", variant="after", metric=name)["value"]
        assert value == pytest.approx(metric(name, np.ones(480), data["label"], data["task"]), abs=1e-12)
    keys = {"case": "all", "variant": "before", "metric": "auc"}
    assert record(document, **keys) == record(expected, **keys)
    with pytest.raises(ValueError, match="'ranking of after': 479"):
        evaluation_records(**data, ranking={"after": logits[1:]})


def test_headline_judges_by_the_paired_interval():
    for binary in (True, False):
        document = evaluation_records(**columns(binary))
        verdicts = {row.variant: row.verdict for row in headline_rows(document)}
        assert verdicts == {"before": "better", "after": "", "global-mean": "better"}
        same = columns(binary)
        same["scores"]["before"] = same["scores"]["after"]
        assert headline_rows(evaluation_records(**same))[0].verdict == "not distinguishable"
        worse = columns(binary)
        worse["scores"]["before"], worse["scores"]["after"] = worse["scores"]["after"], worse["scores"]["before"]
        assert headline_rows(evaluation_records(**worse))[0].verdict == "worse"


def equal_variants(num_tasks, seed):
    """Two variants of one quality, whose errors are shared within a task."""
    rng = np.random.default_rng(seed)
    task = np.repeat(np.arange(num_tasks), 10)
    label = (rng.random(len(task)) < 0.5).astype(float)
    shift = 0.03 * rng.normal(size=(2, num_tasks))[:, task]
    scores = np.clip(0.4 + 0.2 * label + shift + 0.2 * rng.normal(size=shift.shape), 0, 1)
    return make_rows(scores[0], label, task), make_rows(scores[1], label, task)


def told_apart(num_tasks, seed):
    bootstrap = Bootstrap(num_tasks, resamples=200, seed=seed)
    for name, rows in zip(("after", "before"), equal_variants(num_tasks, seed), strict=True):
        bootstrap.add(name, "mae", rows)
    bootstrap.run()
    estimate = bootstrap.estimate("after", against="before")
    return verdict_of(estimate_fields(estimate), higher_is_better=False)


@pytest.mark.parametrize("num_tasks", [2, 5, 19])
def test_few_tasks_have_no_verdict(num_tasks):
    assert {told_apart(num_tasks, seed) for seed in range(20)} == {"too few tasks"}


def test_equal_variants_are_rarely_told_apart():
    """At the fewest tasks that have a verdict, 95 % intervals are a little narrow: some 8 % are told apart."""
    called = [told_apart(MIN_VERDICT_TASKS, seed) in ("better", "worse") for seed in range(400)]
    assert 0.02 < np.mean(called) < 0.11


def test_without_after_the_first_variant_is_the_reference():
    data = columns()
    del data["scores"]["after"]
    document = evaluation_records(**data)
    assert document["reference"] == "before"
    assert {d["variant"] for d in document["differences"]} == {"before"}


def test_undefined_values_are_null_in_strict_json(tmp_path):
    data = columns()
    data["label"][data["item_cold"] & data["task_cold"]] = 1.0
    data["task_cold"] = True
    data["label"][data["item_cold"]] = 1.0
    document = evaluation_records(**data)
    assert record(document, case="both_cold", variant="after", metric="auc")["value"] is None
    write_evaluation(tmp_path / "evaluation.json", document, {"split": "test"})
    text = (tmp_path / "evaluation.json").read_text()
    assert json.loads(text)["settings"] == {"split": "test"}
    assert "NaN" not in text
    assert [p.name for p in tmp_path.iterdir()] == ["evaluation.json"]


def test_ndcg_is_left_out_with_a_note_where_labels_are_no_grades():
    data = columns(binary=False)
    data["label"] = data["label"] - 3
    document = evaluation_records(**data)
    assert "nDCG is left out: labels span -2 to 2" in document["notes"][0]
    assert not [r for r in document["records"] if r["metric"].startswith("ndcg")]


def test_metrics_at_k_need_clicks_or_the_label_that_is_relevant():
    clicks = columns()
    clicks["label"][clicks["task"] == 13] = 0  # one task without a click
    document = evaluation_records(**clicks)
    expected = metric("precision@5", clicks["scores"]["after"], clicks["label"], clicks["task"])
    found = record(document, case="all", variant="after", metric="precision@5")
    without = 80 - found["n"]
    assert found["value"] == pytest.approx(expected, abs=1e-14)
    assert without >= 1
    assert document["notes"] == [
        f"{without} of 80 tasks have no relevant query row: precision@k, recall@k, hit rate, MAP, MRR and nDCG "
        "leave them out"
    ]
    ratings = columns(binary=False)
    assert "--relevant_label 4" in evaluation_records(**ratings)["notes"][0]
    document = evaluation_records(**ratings, relevant_label=5)
    expected = metric("map@10", *(ratings[k] for k in ("label", "label", "task")), relevant_label=5)
    assert expected == 1
    found = record(document, case="all", variant="after", metric="map@10")
    assert found["n"] == len(np.unique(ratings["task"][ratings["label"] == 5])) < 80
    assert f"{80 - found['n']} of 80 tasks" in document["notes"][0]


def test_print_headline_shows_every_variant():
    out = io.StringIO()
    sentence = "the pack left 12 tasks (30 rows) of split test out: fewer [rows] than min_task_rows"
    document = evaluation_records(**columns()) | {"left_out": [sentence]}
    print_headline(document, out)
    text = out.getvalue()
    assert sentence in text
    difference = next(row.difference for row in headline_rows(document) if row.variant == "global-mean")
    assert f"{difference['low']:+.4f} … {difference['high']:+.4f}" in text  # not cut, though there is no terminal
    assert all(word in text for word in ("before", "after", "global-mean", "better", "480 query rows of 80 tasks"))


def test_of_one_class_the_verdict_is_undefined():
    data = columns()
    data["label"][:] = 1.0
    document = evaluation_records(**data)
    assert {row.variant: row.verdict for row in headline_rows(document)} == {
        "before": "undefined",
        "after": "",
        "global-mean": "undefined",
    }
    out = io.StringIO()
    print_headline(document, out)
    assert "not distinguishable" not in out.getvalue()


@pytest.mark.parametrize("scale", [1, 100, 1e7])
def test_a_pipe_cuts_no_number_of_large_labels(scale):
    data = columns(binary=False)
    data["label"] = data["label"] * scale
    data["scores"] = {name: values * scale for name, values in data["scores"].items()}
    document = evaluation_records(**data)
    out = io.StringIO()
    print_headline(document, out)
    text = out.getvalue()
    for row in headline_rows(document):
        cells = [*cells_of(row.record, ""), *(cells_of(row.difference, "+") if row.difference else ()), row.verdict]
        (line,) = (line for line in text.splitlines() if f" {row.variant} " in line and "mae" not in line)
        assert all(cell in line for cell in cells), line


def test_mistakes_are_named():
    data = columns()
    data["label"] = data["label"][:-1]
    with pytest.raises(ValueError, match="different lengths"):
        evaluation_records(**data)
    empty = {k: v[:0] if isinstance(v, np.ndarray) else v for k, v in columns().items()}
    empty["scores"] = {"after": np.zeros(0)}
    with pytest.raises(ValueError, match="no query rows"):
        evaluation_records(**empty)
    with pytest.raises(ValueError, match="no scores"):
        evaluation_records(**{**columns(), "scores": {}})
