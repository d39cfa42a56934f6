"""A causal Transformer over a user's items, by their ids: what comes next is the item whose vector is nearest."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmeta.core.errors import require
from gmeta.core.sequences import Sequences
from gmeta.models.inputs import InputSpec, check_dropout

Similarity = Literal["dot", "cosine"]
PROMPT = "prompt"
"""Under which name a model finds a vector [N, d] that its task has adapted, to be added to its events."""


class HistoryReader(nn.Module):
    """What models of next items have in common: blocks over the vectors of events, and a comparison.

    `dim` is the width d of an event, of a state and of an item.
    """

    def __init__(
        self, dim: int, *, blocks: int, heads: int, positions: int, dropout: float, similarity: str, temperature: float
    ) -> None:
        super().__init__()
        for key, value in (("blocks", blocks), ("heads", heads), ("positions", positions)):
            require(value >= 1, f"model.args.{key}", value, "must be at least 1")
        check_dropout(dropout)
        require(dim % heads == 0, "model.args.heads", heads, f"must divide the width {dim}")
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(CausalBlock(dim, heads, positions, dropout) for _ in range(blocks))
        self.norm = nn.LayerNorm(dim)
        self.log_scale = log_scale_of(similarity, temperature)

    def forward(self, events: Tensor, sequences: Sequences) -> Tensor:
        """Return the states of events, [N, d] each, as they are multiplied with items."""
        x = self.dropout(events)
        for block in self.blocks:
            x = block(x, sequences)
        return asking(self.norm(x), self.log_scale)

    def compared(self, x: Tensor) -> Tensor:
        """Return the vectors of items, [n, d], as they are multiplied with states: with cosine of length 1."""
        return answering(x, self.log_scale)


def log_scale_of(similarity: str, temperature: float) -> nn.Parameter | None:
    """Return the logarithm of what cosines are multiplied with, [1], to be learned; None for a plain product."""
    words = get_args(Similarity)
    require(similarity in words, "model.args.similarity", similarity, f"must be one of {', '.join(words)}")
    require(temperature > 0, "model.args.temperature", temperature, "must be more than 0")
    return nn.Parameter(torch.tensor([1 / temperature]).log()) if similarity == "cosine" else None


def answering(x: Tensor, log_scale: Tensor | None) -> Tensor:
    """Return vectors of items [n, d] as they are multiplied with states: with a scale of length 1."""
    return x if log_scale is None else F.normalize(x, dim=-1)


def asking(x: Tensor, log_scale: Tensor | None) -> Tensor:
    """Return states [n, d] as they are multiplied with vectors of items: with a scale as long as that says."""
    return x if log_scale is None else F.normalize(x, dim=-1) * log_scale.exp()


class SASRec(nn.Module):
    """Event t's state, which saw events 0 to t, scores each item by a product with the item's vector.

        x_t = dropout(event_t),   x = blocks(x),   state = norm(x),   score = state . item

    (Kang and McAuley, "Self-attentive sequential recommendation", ICDM 2018, arXiv 1808.09781, with distances in place
    of positions: see `CausalBlock`.) An item's vector is the sum of the embeddings of the features that items own, an
    event's the sum of those of all its features. Texts are no such features. With `similarity` cosine both vectors have
    length 1, and their product is divided by a learned temperature, which starts at `temperature`.
    """

    def __init__(
        self,
        inputs: InputSpec,
        *,
        blocks: int = 1,
        heads: int = 1,
        positions: int = 50,
        dropout: float = 0.5,
        similarity: Similarity = "dot",
        temperature: float = 0.07,
    ) -> None:
        super().__init__()
        self.width = inputs.embedding_dim
        self.features = tuple(name for name in inputs.features if name not in inputs.texts)
        self.owned = tuple(name for name in self.features if name in inputs.owned)
        if inputs.item is None:
            raise ValueError("sasrec finds items by their ids, and model.features leaves them out: name the item")
        self.reader = HistoryReader(
            inputs.embedding_dim,
            blocks=blocks,
            heads=heads,
            positions=positions,
            dropout=dropout,
            similarity=similarity,
            temperature=temperature,
        )

    def states(self, events: dict[str, Tensor], sequences: Sequences) -> Tensor:
        """Return the state of each event, [N, d], from the embeddings of its features, [N, d] each."""
        x = sum_of(events, self.features)
        found: Tensor = self.reader(with_prompt(x, events), sequences)
        return found

    def items(self, items: dict[str, Tensor]) -> Tensor:
        """Return the vectors of items, [n, d], from the embeddings of what they own, [n, d] each."""
        found: Tensor = self.reader.compared(sum_of(items, self.owned))
        return found


def sum_of(embedded: dict[str, Tensor], names: tuple[str, ...]) -> Tensor:
    """Return the sum [n, d] of the embeddings of some features."""
    return torch.stack([embedded[name] for name in names]).sum(0) if len(names) > 1 else embedded[names[0]]


def with_prompt(x: Tensor, events: dict[str, Tensor]) -> Tensor:
    """Return vectors of events [N, d] with what their tasks have adapted added to them."""
    return x + events[PROMPT] if PROMPT in events else x


class CausalBlock(nn.Module):
    """A block of SASRec, in which an event sees itself and what came before.

        q = norm(x)
        y = second_norm(q + out(attention(q, x, x)))
        block(x) = y + dropout(second(dropout(relu(first(y)))))

    Keys and values are not normed, so that an event whose row was hardly trained, and is short, says little. Each head
    adds to q . k a learned number for how many events apart the two are (Raffel et al., JMLR 2020, section 2.1), the
    same from `positions` - 1 on, in place of SASRec's vectors of positions. Nothing else tells the order. Dropout
    leaves out earlier events too, others for each event.
    """

    def __init__(self, dim: int, heads: int, positions: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.by_distance = nn.Parameter(torch.zeros(heads, positions))
        self.first_norm, self.second_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.kv, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.first, self.second = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        for layer in (self.q, self.kv, self.out, self.first, self.second):
            # torch's own start, .6 as wide, ends lower: recall@10 of Beauty's test .071 in place of .077
            nn.init.xavier_normal_(layer.weight)

    def forward(self, x: Tensor, sequences: Sequences) -> Tensor:
        """Return the block's output, [N, d]. Linear layers see events alone; attention pads."""
        normed = self.first_norm(x)
        y = self.second_norm(normed + self.out(self._attention(normed, x, sequences)))
        out: Tensor = y + self.dropout(self.second(self.dropout(F.relu(self.first(y)))))
        return out

    def _attention(self, normed: Tensor, x: Tensor, sequences: Sequences) -> Tensor:
        """Return what events read of others, [N, d]."""
        parts = sequences.padded(torch.cat([self.q(normed), self.kv(x)], -1))  # [T, L, 3 d]
        size = x.shape[1] // self.heads
        q, k, v = parts.view(*parts.shape[:2], 3, self.heads, size).transpose(1, 3).unbind(2)  # [T, H, L, size]
        scores = q @ k.transpose(-1, -2) / math.sqrt(size) + self._bias(parts.shape[1])
        # padding is behind all events, so that none of them sees it
        weights = self.dropout(sequences.flat(scores.softmax(-1).permute(0, 2, 3, 1)))  # [N, L, H]
        found = sequences.padded(weights).permute(0, 3, 1, 2) @ v
        out: Tensor = sequences.flat(found.transpose(1, 2).flatten(2))
        return out

    def _bias(self, length: int) -> Tensor:
        """Return what is added to the products of L events with each other, [H, L, L]."""
        place = torch.arange(length, device=self.by_distance.device)
        back = place.unsqueeze(-1) - place
        bias = self.by_distance[:, back.clamp(0, self.by_distance.shape[1] - 1)]
        return bias.masked_fill(back < 0, -math.inf)
