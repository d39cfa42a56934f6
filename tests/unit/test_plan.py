"""The planner: what can be computed by hand, the paper's own numbers, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest

from gmeta.cli import run
from gmeta.config.cluster import PlanConfig
from gmeta.sharding.links import suspicion
from gmeta.sharding.planner import build_advice, reason
from gmeta.sharding.schedule import (
    CollectiveCost,
    Links,
    Workload,
    _Clock,
    _pass,
    advise,
    choose,
    equally_fast,
    ring_s,
    step_cost,
)
from gmeta.sharding.strategy import STRATEGIES, ElementBytes, NodeLayout

PAPER = Links(inter_bits_s=80e9, intra_bits_s=2000e9)
SEVEN_B = Workload(7_000_000_000, 7_000_000_000, accumulation=10, units=32)


def communication_s(strategy: str) -> float:
    found = step_cost(strategy, NodeLayout(8, 4), PAPER, SEVEN_B, "flat")
    return found.inter_s + found.intra_s


@pytest.mark.parametrize(
    ("strategy", "seconds"),
    [("NII", 0.80), ("III", 1.73), ("IIG", 1.73), ("NIG", 1.98), ("IGG", 14.7), ("NGG", 14.9), ("GGG", 40.7)],
)
def test_the_papers_communication(strategy: str, seconds: float) -> None:
    """7 B parameters on 4 groups of 8, ten micro-batches: the notes' evaluation of its formulas."""
    assert communication_s(strategy) == pytest.approx(seconds, rel=0.01)


def test_collectives_by_hand() -> None:
    layout, bits = NodeLayout(2, 3), 6e6
    links = Links(1e6, 1e8, inter_latency_s=0.01, intra_latency_s=0.001)
    row, column = 0.001 + 3e6 / 1e8, 2 * (0.01 + 1e6 / 1e6)
    assert ring_s(bits, 6, 1e6, 0.01) == pytest.approx(5 * (0.01 + 1.0))
    assert CollectiveCost(layout, links).gather(bits, "I", "N") == (("intra", pytest.approx(row)),)
    assert CollectiveCost(layout, links).gather(bits, "G", "I") == (("inter", pytest.approx(column)),)
    assert sum(s for _, s in CollectiveCost(layout, links, "flat").gather(bits, "G", "N")) == pytest.approx(5 * 1.01)
    assert sum(s for _, s in CollectiveCost(layout, links).gather(bits, "G", "N")) == pytest.approx(row + column)
    spread = 0.001 + 1e6 / 1e8
    assert sum(s for _, s in CollectiveCost(layout, links, "ho").gather(bits, "G", "N")) == pytest.approx(
        column + spread
    )
    shared = Links(1e6, 1e8, 0.01, 0.001, shared_nic=True)
    assert sum(s for _, s in CollectiveCost(layout, shared).gather(bits, "G", "I")) == pytest.approx(2 * (0.01 + 2.0))


def test_embedding_rows_share_the_links() -> None:
    layout, links = NodeLayout(2, 4), Links(1e8, 1e9, 0.01, 0.001)
    (inter, row), (intra, column) = CollectiveCost(layout, links).alltoall(8e6)
    assert (inter, intra) == ("inter", "intra")
    assert (row, column) == (pytest.approx(6 * (0.01 + 1e6 / 1e8)), pytest.approx(0.001 + 1e6 / 1e9))
    shared = Links(1e8, 1e9, 0.01, 0.001, shared_nic=True)
    assert CollectiveCost(layout, shared).alltoall(8e6)[0][1] == pytest.approx(6 * (0.01 + 2 * 1e6 / 1e8))
    assert CollectiveCost(NodeLayout(1), links).alltoall(8e6) == ()
    work = Workload(1_000_000, 1_000_000, 2, 0.1, 4)
    with_rows = replace(work, alltoall_bytes=1e6)
    for strategy in STRATEGIES:
        without, found = step_cost(strategy, layout, links, work), step_cost(strategy, layout, links, with_rows)
        assert found.inter_s == pytest.approx(without.inter_s + 4 * row)
        assert without.step_s + 1e-9 < found.step_s <= found.compute_s + found.inter_s + found.intra_s + 1e-9
        assert found.bound_s <= found.step_s * (1 + 1e-9)


