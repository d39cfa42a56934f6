"""DeepFM: a factorisation machine beside a deep network (Guo et al., "DeepFM: a factorization-machine based neural
network for CTR prediction", IJCAI 2017, arXiv 1703.04247).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gmeta.models.inputs import InputSpec, as_vectors, check_dropout, check_widths, logits_of, output_layer
from gmeta.models.layers import all_inputs, network


class DeepFM(nn.Module):
    """logit = w . x + sum over pairs i < j of v_i . v_j + deep(x)    (equations 2 and 3)

    x has all vectors and numbers, v_i are the embeddings; a first-order weight of an id is one of its embedding, since
    tables have one width. `hidden` are the widths of the deep network. Of several labels each has the same pairs.
    """

    def __init__(self, inputs: InputSpec, *, hidden: Sequence[int] = (128, 64), dropout: float = 0.0) -> None:
        super().__init__()
        check_widths("hidden", hidden)
        check_dropout(dropout)
        self.features, self.num_numeric = tuple(inputs.widths), inputs.num_numeric
        self.num_labels = inputs.num_labels
        self.pairs = inputs.fields
        _ = inputs.embedding_dim  # pairs need one width
        self.first_order = nn.Linear(inputs.width, inputs.num_labels, bias=False)
        self.deep = network([inputs.width, *hidden], dropout=dropout)
        self.output = output_layer(hidden[-1] if hidden else inputs.width, inputs)
        self.decision_layers = ("first_order", "deep", "output")

    def forward(self, dense: Tensor, embedded: dict[str, Tensor]) -> Tensor:
        """Return logits [...], or [..., K] of several labels, from dense [..., F] and one [..., d] for each feature."""
        x = all_inputs(dense, embedded, self.features, self.num_numeric)
        vectors = torch.stack(as_vectors(embedded, self.pairs), -2)  # [..., n, d]
        # the sum over pairs is half of (sum of vectors)^2 - sum of squares
        pairs = (vectors.sum(-2).square() - vectors.square().sum(-2)).sum(-1, keepdim=True) / 2
        return logits_of(self.first_order(x) + pairs + self.output(self.deep(x)), self.num_labels)
