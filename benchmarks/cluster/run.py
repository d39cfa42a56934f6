"""PaRO's strategies beside FSDP2, HSDP and DDP, and ring algorithms beside gloo's, on an emulated cluster.

    python benchmarks/cluster/run.py [--quick | --main] [--json FILE]

Four nodes of two ranks run in network namespaces, with fast links inside a node and slow ones between nodes. There are
three layouts: a link to other nodes for each rank (rails), one that the ranks of a node share, and rails with links
inside that are some 100 times as fast. Contenders take turns in the same processes; numbers are medians over rounds.
Computing is emulated by sleeping (rank.py). The planner is told what the model takes on all ranks at once without
communication. Some contenders also run with nothing to compute: what is left is communication, and
(computing + communication - both together) over the shorter of the two is how much of it was hidden. Tables at equal
memory come first; they go by the measured peak. `--main` is the first layout at four micro-batches alone, with all
contenders and rounds, in a quarter of an hour. This needs Linux, root, glibc and iproute2.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

from common import Record, add_json, parse, publish, table
from netns import Cluster, cluster, unavailable

from gmeta.sharding.schedule import CollectiveCost, Links, StepCost, Workload, step_cost
from gmeta.sharding.strategy import STRATEGIES, ElementBytes, NodeLayout

LAYOUT = NodeLayout(2, 4)
MODEL = {"layers": 4, "width": 192, "micro_batch_s": 0.24}
"""The model has 7 MB of fp32 weights. The ratio of computing to what full sharding sends is that of a 7 B model on 32
A100 with 100 Gb/s between machines (40.7 s of communication and some 6 s of computing at ten micro-batches)."""
PEERS = ("fsdp2", "fsdp2 late", "hsdp", "ddp")
BARE = ("NNN", "IIG", "III", "GGG", "GGG:ho", "GGG:ho:1024", "fsdp2", "hsdp", "ddp")
"""Contenders that also run with nothing to compute."""
SOME = ("NNN", "NII", "III", "IIG", "NIG", "GGG", *PEERS)


@dataclass(frozen=True)
class Layout:
    """How nodes are joined, and what is trained on them: contenders by number of micro-batches."""

    name: str
    inside: str
    between: str
    shared_nic: bool
    work: tuple[tuple[tuple[str, ...], tuple[int, ...]], ...]


EVERYONE = (*STRATEGIES, "GGG:backend", "GGG:ho", "GGG:ho:1024", *PEERS)
LAYOUTS = (
    Layout("a link a rank", "1gbit", "100mbit", False, ((EVERYONE, (4,)), (SOME, (1, 10)))),
    Layout("a link a group", "1gbit", "100mbit", True, ((SOME, (4,)),)),
    Layout("a slow link a rank", "10gbit", "20mbit", False, ((SOME, (1,)),)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="one layout, one accumulation, fewer rounds; no result files"
    )
    parser.add_argument("--main", action="store_true", help="the first layout at four micro-batches, not the rest")
    add_json(parser)
    args = parse(parser)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that ranks and namespaces go with this process
    if reason := unavailable():
        print(f"skipped: {reason}")
        return
    records: list[Record] = []
    bodies = []
    layouts = (replace(LAYOUTS[0], work=LAYOUTS[0].work[:1]),) if args.quick or args.main else LAYOUTS
    for layout in layouts:
        with laid_out(layout) as net:
            links = Links(**next(run_ranks(net, {"work": "links"})))
            print(f"{layout.name}: {links}", file=sys.stderr, flush=True)
            records += link_records(layout.name, links)
            found = trained(net, layout, args.quick)
            records += train_records(layout.name, links, found)
            bodies.append(train_table(layout.name, links, found))
            if layout.name == LAYOUTS[0].name:
                bare = trained(net, replace(layout, work=((BARE, (4,)),)), args.quick, micro_batch_s=0.0)
                records += overlap_records(layout.name, found, bare)
                bodies = [*equal_memory_tables(layout.name, found), *bodies, overlap_table(layout.name, found, bare)]
            if args.main:
                continue
            sizes = [4 << 20] if layout is LAYOUTS[-1] else [4 << 20, 16 << 20]
            timed = list(run_ranks(net, ring_order(sizes, args.quick)))
            records += ring_records(layout.name, links, timed)
            bodies.append(ring_table(layout.name, links, timed))
    rates = {layout.name: f"{layout.inside} inside, {layout.between} between" for layout in LAYOUTS}
    config = {"groups": str(LAYOUT), "rates": rates, **MODEL}
    publish("paro_cluster_main" if args.main else "paro_cluster", "\n\n".join(bodies), records, config, args)


@contextmanager
def laid_out(layout: Layout) -> Iterator[Cluster]:
    """Set up the emulated cluster, and take it down afterwards."""
    n = LAYOUT.world_size
    if layout.shared_nic:
        with cluster(LAYOUT.num_nodes, LAYOUT.node_size, layout.inside, None) as net:
            net.set_group_rates(1, layout.inside, layout.between)
            yield net
    else:
        with cluster(n, 1, None, None) as net:
            net.set_group_rates(LAYOUT.node_size, layout.inside, layout.between)
            yield net


_PORTS = iter(range(29600, 29700))


def run_ranks(net: Cluster, order: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what rank 0 prints, record by record. RuntimeError with the end of its complaint when a rank fails."""
    words = [
        sys.executable,
        str(Path(__file__).with_name("rank.py")),
        json.dumps({"group_size": LAYOUT.node_size, **order}),
    ]
    port = next(_PORTS)
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(net.world_size):
            with Path(folder, str(rank)).open("w") as said:
                processes.append(
                    subprocess.Popen(
                        [*net.enter(rank), *words],
                        env=os.environ | net.environment(rank, port) | {"OMP_NUM_THREADS": "1"},
                        stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                        stderr=said,
                        text=True,
                    )
                )
        try:
            stdout = processes[0].stdout
            assert stdout is not None
            with stdout:
                for line in stdout:
                    record = json.loads(line)
                    print(record, file=sys.stderr, flush=True)
                    yield record
            if any(process.wait(60) for process in processes):
                complaints = [Path(folder, str(rank)).read_text()[-2000:] for rank in range(net.world_size)]
                raise RuntimeError(f"{order['work']} failed:\n" + max(complaints, key=len))
        finally:
            for process in processes:
                process.kill()
                process.wait()


