"""Models of several scenarios on real data: events of three domains (`amazon-3domain`) against drawn items.

    python benchmarks/scenarios.py --folder DIR          the same command goes on after a stop
    python benchmarks/scenarios.py --quick

An event is a click; beside it stands an item of the domain that its user has not had, drawn as often as train has them,
so that popularity alone tells nothing. Of each user and domain the last event is of test, the one before of valid.
Models read the user, the item, the domain, the last ten items of the user in the domain, and texts: the item's and
those of the last five. They are those of `gmeta benchmark antm2c`, with wider rows and no masked ids, and so is the
measuring.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from common import DATA, Record, here, parse, publish
from text.kept_cells import cell_parser, encoder_beside

from gmeta.benchmark.cells import Cell, CellFolder
from gmeta.benchmark.leaderboards import boards_of
from gmeta.benchmark.tracks import MANY, POOLED, SCENARIOS, SEPARATE, plain_words

FOLDER = "amazon-3domain"
DOMAINS = ("Beauty", "Sports", "Toys")
FEATURES = ("user", "item", "domain", "text", "history", "read")
HISTORY, READ = 10, 5
"""Items of a history, and those of them whose texts are read."""
OWN = ("--embedding.lr", "0.1", "--embedding.id_dropout", "0", "--model.embedding_dim", "16")
"""Half of the clone's test items are new, for which the benchmark masks ids and has narrow rows; of these none is."""
PARTS = ("train", "valid", "test")
SCHEMA = """
task: user
label: label
time: place
item: item
scenario: domain
partition: part
role: role
categorical: [user, item, domain, {name: text, text: true, nulls: oov}]
sequence:
  - {name: history, table: item, pooling: mean, max_length: 10}
  - {name: read, table: text, text: true, pooling: none, max_length: 5}
"""


def main() -> int:
    """Run the cells that are asked for, and write their leaderboards."""
    args = parse(cell_parser(__doc__, "20 steps of two models; writes no result files"))
    encoder = encoder_beside(FOLDER)
    if encoder is None:
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        _run(CellFolder(args.folder or Path(temporary)), encoder, args)
    return 0


def _cells(encoder: str, quick: bool) -> Iterator[Cell]:
    end = ("--schedule.max_steps", "20") if quick else ("--schedule.epochs", "4")
    texts = {"encoder": encoder, "layers": 5, "target": "text", "lists": ["read"]}

    def words(model: str) -> tuple[str, ...]:
        return (*plain_words(model, FEATURES, "domain", texts, end), *OWN)

    for model in ("dnn", "star") if quick else (*POOLED, *MANY):
        yield Cell(SCENARIOS, model, 0, "all", words(model))
    for model in () if quick else SEPARATE:
        for number in range(len(DOMAINS)):
            yield Cell(SCENARIOS, f"{model}, scene {number}", 0, f"scene_{number}", words(model))


def _run(folder: CellFolder, encoder: str, args: argparse.Namespace) -> None:
    kept: dict[Cell, dict[str, Any]] = {}
    for cell in _cells(encoder, args.quick):
        found = folder.kept(cell)
        if found is None and cell.name.startswith(args.cells) and not args.kept:
            print(f"{cell.name} …", file=sys.stderr, flush=True)
            _make_pack(folder, cell.pack)
            found = folder.run(cell)
        if found is not None:
            kept[cell] = found
    boards = boards_of(folder, kept, {}, 20 if args.quick else 400)
    records = [
        Record(r["case"], r["variant"], f"{r['metric']}{end}", r[key], r["unit"])
        for board in boards
        for r in board.records
        for key, end in (("value", ""), ("low", "_low"), ("high", "_high"))
        if key in r
    ]
    facts = {"data": FOLDER, "scenes": ", ".join(f"{n} {name}" for n, name in enumerate(DOMAINS)), "threads": 1}
    publish("scenarios", "\n\n".join(board.markdown() for board in boards), records, facts, args)


def _make_pack(folder: CellFolder, name: str) -> None:
    out = folder.pack(name)
    if (out / "manifest.json").exists():
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = out.parent / f"{name}.parquet"
    table = pa.concat_tables([_rows(number) for number in range(len(DOMAINS))])
    if name != "all":
        table = table.filter(pc.equal(table["domain"], name.removeprefix("scene_")))
    pq.write_table(table, rows)
    schema = out.parent / "schema.yaml"
    schema.write_text(SCHEMA)
    here("prepare", "--input", rows, "--schema", schema, "--out", out)
    rows.unlink()


def _rows(number: int) -> pa.Table:
    """Return the rows of a domain: of each event a click, and an item that was not clicked."""
    place = DATA / FOLDER
    name, rng = DOMAINS[number], np.random.default_rng(number)
    users = [line.split() for line in (place / f"{name}.user_sequence.txt").read_text().splitlines()]
    texts = dict(line.split(" ", 1) for line in (place / f"{name}.item_text.txt").read_text().splitlines())
    trained = np.array([item for _, *items in users for item in items[:-2]])
    columns: dict[str, list[Any]] = {key: [] for key in ("user", "item", "label", "part", "place", "history")}
    for user, *items in users:
        own, drawn = set(items), iter(rng.choice(trained, 4 * len(items)).tolist())
        for at, item in enumerate(items):
            other = next((one for one in drawn if one not in own), None)
            for label, shown in ((1, item), (0, other)):
                if shown is not None:
                    part = PARTS[max(0, at - len(items) + 3)]
                    values = (user, shown, label, part, at, items[max(0, at - HISTORY) : at])
                    for key, value in zip(columns, values, strict=True):
                        columns[key].append(value)
    table = pa.table(columns)
    table = table.append_column("domain", pa.array([str(number)] * len(table)))
    # plain training reads both sides alike; a pack needs some support
    first = pc.and_(pc.equal(table["part"], "train"), pc.equal(table["place"], 0))
    table = table.append_column("role", pc.if_else(first, "support", "query"))
    read = [[texts[item] for item in items[-READ:] if texts.get(item)] for items in columns["history"]]
    table = table.append_column("read", pa.array(read))
    return table.append_column("text", pa.array([texts.get(item, "") for item in columns["item"]]))


if __name__ == "__main__":
    sys.exit(main())
