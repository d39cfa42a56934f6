"""What a model is told about its inputs when it is made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gmeta.core.batch import mask_of
from gmeta.core.errors import nearest, require
from gmeta.data.schema import PackSchema


class TextInput(NamedTuple):
    """A feature or a sequence of texts that a model reads."""

    num_texts: int
    is_sequence: bool


@dataclass(frozen=True)
class InputSpec:
    """The inputs of `model(dense, embedded) -> logits [...]`, with any leading dimensions.

    `embedded[name]` is [..., d] for each feature and each vector, and `dense` is [..., F]. For each sequence
    `embedded[name]` is [..., L, d] with zeros behind its values, and `embedded[name + ".mask"]` bool [..., L] is true
    for a value; L is the longest of the batch, at least 1, and a logit must not depend on it.

    A model that reads texts names the features and sequences in its attribute `texts`. For each it gets
    `embedded[name + ".text"]` int64 [..., L], with L = 1 of a feature: positions in `text_tables[tables[name]]`, and 0
    where there is no text.

    A model that routes examples by their scenario names it in its attribute `routes`, and gets
    `embedded[scenario + ".id"]` int64 [..., 1]: below `num_scenarios`, and 0 for one that no training row has.
    """

    features: Mapping[str, int]  # name -> d, in the order of the pack
    numeric: tuple[str, ...]  # names of the F columns of `dense`, standardised
    base_rate: float  # the logit that predicts the mean training label
    item: str | None = None  # the feature that is the item's id, where the model reads it
    scenario: str | None = None  # the feature that the schema calls the scenario, where the model reads it
    sequences: Mapping[str, int] = field(default_factory=dict)  # name -> d (1 of numbers), of those that are not pooled
    tables: Mapping[str, str] = field(default_factory=dict)  # feature or sequence -> vocabulary, whose rows they share
    base_rates: tuple[float, ...] = ()  # of each of several labels, of which the model gives a logit each: [..., K]
    vectors: Mapping[str, int] = field(default_factory=dict)  # name -> width, of vectors that the data have
    texts: Mapping[str, int] = field(default_factory=dict)  # feature or sequence of texts -> number of its texts
    text_tables: Mapping[str, Sequence[str]] = field(default_factory=dict)  # vocabulary -> its texts, by id; 0 is none
    owned: tuple[str, ...] = ()  # in a pack of next items: the item's id, and what an item always has, such as a domain
    num_scenarios: int = 0  # ids of `scenario`, the unknown one among them; 0 where the model reads none

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
        """Return d, where all embeddings have the same width. Raises ValueError where they differ."""
        (dim, *others) = {*self.features.values(), *(d for name, d in self.sequences.items() if name in self.tables)}
        if others:
            raise ValueError(f"the features have widths {self.widths}: this model needs one width")
        return dim

    @property
    def widths(self) -> dict[str, int]:
        """Return name -> width of all that `as_vectors` makes one vector of: features, sequences, vectors."""
        return {**self.features, **self.sequences, **self.vectors}

    @property
    def fields(self) -> tuple[str, ...]:
        """Return the names, in the order of `widths`, of what models multiply with each other: embeddings of ids, and
        what was made of texts and vectors in their place.
        """
        return tuple(name for name in self.widths if name in self.tables or name in self.features)

    def reading(self, names: Sequence[str]) -> InputSpec:
        """Return the same inputs with these features, sequences and vectors alone, in this order."""
        return replace(
            self,
            features={name: self.features[name] for name in names if name in self.features},
            sequences={name: self.sequences[name] for name in names if name in self.sequences},
            vectors={name: self.vectors[name] for name in names if name in self.vectors},
        )

    def texts_of(self, model: object) -> dict[str, TextInput]:
        """Return what the names in the model's attribute `texts` are. ValueError for an unknown one."""
        names = tuple(getattr(model, "texts", ()))
        for name in names:
            if name not in self.texts:
                known = nearest(str(name), self.texts) if self.texts else "the model's inputs have none"
                raise ValueError(f"{type(model).__name__}.texts names {name!r}, no feature of texts: {known}")
        return {name: TextInput(self.texts[name], name in self.sequences) for name in names}

    def routes_of(self, model: object) -> dict[str, int]:
        """Return feature -> number of its ids, of the scenario where the model's attribute `routes` names it.
        ValueError for another feature.
        """
        names = tuple(getattr(model, "routes", ()))
        for name in names:
            if name != self.scenario:
                known = "the model reads none" if self.scenario is None else f"that is {self.scenario!r}"
                raise ValueError(
                    f"{type(model).__name__}.routes names {name!r}, which is not the scenario of the schema: {known}"
                )
        return dict.fromkeys(names, self.num_scenarios)

    def texts_by_id(self, name: str) -> Sequence[str]:
        """Return the texts of the vocabulary of a feature or a sequence, by id."""
        return self.text_tables[self.tables[name]]

    @property
    def width(self) -> int:
        """Return the number of inputs of one example: a vector for each name of `widths`, and the numeric columns."""
        return sum(self.widths.values()) + len(self.numeric)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of a sequence's values: [..., L, d] and bool [..., L] -> [..., d]; zeros where it has none."""
    count = mask.sum(-1, keepdim=True).clamp(min=1).to(values.dtype)
    return torch.where(mask.unsqueeze(-1), values, 0).sum(-2) / count


