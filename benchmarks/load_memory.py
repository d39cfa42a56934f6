"""What a trained run takes in memory when it is loaded to be read: evaluate, predict and `gmeta.load`.

    python benchmarks/load_memory.py [--quick] [--json FILE]

A run is made whose one table has 1 GiB of float32 rows (--quick: 128 MiB) and Adam's two moments beside them: a pack of
a few tasks, a hashed feature, two steps, by `gmeta prepare` and `gmeta train`. Each command then runs in a process of
its own, which imports everything first. The unit is the bytes of the table's rows. Measured is the growth

    total      from then on to the most that the process ever held (VmHWM, reset first), mapped files included
    anonymous  the same without mapped files (RssAnon, looked at every 5 ms)
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import Record, arguments, gmeta, publish, status, table

DIM = 32
ROWS = {"full": 1 << 23, "quick": 1 << 20}
USERS, EACH = 40, 10
LIMIT = 1.1
COMMANDS = ("evaluate", "predict", "load")


def make_run(root: Path, num_rows: int) -> None:
    """Make `pack`, `run`, `support.parquet` and `query.parquet` under `root`."""
    rng = np.random.default_rng(0)
    count = USERS * EACH
    log = pa.table(
        {
            "user": np.repeat(np.arange(USERS), EACH),
            "item": rng.integers(0, 1 << 40, count),
            "click": rng.integers(0, 2, count),
            "ts": np.tile(np.arange(EACH), USERS),
        }
    )
    pq.write_table(log, root / "log.parquet")
    late = np.tile(np.arange(EACH), USERS) >= EACH // 2
    pq.write_table(log.filter(pa.array(~late)), root / "support.parquet")
    pq.write_table(log.filter(pa.array(late)), root / "query.parquet")
    schema = {"task": "user", "label": "click", "time": "ts"}
    schema |= {"categorical": [{"name": "item", "hash_buckets": num_rows - 1}]}
    (root / "schema.yaml").write_text(json.dumps(schema))  # JSON is YAML
    words = ("--input", root / "log.parquet", "--schema", root / "schema.yaml", "--out", root / "pack")
    gmeta("prepare", *words, "--query_size", 3, "--test_fraction", 0.3)
    model = ("--model.name", "melu", "--model.args.hidden", "[8]", "--model.embedding_dim", DIM)
    steps = ("--schedule.max_steps", 2, "--schedule.keep_last", 1, "--embedding.optimizer", "adam")
    gmeta("train", "--pack", root / "pack", "--run_dir", root / "run", *model, *steps)


def command(what: str, root: Path) -> Callable[[], object]:
    """Import what `what` needs and return it, ready to be called."""
    import gmeta as package
    from gmeta.cli import run
    from gmeta.evaluation import evaluate as _evaluate  # noqa: F401
    from gmeta.serving import predict as _predict  # noqa: F401

    words = {
        "evaluate": ["--baselines", "false", "--resamples", "10"],
        "predict": [
            *("--support", f"{root}/support.parquet", "--query", f"{root}/query.parquet"),
            *("--out", f"{root}/scores.parquet"),
        ],
    }
    if what == "load":
        return lambda: package.load(root / "run")
    return lambda: run([what, "--run_dir", f"{root}/run", *words[what]])


def measure(what: str, root: Path) -> dict[str, int]:
    """Growth of this process while it does `what`, in bytes."""
    call = command(what, root)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from what is held now
    total, anonymous = status("VmHWM"), status("RssAnon")
    most, done = [anonymous], threading.Event()

    def look() -> None:
        while not done.wait(0.005):
            most[0] = max(most[0], status("RssAnon"))

    watcher = threading.Thread(target=look)
    watcher.start()
    result = call()
    done.set()
    watcher.join()
    assert what == "load" or result == 0
    return {"total": status("VmHWM") - total, "anonymous": max(most[0], status("RssAnon")) - anonymous}


def in_a_process(what: str, root: Path) -> dict[str, int]:
    """`measure` in a fresh process."""
    done = subprocess.run(
        [sys.executable, __file__, "measure", what, str(root)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{what} failed:\n{done.stdout}\n{done.stderr}")
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    args = arguments(__doc__.splitlines()[0])
    size = "quick" if args.quick else "full"
    num_rows = ROWS[size]
    weights = num_rows * DIM * 4
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_run(root, num_rows)
        saved = sorted((root / "run" / "checkpoints").glob("step-*"))[-1]
        checkpoint = sum(file.stat().st_size for file in saved.glob("*.safetensors"))
        found = {what: in_a_process(what, root) for what in COMMANDS}
    case = f"{weights >> 20} MiB of rows"
    records = [Record(case, "checkpoint", "bytes", checkpoint / weights, "x weights")]
    records += [
        Record(case, what, f"{kind}_growth", grown[kind] / weights, "x weights")
        for what, grown in found.items()
        for kind in grown
    ]
    rows = [
        (what, *(f"{grown[kind] / weights:.2f} ({grown[kind] >> 20} MiB)" for kind in ("total", "anonymous")))
        for what, grown in found.items()
    ]
    body = table(("peak growth ÷ weights", "total", "anonymous"), rows)
    body += f"\n\nThe rows are {weights >> 20} MiB, the checkpoint with Adam's moments is {checkpoint >> 20} MiB."
    publish("load_memory", body, records, {"rows": num_rows, "dim": DIM, "optimizer": "adam"}, args)
    worst = max(grown["total"] for grown in found.values()) / weights
    if not args.quick and worst > LIMIT:
        raise AssertionError(f"loading grew by {worst:.2f} x the weights: at most {LIMIT} is right")


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        print(json.dumps(measure(sys.argv[2], Path(sys.argv[3]))))
    else:
        main()
