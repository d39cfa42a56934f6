"""Texts beside what any model reads: vectors of titles and of lists of short texts, made of a store's, for a model that
knows vectors alone. Vectors that the data have, of images say, go the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor, nn

from gmeta.core.batch import text_ids_of
from gmeta.core.errors import require
from gmeta.models.inputs import InputSpec, check_words
from gmeta.models.layers import SAMPLE, Standardised
from gmeta.models.registry import find_model, resolved_args
from gmeta.text.bahe import texts_to_read
from gmeta.text.encoder import TextPooling, open_encoder
from gmeta.text.model import TextModel
from gmeta.text.sources import TextSource
from gmeta.text.store import PLACEHOLDER, spec_of
from gmeta.text.tuning import Tune, tuned


class WithTexts(TextModel):
    """The model `model`, which also reads t, u_1, u_2, … as embeddings, and u_1 * t, u_2 * t, … as vectors:

        t   = tower(s(vector of the target's text))
        u_n = the mean of tower_n(s(vector)) over the texts of list n

    The vectors are those of the first `layers` of the encoder in `encoder`, one of each text, kept as BAHE keeps them
    (arXiv 2403.19347). Their numbers share a large mean, so that s standardises them, by the texts that the model is
    made with. A tower is one layer, to as many numbers as an embedding has: t and u_n are embeddings, which models of
    products multiply with those of ids. Vectors of the data go the same way, standardised by rows of train. `target`
    names the feature with the item's text, `lists` the unpooled sequences of texts of the same vocabulary: all of them
    where none is named. The products u_n * t are ours: a user's taste is told by both together. `args` are those of the
    model. A missing text or vector, and a list without any text, are zeros. The model reads ids of lists beside their
    texts, but none of the target's text, which is an item's in another form.

    With `tune` none nothing of the encoder is trained, and its upper layers are left out. Else they are trained as in
    BAHE (full, lora with adapters of `rank`, or norms) and read the vectors first: the target's by itself, those of a
    list as a sequence, of whose states u_n is made.
    """

    def __init__(
        self,
        inputs: InputSpec,
        *,
        model: str,
        encoder: str,
        layers: int,
        args: Mapping[str, Any] | None = None,
        store: str = "",
        target: str = "",
        lists: Sequence[str] = (),
        pooling: TextPooling = "mean",
        template: str = PLACEHOLDER,
        max_tokens: int = 64,
        tune: Tune = "none",
        rank: int = 8,
    ) -> None:
        super().__init__()
        check_words({"tune": get_args(Tune)}, tune=tune)
        require(model != "with_texts", "model.args.model", model, "reads texts itself: name the model that is to")
        self.target, self.lists = texts_to_read(inputs, target, lists)
        self.texts = (self.target, *self.lists)
        self.made = {name: f"text of {name}" for name in (*self.texts, *(f"{name}*" for name in self.lists))}
        for name in self.made.values():
            if name in inputs.widths:
                raise ValueError(f"the pack has a feature {name!r}, a name that with_texts uses: rename it")
        self.features = tuple(name for name in inputs.widths if name != self.target or name == inputs.item)
        opened = open_encoder(encoder, layers)
        spec = spec_of(opened, pooling=pooling, vectors=1, template=template, max_tokens=max_tokens)
        source = TextSource(opened, spec, "behaviours", inputs.texts_by_id(self.target), store)
        self.keep_texts(inputs, self.target, source, encoder)
        self.high = None if tune == "none" else tuned(opened.high, tune, rank)
        self.vectors, dim = tuple(inputs.vectors), inputs.embedding_dim
        self.of_texts = Standardised(opened.dim)
        self.of_vectors = nn.ModuleDict(
            {str(i): Standardised(width) for i, width in enumerate(inputs.vectors.values())}
        )
        read = [opened.dim] * len(self.texts) + list(inputs.vectors.values())
        self.towers = nn.ModuleDict({str(place): nn.Linear(width, dim) for place, width in enumerate(read)})
        self._see_texts(inputs.texts_by_id(self.target))
        factory = find_model(model, "model.args.model")
        embeddings = dict.fromkeys([*(self.made[name] for name in self.texts), *self.vectors], dim)
        products = dict.fromkeys([self.made[f"{name}*"] for name in self.lists], dim)
        own = {name: width for name, width in inputs.features.items() if name in self.features}
        read_by_it = replace(inputs, features={**own, **embeddings}, vectors=products)
        self.base = factory(read_by_it, **resolved_args(factory, args or {}, model, "model.args.args"))
        self.routes = tuple(getattr(self.base, "routes", ()))
        layers_of = tuple(getattr(self.base, "decision_layers", ()))
        if layers_of:
            self.decision_layers = ("towers", *(f"base.{name}" for name in layers_of))
        for layer in ("head", "last_layer"):
            if hasattr(self.base, layer):
                setattr(self, layer, f"base.{getattr(self.base, layer)}")

    def see_vectors(self, samples: Mapping[str, Tensor]) -> None:
        """Take the statistics of vectors of the data, from samples [rows, n] by name."""
        for place, name in enumerate(self.vectors):
            self.of_vectors[str(place)].see(samples[name])  # type: ignore[operator]

    def forward(self, dense: Tensor, embedded: dict[str, Tensor]) -> Tensor:
        """Return what the model makes of its inputs and of the texts' vectors."""
        vectors = [self._of_texts(embedded, place) for place in range(len(self.texts))]
        made = {self.made[name]: vector for name, vector in zip(self.texts, vectors, strict=True)}
        made |= {self.made[f"{name}*"]: made[self.made[name]] * vectors[0] for name in self.lists}
        for place, name in enumerate(self.vectors):
            made[name] = self._read(len(self.texts) + place, self.of_vectors[str(place)](embedded[name]))
        found: Tensor = self.base(dense, {**embedded, **made})
        return found

    def train(self, mode: bool = True) -> WithTexts:
        """Turn the model's dropout on or off. The upper layers have none: it would not be seeded by example."""
        super().train(mode)
        if self.high is not None:
            self.high.eval()
        return self

    def _of_texts(self, embedded: dict[str, Tensor], place: int) -> Tensor:
        """Return the vector [..., width] of a feature or a list; what is equal is read once."""
        ids = embedded[text_ids_of(self.texts[place])]
        if self.high is not None:
            lists, where = torch.unique(ids.flatten(0, -2), dim=0, return_inverse=True)
            states, mask = self._states(lists)
            mean = states.sum(-2) / mask.sum(-1, keepdim=True).clamp(min=1).to(states.dtype)
            read = self._read(place, self.of_texts(mean))
            return read[where].view(*ids.shape[:-1], read.shape[-1])
        distinct, where = torch.unique(ids, return_inverse=True)
        vectors, there = self._states(distinct.unsqueeze(-1))
        found = self._read(place, self.of_texts(vectors[:, 0]))[where].sum(-2)
        return found / there[:, 0][where].sum(-1, keepdim=True).clamp(min=1).to(found.dtype)

    def _states(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return what towers read of texts [n, L]: [n, L, width], zeros where the mask, bool [n, L], is False."""
        kept = self.source.states(ids, self.towers["0"].weight.dtype)  # type: ignore[arg-type]
        if self.high is None:
            return kept.values * kept.mask.unsqueeze(-1), kept.mask
        return self.high(kept.values, kept.mask), kept.mask

    @torch.no_grad()
    def _see_texts(self, texts: Sequence[str]) -> None:
        """Take the statistics of texts by id."""
        given = [i for i, text in enumerate(texts) if text]
        states, _ = self._states(torch.tensor(given[:: -(-len(given) // SAMPLE) or 1]).view(-1, 1))
        self.of_texts.see(states[:, 0])

    def _read(self, place: int, vectors: Tensor) -> Tensor:
        """Return what a tower makes of standardised vectors [..., n]: [..., d], zeros for zeros."""
        found: Tensor = self.towers[str(place)](vectors)
        return found * vectors.any(-1, keepdim=True)
