"""Policies against stragglers for 8 to 1,024 workers on a virtual clock: what each achieves of the ideal.

python benchmarks/scale.py [--quick]

Every scenario of examples/scenarios that slows workers down is repeated in proportion. `of ideal` compares the job's
time with exact balance of every step by that step's own speeds. With hundreds of workers in short bursts someone has
just become slow at nearly every step; no policy that needs a few steps to answer can help there, and the table says so.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import common

from gmeta.elastic.policies import load_policy
from gmeta.elastic.scenario import Persistent, parse_scenario
from gmeta.elastic.simulate import SimulationResult, simulate

SCENARIOS = ("deterministic-4x", "two-classes", "persistent", "transient-50", "transient-10")
POLICIES = ("static", "lb_bsp", "backup", "dd", "nd")
WORKERS = (8, 32, 128, 1024)


def job(name: str, workers: int, policy: str, steps: int) -> tuple[SimulationResult, float]:
    """Return a simulated job, and the seconds of this machine that it took."""
    path = common.ROOT / "examples" / "scenarios" / f"{name}.yaml"
    scenario = parse_scenario(path.read_text(), name).scaled(workers)
    events = tuple(replace(e, from_step=steps // 5) if isinstance(e, Persistent) else e for e in scenario.events)
    scenario = replace(scenario, steps=steps, events=events)
    start = time.perf_counter()
    return simulate(scenario, load_policy(policy), policy), time.perf_counter() - start


def plot(results: dict[tuple[str, int, str], SimulationResult], path: Path) -> None:
    """Draw a panel for each scenario: the fraction of the ideal over the number of workers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(SCENARIOS), figsize=(3.2 * len(SCENARIOS), 3.2), sharey=True)
    for panel, name in zip(panels, SCENARIOS, strict=True):
        for policy in POLICIES:
            panel.plot(WORKERS, [results[name, n, policy].achieved for n in WORKERS], marker="o", label=policy)
        panel.set_xscale("log", base=2)
        panel.set_title(name, fontsize=10)
        panel.set_xlabel("workers")
        panel.set_ylim(0, 1.02)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("ideal time / time")
    panels[-1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    args = common.arguments(__doc__ or "")
    workers = (8, 32) if args.quick else WORKERS
    steps = 300
    results: dict[tuple[str, int, str], SimulationResult] = {}
    records, rows = [], []
    for name in SCENARIOS:
        for n in workers:
            for policy in POLICIES:
                result, took = job(name, n, policy, steps)
                results[name, n, policy] = result
                case = f"{name}, {n} workers"
                records += [
                    common.Record(case, policy, "achieved_of_ideal", result.achieved, ""),
                    common.Record(case, policy, "jct", result.jct_s, "s"),
                    common.Record(case, policy, "utilisation", result.utilisation, ""),
                    common.Record(case, policy, "decisions", result.decisions, ""),
                    common.Record(case, policy, "simulation", took, "s"),
                ]
            shares = [f"{results[name, n, p].achieved:.2f}" for p in POLICIES]
            rows.append([name, str(n), *shares, str(results[name, n, "nd"].decisions)])
    body = "Ideal time / time of the job, by policy.\n\n"
    body += common.table(["scenario", "workers", *POLICIES, "nd's decisions"], rows)
    if not args.quick:
        image = common.RESULTS / "scale.png"
        plot(results, image)
        body += f"\n\n![share of the ideal over workers]({image.name})"
    common.publish("scale", body, records, {"steps": steps, "report_s": "max(0.1, workers / 1000)"}, args)


if __name__ == "__main__":
    main()
