"""PEPNet: gates made of the scenario scale embeddings, gates made of who and what scale layers (Chang et al., "PEPNet:
parameter and embedding personalized network", KDD 2023, arXiv 2302.01115).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gmeta.core.errors import nearest
from gmeta.models.inputs import InputSpec, as_vectors, check_dropout, check_widths, logits_of, output_layer
from gmeta.models.layers import network, pair_products, scenario_of


class PEPNet(nn.Module):
    """A gate is 2 sigmoid(W' relu(W [what it is made of, stop(what it scales)])), about 1 at first (equation 1):

        x = gate(scenario, E) * E            E: all else that is known of the example (EPNet, equations 2 and 3)
        h = relu(W (gate(personal, x) * h)), …,    logit = output(gate(personal, x) * h)      (PPNet, equations 4 to 6)

    `hidden` are the widths of the layers, `gate` that of a gate's hidden layer. `personal` are the features that the
    gates of layers are made of; the item's id unless others are named. No gradient goes through what is only looked
    at (`stop`). There are no parts of scenarios, so that one that is new has the gates of its embedding alone. With
    widths `bottom` the layers read what the top of `dlrm` reads, made of scaled inputs: a bottom network's output over
    all that is no embedding, where there is such, and the dot products of every two of it, the scenario's and the other
    embeddings (ours).
    """

    def __init__(
        self,
        inputs: InputSpec,
        *,
        hidden: Sequence[int] = (128, 64),
        gate: int = 32,
        personal: Sequence[str] = (),
        bottom: Sequence[int] = (),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_widths("hidden", hidden)
        check_widths("gate", [gate])
        check_widths("bottom", bottom)
        check_dropout(dropout)
        self.scenario = scenario_of(inputs, "pepnet")
        self.features, self.num_numeric = tuple(inputs.widths), inputs.num_numeric
        self.num_labels = inputs.num_labels
        self.others = tuple(name for name in self.features if name != self.scenario)
        self.personal = tuple(personal) or ((inputs.item,) if inputs.item is not None else ())
        for name in self.personal:
            if name not in inputs.widths:
                raise ValueError(f"model.args.personal names {name!r}: {nearest(name, inputs.widths)}")
        width = inputs.width - inputs.widths[self.scenario]
        of_scenario = inputs.widths[self.scenario]
        of_personal = sum(inputs.widths[name] for name in self.personal)
        self.embedding_gate = _gate(of_scenario + width, gate, width)
        self.multiplied = tuple(name for name in inputs.fields if name != self.scenario) if bottom else ()
        self.sizes = [*(inputs.widths[name] for name in self.others), inputs.num_numeric]
        self.bottom: nn.Sequential | None = None
        self.has_products = bool(bottom)
        widths = [width, *hidden]
        if bottom:
            dim, vectors = inputs.embedding_dim, 1 + len(self.multiplied)
            widths[0] = math.comb(vectors, 2)
            if numbers := width - dim * len(self.multiplied):
                self.bottom = network([numbers, *bottom, dim], dropout=dropout)
                widths[0] = dim + math.comb(vectors + 1, 2)
        self.gates = nn.ModuleList(_gate(of_personal + width, gate, size) for size in widths)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.output = output_layer(widths[-1], inputs)
        self.dropout = nn.Dropout(dropout)
        self.decision_layers = ("embedding_gate", "gates", "layers", "output")

    def forward(self, dense: Tensor, embedded: dict[str, Tensor]) -> Tensor:
        """Return logits [...], or [..., K] of several labels, from dense [..., F] and one [..., d] for each feature."""
        parts = as_vectors(embedded, self.others)
        x = torch.cat([*parts, dense] if self.num_numeric else parts, -1)
        (of_scenario,) = as_vectors(embedded, (self.scenario,))
        x = 2 * torch.sigmoid(self.embedding_gate(torch.cat([of_scenario, x.detach()], -1))) * x
        about = torch.cat([*as_vectors(embedded, self.personal), x.detach()], -1)
        h = self._products(x, of_scenario) if self.has_products else x
        for gate, layer in zip(self.gates, self.layers, strict=False):
            h = self.dropout(torch.relu(layer(2 * torch.sigmoid(gate(about)) * h)))
        return logits_of(self.output(2 * torch.sigmoid(self.gates[-1](about)) * h), self.num_labels)

    def _products(self, x: Tensor, of_scenario: Tensor) -> Tensor:
        """Return what layers read of scaled inputs [..., width]: the bottom network's output, and products."""
        scaled = dict(zip([*self.others, None], torch.split(x, self.sizes, -1), strict=True))
        embeddings = [scaled.pop(name) for name in self.multiplied]
        parts = [] if self.bottom is None else [self.bottom(torch.cat(list(scaled.values()), -1))]
        return torch.cat([*parts, pair_products([*parts, of_scenario, *embeddings])], -1)


def _gate(num_in: int, hidden: int, num_out: int) -> nn.Sequential:
    """Return the two layers of a gate, before its sigmoid."""
    return nn.Sequential(nn.Linear(num_in, hidden), nn.ReLU(), nn.Linear(hidden, num_out))
