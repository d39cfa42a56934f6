"""A neural linear model: items become bases and a mean, and a task's weights over the bases are solved for."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gmeta.core.errors import nearest
from gmeta.models.inputs import InputSpec, as_vectors, check_dropout, check_widths, require_one_label
from gmeta.models.last_layer import BayesianLinear, OutputMap

_PIECES = 24
"""How many pieces the output's map has: six between two stars."""


class NeuralLinear(nn.Module):
    """Factor analysis whose items have features, with a prior that a task's features shift.

        v = row of the item's id + tower([embeddings of the other item features, numeric columns])    [..., d]
        basis = v[:-1],  mean = v[-1]
        p = prior([embeddings of `task_features`, numeric columns])                                   [..., d]
        logit = last(basis, base_rate + mean + p[-1] + basis . p[:-1])

    `last` is a `BayesianLinear`, which `meta.adapt: [last_layer]` solves for. The tower's last layer and `prior` start
    at 0, so that rows that come from factor analysis (`embedding.start: factors`) predict at first what it predicts,
    with a task's own bias besides. A new item has the out-of-vocabulary row and what its features say. Without an
    item id among the features the tower alone gives bases. `bias_std`, `noise` and `drift_std` are where the prior
    starts; `drift_std` 0 is no drift, which rows without order cannot have. With `label_range`, such as [1, 5], the
    logit goes through an `OutputMap` over that range, for labels that have few values. `label_scale` is the unit of all
    this, 1 for clicks and stars: the deviation of labels that are amounts, times which v and p count in the logit.
    `item` names the feature whose rows are bases where that is not the schema's item, such as the user's id where tasks
    are items.
    """

    last_layer = "last"

    def __init__(
        self,
        inputs: InputSpec,
        *,
        task_features: Sequence[str] = (),
        item: str = "",
        hidden: Sequence[int] = (32,),
        dropout: float = 0.3,
        bias_std: float = 0.1,
        noise: float = 1.0,
        drift_std: float = 0.0,
        label_range: Sequence[float] = (),
        label_scale: float = 1.0,
    ) -> None:
        super().__init__()
        require_one_label(inputs, "neural_linear")
        check_widths("hidden", hidden)
        check_dropout(dropout)
        for key, name in (*(("task_features", name) for name in task_features), *((("item", item),) if item else ())):
            if name not in inputs.widths:
                raise ValueError(
                    f"model.args.{key} names {name!r}, which is not a feature of the model: "
                    f"{nearest(name, inputs.widths)}"
                )
        dim, numeric = inputs.embedding_dim, inputs.num_numeric
        if dim < 2:
            raise ValueError(f"model.embedding_dim is {dim}: neural_linear needs 2 or more, a mean and some bases")
        self.features = tuple(inputs.widths)
        named = item or inputs.item
        self.item = None if named in task_features else named
        self.task_features = tuple(name for name in self.features if name in task_features)
        self.tower_features = tuple(n for n in self.features if n != self.item and n not in task_features)
        self.base_rate, self.num_numeric = inputs.base_rate, numeric
        width = sum(inputs.widths[name] for name in self.tower_features) + numeric
        if self.item is None and not width:
            raise ValueError(
                "neural_linear reads nothing that describes the item: leave some feature out of task_features"
            )
        self.dropout = nn.Dropout(dropout)
        self.tower = _network([width, *hidden, dim]) if width else None
        if self.tower is not None and self.item is not None:
            _zero(self.tower[-1])
        width = sum(inputs.widths[name] for name in self.task_features) + numeric
        self.prior = nn.Linear(width, dim, bias=False) if width else None
        if self.prior is not None:
            _zero(self.prior)
        self.last = BayesianLinear(dim - 1, bias_std=bias_std, noise=noise, drift_std=drift_std, scale=label_scale)
        if len(label_range) not in (0, 2) or not sorted(set(label_range)) == list(label_range):
            raise ValueError(
                f"model.args.label_range is {list(label_range)}: give the lowest and the highest label, or nothing"
            )
        self.finish = OutputMap(label_range[0], label_range[1], _PIECES) if label_range else nn.Identity()

    def forward(self, dense: Tensor, embedded: dict[str, Tensor]) -> Tensor:
        """Return logits [...] at the prior's mean, from dense [..., F] and one [..., d] for each feature, of a sequence
        its mean.
        """
        numeric = [dense] if self.num_numeric else []
        vectors = [] if self.item is None else [embedded[self.item]]
        if self.tower is not None:
            parts = [*as_vectors(embedded, self.tower_features), *numeric]
            vectors.append(self.tower(self.dropout(torch.cat(parts, -1))))
        vector = vectors[0] if len(vectors) == 1 else vectors[0] + vectors[1]
        basis, offset = vector[..., :-1], vector[..., -1]
        if self.prior is not None:
            shift = self.prior(torch.cat([*as_vectors(embedded, self.task_features), *numeric], -1))
            offset = offset + shift[..., -1] + (basis * shift[..., :-1]).sum(-1)
        if self.last.scale != 1:
            offset = offset * self.last.scale
        logits: Tensor = self.finish(self.last(basis, offset + self.base_rate))
        return logits


def _network(widths: Sequence[int]) -> nn.Sequential:
    """Return linear layers with a ReLU between them, and none after the last."""
    layers: list[nn.Module] = []
    for num_in, num_out in itertools.pairwise(widths):
        layers += [nn.ReLU(), nn.Linear(num_in, num_out)]
    return nn.Sequential(*layers[1:])


def _zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
