"""Named data sets of events: Amazon purchases, as files of recommendation papers hold them.

`amazon-3domain` has the sequences of three shops, in which users meet. `amazon-office` has histories and targets that
were drawn by others, so that nothing is held out here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gmeta.core.errors import nearest
from gmeta.data.events.columns import EventColumns
from gmeta.data.sources import Connection, RawPart, described, literal, numbered, only_file, read_csv

NO_DELIMITER = "\x1f"
"""Separates no fields of a text file, so that a line is one."""


@dataclass(frozen=True, kw_only=True)
class EventSet:
    """A named data set of events."""

    columns: EventColumns
    files: tuple[str, ...]
    domains: tuple[str, ...] = ()
    origin: str
    """Where to get the files, in a sentence that an error message ends with."""
    open: Callable[[Connection, Path, Sequence[str]], tuple[list[RawPart], RawPart]]
    """Makes the events and the items of some domains of the files in a directory, all of which are there."""
    note: str = ""
    """What the summary says of it."""
    has_targets: bool = False
    """Whether its events are already the rows of tasks: its one part has the columns of table `task_rows`."""


def require_files(data: EventSet, name: str, root: str | None) -> Path:
    """Return the directory of a named data set's files. ValueError where files are missing says where to get them."""
    if root is None:
        raise ValueError(f"dataset {name} needs root, the directory with {', '.join(data.files)}. {data.origin}")
    missing = [file for file in data.files if not (Path(root) / file).is_file()]
    if missing:
        raise ValueError(f"dataset {name}: {root} lacks {', '.join(missing)}. {data.origin}")
    return Path(root)


def chosen_domains(asked: Sequence[str], known: Sequence[str]) -> list[str]:
    """Return the domains that are asked for, all where none is. ValueError names one that is not known."""
    for domain in asked:
        if domain not in known:
            raise ValueError(f"domains names {domain!r}, which no event has: {nearest(domain, known)}")
    return list(dict.fromkeys(asked)) or list(known)


def _amazon_3domain(con: Connection, root: Path, domains: Sequence[str]) -> tuple[list[RawPart], RawPart]:
    parts, texts = [], []
    for domain in domains:
        sequences, text = root / f"{domain}.user_sequence.txt", root / f"{domain}.item_text.txt"
        words = f"SELECT string_split(line, ' ') AS words FROM {_lines(sequences)}"
        events = f"SELECT words[1] AS user, unnest(words[2:]) AS item, {literal(domain)} AS domain FROM ({words})"
        parts.append(described(con, str(sequences), numbered(f"({events})"), ordered=True))
        texts.append(f"""SELECT split_part(line, ' ', 1) AS item, {literal(domain)} AS domain,
                                substr(line, strpos(line, ' ') + 1) AS text FROM {_lines(text)}""")
    every = " UNION ALL ".join(texts)
    return parts, described(con, str(root / "*.item_text.txt"), numbered(f"({every})"), ordered=True)


def _lines(file: Path) -> str:
    return read_csv(file, ["line"], NO_DELIMITER, header=False, quote="")


AMAZON_3DOMAIN = EventSet(
    columns=EventColumns(user="user", item="item", domain="domain", text="text"),
    files=tuple(
        f"{domain}.{kind}.txt" for domain in ("Beauty", "Sports", "Toys") for kind in ("user_sequence", "item_text")
    ),
    domains=("Beauty", "Sports", "Toys"),
    origin="These are sequences of Amazon reviews (2014, 5-core), a line a user, in order of time, and a text an item, "
    "as github.com/agiresearch/IDGenRec has them. Its Sports and Toys are sorted by item id: take them, in order of "
    "time, from GRAM's repository",
    open=_amazon_3domain,
)


def _amazon_office(con: Connection, root: Path, _: Sequence[str]) -> tuple[list[RawPart], RawPart]:
    examples = f"""SELECT *, row_number() OVER (PARTITION BY user_id, split ORDER BY file_row_number) AS number
                   FROM read_parquet({only_file(root / "next_item.parquet")}, file_row_number=true)"""
    # The history of a user's first valid row ends before every target; those of later rows hold targets.
    tasks = f"""
        SELECT user_id, user_id AS key, 'train' AS partition, history_item_id AS items
        FROM ({examples}) WHERE split = 'valid' AND number = 1
        UNION ALL
        SELECT user_id, concat(user_id, '#', number), split, list_append(history_item_id, item_id)
        FROM ({examples})"""
    query = f"""
        SELECT "user", key, partition, item, position, position = num_items - 1 AS is_query FROM (
            SELECT user_id AS "user", key, partition, CAST(unnest(items) AS VARCHAR) AS item,
                   generate_subscripts(items, 1) - 1 AS position, len(items) AS num_items FROM ({tasks}))"""
    items = f"""SELECT file_row_number + 1 AS __row, item_id AS item, title AS text
                FROM read_parquet({only_file(root / "items.parquet")}, file_row_number=true)"""
    return (
        [described(con, str(root / "next_item.parquet"), query, ordered=False)],
        described(con, str(root / "items.parquet"), items, ordered=False),
    )


AMAZON_OFFICE = EventSet(
    columns=EventColumns(user="user", item="item", text="text"),
    files=("next_item.parquet", "items.parquet"),
    origin="These are validation and test examples of MiniOneRec's split of Amazon reviews (2018, Office Products), "
    "github.com/AkaliKong/MiniOneRec, with columns user_id, history_item_id, item_id and split, and its items",
    open=_amazon_office,
    note="trained on the histories before a user's first target of split valid alone, since the data set's training "
    "rows are not among its files",
    has_targets=True,
)

EVENT_SETS: dict[str, EventSet] = {"amazon-3domain": AMAZON_3DOMAIN, "amazon-office": AMAZON_OFFICE}
