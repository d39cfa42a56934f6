"""The comparison of policies: its cases can be run, its table says what was found."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))  # scripts, no package

import stragglers
from common import Record

from gmeta.elastic.policies import POLICIES

METRICS = (
    "ideal_over_time",
    "achieved_over_attainable",
    "jct_s",
    "utilisation",
    "lost",
    "repeated",
    "weights_minus_undisturbed",
    "loss_minus_undisturbed",
)


@pytest.mark.parametrize("quick", [False, True])
def test_policies_are_compared_on_the_same_work(quick):
    cases = stragglers.cases(quick)
    assert len({case.name for case in cases}) == len(cases)
    shapes = {(s.workers, s.tasks_per_batch, s.seed, s.noise, s.ahead) for s in (case.scenario for case in cases)}
    assert len(shapes) == 1
    slots = {case.name: case.slot_s for case in cases if case.slot_s != stragglers.SLOT_S}
    assert slots == {"transient, 50 steps": 0.02} | ({} if quick else {"deterministic 4x": 0.025})
    assert all(case.policies and set(case.policies) <= set(POLICIES) for case in cases)


@pytest.mark.parametrize("quick", [False, True])
def test_every_target_is_of_a_case_that_nd_is_measured_in(quick):
    named = [case.name for case in stragglers.cases(quick) if "nd" in case.policies]
    assert all(any(name.startswith(start) for name in named) for start in stragglers.TARGETS)


def test_the_simulator_is_compared_where_it_can_be():
    cases = {case.name: case for case in stragglers.cases(quick=False)}
    found = {"jct_s": 20.0, "restart_s": 0.0}
    case = cases["deterministic 2x"]
    (record,) = stragglers.predicted(case, "static", found, 0.01)
    # 16 slots at half the speed and 10 ms a step; noise of 2 % on each of four
    assert record.value == pytest.approx(case.steps * (32 * stragglers.SLOT_S + 0.01) / 20.0, rel=0.02)
    assert stragglers.predicted(cases["persistent contention"], "nd", found, 0.01) == []


def test_the_table_says_how_a_target_was_met():
    values = {"achieved_over_ideal": 0.93, "agent_cpu_share": 0.004, "overhead_s": 0.012}
    records = [
        Record("deterministic 4x", "nd", metric, value, "")
        for metric, value in {**dict.fromkeys(METRICS, 0.0), **values}.items()
    ]
    text = stragglers.body(records)
    assert "| 0.93" in text
    assert "deterministic 4x: nd 0.93, target 0.90" in text
