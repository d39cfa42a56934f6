"""MeLU's model: concatenated embeddings and numeric columns, then a ReLU network.

Hoyeop Lee et al., "MeLU: Meta-Learned User Preference Estimator for Cold-Start Recommendation", KDD 2019. There the
inner loop adapts the dense layers ("decision layers") only, and the embeddings are learned by the outer loop.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class MeLU(nn.Module):
    """[embeddings of `features`, numeric columns] -> hidden ReLU layers -> one logit."""

    head = "output"

    def __init__(
        self,
        features: Sequence[str],
        *,
        embedding_dim: int,
        num_numeric: int,
        hidden: Sequence[int],
        layer_norm: bool = False,
        dropout: float = 0.0,
        base_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.features = tuple(features)
        self.num_numeric = num_numeric
        widths = [len(self.features) * embedding_dim + num_numeric, *hidden]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.norms = nn.ModuleList(nn.LayerNorm(width) if layer_norm else nn.Identity() for width in hidden)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(widths[-1], 1)
        nn.init.constant_(self.output.bias, base_rate)
        self.decision_layers = ("layers", "norms", "output")

    def forward(self, dense: Tensor, embedded: dict[str, Tensor]) -> Tensor:
        """Dense [..., F] and one [..., d] for each feature -> logits [...]."""
        parts = [embedded[name] for name in self.features]
        if self.num_numeric:
            parts.append(dense)
        x = torch.cat(parts, -1)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = self.dropout(torch.relu(norm(layer(x))))
        logits: Tensor = self.output(x).squeeze(-1)
        return logits
