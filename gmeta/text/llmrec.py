"""LLM-Rec: the next item of a user, over many domains, by the texts of items.

Zuoli Tang et al., "One model for all: large language models are domain-agnostic recommendation systems", 2023, arXiv
2310.14304: a user's events of all domains are one sequence, and a language model makes vectors of its texts. It reads
the tokens of the last titles (`reader` tokens); or its lower layers encode each text once (BAHE's split: Geng et al.,
arXiv 2403.19347), and what is above reads a sequence of items (HLLM: Chen et al., arXiv 2409.12740).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from gmeta.core.batch import text_ids_of
from gmeta.core.errors import nearest, require
from gmeta.core.sequences import Sequences
from gmeta.models.inputs import InputSpec, check_dropout, check_widths, check_words
from gmeta.models.sasrec import HistoryReader, Similarity, sum_of, with_prompt
from gmeta.text.encoder import TextEncoder, TextPooling, open_encoder
from gmeta.text.model import TextModel
from gmeta.text.readers import TokenReader, VectorReader
from gmeta.text.refreshed import text_source
from gmeta.text.sources import TextSource
from gmeta.text.store import PLACEHOLDER, spec_of
from gmeta.text.tuning import Tune, tuned

Reader = Literal["blocks", "high", "tokens"]
Fusion = Literal["views", "gate"]

_OF_EVENTS = "vectors of events"
"""Under which name a pass keeps the vectors of its events' texts: they are compared, and read."""


