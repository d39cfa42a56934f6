"""Raw rows of the cases: each function writes what one seed needs, and says how `gmeta prepare` makes packs of it.

A function takes a `Place` and returns the words of `gmeta prepare` for each view, without `--out`; a view is a pack of
the same training rows, whose valid and test tasks have another support. Models are trained on the first one. The cells
of a case are made again when the source of its function changes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from common import DATA, ROOT, here
from numpy.typing import NDArray

Words = tuple[object, ...]
Views = dict[str, Words]

VALID_SHARE = 8
"""One valid user for so many training users, as `gmeta prepare` has them by default (10 % and 80 %)."""
MIN_EVENTS = 8
"""Events of a user who takes part in the shop cases: with the negatives 16 rows, of which 10 are the query."""


@dataclass(frozen=True)
class Place:
    """Where raw rows of one seed are written."""

    folder: Path
    seed: int
    quick: bool = False  # few tasks


def named(place: Place, config: str, folder: str) -> Views:
    """Leave the rows where they are: the config names a data set."""
    return {"": ("--config", ROOT / config, "--root", DATA / folder, "--seed", place.seed)}


def ratings(place: Place, side: bool) -> Views:
    """Write ML-100K as a user has it, one CSV file and a schema of a few lines; `side`: with facts of users, films."""
    path = DATA / "ml-100k" / "ml-100k"
    table = _atomic(f"{path}.inter")
    if side:
        users, films = _atomic(f"{path}.user"), _atomic(f"{path}.item")
        decade = [str(age // 10 * 10) for age in users["age"].to_pylist()]
        users = users.set_column(users.column_names.index("age"), "age", pa.array(decade))
        table = table.join(users.select(["user_id", "gender", "age", "occupation"]), "user_id")
        table = table.join(films.select(["item_id", "release_year", "class"]), "item_id")
    schema: dict[str, Any] = _clicks("user_id", "item_id", "rating") | {"time": "timestamp", "label_threshold": 4}
    if side:
        schema["categorical"] += ["gender", "age", "occupation", {"name": "release_year", "nulls": "oov"}]
        schema["multi"] = [{"name": "class", "separator": " ", "nulls": "oov"}]
    return {"": _written(place, table, schema)}


def few_ratings(place: Place, users: int) -> Views:
    """Keep `users` training users of those that `ratings` has, and fewer valid ones; its test users are all kept."""
    whole = place.folder / "whole"
    here("prepare", *ratings(place, side=False)[""], "--out", whole)
    part = {str(row["key"]): row["split"] for row in pq.read_table(whole / "tasks.parquet").to_pylist()}
    rng = np.random.default_rng(place.seed)
    for split, kept in (("train", users), ("valid", users // VALID_SHARE)):
        drawn = rng.permutation(sorted(key for key, value in part.items() if value == split))
        part |= dict.fromkeys(drawn[kept:].tolist(), "left out")
    table = pacsv.read_csv(place.folder / "rows.csv")
    column = pa.array([part[str(key)] for key in table["user_id"].to_pylist()])
    table = table.append_column("part", column).filter(pa.array([value.as_py() != "left out" for value in column]))
    schema = _clicks("user_id", "item_id", "rating")
    schema |= {"time": "timestamp", "label_threshold": 4, "partition": "part"}
    return {"": _written(place, table, schema)}


def films(place: Place) -> Views:
    """Write films as tasks of 40 clicks, cut as published (20 and 20), and cut to 5 and to 30 clicks of support.

    Only valid and test films are cut anew, at random: of 5, the query stays; of 30, the query is 10 random clicks.
    """
    table = pq.read_table(DATA / "ml-1m-ads" / "ads.parquet")
    schema = {
        **_clicks("ad_key", "UserID", "y"),
        "partition": "part",
        "role": "pos",
        "multi": [{"name": name, "separator": " "} for name in ("Title", "Genres")],
    }
    schema["categorical"] += ["Gender", "Age", "Occupation", "Year"]
    films_of, rng = table["ad_key"].to_numpy(zero_copy_only=False), np.random.default_rng(place.seed)
    role, trained = table["pos"].to_numpy(), np.array(table["part"].to_pylist()) == "train"
    order = _place_in_group(films_of, rng.random(len(role)))
    of_support = _place_in_group(films_of, rng.random(len(role)) + role)  # support first: its places are 0 to 19
    cuts = {
        "20 clicks": (role, np.ones(len(role), np.bool_)),
        "5 clicks": (role, (role == 1) | (of_support < 5)),
        "30 clicks": ((order < 10).astype(np.int64), np.ones(len(role), np.bool_)),
    }
    views = {}
    for name, (new_role, kept) in cuts.items():
        column = pa.array(np.where(trained, role, new_role))
        cut = table.set_column(table.column_names.index("pos"), "pos", column).filter(pa.array(trained | kept))
        words = _written(place, cut, schema, name.replace(" ", "-"))
        views[name] = (*words, "--roles", '{"0": support, "1": query}')
    return views


def synthetic(place: Place) -> Views:
    """Draw a log whose truth is known, as examples/demo.py does."""
    here("synth", "--out", place.folder / "log", "--users", 600 if place.quick else 12000, "--seed", place.seed)
    words = ("--input", place.folder / "log" / "*.parquet", "--schema", place.folder / "log" / "schema.yaml")
    return {"": (*words, "--seed", place.seed)}


def shop(place: Place, domain: str) -> Views:
    """Write what users of a shop bought as clicks, each followed by an item that another user of their split bought.

    Were negatives drawn from all users, the item of a test user's negative had one training purchase for certain, and
    that of a positive had not: measured on Beauty, the items' means then have an AUC of .42 in place of .50.
    """
    lines = (DATA / "amazon-3domain" / f"{domain}.user_sequence.txt").read_text().splitlines()
    histories = {user: items for user, *items in map(str.split, lines) if len(items) >= MIN_EVENTS}
    users, rng = list(histories), np.random.default_rng(place.seed)
    drawn = [users[i] for i in rng.permutation(len(users))[: 300 if place.quick else None]]
    tenth, rows = len(drawn) // 10, list[tuple[str, str, int, int, str]]()
    splits = {"test": drawn[:tenth], "valid": drawn[tenth : 2 * tenth], "train": drawn[2 * tenth :]}
    for split, members in splits.items():
        bought = [item for user in members for item in histories[user]]
        for user in members:
            items = histories[user]
            for step, (item, other) in enumerate(zip(items, _not_bought(rng, bought, items), strict=True)):
                rows += [(user, item, 1, 2 * step, split), (user, other, 0, 2 * step + 1, split)]
    names = ("user_id", "item_id", "click", "time", "part")
    table = pa.table(dict(zip(names, map(pa.array, zip(*rows, strict=True)), strict=True)))
    schema = _clicks("user_id", "item_id", "click") | {"time": "time", "partition": "part"}
    return {"": _written(place, table, schema)}


def _not_bought(rng: np.random.Generator, bought: list[str], items: list[str]) -> list[str]:
    """Draw as many items as a user bought, others than those; an item is as likely as it was bought often."""
    mine, found = set(items), list[str]()
    while len(found) < len(items):
        drawn = (bought[i] for i in rng.integers(len(bought), size=2 * len(items)))
        found += [item for item in drawn if item not in mine]
    return found[: len(items)]


def _place_in_group(group: NDArray[Any], value: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return each row's place among the rows of its group by rising value, from 0; [rows]."""
    _, index = np.unique(group, return_inverse=True)
    order = np.lexsort((value, index))
    starts = np.cumsum(np.bincount(index)) - np.bincount(index)
    found = np.empty(len(order), np.int64)
    found[order] = np.arange(len(order)) - starts[index[order]]
    return found


def _clicks(task: str, item: str, label: str) -> dict[str, Any]:
    return {"task": task, "label": label, "item": item, "categorical": [item]}


def _atomic(path: str) -> pa.Table:
    """Read a file of RecBole's form, whose header is name:type."""
    form = pacsv.ParseOptions(delimiter="\t", quote_char=False)
    table = pacsv.read_csv(path, parse_options=form)
    return table.rename_columns([name.partition(":")[0] for name in table.column_names])


def _written(place: Place, table: pa.Table, schema: Mapping[str, Any], name: str = "rows") -> Words:
    """Write a CSV file and its schema (JSON is YAML); return the words that prepare them."""
    place.folder.mkdir(parents=True, exist_ok=True)
    file, meaning = place.folder / f"{name}.csv", place.folder / f"{name}.yaml"
    pacsv.write_csv(table, file)
    meaning.write_text(json.dumps(schema))
    return "--input", file, "--schema", meaning, "--seed", place.seed