def as_vectors(embedded: Mapping[str, Tensor], names: Sequence[str]) -> list[Tensor]:
    """Return one vector [..., d] for each name: of a sequence the mean of its values."""
    return [
        embedded[name] if mask_of(name) not in embedded else masked_mean(embedded[name], embedded[mask_of(name)])
        for name in names
    ]


def history_of(inputs: InputSpec, target: str = "", history: str = "") -> tuple[str, str]:
    """Return the names of the item that is asked about and of the sequence of such items, for models that compare them.

    Without a name, they are the id of the item, and the only sequence of its vocabulary. ValueError where there is
    none, or where the two do not share their rows.
    """
    target = target or inputs.item or ""
    if not target:
        known = ", ".join(inputs.features)
        raise ValueError(f"model.args.target is not set, and the model reads no id of the item: name one of {known}")
    if target not in inputs.features:
        known = nearest(target, inputs.features)
        raise ValueError(f"model.args.target names {target!r}, no feature of the model: {known}")
    table = inputs.tables.get(target, target)
    of_table = [name for name in inputs.sequences if inputs.tables.get(name) == table]
    how = f"`sequence` with `pooling: none` and `table: {table}` in the schema"
    if history and history not in of_table:
        known = nearest(history, of_table) if of_table else "the model reads none"
        raise ValueError(f"model.args.history names {history!r}, which is no {how}: {known}")
    if not history and len(of_table) != 1:
        known = ", ".join(of_table) or "none"
        raise ValueError(f"model.args.history is not set: name a {how}; the model reads {known}")
    return target, history or of_table[0]


def input_spec(
    schema: PackSchema,
    *,
    features: Sequence[str],
    numeric: bool,
    embedding_dim: int,
    text_tables: Mapping[str, Sequence[str]] | None = None,
) -> InputSpec:
    """Return the inputs that a pack offers; empty `features` means all. `text_tables` are the texts of vocabularies.

    Raises ValueError for a feature that the pack lacks (with the nearest) or that is named twice, or without any.
    """
    numbers = [column.name for column in schema.numeric_sequence]
    vectors = {vector.name: vector.dim for vector in schema.vector}
    known = [*(feature.name for feature in schema.features), *numbers, *vectors]
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
    tables = {name: schema.feature(name).table for name in chosen if name not in numbers and name not in vectors}
    texts = {} if text_tables is None else text_tables
    num_texts = {name: num for name in tables if (num := schema.feature(name).num_texts) is not None}
    whole = {name for name in tables if schema.feature(name).pooling == "none"}
    return InputSpec(
        {name: embedding_dim for name in tables if name not in whole},
        names,
        base_rate(schema),
        item,
        scenario,
        {name: embedding_dim if name in whole else 1 for name in chosen if name in whole or name in numbers},
        tables,
        rates,
        {name: vectors[name] for name in chosen if name in vectors},
        {name: len(texts.get(schema.feature(name).table, range(num))) for name, num in num_texts.items()},
        texts,
        tuple(name for name in tables if name == schema.item or name in schema.catalogue) if schema.next_item else (),
        0 if scenario is None else schema.feature(scenario).num_ids,
    )


def usual_features(schema: PackSchema) -> list[str]:
    """Return the features that a model reads where none are named: all but the task's own key.

    New tasks are what a model adapts to, and their keys are unknown to it. The key is read where nothing else is there.
    """
    names = [*(feature.name for feature in schema.features), *(column.name for column in schema.numeric_sequence)]
    names += [vector.name for vector in schema.vector]
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
            f"{model} predicts one label, and the pack has {inputs.num_labels}: use melu, dlrm, din, transformer, "
            "bahe without taste, or a model of your own that returns a logit for each"
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


def check_words(known: Mapping[str, Sequence[str]], **given: str) -> None:
    """Raise ValueError for an argument of a model that is none of the `known` words it may be."""
    for key, word in given.items():
        require(word in known[key], f"model.args.{key}", word, f"must be one of {', '.join(known[key])}")


def check_dropout(rate: float, name: str = "dropout") -> None:
    """Raise ValueError unless a dropout rate, the model's argument `name`, is in [0, 1)."""
    require(0 <= rate < 1, f"model.args.{name}", rate, "must be in [0, 1)")
