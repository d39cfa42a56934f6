"""Kept vectors of lower layers that are trained: made anew every so many steps, so that their age is bounded.

A training step reads a text in one of two ways:

    fresh   by the lower layers as they are, and they get its gradient
    kept    by the lower layers as they were at the last refresh, rounded as `behaviours` has them; no gradient

A refresh comes before each step whose number (from 0) `every` divides, so that kept vectors are at most every - 1 steps
old: with 1 nothing is stale, and all texts are encoded anew in each step. Outside of training all is kept, by the
layers as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gmeta.core.errors import require
from gmeta.text.encode import TOKENS_PER_BATCH, pack_by_length
from gmeta.text.encoder import LowLayers, TextEncoder
from gmeta.text.readers import TOKENS_HELD
from gmeta.text.sources import Encode, TextSource, TextStates, halved
from gmeta.text.store import StoreSpec
from gmeta.text.tuning import Tune, tuned

_MAKING = Lock()
"""Held while a table is made or grows: requests of several threads come at once. It is no part of a model's copies."""
_CURE = "lower dense.lr, and train again"


class TrainedLayers(nn.Module):
    """The layers of an encoder below the split, to be trained; what embeds tokens is no part of them.

    `refreshed` holds the trained numbers as they were at the last refresh, one behind the other: a run that resumes
    makes the same kept vectors of them. ValueError where none of the layers' parameters is trained.
    """

    refreshed: Tensor

    def __init__(self, low: LowLayers) -> None:
        super().__init__()
        self.stack = low.stack
        if not self._trained():
            raise ValueError(
                "model.args.refresh asks for trained lower layers, and there are none: set it to 0, or take more "
                "model.args.layers and another model.args.tune than none"
            )
        self.register_buffer("refreshed", self._now())

    def refresh(self) -> bool:
        """Take the layers as they are for the kept vectors. Return whether they are others than before."""
        now = self._now()
        if torch.equal(now, self.refreshed):
            return False
        self.refreshed.copy_(now)
        return True

    def as_refreshed(self) -> dict[str, Tensor]:
        """Return the trained parameters as they were at the last refresh, by their names in the stack."""
        trained = self._trained()
        parts = torch.split(self.refreshed, [p.numel() for p in trained.values()])
        return {name: part.view_as(p) for part, (name, p) in zip(parts, trained.items(), strict=True)}

    def train(self, mode: bool = True) -> TrainedLayers:
        """Remember whether steps are taken. The layers have no dropout: it would not be seeded by example."""
        super().train(mode)
        self.stack.eval()
        return self

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.stack.named_parameters() if p.requires_grad}

    def _now(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self._trained().values()])


