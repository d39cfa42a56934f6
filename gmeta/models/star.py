"""STAR: a network that scenarios share, and one of each that scales it (Sheng et al., "One model to serve all: star
topology adaptive recommender for multi-domain CTR prediction", CIKM 2021, arXiv 2101.11427).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmeta.models.inputs import InputSpec, check_dropout, check_widths, logits_of, output_layer
from gmeta.models.layers import all_inputs, chosen, network, scenario_of, shares_of


class STAR(nn.Module):
    """A layer of scenario s has the weights W * W_s and the bias b + b_s (section 3.4.2, star topology):

        x' = gamma_s norm(x) + beta_s,    h = relu((W * W_s) h + b + b_s), …,    logit = star + auxiliary

    The auxiliary network reads the scenario's embedding beside all else (section 3.4.3). `hidden` are the widths of the
    star network, `auxiliary` those of the other. The paper's partitioned normalisation (3.4.1) takes its statistics
    over a batch; here they are of each example, because examples would change each other through them. An example of an
    unknown scenario gets the mean over all scenarios' logits.
    """

    def __init__(
        self,
        inputs: InputSpec,
        *,
        hidden: Sequence[int] = (128, 64),
        auxiliary: Sequence[int] = (32,),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_widths("hidden", hidden)
        check_widths("auxiliary", auxiliary)
        check_dropout(dropout)
        self.scenario = scenario_of(inputs, "star")
        self.routes, self.num_scenarios = (self.scenario,), inputs.num_scenarios
        self.features, self.num_numeric = tuple(inputs.widths), inputs.num_numeric
        self.num_labels = inputs.num_labels
        known, widths = inputs.num_scenarios - 1, [inputs.width, *hidden]
        self.norm = nn.LayerNorm(inputs.width)
        self.norm_scale = nn.Parameter(torch.ones(known, inputs.width))
        self.norm_shift = nn.Parameter(torch.zeros(known, inputs.width))
        self.shared = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.shared.append(output_layer(widths[-1], inputs))
        self.scale = nn.ParameterList(torch.ones(known, *layer.weight.shape) for layer in self._layers)
        self.shift = nn.ParameterList(torch.zeros(known, len(layer.weight)) for layer in self._layers)
        self.dropout = nn.Dropout(dropout)
        self.auxiliary = network([inputs.width, *auxiliary], dropout=dropout)
        self.output = nn.Linear(auxiliary[-1] if auxiliary else inputs.width, inputs.num_labels)
        nn.init.zeros_(self.output.bias)
        self.decision_layers = ("shared", "scale", "shift", "auxiliary", "output")

    @property
    def _layers(self) -> list[nn.Linear]:
        return list(self.shared)  # type: ignore[arg-type]

    def forward(self, dense: Tensor, embedded: dict[str, Tensor]) -> Tensor:
        """Return logits [...], or [..., K] of several labels, from dense [..., F] and one [..., d] for each feature."""
        x = all_inputs(dense, embedded, self.features, self.num_numeric)
        shares = shares_of(embedded, self.scenario, self.num_scenarios, x.dtype)
        normed = self.norm(x)
        star = chosen([self._star(normed, number) for number in range(len(self.norm_scale))], shares)
        return logits_of(star + self.output(self.auxiliary(x)), self.num_labels)

    def _star(self, x: Tensor, number: int) -> Tensor:
        """Return what the star network of one scenario makes of normed inputs, [..., K]."""
        h = x * self.norm_scale[number] + self.norm_shift[number]
        for place, layer in enumerate(self._layers):
            h = F.linear(h, layer.weight * self.scale[place][number], layer.bias + self.shift[place][number])
            if place < len(self._layers) - 1:
                h = self.dropout(torch.relu(h))
        return h
