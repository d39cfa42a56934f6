"""What each part of the exchange buys on a slow network: step times of real training, links held to a rate.

    sudo python benchmarks/network.py [--quick] [--json FILE]

Ranks are processes in network namespaces (netns.py) that run `gmeta train` on a synthetic pack, one short run after
another: every variant in turn, at every rate, and again. The baseline is gmeta as it is. A variant replaces parts of it
by naive ones (`study.variants`), or changes a setting. The baseline runs twice in a turn, and what its two rows differ
by is noise. Every rate is checked by a raw TCP transfer. The benchmark needs root and iproute2; elsewhere it says so
and ends with 0.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from common import Record, arguments, median, publish, table
from netns import Cluster, cluster, measured_bits_per_s, unavailable
from ranks import Ranks, Workload, read_steps, write_pack

LOAD = Workload(tasks=4096, features=10, num_ids=8000, dim=64, hidden=(64, 32))
TASKS_PER_RANK = 16


@dataclass(frozen=True)
class Variant:
    """What differs from the baseline: parts of the study in place of the product's, and settings of `gmeta train`."""

    switches: tuple[str, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def words(self) -> list[str]:
        """Return the settings as command-line words."""
        return [word for key, value in self.settings.items() for word in (f"--{key}", value)]


BASELINE, AGAIN = "baseline", "baseline again"
VARIANTS = {
    BASELINE: Variant(),
    "two fetches": Variant(("separate",)),
    "not deduplicated": Variant(("copies",)),
    "gather to rank 0": Variant(("central",)),
    "no overlap": Variant(("no_overlap",)),
    "ids not ahead": Variant(("ids_in_step",)),
    "nothing ahead": Variant(("nothing_ahead",)),
    "bf16 rows": Variant(settings={"comm.wire": "bf16"}),
    "fp16 rows": Variant(settings={"comm.wire": "fp16"}),
    "all five off": Variant(("separate", "copies", "central", "no_overlap", "nothing_ahead")),
    AGAIN: Variant(),  # ratios nearer to 1 than this one's say nothing
}
TWO_STAGES = {
    BASELINE: Variant(),
    "two stages": Variant(settings={"comm.node_size": "2"}),
    "two stages, bf16 rows": Variant(settings={"comm.node_size": "2", "comm.wire": "bf16"}),
    AGAIN: Variant(),
}
RATES = {"unshaped": None, "1 Gb/s": "1gbit", "100 Mb/s": "100mbit"}
PROBE_MIB = {"unshaped": 400, "1 Gb/s": 60, "100 Mb/s": 10}


@dataclass(frozen=True)
class Layout:
    """Where the ranks are, and what is compared there; turns go on while one more fits into `budget_s`."""

    name: str
    nodes: int
    ranks_per_node: int
    variants: Mapping[str, Variant]
    rates: Sequence[str]
    budget_s: float


SHAPED = ("1 Gb/s", "100 Mb/s")  # without a rate, four ranks wait for two cores and nothing else
LAYOUTS = (
    Layout("2 ranks", 2, 1, VARIANTS, tuple(RATES), budget_s=80),
    Layout("4 ranks", 4, 1, VARIANTS, SHAPED, budget_s=105),
    Layout("2 nodes x 2 ranks", 2, 2, TWO_STAGES, SHAPED, budget_s=45),
)


@dataclass(frozen=True)
class Effort:
    """How much is run."""

    layouts: Sequence[Layout]
    turns: int
    warm_up: int
    steps: int  # after the warm-up


FULL = Effort(LAYOUTS, turns=6, warm_up=3, steps=10)
QUICK = Effort([replace(layout, rates=SHAPED[1:]) for layout in (LAYOUTS[0], LAYOUTS[2])], turns=1, warm_up=2, steps=5)


@dataclass
class Sample:
    """Steps of all runs of one variant at one rate, and each run's bytes on the wire, a step and rank.

    `counted` is what gmeta's own record of a step says that rank 0 sent to others: bytes, and collectives.
    """

    step_ms: list[float] = field(default_factory=list)
    exchange_share: list[float] = field(default_factory=list)
    wire_bytes: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    counted: list[tuple[float, int]] = field(default_factory=list)
    failure: str = ""


def measure(layout: Layout, effort: Effort, folder: Path) -> tuple[dict[tuple[str, str], Sample], list[Record]]:
    """Return the samples by (rate, variant), and the measured bandwidths."""
    samples: dict[tuple[str, str], Sample] = defaultdict(Sample)
    start, ports = time.monotonic(), iter(range(20000, 60000))
    with (
        cluster(layout.nodes, layout.ranks_per_node, inside_rate=None, between_rate=None) as net,
        Ranks([net.enter(rank) for rank in range(net.world_size)]) as ranks,
    ):
        checks = [record for rate in layout.rates for record in check_rate(layout, net, rate)]
        for turn in range(effort.turns):
            if turn and (time.monotonic() - start) * (turn + 1) / turn > layout.budget_s:
                break
            for rate, name, variant in turn_of(layout, samples):
                net.set_rates(None, RATES[rate])
                run_once(net, ranks, variant, effort, folder, next(ports), samples[rate, name])
    return samples, checks


def turn_of(layout: Layout, samples: Mapping[tuple[str, str], Sample]) -> Iterator[tuple[str, str, Variant]]:
    """Run one turn: every rate, and every variant that has not failed."""
    for rate in layout.rates:
        for name, variant in layout.variants.items():
            if not samples[rate, name].failure:
                yield rate, name, variant


def run_once(
    net: Cluster,
    ranks: Ranks,
    variant: Variant,
    effort: Effort,
    folder: Path,
    port: int,
    sample: Sample,
) -> None:
    """Make one short run, and add it to `sample`."""
    steps = effort.warm_up + effort.steps
    run_dir = folder / "run"
    argv = ["--pack", str(folder / "pack"), "--run_dir", str(run_dir), "--timeout_s", "60"]
    argv += ["--loader.tasks_per_batch", str(TASKS_PER_RANK * net.world_size), "--schedule.max_steps", str(steps)]
    before = net.sent_bytes()
    environments = [net.environment(rank, port) for rank in range(net.world_size)]
    sample.failure = ranks.train([*argv, *LOAD.options, *variant.words], environments, switches=variant.switches)
    if not sample.failure:
        sent = {link: now - before[link] for link, now in net.sent_bytes().items()}
        _book(sample, sent, steps * net.world_size, read_steps(run_dir, effort.warm_up))
    shutil.rmtree(run_dir, ignore_errors=True)


def _book(sample: Sample, sent: Mapping[str, int], rank_steps: int, steps: Sequence[Mapping[str, Any]]) -> None:
    for link, count in sent.items():
        sample.wire_bytes[link].append(count / rank_steps)
    sample.step_ms += [1000 * step["seconds"] for step in steps]
    sample.exchange_share += [step["exchange_share"] for step in steps]
    kinds = [step["comm"]["measured"].values() for step in steps if "comm" in step]
    sample.counted += [(sum(k["remote_bytes"] for k in found), sum(k["calls"] for k in found)) for found in kinds]


def check_rate(layout: Layout, net: Cluster, rate: str) -> list[Record]:
    """Measure one raw TCP stream between nodes, and one inside a node where it has two ranks."""
    net.set_rates(None, RATES[rate])
    links = {"between nodes": net.ranks_per_node} | ({"inside a node": 1} if net.ranks_per_node > 1 else {})
    return [
        Record(
            f"{layout.name}, {rate}",
            link,
            "raw_tcp",
            measured_bits_per_s(net, 0, peer, PROBE_MIB[rate if link == "between nodes" else "unshaped"]) / 1e6,
            "Mb/s",
        )
        for link, peer in links.items()
    ]


def records_of(layout: Layout, samples: Mapping[tuple[str, str], Sample]) -> list[Record]:
    """Return flat records of one layout's samples."""
    found = []
    for (rate, name), sample in samples.items():
        if sample.failure:
            continue
        case = f"{layout.name}, {rate}"
        base = samples[rate, BASELINE]
        found += [
            Record(case, name, "step", median(sample.step_ms), "ms"),
            Record(case, name, "steps", len(sample.step_ms), "1"),
            Record(case, name, "exchange_share", median(sample.exchange_share), "1"),
            *(
                Record(case, name, f"sent_{link}", median(sent), "bytes/step/rank")
                for link, sent in sample.wire_bytes.items()
            ),
        ]
        if sample.counted:
            sent, calls = (median(numbers) for numbers in zip(*sample.counted, strict=True))
            found += [
                Record(case, name, "counted", sent, "bytes/step/rank"),
                Record(case, name, "collectives", calls, "1/step"),
            ]
        if not base.failure:
            found.append(Record(case, name, "over_baseline", median(sample.step_ms) / median(base.step_ms), "1"))
    return found


def show(layout: Layout, samples: Mapping[tuple[str, str], Sample], checks: Sequence[Record]) -> str:
    """Return the layout's section: the check of its links, and a row for each variant."""
    links = ["between"] if layout.ranks_per_node == 1 else ["inside", "between"]
    header = [layout.name, *(f"sent {link}, KB/step/rank" for link in links), "counted", "calls", *layout.rates]
    rows = [
        [name, *row(samples, layout.rates, name, links)]
        for name in layout.variants
        if not any(samples[rate, name].failure for rate in layout.rates)
    ]
    lines = [f"- raw TCP {check.variant}, {check.case}: {check.value:,.0f} Mb/s" for check in checks]
    failures = {name: sample.failure for (_, name), sample in samples.items() if sample.failure}
    lines += [f"- {name}: {failure}" for name, failure in failures.items()]
    return "\n".join([f"## {layout.name}", "", table(header, rows), "", *lines])


def row(samples: Mapping[tuple[str, str], Sample], rates: Sequence[str], name: str, links: Sequence[str]) -> list[str]:
    """Return the bytes and collectives, the same at every rate; by rate the step time, its ratio to the baseline's, the
    share.
    """
    found = [samples[rate, name] for rate in rates]
    cells = [f"{median([sent for sample in found for sent in sample.wire_bytes[link]]) / 1e3:,.0f}" for link in links]
    counted = [pair for sample in found for pair in sample.counted]
    sent, calls = (median(numbers) for numbers in zip(*counted, strict=True)) if counted else (None, None)
    cells += ["not logged" if sent is None else f"{sent / 1e3:,.0f}", "" if calls is None else f"{calls:.0f}"]
    for rate, sample in zip(rates, found, strict=True):
        base = samples[rate, BASELINE]
        ratio = f"{median(sample.step_ms) / median(base.step_ms):.2f} ×" if base.step_ms else "no baseline"
        cells.append(f"{median(sample.step_ms):.0f} ms, {ratio}, {median(sample.exchange_share):.0%}")
    return cells


def main() -> int:
    args = arguments(__doc__.splitlines()[0])
    reason = unavailable()
    if reason:
        print(f"skipped: {reason}")
        if args.json:
            args.json.write_text("[]\n")
        return 0
    effort = QUICK if args.quick else FULL
    sections, records = [], []
    with tempfile.TemporaryDirectory(prefix="gmeta-network-") as name:
        write_pack(Path(name) / "pack", LOAD)
        for layout in effort.layouts:
            samples, checks = measure(layout, effort, Path(name))
            sections.append(show(layout, samples, checks))
            records += [*checks, *records_of(layout, samples)]
    body = [
        "Cells: median step, its ratio to the baseline's, share of the step in exchange (rank 0). Bytes are the "
        "kernel's count of what all cards, or all loopback interfaces, sent in a run, start and checkpoint included; "
        "`counted` and `calls` are what rank 0 says of a step: bytes sent to others, and collectives. "
        f"`{AGAIN}` is the baseline once more: its ratio shows the noise.",
        *sections,
    ]
    config = {
        "workload": f"{LOAD}, {TASKS_PER_RANK} tasks a rank",
        "baseline": "gmeta as it is",
        "steps a run": effort.steps,
    }
    publish("network", "\n\n".join(body), records, config, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
