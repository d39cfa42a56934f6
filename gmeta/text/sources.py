"""What the upper layers of an encoder read of texts: kept vectors of the lower layers, or states of all tokens.

A source turns text ids int64 [n, L] (0 is no text) into `TextStates`, in one of four ways, which differ in what they
cost and in nothing that is trained:

    behaviours  vectors that were made once, from a store or when the model was made (BAHE: Geng et al., 2403.19347)
    batch       the same vectors, made in each step of the distinct texts in it: what a store saves
    states      token states of each text, made once
    tokens      all tokens behind each other, through the lower layers in each step: what BAHE is measured against
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gmeta.text.encode import encode_texts
from gmeta.text.encoder import TextEncoder, pool_states
from gmeta.text.store import StoreSpec, open_behaviours, render

Encode = Literal["behaviours", "batch", "states", "tokens"]
QUIETLY = 4096
"""So many texts that a store lacks are encoded without a word: it takes seconds, and a new day always has some."""
_TEXTS_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class TextStates:
    """A sequence of P states for each of n histories, those of one text side by side."""

    values: Tensor  # [n, P, d]
    mask: Tensor  # bool [n, P], which of them count
    text: Tensor  # int64 [n, P], the position of each state's text in the history


class TextSource:
    """The texts of one table, by id, with what is kept of each.

    It is no part of a model's state: it is made anew, of the same texts and encoder. Nothing in it is trained
    (`gmeta.text.refreshed` has the one where the lower layers are).
    With a `store` the vectors of `behaviours` come from there, and texts that it lacks are encoded here, with a warning
    where they are many. ValueError for a store of another spec.
    """

    def __init__(
        self, encoder: TextEncoder, spec: StoreSpec, encode: Encode, texts: Sequence[str], store: str = ""
    ) -> None:
        self.spec = spec
        self.encode = encode
        self.encoder = encoder
        self.layers: nn.Module | None = None  # what of the lower layers is trained
        self.num_given = len(texts)  # texts that it began with; what follows was added
        self.num_cut = 0  # texts that were longer than the spec's max_tokens
        self.kept, self.counts = self._make(texts, store)  # [texts, K, ...], and how many tokens each text has

    def __len__(self) -> int:
        """Return the number of texts, id 0 included."""
        return len(self.kept)

    def add(self, texts: Sequence[str]) -> None:
        """Encode texts, and give them the next ids."""
        kept, counts = (part.to(self.kept.device) for part in self._make(texts))
        width = max(self.kept.shape[1], kept.shape[1])
        self.kept = torch.cat([_widened(self.kept, width), _widened(kept, width)])
        self.counts = torch.cat([self.counts, counts])

    def forget(self) -> None:
        """Forget the texts that were added."""
        self.kept, self.counts = self.kept[: self.num_given], self.counts[: self.num_given]

    def follow(self, like: Tensor) -> None:
        """Go to a device, and have the lower layers compute in the type of `like`. What is kept stays rounded."""
        self.encoder.low.to(like.device, like.dtype)
        self.kept, self.counts = self.kept.to(like.device), self.counts.to(like.device)

    @torch.no_grad()
    def states(self, ids: Tensor, dtype: torch.dtype) -> TextStates:
        """Return what the upper layers read of histories [n, L]."""
        match self.encode:
            case "behaviours":
                return self._in_a_row(ids, self.kept[ids].to(dtype))
            case "batch":
                distinct, place = torch.unique(ids, return_inverse=True)
                return self._in_a_row(ids, self._pooled(distinct)[place].to(dtype))
            case "states":
                found, mask, text = self._tokens_of(ids)
                return TextStates(found.to(dtype), mask, text)
            case "tokens":
                found, mask, text = self._tokens_of(ids)
                self._require_positions(found.shape[1])
                return TextStates(self.encoder.low(found.long(), mask), mask, text)

    def fresh(self, ids: Tensor, dtype: torch.dtype) -> TextStates:
        """Return the same, of texts whose gradient the lower layers are to get, where they are trained."""
        return self.states(ids, dtype)

    def before_step(self, step: int) -> None:
        """Learn that a training step begins after `step` others."""

    def loaded(self) -> None:
        """Learn that weights were loaded."""

    def _require_positions(self, length: int) -> None:
        most = self.encoder.low.positions
        if most is not None and length > most:
            raise ValueError(
                f"model.args.encode is 'tokens': a history has {length} tokens, and this encoder has {most} positions; "
                "lower model.args.max_tokens, or the max_length of the sequence in the schema, or take another encode"
            )

    def _in_a_row(self, ids: Tensor, vectors: Tensor) -> TextStates:
        """Put vectors [n, L, V, d] one behind the other. A segment of a text without tokens does not count."""
        num = vectors.shape[2]
        bounds = torch.arange(num + 1, device=ids.device) * self.counts[ids].unsqueeze(-1)
        first = torch.div(bounds + num - 1, num, rounding_mode="floor")  # token of each segment
        mask = (ids > 0).unsqueeze(-1) & (first[..., :-1] < first[..., 1:])
        text = torch.arange(ids.shape[1], device=ids.device).repeat_interleave(num).expand(len(ids), -1)
        return TextStates(vectors.flatten(1, 2), mask.flatten(1), text)

    def _tokens_of(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what is kept of the tokens of histories, [n, P, ...], without gaps; mask and text as `TextStates`."""
        counts = torch.where(ids > 0, self.counts[ids], 0)
        kept = self.kept[ids].flatten(1, 2)
        there = (torch.arange(self.kept.shape[1], device=ids.device) < counts.unsqueeze(-1)).flatten(1)
        length = max(1, int(counts.sum(-1).max()) if len(ids) else 1)
        order = (~there).to(torch.uint8).argsort(dim=-1, stable=True)[:, :length]
        where = order.view(*order.shape, *[1] * (kept.dim() - 2)).expand(-1, -1, *kept.shape[2:])
        text = torch.div(order, self.kept.shape[1], rounding_mode="floor")
        return kept.gather(1, where), there.gather(1, order), text

    def _pooled(self, texts: Tensor, low: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
        """Return the vectors of texts [n], as a store has them before rounding: [n, V, d]."""
        low = low or self.encoder.low
        length = max(1, int(self.counts[texts].max()) if len(texts) else 1)
        tokens = self.kept[texts, :length].long()
        mask = torch.arange(length, device=texts.device) < self.counts[texts].unsqueeze(-1)
        return pool_states(low(tokens, mask), mask, self.spec.pooling, self.spec.vectors)

    @torch.no_grad()
    def _make(self, texts: Sequence[str], store: str = "") -> tuple[Tensor, Tensor]:
        spec = self.spec
        tokens, cut = self.encoder.tokenizer([render(spec.template, text) for text in texts], spec.max_tokens)
        self.num_cut += sum(cut)
        counts = torch.tensor([len(found) for found in tokens], dtype=torch.int64)
        if self.encode == "behaviours":
            vectors = torch.zeros(len(texts), spec.vectors, spec.dim, dtype=torch.float16)
            missing = _read_stored(store, spec, texts, vectors) if store else np.arange(len(texts))
            vectors[missing] = halved(encode_texts(self.encoder, spec, [texts[i] for i in missing]))
            return vectors, counts
        ids, mask = self.encoder.batch(tokens)
        if self.encode != "states":
            return ids.int(), counts
        kept = torch.zeros(*ids.shape, spec.dim, dtype=torch.float16)
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            some = slice(start, start + _TEXTS_AT_ONCE)
            kept[some] = halved(self.encoder.low(ids[some], mask[some]))
        return kept, counts


def _read_stored(store: str, spec: StoreSpec, texts: Sequence[str], out: Tensor) -> NDArray[np.int64]:
    """Read into `out` what a store has of texts, and return the positions of the others."""
    behaviours = open_behaviours(store)
    own = behaviours.spec
    behaviours.require(replace(spec, dtype=own.dtype, precision=own.precision))  # however it computed and keeps them
    rows = behaviours.find(texts)
    missing = np.flatnonzero(rows[1:] < 0) + 1  # id 0 is no text
    if len(missing) > QUIETLY:
        warnings.warn(
            f"{store} lacks {len(missing):,} of {len(texts) - 1:,} texts, the first is {texts[missing[0]]!r}: they are "
            "encoded now, and again when the model is made anew; `gmeta embed`, with the settings of this store, keeps "
            "them",
            stacklevel=2,
        )
    there = np.flatnonzero(rows >= 0)
    out[there] = behaviours.read(rows[there], torch.float16)
    if not bool(torch.isfinite(out).all()):
        raise ValueError(
            f"{store} gives numbers that are not finite: `gmeta embed verify --store {store}` names the damaged shard"
        )
    return missing


def halved(values: Tensor, cure: str = "take model.args.encode batch, or another encoder") -> Tensor:
    """Return fp16 numbers. ValueError, with the cure, for those that it cannot hold."""
    half = values.half()
    if not bool(torch.isfinite(half).all()):
        raise ValueError(
            f"the encoder gives {float(values.abs().max()):.3g}, more than the fp16 of kept vectors can hold: {cure}"
        )
    return half


def _widened(values: Tensor, width: int) -> Tensor:
    more = values.new_zeros(len(values), width - values.shape[1], *values.shape[2:])
    return torch.cat([values, more], 1)
