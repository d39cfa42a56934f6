"""What reads a user's items with the upper layers of an encoder: their kept vectors, or the tokens of their titles."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gmeta.core.errors import require
from gmeta.core.sequences import Sequences
from gmeta.models.inputs import check_dropout
from gmeta.models.sasrec import answering, asking, log_scale_of
from gmeta.text.encode import pack_by_length
from gmeta.text.encoder import LayerStack, TextPooling, pool_states
from gmeta.text.sources import TextSource

TOKENS_AT_ONCE = 1024
"""So many tokens are computed together, padding included: of steps on Beauty 6 % are padding then, with 4,096 19 %."""
TOKENS_HELD = 16 * TOKENS_AT_ONCE
"""So many tokens of a call, padding included, keep what the backward pass needs; it computes the others again."""


class VectorReader(nn.Module):
    """The upper layers read kept vectors, the oldest event first, and each event sees none that came later.

        x_t = dropout(kept_t + lift(event_t) + position_t),   state = out(high(x)_t)

    `kept_t` is the kept vector of the event's text, of the encoder's `width`, and event_t is whatever else is known of
    the event, of width `dim`, which is that of states. Events count from the oldest one that is read, by learned
    vectors, because the layers of encoders like BERT know no order; those from `positions` on share one.
    """

    def __init__(
        self,
        high: LayerStack,
        width: int,
        dim: int,
        *,
        positions: int,
        dropout: float,
        similarity: str,
        temperature: float,
    ) -> None:
        super().__init__()
        require(positions >= 1, "model.args.positions", positions, "must be at least 1")
        check_dropout(dropout)
        self.high = high
        self.position = nn.Parameter(torch.empty(positions, width).normal_(std=0.02))
        self.lift = nn.Linear(dim, width, bias=False)
        nn.init.normal_(self.lift.weight, std=0.02)  # at first the layers read what they know
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(width, dim)
        self.log_scale = log_scale_of(similarity, temperature)

    def forward(self, kept: Tensor, events: Tensor, sequences: Sequences) -> Tensor:
        """Return the states [N, d] of events, from their kept vectors [N, w] and what is beside them, [N, d]."""
        position = self.position[sequences.place.clamp(max=len(self.position) - 1)]
        x = self.dropout(kept + self.lift(events) + position)
        there = torch.arange(sequences.longest, device=x.device) < sequences.lengths.unsqueeze(-1)
        states = sequences.flat(self.high(sequences.padded(x), there))
        return asking(self.out(states), self.log_scale)

    def compared(self, x: Tensor) -> Tensor:
        """Return vectors of items [n, d] as they are multiplied with states."""
        return answering(x, self.log_scale)


class TokenReader(nn.Module):
    """The whole encoder reads titles behind each other: an event's state is made of the last `window` ones up to it.

    A title is what `source` keeps of it, tokens without the special ones: those that the tokenizer puts around a text
    stand around all of them, and a decoder whose tokenizer ends no text gets the id that its config ends one with. An
    item's vector is what the same layers make of its own title. Both are pooled as `pooling` says; None is the
    encoder's own way: the first token (cls), or the last one of a decoder. What has no text is the zero vector.

    Equal sequences of a call are read once, and those of like length together. Of a large call what the backward pass
    needs is computed again there (`TOKENS_HELD`), so that memory does not grow with its tokens.
    """

    def __init__(
        self,
        high: LayerStack,
        source: TextSource,
        *,
        window: int,
        max_tokens: int,
        pooling: TextPooling | None,
        similarity: str,
        temperature: float,
    ) -> None:
        super().__init__()
        require(window >= 1, "model.args.window", window, "must be at least 1")
        self.high = high
        self.window = window
        self.pooling: TextPooling = pooling or ("last" if high.span.causal else "cls")
        self._source = [source]  # a list hides it from the model's state
        self._around = source.encoder.tokenizer.around()
        self.before, self.behind = self._around
        if high.span.causal and not self.behind and source.encoder.tokenizer.stop is not None:
            self.behind = [source.encoder.tokenizer.stop]
        longest = window * max_tokens + len(self.before) + len(self.behind)
        most = source.encoder.max_tokens
        rule = f"{window} titles of {max_tokens} tokens are up to {longest}, and the encoder has {most} positions"
        require(longest <= most, "model.args.window", window, f"{rule}: lower it, or model.args.max_tokens")
        self.log_scale = log_scale_of(similarity, temperature)

    def forward(self, texts: Tensor, sequences: Sequences) -> Tensor:
        """Return the states [N, w] of events from the text ids of their items, int64 [N]; zeros where none is wanted.

        Titles of other tasks, and those beyond the window, are not read.
        """
        back = torch.arange(self.window - 1, -1, -1, device=texts.device)
        event = torch.arange(len(texts), device=texts.device).unsqueeze(-1) - back
        there = sequences.place.unsqueeze(-1) >= back
        if sequences.wanted is not None:
            there = there & sequences.wanted.unsqueeze(-1)
        return asking(self._read(torch.where(there, texts[event.clamp(min=0)], 0)), self.log_scale)

    def compared(self, texts: Tensor) -> Tensor:
        """Return the vectors [n, w] of items by the ids of their texts, int64 [n], as they multiply with states."""
        return answering(self._read(texts.unsqueeze(-1)), self.log_scale)

    def _read(self, texts: Tensor) -> Tensor:
        """Return a vector [n, w] for titles behind each other, int64 [n, W]; 0 is none."""
        if not len(texts):
            return next(self.high.parameters()).new_zeros(0, self._source[0].encoder.dim)
        distinct, place = torch.unique(texts, dim=0, return_inverse=True)
        lengths = self._inside(distinct).sum((1, 2)) + len(self.before) + len(self.behind)
        found, order, held = [], [], 0
        for some in pack_by_length(lengths.tolist(), TOKENS_AT_ONCE):
            order += some
            ids, mask = self._in_a_row(distinct[some])
            held += ids.numel()
            x = self._source[0].encoder.low(ids, mask)
            if held > TOKENS_HELD and torch.is_grad_enabled():
                found.append(checkpoint(self._pooled, x, mask, use_reentrant=False, preserve_rng_state=False))
            else:
                found.append(self._pooled(x, mask))
        where = torch.tensor(order, device=texts.device).argsort()
        vectors: Tensor = torch.cat(found)[where] * distinct.any(-1, keepdim=True)
        return vectors[place]

    def _pooled(self, x: Tensor, mask: Tensor) -> Tensor:
        return pool_states(self.high(x, mask), mask, self.pooling)[:, 0]

    def _inside(self, texts: Tensor) -> Tensor:
        """Return which tokens [n, W, K] of titles are read: those that are there, without the special ones."""
        source, (before, behind) = self._source[0], self._around
        token = torch.arange(source.kept.shape[1], device=texts.device)
        end = torch.where(texts > 0, source.counts[texts] - len(behind), 0)
        return (token >= len(before)) & (token < end.unsqueeze(-1))

    def _in_a_row(self, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ids int64 [n, P] and the mask bool [n, P] of the tokens of titles, and of those around all."""
        source = self._source[0]
        inside = self._inside(texts).flatten(1)
        length = inside.sum(-1, keepdim=True)
        order = (~inside).to(torch.uint8).argsort(dim=-1, stable=True)[:, : int(length.max())]
        tokens = source.kept[texts].flatten(1).gather(1, order).long()
        num, first, last = len(texts), len(self.before), len(self.behind)
        ids = torch.cat([tokens.new_tensor(self.before).expand(num, -1), tokens, tokens.new_zeros(num, last)], 1)
        place = torch.arange(ids.shape[1], device=texts.device)
        ids = ids.masked_fill(place >= first + length, source.encoder.tokenizer.pad)
        ends = first + length + torch.arange(last, device=texts.device)
        ids = ids.scatter(1, ends, tokens.new_tensor(self.behind).expand(num, -1))
        return ids, place < first + length + last
