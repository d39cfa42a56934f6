"""BAHE: what a user did, as texts whose vectors are kept, read by the upper layers of a text encoder alone.

Binzong Geng et al., "Breaking the Length Barrier: LLM-Enhanced CTR Prediction in Long Textual User Behaviors", SIGIR
2024, arXiv 2403.19347. The lower layers encode each distinct text once (atomic encoding); the upper ones are trained
and read a sequence of these vectors (aggregation), several sequences apart from each other (feature parallel).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmeta.core.batch import text_ids_of
from gmeta.core.errors import nearest, require
from gmeta.models.inputs import (
    InputSpec,
    as_vectors,
    check_dropout,
    check_widths,
    check_words,
    logits_of,
    output_layer,
    require_one_label,
)
from gmeta.models.last_layer import BayesianLinear
from gmeta.models.transformer import attend
from gmeta.text.encoder import POOLINGS, TextPooling, open_encoder
from gmeta.text.model import TextModel
from gmeta.text.refreshed import text_source
from gmeta.text.sources import Encode, TextStates
from gmeta.text.store import PLACEHOLDER, spec_of
from gmeta.text.tuning import Direction, Tune, tuned

UserVector = Literal["mean", "last", "target"]


class BAHE(TextModel):
    """[u_1, …, u_N, item, u_1 * item, …, text, all other inputs, numeric columns] -> ReLU layers -> a logit.

    u_n is what the upper layers make of history n, item what they make of the target's text alone, and text what they
    read of it. The target does not stand in the history (Figure 1), so a user's states are the same for all candidates:
    they are computed once for equal histories of a batch. The products and the text itself are ours.

    `encoder` is a folder as `open_encoder` takes it, of which `layers` are below the split. `target` names the feature
    with the item's text, `histories` the unpooled sequences of texts of the same vocabulary; without them, all that
    there are. Vectors come from the behaviour store `store`, or are made here where it is empty; `pooling`, `vectors`,
    `template` and `max_tokens` are those of `gmeta embed`. `encode` says what the upper layers read
    (`gmeta.text.sources`): everything that is trained is the same.

    `tune` says what of the upper layers is trained: full, lora (adapters of `rank`), norms, or none. `user` makes a
    vector of a history's states: their mean, the last, or the target's attention. Texts count from the last one
    backwards, by learned vectors; those from `positions` on share one. `direction` is the encoder's own, or causal, or
    both. With `ids` the embedding rows of histories and target are added to their vectors through a gate. With `taste`
    a task's own weights over so many bases of the item are solved for by `meta.adapt: [last_layer]`. A history without
    texts is the zero vector. In training a history is taken for such a one with probability `history_dropout`: where
    users are few, the head learns them by heart, and new ones suffer.

    With `refresh` the layers below the split are trained too, what `tune` says of them, through the target's text;
    histories read vectors that are made anew every so many steps (`gmeta.text.refreshed`).
    """

    head = "output"
    decision_layers = ("layers", "output")

    def __init__(
        self,
        inputs: InputSpec,
        *,
        encoder: str,
        layers: int,
        store: str = "",
        refresh: int = 0,
        encode: Encode = "behaviours",
        target: str = "",
        histories: Sequence[str] = (),
        pooling: TextPooling = "mean",
        vectors: int = 1,
        template: str = PLACEHOLDER,
        max_tokens: int = 128,
        tune: Tune = "full",
        rank: int = 8,
        user: UserVector = "mean",
        positions: int = 64,
        direction: Direction = "own",
        ids: bool = False,
        taste: int = 0,
        hidden: Sequence[int] = (64,),
        dropout: float = 0.0,
        history_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_words(_WORDS, encode=encode, pooling=pooling, tune=tune, user=user, direction=direction)
        _check_numbers(positions, taste, dropout, history_dropout)
        check_widths("hidden", hidden)
        if taste:
            require_one_label(inputs, "bahe with taste")
        self.target, self.histories = texts_to_read(inputs, target, histories)
        self.texts = (self.target, *self.histories)
        self.features = tuple(name for name in inputs.widths if ids or name not in self.texts)
        self.others = tuple(name for name in self.features if name not in self.histories)
        opened = open_encoder(encoder, layers)
        spec = spec_of(opened, pooling=pooling, vectors=vectors, template=template, max_tokens=max_tokens)
        source = text_source(opened, spec, encode, inputs.texts_by_id(self.target), store, refresh, tune, rank)
        self.keep_texts(inputs, self.target, source, encoder)
        self.high = tuned(opened.high, tune, rank, direction)
        self.dim = dim = opened.dim
        self.recency = nn.Parameter(torch.empty(positions, dim).normal_(std=0.02))
        self.user = user
        self.ask = _identity(dim) if user == "target" else None  # at first, what is alike attends
        self.rows = nn.Linear(inputs.widths[self.target], dim, bias=False) if ids else None
        self.gate = nn.Linear(dim, 1) if ids else None
        self.num_numeric = inputs.num_numeric
        width = (2 + 2 * len(self.histories)) * dim
        width += sum(inputs.widths[name] for name in self.others) + inputs.num_numeric
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise([width, *hidden]))
        self.dropout = nn.Dropout(dropout)
        self.history_dropout = nn.Dropout(history_dropout)
        self.output = output_layer([width, *hidden][-1], inputs)
        self.num_labels = inputs.num_labels
        self.bases = nn.Linear(dim, taste) if taste else nn.Identity()
        self.last = BayesianLinear(taste) if taste else None
        self.last_layer = "last" if taste else ""

    def forward(self, dense: Tensor, embedded: dict[str, Tensor]) -> Tensor:
        """Return logits [...], of several labels [..., K], from dense [..., F], the ids of texts [..., L], and [..., d]
        for each other feature.
        """
        item, text = self._item(embedded)
        users = [user * self.history_dropout(torch.ones_like(user[..., :1])) for user in self._users(embedded, item)]
        parts = [*users, item, *(user * item for user in users), text, *as_vectors(embedded, self.others)]
        if self.num_numeric:
            parts.append(dense)
        x = torch.cat(parts, -1)
        for layer in self.layers:
            x = self.dropout(torch.relu(layer(x)))
        logits = logits_of(self.output(x), self.num_labels)
        return logits if self.last is None else self.last(self.bases(item), logits)

    def _item(self, embedded: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return what the upper layers make of the target's text, and what they read of it, each [..., d]."""
        ids = embedded[text_ids_of(self.target)]
        rows = embedded[self.target].unsqueeze(-2).flatten(0, -3) if self.rows is not None else None
        read = self._read(ids.flatten(0, -2), rows, recent=False)
        item, text = (read.spread(_mean(part, read.mask)) for part in (read.states, read.kept))
        return item.view(*ids.shape[:-1], self.dim), text.view(*ids.shape[:-1], self.dim)

    def _users(self, embedded: dict[str, Tensor], item: Tensor) -> list[Tensor]:
        """Return a vector [..., d] of each history; all of them go through the upper layers as one batch."""
        of_each = [embedded[text_ids_of(name)] for name in self.histories]
        leading, longest = of_each[0].shape[:-1], max(ids.shape[-1] for ids in of_each)
        ids = torch.cat([F.pad(part.flatten(0, -2), (0, longest - part.shape[-1])) for part in of_each])
        rows = None
        if self.rows is not None:
            parts = [embedded[name].flatten(0, -3) for name in self.histories]
            rows = torch.cat([F.pad(part, (0, 0, 0, longest - part.shape[1])) for part in parts])
        read = self._read(ids, rows, recent=True)
        if self.ask is not None:
            query = self.ask(item).flatten(0, -2).repeat(len(self.histories), 1).unsqueeze(-2)
            states = read.spread(read.states)
            users = attend(query, states, states, read.spread(read.mask).unsqueeze(-2)).squeeze(-2)
        elif self.user == "last":
            users = read.spread(_last(read.states, read.mask))
        else:
            users = read.spread(_mean(read.states, read.mask))
        return [part.view(*leading, self.dim) for part in users.chunk(len(self.histories))]

    def _read(self, ids: Tensor, rows: Tensor | None, *, recent: bool) -> _Read:
        """Return the states of histories of texts, int64 [n, L], by the upper layers.

        `rows` [n, L, e] are the embeddings of their ids. Equal histories are read once, unless their rows may differ.
        """
        place = None
        if rows is None and len(ids) > 1:
            distinct, place = torch.unique(ids, dim=0, return_inverse=True)
            ids, place = (distinct, place) if len(distinct) < len(ids) else (ids, None)
        found: TextStates = (self.source.states if recent else self.source.fresh)(ids, self.recency.dtype)
        x = found.values
        if rows is not None and self.rows is not None and self.gate is not None:
            of_text = found.text.unsqueeze(-1).expand(-1, -1, x.shape[-1])
            x = x + torch.sigmoid(self.gate(x)) * self.rows(rows).gather(1, of_text)
        if recent:
            later = (ids > 0).flip(-1).cumsum(-1).flip(-1) - 1  # texts behind each one
            place_of = later.clamp(0, len(self.recency) - 1).gather(1, found.text)
            x = x + self.recency[place_of]
        return _Read(self.high(x, found.mask), found.values * found.mask.unsqueeze(-1), found.mask, place)

    def train(self, mode: bool = True) -> BAHE:
        """Turn the head's dropout on or off. The upper layers have none: it would not be seeded by example."""
        super().train(mode)
        self.high.eval()
        return self


