"""Meta-IO: the task pack against what users have instead, and what each part of the loader buys.

    python benchmarks/io.py [--quick] [--json FILE]

The loaders alone run each in a process of its own, one torch thread, 20 features, 128 tasks of 10 to 30 rows a batch.
Before anything is timed, each must give the tasks of its first batch exactly as the pack's loader does. Then `gmeta
train` runs with parts of the loader on and off (`study.variants`). All files are in a temporary directory that is
removed at the end.

    a CPU second   samples for a second of processor time, of workers too: what a core gives, also on a busy machine
    first batch    seconds from opening to the first batch, imports not counted
    anonymous      resident anonymous memory of the loader and its workers (peak while opening, or at the end), above
                   what the process had before; pages of mapped files are the page cache's
    cold           the files are dropped from the page cache first; what stayed is in the table
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import psutil
import torch
from common import ROOT, Record, arguments, publish, table
from io_formats import OPEN, TASKS_PER_BATCH, differences, write_csv, write_files, write_pack, write_parquet

from gmeta.data.pack import open_pack
from gmeta.runs.log import read_metrics

MB = 1e6
WARM_UP_STEPS = 10
NEEDED_GB = 15  # of disk, for 50 million rows as pack and as Parquet

CSV, FILES, PARQUET = "shuffled CSV, grouped in memory", "one file a task (torch.save)", "Parquet by row groups"


@dataclass(frozen=True)
class Case:
    """A number of rows, the formats written for it, and why the others are not."""

    name: str
    num_tasks: int
    seconds: float  # of reading, each variant
    writers: tuple[Callable[[Path, int], None], ...]
    left_out: Mapping[str, str]
    caches: tuple[str, ...] = ("warm", "cold")


SMALL = Case("1 M rows", 50_000, 2.0, (write_pack, write_csv, write_files, write_parquet), {})
LARGE = Case(
    "50 M rows",
    2_500_000,
    3.0,
    (write_pack, write_parquet),
    {
        CSV: "not run: 6 GB of text; sorted in memory it needs twice the arrays' 4 GB",
        FILES: "not run: 2.5 million files",
    },
)
QUICK = Case("0.1 M rows (quick)", 5_000, 0.3, SMALL.writers, {}, ("warm",))

# ------------------------------------------------------------------------------------------ one process


def anonymous_mb() -> float:
    """Return the anonymous and shared memory of this process and its children, shared pages counted once."""
    total = 0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith(("Pss_Anon:", "Pss_Shmem:")):
                total += int(line.split()[1]) * 1024
    return total / MB


def cpu_s() -> float:
    """Return the processor seconds that this process and its children have used."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(sum(process.cpu_times()[:2]) for process in processes)


class Peak:
    """The largest RssAnon of this process while the block runs, in MB, read every 10 ms."""

    def __enter__(self) -> Peak:
        self.mb = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.01):
            status = Path("/proc/self/status").read_text()
            self.mb = max(self.mb, int(status.split("RssAnon:")[1].split()[0]) * 1024 / MB)


def measure(variant: str, root: Path, seconds: float) -> dict[str, float]:
    """Open a variant and read from it for so long. Return the numbers of one row of the table."""
    torch.set_num_threads(1)
    before = anonymous_mb()
    start = time.perf_counter()
    with Peak() as peak:
        batches = OPEN[variant](root)
        next(batches)
    first = time.perf_counter() - start
    samples = cells = 0
    start, start_cpu = time.perf_counter(), cpu_s()
    while (elapsed := time.perf_counter() - start) < seconds:
        batch = next(batches)
        for mask in (batch.support.mask, batch.query.mask):
            samples += int(np.count_nonzero(mask.numpy()))
            cells += mask.numel()
    return {
        "samples_per_s": samples / elapsed,
        "samples_per_cpu_s": samples / (cpu_s() - start_cpu),
        "first_batch_s": first,
        "anonymous_mb": max(peak.mb, anonymous_mb()) - before,
        "padding": 1 - samples / cells,
    }


# ------------------------------------------------------------------------------------------ page cache


def files_of(root: Path) -> list[Path]:
    return [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.is_file())


