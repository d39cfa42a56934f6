"""`gmeta recommend`: the items that come next, for the users of files of events.

Events are sorted on disk and encoded some users at a time: memory grows with the catalogue alone.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gmeta.config.recommend import RecommendConfig
from gmeta.core.errors import require
from gmeta.core.files import replacing
from gmeta.data.events.raw_events import EventReader, read_raw_items, read_raw_users
from gmeta.data.pack import lock_directory
from gmeta.data.prepare.direct import text_of
from gmeta.data.prepare.parts import limit_errors
from gmeta.data.prepare.summary import Report, console_report
from gmeta.data.sources import CSV, PARQUET, Connection, confine, database, find_files, open_file, open_files
from gmeta.recommender.approximate import recall
from gmeta.recommender.next_items import Histories, NextItems
from gmeta.recommender.top_items import Shelf, TopItems

_SHOWN = 5
_NO_TABLES = (".txt", ".tsv", ".json", ".jsonl", ".xlsx")
_COMPARED = 1000
"""The lists of so many users by an approximate index are compared with the exact ones."""


def recommend(config: RecommendConfig) -> int:
    """Run `gmeta recommend`.

    Raises:
        ValueError: a file is missing, does not fit the run, or is one of the inputs; the run scores examples; the model
            cannot take new items; a domain is unknown; or a disk is full.
    """
    inputs = find_files(config.inputs)
    of_users = _users_file(config)
    given = [*inputs, *([] if of_users is None else [of_users])]
    given += [] if config.items is None else find_files([config.items])
    _check_outputs(config, given)
    run = NextItems.open(
        config.run_dir, checkpoint=config.checkpoint, trust_model=config.trust_model, device=config.device
    )
    anything = Path(config.out or config.item_vectors or config.user_vectors or "")
    with console_report("recommend") as tell, _database(anything, config.memory_limit) as (con, folder):
        opened, _ = open_files(con, inputs)
        items = None if config.items is None else open_file(con, _only(config.items, "items"))
        confine(con, given, [folder])
        if items is not None:
            raw = read_raw_items(con, items, run.columns)
            added = run.add(raw)
            print(
                f"new items: {added:,}; rows of items that are known or came before, unread: {len(raw.item) - added:,}"
            )
        tell("reading events", 0, 1)
        reader = EventReader(con, opened, run.columns, _users(config, con, of_users, run))
        found = _Recommending(config, run, tell).all(reader)
    for sentence in found:
        print(sentence)
    return 0


class _Recommending:
    """Recommends to the users of a reader, and counts."""

    def __init__(self, config: RecommendConfig, run: NextItems, tell: Report) -> None:
        self._config, self._run, self._tell = config, run, tell
        self._num_users = self._num_events = self._unknown = self._rows = 0
        self._without: list[str] = []
        self._num_without = 0
        self._domains: set[str] = set()  # that the run does not know
        self._exact: dict[int, Shelf] = {}
        self._compared = self._found = self._wanted = 0  # users, and items of their exact lists

    def all(self, reader: EventReader) -> list[str]:
        """Write the files; return what is to be said."""
        config, run = self._config, self._run
        shelves = run.shelves(config.domain, config.candidates, config.index) if config.out is not None else {}
        if config.out is not None and config.index != "exact":
            self._exact = run.shelves(config.domain, config.candidates)
        with ExitStack() as stack:
            out = stack.enter_context(_table_file(config.out))
            vectors = stack.enter_context(_table_file(config.user_vectors))
            done, domains = 0, {*run.domains}
            for raw in reader.chunks():
                self._tell("recommending", done, reader.num_users)
                histories = run.encode(raw)
                if domains:
                    self._domains |= {name for name in raw.domain if name} - domains
                known = histories.where(histories.length > 0)
                self._count(histories)
                if config.out is not None:
                    for table in self._lists(histories, known, shelves):
                        self._rows += table.num_rows
                        out.write(table)
                if config.user_vectors is not None:
                    vectors.write(run.user_table(known))
                done += len(raw.users)
        if config.item_vectors is not None:
            with _table_file(config.item_vectors) as file:
                file.write(run.item_vectors())
        return list(self._told(shelves))

    def _lists(self, histories: Histories, known: Histories, shelves: dict[int, Shelf]) -> Iterator[pa.Table]:
        config, run = self._config, self._run
        best = run.best(known, config.k, shelves, config.exclude_history)
        if self._exact and (first := min(_COMPARED - self._compared, len(known.users))):
            self._compare(known.where(np.arange(len(known.users)) < first), best)
        yield run.table_of(best, known.users)
        if config.popular_for_unknown:
            unknown = histories.where(histories.length == 0)
            yield run.popular(unknown.users, config.k, shelves)

    def _compare(self, some: Histories, best: Sequence[TopItems]) -> None:
        """Count what of the exact lists of the first users was found."""
        exact = self._run.best(some, self._config.k, self._exact, self._config.exclude_history)
        for mine, theirs in zip(best, exact, strict=True):
            first = TopItems(mine.item[: len(some.users)], mine.score[: len(some.users)])
            found, wanted = recall(first, theirs)
            self._found += found
            self._wanted += wanted
        self._compared += len(some.users)

    def _count(self, histories: Histories) -> None:
        self._num_users += len(histories.users)
        self._num_events += len(histories.items)
        self._unknown += histories.unknown
        without = histories.where(histories.length == 0).users
        self._num_without += len(without)
        self._without += without[: _SHOWN - len(self._without)]

    def _told(self, shelves: dict[int, Shelf]) -> Iterator[str]:
        config, run = self._config, self._run
        yield (
            f"users: {self._num_users:,}, with {self._num_events:,} known events; events of unknown items, left out: "
            f"{self._unknown:,}"
        )
        if self._domains:
            some = ", ".join(map(repr, sorted(self._domains)[:_SHOWN]))
            yield f"unknown domains, whose events are left out: {some}; the run knows {', '.join(run.domains)}"
        if self._num_without:
            named = ", ".join(map(repr, self._without)) + (" …" if self._num_without > len(self._without) else "")
            what = "given the most popular items" if config.popular_for_unknown else "left out"
            yield f"users without a known event, {what}: {self._num_without:,} ({named})"
        most = max((len(shelf.ids) for shelf in shelves.values()), default=0)
        if shelves and config.k > most:
            yield f"k is {config.k:,}, more than the {most:,} items of the largest list: users get all of each"
        if self._wanted:
            share = self._found / self._wanted
            yield f"index {config.index} found {share:.4f} of the exact lists of {self._compared:,} users"
        if config.out is not None:
            yield f"recommendations by {run.version}: {self._rows:,}, in {config.out}"
        if config.item_vectors is not None:
            yield f"vectors of items: {run.num_items:,}, in {config.item_vectors}"
        if config.user_vectors is not None:
            yield f"vectors of users: {self._num_users - self._num_without:,}, in {config.user_vectors}"


class _TableFile:
    """A Parquet file that is written table by table; without a table it is absent."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._writer: Any = None

    def write(self, table: pa.Table) -> None:
        """Write a table."""
        assert self._path is not None
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._path, table.schema)
        self._writer.write_table(table)

    def close(self) -> None:
        """Finish the file."""
        if self._writer is not None:
            self._writer.close()


