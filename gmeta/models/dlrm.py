"""DLRM: a bottom network over numeric columns, dot products between all embeddings, a top network.

Maxim Naumov et al., "Deep Learning Recommendation Model for Personalization and Recommendation Systems",
arXiv 1906.00091.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gmeta.models.inputs import InputSpec, as_vectors, check_dropout, check_widths, logits_of, output_layer
from gmeta.models.layers import network, pair_products


class DLRM(nn.Module):
    """Top network over [bottom output, pairwise dot products of bottom output and embeddings] -> a logit of each label.

    `bottom` are the widths of the network over numeric columns, vectors and numeric sequences, of which it reads the
    mean; the embedding dimension is appended to them. Without such inputs there is no such network. `hidden` are the
    widths of the top network.
    """

    head = "output"
    decision_layers = ("top", "output")

    def __init__(
        self,
        inputs: InputSpec,
        *,
        bottom: Sequence[int] = (64,),
        hidden: Sequence[int] = (64, 64),
        layer_norm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_widths("bottom", bottom)
        check_widths("hidden", hidden)
        check_dropout(dropout)
        self.features = tuple(inputs.widths)
        embedding_dim = inputs.embedding_dim
        self.vectors = inputs.fields
        self.numbers = tuple(name for name in self.features if name not in self.vectors)
        self.num_numeric = inputs.num_numeric
        num_numeric = inputs.num_numeric + sum(inputs.widths[name] for name in self.numbers)
        num_vectors = len(self.vectors) + (1 if num_numeric else 0)
        if num_vectors < 2:
            raise ValueError(
                f"dlrm has {num_vectors} vectors to multiply: it needs two features, or one and numeric columns"
            )
        self.bottom = network([num_numeric, *bottom, embedding_dim], layer_norm, dropout) if num_numeric else None
        num_products = num_vectors * (num_vectors - 1) // 2
        widths = [num_products + (embedding_dim if num_numeric else 0), *hidden]
        self.top = network(widths, layer_norm, dropout)
        self.output = output_layer(widths[-1], inputs)
        self.num_labels = inputs.num_labels

    def forward(self, dense: Tensor, embedded: dict[str, Tensor]) -> Tensor:
        """Return logits [...], or [..., K] of several labels, from dense [..., F] and one [..., d] for each feature, of
        a sequence its mean.
        """
        vectors = as_vectors(embedded, self.vectors)
        parts = []
        if self.bottom is not None:
            numbers = [dense] if self.num_numeric else []
            parts.append(self.bottom(torch.cat([*numbers, *as_vectors(embedded, self.numbers)], -1)))
        x = torch.cat([*parts, pair_products(parts + vectors)], -1)
        return logits_of(self.output(self.top(x)), self.num_labels)