def read_all(root: Path) -> None:
    """Bring the files into the page cache."""
    for path in files_of(root):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def drop(root: Path) -> None:
    """Drop the files from the page cache, as far as the system lets a user do so."""
    os.sync()  # a page that is not yet written stays
    for path in files_of(root):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def cached_share(paths: Sequence[Path]) -> float:
    """Return the fraction of the files' pages that are in the page cache, by mincore."""
    libc = ctypes.CDLL(None, use_errno=True)
    resident = pages = 0
    for path in paths:
        if (size := path.stat().st_size) == 0:
            continue
        with path.open("rb") as file, mmap.mmap(file.fileno(), size, mmap.MAP_PRIVATE) as mapped:
            page = (ctypes.c_ubyte * (-(-size // mmap.PAGESIZE)))()
            anchor = ctypes.c_char.from_buffer(mapped)
            failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(anchor)), ctypes.c_size_t(size), page)
            del anchor  # or the map cannot be closed
            if failed:
                raise OSError(ctypes.get_errno(), "mincore")
            resident += sum(byte & 1 for byte in page)
            pages += len(page)
    return resident / max(1, pages)


# ------------------------------------------------------------------------------------------ loaders alone


def check_agreement(root: Path) -> None:
    """Check that every format gives the tasks of its first batch as the pack's loader does. Otherwise timing it means
    nothing.
    """
    num_tasks = 1500
    for write in SMALL.writers:
        write(root, num_tasks)
    split = open_pack(root / "pack").split("train")
    for variant, open_variant in OPEN.items():
        batch = next(open_variant(root))
        if batch.num_tasks != TASKS_PER_BATCH or (odd := differences(batch, split)):
            raise SystemExit(f"{variant}: {batch.num_tasks} tasks, other content than the pack's in {odd}")


def run_alone(variant: str, root: Path, seconds: float) -> dict[str, float]:
    """Run `measure` in a fresh process."""
    command = [sys.executable, __file__, "measure", variant, str(root), str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{variant} failed:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def loaders(case: Case, root: Path) -> tuple[list[Record], list[list[str]]]:
    """Return the records and table rows of one number of rows."""
    for write in case.writers:
        start = time.perf_counter()
        write(root, case.num_tasks)
        print(f"{case.name}: {write.__name__} took {time.perf_counter() - start:.0f} s", file=sys.stderr)
    own_files = {CSV: root / "log.csv", FILES: root / "tasks", PARQUET: root / "parquet"}
    records, rows = [], []
    for variant in OPEN:
        if reason := case.left_out.get(variant):
            rows.append([case.name, "", variant, reason, "", "", "", "", ""])
            continue
        folder = own_files.get(variant, root / "pack")
        for cache in case.caches:
            (read_all if cache == "warm" else drop)(folder)
            paths = files_of(folder)
            cached = cached_share(paths[:: -(-len(paths) // 100)])
            found = run_alone(variant, root, case.seconds)
            name = f"{case.name}, {cache}"
            units = {
                "samples_per_s": "1/s",
                "samples_per_cpu_s": "1/s",
                "first_batch_s": "s",
                "anonymous_mb": "MB",
                "padding": "1",
            }
            records += [Record(name, variant, metric, found[metric], unit) for metric, unit in units.items()]
            forms = ("{:,.0f}", "{:,.0f}", "{:.2f}", "{:,.0f}", "{:.1%}")
            numbers = [form.format(found[metric]) for form, metric in zip(forms, units, strict=True)]
            rows.append([case.name, cache, variant, *numbers, f"{cached:.0%}"])
    return records, rows


# ------------------------------------------------------------------------------------------ with training


ABLATIONS = {
    "all on": (),
    "not sequential": ("random_reads",),
    "no size buckets": ("no_size_buckets",),
    "nothing ahead": ("nothing_ahead",),
    "ids in the step": ("ids_in_step",),
}
"""Variant -> switches of the study (`study.variants`)."""


def summary(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return means over the steps after the warm-up, weighted by their time, from the records of metrics.jsonl."""
    steps = [record for record in records if record["kind"] == "train"]
    time_s = np.array([record["time_s"] for record in steps])
    seconds = np.diff(time_s, prepend=0)[WARM_UP_STEPS:]
    kept = steps[WARM_UP_STEPS:]
    rate, padding, share = (
        np.array([record[key] for record in kept]) for key in ("samples_per_s", "padding", "input_share")
    )
    return {
        "samples_per_s": float((rate * seconds).sum() / seconds.sum()),
        "padding": float((padding * seconds).sum() / seconds.sum()),
        "input_share": float((share * seconds).sum() / seconds.sum()),
        "input_ms": float((share * seconds).mean() * 1e3),
    }


def train(pack: Path, run_dir: Path, switches: Sequence[str], steps: int) -> dict[str, float]:
    """Run `gmeta train` of a second-order MeLU, with 20 features of width 16 and layers of 256 and 128."""
    settings = {
        "pack": pack,
        "run_dir": run_dir,
        "model.embedding_dim": 16,
        "model.args.hidden": "[256, 128]",
        "loader.tasks_per_batch": TASKS_PER_BATCH,
        "schedule.max_steps": steps,
        "device": "cpu",
    }
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    program = ["study.train", ",".join(switches)] if switches else ["gmeta", "train"]
    command = [sys.executable, "-m", *program, *words]
    paths = [str(Path(__file__).parent), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    found = summary(read_metrics(run_dir / "metrics.jsonl"))
    shutil.rmtree(run_dir)
    return found


def training(root: Path, variants: Mapping[str, Sequence[str]], steps: int) -> tuple[list[Record], list[list[str]]]:
    """Return records and table rows, with a run each."""
    records, rows = [], []
    units = {"samples_per_s": "1/s", "padding": "1", "input_share": "1", "input_ms": "ms"}
    for name, switches in variants.items():
        found = train(root / "pack", root / "run", switches, steps)
        records += [Record("training", name, metric, found[metric], unit) for metric, unit in units.items()]
        forms = ("{:,.0f}", "{:.1%}", "{:.2%}", "{:.2f}")
        rows.append([name, *(form.format(found[metric]) for form, metric in zip(forms, units, strict=True))])
    return records, rows


# ------------------------------------------------------------------------------------------ all


def in_directory(root: Path, quick: bool) -> tuple[list[Record], str, dict[str, Any]]:
    (root / "check").mkdir()
    check_agreement(root / "check")
    shutil.rmtree(root / "check")
    cases = [QUICK if quick else SMALL]
    if not quick and shutil.disk_usage(root).free > NEEDED_GB * 1e9:
        cases.append(LARGE)
    records, rows = [], []
    steps = WARM_UP_STEPS + (10 if quick else 60)
    variants = {name: found for name, found in ABLATIONS.items() if not quick or name in ("all on", "nothing ahead")}
    trained: tuple[list[Record], list[list[str]]] = ([], [])
    for number, case in enumerate(cases):
        place = root / str(number)
        place.mkdir()
        more = loaders(case, place)
        records += more[0]
        rows += more[1]
        if number == 0:
            trained = training(place, variants, steps)
        shutil.rmtree(place)
    if not quick and len(cases) == 1:
        rows.append([LARGE.name, "", "all", f"not run: needs {NEEDED_GB} GB of free disk", "", "", "", "", ""])
    header = ["rows", "cache", "loader alone", "samples/s", "a CPU second", "first batch s", "anonymous MB", "padding"]
    header.append("cached before")
    train_header = ["gmeta train, 1 process", "samples/s", "padding", "input wait of step", "input wait ms"]
    body = f"{table(header, rows)}\n\n{table(train_header, trained[1])}"
    config = {
        "tasks per batch": TASKS_PER_BATCH,
        "rows per task": "10 to 30",
        "features": 20,
        "threads of torch": "1 in the loaders alone, default in training",
        "training steps": f"{steps}, the first {WARM_UP_STEPS} not counted",
        "seconds of reading": ", ".join(f"{case.seconds} ({case.name})" for case in cases),
    }
    return [*records, *trained[0]], body, config


def main() -> None:
    if sys.argv[1:2] == ["measure"]:
        print(json.dumps(measure(sys.argv[2], Path(sys.argv[3]), float(sys.argv[4]))), flush=True)
        os._exit(0)  # a DataLoader with workers, left amid an epoch, takes seconds to end
    args = arguments("The task pack against CSV, Parquet, files and DataLoader; the loader's parts on and off.")
    with tempfile.TemporaryDirectory(prefix="gmeta-io-") as directory:
        records, body, config = in_directory(Path(directory), args.quick)
    publish("io", body, records, config, args)


if __name__ == "__main__":
    main()