@contextmanager
def _table_file(path: str | None) -> Iterator[_TableFile]:
    """Give a file that is whole or absent; without a path one that nobody writes to."""
    if path is None:
        yield _TableFile(None)
        return
    with replacing(Path(path)) as partial:
        file = _TableFile(partial)
        try:
            yield file
        finally:
            file.close()


@contextmanager
def _database(out: Path, memory_limit: str) -> Iterator[tuple[Connection, Path]]:
    """Give a database that spills to a folder beside `out`, which is removed at the end."""
    folder = out.with_name(f".{out.name}.scratch")
    try:
        lock = lock_directory(folder)
    except OSError as error:
        raise ValueError(f"cannot write {out}: {error.strerror or error}; name another file") from error
    settings = {"memory_limit": memory_limit, "temp_directory": str(folder / "spill")}
    try:
        with limit_errors(folder), database(**settings) as con:
            yield con, folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _check_outputs(config: RecommendConfig, inputs: Sequence[Path]) -> None:
    """Refuse, before any work, an output that would replace an input."""
    for key in ("out", "item_vectors", "user_vectors"):
        name = getattr(config, key)
        for file in inputs:
            if name is not None and Path(name).exists() and Path(name).samefile(file):
                raise ValueError(f"{key} {name} would overwrite {file}, which is read: name another file")


def _only(path: str, key: str) -> Path:
    files = find_files([path])
    require(len(files) == 1, key, path, f"is {len(files)} files: name one")
    return files[0]


def _users_file(config: RecommendConfig) -> Path | None:
    """Return the file that `users` names; None where it names users."""
    given = config.users if isinstance(config.users, str) else None
    if given is not None and given.lower().endswith(_NO_TABLES):
        raise ValueError(
            f"users is {given!r}: a file of users is Parquet or CSV, and one user is given as a list, [u1]"
        )
    named = given is not None and given.lower().endswith(PARQUET + CSV)
    return _only(given, "users") if named and given is not None else None


def _users(config: RecommendConfig, con: Connection, file: Path | None, run: NextItems) -> list[str] | None:
    """Return the users that the config names, in the one form of an id; None where it names none."""
    if file is not None:
        return read_raw_users(con, file, run.columns)
    if config.users is None:
        return None
    given = config.users.split(",") if isinstance(config.users, str) else config.users
    names = map(str, given if isinstance(given, list) else [given])
    found = [text_of(name.strip()) for name in names]
    users = [name for name in found if isinstance(name, str)]
    if len(users) < len(found) or not users:
        print("recommend: users has names that are no ids, which are left out", file=sys.stderr)
    require(bool(users), "users", config.users, "name users, or a file of them")
    return users
