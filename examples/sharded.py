"""Sharded dense layers in a plain PyTorch loop: what a rank holds and sends, and that it learns.

    torchrun --standalone --nproc_per_node 4 examples/sharded.py IIG     # or any of `gmeta plan`'s, or auto

A node has two ranks here. A checkpoint is written half-way, and loaded again at the end, as after a crash.
"""

from __future__ import annotations

import os
import sys
import tempfile
from functools import partial

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from gmeta.sharding.checkpoint import PartitionWriter
from gmeta.sharding.engine import Paro
from gmeta.sharding.hierarchy import node_mesh
from gmeta.sharding.paro import paro


def make_model() -> nn.Module:
    """Return a small tower, the same on every rank."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(6)]
    return nn.Sequential(nn.Linear(8, 64), *layers, nn.Linear(64, 1))


def train(engine: Paro, steps: int, rank: int) -> float:
    """Make `steps` of two micro-batches, and return the last loss."""
    draws = torch.Generator().manual_seed(rank)
    loss = torch.zeros(())
    for _ in range(steps):
        for last in (False, True):
            x = torch.randn(32, 8, generator=draws)
            loss = nn.functional.mse_loss(engine(x)[:, 0], target(x))
            engine.backward(loss / 2, last=last)
        engine.step(clip_norm=1.0)
    return float(loss.detach())


def target(x: Tensor) -> Tensor:
    """Return the function to learn."""
    return torch.sin(x.sum(1))


def main() -> None:
    """Train, save and go on; then load and go on again."""
    strategy = sys.argv[1] if len(sys.argv) > 1 else "IIG"
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mesh = node_mesh(2) if world_size > 1 else None
    engine = paro(make_model(), partial(torch.optim.AdamW, lr=3e-3), mesh, strategy)

    first = train(engine, 1, rank)
    folder = [tempfile.mkdtemp()]
    if world_size > 1:
        dist.broadcast_object_list(folder)
    train(engine, 25, rank)
    dcp.save(engine.state(), storage_writer=PartitionWriter(folder[0]))
    before = train(engine, 25, rank)
    dcp.load(engine.state(), storage_reader=HuggingFaceStorageReader(folder[0]))
    engine.loaded()
    again = train(engine, 25, rank)

    if rank == 0:
        held, sent = engine.memory_bytes(), engine.sent
        unsharded = 4 * sum(shape.numel() for shape in (p.shape for p in make_model().parameters()))
        print(f"strategies {sorted(set(engine.strategies.values()))} on {world_size} rank(s)")
        print(f"a rank holds {sum(held.values()):,} bytes for {unsharded:,} bytes of weights: {held}")
        print(f"and sent {sent.intra:,.0f} to its node, {sent.inter:,.0f} to others")
        print(f"loss {first:.3f} -> {before:.3f}; from the checkpoint again: {again:.3f}")
    engine.close()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
