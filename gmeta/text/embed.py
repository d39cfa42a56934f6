"""`gmeta embed`: texts out of files into a behaviour store, the missing ones alone, on one process or several.

The files are read twice. The first pass finds what is wrong with them and which keys are missing, before hours of
encoding; the second hands out blocks of texts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from gmeta.config.text import EmbedConfig
from gmeta.text.shards import KeyIndex, Keys, key_order
from gmeta.text.store import BehaviourStore, StoreSpec, open_behaviours, spec_of, text_keys, writing_store
from gmeta.text.texts import TextFiles
from gmeta.text.workers import encode_here, encode_spread, open_for

_BLOCK_TEXTS = (256, 8192)
"""Texts that a process encodes at a time, at least and at most."""
_MOST_SMALL_SHARDS = 32
_MERGE_KEYS = 1 << 20


def embed(config: EmbedConfig) -> int:
    """Run `gmeta embed`."""
    match config.do:
        case ["verify"]:
            store = open_behaviours(config.store)
            store.verify()
            print(f"{store.folder}: {len(store):,} texts in {len(store.shards):,} shards, all sound")
        case ["stats"]:
            _print_stats(open_behaviours(config.store))
        case ["compact"]:
            with writing_store(config.store, None) as writer:
                writer.merge()
            store = open_behaviours(config.store)
            print(f"{store.folder}: {len(store):,} texts in {len(store.shards):,} shards")
        case _:
            _embed_files(config)
    return 0


@dataclass(frozen=True)
class TextScan:
    """What the first pass found: rows, values that are missing, empty texts, and the keys to encode, which rise."""

    rows: int
    nulls: int
    empty: int
    distinct: int
    missing: Keys


def _embed_files(config: EmbedConfig) -> None:
    files = TextFiles(config.inputs, config.column)
    encoder = open_for(config, 0)
    spec = spec_of(
        encoder,
        pooling=config.pooling,
        vectors=config.vectors,
        template=config.template,
        max_tokens=config.max_tokens,
        dtype=config.dtype,
    )
    with writing_store(config.store, spec) as writer, _progress() as progress:
        scan = _scan(files, open_behaviours(config.store))
        todo = len(scan.missing[0])
        task = progress.add_task("encoding", total=todo)
        started, done, cut = time.monotonic(), 0, 0
        size = min(max(todo // (4 * config.nproc), _BLOCK_TEXTS[0]), _BLOCK_TEXTS[1])  # so that all end together
        blocks = _blocks(files, spec, scan.missing, size)
        work = encode_here(encoder, writer, blocks) if config.nproc == 1 else encode_spread(config, spec, blocks)
        for encoded, shortened in work:
            done, cut = done + encoded, cut + shortened
            progress.update(task, completed=done)
        seconds = time.monotonic() - started
        writer.merge(_MOST_SMALL_SHARDS)
    _print_summary(open_behaviours(config.store), scan, done, cut, seconds)


def _progress() -> Progress:
    """Return a bar on stderr, drawn on a terminal alone."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal, transient=True)


# ----------------------------------------------------------------------------------------- which texts


def _scan(files: TextFiles, store: BehaviourStore) -> TextScan:
    rows = nulls = empty = 0
    found: list[Keys] = []
    for block in files.blocks():
        texts = [text for text in block if text is not None]
        rows, nulls, empty = rows + len(block), nulls + len(block) - len(texts), empty + texts.count("")
        found.append(_distinct([store.keys(texts)]))
        if sum(len(high) for high, _ in found[1:]) > max(len(found[0][0]), _MERGE_KEYS):
            found = [_distinct(found)]  # 16 bytes are kept of each distinct text, not of each row
    keys = _distinct(found)
    fresh = store.index.find(keys) < 0
    return TextScan(rows, nulls, empty, len(keys[0]), (keys[0][fresh], keys[1][fresh]))


def _distinct(keys: list[Keys]) -> Keys:
    """Return the distinct keys, which rise."""
    empty = [np.empty(0, np.uint64)]
    high, low = (np.concatenate([*empty, *words]) for words in ([k[0] for k in keys], [k[1] for k in keys]))
    order = key_order((high, low))
    high, low = high[order], low[order]
    first = np.append(True, (high[1:] != high[:-1]) | (low[1:] != low[:-1]))[: len(high)]
    return high[first], low[first]


def _blocks(files: TextFiles, spec: StoreSpec, missing: Keys, size: int) -> Iterator[list[str]]:
    """Yield the texts of the missing keys, each once, in blocks of `size`."""
    index, left = KeyIndex(missing), np.ones(len(missing[0]), bool)
    waiting: list[str] = []
    for block in files.blocks():
        if not left.any():
            break
        texts = [text for text in block if text is not None]
        places, first = np.unique(index.find(text_keys(spec, texts)), return_index=True)
        fresh = (places >= 0) & left[places]
        left[places[fresh]] = False
        waiting += [texts[at] for at in first[fresh]]
        while len(waiting) >= size:
            yield waiting[:size]
            waiting = waiting[size:]
    if waiting:
        yield waiting


# ------------------------------------------------------------------------------------------ what is told


def _print_summary(store: BehaviourStore, scan: TextScan, done: int, cut: int, seconds: float) -> None:
    print(f"{store.folder}: {len(store):,} texts, {done:,} of them new; {scan.rows:,} rows had {scan.distinct:,} texts")
    if done:
        print(f"{done / max(seconds, 1e-9):,.0f} texts a second")
    if cut:
        print(f"texts cut at {store.spec.max_tokens} tokens: {cut:,}")
    if scan.empty:
        print(f"rows with an empty text, which has a vector too: {scan.empty:,}")
    if scan.nulls:
        print(f"rows without a text, left out: {scan.nulls:,}")


def _print_stats(store: BehaviourStore) -> None:
    spec = store.spec
    size = sum(shard.path.stat().st_size for shard in store.shards)
    rows = sum(map(len, store.shards))
    table = Table.grid(padding=(0, 2))
    for name, value in {
        "texts": f"{len(store):,}",
        "shards": f"{len(store.shards):,}" + (f", {rows - len(store):,} texts twice" if rows > len(store) else ""),
        "bytes": f"{size:,}",
        "vectors": f"{spec.vectors} of {spec.dim} a text, {spec.dtype}",
        "pooling": spec.pooling,
        "template": spec.template,
        "tokens": f"at most {spec.max_tokens}",
        "encoder": f"{spec.encoder}, {spec.layers} layers, {spec.precision}",
    }.items():
        table.add_row(name, escape(value))
    Console().print(table)