class RefreshedTexts(TextSource):
    """A source over `TrainedLayers`. Those parameters of the encoder's lower layers are trained that ask for it.

    Tables of kept vectors, [texts, V, d], are made when weights are settled: when a step begins, or weights were
    loaded. Before that a text is encoded whenever it is read.
    """

    def __init__(self, encoder: TextEncoder, spec: StoreSpec, texts: Sequence[str], every: int) -> None:
        require(every >= 1, "model.args.refresh", every, "must be 0 (the lower layers are frozen) or more")
        super().__init__(encoder, spec, "batch", texts)
        self.every = every
        self.layers = self._layers = TrainedLayers(encoder.low)
        self._settled = False
        self._of_refresh: Tensor | None = None  # what training reads
        self._of_now: Tensor | None = None  # what is read outside of training

    @torch.no_grad()
    def states(self, ids: Tensor, dtype: torch.dtype) -> TextStates:
        """Return kept vectors of histories [n, L]."""
        table = self._of_refresh if self._layers.training else self._current()
        if table is not None:
            return self._in_a_row(ids, table[ids].to(dtype))
        distinct, place = torch.unique(ids, return_inverse=True)
        return self._in_a_row(ids, self._kept(distinct, refreshed=self._layers.training)[place].to(dtype))

    def fresh(self, ids: Tensor, dtype: torch.dtype) -> TextStates:
        """Return the vectors of histories [n, L] with their gradient; outside of training, kept ones."""
        if not self._layers.training:
            return self.states(ids, dtype)
        distinct, place = torch.unique(ids, return_inverse=True)
        return self._in_a_row(ids, self._vectors(distinct, self.encoder.low)[place].to(dtype))

    def before_step(self, step: int) -> None:
        """Refresh where it is due; `step` is the number of steps taken."""
        self._settled, self._of_now = True, None
        if step % self.every == 0 and self._layers.refresh():
            self._of_refresh = None
        if self._of_refresh is None:
            self._of_refresh = self._kept(torch.arange(len(self), device=self.kept.device), refreshed=True)

    def loaded(self) -> None:
        """Forget all vectors: they were those of other weights."""
        self._settled, self._of_refresh, self._of_now = True, None, None

    def add(self, texts: Sequence[str]) -> None:
        """Take texts in, and give them the next ids."""
        with _MAKING:
            before = len(self)
            super().add(texts)
            self._of_refresh = None
            if self._of_now is not None:
                new = torch.arange(before, len(self), device=self.kept.device)
                self._of_now = torch.cat([self._of_now, self._kept(new, refreshed=False)])

    def forget(self) -> None:
        """Forget the texts that were added."""
        with _MAKING:
            super().forget()
            self._of_refresh = None
            self._of_now = None if self._of_now is None else self._of_now[: self.num_given]

    def follow(self, like: Tensor) -> None:
        """Go to a device, and have the lower layers compute in the type of `like`."""
        super().follow(like)
        self._of_refresh = self._of_now = None

    def _current(self) -> Tensor | None:
        if not self._settled:
            return None
        with _MAKING:
            if self._of_now is None:
                self._of_now = self._kept(torch.arange(len(self), device=self.kept.device), refreshed=False)
            return self._of_now

    @torch.no_grad()
    def _kept(self, texts: Tensor, *, refreshed: bool) -> Tensor:
        """Return fp16 vectors of texts [n], of the layers as they are or were: [n, V, d]."""
        with torch.autocast(texts.device.type, enabled=False), self._layers_of(refreshed) as low:
            return halved(self._vectors(texts, low), _CURE)

    @contextmanager
    def _layers_of(self, refreshed: bool) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
        low = self.encoder.low
        if not refreshed:
            yield low
            return
        values = {f"stack.{name}": value for name, value in self._layers.as_refreshed().items()}
        yield lambda tokens, mask: torch.func.functional_call(low, values, (tokens, mask))

    def _vectors(self, texts: Tensor, low: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Return unrounded vectors of texts [n], those of like length computed together: [n, V, d].

        Of many tokens what the backward pass needs is computed again there, so that memory does not grow with them.
        """
        counts = self.counts[texts].tolist()
        found, order, held = [], list[int](), 0
        for batch in pack_by_length(counts, TOKENS_PER_BATCH) if counts else [[]]:
            order += batch
            held += sum(counts[at] for at in batch)
            some = texts[torch.tensor(batch, dtype=torch.int64, device=texts.device)]
            if held > TOKENS_HELD and torch.is_grad_enabled():
                found.append(checkpoint(self._pooled, some, low, use_reentrant=False, preserve_rng_state=False))
            else:
                found.append(self._pooled(some, low))
        return torch.cat(found)[torch.tensor(order, dtype=torch.int64, device=texts.device).argsort()]


def text_source(
    encoder: TextEncoder,
    spec: StoreSpec,
    encode: Encode,
    texts: Sequence[str],
    store: str,
    refresh: int,
    tune: Tune,
    rank: int,
) -> TextSource:
    """Return the source of a model's arguments; with `refresh` over layers of which `tune` says what is trained.
    ValueError for arguments that do not go together.
    """
    kept = encode == "behaviours" or not store
    require(kept, "model.args.store", store, f"nothing is read of it with model.args.encode {encode}: leave it out")
    if not refresh:
        return TextSource(encoder, spec, encode, texts, store)
    for key, value, unset in (("encode", encode, "behaviours"), ("store", store, "")):
        told = "the lower layers are trained, and their vectors are kept in memory; leave it out, or set refresh to 0"
        require(value == unset, f"model.args.{key}", value, f"model.args.refresh is {refresh}: {told}")
    tuned(encoder.low.stack.requires_grad_(True), tune, rank)
    return RefreshedTexts(encoder, spec, texts, refresh)
