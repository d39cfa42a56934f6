# ruff: noqa: E402
"""The benchmark of strategies on an emulated cluster: how links are shaped, what is told of the times."""

import importlib.util
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))  # scripts, no package

import netns

from gmeta.sharding.schedule import Links
from gmeta.sharding.strategy import STRATEGIES

spec = importlib.util.spec_from_file_location("cluster_run", BENCHMARKS / "cluster" / "run.py")
assert spec is not None
assert spec.loader is not None
cluster_run = importlib.util.module_from_spec(spec)
sys.modules["cluster_run"] = cluster_run
spec.loader.exec_module(cluster_run)

LINKS = Links(9e7, 5e8, 2e-3, 2e-3)


def test_a_groups_ranks_have_a_class_of_their_own():
    commands = netns.shape_groups("gmeta-1-0", 3, 2, "1gbit", "100mbit")
    classes = [(c[2], c[c.index("classid") + 1], c[c.index("rate") + 1]) for c in commands if "class" in c]
    rates = [("1:1", "1gbit"), ("1:2", "100mbit"), ("1:3", "10gbit")]
    assert classes == [(where, *rate) for where in ("gmeta-1-0-node3", "gmeta-1-0-switch") for rate in rates]
    peers = [(c[2], *c[-4:]) for c in commands if c[-1] == "1:1"]
    assert peers == [
        ("gmeta-1-0-node3", "dst", f"{netns.address(2)}/32", "flowid", "1:1"),
        ("gmeta-1-0-switch", "src", f"{netns.address(2)}/32", "flowid", "1:1"),
    ]
    assert sum(c[-1] == "1:3" for c in commands) == 2, "acknowledgements pass at once, both ways"


def test_rates_inside_and_between():
    """One real cluster: what goes to the own group is fast, what goes to another is held to its rate."""
    if reason := netns.unavailable():
        pytest.skip(reason)
    with netns.cluster(4, 1, None, None) as net:
        net.set_group_rates(2, "400mbit", "40mbit")
        between = netns.measured_bits_per_s(net, 1, 2, 6)
        inside = netns.measured_bits_per_s(net, 0, 1, 24)
    assert 20e6 < between < 42e6
    assert 2 * between < inside < 420e6


def test_rank_correlation():
    assert cluster_run.spearman([1, 2, 3], [10, 20, 90]) == pytest.approx(1)
    assert cluster_run.spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert cluster_run.spearman([1, 2, 3, 4], [1, 1, 2, 2]) == pytest.approx(
        statistics.correlation([0, 1, 2, 3], [0.5, 0.5, 2.5, 2.5])
    )


def test_records_hold_what_is_promised():
    """With times that are exactly the planner's, every ratio is 1 and the order is the planner's."""
    found = {("alone", 4): measured(1.0), ("fsdp2", 4): measured(9.0, 50)}
    for rank, name in enumerate(STRATEGIES):
        found[name, 4] = measured(cluster_run.planned(LINKS, name, 4, found).step_s, 60 - rank)
    records = cluster_run.train_records("here", LINKS, found)
    values = {(r.case, r.variant, r.metric): r.value for r in records}
    for name in STRATEGIES:
        assert values["here, acc4", name, "achieved_over_predicted"] == pytest.approx(1)
        assert values["here, acc4", name, "speedup_over_fsdp2"] == pytest.approx(9 / found[name, 4].seconds)
        assert values["here, acc4", name, "peak_bytes"] == found[name, 4].peak_bytes
    assert values["here, acc4", "planner", "spearman"] == pytest.approx(1)
    assert cluster_run.planned(LINKS, "ddp", 4, found) is None
    table = cluster_run.train_table("here", LINKS, found)
    assert "here, 4 micro-batches" in table
    assert table.count("1.00") >= len(STRATEGIES)


def measured(seconds: float, peak_bytes: int = 0) -> Any:
    return cluster_run.Measured(seconds, peak_bytes, peak_bytes // 2)


def test_peers_meet_what_holds_no_more_than_they() -> None:
    found = {("NNN", 4): measured(1.0, 40), ("IIG", 4): measured(2.0, 30), ("GGG", 4): measured(4.0, 12)}
    found |= {("fsdp2", 4): measured(8.0, 11), ("hsdp", 4): measured(3.0, 30), ("ddp", 4): measured(1.5, 50)}
    (table,) = cluster_run.equal_memory_tables("here", found)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[4:]]
    assert [row[:2] for row in rows] == [["fsdp2", "GGG (none holds so little)"], ["hsdp", "IIG"], ["ddp", "NNN"]]
    assert [row[-1] for row in rows] == ["2.00", "1.50", "1.50"]


def test_what_is_hidden_is_told_of_the_shorter_one() -> None:
    found = {("alone", 4): measured(1.0), ("GGG", 4): measured(4.0), ("NNN", 4): measured(1.5)}
    bare = {("GGG", 4): measured(4.0), ("NNN", 4): measured(0.5)}
    assert cluster_run.hidden_share("GGG", found, bare) == 1.0
    assert cluster_run.hidden_share("NNN", found, bare) == 0.0


def test_flat_rings_have_nothing_to_gain_from_a_shared_card():
    shared = Links(9e7, 5e8, 0.0, 0.0, shared_nic=True)
    flat, ho = (cluster_run.theory_s(shared, "all_gather", name, 16 << 20) for name in ("flat", "ho"))
    rails = cluster_run.theory_s(Links(9e7, 5e8), "all_gather", "ho", 16 << 20)
    assert flat / rails > 1.5
    assert flat / ho < 1.2
