# ruff: noqa: E402
"""The emulated cluster and the benchmarks that run ranks in it: command lines, tables, and one real cluster."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))  # scripts, no package

import netns
import network
import ranks
import scaling
from common import Record
from study.outer_reduce import central_traffic
from study.variants import parts

from gmeta.cli import command_parser
from gmeta.config.parse import parse_words
from gmeta.config.train import TrainConfig
from gmeta.data.pack import open_pack, verify_pack
from gmeta.parallel.traffic import ring_traffic
from gmeta.runs.log import METRICS_FILE


@pytest.fixture(scope="module")
def root():
    """Skips where this machine can hold no cluster."""
    if reason := netns.unavailable():
        pytest.skip(reason)


def namespaces(pid: int) -> set[str]:
    """Those of one process: others may run clusters at the same time."""
    return {name for name in netns._namespaces() if name.split("-")[1] == str(pid)}


def test_a_rate_is_held_on_both_ends_of_the_card_and_on_the_loopback():
    commands = netns.shape_node("gmeta-1-0", 3, "10gbit", "100mbit")
    assert [(c[2], c[6], c[8:11]) for c in commands] == [
        ("gmeta-1-0-node3", "lo", ["tbf", "rate", "10gbit"]),
        ("gmeta-1-0-node3", "eth0", ["tbf", "rate", "100mbit"]),
        ("gmeta-1-0-switch", "port3", ["tbf", "rate", "100mbit"]),
    ]
    burst = [int(c[c.index("burst") + 1]) for c in commands]
    assert burst[1] == 128 * 1024, "one offloaded packet passes whole"
    assert burst[0] == 5_000_000, "4 ms at 10 Gb/s"


def test_without_a_rate_nothing_is_held():
    commands = netns.shape_node("gmeta-1-0", 0, None, None)
    assert not any("tbf" in c for c in commands)


def test_rates_are_read_as_tc_reads_them():
    assert netns.bits_per_s("1gbit") == 1e9
    assert netns.bits_per_s("2.5mbit") == 2.5e6
    with pytest.raises(ValueError, match="rate is '1Gb/s': must be a number"):
        netns.bits_per_s("1Gb/s")


def test_ranks_are_numbered_node_by_node():
    net = netns.Cluster("gmeta-1-0", nodes=2, ranks_per_node=2)
    assert [net.enter(rank)[-1] for rank in range(4)] == ["gmeta-1-0-node0"] * 2 + ["gmeta-1-0-node1"] * 2
    environment = net.environment(3, port=1234)
    assert (environment["RANK"], environment["LOCAL_RANK"], environment["WORLD_SIZE"]) == ("3", "1", "4")
    assert environment["MASTER_ADDR"] == netns.address(0)
    assert len({netns.address(node) for node in range(600)}) == 600


def test_nothing_but_commands_on_namespaces_of_ours():
    """Nothing of the host's own network is touched."""
    for words in [*netns.build_switch("gmeta-1-0"), *netns.build_node("gmeta-1-0", 0)]:
        assert words[:3] == ["ip", "netns", "add"] or words[:2] == ["ip", "-n"], words
        assert words[2 if words[1] == "-n" else 3].startswith("gmeta-1-0-"), words


def test_a_cluster_carries_its_ranks_bytes_and_leaves_nothing(root):
    with netns.cluster(2, 1, inside_rate=None, between_rate="100mbit") as net:
        assert len(namespaces(os.getpid())) == 3
        speed = netns.measured_bits_per_s(net, 0, 1, mebibytes=3, skip_bytes=2**20)
        assert net.sent_bytes()["between"] > 3 * 2**20
        assert net.sent_bytes()["inside"] == 0
        words = [*net.enter(0), "sh", "-c", "echo inside; exec sleep 60"]
        stray = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert stray.stdout.readline() == "inside\n"  # or there is nothing in the namespace to end yet
    stray.communicate(timeout=30)
    assert stray.returncode == -signal.SIGKILL, "what runs in it ends with it"
    assert namespaces(os.getpid()) == set()
    assert speed < 1.1e8, "a bound that noise cannot break: more than the rate cannot pass"


