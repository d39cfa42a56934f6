"""A stream of days whose truth is known: users and items come and go, tastes and popularity drift, some rows are late.

On every day the model of gmeta/data/synthetic.py holds, with its own values of what all users share: the latent vectors
and effects of items, and what user features say. From day to day each moves by a stationary AR(1) process,

    x_d = sqrt(1 - drift²) x_{d-1} + drift ε_d,        ε_d drawn as x_0 was

so that the stream is as hard on its last day as on its first. A user's taste is drawn when he arrives and stays: the
posterior given all of his rows, of whatever days, is then the exact one of synthetic.py, with the v_i of each row's own
day.

A day is a function of the seed and of its number. Memory is bounded by the users there and by the rows of a few days.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from rich.console import Console
from rich.progress import track
from rich.table import Table

from gmeta.config.data import STREAM_RATES, SynthConfig
from gmeta.data.stream_truth import DAY_US, START_US, day_name, truth_file
from gmeta.data.synthetic import (
    AGES,
    GENDERS,
    NUM_BRANDS,
    NUM_CATEGORIES,
    NUM_CITIES,
    REFERENCES,
    SCHEMA,
    Floats,
    Ints,
    UserTables,
    click_settings,
    draw_user_tables,
    last_rows,
    log_table,
    random_vectors,
    reference_aucs,
    sigmoid,
    user_means,
    whole_folder,
)

LATE_DAYS = 3
"""A late row lies in the file of one of so many days after its own."""
MEASURED_USERS = 200
"""Users of a day on which `synthesize_days` measures its reference AUCs."""

RowColumns = dict[str, np.ndarray[Any, Any]]
Drawn = TypeVar("Drawn", "StreamItems", "Users")


@dataclass(frozen=True, slots=True)
class StreamItems:
    """The items on offer on a day, without what category and brand tell of them. A new one takes the place of one that
    left.
    """

    item_id: Ints  # [I]
    category: Ints  # [I]
    brand: Ints  # [I]
    log_price: Floats  # [I]
    effect: Floats  # [I], standard normal: what the price does not tell of e_i
    latent: Floats  # [I, K]: what category and brand do not tell of v_i
    popularity: Floats  # [I], standard normal: its order is that of Zipf's law


@dataclass(frozen=True, slots=True)
class World:
    """What all users of a day share."""

    items: StreamItems
    category: Floats  # [categories, K]: what a category tells of v_i
    brand: Floats  # [brands, K]
    tables: UserTables
    num_items: int  # how many items there were so far


@dataclass(frozen=True, slots=True)
class Users:
    """The users who are there on a day. A new one takes the place of one who left."""

    user_id: Ints  # [U]
    gender: Ints  # [U]
    city: Ints  # [U]
    age: Ints  # [U]
    taste: Floats  # [U, K]


@dataclass(frozen=True, slots=True)
class StreamDay:
    """The rows that happened on a day, one user after the other, by time."""

    log: RowColumns  # [R], as `log_table` takes them
    truth: RowColumns  # [R], as `row_truth` reads them
    delay: Ints  # [R], days after which the row is in a file


# ------------------------------------------------------------------------------------------------ what changes


def _rng(config: SynthConfig, stream: int, day: int) -> np.random.Generator:
    return np.random.default_rng([config.seed, stream, day])


def _placed(before: Drawn, where: np.ndarray[Any, Any], new: Drawn) -> Drawn:
    """Put the entries of `new` [N], all its arrays, into the N places that `where` marks."""
    changed = {}
    for column in fields(before):
        values = getattr(before, column.name).copy()
        values[where] = getattr(new, column.name)
        changed[column.name] = values
    return replace(before, **changed)


def _draw_world(config: SynthConfig, day: int) -> World:
    """Draw a world anew: all of it on day 0, what a day adds to it later."""
    rng = _rng(config, 3, day)
    num, dim, side = config.items, config.latent_dim, config.item_side_share
    items = StreamItems(
        item_id=np.arange(num),
        category=rng.integers(NUM_CATEGORIES, size=num),
        brand=rng.integers(NUM_BRANDS, size=num),
        log_price=rng.standard_normal(num),
        effect=rng.standard_normal(num),
        latent=random_vectors(rng, num, dim, (1 - side) ** 0.5),
        popularity=rng.standard_normal(num),
    )
    category, brand = (random_vectors(rng, n, dim, (side / 2) ** 0.5) for n in (NUM_CATEGORIES, NUM_BRANDS))
    return World(items, category, brand, draw_user_tables(config, rng), num)


def next_world(config: SynthConfig, before: World, day: int) -> World:
    """Return the world of `day` after that of the day before."""
    fresh, drift = _draw_world(config, day), config.rate("drift")

    def moved(x: Floats, noise: Floats) -> Floats:
        mixed: Floats = (1 - drift**2) ** 0.5 * x + drift * noise
        return mixed

    old, new = before.items, fresh.items
    leaving = _rng(config, 4, day).random(config.items) < config.rate("item_turnover")
    arrived = StreamItems(**{column.name: getattr(new, column.name)[leaving] for column in fields(new)})
    arrived = replace(arrived, item_id=before.num_items + np.arange(leaving.sum()))
    stayed = replace(
        old,
        effect=moved(old.effect, new.effect),
        latent=moved(old.latent, new.latent),
        popularity=moved(old.popularity, new.popularity),
    )
    tables = UserTables(
        gender=moved(before.tables.gender, fresh.tables.gender),
        city=moved(before.tables.city, fresh.tables.city),
        age=moved(before.tables.age, fresh.tables.age),
    )
    return World(
        items=_placed(stayed, leaving, arrived),
        category=moved(before.category, fresh.category),
        brand=moved(before.brand, fresh.brand),
        tables=tables,
        num_items=before.num_items + len(arrived.item_id),
    )


def _draw_users(config: SynthConfig, rng: np.random.Generator, num: int, first_id: int) -> Users:
    return Users(
        user_id=first_id + np.arange(num),
        gender=rng.integers(len(GENDERS), size=num),
        city=rng.integers(NUM_CITIES, size=num),
        age=rng.integers(AGES[0], AGES[1] + 1, size=num),
        taste=config.taste_std * rng.standard_normal((num, config.latent_dim)),
    )


def next_users(config: SynthConfig, before: Users, day: int, num_users: int) -> Users:
    """Return the users of `day` after those of the day before; `num_users` were there so far."""
    rng = _rng(config, 5, day)
    leaving = rng.random(config.users) < config.rate("user_turnover")
    return _placed(before, leaving, _draw_users(config, rng, int(leaving.sum()), num_users))


# ----------------------------------------------------------------------------------------------------- rows


def row_terms(config: SynthConfig, world: World, users: Users, user: Ints, item: Ints) -> tuple[Floats, Floats]:
    """Return the logit without taste [R], and what the taste is multiplied by, v_i [R, K], where the user at place
    `user` [R] meets the item at place `item` [R].
    """
    items = world.items
    mean = user_means(world.tables, users.gender[user], users.city[user], users.age[user])
    latent = items.latent[item] + world.category[items.category[item]] + world.brand[items.brand[item]]
    effect = config.item_std * (0.8 * items.effect - 0.6 * items.log_price)
    base: Floats = config.bias + effect[item] + (mean * latent).sum(axis=1)
    return base, latent


def draw_day(config: SynthConfig, world: World, users: Users, is_new: np.ndarray[Any, Any], day: int) -> StreamDay:
    """Draw the rows of `day`. `is_new` [U] marks users who arrived on it: they are active."""
    rng = _rng(config, 6, day)
    half = config.rows_per_user // 2
    active = np.flatnonzero(is_new | (rng.random(config.users) < config.rate("active")))
    counts = rng.integers(config.rows_per_user - half, config.rows_per_user + half + 1, size=len(active))
    user, rows = np.repeat(active, counts), int(counts.sum())
    items = world.items
    weight = np.cumsum(np.arange(1, config.items + 1, dtype=np.float64) ** -config.zipf)
    rank = np.searchsorted(weight, weight[-1] * rng.random(rows), side="right")
    item = np.argsort(-items.popularity, kind="stable")[np.minimum(rank, config.items - 1)]
    base, latent = row_terms(config, world, users, user, item)
    chance = sigmoid(base + (users.taste[user] * latent).sum(axis=1))
    late = rng.random(rows) < config.rate("late")
    ids = {"user_id": users.user_id[user], "item_id": items.item_id[item], "timestamp": _times(rng, user, counts, day)}
    features = {key: getattr(users, key)[user] for key in ("gender", "age", "city")}
    features |= {key: getattr(items, key)[item] for key in ("category", "brand")}
    features["price"] = np.exp(3 + 0.8 * items.log_price).round(2)[item]
    vectors = {f"latent_{k}": latent[:, k] for k in range(config.latent_dim)}
    vectors |= {f"taste_{k}": users.taste[user, k] for k in range(config.latent_dim)}
    return StreamDay(
        log={**ids, **features, "label": (rng.random(rows) < chance).astype(np.int8)},
        truth={**ids, "base": base, **vectors},
        delay=np.where(late, rng.integers(1, LATE_DAYS + 1, size=rows), 0),
    )


def _times(rng: np.random.Generator, user: Ints, counts: Ints, day: int) -> np.ndarray[Any, Any]:
    """Return times [R] within the day that rise strictly within a user, whose rows are consecutive, `counts` [A]."""
    place = np.arange(len(user)) - np.repeat(np.cumsum(counts) - counts, counts)
    longest = int(counts.max(initial=0))
    within = np.floor(rng.random(len(user)) * (DAY_US - longest)).astype(np.int64)
    within = within[np.lexsort((within, user))] + place  # equal draws come apart by their place
    return (START_US + day * DAY_US + within).astype("datetime64[us]")


def days_of(config: SynthConfig, num: int) -> Iterator[tuple[StreamDay, int, int]]:
    """Yield the first `num` days: their rows, and how many users and items arrived on each; all of them on day 0."""
    world = _draw_world(config, 0)
    users = _draw_users(config, _rng(config, 5, 0), config.users, 0)
    is_new = np.zeros(config.users, bool)  # who was there before the first day is active as others are
    num_users, new_items = config.users, config.items
    yield draw_day(config, world, users, is_new, 0), num_users, new_items
    for day in range(1, num):
        before, world = world, next_world(config, world, day)
        users = next_users(config, users, day, num_users)
        is_new = users.user_id >= num_users
        num_users += int(is_new.sum())
        yield draw_day(config, world, users, is_new, day), int(is_new.sum()), world.num_items - before.num_items


# --------------------------------------------------------------------------------------------------- writing


def synthesize_days(config: SynthConfig) -> dict[str, Any]:
    """Write the days, their schema and their truth to `config.out`, and return what summary.json holds.

    The directory appears complete or not at all. Raises ValueError when it exists.
    """
    assert config.days is not None
    with whole_folder(Path(config.out)) as work:
        truth = work / "_truth"
        (truth / "rows").mkdir(parents=True)
        (work / "schema.yaml").write_text(yaml.safe_dump(SCHEMA, sort_keys=False), encoding="utf-8")
        told = {"taste_std": config.taste_std, "latent_dim": config.latent_dim, "days": config.days}
        (truth / "truth.json").write_text(json.dumps(told), encoding="utf-8")
        rates = {name: config.rate(name) for name in STREAM_RATES}
        settings = {**click_settings(config), **rates}
        summary = {"settings": settings, "days": _write_days(config, config.days, work)}
        (work / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    return summary


def _write_days(config: SynthConfig, num: int, root: Path) -> list[dict[str, Any]]:
    console = Console(stderr=True)
    coming: dict[int, list[RowColumns]] = {}  # day of the file -> rows that wait for it
    summary = []
    days = enumerate(days_of(config, num))
    for day, (drawn, users, items) in track(days, "synth", num, console=console, disable=not console.is_terminal):
        pq.write_table(pa.table(drawn.truth), truth_file(root / "_truth", day))
        for delay in range(LATE_DAYS + 1):
            rows = {key: values[drawn.delay == delay] for key, values in drawn.log.items()}
            coming.setdefault(day + delay, []).append(rows)
        columns = _by_time(coming.pop(day))
        folder = root / day_name(day)
        folder.mkdir()
        pq.write_table(log_table(columns), folder / "part-00000.parquet")
        late = int((columns["timestamp"] < np.datetime64(START_US + day * DAY_US, "us")).sum())
        summary.append({"day": day, "new_users": users, "new_items": items, "late_rows": late})
        summary[-1] |= _measured(config, root, day, columns)
    return summary


def _by_time(parts: Sequence[RowColumns]) -> RowColumns:
    """Join rows and sort them by time, rows of one time by user."""
    joined = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    order = np.lexsort((joined["user_id"], joined["timestamp"]))
    return {key: values[order] for key, values in joined.items()}


def _measured(config: SynthConfig, root: Path, day: int, columns: RowColumns) -> dict[str, Any]:
    """Return the size of a day's file, and the reference AUCs of a sample of its users, where only it is known."""
    active = np.unique(columns["user_id"])
    sample = active[:: max(1, len(active) // MEASURED_USERS)][:MEASURED_USERS]
    support, query = last_rows(root / day_name(day), sample.tolist(), config.num_query)
    rows = len(columns["label"])
    return {
        "users": len(active),
        "rows": rows,
        "click_rate": float(columns["label"].mean()) if rows else None,
        "measured_users": len(sample),
        "reference": reference_aucs(root, support, query),
    }


def print_days(summary: dict[str, Any]) -> None:
    """Print what `synthesize_days` returned as a table."""
    console = Console()
    rows = sum(day["rows"] for day in summary["days"])
    console.print(f"{len(summary['days'])} days, {rows:,} rows")
    table = Table(title=f"reference AUCs: last {summary['settings']['num_query']} rows of a sample of the day's users")
    counts = {"users": "users", "new_users": "new", "new_items": "new items", "rows": "rows", "late_rows": "late"}
    for heading in ("day", *counts.values(), *REFERENCES):
        table.add_column(heading, justify="right")
    for day in summary["days"]:
        numbers = [f"{day[key]:,}" for key in counts]
        table.add_row(str(day["day"]), *numbers, *(f"{day['reference'][name]['auc']:.4f}" for name in REFERENCES))
    console.print(table)
