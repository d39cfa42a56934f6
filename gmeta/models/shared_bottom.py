"""Shared bottom: one network below, a tower for each scenario above (Caruana, "Multitask learning", 1997)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from gmeta.models.inputs import InputSpec, check_dropout, check_widths, logits_of, output_layer
from gmeta.models.layers import all_inputs, chosen, network, scenario_of, shares_of


class SharedBottom(nn.Module):
    """h = bottom(x),    logit = output_s(tower_s(h)) of the example's scenario s.

    `hidden` are the widths of the bottom, `tower` those of each tower. An example of an unknown scenario gets the mean
    of all towers.
    """

    def __init__(
        self,
        inputs: InputSpec,
        *,
        hidden: Sequence[int] = (128, 64),
        tower: Sequence[int] = (32,),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_widths("hidden", hidden)
        check_widths("tower", tower)
        check_dropout(dropout)
        self.scenario = scenario_of(inputs, "shared_bottom")
        self.routes, self.num_scenarios = (self.scenario,), inputs.num_scenarios
        self.features, self.num_numeric = tuple(inputs.widths), inputs.num_numeric
        self.num_labels = inputs.num_labels
        self.bottom = network([inputs.width, *hidden], dropout=dropout)
        widths = [hidden[-1] if hidden else inputs.width, *tower]
        self.towers = nn.ModuleList(network(widths, dropout=dropout) for _ in range(1, inputs.num_scenarios))
        self.outputs = nn.ModuleList(output_layer(widths[-1], inputs) for _ in self.towers)
        self.decision_layers = ("bottom", "towers", "outputs")

    def forward(self, dense: Tensor, embedded: dict[str, Tensor]) -> Tensor:
        """Return logits [...], or [..., K] of several labels, from dense [..., F] and one [..., d] for each feature."""
        h = self.bottom(all_inputs(dense, embedded, self.features, self.num_numeric))
        shares = shares_of(embedded, self.scenario, self.num_scenarios, h.dtype)
        logits = [output(tower(h)) for tower, output in zip(self.towers, self.outputs, strict=True)]
        return logits_of(chosen(logits, shares), self.num_labels)
