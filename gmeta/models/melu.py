"""MeLU's model: concatenated embeddings and numeric columns, then a ReLU network.

Hoyeop Lee et al., "MeLU: Meta-Learned User Preference Estimator for Cold-Start Recommendation", KDD 2019. There the
inner loop adapts the dense layers ("decision layers") only, and the embeddings are learned by the outer loop.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gmeta.models.inputs import InputSpec, as_vectors, check_dropout, check_widths, logits_of, output_layer


class MeLU(nn.Module):
    """[embeddings of all features, numeric columns] -> hidden ReLU layers -> a logit of each label.

    `hidden` are the widths of the hidden layers, each followed by layer norm (where asked for) and dropout.
    """

    head = "output"

    def __init__(
        self,
        inputs: InputSpec,
        *,
        hidden: Sequence[int] = (64, 64),
        layer_norm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_widths("hidden", hidden)
        check_dropout(dropout)
        self.features = tuple(inputs.widths)
        self.num_numeric = inputs.num_numeric
        widths = [inputs.width, *hidden]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.norms = nn.ModuleList(nn.LayerNorm(width) if layer_norm else nn.Identity() for width in hidden)
        self.dropout = nn.Dropout(dropout)
        self.output = output_layer(widths[-1], inputs)
        self.num_labels = inputs.num_labels
        self.decision_layers = ("layers", "norms", "output")

    def forward(self, dense: Tensor, embedded: dict[str, Tensor]) -> Tensor:
        """Return logits [...], or [..., K] of several labels, from dense [..., F] and one [..., d] for each feature, of
        a sequence its mean.
        """
        parts = as_vectors(embedded, self.features)
        if self.num_numeric:
            parts.append(dense)
        x = torch.cat(parts, -1)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = self.dropout(torch.relu(norm(layer(x))))
        return logits_of(self.output(x), self.num_labels)
