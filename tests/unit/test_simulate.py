"""The simulator against jobs that can be computed by hand, and what policies achieve in it."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from gmeta.cli import run
from gmeta.elastic.actions import AdjustAccumulation, DropLate, KillRestart
from gmeta.elastic.monitor import snapshot_from_json
from gmeta.elastic.policies import POLICIES, load_policy, nd, static
from gmeta.elastic.scenario import Cut, Deterministic, Devices, Kill, Pause, Persistent, Scenario, parse_scenario
from gmeta.elastic.simulate import DELAY_S, read_trace, simulate

ROOT = Path(__file__).resolve().parents[2]
START = 2 * DELAY_S  # nobody may load before the first grant


def ready(name: str, **changes) -> Scenario:
    path = ROOT / "examples" / "scenarios" / f"{name}.yaml"
    return replace(parse_scenario(path.read_text(), name), **changes)


def test_a_policy_that_talks_nonsense_is_named(monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path) -> None:
    (tmp_path / "broken_policy.py").write_text("def broken(snapshot):\n    return [snapshot.missing]\n")
    monkeypatch.chdir(tmp_path)
    scenario = ROOT / "examples" / "scenarios" / "deterministic-2x.yaml"
    assert run(["simulate", "--scenario", str(scenario), "--policies", "[broken_policy:broken]"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "first: AttributeError: 'Snapshot' object has no attribute 'missing'" in said


def test_a_job_without_trouble_takes_its_steps() -> None:
    result = simulate(Scenario(workers=4, steps=50, slot_s=0.01, fixed_s=0.02, comm_s=0.03), static)
    assert result.jct_s == pytest.approx(50 * (0.02 + 0.16 + 0.03) + START)
    assert result.busy_s == pytest.approx(4 * 50 * 0.18)
    assert result.ideal_s == pytest.approx(50 * 0.21)
    assert result.waiting_s == pytest.approx(0.0, abs=1e-9)
    assert result.input_s == pytest.approx(4 * START)


@pytest.mark.parametrize("workers", [1, 3, 40])
def test_static_waits_for_the_slowest(workers: int) -> None:
    scenario = Scenario(
        workers=workers, steps=20, tasks_per_batch=100 * workers, slot_s=0.001, events=(Deterministic(0, 4.0),)
    )
    result = simulate(scenario, static)
    assert result.jct_s == pytest.approx(20 * 0.4 + START)
    best = 100 * workers / (workers - 1 + 0.25) * 0.001
    assert result.ideal_s == pytest.approx(20 * best, rel=0.01)
    assert result.waiting_s == pytest.approx(20 * (workers - 1) * 0.3, abs=1e-9)


def test_a_pause_and_a_cut_cost_what_they_last() -> None:
    plain = Scenario(workers=2, steps=100, tasks_per_batch=20, slot_s=0.01)
    paused = simulate(replace(plain, events=(Pause(1, at_s=3.05, for_s=2.0),)), static)
    assert paused.jct_s == pytest.approx(100 * 0.1 + 2.0 + START)
    cut = simulate(replace(plain, events=(Cut(at_s=2.0, for_s=5.0),)), static)
    assert 100 * 0.1 + 3.5 < cut.jct_s < 100 * 0.1 + 5.0, "steps granted before go on meanwhile"
    short = simulate(replace(plain, events=(Cut(at_s=2.0, for_s=0.15),)), static)
    assert short.jct_s == pytest.approx(100 * 0.1 + START), "one late report delays nobody"


def test_a_killed_worker_costs_the_steps_since_the_checkpoint() -> None:
    plain = Scenario(workers=2, steps=100, tasks_per_batch=20, slot_s=0.01, restart_s=7.0, checkpoint_steps=30)
    result = simulate(replace(plain, events=(Kill("rank 1", at_step=70),)), static)
    assert result.jct_s == pytest.approx((100 + 10) * 0.1 + 7.0 + 2 * START)
    assert (result.repeated_steps, result.restarts, len(result.seconds)) == (10, 1, 100)
    assert result.ideal_s == pytest.approx(100 * 0.1)
    away = simulate(replace(plain, events=(Kill("coordinator", at_step=70, away_s=3.0),)), static)
    assert 10.0 + 1.5 < away.jct_s < 10.0 + 3.2
    assert away.repeated_steps == 0


def test_a_restart_gives_a_fresh_machine() -> None:
    def once(snapshot):
        return [KillRestart(1)] if snapshot.step >= 20 and snapshot.restarts_left == 2 else []

    events = (Persistent(1, 3.0, until="restart"),)
    scenario = Scenario(workers=2, steps=100, tasks_per_batch=20, slot_s=0.01, restart_s=4.0, events=events)
    result = simulate(scenario, once)
    assert (result.restarts, result.decisions, result.repeated_steps) == (1, 1, 0)
    slow = sum(seconds > 0.2 for seconds in result.seconds)
    assert 20 < slow < 30
    assert result.jct_s == pytest.approx(slow * 0.3 + (100 - slow) * 0.1 + 4.0 + 2 * START)


def test_what_is_put_back_is_done_at_the_end() -> None:
    def drop(snapshot):
        return [AdjustAccumulation((5, 5)), DropLate(0.12)]

    scenario = Scenario(workers=2, steps=50, tasks_per_batch=20, slot_s=0.01, events=(Deterministic(1, 3.0),))
    result = simulate(scenario, drop)
    computed = result.busy_s / 0.01
    assert result.tail_tasks > 100
    assert len(result.seconds) == 50 + -(-result.tail_tasks // 20)
    # 20 slots a step, rank 1's thrice as dear: every task was computed once.
    assert 50 * 20 < computed < 50 * 20 * 2
    assert sorted({round(s, 6) for s in result.seconds[30:50]}) == [0.12]


def test_more_ranks_than_cohorts() -> None:
    result = simulate(ready("deterministic-2x", steps=200).scaled(100), nd)
    assert result.decisions >= 1
    assert result.seconds[-1] < 0.7 * result.seconds[0]


def test_two_runs_are_equal() -> None:
    assert simulate(ready("transient-10", steps=200), nd) == simulate(ready("transient-10", steps=200), nd)


@pytest.mark.parametrize(
    ("name", "policy", "least"),
    [
        ("deterministic-2x", "nd", 0.93),
        ("deterministic-4x", "nd", 0.92),
        ("persistent", "nd", 0.93),
        ("transient-50", "nd", 0.80),
        ("two-classes", "dd", 0.95),
    ],
)
def test_what_is_achieved(name: str, policy: str, least: float) -> None:
    result = simulate(ready(name), POLICIES[policy])
    assert result.achieved >= least
    assert result.problems == 0
    assert result.jct_s < 0.75 * simulate(ready(name), static).jct_s


@pytest.mark.parametrize("policy", ["nd", "dd", "lb_bsp", "backup"])
def test_no_policy_fails(policy: str) -> None:
    for scenario in ("transient-10", "two-classes", "kill"):
        assert simulate(ready(scenario, steps=300), POLICIES[policy]).problems == 0


def test_a_trace_can_be_replayed(tmp_path: Path) -> None:
    records: list = []
    scenario = ready("persistent", steps=300, devices=(Devices("cpu", 4),))
    result = simulate(scenario, nd, trace=records.append)
    assert next(r["kind"] for r in records if r["kind"] != "report") == "begin"
    steps = {(r["rank"], row[0]) for r in records if r["kind"] == "report" for row in r["steps"]}
    assert steps == {(rank, step) for rank in range(4) for step in range(300)}
    decided = [r for r in records if r["kind"] == "decide"]
    assert len(decided) == result.decisions
    again = nd(snapshot_from_json(json.loads(json.dumps(decided[0]["snapshot"]))))
    assert list(again[0].tasks_per_rank) == list(decided[0]["actions"][0]["slots"])
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    job, slowness = read_trace(path)
    assert (job.workers, job.steps, job.tasks_per_batch) == (4, 300, 64)
    replayed = simulate(job, nd, slowness=slowness)
    assert replayed.jct_s == pytest.approx(result.jct_s, rel=0.03)
    without = simulate(scenario, static).jct_s
    assert simulate(job, static, slowness=slowness).jct_s == pytest.approx(without, rel=0.03)


def test_own_policy_is_short_and_works(monkeypatch: pytest.MonkeyPatch) -> None:
    path = ROOT / "examples" / "own_policy.py"
    assert sum(bool(line.strip()) for line in path.read_text().splitlines()) <= 15
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(path.parent)
    policy = load_policy("own_policy:halve_the_slowest")
    result = simulate(ready("deterministic-4x", steps=400), policy)
    assert result.problems == 0
    assert result.achieved > 2 * simulate(ready("deterministic-4x", steps=400), static).achieved


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scenario = tmp_path / "s.yaml"
    scenario.write_text("workers: 2\nsteps: 30\nevents: [{kind: deterministic, rank: 0, factor: 2}]\n")
    words = ["simulate", "--scenario", str(scenario), "--workers", "4", "--policies", "[static, nd]"]
    assert run([*words, "--out", str(tmp_path / "t.jsonl")]) == 0
    printed = capsys.readouterr().out
    assert "4 workers, 30 steps" in printed
    assert "nd" in printed
    assert {path.name for path in tmp_path.glob("*.jsonl")} == {"t.nd.jsonl", "t.static.jsonl"}
    assert run(["simulate", "--trace_in", str(tmp_path / "t.nd.jsonl"), "--policies", "[static]"]) == 0
    for wrong, complaint in (
        ([], "give either a scenario or trace_in"),
        (["--trace_in", str(scenario)], "is no trace of a training job"),
        (["--scenario", str(tmp_path / "none.yaml")], "cannot be read"),
        (["--scenario", str(scenario), "--policies", "[ndd]"], "must be one of static, nd"),
        (["--scenario", str(scenario), "--out", str(tmp_path / "no" / "t")], "cannot be written"),
    ):
        assert run(["simulate", *wrong]) == 2
        assert complaint in capsys.readouterr().err


def test_contention_is_for_the_laboratory() -> None:
    scenario = parse_scenario("workers: 1\nsteps: 1\nevents: [{kind: contention, rank: 0}]", "s")
    with pytest.raises(ValueError, match="run this scenario in the laboratory"):
        simulate(scenario, static)
