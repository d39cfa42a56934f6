"""The catalogue: all items of events and of the items file, each with its domain and title, and then with their ids."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gmeta.data.catalogue import write_catalogue
from gmeta.data.events.columns import EventColumns
from gmeta.data.prepare.encode import looked_up_in
from gmeta.data.schema import DataSchema, PackSchema
from gmeta.data.sources import Connection, only_file


def make_catalogue(con: Connection, *, whole: bool) -> None:
    """Make table `catalogue` (item, domain, title), a row an item: of earlier days, of the events that are left, and
    with `whole` of the items file. The title is that of earlier days, else the text of the items file, else the most
    frequent one.
    """
    more = "UNION ALL SELECT item, domain FROM known_items"
    more += " UNION ALL SELECT item, coalesce(domain, '') FROM items" if whole else ""
    con.execute(f"""
        CREATE TABLE catalogue AS
        SELECT i.item, i.domain, t.text AS title
        FROM (SELECT DISTINCT item, domain FROM (SELECT item, domain FROM placed {more})) i
        LEFT JOIN (SELECT item, text FROM texts
                   QUALIFY row_number() OVER (PARTITION BY item ORDER BY place, count DESC, text) = 1) t
        USING (item)""")


def write_items(
    con: Connection,
    schema: DataSchema,
    pack_schema: PackSchema,
    columns: EventColumns,
    items: Path,
    vocab: Path,
    gap_unit: str | None,
    max_history: int | None,
) -> None:
    """Write the catalogue of a pack of events with these columns: the `items`, which `rows` wrote, by the ids that
    `learn` gave. `gap_unit` is the unit of times, where rows have gaps, `max_history` how many events a history has at
    most.
    """
    tables = list(schema.tables())
    features = {feature.name: feature for feature in schema.features}
    joins = "".join(
        f" LEFT JOIN {looked_up_in(tables, features[name])} t{i} ON t{i}.value = c.{name}"
        for i, name in enumerate(pack_schema.catalogue)
    )
    ids = "".join(f", coalesce(t{i}.id, 0) AS {name}" for i, name in enumerate(pack_schema.catalogue))
    found = con.sql(f"""
        SELECT CAST(v.value AS VARCHAR) AS item, v.count{ids}
        FROM vocab_{tables.index("item")} v JOIN read_parquet({only_file(items)}) c ON c.item = v.value{joins}
        ORDER BY v.id""").to_arrow_table()
    owned = {name: found[name].to_numpy().astype(np.int64) for name in pack_schema.catalogue}
    told = (columns.by_meaning(), gap_unit, max_history)
    write_catalogue(vocab, found["item"], owned, found["count"].to_numpy(), *told)
