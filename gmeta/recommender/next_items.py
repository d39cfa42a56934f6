"""`NextItems`: a trained run that finds next items, as an object that recommends items to users by their events.

Every use of such a run goes through it: `gmeta recommend`, `POST /v1/recommend`, the smoke sample of a bundle.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import duckdb
import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from gmeta.core.errors import nearest, require
from gmeta.data.catalogue import read_catalogue, read_max_history
from gmeta.data.cells import ranges
from gmeta.data.events.columns import GAP, event_columns_of
from gmeta.data.events.gaps import Gaps
from gmeta.data.events.interleave import interleaved
from gmeta.data.events.raw_events import EventReader, RawEvents, RawItems, read_raw_items
from gmeta.data.schema import OOV
from gmeta.data.sources import Connection, RawPart, database, described
from gmeta.data.tables import TableLike, as_arrow
from gmeta.models.registry import ModelFactory
from gmeta.parallel.mesh import Mesh, local_mesh
from gmeta.recommender.approximate import FaissShelf
from gmeta.recommender.build import candidate_draw, domain_of, load_system, version_of
from gmeta.recommender.catalogue_vectors import next_item_learner, user_vectors, vectors_of_items
from gmeta.recommender.item_names import ItemNames
from gmeta.recommender.recommender import open_trained
from gmeta.recommender.top_items import ExactShelf, Shelf, TopItems, shelves_of
from gmeta.runs.data import require_own_vocabularies
from gmeta.runs.directory import read_schema
from gmeta.runs.registry import CACHE

Ints = NDArray[np.int64]
CandidateSet = Literal["domain", "all"]
IndexKind = Literal["exact", "faiss"]
_SHELVES: Mapping[IndexKind, Callable[[Ints, Tensor], Shelf]] = {"exact": ExactShelf, "faiss": FaissShelf}


@dataclass(frozen=True)
class Histories:
    """The known events of some users, one user behind the other, each in the order of its sequence."""

    users: list[str]  # [U]
    items: Ints  # [N], item ids
    length: Ints  # [U], events of each user
    unknown: int = 0  # events that were left out: nothing is known of their items
    beside: Mapping[str, Ints] = field(default_factory=dict)  # ids [N] of what an event has that its item does not own

    def where(self, keep: NDArray[np.bool_]) -> Histories:
        """Return those of some users, bool [U]."""
        users = [user for user, kept in zip(self.users, keep.tolist(), strict=True) if kept]
        events = np.flatnonzero(np.repeat(keep, self.length))
        return replace(self.at(events), users=users, length=self.length[keep])

    def at(self, events: Ints) -> Histories:
        """Return the same with these events alone, for users who are said to have so many."""
        beside = {name: ids[events] for name, ids in self.beside.items()}
        return replace(self, items=self.items[events], beside=beside)

    def seen(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return pairs of a user's position and an item that it had, int64 [N] each."""
        user = np.repeat(np.arange(len(self.users)), self.length)
        return torch.from_numpy(user).to(device), torch.from_numpy(self.items).to(device)


