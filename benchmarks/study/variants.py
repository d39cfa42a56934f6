"""The study's switches by name, and the parts of the trainer that they stand for.

    Trainer(config, parts=parts("separate", "central"))

| switch | what happens instead of the product's way |
|---|---|
| separate | the rows of support and query are fetched and returned each on their own |
| copies | every lookup asks for its row: nothing is deduplicated |
| ids_in_step | ids travel in the step, not ahead of it |
| central | dense gradients go to rank 0, which adds them and sends the sum back |
| no_overlap | dense gradients are summed after the row gradients have gone home |
| random_reads | windows are drawn task by task, not from blocks of consecutive tasks |
| no_size_buckets | batches are filled without regard to the sizes of tasks |
| nothing_ahead | reading, index work and the exchange of ids wait for the step: no thread prepares batches |
"""

from __future__ import annotations

from functools import partial
from typing import Any

from gmeta.embedding.exchange import Exchange, RowExchange
from gmeta.training.build import Parts
from study.exchange import IdsInStep, NaiveExchange
from study.outer_reduce import CentralReduce, NoOverlap

LOADER: dict[str, dict[str, Any]] = {
    "random_reads": {"sequential": False},
    "no_size_buckets": {"size_buckets": False},
    "nothing_ahead": {"prefetch": 0},
}
SWITCHES = ("separate", "copies", "ids_in_step", "central", "no_overlap", *LOADER)


def parts(*switches: str) -> Parts:
    """Return the trainer's parts; what no switch names is the product's.

    ValueError names a switch that does not exist.
    """
    if unknown := [name for name in switches if name not in SWITCHES]:
        raise ValueError(f"the study has no switch {unknown[0]!r}: it has {', '.join(SWITCHES)}")
    found: dict[str, Any] = {}
    if {"separate", "copies", "ids_in_step"} & set(switches):
        found["exchange"] = partial(
            _exchange, separate="separate" in switches, dedup="copies" not in switches, late="ids_in_step" in switches
        )
    if "central" in switches:
        found["outer_reduce"] = partial(CentralReduce, overlap="no_overlap" not in switches)
    elif "no_overlap" in switches:
        found["outer_reduce"] = NoOverlap
    if arguments := {key: value for name in switches for key, value in LOADER.get(name, {}).items()}:
        found["loader_arguments"] = arguments
    return Parts(**found)


def _exchange(*given: Any, separate: bool, dedup: bool, late: bool) -> Exchange:
    naive = separate or not dedup
    exchange: Any = NaiveExchange(*given, separate=separate, dedup=dedup) if naive else RowExchange(*given)
    return IdsInStep(exchange) if late else exchange
