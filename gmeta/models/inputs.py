"""What a model is told about its inputs when it is made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gmeta.core.errors import nearest, require
from gmeta.data.schema import PackSchema


@dataclass(frozen=True)
class InputSpec:
    """The inputs of `model(dense, embedded) -> logits [...]`, with any leading dimensions.

    `embedded[name]` is [..., d] for each feature, and `dense` is [..., F].
    """

    features: Mapping[str, int]  # name -> d, in the order of the pack
    numeric: tuple[str, ...]  # names of the F columns of `dense`, standardised
    base_rate: float  # the logit that predicts the mean training label
    item: str | None = None  # the feature that is the item's id, where the model reads it
    scenario: str | None = None  # the feature that the schema calls the scenario, where the model reads it
    base_rates: tuple[float, ...] = ()  # of each of several labels, of which the model gives a logit each: [..., K]

    @property
    def num_labels(self) -> int:
        """Return K, the number of logits of an example; with 1 they have no dimension of their own."""
        return len(self.base_rates) or 1

    @property
    def num_numeric(self) -> int:
        """Return F, the number of numeric columns."""
        return len(self.numeric)

    @property
    def embedding_dim(self) -> int:
        """Return d, where all features have the same width. Raises ValueError where they differ."""
        (dim, *others) = set(self.features.values())
        if others:
            raise ValueError(f"the features have widths {dict(self.features)}: this model needs one width")
        return dim

    @property
    def width(self) -> int:
        """Return the number of inputs of one example: all embeddings and the numeric columns."""
        return sum(self.features.values()) + len(self.numeric)


def input_spec(schema: PackSchema, *, features: Sequence[str], numeric: bool, embedding_dim: int) -> InputSpec:
    """Return the inputs that a pack offers; empty `features` means all.

    Raises ValueError for a feature that the pack lacks (with the nearest) or that is named twice, or without any.
    """
    known = [feature.name for feature in schema.features]
    for name in features:
        if name not in known:
            raise ValueError(f"model.features names {name!r}, which is not in the pack: {nearest(name, known)}")
        if list(features).count(name) > 1:
            raise ValueError(f"model.features names {name!r} twice")
    chosen = list(features) or known
    if not chosen:
        raise ValueError("the model has no categorical feature: set model.features, or prepare a pack that has some")
    names = tuple(column.name for column in schema.numeric) if numeric else ()
    item, scenario = (name if name in chosen else None for name in (schema.item, schema.scenario))
    rates = tuple(base_rate_of(label.mean, binary=label.loss == "bce") for label in schema.labels)
    return InputSpec(dict.fromkeys(chosen, embedding_dim), names, base_rate(schema), item, scenario, rates)


def usual_features(schema: PackSchema) -> list[str]:
    """Return the features that a model reads where none are named: all but the task's own key.

    New tasks are what a model adapts to, and their keys are unknown to it. The key is read where nothing else is there.
    """
    names = [feature.name for feature in schema.features]
    return [name for name in names if name != schema.task] or names


def base_rate(schema: PackSchema) -> float:
    """Return the logit that predicts the mean training label, of several labels the first."""
    return base_rate_of(schema.label_mean, binary=schema.binary_label)


def base_rate_of(mean: float, *, binary: bool) -> float:
    """Return the logit that predicts a mean label: the mean itself, or the log-odds of 0/1 labels. Where all
    of these are 1, a thousandth are taken to be 0; a mean of 0 is one that a pack does not record.
    """
    if not binary:
        return mean
    mean = 0.999 if mean == 1 else mean
    return math.log(mean / (1 - mean)) if mean else 0.0


def require_one_label(inputs: InputSpec, model: str) -> None:
    """Raise ValueError where there are several labels, for a model that predicts one."""
    if inputs.num_labels > 1:
        raise ValueError(
            f"{model} predicts one label, and the pack has {inputs.num_labels}: use melu, dlrm, or a model of your own "
            "that returns a logit for each"
        )


def output_layer(width: int, inputs: InputSpec) -> nn.Linear:
    """Return a layer from hidden units to the logits of all labels, [..., K], that starts at their base rates."""
    layer = nn.Linear(width, inputs.num_labels)
    with torch.no_grad():
        layer.bias.copy_(torch.tensor(inputs.base_rates or [inputs.base_rate]))
    return layer


def logits_of(output: Tensor, num_labels: int) -> Tensor:
    """Return what an output layer gives, [..., K], without its last dimension where there is one label."""
    return output if num_labels > 1 else output.squeeze(-1)


def check_widths(key: str, widths: Sequence[int]) -> None:
    """Raise ValueError unless every width of a network is at least 1."""
    require(all(width > 0 for width in widths), f"model.args.{key}", list(widths), "widths must be at least 1")


def check_dropout(rate: float) -> None:
    """Raise ValueError unless a dropout rate is in [0, 1)."""
    require(0 <= rate < 1, "model.args.dropout", rate, "must be in [0, 1)")
