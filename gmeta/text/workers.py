"""The processes that encode for `gmeta embed`: this one, or several, each with an encoder and shards of its own.

A block of texts becomes a shard at its end, or what is done of it after a minute: that is what a kill costs.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import wait as wait_for
from multiprocessing.synchronize import Event
from pathlib import Path

import torch

from gmeta.config.text import EmbedConfig
from gmeta.text.encode import encode_batches
from gmeta.text.encoder import TextEncoder, open_encoder
from gmeta.text.store import StoreSpec, StoreWriter, append_shard

_SAVE_S = 60.0
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def open_for(config: EmbedConfig, number: int) -> TextEncoder:
    """Open the encoder for process `number`."""
    assert config.encoder is not None
    assert config.layers is not None
    cuda = torch.cuda.is_available()
    if config.device == "cuda" and not cuda:
        raise ValueError("device is 'cuda': this machine has no CUDA device; say --device cpu")
    device = "cpu" if config.device == "cpu" or not cuda else f"cuda:{number % torch.cuda.device_count()}"
    return open_encoder(config.encoder, config.layers, dtype=_DTYPES[config.precision], device=device)


def encode_here(encoder: TextEncoder, writer: StoreWriter, blocks: Iterator[list[str]]) -> Iterator[tuple[int, int]]:
    """Encode the blocks in this process; yield texts and cut texts as they are done."""
    for block in blocks:
        yield from _encode_block(encoder, writer.spec, writer.folder, block)


def _encode_block(
    encoder: TextEncoder, spec: StoreSpec, folder: Path, texts: list[str], stop: Event | None = None
) -> Iterator[tuple[int, int]]:
    """Encode a block into one shard, or one a minute; yield texts and cut texts of each batch. `stop` ends it early."""
    done: list[str] = []
    vectors: list[torch.Tensor] = []
    left, saved = len(texts), time.monotonic()
    for batch, found, cut in encode_batches(encoder, spec, texts):
        done += [texts[at] for at in batch]
        vectors.append(found)
        left -= len(batch)
        stopped = stop is not None and stop.is_set()
        if stopped or not left or time.monotonic() > saved + _SAVE_S:
            append_shard(folder, spec, done, torch.cat(vectors))
            done, vectors, saved = [], [], time.monotonic()
        yield len(batch), cut
        if stopped:
            return


def encode_spread(config: EmbedConfig, spec: StoreSpec, blocks: Iterator[list[str]]) -> Iterator[tuple[int, int]]:
    """Encode the blocks in `nproc` processes; yield texts and cut texts of each block. A few blocks wait, no more."""
    context = multiprocessing.get_context("spawn")
    stop, numbers = context.Event(), context.Queue()
    for number in range(config.nproc):
        numbers.put(number)
    pool = ProcessPoolExecutor(config.nproc, context, _begin_worker, (config, spec, numbers, stop))
    running: set[Future[tuple[int, int]]] = set()
    try:
        while True:
            running |= {pool.submit(_work, block) for block in islice(blocks, 2 * config.nproc - len(running))}
            if not running:
                return
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                yield future.result()
    except BrokenProcessPool:
        raise ValueError(
            "a process that encoded has died, perhaps for lack of memory: what was encoded is in the store; run it "
            "again, with fewer --nproc"
        ) from None
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class _Worker:
    """What a worker process keeps between blocks."""

    encoder: TextEncoder
    spec: StoreSpec
    folder: Path
    stop: Event


_WORKER: list[_Worker] = []
"""That of this process: blocks come as texts alone."""


def _begin_worker(config: EmbedConfig, spec: StoreSpec, numbers: multiprocessing.Queue[int], stop: Event) -> None:
    """Open the encoder in a worker process, which ends with the process that started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent asks to stop: what is encoded is saved
    threading.Thread(target=_follow_parent, name="gmeta-follow-parent", daemon=True).start()
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // config.nproc))
    _WORKER.append(_Worker(open_for(config, numbers.get()), spec, Path(config.store), stop))


def _work(texts: list[str]) -> tuple[int, int]:
    """Encode a block in a worker process; return how many texts, and how many of them were cut."""
    (worker,) = _WORKER
    found = list(_encode_block(worker.encoder, worker.spec, worker.folder, texts, worker.stop))
    return sum(encoded for encoded, _ in found), sum(cut for _, cut in found)


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for([parent.sentinel])
    os.kill(os.getpid(), signal.SIGKILL)  # a shard appears by a rename: nothing is left half written
