"""A first vector for ids that training never saw, made of what else is known of an example: `embedding.generator`.

Meta-Embedding (Pan, Li, Ao, Tang and He, SIGIR 2019, arXiv 1904.11547) trains a small network on old ids that are
treated as new ones, to give the embedding of a new id from the ad's other features. Here the ids that id dropout masks
are the examples. Where an id is out of vocabulary, what the network makes is added to the row of unknown ids. That row
stays: a task that adapts embeddings adapts it, as it adapts the row of a known id.

A network needs to know which ids are unknown: the numeric columns end with one of 0 and 1 for each. They reach it as
all numeric columns reach a model, through both engines, micro-batches and serving.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gmeta.core.errors import nearest
from gmeta.models.inputs import InputSpec, as_vectors

NAME = "id_generators"
"""The networks are a submodule of the model of this name, so that they are trained, adapted and saved as its layers."""


class IdGenerators(nn.Module):
    """A network for each feature: embeddings and numeric columns -> a ReLU layer -> [..., d].

    `sources` names what the vector of each feature is made of. The last layers start at 0, so that a model starts as
    one without generators.
    """

    def __init__(self, inputs: InputSpec, sources: Mapping[str, Sequence[str]]) -> None:
        super().__init__()
        self.num_numeric = inputs.num_numeric
        self.sources = [(name, [s for s in of if s in inputs.widths]) for name, of in sources.items()]
        self.columns = [[inputs.numeric.index(s) for s in of if s not in inputs.widths] for of in sources.values()]
        self.networks = nn.ModuleList()
        for (name, features), columns in zip(self.sources, self.columns, strict=True):
            width, dim = sum(inputs.widths[feature] for feature in features) + len(columns), inputs.features[name]
            last = nn.Linear(2 * dim, dim)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.networks.append(nn.Sequential(nn.Linear(width, 2 * dim), nn.ReLU(), last))

    def forward(self, dense: Tensor, embedded: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the model's own numeric columns [..., F], and its embeddings [..., d], of unknown ids with what the
        networks make. `dense` [..., F + G] ends with a column of 0 and 1 for each generated feature.
        """
        numeric, unknown = dense[..., : self.num_numeric], dense[..., self.num_numeric :]
        out = dict(embedded)
        for i, ((name, features), columns) in enumerate(zip(self.sources, self.columns, strict=True)):
            parts = as_vectors(embedded, features) + [numeric[..., c : c + 1] for c in columns]
            made = self.networks[i](torch.cat(parts, -1))
            out[name] = embedded[name] + unknown[..., i : i + 1] * made
        return numeric, out


def add_generators(model: nn.Module, inputs: InputSpec, sources: Mapping[str, Sequence[str]], *, seed: int) -> None:
    """Have `model` read generated vectors where ids are unknown; it is then called with G more columns of `dense`.

    `inputs` are those that the model reads. The networks start from `seed`; the global random state is left as it was.
    ValueError for names that the model does not read.
    """
    for name, of in sources.items():
        if name not in inputs.features:
            known = nearest(name, inputs.features)
            raise ValueError(f"embedding.generator names {name!r}, which is no feature that the model reads: {known}")
        for source in of:
            if source == name or source not in (*inputs.widths, *inputs.numeric):
                known = nearest(source, [other for other in (*inputs.widths, *inputs.numeric) if other != name])
                raise ValueError(f"embedding.generator.{name} names {source!r}, which the model does not read: {known}")
    if hasattr(model, NAME):
        raise ValueError(f"{type(model).__name__} has an attribute {NAME}, which embedding.generator takes: rename it")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 2)  # not the numbers that the model or a modulator starts from
        model.add_module(NAME, IdGenerators(inputs, sources))
    model.register_forward_pre_hook(_generate)


def _generate(model: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    made: tuple[Tensor, dict[str, Tensor]] = getattr(model, NAME)(*args)
    return made