class NextItems:
    """A model that finds next items, ready to recommend: `NextItems.open(run).recommend(events, k=10)`.

    Values are raw, as in the events that the run's pack was made of, and so are the columns of tables.
    """

    def __init__(
        self,
        source: Path,
        which: str,
        *,
        factory: ModelFactory | None,
        trust_model: bool,
        mesh: Mesh,
        mapped: bool = False,
    ) -> None:
        self.schema, _ = read_schema(source)
        if not self.schema.next_item:
            raise ValueError(
                f"{source} scores examples and finds no next items: use gmeta predict, or gmeta.load from Python"
            )
        require_own_vocabularies(source)
        self.source, vocab = source, source / "vocab"
        self.columns = event_columns_of(vocab)
        self._catalogue = read_catalogue(vocab, self.schema)
        self.system, self.config, step = load_system(
            source, which, mesh, factory=factory, trust_model=trust_model, mapped=mapped
        )
        next_item_learner(self.system).eval()
        self._draw = candidate_draw(self.config, self._catalogue, self.schema)
        self.version = version_of(source, step)
        self._gaps = Gaps.of_run(vocab, self.schema)
        self._max_history = read_max_history(vocab)  # beyond it packs have none, so that nothing was learned of more
        self._names = ItemNames(vocab, self.schema, self._catalogue, domain_of(self.schema))
        self._listed = np.arange(self._catalogue.num_ids) > 0  # items that may be recommended
        self._text_ids: dict[str, int] = {}  # of texts that were added
        self._vectors: Tensor | None = None
        self._shelves: dict[tuple[IndexKind, bool], dict[int, Shelf]] = {}

    @classmethod
    def open(
        cls,
        run: str | os.PathLike[str],
        *,
        checkpoint: str | int = "best",
        model: ModelFactory | None = None,
        trust_model: bool = False,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        cache: str | os.PathLike[str] = CACHE,
        mapped: bool = False,
    ) -> NextItems:
        """Open a run, a bundle or a version of a registry. Arguments and errors are those of `gmeta.load`."""
        mesh = local_mesh(device)

        def make(source: Path, which: str) -> NextItems:
            return cls(source, which, factory=model, trust_model=trust_model, mesh=mesh, mapped=mapped)

        return open_trained(make, run, str(checkpoint), cache=cache, mapped=mapped)

    # ------------------------------------------------------------------------------------------ tables in memory

    def recommend(
        self,
        events: TableLike,
        k: int = 10,
        *,
        domain: str | None = None,
        candidates: CandidateSet = "domain",
        exclude_history: bool = True,
    ) -> pa.Table:
        """Return the k best items for each user of a table of events: user, rank (from 1), item, domain, score.

        Each user gets k items of every domain, of one `domain`, or with `candidates` all k items over all domains.
        Users without a known event are left out. ValueError for what `histories` refuses, and an unknown domain.
        """
        whole = isinstance(k, int | np.integer) and not isinstance(k, bool)
        require(whole and k >= 1, "k", k, "must be a whole number of at least 1")
        require(candidates in get_args(CandidateSet), "candidates", candidates, "must be domain or all")
        found = self.histories(events)
        known = found.where(found.length > 0)
        return self.table_of(self.best(known, k, self.shelves(domain, candidates), exclude_history), known.users)

    def histories(self, events: TableLike) -> Histories:
        """Return the histories of the users of a table of events.

        Events of unknown items are left out, unless the model reads texts and the event has one. ValueError for missing
        columns, values that cannot be used, with row and column, and a table without rows.
        """
        columns = self.columns
        needed = [columns.user, columns.item, *([] if columns.time is None else [columns.time])]
        welcome = [name for name in (columns.domain, columns.text) if name is not None]
        with _table_part(as_arrow(events, "events", needed, welcome), "events") as (con, part):
            parts = [self.encode(raw) for raw in EventReader(con, [part], columns).chunks()]
        return Histories(
            [user for found in parts for user in found.users],
            np.concatenate([found.items for found in parts]),
            np.concatenate([found.length for found in parts]),
            sum(found.unknown for found in parts),
            {name: np.concatenate([found.beside[name] for found in parts]) for name in parts[0].beside},
        )

    def add_items(self, items: TableLike) -> int:
        """Add items by their texts, to be recommended and to stand in histories; return how many are new.

        The table has the columns item, domain and text of events. ValueError where the model reads no texts, and for an
        unknown domain.
        """
        columns = self.columns
        needed = [name for name in (columns.item, columns.domain, columns.text) if name is not None]
        with _table_part(as_arrow(items, "items", needed), "items") as (con, part):
            return self.add(read_raw_items(con, part, columns))

    def user_vectors(self, events: TableLike) -> pa.Table:
        """Return user and vector (a list of float32) for each user of a table of events with a known event.

        Of events without times they read all domains alike; `recommend` reads those of the domain asked for last.
        """
        found = self.histories(events)
        return self.user_table(found.where(found.length > 0))

    def item_vectors(self) -> pa.Table:
        """Return item, domain and vector (a list of float32) of all items. Their products with those of users are the
        scores.
        """
        ids = np.flatnonzero(self._listed)
        return self._named(ids).append_column("vector", _lists(self._all_vectors()[torch.from_numpy(ids)]))

    # ------------------------------------------------------------------------------------------ what others build on

    @property
    def num_items(self) -> int:
        """Return how many items may be recommended."""
        return int(self._listed.sum())

    @property
    def domains(self) -> list[str]:
        """Return the domains that the run knows."""
        return self._names.domains[1:]

    @property
    def reads_texts(self) -> bool:
        """Say whether the model can tell an item that it never saw by its text."""
        return self._text is not None and hasattr(self.system.objective.model, "add_texts")

    def encode(self, raw: RawEvents) -> Histories:
        """Return the histories of raw events."""
        ids = self._names.find(raw.item, raw.domain)
        if self.reads_texts and (ids == OOV).any():
            self._learn_unknown(raw, np.flatnonzero(ids == OOV))
            ids = self._names.find(raw.item, raw.domain)
        known = ids != OOV
        user, items = raw.user[known], ids[known]
        domain = self._names.order_of_domains()[self._names.domain[items]]
        time = None if raw.time is None else raw.time[known]
        order = interleaved(user, domain, time)
        length = np.bincount(user, minlength=len(raw.users)).astype(np.int64)
        gaps = {} if self._gaps is None or time is None else {GAP: self._gaps.of_events(user[order], time[order])}
        return Histories(raw.users, items[order], length, int((~known).sum()), gaps)

    def add(self, raw: RawItems) -> int:
        """Add raw items; see `add_items`."""
        if not self.reads_texts:
            raise ValueError(
                f"{self.source} has the model {self.config.model.name}, which knows items by their ids alone, and none "
                "was trained for a new item: train again on events with it, or use a model that reads texts, such as "
                "llmrec"
            )
        domains = self._known_domains(raw.domain)
        if (domains < 0).any():
            name = raw.domain[int((domains < 0).argmax())]
            raise ValueError(f"items have the domain {name!r}, which the run does not know: {self._domain_hint(name)}")
        ids = self._names.find(raw.item, raw.domain)
        places = np.flatnonzero(ids == OOV)
        added = self._list({int(ids[p]): raw.text[p] or "" for p in np.flatnonzero(~self._listed[ids] & (ids != OOV))})
        return added + self._add(
            [(raw.item[p], int(domains[p]), raw.text[p] or "") for p in places.tolist()], listed=True
        )

    def shelves(self, domain: str | None, candidates: CandidateSet, index: IndexKind = "exact") -> dict[int, Shelf]:
        """Return what is recommended of: the items of each domain by its id, or all under 0. ValueError for an unknown
        domain.
        """
        by_domain = self._names.has_domains and (domain is not None or candidates == "domain")
        if domain is not None and domain not in self.domains:
            raise ValueError(f"domain is {domain!r}, which the run does not know: {self._domain_hint(domain)}")
        key = index, by_domain
        if key not in self._shelves:
            make = _SHELVES[index]
            found = shelves_of(self._names.domain, self._listed, by_domain=by_domain)
            self._shelves[key] = {number: make(ids, self._all_vectors()) for number, ids in found}
        shelves = self._shelves[key]
        if domain is None:
            return shelves
        number = self._names.domains.index(domain)
        return {number: shelves[number]} if number in shelves else {}

    def best(
        self, histories: Histories, k: int, shelves: Mapping[int, Shelf], exclude_history: bool = True
    ) -> list[TopItems]:
        """Return the k best items of each shelf for users who have a known event each."""
        users = self.vectors(histories)
        seen = histories.seen(users.device)
        out = seen if exclude_history else (seen[0][:0], seen[1][:0])
        return [shelf.top(self._asked(users, histories, of), k, out) for of, shelf in shelves.items()]

    def _asked(self, users: Tensor, histories: Histories, domain: int) -> Tensor:
        """Return the vectors [U, d] of users who are asked for items of a domain, 0: of any.

        Without times nothing says which of a user's domains came last: events of the domain are read behind those of
        others, as in the histories that a pack's targets have.
        """
        if self.columns.time is not None or not domain:
            return users
        own = self._names.domain[histories.items] == domain
        user = np.repeat(np.arange(len(histories.users)), histories.length)
        count = np.bincount(user, own, minlength=len(histories.users))
        several = (count > 0) & (count < histories.length)
        if not several.any():
            return users
        events = np.flatnonzero(several[user])
        some = histories.where(several).at(np.lexsort((own[events], user[events])))
        found = users.clone()
        found[torch.from_numpy(several).to(users.device)] = self.vectors(some)
        return found

    def vectors(self, histories: Histories) -> Tensor:
        """Return the vector of each user, [U, d]. ValueError for one that is not finite."""
        if not histories.users:
            return vectors_of_items(self.system, self._catalogue, self.schema, np.array([1]))[:0]
        ends, length = np.cumsum(histories.length), histories.length
        for most in (self.config.loader.max_support_rows, self._max_history):
            length = np.minimum(length, most) if most else length
        read = histories.at(ranges(ends - length, length))
        found = user_vectors(self.system, self._catalogue, self.schema, read.items, length, self._draw, read.beside)
        if not (finite := found.isfinite().all(1)).all():
            user = histories.users[int((~finite).nonzero()[0])]
            raise ValueError(f"the vector of user {user!r} has numbers that are not finite: the run is of no use")
        return found

    def table_of(self, best: Sequence[TopItems], users: Sequence[str]) -> pa.Table:
        """Return the recommended items of users as a table: user by user, shelf by shelf, by rank."""
        return self._table(
            users,
            torch.cat([top.item for top in best], 1).cpu().numpy() if best else np.zeros((len(users), 0), np.int64),
            np.concatenate([np.arange(1, 1 + top.item.shape[1]) for top in best] or [np.zeros(0, np.int64)]),
            torch.cat([top.score for top in best], 1).cpu().numpy() if best else np.zeros((len(users), 0), np.float32),
        )

    def popular(self, users: Sequence[str], k: int, shelves: Mapping[int, Shelf]) -> pa.Table:
        """Return for each user the items that most training events have, without scores, in a table as `table_of`."""
        parts = []
        for shelf in shelves.values():
            parts.append(shelf.ids[np.lexsort((shelf.ids, -self._catalogue.count[shelf.ids]))][:k])
        items = np.tile(np.concatenate(parts), (len(users), 1))
        rank = np.concatenate([np.arange(1, 1 + len(part)) for part in parts])
        found = self._table(users, items, rank, np.zeros(items.shape, np.float32))
        scores = pa.nulls(found.num_rows, pa.float32())
        return found.set_column(found.column_names.index("score"), "score", scores)

    def user_table(self, histories: Histories) -> pa.Table:
        """Return user and vector of users who have a known event each."""
        return pa.table({"user": pa.array(histories.users, pa.string()), "vector": _lists(self.vectors(histories))})

    def scores_of(self, histories: Histories, items: Ints) -> Tensor:
        """Return the score of one item for each user, [U], without the vectors of all items."""
        found = vectors_of_items(self.system, self._catalogue, self.schema, items)
        return (self.vectors(histories) * found).sum(1)

    # ------------------------------------------------------------------------------------------ within

    def _table(self, users: Sequence[str], items: Ints, rank: Ints, scores: NDArray[np.float32]) -> pa.Table:
        """Return a table of items [U, n], without those of no score; `rank` [n]."""
        user, place = np.nonzero(scores > -np.inf)
        columns = {"user": pa.array(users, pa.string()).take(pa.array(user)), "rank": rank[place].astype(np.int32)}
        named = self._named(items[user, place])
        columns |= {name: named[name] for name in named.column_names}
        return pa.table({**columns, "score": scores[user, place]})

    def _named(self, ids: Ints) -> pa.Table:
        """Return the item and, where there are domains, the domain of each id."""
        columns = {"item": self._names.names(ids)}
        if self._names.has_domains:
            columns["domain"] = self._names.domain_names(self._names.domain[ids])
        return pa.table(columns)

    def _all_vectors(self) -> Tensor:
        """Return the vectors of all items, [num_ids, d]. ValueError for one that is not finite."""
        first = 0 if self._vectors is None else len(self._vectors)
        if self._vectors is None or first < self._catalogue.num_ids:
            new = np.arange(first, self._catalogue.num_ids)
            found = vectors_of_items(self.system, self._catalogue, self.schema, new)
            if not (finite := found.isfinite().all(1)).all():
                (name,) = self._names.names(new[[int((~finite).nonzero()[0])]]).to_pylist()
                raise ValueError(f"the vector of item {name!r} has numbers that are not finite: the run is of no use")
            self._vectors = found if self._vectors is None else torch.cat([self._vectors, found])
        return self._vectors

    @property
    def _text(self) -> str | None:
        """Return the feature of the items' texts that the model reads."""
        return next((name for name in next_item_learner(self.system).texts if name in self.schema.catalogue), None)

    def _known_domains(self, names: Sequence[str | None]) -> Ints:
        """Return the domain id of each name, -1 of an unknown one; 0 where there are no domains."""
        if not self._names.has_domains:
            return np.zeros(len(names), np.int64)
        known = {name: number for number, name in enumerate(self._names.domains) if number}
        return np.array([known.get(name or "", -1) for name in names], np.int64)

    def _domain_hint(self, name: str | None) -> str:
        return nearest(name or "", self.domains)

    def _learn_unknown(self, raw: RawEvents, places: Ints) -> None:
        """Add the items of unknown events that have a text, for histories alone."""
        domains = self._known_domains([raw.domain[p] for p in places.tolist()])
        found = zip(places.tolist(), domains.tolist(), strict=True)
        self._add([(raw.item[p], d, raw.text[p] or "") for p, d in found if raw.text[p] and d >= 0], listed=False)

    def _list(self, texts: Mapping[int, str]) -> int:
        """Have items recommended that were known from histories alone, by these texts; return how many."""
        if texts:
            ids = np.array(list(texts), np.int64)
            text = str(self._text)
            owned = dict(self._catalogue.owned)
            owned[text] = owned[text].copy()
            owned[text][ids] = self._ids_of_texts(list(texts.values()))
            self._catalogue = replace(self._catalogue, owned=owned)
            self._listed[ids] = True
            self._vectors = None
            self._shelves.clear()
        return len(texts)

    def _ids_of_texts(self, texts: Sequence[str]) -> Ints:
        """Return the ids of texts; the model gets those that it did not know."""
        assert self._text is not None
        model: Any = self.system.objective.model
        first = next_item_learner(self.system).texts[self._text].num_texts
        if new := [text for text in dict.fromkeys(texts) if text not in self._text_ids]:
            model.add_texts(self.schema.feature(self._text).table, new)
            self._text_ids |= zip(new, range(first + len(self._text_ids), 2**63), strict=False)
        return np.array([self._text_ids[text] for text in texts], np.int64)

    def _add(self, items: Sequence[tuple[str, int, str]], *, listed: bool) -> int:
        """Add items (name, domain, text), each once; return how many."""
        distinct: dict[tuple[str, int], str] = {}
        for name, domain, text in items:
            distinct.setdefault((name, domain), text)
        if not distinct:
            return 0
        assert self._text is not None
        domains = np.array([domain for _, domain in distinct], np.int64)
        self._names.add([name for name, _ in distinct], domains)
        owned = {name: np.zeros(len(domains), np.int64) for name in self._catalogue.owned}
        owned[self._text] = self._ids_of_texts(list(distinct.values()))
        if (domain_feature := domain_of(self.schema)) is not None:
            owned[domain_feature] = domains
        self._catalogue = self._catalogue.followed_by(owned)
        self._listed = np.append(self._listed, np.full(len(domains), listed))
        if listed:
            self._shelves.clear()
        return len(distinct)


@contextmanager
def _table_part(table: pa.Table, name: str) -> Iterator[tuple[Connection, RawPart]]:
    """Open an Arrow table as raw rows of a database."""
    if not table.num_rows:
        raise ValueError(f"{name} has no rows: give some")
    with database() as con:
        con.register("given", table.append_column("__row", pa.array(np.arange(1, table.num_rows + 1))))
        try:
            part = described(con, name, "SELECT * FROM given", ordered=False)
        except duckdb.NotImplementedException as error:
            kinds = ", ".join(f"{field.name} {field.type}" for field in table.schema)
            raise ValueError(
                f"{name} has a column of a type that cannot be read ({kinds}): make it text, or plain numbers"
            ) from error
        yield con, part


def _lists(vectors: Tensor) -> pa.Array:
    """Return vectors [n, d] as an Arrow array of lists."""
    values = vectors.float().cpu().numpy()
    ends = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(values.reshape(-1), pa.float32()))