def test_a_step_is_never_faster_than_its_bound_and_slower_with_less_bandwidth() -> None:
    layout = NodeLayout(4, 4)
    for accumulation in (1, 4):
        work = Workload(10_000_000, 5_000_000, accumulation, micro_batch_s=0.02, units=10)
        for strategy in STRATEGIES:
            fast, slow = (step_cost(strategy, layout, Links(bits_s, 100e9, 1e-5, 1e-6), work) for bits_s in (10e9, 1e9))
            assert fast.bound_s <= fast.step_s * (1 + 1e-9)
            assert fast.step_s <= slow.step_s * (1 + 1e-9)
            assert fast.step_s <= fast.compute_s + fast.inter_s + fast.intra_s + 1e-9


def test_computing_hides_communication() -> None:
    """With much to compute, all but the first unit's gathering and the last one's gradients is hidden."""
    work = Workload(1_000_000, 1_000_000, 1, micro_batch_s=30.0, units=10)
    found = step_cost("GGG", NodeLayout(2, 2), Links(1e9, 1e10), work)
    assert 30.0 < found.step_s < 30.0 + (found.inter_s + found.intra_s) / 5


def test_one_rank_only_computes() -> None:
    for strategy in STRATEGIES:
        found = step_cost(strategy, NodeLayout(1, 1), PAPER, Workload(1000, 1000, 3, micro_batch_s=2.0, units=4))
        assert (found.step_s, found.inter_s, found.intra_s) == (pytest.approx(6.0), 0.0, 0.0)


def test_the_plan_is_sorted_and_fits() -> None:
    layout = NodeLayout(8, 4)
    found = advise(layout, PAPER, SEVEN_B, memory_cap=30e9)
    assert all(c.memory <= 30e9 for c in found)
    assert [c.step_s for c in found] == pytest.approx(sorted(c.step_s for c in found))
    assert found[0].strategy in ("NII", "NIG")
    assert choose(found).memory <= found[0].memory


def test_what_replicates_most_is_taken_where_memory_is_not_short() -> None:
    """A tower of 0.8 GB whose computing hides what any strategy sends."""
    tower = Workload(50_000_000, 50_000_000, 1, micro_batch_s=10.0, units=8)
    found = advise(NodeLayout(8, 4), PAPER, tower)
    assert {"NNN", "GGG"} <= {c.strategy for c in equally_fast(found)}
    assert choose(found).strategy == "NNN"
    short = advise(NodeLayout(8, 4), PAPER, tower, memory_cap=0.5e9)
    assert len(equally_fast(short)) > 1
    assert choose(short).memory == min(c.memory for c in equally_fast(short))


def test_a_plan_that_fits_nowhere() -> None:
    """GGG keeps 3.5 GB; three units of 32 are gathered, 1.31 GB, and two are staged, 0.88 GB."""
    with pytest.raises(ValueError, match=r"GGG needs least, 5.69 GB, 2.69 GB too much.* 138 ranks would do"):
        advise(NodeLayout(8, 4), PAPER, SEVEN_B, memory_cap=3e9)
    assert (
        step_cost("GGG", NodeLayout(138), PAPER, SEVEN_B).memory
        <= 3e9
        < step_cost("GGG", NodeLayout(137), PAPER, SEVEN_B).memory
    )
    with pytest.raises(ValueError, match=r"3.69 GB too much.* more units, each of which is gathered alone, would do"):
        advise(NodeLayout(8, 4), PAPER, SEVEN_B, memory_cap=2e9)


