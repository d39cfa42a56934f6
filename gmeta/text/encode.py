"""Many texts through the lower layers of an encoder, texts of like length together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gmeta.text.encoder import TextEncoder, pool_states
from gmeta.text.store import StoreSpec, render

TOKENS_PER_BATCH = 4096
"""Tokens that are computed together, padding included."""


@torch.no_grad()
def encode_batches(
    encoder: TextEncoder, spec: StoreSpec, texts: Sequence[str]
) -> Iterator[tuple[list[int], Tensor, int]]:
    """Yield the texts' vectors batch by batch: positions in `texts`, float32 [n, vectors, d], and how many of these
    texts were cut at `spec.max_tokens`. Short texts come first.

    A text without tokens gives zeros. Raises ValueError for a text that is no Unicode.
    """
    tokens, cut = encoder.tokenizer([render(spec.template, text) for text in texts], spec.max_tokens)
    for batch in pack_by_length([len(found) for found in tokens], TOKENS_PER_BATCH):
        ids, mask = encoder.batch([tokens[position] for position in batch])
        states = encoder.low(ids, mask).float()
        yield batch, pool_states(states, mask, spec.pooling, spec.vectors).cpu(), sum(cut[at] for at in batch)


def encode_texts(encoder: TextEncoder, spec: StoreSpec, texts: Sequence[str]) -> Tensor:
    """Return the vectors of texts as a store of `spec` would have them before rounding: float32 [n, vectors, d]."""
    out = torch.zeros(len(texts), spec.vectors, spec.dim)
    for batch, vectors, _ in encode_batches(encoder, spec, texts):
        out[batch] = vectors
    return out


def pack_by_length(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Yield positions, short texts first, in batches whose number times their longest length is within the budget;
    a text that is beyond it alone is a batch.
    """
    batch: list[int] = []
    for position in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * max(1, lengths[position]) > budget:
            yield batch
            batch = []
        batch.append(position)
    if batch:
        yield batch
