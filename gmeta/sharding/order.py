"""The order in which ranks exchange, which must be the same on all of them.

Gradients are reduced in an agreed order (`Paro.backward`), so ranks may use different units. Parameters that are
gathered just in time follow each rank's own forward and backward pass: there the ranks compare what they are about to
gather, before any of it is sent.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from gmeta.sharding.hierarchy import HierarchicalCollectives
from gmeta.sharding.strategy import ShardScope
from gmeta.sharding.streams import CommStream, Handle

T = TypeVar("T")


@dataclass
class GatherCheck:
    """Compares what ranks are about to gather. It has process groups and a stream of its own, so that comparing one
    unit takes place while another one is sent."""

    stream: CommStream  # on the CPU
    collectives: HierarchicalCollectives  # on the CPU, too
    names: list[str] = field(default_factory=list)  # the first parameter of each flat parameter, in the module's order

    def register(self, name: str) -> int:
        """Return the number of another flat parameter, whose first parameter has that name."""
        self.names.append(name)
        return len(self.names) - 1

    def start(self, number: int, scope: ShardScope) -> Handle:
        """Start to compare the number of what this rank gathers from `scope`. Waiting raises RuntimeError with both
        names where another rank gathers something else; then no rank gathers anything any more.
        """

        def job() -> None:
            least, most = self.collectives.extremes(number, scope)
            if least != most:
                other = self.names[most if least == number else least]
                raise RuntimeError(
                    f"rank {self.collectives.rank} gathers {self.names[number]} while another rank gathers {other}: "
                    "ranks that share parameters must call the same units in the same order. Replicate the parameters "
                    'of units that each rank uses as it likes: sharding={"": "IIG", "heads": "NIG"}'
                )

        return self.stream.submit(job)

    def same(self, names: Iterable[str], scope: ShardScope) -> bool:
        """Return whether all ranks that share parameters at `scope` give the same names. Collective."""
        number, found = zlib.crc32("\n".join(names).encode()), list[int]()
        self.stream.submit(lambda: found.extend(self.collectives.extremes(number, scope))).wait()
        return found[0] == found[1]

    def close(self) -> None:
        """Wait for all jobs, end the thread and leave the process groups."""
        self.stream.submit(lambda: None).wait()
        self.stream.close()
        self.collectives.close()


def reordered(items: Sequence[T], places: Sequence[float]) -> list[T]:
    """Return `items` in the order of their `places`. An item whose place is 0 stays where it is."""
    moved = iter([item for place, item in sorted(zip(places, items, strict=True), key=lambda pair: pair[0]) if place])
    return [next(moved) if place else item for item, place in zip(items, places, strict=True)]


def leaves_of(loss: Tensor) -> tuple[set[Tensor], bool]:
    """Return the leaves that get a gradient from `loss`, and whether a function written in Python may hide others, as a
    reentrant checkpoint does.
    """
    if loss.grad_fn is None:
        return {loss}, False
    seen: set[Any] = {loss.grad_fn}
    waiting: list[Any] = [loss.grad_fn]
    leaves: set[Tensor] = set()
    hides = False
    while waiting:
        node = waiting.pop()
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            hides = hides or type(node).__name__ != "LeaveBackward"
        elif (leaf := getattr(node, "variable", None)) is not None:
            leaves.add(leaf)
        for other, _ in node.next_functions:
            if other is not None and other not in seen:
                seen.add(other)
                waiting.append(other)
    return leaves, hides
