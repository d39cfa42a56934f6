"""What every process of a run knows: the config, its place, who holds which dense parameter, and the run's length."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from gmeta.config.train import TrainConfig
from gmeta.data.order import num_batches
from gmeta.data.schema import PackSchema
from gmeta.parallel.mesh import Mesh
from gmeta.recommender.build import build_system
from gmeta.recommender.system import System
from ps_baseline.wire import Place

STATS = 3
"""Numbers that a push carries, float64: loss, support loss (both over the whole batch's tasks), examples."""
ANSWER = 5
"""Numbers that a push is answered with, float64: the three sums over workers, gradient norm, dense learning rate."""


@dataclass(frozen=True)
class Session:
    """A run, seen from one process."""

    config: TrainConfig
    place: Place
    system: System  # model and learner; a server's tables are its rows, a worker's only tell where rows are
    shards: list[list[str]]  # names of the dense parameters that each server holds
    total_steps: int

    def parameters(self, server: int) -> list[torch.nn.Parameter]:
        """Return the dense parameters of one server, in the order in which their numbers travel."""
        named = dict(self.system.learner.named_parameters())
        return [named[name] for name in self.shards[server]]


def open_session(config: TrainConfig, schema: PackSchema, num_tasks: int, place: Place) -> Session:
    """Build what this process needs; ValueError for what the baseline cannot do. Not safe in several threads at once.

    The initial weights are gmeta's: dense ones and rows are functions of the seed alone.
    """
    _require_supported(config)
    mesh = Mesh(rank=max(0, place.server), world_size=place.servers, local_world_size=place.servers)
    meta = replace(config.meta, engine="reference")
    system = build_system(replace(config, meta=meta), schema, mesh)
    system.learner.train()
    sizes = {name: p.numel() for name, p in system.learner.named_parameters()}
    total = config.schedule.epochs * num_batches(num_tasks, config.loader.tasks_per_batch)
    if config.schedule.max_steps:
        total = min(total, config.schedule.max_steps)
    return Session(config, place, system, spread(sizes, place.servers), total)


def _require_supported(config: TrainConfig) -> None:
    found = {
        "resume": (config.resume, False, "the baseline saves only at its end"),
        "precision": (config.precision == "bf16", False, "the baseline computes in float32 or float64"),
        "device": (config.device == "cuda", False, "the baseline's workers are CPUs"),
    }
    for key, (value, allowed, rule) in found.items():
        if value != allowed:
            raise ValueError(f"{key} is {getattr(config, key, value)!r}: {rule}")


def spread(sizes: dict[str, int], servers: int) -> list[list[str]]:
    """Return names dealt out over servers, the largest first, each to the server with the least so far."""
    shards: list[list[str]] = [[] for _ in range(servers)]
    load = [0] * servers
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        server = load.index(min(load))
        shards[server].append(name)
        load[server] += sizes[name]
    return shards


@dataclass(frozen=True)
class Flat:
    """Parameters and their gradients, as views of two flat buffers, so that they travel without copies."""

    values: Tensor  # [n]
    grads: Tensor  # [n]


def flatten(parameters: list[torch.nn.Parameter], dtype: torch.dtype) -> Flat:
    """Move parameters, in place, into flat buffers; their gradients start at 0."""
    size = sum(p.numel() for p in parameters)
    flat = Flat(torch.empty(size, dtype=dtype), torch.zeros(size, dtype=dtype))
    start = 0
    for p in parameters:
        part = slice(start, start + p.numel())
        flat.values[part] = p.detach().reshape(-1)
        p.data = flat.values[part].view_as(p)
        p.grad = flat.grads[part].view_as(p)
        start = part.stop
    return flat


def tables_state(session: Session) -> list[Tensor]:
    """Return a server's rows and their optimizer state, in the order in which `STATE` sends them."""
    return [cast(Tensor, value) for _, value in sorted(session.system.tables.state_dict().items())]
