"""A factor model whose user factors are adapted: items become vectors, a task weighs them.

The tower that turns an item's features into a vector is shared by all tasks. What a task adapts is small and enters
linearly or nearly so: weights over the item vector, an offset, and the last layer of a small network that corrects the
product. The support thereby acts like the fold-in of a new user into a matrix factorisation. A few inner steps
solve for it, and the outer loop learns item vectors for which that works.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmeta.core.errors import nearest
from gmeta.models.inputs import InputSpec, as_vectors, check_dropout, check_widths, require_one_label


class Shift(nn.Module):
    """Adds a vector that starts at 0. It is a module of its own, so that it has an inner rate of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """Add the vector: [..., width] -> [..., width]."""
        return x + self.value


class Taste(nn.Module):
    """Item vector x in `embedding_dim` dimensions, weights w, and a ReLU network over [x, w * x, their product].

        z = [embeddings of item features, numeric columns]    t = [embeddings of `task_features`, numeric columns]
        x = norm(tower(z) + skip(z))                          [..., d]
        w = taste + prior(t)                                  [..., d]
        y = item_bias(z) + offset + prior_bias(t) + sum(w * x) / sqrt(d)
        logit = y + output(relu(shift(correction([x, w * x, y - base_rate]))))

    `taste`, `offset`, `shift` and `output` are what `decision` adapts. `taste`, `offset` and `prior` start at 0, so
    that at first the item bias alone predicts what the average task would say. `features` that are not in
    `task_features` describe the item. Numeric columns may describe either, and are inputs of both. Dropout is on the
    item's embeddings.
    """

    head = "output"
    decision_layers = ("taste", "offset", "shift", "output")

    def __init__(
        self,
        inputs: InputSpec,
        *,
        task_features: Sequence[str] = (),
        bottom: Sequence[int] = (64,),
        hidden: Sequence[int] = (64, 64),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        require_one_label(inputs, "taste")
        check_widths("bottom", bottom)
        check_widths("hidden", hidden)
        check_dropout(dropout)
        for name in task_features:
            if name not in inputs.widths:
                raise ValueError(
                    f"model.args.task_features names {name!r}, which is not a feature of the model: "
                    f"{nearest(name, inputs.widths)} (the task's own key is one only if model.features names it)"
                )
        self.features = tuple(inputs.widths)
        num_numeric, embedding_dim, base_rate = inputs.num_numeric, inputs.embedding_dim, inputs.base_rate
        self.task_features = tuple(name for name in self.features if name in task_features)
        self.item_features = tuple(name for name in self.features if name not in task_features)
        if not self.item_features:
            raise ValueError("model.args.task_features names every feature: taste needs some that describe the item")
        if not hidden:
            raise ValueError("model.args.hidden is []: taste needs at least one hidden layer")
        self.num_numeric = num_numeric
        self.base_rate = base_rate
        num_inputs = sum(inputs.widths[name] for name in self.item_features) + num_numeric
        self.dropout = nn.Dropout(dropout)
        self.tower = _network([num_inputs, *bottom, embedding_dim])
        self.skip = nn.Linear(num_inputs, embedding_dim, bias=False)
        self.norm = nn.LayerNorm(embedding_dim)
        self.item_bias = _zero(nn.Linear(num_inputs, 1))
        num_task_inputs = sum(inputs.widths[name] for name in self.task_features) + num_numeric
        self.prior = _zero(nn.Linear(num_task_inputs, embedding_dim + 1, bias=False)) if num_task_inputs else None
        self.taste = Shift(embedding_dim)
        self.offset = Shift(1)
        widths = [2 * embedding_dim + 1, *hidden]
        self.correction = _network(widths)
        self.shift = Shift(widths[-1])
        self.gain = nn.Parameter(torch.ones(widths[-1]))
        self.output = nn.Linear(widths[-1], 1, bias=False)
        nn.init.normal_(self.output.weight, std=0.05)

    def forward(self, dense: Tensor, embedded: dict[str, Tensor]) -> Tensor:
        """Return logits [...] from dense [..., F] and one [..., d] for each feature, of a sequence its mean."""
        z = self.dropout(torch.cat(as_vectors(embedded, self.item_features), -1))
        if self.num_numeric:
            z = torch.cat([z, dense], -1)
        x = self.norm(self.tower(z) + self.skip(z))
        prior, prior_bias = self._prior(x, dense, embedded)
        product = x * self.taste(prior)
        y = self.item_bias(z) + self.offset(prior_bias) + product.sum(-1, keepdim=True) / math.sqrt(x.shape[-1])
        h = F.relu(self.shift(self.correction(torch.cat([x, product, y], -1)))) * self.gain
        logits: Tensor = (y + self.output(h)).squeeze(-1) + self.base_rate
        return logits

    def _prior(self, x: Tensor, dense: Tensor, embedded: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return what the task's features say about its weights [..., d] and its offset [..., 1]. Both are 0 without
        such features.
        """
        if self.prior is None:
            return torch.zeros_like(x), torch.zeros_like(x[..., :1])
        parts = as_vectors(embedded, self.task_features) + ([dense] if self.num_numeric else [])
        out = self.prior(torch.cat(parts, -1))
        return out[..., :-1], out[..., -1:]


def _network(widths: Sequence[int]) -> nn.Sequential:
    """Return linear layers with a ReLU between them, and none after the last."""
    layers: list[nn.Module] = []
    for num_in, num_out in itertools.pairwise(widths):
        layers += [nn.ReLU(), nn.Linear(num_in, num_out)]
    return nn.Sequential(*layers[1:])


def _zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
