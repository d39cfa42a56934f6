"""PLE: experts of all scenarios and experts of each, extracted level by level (Tang et al., "Progressive layered
extraction", RecSys 2020), with scenarios in the place of its tasks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gmeta.core.errors import require
from gmeta.models.inputs import InputSpec, check_dropout, check_widths, logits_of, output_layer
from gmeta.models.layers import all_inputs, chosen, network, scenario_of, shares_of


class PLE(nn.Module):
    """Each level has `shared` experts for all scenarios and `own` ones for each:

        g_s = softmax(W_s x_s) over own and shared experts,    x_s' = sum of g_s[i] expert_i,      of every scenario s
        x'  = the same over the experts of all scenarios, by a gate of x: what shared experts read a level above

    (equations 1 to 4 for one level, 5 and 6 for several), with x_s = x at the first level and an expert reading its own
    scenario's x_s, the shared ones x. `hidden` has the width of each level; every expert is one ReLU layer. A tower of
    the widths `tower` makes the logit. An example of an unknown scenario gets the mean over all scenarios' logits.
    """

    def __init__(
        self,
        inputs: InputSpec,
        *,
        own: int = 1,
        shared: int = 2,
        hidden: Sequence[int] = (128, 64),
        tower: Sequence[int] = (32,),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        require(own >= 1, "model.args.own", own, "must be at least 1")
        require(shared >= 1, "model.args.shared", shared, "must be at least 1")
        require(len(hidden) >= 1, "model.args.hidden", list(hidden), "needs a width for each level, one at least")
        check_widths("hidden", hidden)
        check_widths("tower", tower)
        check_dropout(dropout)
        self.scenario = scenario_of(inputs, "ple")
        self.routes, self.num_scenarios = (self.scenario,), inputs.num_scenarios
        self.features, self.num_numeric = tuple(inputs.widths), inputs.num_numeric
        self.num_labels = inputs.num_labels
        known, widths = inputs.num_scenarios - 1, [inputs.width, *hidden]
        self.levels = nn.ModuleList(
            _Level(a, b, known, own, shared, dropout, last=level == len(hidden) - 1)
            for level, (a, b) in enumerate(zip(widths, hidden, strict=False))
        )
        above = [hidden[-1], *tower]
        self.towers = nn.ModuleList(network(above, dropout=dropout) for _ in range(known))
        self.outputs = nn.ModuleList(output_layer(above[-1], inputs) for _ in range(known))
        self.decision_layers = ("levels", "towers", "outputs")

    def forward(self, dense: Tensor, embedded: dict[str, Tensor]) -> Tensor:
        """Return logits [...], or [..., K] of several labels, from dense [..., F] and one [..., d] for each feature."""
        x = all_inputs(dense, embedded, self.features, self.num_numeric)
        shares = shares_of(embedded, self.scenario, self.num_scenarios, x.dtype)
        of_scenario = [x] * len(self.towers)
        for level in self.levels:
            of_scenario, x = level(of_scenario, x)
        logits = [output(tower(h)) for h, tower, output in zip(of_scenario, self.towers, self.outputs, strict=True)]
        return logits_of(chosen(logits, shares), self.num_labels)


class _Level(nn.Module):
    """One level of extraction, from width `num_in` to `num_out`; the last one has no gate of what is shared."""

    def __init__(
        self, num_in: int, num_out: int, scenarios: int, own: int, shared: int, dropout: float, *, last: bool
    ) -> None:
        super().__init__()

        def experts(number: int) -> nn.ModuleList:
            return nn.ModuleList(network([num_in, num_out], dropout=dropout) for _ in range(number))

        self.shared = experts(shared)
        self.own = nn.ModuleList(experts(own) for _ in range(scenarios))
        self.gates = nn.ModuleList(nn.Linear(num_in, own + shared, bias=False) for _ in range(scenarios))
        self.shared_gate = None if last else nn.Linear(num_in, scenarios * own + shared, bias=False)

    def forward(self, of_scenario: list[Tensor], x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return what scenarios read a level above, and what shared experts read."""
        shared = [expert(x) for expert in self.shared]
        own = [[expert(h) for expert in experts] for h, experts in zip(of_scenario, self.own, strict=True)]  # type: ignore[attr-defined]
        found = [_mixed([*mine, *shared], gate(h)) for mine, gate, h in zip(own, self.gates, of_scenario, strict=True)]
        if self.shared_gate is None:
            return found, x
        every = [expert for mine in own for expert in mine]
        return found, _mixed([*every, *shared], self.shared_gate(x))


def _mixed(experts: list[Tensor], gate: Tensor) -> Tensor:
    """Return experts [..., h] mixed by the softmax of a gate [..., number]."""
    return (torch.stack(experts, -1) * gate.softmax(-1).unsqueeze(-2)).sum(-1)