def test_what_comes_and_goes_in_a_pass_is_counted() -> None:
    work = Workload(1000, 600, units=10, sizes=ElementBytes(2, 4, 12))
    found = {name: step_cost(name, NodeLayout(2, 2), PAPER, work).passing for name in ("NNI", "NGG", "INI", "GGG")}
    assert found == {"NNI": 0, "NGG": 4 * 120, "INI": 2 * 300, "GGG": 2 * 300 + 4 * 120}
    alone = replace(work, units=1)
    assert step_cost("GGG", NodeLayout(2, 2), PAPER, alone).passing == 2 * 1000 + 4 * 600


def test_slow_links_hold_backward_back() -> None:
    """Ten units of .1 s, whose reductions take 1 s: the last one waits until the eighth reduction has ended, at 8.1."""
    for held_back, seconds in ((False, 1.0), (True, 8.2)):
        ended = _pass(_Clock(), 0.0, (), (("inter", 1.0),), [0.0] * 10, 0.1, held_back)
        assert ended == pytest.approx(seconds)


def test_frozen_parameters_are_cheaper() -> None:
    whole = step_cost("NIG", NodeLayout(8, 4), PAPER, SEVEN_B)
    part = step_cost("NIG", NodeLayout(8, 4), PAPER, Workload(7_000_000_000, 437_500_000, 10, units=32))
    assert part.step_s < whole.step_s / 10
    assert part.memory < whole.memory


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = tmp_path / "network.json"
    network.write_text(json.dumps(asdict(Links(1e9, 1e10, 1e-4, 1e-5, True))))
    words = ["plan", "--params", "7e9", "--nodes", "4", "--memory_gb", "40", "--accumulation", "4"]
    assert run([*words, "--network", str(network)]) == 0
    out = capsys.readouterr().out
    assert all(strategy in out for strategy in STRATEGIES)
    assert "take " in out
    assert "what does not fit into 40 GB: NNN" in " ".join(out.split())


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--params", "0"], "params is 0.0: must be at least 1"),
        (["--params", "7e9", "--memory_gb", "1"], "no strategy fits into 1 GB a rank"),
        (["--params", "7e9", "--network", "nowhere.json"], "nowhere.json cannot be read"),
        (["--params", "7e9", "--trainable_share", "2"], "must be in [0, 1]"),
        (["--params", "10", "--units", "11"], "units is 11: must be at most params, which is 10"),
    ],
)
def test_wrong_plans(words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", *words]) == 2
    assert complaint in capsys.readouterr().err


FLOATS = [item.name for item in fields(PlanConfig) if "float" in str(item.type)]


@pytest.mark.parametrize("name", FLOATS)
def test_numbers_are_finite(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("nan", ".nan", "inf", ".inf"):
        words = {"params": "7e9", name: text}
        assert run(["plan", *(word for key, value in words.items() for word in (f"--{key}", value))]) == 2
        assert "must be a finite number" in capsys.readouterr().err


def test_links_that_look_wrong() -> None:
    assert suspicion(Links(inter_bits_s=1e9, intra_bits_s=1e10)) is None
    assert suspicion(Links(inter_bits_s=1e9, intra_bits_s=1e9)) is None
    found = suspicion(Links(inter_bits_s=1e9, intra_bits_s=5e8))
    assert found is not None
    assert "inside nodes are slower" in found
    assert "node_size" in found


def test_files_that_hold_no_network(tmp_path: Path) -> None:
    for text in ("{}", "[1]", "not json"):
        (tmp_path / "n.json").write_text(text)
        with pytest.raises(ValueError, match="holds no links"):
            build_advice(PlanConfig(params=1e9, network=str(tmp_path / "n.json")))


def test_why() -> None:
    config = PlanConfig(params=7e9, nodes=4, accumulation=10)
    found = build_advice(config)
    told = reason(config, found)
    assert told.startswith(f"take {choose(found).strategy}: ")
    assert "no limit was given (--memory_gb)" in told
    assert SEVEN_B.sizes == ElementBytes(2, 2, 12)