_WORDS = {
    "encode": get_args(Encode),
    "pooling": POOLINGS,
    "tune": get_args(Tune),
    "user": get_args(UserVector),
    "direction": get_args(Direction),
}


def _check_numbers(positions: int, taste: int, dropout: float, history_dropout: float) -> None:
    require(positions >= 1, "model.args.positions", positions, "must be at least 1")
    require(taste >= 0, "model.args.taste", taste, "must be 0 (off) or more")
    check_dropout(dropout)
    check_dropout(history_dropout, "history_dropout")


class _Read(NamedTuple):
    """What the upper layers make of distinct histories, and where each history is among them."""

    states: Tensor  # [u, P, d], zeros where the mask is False
    kept: Tensor  # [u, P, d], what was read, likewise
    mask: Tensor  # bool [u, P]
    place: Tensor | None  # int64 [n]; None: each is its own

    def spread(self, values: Tensor) -> Tensor:
        """Return values [u, ...] of distinct histories as those of all: [n, ...]."""
        return values if self.place is None else values[self.place]


def _mean(states: Tensor, mask: Tensor) -> Tensor:
    """Return the mean [n, d] of the states [n, P, d] that count; the others are zeros. Zeros where none counts."""
    return states.sum(1) / mask.sum(-1, keepdim=True).clamp(min=1).to(states.dtype)


