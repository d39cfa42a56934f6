"""Rows of `ml-1m-ctr` as packs: tasks of two rows, to train plainly on rows of equal weight, or of users, to adapt.

Histories hold the titles of films that the user liked before. Film 0 has no title and is left out of them. `valid` is
cut by time into a half to choose on and a half to judge on. Rates are smoothed logits of the like rate of the rows'
user and film, and co-likes tell how often those who like the user's films like this one too: of training rows from
earlier training rows alone, of the others from all training rows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import DATA, here

FOLDER = "ml-1m-ctr"
PRIOR_ROWS = 10.0
PRIOR_LIKES = 5
MOST_ALIKE = 10  # of the user's films; 5 and 20 give .001 less on the choosing rows
RATES = ("user_rate", "item_rate")
NUMBERS = (*RATES, "co_likes")
MOST_TITLES = 100


@dataclass(frozen=True)
class Rows:
    """Rows in time order, train first."""

    part: np.ndarray  # train, choose, judge
    uid: np.ndarray
    iid: np.ndarray
    label: np.ndarray
    time: np.ndarray
    title: list[str]
    history: list[list[str]]  # the last MOST_TITLES
    numbers: np.ndarray  # [rows, 3], as NUMBERS
    floor_of_all: np.ndarray  # the floor, from all rows before the judging ones

    def of(self, part: str) -> np.ndarray:
        """Return the positions of a part."""
        return np.flatnonzero(self.part == part)

    @property
    def floor(self) -> np.ndarray:
        """Return what needs no model: user rate + item rate."""
        return self.numbers[:, 0] + self.numbers[:, 1]


def read_rows() -> Rows:
    """Read all rows. Raises FileNotFoundError where the data are not there."""
    found = [_sorted(pq.read_table(DATA / FOLDER / f"{name}.parquet")) for name in ("train", "valid")]
    train = found[0].num_rows
    table = pa.concat_tables(found)
    columns = {name: np.array(table[name].to_pylist()) for name in ("uid", "iid", "label", "timestamp")}
    rest = table.num_rows - train
    part = np.array(["train"] * train + ["choose"] * (rest // 2) + ["judge"] * (rest - rest // 2))
    history = [
        [title for film, title in zip(films, titles, strict=True) if film != 0][-MOST_TITLES:]
        for films, titles in zip(table["his"].to_pylist(), table["his_title"].to_pylist(), strict=True)
    ]
    label = columns["label"].astype(np.float64)
    rates, later = (
        np.stack([_rates(columns[name], label, known) for name in ("uid", "iid")], 1)
        for known in (train, train + rest // 2)
    )
    liked = [np.array([film for film in films if film != 0], np.int64) for films in table["his"].to_pylist()]
    numbers = np.concatenate([rates, _co_likes(columns["uid"], columns["iid"], liked, train)[:, None]], 1)
    return Rows(
        part,
        columns["uid"],
        columns["iid"],
        label,
        columns["timestamp"],
        table["title"].to_pylist(),
        history,
        numbers,
        later.sum(1),
    )


def _sorted(table: pa.Table) -> pa.Table:
    return table.sort_by([("timestamp", "ascending"), ("uid", "ascending"), ("iid", "ascending")])


def _rates(key: np.ndarray, label: np.ndarray, train: int) -> np.ndarray:
    """Return the smoothed logit of each row's rate."""
    mean = label[:train].mean()
    likes, rows = dict.fromkeys(np.unique(key).tolist(), 0.0), dict.fromkeys(np.unique(key).tolist(), 0)
    rate = np.empty(len(key))
    for i, name in enumerate(key.tolist()):
        share = (likes[name] + PRIOR_ROWS * mean) / (rows[name] + PRIOR_ROWS)
        rate[i] = np.log(share / (1 - share))
        if i < train:
            likes[name] += label[i]
            rows[name] += 1
    return rate


def _co_likes(uid: np.ndarray, iid: np.ndarray, liked: list[np.ndarray], train: int) -> np.ndarray:
    """Return the mean cosine of each row's film with the MOST_ALIKE films of its user that are most like it. The cosine
    is of columns of the users' likes, which histories tell.
    """
    films = 1 + max(int(iid.max()), *(int(own.max(initial=0)) for own in liked))
    both = np.zeros((films, films), np.float32)  # users that like the one and the other; on the diagonal, the one
    known: dict[int, set[int]] = {}
    found = np.zeros(len(iid))
    for i, own in enumerate(liked):
        if len(own):
            likes = np.diagonal(both)
            cosine = both[iid[i], own] / np.sqrt((likes[iid[i]] + PRIOR_LIKES) * (likes[own] + PRIOR_LIKES))
            found[i] = np.sort(cosine)[-MOST_ALIKE:].mean()
        if i < train:
            old = known.setdefault(int(uid[i]), set())
            new = set(own.tolist()) - old
            for some, others in ((new, old), (old, new), (new, new)):
                both[np.ix_(sorted(some), sorted(others))] += 1
            old |= new
    return found


