"""Where parameters, gradients and optimizer state lie: PaRO's three scopes, its rule, and what each strategy costs.

A sharding strategy is three letters, for parameters, gradients and optimizer state (arXiv 2310.06003): N keeps a
replica on every rank; I shards inside a node, whose ranks are joined by fast links, and replicates across nodes; G
shards over all ranks. Everything here is pure.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Literal

ShardScope = Literal["N", "I", "G"]
"""Over which ranks something is sharded: over none, over those of a node, or over all."""
SCOPES: tuple[ShardScope, ...] = ("N", "I", "G")
RULE = "the optimizer state (third letter) must be sharded at least as finely as parameters and gradients (N < I < G)"


@dataclass(frozen=True)
class NodeLayout:
    """How ranks are spread over nodes: rank r is local rank r % node_size of node r // node_size."""

    node_size: int  # ranks of one node, joined by fast links (m in the paper)
    num_nodes: int = 1

    def __post_init__(self) -> None:
        if self.node_size < 1 or self.num_nodes < 1:
            raise ValueError(f"{self.num_nodes} nodes of {self.node_size} ranks: both must be at least 1")

    @property
    def world_size(self) -> int:
        """Return the number of all ranks (n in the paper)."""
        return self.node_size * self.num_nodes

    def num_partitions(self, scope: ShardScope) -> int:
        """Return the number of partitions into which a tensor is split at a scope."""
        return {"N": 1, "I": self.node_size, "G": self.world_size}[scope]


@dataclass(frozen=True)
class ShardingStrategy:
    """One of the 14 strategies; `ShardingStrategy.parse` makes it from its name."""

    params: ShardScope
    grads: ShardScope
    state: ShardScope  # of the optimizer

    def __post_init__(self) -> None:
        for letter in (self.params, self.grads, self.state):
            if letter not in SCOPES:
                raise ValueError(f"sharding {self}: {letter!r} is no scope, it must be N, I or G")
        if not _allowed(self.params, self.grads, self.state):
            raise ValueError(f"sharding {self}: {RULE}; nearest are {', '.join(nearest_strategies(str(self)))}")

    @staticmethod
    def parse(name: str) -> ShardingStrategy:
        """Parse three letters, such as IIG. ValueError tells the rule, and the nearest strategies that keep it."""
        if not isinstance(name, str) or len(name) != 3 or set(name) - set(SCOPES):
            raise ValueError(
                f"sharding is {name!r}: it must be three of the letters N, I and G, for parameters, gradients and "
                f"optimizer state, one of {', '.join(STRATEGIES)}; or auto, for the planner to choose"
            )
        params, grads, state = (SCOPES[SCOPES.index(letter)] for letter in name)
        return ShardingStrategy(params, grads, state)

    def __str__(self) -> str:
        return f"{self.params}{self.grads}{self.state}"


def _allowed(params: ShardScope, grads: ShardScope, state: ShardScope) -> bool:
    return SCOPES.index(state) >= max(SCOPES.index(params), SCOPES.index(grads))


def _names() -> Iterator[str]:
    for params, grads, state in product(SCOPES, repeat=3):
        if _allowed(params, grads, state):
            yield f"{params}{grads}{state}"


STRATEGIES: tuple[str, ...] = tuple(_names())
"""The names of the 14 strategies that keep the rule."""


def nearest_strategies(name: str) -> list[str]:
    """Return the valid strategies that differ from `name` in the fewest letters."""
    distance = {valid: sum(a != b for a, b in zip(valid, name, strict=True)) for valid in STRATEGIES}
    return [valid for valid in STRATEGIES if distance[valid] == min(distance.values())]


@dataclass(frozen=True)
class ElementBytes:
    """Bytes of one element. The defaults are mixed-precision Adam's: bf16, with fp32 master weights and two moments."""

    param: int = 2
    grad: int = 2
    state: float = 12


