"""One rank of the emulated cluster: trains one model under every contender in turn, or times collectives.

    python rank.py '{"work": "train", "contenders": ["IIG", "fsdp2"], ...}'      # with torchrun's environment

Computing is emulated: every layer sleeps, a third of its time in the forward pass and two thirds in the backward pass,
so that eight ranks fit two cores. What the layers compute besides is real, and tiny. Rank 0 prints JSON.

Memory is what malloc has given out on rank 0, with what torch, gloo and the engines keep, above what it had before the
model was made. It is looked at every 2 ms in a step that is not timed.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import json
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gmeta.sharding.hierarchy import HierarchicalCollectives, node_mesh
from gmeta.sharding.links import measure_links
from gmeta.sharding.paro import paro

ADAMW = partial(torch.optim.AdamW, lr=1e-4)


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward_s: float, backward_s: float) -> Tensor:
        ctx.backward_s = backward_s
        time.sleep(forward_s)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        time.sleep(ctx.backward_s)
        return grads[0], None, None


class Layer(nn.Module):
    """A decoder layer's weights, 12 width^2 of them, and its emulated time."""

    def __init__(self, width: int, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return some function of all weights, [rows, width]."""
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + self.out(torch.tanh(q * k) * v)
        x = x + self.down(torch.relu(self.up(x)))
        return _Sleep.apply(x, self.seconds / 3, self.seconds * 2 / 3)  # type: ignore[no-any-return]


class Model(nn.Module):
    def __init__(self, layers: int, width: int, micro_batch_s: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(width, micro_batch_s / layers) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """Return some loss."""
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


Step = Callable[[list[Tensor]], None]


@dataclass(frozen=True)
class Contender:
    """A training step on micro-batches, what waits until all of it is done, and what ends it."""

    step: Step
    settle: Callable[[], object] = lambda: None
    close: Callable[[], None] = lambda: None


def contender(name: str, model: Model, group_size: int) -> Contender:
    """Make a contender by its name: alone, a peer, or a strategy[:collectives[:KiB of a ring's chunks]]."""
    if name == "alone":
        return Contender(alone(model))
    if name in ("fsdp2", "fsdp2 late", "hsdp", "ddp"):
        return Contender(peer(name, model, group_size))
    strategy, collectives, chunk_kib = (*name.split(":"), "", "")[:3]
    engine = paro(model, ADAMW, node_mesh(group_size), strategy, collectives=collectives or "two_phase")  # type: ignore[arg-type]
    if chunk_kib:
        for hierarchy in (engine._streams.params_collectives, engine._streams.grads_collectives):
            hierarchy.rings.chunk_bytes = int(chunk_kib) << 10

    def step(micro_batches: list[Tensor]) -> None:
        for k, x in enumerate(micro_batches):
            engine.backward(engine(x) / len(micro_batches), last=k == len(micro_batches) - 1)
        engine.step(clip_norm=1.0)

    return Contender(step, lambda: engine.sent, engine.close)


def alone(model: Model) -> Step:
    """Compute on every rank by itself, without any communication: what computing takes on this machine."""
    optimizer = ADAMW(model.parameters())

    def step(micro_batches: list[Tensor]) -> None:
        for x in micro_batches:
            (model(x) / len(micro_batches)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def peer(name: str, model: Model, group_size: int) -> Step:
    """Make one of torch's own engines, with the accumulation that its documentation recommends.

    fsdp2 shards everything over all ranks and reduces gradients in every micro-batch; fsdp2 late keeps full gradients
    until the last one; hsdp shards inside nodes and sums between them once a step.
    """
    wrapped: nn.Module = model
    if name == "ddp":
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    else:
        mesh = peers_mesh(group_size if name == "hsdp" else dist.get_world_size())
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = ADAMW(wrapped.parameters())

    def step(micro_batches: list[Tensor]) -> None:
        for k, x in enumerate(micro_batches):
            last = k == len(micro_batches) - 1
            if name == "fsdp2 late":
                model.set_requires_gradient_sync(last)  # type: ignore[operator]
            if name == "hsdp":
                model.set_requires_all_reduce(last)  # type: ignore[operator]
            with wrapped.no_sync() if name == "ddp" and not last else nullcontext():  # type: ignore[operator]
                (wrapped(x) / len(micro_batches)).backward()
        nn.utils.clip_grad_norm_(wrapped.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


@functools.cache
def peers_mesh(shard: int) -> DeviceMesh:
    """Return a mesh that shards over so many ranks, and replicates beyond."""
    n = dist.get_world_size()
    if shard == n:
        return init_device_mesh("cpu", (n,), mesh_dim_names=("shard",))
    return init_device_mesh("cpu", (n // shard, shard), mesh_dim_names=("replicate", "shard"))


def timed(work: Callable[[], None]) -> float:
    dist.barrier()
    begun = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - begun


class _MallocInfo(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keep",
        )
    )


def bytes_in_use() -> int:
    """Return the bytes that malloc has given out in this process, in all of its threads (glibc 2.33 or later)."""
    info = mallinfo2()
    return int(info.uordblks + info.hblkhd)


mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = _MallocInfo


def measured_memory(before: int, work: Callable[[], None]) -> dict[str, int]:
    """Return the bytes above `before` that are in use at most during `work`, and those that stay after it."""
    seen, ended = [bytes_in_use()], threading.Event()

    def look() -> None:
        while not ended.wait(0.002):
            seen.append(bytes_in_use())

    looking = threading.Thread(target=look)
    looking.start()
    work()
    ended.set()
    looking.join()
    gc.collect()
    return {"peak_bytes": max(seen) - before, "kept_bytes": bytes_in_use() - before}


def train(order: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Time the steps of every contender in turn, round after round, in seconds, and look at the memory in the last.

    One contender lives at a time, and makes a step before it is timed: every process group of gloo wakes a thread a
    hundred times a second, and those of twenty contenders in eight processes would take a core.
    """
    draws = torch.Generator().manual_seed(dist.get_rank())
    for accumulation in order["accumulation"]:
        micro_batches = [torch.randn(2, order["width"], generator=draws) for _ in range(accumulation)]
        for turn in range(order["rounds"]):
            for name in order["contenders"]:
                gc.collect()
                before = bytes_in_use()
                torch.manual_seed(0)
                model = Model(order["layers"], order["width"], order["micro_batch_s"])
                made = contender(name, model, order["group_size"])
                run_steps(made, micro_batches, 1)  # makes state, records the order of units
                seconds = timed(partial(run_steps, made, micro_batches, order["steps"]))
                record = {"contender": name, "accumulation": accumulation, "seconds": seconds / order["steps"]}
                if turn == order["rounds"] - 1:  # what torch and gloo keep from their first use on is there by now
                    record |= measured_memory(before, partial(run_steps, made, micro_batches, 1))
                made.close()
                del model, made  # before the next one's memory is looked at
                yield record


def run_steps(made: Contender, micro_batches: list[Tensor], steps: int) -> None:
    """Make so many steps, and wait for what they have started."""
    for _ in range(steps):
        made.step(micro_batches)
    made.settle()


def rings(order: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the median seconds of all-gather, reduce-scatter and all-reduce, with every algorithm in turn."""
    device = torch.device("cpu")
    every = {
        name: HierarchicalCollectives.open(node_mesh(order["group_size"]), name, 300.0, device)
        for name in ("backend", "flat", "two_phase", "ho")
    }
    for nbytes in order["bytes"]:
        found: dict[tuple[str, str], list[float]] = {}
        buffer = torch.zeros(nbytes // 4)
        for turn in range(order["rounds"] + 1):
            for name, hierarchy in every.items():
                jobs = {
                    "all_gather": partial(hierarchy.gather, buffer, "G", "N"),
                    "reduce_scatter": partial(hierarchy.reduce_scatter, buffer, "N", "G"),
                    "all_reduce": partial(hierarchy.all_reduce, buffer, "N"),
                }
                for what, job in jobs.items():
                    seconds = timed(job)
                    if turn:
                        found.setdefault((what, name), []).append(seconds)
        for (what, name), times in found.items():
            yield {"what": what, "algorithm": name, "bytes": nbytes, "seconds": statistics.median(times)}


def links(order: dict[str, Any]) -> Iterator[dict[str, Any]]:
    device = torch.device("cpu")
    hierarchy = HierarchicalCollectives.open(node_mesh(order["group_size"]), "backend", 300.0, device)
    yield asdict(measure_links(hierarchy, device))


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    order = json.loads(sys.argv[1])
    dist.init_process_group("gloo")
    for record in {"train": train, "rings": rings, "links": links}[order["work"]](order):
        if dist.get_rank() == 0:
            print(json.dumps(record), flush=True)
    dist.barrier()


if __name__ == "__main__":
    main()