class LLMRec(TextModel):
    """An item's vector is made of its text, and of its id where `ids` says so; a causal reader scores what comes next.

        t = tower(norm(kept vector)),    item = t,    and with ids, as `fusion` says:

        views   item = [t, id's row]: two models beside each other. The states of texts and those of ids, which the
                reader of `sasrec` makes with the dropout `id_dropout`, lie one behind the other. Each view learns by a
                loss of its own, and a score is the sum of both, or twice that of the text where no training row has
                the item
        gate    item = t + sigmoid(gate(t)) * id's row: one model

    The kept vector is that of the item's text, by the first `layers` of the encoder in `encoder`; it is made once, or
    comes from the behaviour store `store`. `text` names the feature with the item's text; without it, the only one.
    `tower` has a layer of each width of `hidden`, and one of the width of embeddings. The events' other features (a
    domain, say) are added to what the reader reads. An item without a text has the text vector 0: it is told by its id
    alone.

    `reader` says what makes states of events:

        blocks  causal blocks over items' vectors: `blocks`, `heads`, `positions` and `dropout` are those of `sasrec`
        high    the encoder's layers above `layers`, over items' kept vectors (`gmeta.text.readers.VectorReader`)
        tokens  the same layers, over the tokens of the last `window` titles; an item's vector is what they make of
                its title. No ids, no tower, and no other feature (`gmeta.text.readers.TokenReader`)

    `tune` and `rank` say what of those layers is trained, as in `bahe`; `pooling` None is the mean for kept vectors,
    and the encoder's own way for tokens. `similarity` and `temperature` are those of `sasrec`.

    With `refresh` the lower layers are trained too, what `tune` says of them, through the items of events; candidates
    read vectors that are made anew every so many steps (`gmeta.text.refreshed`).
    """

    features: tuple[str, ...] = ()
    item: str | None = None
    reader: HistoryReader | VectorReader | TokenReader

    def __init__(
        self,
        inputs: InputSpec,
        *,
        encoder: str,
        layers: int,
        reader: Reader = "blocks",
        window: int = 10,
        tune: Tune = "full",
        rank: int = 8,
        store: str = "",
        refresh: int = 0,
        text: str = "",
        pooling: TextPooling | None = None,
        template: str = PLACEHOLDER,
        max_tokens: int = 40,
        ids: bool = True,
        fusion: Fusion = "views",
        id_dropout: float = 0.5,
        hidden: Sequence[int] = (256,),
        blocks: int = 2,
        heads: int = 2,
        positions: int = 50,
        dropout: float = 0.2,
        similarity: Similarity = "cosine",
        temperature: float = 0.07,
    ) -> None:
        super().__init__()
        _check(hidden, id_dropout, reader=reader, tune=tune, fusion=fusion)
        self.text = text_of_items(inputs, text)
        self.texts: tuple[str, ...] = (self.text,)
        _require_texts(inputs, self.text, ids=ids)
        self.id_reader: HistoryReader | None = None
        opened = open_encoder(encoder, layers)
        compare: dict[str, Any] = {"similarity": similarity, "temperature": temperature}
        if reader == "tokens":
            _check_tokens(tune, ids=ids, store=store, refresh=refresh)
            titles = _titles(opened, inputs, self.text, template, max_tokens)
            self.keep_texts(inputs, self.text, titles, encoder)
            compare |= {"window": window, "max_tokens": max_tokens, "pooling": pooling}
            self.reader = TokenReader(tuned(opened.high, tune, rank), titles, **compare)
            return
        self.item = inputs.item if ids else None
        self.features = tuple(n for n in inputs.features if n != self.text and (ids or n != inputs.item))
        self.beside = tuple(n for n in self.features if n != self.item)
        self.width = dim = inputs.embedding_dim
        spec = spec_of(opened, pooling=pooling or "mean", vectors=1, template=template, max_tokens=max_tokens)
        source = text_source(opened, spec, "behaviours", inputs.texts_by_id(self.text), store, refresh, tune, rank)
        self.keep_texts(inputs, self.text, source, encoder)
        self.text_norm = nn.LayerNorm(opened.dim)
        self.tower = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise([opened.dim, *hidden, dim]))
        self.gate = nn.Linear(dim, 1) if ids and fusion == "gate" else None
        if ids and fusion == "views":
            self.views, self.id_reader = (dim, dim), _reader_of_ids(dim, positions, id_dropout)
        made = {"positions": positions, "dropout": dropout, **compare}
        if reader == "high":
            self.reader = VectorReader(tuned(opened.high, tune, rank, "causal"), opened.dim, dim, **made)
        else:
            self.reader = HistoryReader(dim, blocks=blocks, heads=heads, **made)

    def states(self, events: dict[str, Tensor], sequences: Sequences) -> Tensor:
        """Return the state of each event, [N, d], from the ids of its item's text and the rows of its features."""
        if isinstance(self.reader, TokenReader):
            of_titles: Tensor = self.reader(self._ids(events), sequences)
            return of_titles
        kept, place = self._kept(events, fresh=True)
        x = self._of_event(self._items(events, kept, place), events)
        read = (kept[place],) if isinstance(self.reader, VectorReader) else ()
        found: Tensor = self.reader(*read, x, sequences)
        if self.id_reader is None or self.item is None:
            return found
        return torch.cat([found, self.id_reader(self._of_event(events[self.item], events), sequences)], -1)

    def _of_event(self, x: Tensor, events: dict[str, Tensor]) -> Tensor:
        """Return vectors of items [N, d] with all else that is known of their events."""
        return with_prompt(x + sum_of(events, self.beside) if self.beside else x, events)

    def items(self, items: dict[str, Tensor]) -> Tensor:
        """Return the vectors of items of events, [n, d]."""
        return self._compared(items, fresh=True)

    def shared_items(self, items: dict[str, Tensor]) -> Tensor:
        """Return the vectors of candidates or of a catalogue, [n, d]: of kept vectors, whatever is trained."""
        return self._compared(items, fresh=False)

    def without_row(self, vectors: Tensor) -> Tensor:
        """Return the vectors [n, d] of items that no training row has. Of two views their ids are taken to say what
        their texts say: without a score to add they would come behind all others.
        """
        if self.id_reader is None:
            return vectors
        of_text, of_id = torch.split(vectors, list(self.views), -1)
        return torch.cat([2 * of_text, torch.zeros_like(of_id)], -1)

    def _compared(self, items: dict[str, Tensor], *, fresh: bool) -> Tensor:
        if isinstance(self.reader, TokenReader):
            return self.reader.compared(self._ids(items))
        found = self.reader.compared(self._items(items, *self._kept(items, fresh=fresh)))
        if self.id_reader is None or self.item is None:
            return found
        return torch.cat([found, self.id_reader.compared(items[self.item])], -1)

    def train(self, mode: bool = True) -> LLMRec:
        """Turn dropout on or off. The encoder's layers have none: it would not be seeded by example."""
        super().train(mode)
        if not isinstance(self.reader, HistoryReader):
            self.reader.high.eval()
        return self

    def _ids(self, embedded: dict[str, Tensor]) -> Tensor:
        return embedded[text_ids_of(self.text)].flatten()

    def _kept(self, embedded: dict[str, Tensor], *, fresh: bool) -> tuple[Tensor, Tensor]:
        """Return the vectors of distinct texts, [u, w], zeros for none, and where each event's is, int64 [n].

        A pass makes the fresh ones of its events once.
        """
        distinct, place = torch.unique(self._ids(embedded), return_inverse=True)
        if fresh and _OF_EVENTS in embedded:
            return embedded[_OF_EVENTS], place
        read = self.source.fresh if fresh else self.source.states
        found = read(distinct.unsqueeze(-1), self.text_norm.weight.dtype)
        vectors = found.values[:, 0] * found.mask[:, :1]
        if fresh:
            embedded[_OF_EVENTS] = vectors
        return vectors, place

    def _items(self, embedded: dict[str, Tensor], kept: Tensor, place: Tensor) -> Tensor:
        x: Tensor = self.text_norm(kept)
        for layer in self.tower[:-1]:
            x = torch.relu(layer(x))
        x = (self.tower[-1](x) * kept.any(-1, keepdim=True))[place]
        if self.gate is None or self.item is None:
            return x
        return x + torch.sigmoid(self.gate(x)) * embedded[self.item]