def memory_bytes(
    strategy: ShardingStrategy,
    layout: NodeLayout,
    params: int,
    trainable: int | None = None,
    sizes: ElementBytes | None = None,
) -> dict[str, float]:
    """Return the bytes that a rank holds all the time, by kind; activations and gathered copies are not counted.

    In the paper's setting this is 2 P / d(p) + 2 P' / d(g) + 12 P' / d(os), with P parameters of which P' are trained.
    """
    sizes = sizes or ElementBytes()
    trainable = params if trainable is None else trainable
    return {
        "params": sizes.param * params / layout.num_partitions(strategy.params),
        "grads": sizes.grad * trainable / layout.num_partitions(strategy.grads),
        "state": sizes.state * trainable / layout.num_partitions(strategy.state),
    }


@dataclass(frozen=True)
class NodeTraffic:
    """Bytes that the ranks of one node send together in one optimizer step."""

    intra: float = 0.0  # to ranks of the same node
    inter: float = 0.0  # to other nodes

    def __add__(self, other: NodeTraffic) -> NodeTraffic:
        return NodeTraffic(self.intra + other.intra, self.inter + other.inter)

    def __mul__(self, times: float) -> NodeTraffic:
        return NodeTraffic(self.intra * times, self.inter * times)


def gather_traffic(
    amount: float, finer: ShardScope, coarser: ShardScope, layout: NodeLayout, *, flat: bool
) -> NodeTraffic:
    """Return what a node sends to gather partitions of scope `finer` into those of scope `coarser`, `amount` bytes in
    all.

    The reduce-scatter that goes the other way sends the same. With `flat` there is one ring of all ranks in order.
    Otherwise each rank first exchanges with its counterparts in other nodes, and then every node within itself.
    """
    m, ng = layout.node_size, layout.num_nodes
    if finer == coarser:
        return NodeTraffic()
    if (finer, coarser) == ("I", "N"):  # m ranks in a ring: each sends (m - 1) / m of it
        return NodeTraffic(intra=amount * (m - 1))
    if (finer, coarser) == ("G", "I"):  # each rank holds 1 / m of it at the end, and sends (ng - 1) / ng of that
        return NodeTraffic(inter=amount * (ng - 1) / ng)
    if flat:
        n = layout.world_size
        ring = amount * (n - 1) / n  # what each rank sends to the next one; a node's last rank sends to another node
        return NodeTraffic(ring * (m - 1), ring) if ng > 1 else NodeTraffic(ring * m, 0.0)
    return gather_traffic(amount, "G", "I", layout, flat=flat) + gather_traffic(amount, "I", "N", layout, flat=flat)


def sent_bytes(
    strategy: ShardingStrategy,
    layout: NodeLayout,
    *,
    params: float,
    updated: float,
    grads: float,
    accumulation: int = 1,
    gathers: int = 2,
    flat: bool = True,
) -> NodeTraffic:
    """Return what the ranks of a node send together in one optimizer step of `accumulation` micro-batches.

    Amounts are bytes, padding included: `params` of all parameters and `updated` of those that are trained, both as
    they are gathered, and `grads` of all gradients as they are reduced. `gathers` says how often parameters are
    gathered in a micro-batch: twice, for forward and backward.
    """
    p, g, state = strategy.params, strategy.grads, strategy.state
    gathered = gather_traffic(params, p, "N", layout, flat=flat) * gathers
    per_micro_batch = gathered + gather_traffic(grads, g, "N", layout, flat=flat)
    published = gather_traffic(updated, state, p, layout, flat=flat)
    return per_micro_batch * accumulation + _sync_traffic(g, state, grads, layout, flat=flat) + published


def _sync_traffic(
    grads: ShardScope, state: ShardScope, amount: float, layout: NodeLayout, *, flat: bool
) -> NodeTraffic:
    """Return what sums gradients over all ranks once a step, and reduces them to the optimizer's partitions."""
    if grads == state:  # an all-reduce: a reduce-scatter and an all-gather, over the ranks that hold the same part
        return gather_traffic(amount, "G", grads, layout, flat=flat) * 2
    if state == "I":
        return (
            gather_traffic(amount, "I", "N", layout, flat=flat)
            + gather_traffic(amount, "G", "I", layout, flat=flat) * 2
        )
    return gather_traffic(amount, state, grads, layout, flat=flat)
