"""DCN-V2: cross layers beside a deep network (Wang et al., "DCN V2: improved deep and cross network", WWW 2021,
arXiv 2008.13535).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gmeta.core.errors import require
from gmeta.models.inputs import InputSpec, check_dropout, check_widths, logits_of, output_layer
from gmeta.models.layers import all_inputs, network


class DCN(nn.Module):
    """x_{l+1} = x_0 * (W_l x_l + b_l) + x_l (equation 1),    logit = output([x_L, deep(x_0)])    (the parallel form)

    `cross` is the number of cross layers, `hidden` are the widths of the deep network.
    """

    head = "output"

    def __init__(
        self, inputs: InputSpec, *, cross: int = 2, hidden: Sequence[int] = (128, 64), dropout: float = 0.0
    ) -> None:
        super().__init__()
        require(cross >= 1, "model.args.cross", cross, "must be at least 1")
        check_widths("hidden", hidden)
        check_dropout(dropout)
        self.features, self.num_numeric = tuple(inputs.widths), inputs.num_numeric
        self.num_labels = inputs.num_labels
        self.cross = nn.ModuleList(nn.Linear(inputs.width, inputs.width) for _ in range(cross))
        self.deep = network([inputs.width, *hidden], dropout=dropout)
        self.output = output_layer(inputs.width + (hidden[-1] if hidden else inputs.width), inputs)
        self.decision_layers = ("cross", "deep", "output")

    def forward(self, dense: Tensor, embedded: dict[str, Tensor]) -> Tensor:
        """Return logits [...], or [..., K] of several labels, from dense [..., F] and one [..., d] for each feature."""
        first = all_inputs(dense, embedded, self.features, self.num_numeric)
        x = first
        for layer in self.cross:
            x = first * layer(x) + x
        return logits_of(self.output(torch.cat([x, self.deep(first)], -1)), self.num_labels)
