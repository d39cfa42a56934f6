"""MMoE: experts that all scenarios share, and a gate for each (Ma et al., "Modeling task relationships in multi-task
learning with multi-gate mixture-of-experts", KDD 2018), with scenarios in the place of its tasks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gmeta.core.errors import require
from gmeta.models.inputs import InputSpec, check_dropout, check_widths, logits_of, output_layer
from gmeta.models.layers import all_inputs, chosen, network, scenario_of, shares_of


class MMoE(nn.Module):
    """f_i = expert_i(x),    g_s = softmax(W_s x),    logit = output_s(tower_s(sum_i g_s[i] f_i))    (equations 5 to 7)

    `experts` are so many networks of the widths `hidden`; `tower` are the widths of each scenario's tower. An example
    of an unknown scenario gets the mean over all scenarios' logits.
    """

    def __init__(
        self,
        inputs: InputSpec,
        *,
        experts: int = 4,
        hidden: Sequence[int] = (128, 64),
        tower: Sequence[int] = (32,),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        require(experts >= 1, "model.args.experts", experts, "must be at least 1")
        check_widths("hidden", hidden)
        check_widths("tower", tower)
        check_dropout(dropout)
        self.scenario = scenario_of(inputs, "mmoe")
        self.routes, self.num_scenarios = (self.scenario,), inputs.num_scenarios
        self.features, self.num_numeric = tuple(inputs.widths), inputs.num_numeric
        self.num_labels = inputs.num_labels
        known = range(1, inputs.num_scenarios)
        self.experts = nn.ModuleList(network([inputs.width, *hidden], dropout=dropout) for _ in range(experts))
        self.gates = nn.ModuleList(nn.Linear(inputs.width, experts, bias=False) for _ in known)
        widths = [hidden[-1] if hidden else inputs.width, *tower]
        self.towers = nn.ModuleList(network(widths, dropout=dropout) for _ in known)
        self.outputs = nn.ModuleList(output_layer(widths[-1], inputs) for _ in known)
        self.decision_layers = ("experts", "gates", "towers", "outputs")

    def forward(self, dense: Tensor, embedded: dict[str, Tensor]) -> Tensor:
        """Return logits [...], or [..., K] of several labels, from dense [..., F] and one [..., d] for each feature."""
        x = all_inputs(dense, embedded, self.features, self.num_numeric)
        experts = torch.stack([expert(x) for expert in self.experts], -1)  # [..., h, experts]
        logits = []
        for gate, tower, output in zip(self.gates, self.towers, self.outputs, strict=True):
            mixed = (experts * gate(x).softmax(-1).unsqueeze(-2)).sum(-1)
            logits.append(output(tower(mixed)))
        shares = shares_of(embedded, self.scenario, self.num_scenarios, x.dtype)
        return logits_of(chosen(logits, shares), self.num_labels)