SCHEMA: dict[str, Any] = {
    "task": "task",
    "label": "label",
    "time": "time",
    "item": "iid",
    "partition": "part",
    "categorical": [{"name": "uid"}, {"name": "iid"}, {"name": "title", "text": True}],
}


def make_pack(
    folder: Path,
    rows: Rows,
    *,
    titles: int,
    numeric: Sequence[str] = (),
    train_rows: int = 0,
    by_user: bool = False,
) -> Path:
    """Write the rows as a pack with histories of the last `titles`, and return it; what is there is kept.

    `numeric` are the NUMBERS in it. `train_rows` takes so many random training rows, the same ones for all histories.
    `by_user` makes tasks of users: in training their last 10 rows are the query; else all their training rows are the
    support.
    """
    out = folder / "-".join(["users" if by_user else "rows", str(titles), str(train_rows or "all"), *numeric])
    if (out / "manifest.json").exists():
        return out
    train, judged = rows.of("train"), np.flatnonzero(rows.part != "train")
    if train_rows:
        train = np.sort(np.random.default_rng(0).permutation(train)[:train_rows])
    chosen = np.concatenate([train, judged])
    part = np.where(rows.part == "train", "train", np.where(rows.part == "choose", "valid", "test"))[chosen]
    columns = _columns(rows, chosen, titles) | {"part": part}
    columns = _tasks_of_users(rows, columns, chosen, train) if by_user else columns | _tasks_of_rows(chosen, len(train))
    schema = {**SCHEMA, "role": "role", "numeric": list(numeric)}
    schema["sequence"] = [
        {"name": "history", "table": "title", "text": True, "max_length": titles, "pooling": "none"},
    ]
    folder.mkdir(parents=True, exist_ok=True)
    raw, described = folder / f"{out.name}.parquet", folder / f"{out.name}.json"
    pq.write_table(pa.table(columns), raw)
    described.write_text(json.dumps(schema, indent=1))
    here("prepare", "--input", raw, "--schema", described, "--out", out, "--task_split", "column")
    return out


def _columns(rows: Rows, chosen: np.ndarray, titles: int) -> dict[str, Any]:
    columns: dict[str, Any] = {
        "row": chosen,
        "uid": rows.uid[chosen],
        "iid": rows.iid[chosen],
        "label": rows.label[chosen],
        "time": rows.time[chosen],
        "title": [rows.title[i] for i in chosen],
        "history": pa.array([rows.history[i][-titles:] for i in chosen], pa.list_(pa.string())),
    }
    return columns | {name: rows.numbers[chosen, i] for i, name in enumerate(NUMBERS)}


def _tasks_of_rows(chosen: np.ndarray, train: int) -> dict[str, Any]:
    """Return the columns of tasks that are random pairs of training rows, since a pack wants some support, and single
    rows of the later parts.
    """
    pair = np.random.default_rng(1).permutation(train)
    names = [f"{p // 2}" for p in pair] + [f"row {row}" for row in chosen[train:]]
    roles = ["support" if p % 2 else "query" for p in pair] + ["query"] * (len(chosen) - train)
    return {"task": names, "role": roles}


def _tasks_of_users(rows: Rows, columns: dict[str, Any], chosen: np.ndarray, train: np.ndarray) -> dict[str, Any]:
    """Return the columns with tasks of users: of training the last rows are the query; of each later part what came
    before is the support. So a row of training is in up to three tasks, of three splits.
    """
    picks: list[np.ndarray] = []
    names: list[str] = []
    roles: list[str] = []
    parts: list[str] = []
    place = {int(row): at for at, row in enumerate(chosen)}

    def add(some: np.ndarray, name: str, role: str, part: str) -> None:
        picks.append(np.array([place[int(row)] for row in some], np.int64))
        names.extend([name] * len(some))
        roles.extend([role] * len(some))
        parts.extend([part] * len(some))

    later = {"valid": rows.of("choose"), "test": rows.of("judge")}
    for user in np.unique(rows.uid[chosen]).tolist():
        own = train[rows.uid[train] == user]
        size = min(10, (len(own) + 1) // 2)
        if len(own):
            add(own[: len(own) - size], f"{user}|train", "support", "train")
            add(own[len(own) - size :], f"{user}|train", "query", "train")
        before = own
        for part, every in later.items():
            query = every[rows.uid[every] == user]
            if len(query):
                add(before, f"{user}|{part}", "support", part)
                add(query, f"{user}|{part}", "query", part)
            before = np.concatenate([before, query])
    pick = np.concatenate(picks)
    taken = {
        name: value.take(pa.array(pick))
        if isinstance(value, pa.Array)
        else np.asarray(value, dtype=object)[pick]
        if isinstance(value, list)
        else value[pick]
        for name, value in columns.items()
        if name != "part"
    }
    return taken | {"task": names, "role": roles, "part": parts}