def _titles(encoder: TextEncoder, inputs: InputSpec, name: str, template: str, max_tokens: int) -> TextSource:
    """Return the tokens of texts, up to `max_tokens` each besides those that the tokenizer puts around a text."""
    around = sum(map(len, encoder.tokenizer.around()))
    spec = spec_of(encoder, template=template, max_tokens=max_tokens + around)
    return TextSource(encoder, spec, "tokens", inputs.texts_by_id(name))


_WORDS = {"reader": get_args(Reader), "tune": get_args(Tune), "fusion": get_args(Fusion)}


def _check(hidden: Sequence[int], id_dropout: float, **words: str) -> None:
    """Raise ValueError for arguments out of range."""
    check_widths("hidden", hidden)
    check_dropout(id_dropout, "id_dropout")
    check_words(_WORDS, **words)


def _require_texts(inputs: InputSpec, name: str, *, ids: bool) -> None:
    """Raise ValueError where no item has a text, for a model without ids, which reads nothing else of them."""
    if not ids and not any(inputs.texts_by_id(name)[1:]):
        raise ValueError(
            f"no item has a text in {name!r}, and model.args.ids is false: there is nothing to learn from; prepare "
            "with the items' texts, or set ids to true"
        )


def _reader_of_ids(dim: int, positions: int, dropout: float) -> HistoryReader:
    """Return the reader that `sasrec` has unless it is told otherwise."""
    return HistoryReader(
        dim, blocks=1, heads=1, positions=positions, dropout=dropout, similarity="dot", temperature=1.0
    )


def _check_tokens(tune: Tune, *, ids: bool, store: str, refresh: int) -> None:
    """Raise ValueError for arguments that reader tokens has no use for, and that change what other readers are."""
    of = "reader tokens"
    require(not ids, "model.args.ids", ids, f"{of} knows items by their texts alone; set it to false")
    require(not store, "model.args.store", store, f"{of} reads tokens, and no kept vectors; leave it out")
    require(
        not refresh, "model.args.refresh", refresh, f"{of} keeps no vectors; to train more, lower model.args.layers"
    )
    require(tune != "none", "model.args.tune", tune, f"{of} would train nothing; take full, lora or norms")


def text_of_items(inputs: InputSpec, name: str) -> str:
    """Return the feature with the texts of items: `name`, or the only one. ValueError where there is none."""
    owned = [feature for feature in inputs.texts if feature in inputs.owned]
    if name and name not in owned:
        known = nearest(name, owned) if owned else "items have none"
        raise ValueError(f"model.args.text names {name!r}, no text that items own: {known}")
    if not name and len(owned) != 1:
        known = f"name one of {', '.join(owned)}" if owned else "items have none; name their text column at prepare"
        raise ValueError(f"model.args.text is not set: {known}")
    return name or owned[0]
