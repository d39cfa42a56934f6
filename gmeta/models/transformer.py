"""A small Transformer over what a user did last, whose result the target item draws together.

Blocks as in Ashish Vaswani et al., "Attention Is All You Need", NeurIPS 2017, arXiv 1706.03762, with the norm first
(Xiong et al., arXiv 2002.04745). That the target attends to the encoded history follows Chen et al., "Behavior Sequence
Transformer for E-commerce Recommendation in Alibaba", arXiv 1905.06874, which puts it at the sequence's end instead.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gmeta.core.batch import mask_of
from gmeta.core.errors import require
from gmeta.models.inputs import InputSpec, as_vectors, check_dropout, check_widths, history_of, logits_of, output_layer


class EncoderBlock(nn.Module):
    """x + attention(norm(x)), then x + network(norm(x)). Its layers are plain linear ones, which all can adapt."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.network_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.key, self.value, self.join = (nn.Linear(dim, dim) for _ in range(4))
        self.widen, self.narrow = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, allowed: Tensor) -> Tensor:
        """Return [..., L, d] of x [..., L, d]; position i attends to j where `allowed` bool [..., L, L] says so."""
        z = self.attention_norm(x)
        query, key, value = (self._split(layer(z)) for layer in (self.query, self.key, self.value))
        mixed = attend(query, key, value, allowed.unsqueeze(-3))  # [..., heads, L, d / heads]
        x = x + self.dropout(self.join(mixed.transpose(-3, -2).flatten(-2)))
        out: Tensor = x + self.dropout(self.narrow(torch.relu(self.widen(self.network_norm(x)))))
        return out

    def _split(self, x: Tensor) -> Tensor:
        """Return [..., heads, L, d / heads] of [..., L, d]."""
        return x.reshape(*x.shape[:-1], self.heads, x.shape[-1] // self.heads).transpose(-3, -2)


class Transformer(nn.Module):
    """[history as the target sees it, vectors of all other inputs, numeric columns] -> ReLU layers -> one logit.

    `target` names the item's feature (without it, the id of the item), and `history` the sequence of the same
    vocabulary, which is not pooled (without it, the only such one). Positions count from the last value backwards and
    have learned vectors; those from `positions` on share one. With `causal` a value sees only those before it. An empty
    history is the zero vector. Other sequences count by their mean.
    """

    head = "output"
    decision_layers = ("layers", "output")

    def __init__(
        self,
        inputs: InputSpec,
        *,
        target: str = "",
        history: str = "",
        blocks: int = 2,
        heads: int = 2,
        positions: int = 50,
        causal: bool = True,
        hidden: Sequence[int] = (64, 64),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        for key, value in (("blocks", blocks), ("heads", heads), ("positions", positions)):
            require(value >= 1, f"model.args.{key}", value, "must be at least 1")
        check_widths("hidden", hidden)
        check_dropout(dropout)
        self.target, self.history = history_of(inputs, target, history)
        dim = inputs.widths[self.target]
        require(dim % heads == 0, "model.args.heads", heads, f"must divide model.embedding_dim, {dim}")
        self.causal, self.num_numeric = causal, inputs.num_numeric
        self.features = tuple(inputs.widths)
        self.others = tuple(name for name in self.features if name != self.history)
        # a layer of its input's positions as 0 and 1, and not a table of vectors: layers adapt in both engines
        self.position = nn.Linear(positions, dim, bias=False)
        nn.init.normal_(self.position.weight, std=0.02)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(EncoderBlock(dim, heads, dropout) for _ in range(blocks))
        self.norm = nn.LayerNorm(dim)
        self.ask = nn.Linear(dim, dim)
        widths = [inputs.width, *hidden]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.output = output_layer(widths[-1], inputs)
        self.num_labels = inputs.num_labels

    def forward(self, dense: Tensor, embedded: dict[str, Tensor]) -> Tensor:
        """Return logits [...], of several labels [..., K], from dense [..., F], one [..., d] for each feature, and the
        history [..., L, d].
        """
        parts = [self._pooled(embedded), *as_vectors(embedded, self.others)]
        if self.num_numeric:
            parts.append(dense)
        x = torch.cat(parts, -1)
        for layer in self.layers:
            x = self.dropout(torch.relu(layer(x)))
        return logits_of(self.output(x), self.num_labels)

    def _pooled(self, embedded: dict[str, Tensor]) -> Tensor:
        """Return the history as the target sees it, [..., d]."""
        x, mask = embedded[self.history], embedded[mask_of(self.history)]
        x = self.dropout(x + self.position(self._recency(mask).to(x.dtype)))
        allowed = mask.unsqueeze(-2).expand(*mask.shape, mask.shape[-1])
        if self.causal:
            allowed = allowed & torch.ones_like(allowed).tril()
        for block in self.blocks:
            x = block(x, allowed)
        x = self.norm(x)
        return attend(self.ask(embedded[self.target]).unsqueeze(-2), x, x, mask.unsqueeze(-2)).squeeze(-2)

    def _recency(self, mask: Tensor) -> Tensor:
        """Return which position each value has, counted from the last one: bool [..., L, positions]."""
        place = torch.arange(mask.shape[-1], device=mask.device)
        from_last = (mask.sum(-1, keepdim=True) - 1 - place).clamp(0, self.position.in_features - 1)
        return from_last.unsqueeze(-1) == torch.arange(self.position.in_features, device=mask.device)


def attend(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor) -> Tensor:
    """Return scaled dot-product attention [..., n, d] of query [..., n, d] over key and value [..., L, d].

    `allowed` is bool [..., n, L]. A query that may attend to nothing gets zeros.
    """
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    weights = torch.softmax(scores.masked_fill(~allowed, torch.finfo(scores.dtype).min), -1)
    return torch.where(allowed, weights, 0) @ value
