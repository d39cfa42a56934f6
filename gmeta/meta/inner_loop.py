"""The inner loop: its settings, the names of what a task adapts, and the state of one pass through it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gmeta.core.errors import require
from gmeta.meta.losses import ExampleLoss, example_loss
from gmeta.meta.modulation import Modulated, Modulator
from gmeta.models.last_layer import BayesianLinear

EMBEDDINGS = "embeddings"
LAST_LAYER = "last_layer"


@dataclass(frozen=True, slots=True, kw_only=True)
class InnerLoop:
    """How a task adapts to its support. ValueError for a setting that cannot be."""

    adapt: Sequence[str]
    """What a task adapts: names that `resolve_adapted` understands. Empty: plain training."""
    order: Literal["first", "second"] = "second"
    """`second` differentiates the outer loss through the inner steps; `first` takes inner gradients as constants."""
    steps: int = 1
    """SGD steps on the support, K."""
    lr: float = 0.1
    """The inner rate, or its start when it is learned."""
    learn_lr: bool = False
    """Make the rates a parameter [K, groups]: one group for all embeddings, one for each module that adapts."""
    loss: str | None = None
    """The support's loss; None: the query's."""
    prior: float = 0.0
    """Pseudo-rows: a step follows (sum of a task's losses) / (its rows + prior), so that a small support moves less.
    A row of weight w counts as w rows, in both sums."""
    recompute: bool = False
    """Factored engine, second order: build an inner step's graph again in the backward pass instead of keeping it."""

    def __post_init__(self) -> None:
        require(not isinstance(self.adapt, str), "adapt", self.adapt, "must be a list of names")
        object.__setattr__(self, "adapt", tuple(self.adapt))
        require(self.order in ("first", "second"), "order", self.order, "must be first or second")
        require(self.steps >= 1, "steps", self.steps, "must be at least 1")
        require(self.lr >= 0, "lr", self.lr, "must not be negative")
        require(self.prior >= 0, "prior", self.prior, "must not be negative")
        require(
            not self.recompute or self.order == "second",
            "recompute",
            self.recompute,
            "only second order keeps graphs of inner steps; leave it out",
        )
        if self.loss is not None:
            example_loss(self.loss)


@dataclass(frozen=True, slots=True)
class Adapted:
    """The adapted set. Each module that owns adapted parameters has one inner rate; all embeddings share one."""

    features: tuple[str, ...]  # embedded features whose rows are private to a task
    parameters: tuple[str, ...]  # names of model parameters, one for each parameter
    rates: tuple[str, ...]  # names of the rate groups: "embeddings" first if there, then module names
    last_layer: str = ""  # name of the `BayesianLinear` that is solved for in closed form; empty: none

    def __bool__(self) -> bool:
        return bool(self.steps or self.last_layer)

    @property
    def steps(self) -> bool:
        """Whether anything takes SGD steps."""
        return bool(self.features or self.parameters)

    def rate_of(self, parameter: str) -> int:
        """Return the position of a parameter's inner rate. A module may be called "embeddings" too: the first one is
        not its.
        """
        return self.rates.index(rate_group(parameter), 1 if self.features else 0)


@dataclass(frozen=True, slots=True)
class InnerPass:
    """What both engines need to know while they adapt and score: the settings, resolved for one batch."""

    model: nn.Module
    adapted: Adapted
    loss: ExampleLoss  # of the support
    second_order: bool
    rates: Tensor  # [K, len(adapted.rates)]
    rate: float | None = None  # the number that all rates are, where they are not learned: it scales the loss
    prior: float = 0.0
    recompute: bool = False
    modulator: Modulator | None = None  # None: every task starts from the shared weights
    keys: Callable[[int, Tensor], Tensor] | None = (
        None  # (pass, positions [S]) -> dropout keys [T, S]; None: no dropout
    )

    def modulation(
        self, dense: Tensor, embedded: Mapping[str, Tensor], label: Tensor, mask: Tensor
    ) -> dict[str, Modulated]:
        """Return where tasks with this support start. With no inner steps it sees an empty support."""
        if self.modulator is None:
            return {}
        seen = mask if len(self.rates) else torch.zeros_like(mask)
        found: dict[str, Modulated] = self.modulator(dense, embedded, label, seen)
        return found


def resolve_adapted(adapt: Sequence[str], model: nn.Module, features: Sequence[str]) -> Adapted:
    """Return the adapted set that `adapt` names.

    Words: `embeddings` (all features), `embeddings.<glob>`, `dense` (every parameter of the model), `head` (parameters
    of `model.head`), `decision` (of `model.decision_layers`), `last_layer` (the model's `BayesianLinear`, in closed
    form, after the steps of all else, which leave it alone); anything else is a glob over parameter names. A
    parameter that has several names, because weights are tied or a module is used twice, answers to each of them and
    adapts as one, under the first. Frozen parameters (`requires_grad` False) do not adapt, nor do those of modules that
    `model.unadapted` names.
    ValueError for a pattern that matches nothing, with the nearest name, or frozen parameters only.
    """
    first: dict[int, str] = {}
    names = {
        name: first.setdefault(id(parameter), name)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    unadapted = tuple(f"{name}." for name in getattr(model, "unadapted", ()))
    trained = {name for name, p in model.named_parameters() if p.requires_grad and not name.startswith(unadapted)}
    private: set[str] = set()
    parameters: set[str] = set()
    solved = ""
    for pattern in adapt:
        if pattern == LAST_LAYER:
            solved = _last_layer(model)
            continue
        if pattern == EMBEDDINGS or pattern.startswith(EMBEDDINGS + "."):
            glob = pattern.partition(".")[2] or "*"
            found = [name for name in features if fnmatchcase(name, glob)]
            private.update(found)
        else:
            found = [names[name] for name in _matching(pattern, model, list(names))]
            if found and trained.isdisjoint(found):
                raise ValueError(
                    f"meta.adapt names {pattern!r}, but {found[0]!r} is frozen (requires_grad is False) or shared by "
                    "all tasks, and so is all else that the name matches: leave it out, or let it train"
                )
            parameters.update(trained.intersection(found))
        if not found:
            raise ValueError(_no_match(pattern, list(names), features))
    parameters -= {name for name in parameters if solved and name.startswith(f"{solved}.")}
    ordered = tuple(name for name in names if name in parameters)
    owners = dict.fromkeys(rate_group(name) for name in ordered)
    return Adapted(
        tuple(name for name in features if name in private),
        ordered,
        ((EMBEDDINGS,) if private else ()) + tuple(owners),
        solved,
    )


def rate_group(parameter: str) -> str:
    """Return the module that owns a parameter; parameters of the model itself share the group `parameters`."""
    return parameter.rpartition(".")[0] or "parameters"


def _matching(pattern: str, model: nn.Module, names: list[str]) -> list[str]:
    if pattern == "dense":
        return names
    if pattern == "head":
        return _owned(_declared(model, "head", "head"), names)
    if pattern == "decision":
        return [n for layer in _declared(model, "decision_layers", "decision") for n in _owned(layer, names)]
    return [name for name in names if fnmatchcase(name, pattern)]


def _last_layer(model: nn.Module) -> str:
    name = str(_declared(model, LAST_LAYER, LAST_LAYER))
    layer = dict(model.named_modules()).get(name)
    if not isinstance(layer, BayesianLinear):
        found = "no module" if layer is None else f"a {type(layer).__name__}"
        raise ValueError(
            f"{type(model).__name__}.last_layer names {name!r}, which is {found}: it must be a BayesianLinear "
            "(gmeta.models.last_layer)"
        )
    return name


def _declared(model: nn.Module, attribute: str, word: str) -> Any:
    value = getattr(model, attribute, None)
    if not value:
        cure = ": take neural_linear, or bahe with model.args.taste" if word == "last_layer" else ""
        raise ValueError(f"meta.adapt names {word!r}, but {type(model).__name__} declares no `{attribute}`{cure}")
    return value


def _owned(module: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(module + ".")]


def _no_match(pattern: str, names: list[str], features: Sequence[str]) -> str:
    known = [
        "embeddings",
        "dense",
        "head",
        "decision",
        LAST_LAYER,
        *(f"{EMBEDDINGS}.{name}" for name in features),
        *names,
    ]
    nearest = difflib.get_close_matches(pattern, known, n=1, cutoff=0.0)
    return f"meta.adapt names {pattern!r}, which matches nothing; the nearest name is {nearest[0]!r}"
