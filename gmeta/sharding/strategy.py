"""Where parameters, gradients and optimizer state lie: PaRO's three levels, its rule, and what each choice costs.

A placement is three letters, for parameters, gradients and optimizer state (arXiv 2310.06003): N, replicated on all
ranks; I, sharded inside a group of fast links and replicated across groups; G, sharded over all ranks. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Literal

Level = Literal["N", "I", "G"]
LEVELS: tuple[Level, ...] = ("N", "I", "G")
RULE = "the optimizer state (third letter) must be sharded at least as finely as parameters and gradients (N < I < G)"


@dataclass(frozen=True)
class Groups:
    """How ranks are grouped: rank r is place r % size of group r // size."""

    size: int  # ranks of one group, joined by fast links (m)
    count: int = 1  # groups

    def __post_init__(self) -> None:
        if self.size < 1 or self.count < 1:
            raise ValueError(f"{self.count} groups of {self.size} ranks: both must be at least 1")

    @property
    def world_size(self) -> int:
        """All ranks (n)."""
        return self.size * self.count

    def divisor(self, level: Level) -> int:
        """In how many parts something is cut at a level."""
        return {"N": 1, "I": self.size, "G": self.world_size}[level]


@dataclass(frozen=True)
class Placement:
    """One of the 14 placements; `Placement.parse` makes it from its name."""

    params: Level
    grads: Level
    state: Level  # of the optimizer

    def __post_init__(self) -> None:
        for letter in (self.params, self.grads, self.state):
            if letter not in LEVELS:
                raise ValueError(f"placement {self}: {letter!r} is no level, it must be N, I or G")
        if not _allowed(self.params, self.grads, self.state):
            raise ValueError(f"placement {self}: {RULE}; nearest are {', '.join(nearest(str(self)))}")

    @staticmethod
    def parse(name: str) -> Placement:
        """From three letters, such as IIG. ValueError tells the rule, and the nearest placements that keep it."""
        if not isinstance(name, str) or len(name) != 3 or set(name) - set(LEVELS):
            raise ValueError(
                f"placement is {name!r}: it must be three of the letters N, I and G, for parameters, gradients and "
                f"optimizer state, one of {', '.join(PLACEMENTS)}; or auto, for the planner to choose"
            )
        params, grads, state = (LEVELS[LEVELS.index(letter)] for letter in name)
        return Placement(params, grads, state)

    def __str__(self) -> str:
        return f"{self.params}{self.grads}{self.state}"


def _allowed(params: Level, grads: Level, state: Level) -> bool:
    return LEVELS.index(state) >= max(LEVELS.index(params), LEVELS.index(grads))


def _names() -> Iterator[str]:
    for params, grads, state in product(LEVELS, repeat=3):
        if _allowed(params, grads, state):
            yield f"{params}{grads}{state}"


PLACEMENTS: tuple[str, ...] = tuple(_names())
"""Names of the 14 placements that keep the rule."""


def nearest(name: str) -> list[str]:
    """The valid placements that differ from `name` in the fewest letters."""
    distance = {valid: sum(a != b for a, b in zip(valid, name, strict=True)) for valid in PLACEMENTS}
    return [valid for valid in PLACEMENTS if distance[valid] == min(distance.values())]


@dataclass(frozen=True)
class Bytes:
    """Bytes of one number. The defaults are mixed-precision Adam's: bf16, and fp32 master weights and two moments."""

    param: int = 2
    grad: int = 2
    state: int = 12


def memory_bytes(
    placement: Placement, groups: Groups, params: int, trainable: int | None = None, sizes: Bytes | None = None
) -> dict[str, float]:
    """Bytes a rank holds all the time, by what they are; activations and what is gathered for a moment not counted.

    2 P / d(p) + 2 P' / d(g) + 12 P' / d(os) in the paper's setting, P parameters of which P' are trained.
    """
    sizes = sizes or Bytes()
    trainable = params if trainable is None else trainable
    return {
        "params": sizes.param * params / groups.divisor(placement.params),
        "grads": sizes.grad * trainable / groups.divisor(placement.grads),
        "state": sizes.state * trainable / groups.divisor(placement.state),
    }


@dataclass(frozen=True)
class Sent:
    """Bytes that a whole group sends in one optimizer step, all its ranks together."""

    intra: float = 0.0  # to ranks of the same group
    inter: float = 0.0  # to other groups

    def __add__(self, other: Sent) -> Sent:
        return Sent(self.intra + other.intra, self.inter + other.inter)

    def __mul__(self, times: float) -> Sent:
        return Sent(self.intra * times, self.inter * times)


def gathered(amount: float, low: Level, high: Level, groups: Groups, *, flat: bool) -> Sent:
    """What a group sends to turn parts at level `low` into parts at the coarser `high`, of `amount` bytes in all.

    The same as for the reduce-scatter that goes the other way. `flat` is a ring of all ranks in order; otherwise groups
    exchange first, each rank with its counterparts, and then every group within itself.
    """
    m, ng = groups.size, groups.count
    if low == high:
        return Sent()
    if (low, high) == ("I", "N"):  # m rings of one group: each rank sends (m - 1) / m of it
        return Sent(intra=amount * (m - 1))
    if (low, high) == ("G", "I"):  # each rank holds 1 / m of it at the end, and sends (ng - 1) / ng of that
        return Sent(inter=amount * (ng - 1) / ng)
    if flat:
        n = groups.world_size
        ring = amount * (n - 1) / n  # what each rank sends to the next one; the last of a group, to another group
        return Sent(ring * (m - 1), ring) if ng > 1 else Sent(ring * m, 0.0)
    return gathered(amount, "G", "I", groups, flat=flat) + gathered(amount, "I", "N", groups, flat=flat)


def sent_bytes(
    placement: Placement,
    groups: Groups,
    *,
    params: float,
    updated: float,
    grads: float,
    accumulation: int = 1,
    gathers: int = 2,
    flat: bool = True,
) -> Sent:
    """What a group sends in one optimizer step of `accumulation` micro-batches, its ranks together.

    In bytes, padding included: `params` of all parameters, `updated` of those that are trained, both as they are
    gathered, `grads` of all gradients as they are reduced. `gathers` times a micro-batch parameters are gathered: in
    forward and in backward.
    """
    p, g, state = placement.params, placement.grads, placement.state
    every = gathered(params, p, "N", groups, flat=flat) * gathers + gathered(grads, g, "N", groups, flat=flat)
    once = _synchronised(g, state, grads, groups, flat=flat) + gathered(updated, state, p, groups, flat=flat)
    return every * accumulation + once


def _synchronised(grads: Level, state: Level, amount: float, groups: Groups, *, flat: bool) -> Sent:
    """Of the gradients, once a step: summed over all ranks, and cut down to the optimizer's parts."""
    m, ng = groups.size, groups.count
    across = Sent(inter=2 * amount * (ng - 1) / ng)  # all-reduce between groups, 1 / m of it on each rank
    if (grads, state) == ("N", "N"):
        n = groups.world_size
        ring = 2 * amount * (n - 1) / n
        if not flat:
            return gathered(amount, "I", "N", groups, flat=False) * 2 + across
        return Sent(ring * (m - 1), ring) if ng > 1 else Sent(ring * m, 0.0)
    if state == "I":
        return across if grads == "I" else gathered(amount, "I", "N", groups, flat=flat) + across
    return gathered(amount, state, grads, groups, flat=flat)