# Training


@dataclass(frozen=True)
class Measured:
    """A contender's step: median seconds, and bytes of a rank at most in it and between steps."""

    seconds: float
    peak_bytes: int
    kept_bytes: int


Found = dict[tuple[str, int], Measured]
"""What was measured by (contender, accumulation); "alone" is what computing takes."""


def trained(net: Cluster, layout: Layout, quick: bool, **options: float) -> Found:
    """Train with every contender of `layout`."""
    rounds = {"rounds": 2, "steps": 1} if quick else {"rounds": 3, "steps": 2}
    records: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for contenders, accumulation in layout.work:
        names = ["alone", *contenders]
        order = {"work": "train", "contenders": names, "accumulation": accumulation, **MODEL, **rounds, **options}
        for record in run_ranks(net, order):
            records.setdefault((record["contender"], record["accumulation"]), []).append(record)
    return {
        case: Measured(statistics.median(r["seconds"] for r in turns), turns[-1]["peak_bytes"], turns[-1]["kept_bytes"])
        for case, turns in records.items()
    }


def planned(links: Links, contender: str, accumulation: int, found: Found) -> StepCost | None:
    """Return what the planner says of a step, given the time of computing; None for torch's own engines."""
    strategy, collectives, _ = (*contender.split(":"), "", "")[:3]
    if strategy not in STRATEGIES:
        return None
    params = int(MODEL["layers"] * 12 * MODEL["width"] ** 2)
    micro_batch_s = found["alone", accumulation].seconds / accumulation
    work = Workload(params, params, accumulation, micro_batch_s, int(MODEL["layers"]), ElementBytes(4, 4, 8))
    return step_cost(strategy, LAYOUT, links, work, {"": "two_phase", "backend": "flat"}.get(collectives, collectives))


