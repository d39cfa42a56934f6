"""What a task adapts: names and globs resolved to embedded features and model parameters, and the inner rates."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from gmeta.meta.dropout import BatchKey
from gmeta.meta.losses import RowLoss
from gmeta.meta.modulation import Modulation, Modulator

EMBEDDINGS = "embeddings"


@dataclass(frozen=True, slots=True)
class Adapted:
    """The adapted set. Each module that owns adapted parameters has one inner rate; all embeddings share one."""

    features: tuple[str, ...]  # embedded features whose rows are private to a task
    parameters: tuple[str, ...]  # names of model parameters
    rates: tuple[str, ...]  # names of the rate groups: "embeddings" first if there, then module names

    def __bool__(self) -> bool:
        return bool(self.features or self.parameters)

    def rate_of(self, parameter: str) -> int:
        """Position of a parameter's inner rate."""
        return self.rates.index(rate_group(parameter))


@dataclass(frozen=True, slots=True)
class InnerLoop:
    """What both engines need to know of the inner loop. K steps; rates [K, len(adapted.rates)].

    `rate` is the number that all rates are, where they are not learned: the loss is scaled by it, not every gradient.
    """

    adapted: Adapted
    loss: RowLoss
    second_order: bool
    rates: Tensor
    dropout_key: BatchKey | None  # None: dropout is off
    rate: float | None = None
    recompute: bool = False  # inner steps of second order, in the backward pass, instead of keeping their graphs
    prior: float = 0.0  # pseudo-rows: a step follows (sum of row losses) / (rows + prior)
    modulator: Modulator | None = None  # None: every task starts from the shared weights
    modulation: Modulation = field(default_factory=dict)  # where the tasks at hand start

    def modulated(self, dense: Tensor, embedded: Mapping[str, Tensor], label: Tensor, mask: Tensor) -> InnerLoop:
        """The loop for tasks with this support. A loop of no steps takes nothing from it: it sees an empty one."""
        if self.modulator is None:
            return self
        return replace(self, modulation=self.modulator(dense, embedded, label, mask & (len(self.rates) > 0)))


def resolve(adapt: Sequence[str], model: nn.Module, embedding_features: Sequence[str]) -> Adapted:
    """The adapted set that `adapt` names.

    Words: `embeddings` (all features), `embeddings.<glob>`, `dense` (every parameter of the model), `head` (parameters
    of `model.head`), `decision` (of `model.decision_layers`); anything else is a glob over parameter names.
    ValueError, with the nearest name, for a pattern that matches nothing.
    """
    names = [name for name, _ in model.named_parameters()]
    features: set[str] = set()
    parameters: set[str] = set()
    for pattern in adapt:
        if pattern == EMBEDDINGS or pattern.startswith(EMBEDDINGS + "."):
            glob = pattern.partition(".")[2] or "*"
            found = [name for name in embedding_features if fnmatchcase(name, glob)]
            features.update(found)
        else:
            found = _matching(pattern, model, names)
            parameters.update(found)
        if not found:
            raise ValueError(_no_match(pattern, names, embedding_features))
    ordered = tuple(name for name in names if name in parameters)
    owners = dict.fromkeys(rate_group(name) for name in ordered)
    return Adapted(
        tuple(name for name in embedding_features if name in features),
        ordered,
        ((EMBEDDINGS,) if features else ()) + tuple(owners),
    )


def refuse_batch_norm(model: nn.Module) -> None:
    """ValueError if the model has batch norm: its statistics would mix tasks, padding, support and query."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"model has batch norm at {name!r}, which mixes tasks and is not supported: use layer norm instead"
            )


def rate_group(parameter: str) -> str:
    """The module that owns a parameter; parameters of the model itself share the group `parameters`."""
    return parameter.rpartition(".")[0] or "parameters"


def _matching(pattern: str, model: nn.Module, names: list[str]) -> list[str]:
    if pattern == "dense":
        return names
    if pattern == "head":
        return _owned(_declared(model, "head", "head"), names)
    if pattern == "decision":
        return [n for layer in _declared(model, "decision_layers", "decision") for n in _owned(layer, names)]
    return [name for name in names if fnmatchcase(name, pattern)]


def _declared(model: nn.Module, attribute: str, word: str) -> Any:
    value = getattr(model, attribute, None)
    if not value:
        raise ValueError(f"meta.adapt names {word!r}, but {type(model).__name__} declares no `{attribute}`")
    return value


def _owned(module: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(module + ".")]


def _no_match(pattern: str, names: list[str], features: Sequence[str]) -> str:
    known = ["embeddings", "dense", "head", "decision", *(f"{EMBEDDINGS}.{name}" for name in features), *names]
    nearest = difflib.get_close_matches(pattern, known, n=1, cutoff=0.0)
    return f"meta.adapt names {pattern!r}, which matches nothing; the nearest name is {nearest[0]!r}"
