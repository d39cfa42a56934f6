"""LLM-Rec: the next item of a user, over many domains, by the texts of items.

Zuoli Tang et al., "One model for all: large language models are domain-agnostic recommendation systems", 2023, arXiv
2310.14304: a user's events of all domains are one sequence, and a language model makes vectors of its texts. Here the
lower layers of the model encode each text once (BAHE's split: Geng et al., arXiv 2403.19347), and what is above reads a
sequence of items (HLLM: Chen et al., arXiv 2409.12740), not of tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from gmeta.core.batch import text_ids_of
from gmeta.core.errors import nearest
from gmeta.core.sequences import Sequences
from gmeta.models.inputs import InputSpec, check_widths
from gmeta.models.sasrec import HistoryReader, Similarity, sum_of, with_prompt
from gmeta.text.encoder import TextPooling, open_encoder
from gmeta.text.model import TextModel
from gmeta.text.refreshed import text_source
from gmeta.text.sources import TextStates
from gmeta.text.store import PLACEHOLDER, spec_of

_OF_EVENTS = "vectors of events"
"""Under which name a pass keeps what it made of its events' items: they are compared, and read."""


class LLMRec(TextModel):
    """An item's vector is made of its text, and of its id where `ids` says so; a causal reader scores what comes next.

        t = tower(norm(kept vector)),    item = t,   or with ids   item = t + sigmoid(gate(t)) * id's row

    The kept vector is that of the item's text, by the first `layers` of the encoder in `encoder`; it is made once, or
    comes from the behaviour store `store`. `text` names the feature with the item's text; without it, the only one.
    `tower` has a layer of each width of `hidden`, and one of the width of embeddings. The events' other features (a
    domain, say) are added to what the reader reads. An item without a text has the text vector 0: it is told by its id
    alone. With `refresh` the lower layers are trained too, through the items of events; candidates read vectors that
    are made anew every so many steps (`gmeta.text.refreshed`). `blocks`, `heads`, `positions`, `dropout`, `similarity`
    and `temperature` are those of `sasrec`.
    """

    def __init__(
        self,
        inputs: InputSpec,
        *,
        encoder: str,
        layers: int,
        store: str = "",
        refresh: int = 0,
        text: str = "",
        pooling: TextPooling = "mean",
        template: str = PLACEHOLDER,
        max_tokens: int = 40,
        ids: bool = True,
        hidden: Sequence[int] = (256,),
        blocks: int = 2,
        heads: int = 2,
        positions: int = 50,
        dropout: float = 0.2,
        similarity: Similarity = "cosine",
        temperature: float = 0.07,
    ) -> None:
        super().__init__()
        check_widths("hidden", hidden)
        self.text = text_of_items(inputs, text)
        self.texts = (self.text,)
        self.item = inputs.item if ids else None
        self.features = tuple(n for n in inputs.features if n != self.text and (ids or n != inputs.item))
        self.beside = tuple(n for n in self.features if n != self.item)
        self.width = dim = inputs.embedding_dim
        opened = open_encoder(encoder, layers)
        spec = spec_of(opened, pooling=pooling, vectors=1, template=template, max_tokens=max_tokens)
        if refresh:
            opened.low.stack.requires_grad_(True)
        source = text_source(opened, spec, "behaviours", inputs.texts_by_id(self.text), store, refresh)
        self.keep_texts(inputs, self.text, source, encoder)
        widths = [opened.dim, *hidden, dim]
        self.text_norm = nn.LayerNorm(opened.dim)
        self.tower = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.gate = nn.Linear(dim, 1) if ids else None
        self.reader = HistoryReader(
            dim,
            blocks=blocks,
            heads=heads,
            positions=positions,
            dropout=dropout,
            similarity=similarity,
            temperature=temperature,
        )

    def states(self, events: dict[str, Tensor], sequences: Sequences) -> Tensor:
        """Return the state of each event, [N, d], from the ids of its item's text and the rows of its features."""
        x = self._items(events, fresh=True)
        if self.beside:
            x = x + sum_of(events, self.beside)
        found: Tensor = self.reader(with_prompt(x, events), sequences)
        return found

    def items(self, items: dict[str, Tensor]) -> Tensor:
        """Return the vectors of items of events, [n, d]."""
        found: Tensor = self.reader.compared(self._items(items, fresh=True))
        return found

    def shared_items(self, items: dict[str, Tensor]) -> Tensor:
        """Return the vectors of candidates or of a catalogue, [n, d]: of kept vectors, whatever is trained."""
        found: Tensor = self.reader.compared(self._items(items, fresh=False))
        return found

    def _items(self, embedded: dict[str, Tensor], *, fresh: bool) -> Tensor:
        """Return the vectors of items before they are compared. A pass makes those of its events once."""
        if _OF_EVENTS in embedded:
            return embedded[_OF_EVENTS]
        x = self._made_of(embedded, self.source.fresh if fresh else self.source.states)
        if fresh:
            embedded[_OF_EVENTS] = x
        return x

    def _made_of(self, embedded: dict[str, Tensor], read: Callable[[Tensor, torch.dtype], TextStates]) -> Tensor:
        ids = embedded[text_ids_of(self.text)]
        distinct, place = torch.unique(ids, return_inverse=True)
        found = read(distinct.unsqueeze(-1), self.text_norm.weight.dtype)
        x: Tensor = self.text_norm(found.values[:, 0])
        for layer in self.tower[:-1]:
            x = torch.relu(layer(x))
        x = (self.tower[-1](x) * found.mask[:, :1])[place]
        if self.gate is None or self.item is None:
            return x
        return x + torch.sigmoid(self.gate(x)) * embedded[self.item]


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