def test_a_cluster_that_fails_leaves_nothing(root):
    with pytest.raises(RuntimeError, match=r"`tc -n .*` failed"), netns.cluster(2, 1, None, "0mbit"):
        pass
    with pytest.raises(KeyboardInterrupt), netns.cluster(1, 1, None, None):
        raise KeyboardInterrupt
    assert namespaces(os.getpid()) == set()


def test_a_crashed_runs_cluster_is_removed_at_the_next_start(root):
    program = f"""
import os, sys
sys.path.insert(0, {str(BENCHMARKS)!r})
import netns
with netns.cluster(1, 1, None, None):
    print(os.getpid(), flush=True)
    os.kill(os.getpid(), 9)
"""
    crashed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    pid = int(crashed.stdout)
    assert len(namespaces(pid)) == 2, crashed
    netns.remove_leftovers()
    assert namespaces(pid) == set()


def test_without_root_the_benchmark_is_skipped_with_a_reason(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(sys, "argv", ["network.py", "--quick", "--json", str(tmp_path / "records.json")])
    assert network.main() == 0
    assert capsys.readouterr().out == "skipped: network namespaces need root\n"
    assert json.loads((tmp_path / "records.json").read_text()) == []


def test_every_variant_differs_from_the_baseline():
    for variants in (network.VARIANTS, network.TWO_STAGES):
        for name, variant in variants.items():
            differs = parts(*variant.switches) != parts() or bool(variant.settings)
            assert differs != (name in (network.BASELINE, network.AGAIN))
            parse_words(command_parser("train"), TrainConfig, ["--pack", "p", "--run_dir", "r", *variant.words])
        assert len({str(variant) for variant in variants.values()}) == len(variants) - 1


def test_a_switch_that_the_study_lacks_is_named():
    with pytest.raises(ValueError, match=r"no switch 'comm.teleport': it has separate, copies"):
        parts("separate", "comm.teleport")


def test_what_rank_0_sends_in_a_central_sum():
    """Two collectives: everyone's bytes into rank 0, the sum out of it to everyone."""
    assert central_traffic(100, 0, 4) == {1: 100, 2: 100, 3: 100}
    assert central_traffic(100, 2, 4) == {0: 100}
    ring = sum(sum(ring_traffic(100, rank, 4).values()) for rank in range(4))
    assert sum(sum(central_traffic(100, rank, 4).values()) for rank in range(4)) == ring


def _samples() -> dict[tuple[str, str], network.Sample]:
    found = defaultdict(network.Sample)
    for rate, slow in (("unshaped", 1), ("100 Mb/s", 3)):
        found[rate, "baseline"] = network.Sample([10 * slow] * 3, [0.5] * 3, {"between": [2000.0], "inside": [0.0]})
        found[rate, "two fetches"] = network.Sample([15 * slow] * 3, [0.75] * 3, {"between": [4000.0], "inside": [0.0]})
        found[rate, "fp16 rows"] = network.Sample(failure="gmeta train: error: no card")
    return found


def test_the_table_compares_with_the_baseline_and_names_what_failed():
    layout = network.Layout(
        "2 ranks", 2, 1, {"baseline": {}, "two fetches": {}, "fp16 rows": {}}, ("unshaped", "100 Mb/s"), 1
    )
    check = Record("2 ranks, 100 Mb/s", "between nodes", "raw_tcp", 95.6, "Mb/s")
    text = network.show(layout, _samples(), [check])
    assert re.search(r"\| two fetches +\| 4 +\| not logged", text)
    assert "45 ms, 1.50 ×, 75%" in text
    assert "raw TCP between nodes, 2 ranks, 100 Mb/s: 96 Mb/s" in text
    assert text.count("fp16 rows: gmeta train: error: no card") == 1
    records = network.records_of(layout, _samples())
    ratios = {(r.case, r.variant): r.value for r in records if r.metric == "over_baseline"}
    assert ratios["2 ranks, 100 Mb/s", "two fetches"] == 1.5
    assert ratios["2 ranks, unshaped", "baseline"] == 1
    assert not any(r.variant == "fp16 rows" for r in records)


def test_what_a_step_says_of_its_traffic_is_added_up():
    measured = {"ids": {"remote_bytes": 800, "calls": 1}, "rows": {"remote_bytes": 3200, "calls": 2}}
    step = {"seconds": 0.02, "exchange_share": 0.5}
    sample = network.Sample()
    network._book(sample, {"between": 9000}, 2, [step | {"comm": {"measured": measured}}, step])
    assert sample.counted == [(4000, 3)]
    assert (sample.step_ms, sample.wire_bytes) == ([20, 20], {"between": [4500]})
    assert network.row({("unshaped", "baseline"): sample}, ["unshaped"], "baseline", ["between"])[:3] == ["4", "4", "3"]


def test_a_pack_for_benchmarks_is_a_pack(tmp_path):
    load = ranks.Workload(tasks=50, support=3, query=2, features=8, num_ids=30, dim=4, hidden=(8,))
    ranks.write_pack(tmp_path / "pack", load)
    verify_pack(tmp_path / "pack")
    split = open_pack(tmp_path / "pack").split("train")
    assert (split.num_tasks, split.num_rows) == (50, 250)
    columns = split.columns(("f0", "f1", "f7"))
    by_task = columns.ids["f1"].reshape(50, 5)
    assert (by_task == by_task[:, :1]).all(), "a quarter of the features describe the task"
    assert columns.ids["f7"].min() >= 1
    assert columns.ids["f7"].max() < 30


def test_steps_are_read_after_the_warm_up(tmp_path):
    lines = [{"kind": "train", "step": n, "time_s": t} for n, t in ((1, 5.0), (2, 6.0), (3, 8.0))]
    lines.insert(1, {"kind": "valid", "step": 1})
    (tmp_path / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [step["seconds"] for step in ranks.read_steps(tmp_path, 1)] == [1.0, 2.0]


@pytest.mark.slow
def test_ranks_train_again_and_again_and_start_anew_after_a_failure(tmp_path):
    load = ranks.Workload(tasks=50, support=3, query=2, features=4, num_ids=30, dim=4, hidden=(8,))
    ranks.write_pack(tmp_path / "pack", load)
    argv = ["--pack", str(tmp_path / "pack"), "--loader.tasks_per_batch", "10", *load.options]
    argv += ["--schedule.max_steps", "2"]
    with ranks.Ranks([[]]) as one:
        environment = [scaling.environment(0, 1, 1)]
        for name in ("a", "b"):
            assert one.train([*argv, "--run_dir", str(tmp_path / name)], environment) == ""
            assert len(ranks.read_steps(tmp_path / name, 0)) == 2
        for switches in ((), ("separate",)):
            wrong = [*argv, "--run_dir", "c", "--loader.prefetch", "-1"]
            assert "loader.prefetch" in one.train(wrong, environment, switches=switches)
        assert "no switch" in one.train([*argv, "--run_dir", "c"], environment, switches=("teleport",))
        every = ("separate", "copies", "central", "no_overlap", "nothing_ahead", "random_reads", "no_size_buckets")
        assert one.train([*argv, "--run_dir", str(tmp_path / "e")], environment, switches=every) == ""
        assert one.train([*argv, "--run_dir", str(tmp_path / "d")], environment) == ""


def test_efficiency_is_per_core():
    assert scaling.efficiency(180, 100, processes=2, cores=2) == 0.9
    assert scaling.efficiency(180, 100, processes=4, cores=2) == 0.9
    assert scaling.efficiency(300, 100, processes=4, cores=64) == 0.75
    assert [scaling.core_of(rank, [5, 7]) for rank in range(4)] == [5, 7, 5, 7]


def test_weak_work_grows_and_strong_work_does_not():
    assert [scaling.tasks_per_batch("weak", n) / n for n in (1, 2, 4)] == [scaling.TASKS["weak"]] * 3
    assert {scaling.tasks_per_batch("strong", n) for n in (1, 2, 4)} == {scaling.TASKS["strong"]}


def test_the_scaling_table_says_who_shares_a_core():
    samples = {
        (mode, n): scaling.Sample([100.0 * min(n, 2)], [0.1 * n], [0.0]) for mode in scaling.TASKS for n in (1, 2, 4)
    }
    text = scaling.show(scaling.records_of(samples, cores=2))
    four = next(line for line in text.splitlines() if line.startswith("| strong") and " 4 " in line)
    assert "2, shared by 4" in four
    assert "2.00 ×" in four
    assert "100%" in four
    assert "40%" in four


def test_a_free_port_can_be_had():
    with socket.create_server(("127.0.0.1", scaling.free_port())):
        pass
