# ruff: noqa: E402
"""The benchmarks of the step: variants compute the same, what is counted is what is done, memory is told apart."""

import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))  # scripts, no package

import counting
import engine
import last_layer
import memory
import training_step

TINY = training_step.Case(4, 3, 2, 4, 4, (8, 8))
PEAK = {"float32": 1e9, "bytes": 1e9}


def test_the_limit_counts_products() -> None:
    equal = training_step.Case(1, 10, 10, 1, 10**6, (10**6,))
    assert equal.limit("second") == pytest.approx(1.5, rel=1e-3)
    assert equal.limit("first") == pytest.approx(5 / 6, rel=1e-3)
    assert training_step.Case(1, 40, 10, 8, 32, (64, 64)).limit("second") > 1.8


def test_every_variant_computes_the_same_and_is_measured() -> None:
    records = engine.measure(TINY, 1, training_step.CPU, PEAK)
    found = {(record.variant, record.metric): record.value for record in records}
    assert all(value > 0 for value in found.values())
    assert found["plain", "ratio_to_plain"] == 1
    assert found["factored-second", "limit_of_ratio"] == TINY.limit("second")
    for name in engine.COUNTED:
        phases = sum(found[name, f"{phase}_ms"] for phase in ("index", "fetch", "forward", "backward", "updates"))
        assert phases > 0
    for forms in (engine.TIMES, engine.PHASES, engine.WORK):
        assert "factored-second" in engine.render(records, forms)


def test_a_variant_that_computes_something_else_is_not_timed() -> None:
    batches = training_step.make_batches(TINY)
    steps = engine.variants(TINY, batches, training_step.CPU)
    engine.check_agreement(steps)
    settings = {"order": "first"}
    for changes in ({"adapt": ["dense"], "order": "second"}, {"adapt": ["embeddings", "dense"]}):
        other = training_step.Gmeta(TINY, batches, settings | changes)
        with pytest.raises(AssertionError, match="other-second: loss or a gradient is off"):
            engine.check_agreement(steps | {"other-second": other})


@pytest.mark.slow
def test_a_last_layer_in_closed_form_is_measured() -> None:
    records = [*last_layer.training(TINY, 1), *last_layer.one_task(TINY, 1)]
    found = {(record.variant, record.metric): record.value for record in records}
    assert all(value > 0 for value in found.values())
    assert found["neural-linear-plain", "ratio_to_plain"] == 1
    assert {"last-layer-second", "learner", "tables", "public"} <= {variant for variant, _ in found}
    assert "public" in engine.render(records, last_layer.ONE_TASK)


def test_products_and_bytes_are_counted() -> None:
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    table, rows = torch.randn(1000, 2), torch.tensor([1, 2, 3])

    def step() -> None:
        a @ b
        table.index_select(0, rows)

    work = counting.count(step, training_step.CPU)
    assert work.operations == 2 * 3 * 4 * 5
    assert work.bytes == 4 * (12 + 20 + 15) + 2 * 4 * 6
    peak = counting.peaks(training_step.CPU, 64, 2, ["float32"])
    assert set(peak) == {"float32", "bytes"}
    assert min(peak.values()) > 0


def test_recomputing_keeps_less_and_computes_the_same() -> None:
    case = training_step.Case(16, 6, 4, 4, 8, (32, 16))
    unit, floor = memory.units(case)
    assert unit == 16 * 6 * (32 + 32 + 16) * 4
    assert floor == pytest.approx(1 + 49 / 80)
    kept = {}
    for steps in (1, 2, 3):
        whole = memory.take_step(case, "layer norm, dropout", steps, recompute=False)
        again = memory.take_step(case, "layer norm, dropout", steps, recompute=True)
        assert again["loss"] == pytest.approx(whole["loss"], rel=1e-5)
        assert again["norm"] == pytest.approx(whole["norm"], rel=1e-4)
        kept[steps] = (whole["kept"] / unit, again["kept"] / unit)
        assert min(whole["peak"], again["peak"]) > unit
    slopes = [(kept[3][i] - kept[2][i], kept[2][i] - kept[1][i]) for i in (0, 1)]
    assert slopes[1][0] < 0.7 * slopes[0][0]
    assert all(late < 1.2 * early for late, early in slopes)