def train_records(layout: str, links: Links, found: Found) -> list[Record]:
    records = []
    for (contender, accumulation), measured in found.items():
        case, seconds = f"{layout}, acc{accumulation}", measured.seconds
        records.append(Record(case, contender, "step_s", seconds, "s"))
        faster = found["fsdp2", accumulation].seconds / seconds
        records.append(Record(case, contender, "speedup_over_fsdp2", faster, ""))
        records.append(Record(case, contender, "peak_bytes", measured.peak_bytes, "bytes"))
        records.append(Record(case, contender, "kept_bytes", measured.kept_bytes, "bytes"))
        plan = planned(links, contender, accumulation, found)
        if plan is not None:
            records.append(Record(case, contender, "predicted_step_s", plan.step_s, "s"))
            records.append(Record(case, contender, "achieved_over_predicted", plan.step_s / seconds, ""))
            records.append(Record(case, contender, "bound_s", plan.bound_s, "s"))
    for accumulation in sorted({accumulation for _, accumulation in found}):
        value = rank_correlation(links, found, accumulation)
        records.append(Record(f"{layout}, acc{accumulation}", "planner", "spearman", value, ""))
    return records


def rank_correlation(links: Links, found: Found, accumulation: int) -> float:
    """Return Spearman's correlation of predicted and measured times of the strategies."""
    names = [name for name, acc in found if acc == accumulation and name in STRATEGIES]
    plans = [planned(links, name, accumulation, found) for name in names]
    return spearman(
        [found[name, accumulation].seconds for name in names], [plan.step_s for plan in plans if plan is not None]
    )


def spearman(left: Sequence[float], right: Sequence[float]) -> float:
    """Return Pearson's correlation of the ranks. Equal values share their mean rank."""

    def ranks(values: Sequence[float]) -> list[float]:
        return [sum(v < x for v in values) + (sum(v == x for v in values) - 1) / 2 for x in values]

    return statistics.correlation(ranks(left), ranks(right))


def train_table(layout: str, links: Links, found: Found) -> str:
    lines = []
    for accumulation in sorted({accumulation for _, accumulation in found}):
        names = sorted(
            (name for name, acc in found if acc == accumulation), key=lambda n: found[n, accumulation].seconds
        )
        rows = []
        for name in names:
            measured, plan = found[name, accumulation], planned(links, name, accumulation, found)
            told = ("", "", "")
            if plan is not None:
                seconds = plan.step_s
                told = (f"{seconds:.2f}", f"{seconds / measured.seconds:.2f}", f"{plan.memory / 1e6:.1f}")
            memory = f"{measured.kept_bytes / 1e6:.1f}", f"{measured.peak_bytes / 1e6:.1f}"
            faster = found["fsdp2", accumulation].seconds / measured.seconds
            rows.append((name, f"{measured.seconds:.2f}", f"{faster:.2f}", *memory, *told))
        kinds = ("MB between steps", "MB at most", "planned s", "planned / measured", "planned MB at most")
        header = ("strategy", "s a step", "x FSDP2", *kinds)
        correlation = rank_correlation(links, found, accumulation)
        lines += [f"### {layout}, {accumulation} micro-batches", "", table(header, rows), ""]
        lines += [f"Spearman's rank correlation of planned and measured times: {correlation:.2f}", ""]
    return "\n".join(lines).strip()


def equal_memory_tables(layout: str, found: Found) -> Iterator[str]:
    """Yield for each number of micro-batches what is fastest of ours within each peer's measured memory."""
    for accumulation in sorted({accumulation for _, accumulation in found}):
        ours = {name: one for (name, acc), one in found.items() if acc == accumulation and name in STRATEGIES}
        rows = []
        for peer in ("fsdp2", "hsdp", "ddp"):
            theirs = found[peer, accumulation]
            fitting = [name for name in ours if ours[name].peak_bytes <= theirs.peak_bytes]
            best = min(fitting, key=lambda name: ours[name].seconds, default="")
            name = best or min(ours, key=lambda name: ours[name].peak_bytes)
            megabytes = (f"{one.peak_bytes / 1e6:.1f}" for one in (theirs, ours[name]))
            seconds = (f"{one.seconds:.2f}" for one in (theirs, ours[name]))
            told = name if best else f"{name} (none holds so little)"
            rows.append((peer, told, *megabytes, *seconds, f"{theirs.seconds / ours[name].seconds:.2f}"))
        header = ("peer", "ours in no more", "MB at most", "ours", "s a step", "ours", "gain")
        yield f"### At equal memory, {layout}, {accumulation} micro-batches\n\n{table(header, rows)}"


def hidden_share(name: str, found: Found, bare: Found) -> float:
    """Return how much of the shorter of computing and communication was hidden behind the longer one."""
    computing, communication = found["alone", 4].seconds, bare[name, 4].seconds
    return (computing + communication - found[name, 4].seconds) / min(computing, communication)