def _last(states: Tensor, mask: Tensor) -> Tensor:
    """Return the last state [n, d] that counts; zeros where there is none."""
    place = (mask.cumsum(-1) * mask).argmax(-1)
    return states[torch.arange(len(states), device=states.device), place]


def _identity(dim: int) -> nn.Linear:
    layer = nn.Linear(dim, dim, bias=False)
    nn.init.eye_(layer.weight)
    return layer


def texts_to_read(inputs: InputSpec, target: str, histories: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """Return the names of the target's text and of the histories, sequences of texts of the same vocabulary.

    Without names they are the only feature of texts, and all such sequences. ValueError where there is none.
    """
    how = "prepare with `text: true` in the schema, and name it in model.features where these are named"
    of_rows = [name for name in inputs.texts if name not in inputs.sequences]
    if target and target not in of_rows:
        known = nearest(target, of_rows) if of_rows else f"the model reads none; {how}"
        raise ValueError(f"model.args.target names {target!r}, which is no feature of texts: {known}")
    if not target and len(of_rows) != 1:
        known = f"name one of {', '.join(of_rows)}" if of_rows else f"the model reads no feature of texts; {how}"
        raise ValueError(f"model.args.target is not set: {known}")
    target = target or of_rows[0]
    table = inputs.tables[target]
    read = [name for name in inputs.sequences if name in inputs.texts and inputs.tables[name] == table]
    require(len({*histories}) == len(histories), "model.args.histories", list(histories), "must differ from each other")
    for name in histories:
        if name not in read:
            hint = nearest(name, read) if read else f"the model reads none; {how}"
            raise ValueError(f"model.args.histories names {name!r}, no unpooled sequence of texts of {table!r}: {hint}")
    if not read:
        raise ValueError(
            f"the model reads no history: a sequence with `text: true`, `pooling: none` and `table: {table}`, whose "
            "texts are those of the target; prepare with one, and name it in model.features where these are named"
        )
    return target, tuple(histories or read)
