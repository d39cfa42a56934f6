"""What short types on the wire do to the metric and to the bytes of a step: MovieLens-100K, new users, 2 workers.

    python benchmarks/wire.py [--quick] [--json FILE]

The same training (examples/ml-100k.yaml, fewer epochs) runs with rows and row gradients in float32, bf16 and fp16,
over seeds. Differences are to float32 with the same seed. Bytes are those that rank 0 counted in a step, mean of a run.
Data is read from GMETA_DATA (default ../shared/data); without it the benchmark says so and ends.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path

from common import DATA, ROOT, Record, arguments, gmeta, publish, table

SOURCE = DATA / "ml-100k"
WIRES = ("float32", "bf16", "fp16")
METRICS = ("auc", "logloss")
CASE = "ml-100k/user_cold taste 2 workers"
SEEDS, EPOCHS = 2, 3  # enough to be seen against the seeds' own spread


def main() -> None:
    """Measure every type on every seed, then print differences."""
    args = arguments((__doc__ or "").split("\n")[0])
    if not SOURCE.is_dir():
        print(f"no data at {SOURCE}: set GMETA_DATA to a folder that holds ml-100k/")
        return
    seeds = range(1 if args.quick else SEEDS)
    found: dict[str, list[dict[str, float]]] = {wire: [] for wire in WIRES}
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            pack = Path(folder) / f"pack{seed}"
            config = ROOT / "examples" / "ml-100k-prepare.yaml"
            gmeta("prepare", "--config", config, "--root", SOURCE, "--out", pack, "--seed", seed)
            for wire in WIRES:
                found[wire].append(run(Path(folder) / f"{wire}{seed}", pack, wire, seed, quick=args.quick))
    records = []
    for wire, runs in found.items():
        for key in runs[0]:
            unit = "bytes" if key.endswith("_bytes") else {"logloss": "nat"}.get(key, "1")
            records.append(Record(CASE, wire, key, statistics.mean(r[key] for r in runs), unit))
        for key in METRICS:
            gaps = [ours[key] - theirs[key] for ours, theirs in zip(runs, found["float32"], strict=True)]
            for name, value in (("mean", statistics.mean(gaps)), ("min", min(gaps)), ("max", max(gaps))):
                records.append(Record(CASE, wire, f"{key}_minus_float32_{name}", value, "1"))
    config = {"seeds": len(seeds), "epochs": 1 if args.quick else EPOCHS}
    publish("wire", body(records, len(seeds)), records, config, args)


def run(run_dir: Path, pack: Path, wire: str, seed: int, *, quick: bool) -> dict[str, float]:
    """Train and evaluate once; the metrics after adaptation, and rank 0's bytes a step."""
    words = ["--pack", pack, "--run_dir", run_dir, "--seed", seed, "--comm.wire", wire, "--device", "cpu"]
    words += ["--schedule.epochs", 1 if quick else EPOCHS]
    gmeta("train", "--config", ROOT / "examples" / "ml-100k.yaml", *words, "--nproc", 2)
    gmeta("evaluate", "--run_dir", run_dir, "--resamples", 1, "--baselines", "false")
    records = json.loads((run_dir / "evaluation.json").read_text())["records"]
    after = {r["metric"]: r["value"] for r in records if r["case"] == "all" and r["variant"] == "after"}
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    sent = [line["comm"]["measured"] for line in lines if line["kind"] == "train"]
    moved = {
        f"{kind}_bytes": statistics.mean(step[kind]["remote_bytes"] for step in sent) for kind in ("rows", "gradients")
    }
    return {**{key: after[key] for key in METRICS}, **moved}


def body(records: list[Record], seeds: int) -> str:
    """Return the table of the result file."""
    value = {(r.variant, r.metric): r.value for r in records}
    rows = []
    for wire in WIRES:
        cells = [wire, *(f"{value[wire, f'{kind}_bytes']:,.0f}" for kind in ("rows", "gradients"))]
        for key in METRICS:
            mean, low, high = (value[wire, f"{key}_minus_float32_{name}"] for name in ("mean", "min", "max"))
            cells += [f"{value[wire, key]:.4f}", f"{mean:+.5f} ({low:+.5f} … {high:+.5f})"]
        rows.append(cells)
    head = ["wire", "row bytes sent", "gradient bytes sent"]
    for key in METRICS:
        head += [key, f"{key} − float32, mean (least … most)"]
    return f"{CASE}, {seeds} seed(s), test split after adaptation; bytes to the other worker, a step.\n\n" + table(
        head, rows
    )


if __name__ == "__main__":
    main()
