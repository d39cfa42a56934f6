"""What several models are made of: ReLU networks, and what routes an example by its scenario."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gmeta.core.batch import id_of
from gmeta.models.inputs import InputSpec, as_vectors

SAMPLE = 20_000
"""So many vectors tell how their numbers vary."""
_STILL = 1e-3
"""A number whose deviation is below this share of the mean one of its vector does not vary, but for rounding."""


def network(widths: Sequence[int], layer_norm: bool = False, dropout: float = 0.0) -> nn.Sequential:
    """Return linear layers between these widths, each followed by layer norm where asked for, ReLU and dropout."""
    layers: list[nn.Module] = []
    for num_in, num_out in itertools.pairwise(widths):
        layers.append(nn.Linear(num_in, num_out))
        if layer_norm:
            layers.append(nn.LayerNorm(num_out))
        layers.append(nn.ReLU())
        if dropout:
            layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers)


class Standardised(nn.Module):
    """Vectors [..., n] less their mean, in units of their deviation, number by number, as they are over a sample.

    Without one they stay as they are. A number that does not vary in the sample is 0, and so is a vector of zeros,
    which stands for none. The statistics are buffers: a checkpoint has them, and later data do not change them.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))

    @torch.no_grad()
    def see(self, sample: Tensor) -> None:
        """Take the statistics of a sample [rows, n], without its zeros; fewer than two tell nothing."""
        found = sample[sample.any(-1)].double()
        if len(found) < 2:
            return
        std, mean = torch.std_mean(found, 0, correction=0)
        self.mean.copy_(mean)
        self.scale.copy_(torch.where(std > _STILL * std.mean(), 1 / std, 0))

    def forward(self, vectors: Tensor) -> Tensor:
        """Return the standardised vectors."""
        return (vectors - self.mean) * self.scale * vectors.any(-1, keepdim=True)


def all_inputs(dense: Tensor, embedded: dict[str, Tensor], features: Sequence[str], num_numeric: int) -> Tensor:
    """Return one vector [..., width] of an example: its features' vectors, of a sequence the mean, and its numbers."""
    parts = as_vectors(embedded, features)
    return torch.cat([*parts, dense] if num_numeric else parts, -1)


def pair_products(vectors: Sequence[Tensor]) -> Tensor:
    """Return the dot products of every two of n vectors [..., d], the first with all behind it first:
    [..., n (n - 1) / 2].
    """
    stacked = torch.stack(list(vectors), -2)  # [..., n, d]
    left, right = torch.triu_indices(len(vectors), len(vectors), 1, device=stacked.device)
    return (stacked @ stacked.mT).flatten(-2)[..., left * len(vectors) + right]


def scenario_of(inputs: InputSpec, model: str) -> str:
    """Return the feature that is the scenario. ValueError where the model reads none."""
    if inputs.scenario is None:
        raise ValueError(
            f"{model} has a part for each scenario, and reads none: name the feature under `scenario` in the schema, "
            "and have it among model.features"
        )
    return inputs.scenario


def shares_of(embedded: dict[str, Tensor], scenario: str, num_scenarios: int, dtype: torch.dtype) -> Tensor:
    """Return how much of each scenario's part an example takes, [..., S]: 1 of its own, and 0 of the others. An example
    of an unknown scenario takes the same of all that are known. S leaves the unknown one out.
    """
    of_id = embedded[id_of(scenario)].squeeze(-1)
    known = torch.arange(1, num_scenarios, device=of_id.device)
    own = (of_id.unsqueeze(-1) == known).to(dtype)
    return torch.where((of_id == 0).unsqueeze(-1), own.new_full((), 1 / max(1, num_scenarios - 1)), own)


def chosen(parts: Sequence[Tensor], shares: Tensor) -> Tensor:
    """Return the parts [..., n] of all scenarios, S of them, weighted by an example's shares [..., S] and added up."""
    return (torch.stack(list(parts), -1) * shares.unsqueeze(-2)).sum(-1)