def overlap_records(layout: str, found: Found, bare: Found) -> list[Record]:
    case = f"{layout}, acc4, nothing to compute"
    return [
        record
        for name in BARE
        for record in (
            Record(case, name, "step_s", bare[name, 4].seconds, "s"),
            Record(case, name, "hidden", hidden_share(name, found, bare), ""),
        )
    ]


def overlap_table(layout: str, found: Found, bare: Found) -> str:
    computing = found["alone", 4].seconds
    rows = [
        (name, *(f"{x:.2f}" for x in (found[name, 4].seconds, bare[name, 4].seconds, hidden_share(name, found, bare))))
        for name in BARE
    ]
    header = ("strategy", "s a step", "s without computing", "hidden of the shorter one")
    return f"### What is hidden, {layout}, 4 micro-batches (computing alone {computing:.2f} s)\n\n{table(header, rows)}"


# Rings


def ring_order(sizes: Sequence[int], quick: bool) -> dict[str, Any]:
    return {"work": "rings", "bytes": sizes, "rounds": 2 if quick else 5}


def theory_s(links: Links, what: str, algorithm: str, nbytes: int) -> float:
    """Return the seconds by alpha and beta alone; the backend's collectives are taken for flat rings."""
    wires = CollectiveCost(LAYOUT, links, "flat" if algorithm == "backend" else algorithm)
    seconds = sum(busy for _, busy in wires.gather(8.0 * nbytes, "G", "N"))
    return 2 * seconds if what == "all_reduce" else seconds


def ring_records(layout: str, links: Links, timed: list[dict[str, Any]]) -> list[Record]:
    records = []
    seconds = {(r["what"], r["algorithm"], r["bytes"]): r["seconds"] for r in timed}
    for (what, algorithm, nbytes), found in seconds.items():
        case = f"{layout}, {what} {nbytes >> 20} MiB"
        records.append(Record(case, algorithm, "seconds", found, "s"))
        records.append(
            Record(case, algorithm, "theory_over_measured", theory_s(links, what, algorithm, nbytes) / found, "")
        )
        if algorithm == "ho":
            records.append(Record(case, "ho", "ho_over_flat_gain", seconds[what, "flat", nbytes] / found - 1, ""))
            records.append(Record(case, "ho", "ho_over_backend_gain", seconds[what, "backend", nbytes] / found - 1, ""))
    return records


def link_records(layout: str, links: Links) -> list[Record]:
    return [
        Record(layout, "links", "inter_mbit_s", links.inter_bits_s / 1e6, "Mbit/s"),
        Record(layout, "links", "intra_mbit_s", links.intra_bits_s / 1e6, "Mbit/s"),
        Record(layout, "links", "inter_latency_ms", links.inter_latency_s * 1e3, "ms"),
        Record(layout, "links", "intra_latency_ms", links.intra_latency_s * 1e3, "ms"),
        Record(layout, "links", "shared_nic", float(links.shared_nic), ""),
    ]


def ring_table(layout: str, links: Links, timed: list[dict[str, Any]]) -> str:
    rows = []
    flat = {(r["what"], r["bytes"]): r["seconds"] for r in timed if r["algorithm"] == "flat"}
    for r in timed:
        theory = theory_s(links, r["what"], r["algorithm"], r["bytes"])
        rows.append(
            (
                r["what"],
                f"{r['bytes'] >> 20} MiB",
                r["algorithm"],
                f"{1e3 * r['seconds']:.0f}",
                f"{flat[r['what'], r['bytes']] / r['seconds']:.2f}",
                f"{1e3 * theory:.0f}",
                f"{theory / r['seconds']:.2f}",
            )
        )
    header = ("collective", "size", "algorithm", "ms", "x flat", "theory, ms", "theory / measured")
    measured = (
        f"Measured links: {links.intra_bits_s / 1e6:.0f} Mbit/s inside, {links.inter_bits_s / 1e6:.0f} between, "
        f"{'one for a group' if links.shared_nic else 'one for each rank'}; {1e3 * links.intra_latency_s:.1f} and "
        f"{1e3 * links.inter_latency_s:.1f} ms a message."
    )
    return "\n".join([f"### Collectives, {layout}", "", table(header, rows), "", measured])


if __name__ == "__main__":
    main()
