"""Simulated scaling of strategies from 16 to 1,024 GPUs, for models of 7 and 65 billion parameters.

    python benchmarks/paro_scale.py [--quick]

It runs on the virtual clock of the planner (gmeta/sharding/schedule.py), which the emulated cluster checks. There are 8
GPUs a machine, NVLink inside, and 100 Gb/s between machines, shared by a machine's GPUs or one link each. A step has
ten micro-batches of four sequences of 512 tokens on each GPU, computing at half an A100's peak. Efficiency is
throughput a GPU over that on 16. A second table has more tokens a micro-batch, which hide what full sharding sends. The
paper (PaRO, 16 to 128 GPUs, 7 B, measured there) says 0.92 for IIG, 0.84 for NIG and 0.63 for ZeRO-2 and -3; its
setting is not known in full, and no number here was measured on GPUs.
"""

from __future__ import annotations

from pathlib import Path

import common

from gmeta.sharding.schedule import Links, StepCost, Workload, step_cost
from gmeta.sharding.strategy import NodeLayout

GPUS = (16, 32, 64, 128, 256, 512, 1024)
SHOWN = ("IIG", "NIG", "III", "GGG")
TOKENS, FLOPS = 4 * 512, 156e12
MORE_TOKENS = (2048, 4096, 8192, 16384)
MODELS = {"7 B": (7e9, 32), "65 B": (65e9, 80)}
PAPER = {"IIG": 0.92, "NIG": 0.84, "GGG": 0.63}


def step(strategy: str, gpus: int, model: str, shared: bool, tokens: int = TOKENS) -> StepCost:
    """Return the cost of one optimizer step."""
    params, layers = MODELS[model]
    links = Links(100e9, 2000e9, inter_latency_s=20e-6, intra_latency_s=5e-6, shared_nic=shared)
    work = Workload(int(params), int(params), 10, 6 * params * tokens / FLOPS, layers)
    algorithm = "flat" if strategy == "GGG" else "two_phase"  # what ZeRO-3 and FSDP do
    return step_cost(strategy, NodeLayout(8, gpus // 8), links, work, algorithm)


def gains_over_tokens(records: list[common.Record]) -> dict[tuple[str, bool], list[float]]:
    """Return the time of GGG over that of IIG on 128 GPUs for each of `MORE_TOKENS`, and add it to `records`."""
    gains: dict[tuple[str, bool], list[float]] = {}
    for model in MODELS:
        for shared in (True, False):
            times = [[step(s, 128, model, shared, tokens).step_s for s in ("GGG", "IIG")] for tokens in MORE_TOKENS]
            gains[model, shared] = [full / part for full, part in times]
            case = f"{model}, {'one link a machine' if shared else 'a link a GPU'}, 128 GPUs"
            for tokens, gain in zip(MORE_TOKENS, gains[model, shared], strict=True):
                records.append(common.Record(f"{case}, {tokens} tokens", "GGG / IIG", "step_s", gain, "ratio"))
    return gains


def plot(found: dict[tuple[str, str, bool, int], StepCost], path: Path) -> None:
    """Draw efficiency over GPUs, with a row for each model and a column for each kind of link."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(len(MODELS), 2, figsize=(8, 6), sharex=True, sharey=True)
    for row, model in zip(panels, MODELS, strict=True):
        for panel, shared in zip(row, (True, False), strict=True):
            for strategy in SHOWN:
                base = found[model, strategy, shared, GPUS[0]].step_s
                panel.plot(GPUS, [base / found[model, strategy, shared, n].step_s for n in GPUS], "o-", label=strategy)
            panel.set_xscale("log", base=2)
            panel.set_title(f"{model}, {'one link a machine' if shared else 'a link a GPU'}", fontsize=10)
            panel.set_ylim(0, 1.05)
            panel.grid(alpha=0.3)
    for panel in panels[-1]:
        panel.set_xlabel("GPUs (simulated)")
    panels[0][0].set_ylabel("efficiency")
    panels[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    args = common.arguments(__doc__ or "")
    found = {
        (model, strategy, shared, n): step(strategy, n, model, shared)
        for model in MODELS
        for strategy in SHOWN
        for shared in (True, False)
        for n in GPUS
    }
    records, rows = [], []
    for (model, strategy, shared, n), result in found.items():
        if n != GPUS[0]:
            continue
        case = f"{model}, {'one link a machine' if shared else 'a link a GPU'}"
        efficiency = {g: result.step_s / found[model, strategy, shared, g].step_s for g in GPUS}
        for g in GPUS:
            records.append(common.Record(f"{case}, {g} GPUs", strategy, "efficiency", efficiency[g], ""))
            seconds = found[model, strategy, shared, g].step_s
            records.append(common.Record(f"{case}, {g} GPUs", strategy, "step_s", seconds, "s"))
        paper = f"{PAPER[strategy]:.2f}" if model == "7 B" and strategy in PAPER else ""
        at_128 = found[model, strategy, shared, 128]
        gb = f"{(at_128.memory - at_128.passing) / 1e9:.0f}"
        rows.append([case, strategy, gb, f"{result.step_s:.1f}", *(f"{efficiency[g]:.2f}" for g in GPUS[1:]), paper])
    header = [
        "model, links",
        "strategy",
        "GB a GPU on 128",
        "s a step on 16",
        *map(str, GPUS[1:]),
        "the paper's, on 128",
    ]
    body = "Simulated efficiency against 16 GPUs. Nothing here was measured on GPUs.\n\n" + common.table(header, rows)
    if not args.quick:
        image = common.RESULTS / "paro_scale.png"
        plot(found, image)
        body += f"\n\n![efficiency over GPUs, simulated]({image.name})"
    gains = [
        [f"{model}, {'one link a machine' if shared else 'a link a GPU'}", *(f"{gain:.2f}" for gain in found_gains)]
        for (model, shared), found_gains in gains_over_tokens(records).items()
    ]
    body += "\n\nTime of GGG over that of IIG on 128 GPUs, by tokens a micro-batch:\n\n"
    body += common.table(["model, links", *map(str, MORE_TOKENS)], gains)
    common.publish("paro_scale", body, records, {"tokens a micro-batch": TOKENS, "flops": FLOPS}, args)


if __name__ == "__main__":
    main()
