"""Modulation: the support set itself decides where a task's inner loop starts.

Each linear layer gets, for each task t, a scale g_t and, where it has a bias, a shift s_t, one number for each unit:

    W_t0 = diag(g_t) W,    b_t0 = g_t * b + s_t,    so the layer's output is g_t * (x W^T + b) + s_t

and the inner loop goes on from there by SGD on W_t, b_t. Two modules make g and s, both trained by the outer loop:
`ClusterGates` after CBML (Song et al., CIKM 2021), `Film` after MMAML (Vuorio et al., NeurIPS 2019). Both papers'
mechanism, not their networks: docs/meta-learning.md says what differs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from gmeta.meta.losses import widen
from gmeta.models.inputs import as_vectors

OPEN_GATE = 2.0
"""What gates start from, before the sigmoid: 0.88, near the unmodulated model and not yet saturated."""


@dataclass(frozen=True, slots=True)
class Modulated:
    """Where the tasks' inner loops start at one linear layer: one scale, and maybe one shift, for each unit."""

    scale: Tensor  # [T, out]
    shift: Tensor | None  # [T, out]; None: no shift

    def tensors(self) -> list[Tensor]:
        """Scale and, where there is one, shift."""
        return [self.scale] if self.shift is None else [self.scale, self.shift]

    def filled(self, tensors: Iterator[Tensor]) -> Modulated:
        """Return the same modulation with other tensors instead of `tensors()`."""
        return Modulated(next(tensors), None if self.shift is None else next(tensors))


class TaskEncoder(nn.Module):
    """Encodes a support as one vector: the mean of relu(linear([embeddings, numeric columns, label])) of its examples.

    Their order does not matter, and the empty support is the zero vector. `dims` has the width of each feature; of a
    sequence the mean counts.
    """

    def __init__(self, dims: Mapping[str, int], num_numeric: int, width: int) -> None:
        super().__init__()
        self.features = tuple(dims)
        self.num_numeric = num_numeric
        self.layer = nn.Linear(sum(dims.values()) + num_numeric + 1, width)

    def forward(self, dense: Tensor, embedded: Mapping[str, Tensor], label: Tensor, mask: Tensor) -> Tensor:
        """Return [T, width] from dense [T, S, F], one [T, S, d] for each feature, label [T, S] and mask bool [T, S]."""
        parts = as_vectors(embedded, self.features)
        if self.num_numeric:
            parts.append(dense)
        rows = widen(torch.relu(self.layer(torch.cat([*parts, label.unsqueeze(-1)], -1))))
        return torch.where(mask.unsqueeze(-1), rows, 0).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


class ClusterGates(nn.Module):
    """Gives each unit a gate in (0, 1), by the task's vector and the learned clusters that it is near to.

    A task belongs to cluster c with weight softmax_c(-|task - centroid_c|^2 / 2). The gates see the task's vector,
    which is its own, and the mix of centroids, which it shares with tasks like it. There is no shift.
    """

    def __init__(self, layers: Mapping[str, nn.Linear], encoder: TaskEncoder, clusters: int) -> None:
        super().__init__()
        self.sizes = {name: layer.out_features for name, layer in layers.items()}
        self.encoder = encoder
        width = encoder.layer.out_features
        self.centroids = nn.Parameter(torch.randn(clusters, width) / 2)
        self.gate = nn.Linear(2 * width, sum(self.sizes.values()))
        nn.init.zeros_(self.gate.weight)
        nn.init.constant_(self.gate.bias, OPEN_GATE)

    def forward(
        self, dense: Tensor, embedded: Mapping[str, Tensor], label: Tensor, mask: Tensor
    ) -> dict[str, Modulated]:
        """Return a scale [T, out] for every layer, from what `TaskEncoder.forward` takes."""
        task = self.encoder(dense, embedded, label, mask)
        distance = (task.unsqueeze(1) - self.centroids).square().sum(-1)  # [T, clusters]
        shared = torch.softmax(-distance / 2, -1) @ self.centroids
        gates = torch.sigmoid(widen(self.gate(torch.cat([task, widen(shared)], -1))))
        parts = torch.split(gates, list(self.sizes.values()), -1)
        return {name: Modulated(scale, None) for name, scale in zip(self.sizes, parts, strict=True)}


class Film(nn.Module):
    """Gives each unit a scale and a shift, linear in the task's vector. Training starts from the unmodulated model.

    A layer without a bias gets no shift.
    """

    def __init__(self, layers: Mapping[str, nn.Linear], encoder: TaskEncoder) -> None:
        super().__init__()
        self.sizes = {name: layer.out_features for name, layer in layers.items()}
        self.biased = tuple(name for name, layer in layers.items() if layer.bias is not None)
        self.encoder = encoder
        num_shifts = sum(self.sizes[name] for name in self.biased)
        self.head = nn.Linear(encoder.layer.out_features, sum(self.sizes.values()) + num_shifts)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(
        self, dense: Tensor, embedded: Mapping[str, Tensor], label: Tensor, mask: Tensor
    ) -> dict[str, Modulated]:
        """Return for every layer a scale and, with a bias, a shift [T, out], from what `TaskEncoder.forward` takes."""
        out = widen(self.head(self.encoder(dense, embedded, label, mask)))
        parts = torch.split(out, [*self.sizes.values(), *(self.sizes[name] for name in self.biased)], -1)
        shifts = dict(zip(self.biased, parts[len(self.sizes) :], strict=True))
        return {
            name: Modulated(1 + scale, shifts.get(name))
            for name, scale in zip(self.sizes, parts[: len(self.sizes)], strict=True)
        }


Modulator = ClusterGates | Film


def build_modulator(
    kind: Literal["cluster", "film"],
    model: nn.Module,
    *,
    dims: Mapping[str, int],
    num_numeric: int,
    width: int,
    clusters: int = 8,
    seed: int = 0,
) -> Modulator:
    """Build a modulator of every linear layer of `model` from `seed`; the global random state is left alone.

    `dims` has the embedding dimension of each feature that the task encoder reads, `num_numeric` is the number of
    numeric columns (0: it reads none), `width` the size of the task's vector. Raises ValueError for a model without
    linear layers, and for a layer whose weight is computed.
    """
    layers: dict[str, nn.Linear] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "weight" not in module._parameters:
            raise ValueError(
                f"meta.modulation is {kind!r}, but the weight of {name!r} is computed (a parametrization, as in weight "
                "norm): modulation scales weights that are parameters; leave one of the two out"
            )
        if isinstance(module, nn.Linear) and not any(module.weight is layer.weight for layer in layers.values()):
            layers[name] = module
    if not layers:
        raise ValueError(f"meta.modulation is {kind!r}, but {type(model).__name__} has no linear layer to modulate")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)  # not the numbers that the model starts from
        encoder = TaskEncoder(dims, num_numeric, width)
        return ClusterGates(layers, encoder, clusters) if kind == "cluster" else Film(layers, encoder)


def modulated_parameters(model: nn.Module, modulation: Mapping[str, Modulated], task: int) -> dict[str, Tensor]:
    """Return W_t0 and b_t0 of every modulated layer, by name, for one task."""
    start = {}
    for name, modulated in modulation.items():
        scale, shift = modulated.scale, modulated.shift
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        start[f"{name}.weight"] = scale[task].unsqueeze(-1) * layer.weight
        if layer.bias is not None:
            start[f"{name}.bias"] = scale[task] * layer.bias + (0 if shift is None else shift[task])
    return start
