"""HAMUR: adapters whose inner matrix a network makes of the scenario (Li et al., "HAMUR: hyper adapter for multi-domain
recommendation", CIKM 2023, arXiv 2309.06217).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gmeta.models.inputs import InputSpec, as_vectors, check_dropout, check_widths, logits_of, output_layer
from gmeta.models.layers import all_inputs, scenario_of


class HAMUR(nn.Module):
    """h = relu(W h),    h = h + U relu(M_s V norm(h)),    logit = output(h)

    M_s [rank, rank] is made of the scenario's embedding by one layer for each adapter; U and V are shared by all
    scenarios, and U starts at zero, so that an adapter does nothing at first. In the paper M is made of the whole
    example, and both layers of an adapter are. `hidden` are the widths of the layers, each with an adapter above.
    """

    def __init__(
        self, inputs: InputSpec, *, hidden: Sequence[int] = (128, 64), rank: int = 8, dropout: float = 0.0
    ) -> None:
        super().__init__()
        check_widths("hidden", hidden)
        check_widths("rank", [rank])
        check_dropout(dropout)
        self.scenario = scenario_of(inputs, "hamur")
        self.features, self.num_numeric = tuple(inputs.widths), inputs.num_numeric
        self.num_labels = inputs.num_labels
        widths = [inputs.width, *hidden]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.adapters = nn.ModuleList(_Adapter(width, inputs.widths[self.scenario], rank) for width in hidden)
        self.output = output_layer(widths[-1], inputs)
        self.dropout = nn.Dropout(dropout)
        self.decision_layers = ("layers", "adapters", "output")

    def forward(self, dense: Tensor, embedded: dict[str, Tensor]) -> Tensor:
        """Return logits [...], or [..., K] of several labels, from dense [..., F] and one [..., d] for each feature."""
        h = all_inputs(dense, embedded, self.features, self.num_numeric)
        (of_scenario,) = as_vectors(embedded, (self.scenario,))
        for layer, adapter in zip(self.layers, self.adapters, strict=True):
            h = self.dropout(adapter(torch.relu(layer(h)), of_scenario))
        return logits_of(self.output(h), self.num_labels)


class _Adapter(nn.Module):
    def __init__(self, width: int, of_scenario: int, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.norm = nn.LayerNorm(width)
        self.down, self.up = nn.Linear(width, rank), nn.Linear(rank, width)
        self.hyper = nn.Linear(of_scenario, rank * rank)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, h: Tensor, of_scenario: Tensor) -> Tensor:
        """Return h [..., width] with what the adapter of its scenario [..., d] adds."""
        matrix = self.hyper(of_scenario).unflatten(-1, (self.rank, self.rank))
        inner = (matrix * self.down(self.norm(h)).unsqueeze(-2)).sum(-1)
        found: Tensor = h + self.up(torch.relu(inner))
        return found
