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

    (Kang and McAuley, "Self-attentive sequential recommendation", ICDM 2018, arXiv 1808.09781, with norms before the
    parts of a block, GELU, and distances in place of positions: see `CausalBlock`.) An item's vector is the sum of the
    embeddings of the features that items own, an event's sqrt(d) times that of all its features: else the blocks'
    outputs would drown the last item from the start. Texts are no such features. With `similarity` cosine both vectors
    have length 1, and their product is divided by a learned temperature, which starts at `temperature`.
    """

    def __init__(
        self,
        inputs: InputSpec,
        *,
        blocks: int = 2,
        heads: int = 2,
        positions: int = 50,
        dropout: float = 0.3,
        similarity: Similarity = "cosine",
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
        x = sum_of(events, self.features) * math.sqrt(self.width)
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
    """x + attention(norm(x)), then x + feed_forward(norm(x)), where an event sees itself and what came before.

    Each head adds to q . k a learned number for how many events apart the two are (Raffel et al., JMLR 2020, section
    2.1), the same from `positions` - 1 on. Nothing else tells it the order.
    """

    def __init__(self, dim: int, heads: int, positions: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.by_distance = nn.Parameter(torch.zeros(heads, positions))
        self.first_norm, self.second_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.wide, self.narrow = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, sequences: Sequences) -> Tensor:
        """Return the block's output, [N, d]. Linear layers see events alone; attention pads."""
        x = x + self.dropout(self.out(self._attention(self.first_norm(x), sequences)))
        out: Tensor = x + self.dropout(self.narrow(F.gelu(self.wide(self.second_norm(x)))))
        return out

    def _attention(self, x: Tensor, sequences: Sequences) -> Tensor:
        x = sequences.padded(self.qkv(x))  # [T, L, 3 d]
        heads = (*x.shape[:2], 3, self.heads, x.shape[2] // (3 * self.heads))
        q, k, v = x.view(heads).transpose(1, 3).unbind(2)
        # padding is behind all events, so that none of them sees it
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=self._bias(x.shape[1]).to(q.dtype))
        out: Tensor = sequences.flat(found.transpose(1, 2).flatten(2))
        return out

    def _bias(self, length: int) -> Tensor:
        """Return what is added to the products of L events with each other, [H, L, L]."""
        place = torch.arange(length, device=self.by_distance.device)
        back = place.unsqueeze(-1) - place
        bias = self.by_distance[:, back.clamp(0, self.by_distance.shape[1] - 1)]
        return bias.masked_fill(back < 0, -math.inf)
