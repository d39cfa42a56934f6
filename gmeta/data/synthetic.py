"""Click logs whose truth is known, and the AUCs that frame any model trained on them.

A user's latent vector is told in part by the user's features; the rest is a Gaussian *taste*:

    w_u = m(age, gender, city) + taste_u,        taste_u ~ N(0, taste_std² I)
    logit(u, i) = bias + e_i + w_u · v_i,        label ~ Bernoulli(sigmoid(logit))

`v_i` (E|v|² = 1) is told in part by category and brand, `e_i` in part by price. A cold user's features fix the
prior of w_u, and only the support narrows it. docs/synthetic.md explains the three reference AUCs.

Users are drawn in blocks, each from its own seed: memory is bounded by a block, and a log of fewer users is a prefix
of a log of more. A log that comes in days, and drifts, is made by gmeta/data/synthetic_days.py.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import yaml
from rich.console import Console
from rich.progress import track
from rich.table import Table

from gmeta.config.data import SynthConfig
from gmeta.data.stream_truth import row_truth

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

BLOCK_USERS = 8192
"""Users drawn from one seed and written as one file."""
SUMMARY_USERS = 1000
"""Users on which `synthesize` measures the reference AUCs."""

REFERENCES = {
    "prior": "only the features, the best without support",
    "posterior": "features and support, the best with it",
    "oracle": "the taste itself",
}
"""What each reference knows of a cold user; all know the items' truth."""

GENDERS = ("f", "m")
NUM_CITIES, NUM_CATEGORIES, NUM_BRANDS = 40, 20, 60
AGES = (18, 79)
START, DAYS = 1_700_000_000, 90
"""First second of the log (Unix time), and the days within which users arrive."""

SCHEMA = {
    "task": "user_id",
    "label": "label",
    "time": "timestamp",
    "item": "item_id",
    "categorical": ["item_id", "gender", "city", "category", "brand"],
    "numeric": ["age", "price"],
}
"""The data schema that `gmeta prepare` reads. user_id is no feature: a cold user's would be out of vocabulary."""


@dataclass(frozen=True, slots=True)
class Items:
    """Every item: its features, popularity, and truth."""

    category: Ints  # [I]
    brand: Ints  # [I]
    price: Floats  # [I]
    popularity: Floats  # [I], cumulative, last is 1
    effect: Floats  # [I]: bias + e_i
    latent: Floats  # [I, K]: v_i


@dataclass(frozen=True, slots=True)
class UserTables:
    """How user features add up to the prior mean of a user's latent vector."""

    gender: Floats  # [2, K]
    city: Floats  # [cities, K]
    age: Floats  # [K], per standard deviation of age


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive users and their rows, in the order of users and time."""

    first_user: int
    gender: Ints  # [U]
    city: Ints  # [U]
    age: Ints  # [U]
    mean: Floats  # [U, K]
    taste: Floats  # [U, K]
    counts: Ints  # [U], rows of each user
    item: Ints  # [R]
    time: Ints  # [R], strictly increasing within a user
    label: npt.NDArray[np.int8]  # [R]


@dataclass(frozen=True, slots=True)
class LogRows:
    """Raw rows of a split: which user met which item, and whether they clicked. In a stream of days the truth of a row
    is told by user and time, else by user and item.
    """

    user_id: Ints  # [R]
    item_id: Ints  # [R]
    label: Ints  # [R]
    time: Ints | None = None  # [R], as in the log; microseconds in a stream


def sigmoid(x: Floats) -> Floats:
    """Return 1 / (1 + exp(-x))."""
    y: Floats = 1 / (1 + np.exp(np.minimum(-x, 700)))  # exp overflows beyond 700
    return y


def random_vectors(rng: np.random.Generator, num: int, dim: int, norm: float) -> Floats:
    """Return random vectors [num, dim] that are centred and have the root mean square norm `norm`. They are zero where
    num is 1.
    """
    x = rng.standard_normal((num, dim))
    x -= x.mean(axis=0)
    return x * (norm / max(float(np.sqrt((x**2).sum(axis=1).mean())), 1e-12))


def _draw_items(config: SynthConfig) -> Items:
    rng = np.random.default_rng([config.seed, 0])
    num, dim, side = config.items, config.latent_dim, config.item_side_share
    category = rng.integers(NUM_CATEGORIES, size=num)
    brand = rng.integers(NUM_BRANDS, size=num)
    log_price = rng.standard_normal(num)
    told = random_vectors(rng, NUM_CATEGORIES, dim, (side / 2) ** 0.5)[category]
    told += random_vectors(rng, NUM_BRANDS, dim, (side / 2) ** 0.5)[brand]
    latent = told + random_vectors(rng, num, dim, (1 - side) ** 0.5)
    effect = config.item_std * (0.8 * rng.standard_normal(num) - 0.6 * log_price)
    weight = np.arange(1, num + 1, dtype=np.float64) ** -config.zipf
    popularity = np.cumsum(weight / weight.sum())
    popularity[-1] = 1.0
    price = np.exp(3 + 0.8 * log_price).round(2)
    return Items(category, brand, price, popularity, config.bias + effect, latent)


def draw_user_tables(config: SynthConfig, rng: np.random.Generator) -> UserTables:
    """Return random tables under which features and items explain `config.side_std` of the logit together."""
    # A latent of norm side_std * sqrt(K) has standard deviation side_std along an item latent of norm 1.
    norm = config.side_std * config.latent_dim**0.5 / 3**0.5
    age = rng.standard_normal(config.latent_dim)
    return UserTables(
        gender=random_vectors(rng, len(GENDERS), config.latent_dim, norm),
        city=random_vectors(rng, NUM_CITIES, config.latent_dim, norm),
        age=age * (norm / float(np.linalg.norm(age))),
    )


def user_means(tables: UserTables, gender: Ints, city: Ints, age: Ints) -> Floats:
    """Return the prior means [U, K] of users with these features [U]."""
    num_ages = AGES[1] - AGES[0] + 1
    age_z = (age - (AGES[0] + AGES[1]) / 2) / ((num_ages**2 - 1) / 12) ** 0.5
    means: Floats = tables.gender[gender] + tables.city[city] + age_z[:, None] * tables.age
    return means


def _draw_block(config: SynthConfig, items: Items, tables: UserTables, index: int) -> Block:
    """Return block `index` of the log. It does not depend on the number of users: a full block is drawn, then
    truncated.
    """
    rng = np.random.default_rng([config.seed, 2, index])
    num = min(BLOCK_USERS, config.users - index * BLOCK_USERS)
    gender = rng.integers(len(GENDERS), size=BLOCK_USERS)
    city = rng.integers(NUM_CITIES, size=BLOCK_USERS)
    age = rng.integers(AGES[0], AGES[1] + 1, size=BLOCK_USERS)
    taste = config.taste_std * rng.standard_normal((BLOCK_USERS, config.latent_dim))
    half = config.rows_per_user // 2
    counts = rng.integers(config.rows_per_user - half, config.rows_per_user + half + 1, size=BLOCK_USERS)
    start = START + rng.integers(DAYS * 86_400, size=BLOCK_USERS)
    rows = int(counts.sum())
    choice, gap, chance = rng.random(rows), 1 + rng.exponential(3600, rows).astype(np.int64), rng.random(rows)

    mean = user_means(tables, gender, city, age)
    item = np.searchsorted(items.popularity, choice, side="right")
    user = np.repeat(np.arange(BLOCK_USERS), counts)
    logit = items.effect[item] + ((mean + taste)[user] * items.latent[item]).sum(axis=1)
    label = (chance < sigmoid(logit)).astype(np.int8)
    elapsed = np.cumsum(gap)
    first = np.cumsum(counts) - counts
    time = start[user] + elapsed - elapsed[first][user]
    u, r = slice(num), slice(int(counts[:num].sum()))
    return Block(
        index * BLOCK_USERS, gender[u], city[u], age[u], mean[u], taste[u], counts[u], item[r], time[r], label[r]
    )


def _names(codes: Ints, names: Iterable[str]) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(codes, pa.int32()), pa.array(list(names)))


def _numbered(prefix: str, num: int) -> list[str]:
    return [f"{prefix}-{i:02d}" for i in range(num)]


def log_table(columns: Mapping[str, Any]) -> pa.Table:
    """Return the raw rows of these columns: features are given as codes, and named here."""
    return pa.table(
        {
            "user_id": columns["user_id"],
            "item_id": columns["item_id"],
            "gender": _names(columns["gender"], GENDERS),
            "age": pa.array(columns["age"], pa.int32()),
            "city": _names(columns["city"], _numbered("city", NUM_CITIES)),
            "category": _names(columns["category"], _numbered("category", NUM_CATEGORIES)),
            "brand": _names(columns["brand"], _numbered("brand", NUM_BRANDS)),
            "price": pa.array(columns["price"], pa.float32()),
            "timestamp": columns["timestamp"],
            "label": columns["label"],
        }
    )


def _block_table(block: Block, items: Items) -> pa.Table:
    user = np.repeat(np.arange(len(block.counts)), block.counts)
    columns = {"user_id": block.first_user + user, "item_id": block.item}
    columns |= {key: getattr(block, key)[user] for key in ("gender", "age", "city")}
    columns |= {key: getattr(items, key)[block.item] for key in ("category", "brand", "price")}
    return log_table({**columns, "timestamp": block.time, "label": block.label})


def _user_table(block: Block) -> pa.Table:
    columns: dict[str, Any] = {"user_id": block.first_user + np.arange(len(block.counts))}
    columns |= {f"mean_{k}": block.mean[:, k] for k in range(block.mean.shape[1])}
    columns |= {f"taste_{k}": block.taste[:, k] for k in range(block.taste.shape[1])}
    return pa.table(columns)


def _item_table(items: Items) -> pa.Table:
    latent = {f"latent_{k}": items.latent[:, k] for k in range(items.latent.shape[1])}
    return pa.table({"item_id": np.arange(len(items.effect)), "effect": items.effect, **latent})


def synthesize(config: SynthConfig) -> dict[str, Any]:
    """Write the log, its schema and its truth to `config.out`, and return what summary.json holds.

    The directory appears complete or not at all. Memory is bounded by one block of users, whatever their number. Raises
    ValueError when the directory exists.
    """
    with whole_folder(Path(config.out)) as work:
        return _write(config, work)


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Give a folder beside `out`, which becomes `out` when the block ends without an error, and is removed otherwise.
    Raises ValueError where `out` exists.
    """
    if out.exists():
        raise ValueError(f"out is {str(out)!r}, which exists: remove it or name another directory")
    out.parent.mkdir(parents=True, exist_ok=True)
    work = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        yield work
        os.replace(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def click_settings(config: SynthConfig) -> dict[str, Any]:
    """Return the settings that a log of clicks has, as its summary tells them."""
    return {key: value for key, value in asdict(config).items() if key not in ("out", "kind", "rows")}


def _write(config: SynthConfig, root: Path) -> dict[str, Any]:
    truth = root / "_truth"
    (truth / "users").mkdir(parents=True)
    items, tables = _draw_items(config), draw_user_tables(config, np.random.default_rng([config.seed, 1]))
    pq.write_table(_item_table(items), truth / "items.parquet")
    (root / "schema.yaml").write_text(yaml.safe_dump(SCHEMA, sort_keys=False), encoding="utf-8")
    rows = clicks = 0
    console = Console(stderr=True)
    blocks = range(-(-config.users // BLOCK_USERS))
    for index in track(blocks, "synth", console=console, disable=not console.is_terminal):
        block = _draw_block(config, items, tables, index)
        pq.write_table(_block_table(block, items), root / f"part-{index:05d}.parquet")
        pq.write_table(_user_table(block), truth / "users" / f"part-{index:05d}.parquet")
        rows, clicks = rows + len(block.label), clicks + int(block.label.sum())
    (truth / "truth.json").write_text(json.dumps({"taste_std": config.taste_std}), encoding="utf-8")
    measured = range(min(config.users, SUMMARY_USERS))
    support, query = last_rows(root, measured, config.num_query)
    summary = {
        "settings": {key: value for key, value in click_settings(config).items() if value is not None},
        "rows": rows,
        "click_rate": clicks / rows,
        "measured_users": len(measured),
        "reference": reference_aucs(root, support, query),
    }
    (root / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    return summary


def print_synthesis(summary: dict[str, Any]) -> None:
    """Print what `synthesize` returned as two tables."""
    settings = summary["settings"]
    console = Console()
    console.print(
        f"{settings['users']:,} users, {settings['items']:,} items, {summary['rows']:,} rows, "
        f"{summary['click_rate']:.1%} clicks"
    )
    table = Table(title=f"reference AUCs: last {settings['num_query']} rows of {summary['measured_users']:,} users")
    for heading in ("what is known of the user", "AUC", "GAUC"):
        table.add_column(heading, justify="left" if heading.startswith("what") else "right")
    for name, meaning in REFERENCES.items():
        value = summary["reference"][name]
        table.add_row(f"{name}: {meaning}", f"{value['auc']:.4f}", f"{value['gauc']:.4f}")
    console.print(table)


def last_rows(out: Path, users: Iterable[int], num_query: int) -> tuple[LogRows, LogRows]:
    """Return support and query of the given users of the log at `out`. The query is a user's last `num_query` rows by
    time.

    Both come in (user, time) order; time is strict within a user, so this is the split `gmeta prepare` makes.
    """
    wanted = pa.array(users, pa.int64())
    columns = ["user_id", "timestamp", "item_id", "label"]
    table = pads.dataset(sorted(out.glob("part-*.parquet"))).to_table(
        columns=columns, filter=pads.field("user_id").isin(wanted)
    )
    user, time, item, label = (table[name].to_numpy().astype(np.int64) for name in columns)
    order = np.lexsort((time, user))
    user, time, item, label = user[order], time[order], item[order], label[order]
    _, start, counts = np.unique(user, return_index=True, return_counts=True)
    to_end = np.repeat(start + counts, counts) - np.arange(len(user))
    is_query = to_end <= num_query
    support, query = (LogRows(user[part], item[part], label[part], time[part]) for part in (~is_query, is_query))
    return support, query


def reference_aucs(out: Path, support: LogRows, query: LogRows) -> dict[str, dict[str, float]]:
    """Return {reference: {"auc": …, "gauc": …}} on the query rows, for each of `REFERENCES`; see `reference_scores`.

    `auc` is over all rows; `gauc` is the mean of the users' AUCs weighted by their rows, over users with both labels.
    Either is NaN where no pair of labels differs.
    """
    return {
        name: {"auc": exact_auc(score, query.label), "gauc": grouped_auc(score, query.label, query.user_id)}
        for name, score in reference_scores(out, support, query).items()
    }


def reference_scores(out: Path, support: LogRows, query: LogRows) -> dict[str, Floats]:
    """Return the click probability of every query row, in the order of the query, for each of `REFERENCES`. `out` holds
    the log.

    `prior` averages over the prior of the taste. `posterior` averages over its exact posterior, given the user's
    support rows, of which there may be none. `oracle` knows the taste. All three know the truth about the items, and
    what the user's features tell. ValueError names a user or item that is not in this log.
    """
    base, coefficient, taste = _truth_of(out / "_truth", query)
    support_base, support_coefficient, _ = _truth_of(out / "_truth", support)
    grid = lattice(coefficient.shape[1])
    prior = prior_predictive(base, coefficient)
    posterior = prior.copy()
    support_of = {int(support.user_id[rows[0]]): rows for rows in _groups(support.user_id)}
    for rows in _groups(query.user_id):
        known = support_of.get(int(query.user_id[rows[0]]))
        if known is not None:
            evidence = support_base[known], support_coefficient[known], support.label[known]
            posterior[rows] = posterior_predictive(*evidence, base[rows], coefficient[rows], grid)
    oracle = sigmoid(base + (coefficient * taste).sum(axis=1))
    return {"prior": prior, "posterior": posterior, "oracle": oracle}


def _groups(key: Ints) -> list[Ints]:
    """Return the positions of each distinct key, in ascending order of the keys."""
    order = np.argsort(key, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(key[order])) + 1)
    return [part for part in parts if len(part)]


def is_stream(out: Path) -> bool:
    """Whether `out` holds a stream of days, whose truth is looked up by user and time."""
    return "days" in _settings_of(out / "_truth")


def _settings_of(truth: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((truth / "truth.json").read_text(encoding="utf-8"))
    return found


def _truth_of(truth: Path, rows: LogRows) -> tuple[Floats, Floats, Floats]:
    """Return for every row the logit without taste [R], its gradient by the standardised taste [R, K], that taste."""
    settings = _settings_of(truth)
    taste_std = float(settings["taste_std"])
    if "days" not in settings:
        base, latent, taste = _fixed_truth(truth, rows)
    elif rows.time is not None:
        base, latent, taste = row_truth(truth, rows.user_id, rows.time, settings["latent_dim"])
    else:
        raise ValueError("the truth of a stream of days is told by user and time: give the rows their time")
    return base, taste_std * latent, taste / taste_std if taste_std else taste


def _fixed_truth(truth: Path, rows: LogRows) -> tuple[Floats, Floats, Floats]:
    """Return for every row the logit without taste [R], the item's latent vector [R, K], the user's taste [R, K]."""
    unique, user_at = np.unique(rows.user_id, return_inverse=True)
    keep = pads.field("user_id").isin(pa.array(unique))
    users = pads.dataset(truth / "users").to_table(filter=keep).sort_by("user_id")
    items = pq.read_table(truth / "items.parquet")
    _check_known("user_id", unique, users["user_id"].to_numpy())
    _check_known("item_id", np.unique(rows.item_id), items["item_id"].to_numpy())
    dim = items.num_columns - 2
    latent = _matrix(items, "latent", dim)[rows.item_id]
    mean, taste = _matrix(users, "mean", dim)[user_at], _matrix(users, "taste", dim)[user_at]
    base = items["effect"].to_numpy()[rows.item_id] + (mean * latent).sum(axis=1)
    return base, latent, taste


def _matrix(table: pa.Table, prefix: str, dim: int) -> Floats:
    return np.stack([table[f"{prefix}_{k}"].to_numpy() for k in range(dim)], axis=1)


def _check_known(column: str, wanted: Ints, known: Ints) -> None:
    missing = np.setdiff1d(wanted, known)
    if len(missing):
        raise ValueError(f"{column} {missing[0]} is not in the truth: the rows are of another log")


def lattice(dim: int, spacing: float = 0.4, radius: float = 8.0) -> Floats:
    """Return the points [P, dim] of the cubic lattice of that spacing inside a ball. They are the nodes of a
    trapezoidal rule.

    For smooth integrands that decay, the rule converges exponentially as the spacing shrinks (Trefethen and Weideman,
    The exponentially convergent trapezoidal rule, 2014); the tests compare it with a finer one.
    """
    half = np.arange(-int(radius / spacing), int(radius / spacing) + 1) * spacing
    points = np.stack(np.meshgrid(*[half] * dim, indexing="ij"), axis=-1).reshape(-1, dim)
    inside: Floats = points[(points**2).sum(axis=1) <= radius**2]
    return inside


def prior_predictive(base: Floats, coefficient: Floats) -> Floats:
    """Return P(click) [Q] for z ~ N(0, I_K) and logit = base [Q] + coefficient [Q, K] · z, by a one-dimensional
    integral.
    """
    nodes = lattice(1, spacing=0.1)[:, 0]
    weights = np.exp(-0.5 * nodes**2)
    width = np.linalg.norm(coefficient, axis=1)
    total = sum((w * sigmoid(base + x * width) for w, x in zip(weights, nodes, strict=True)), np.zeros(len(base)))
    return np.asarray(total / weights.sum(), dtype=np.float64)


def posterior_predictive(
    base: Floats, coefficient: Floats, label: Ints, query_base: Floats, query_coefficient: Floats, grid: Floats
) -> Floats:
    """Return P(click) [Q] of query rows given support rows, for z ~ N(0, I_K) and logit = base + coefficient · z.

    The support has base [S], coefficient [S, K] and label [S], with S at least 1. The posterior of z is log-concave.
    `grid` (see `lattice`) is centred at the mode of the posterior and scaled by the curvature there. The prediction is
    the ratio of two trapezoidal sums over its nodes. Mode and scale only say where the nodes lie; they do not enter the
    integrand.
    """
    mode, precision = _mode(base, coefficient, label)
    nodes = mode + grid @ np.linalg.inv(np.linalg.cholesky(precision))  # [P, K]
    likelihood = sigmoid((base + nodes @ coefficient.T) * (2 * label - 1))  # [P, S]
    # logarithms are expensive: this takes one of the product of 16 rows, far from underflow wherever there is mass
    with np.errstate(divide="ignore", under="ignore"):
        log_density = np.log(np.multiply.reduceat(likelihood, np.arange(0, len(label), 16), axis=1)).sum(axis=1)
    log_density -= 0.5 * (nodes**2).sum(axis=1)
    weight = np.exp(log_density - log_density.max())
    predicted: Floats = weight @ sigmoid(query_base + nodes @ query_coefficient.T) / weight.sum()
    return predicted


def _mode(base: Floats, coefficient: Floats, label: Ints) -> tuple[Floats, Floats]:
    """Return the mode [K] of the taste's posterior, and minus the second derivative of its log density there [K, K]."""
    dim = coefficient.shape[1]
    mode, precision = np.zeros(dim), np.eye(dim)
    for _ in range(20):
        p = sigmoid(base + coefficient @ mode)
        precision = np.eye(dim) + (coefficient.T * (p * (1 - p))) @ coefficient
        step = np.linalg.solve(precision, coefficient.T @ (label - p) - mode)
        length = float(np.linalg.norm(step))
        mode = mode + step * min(1.0, 2.0 / max(length, 1e-12))  # far from the mode the curvature misleads
        if length < 1e-4:
            break
    return mode, precision


def exact_auc(score: Floats, label: Ints) -> float:
    """Return the area under the ROC curve, by the rank-sum statistic with ties counted half. It is NaN without both
    labels.
    """
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    rank = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    num_clicks = int(label.sum())
    pairs = num_clicks * (len(label) - num_clicks)
    if pairs == 0:
        return float("nan")
    return float((rank[label == 1].sum() - num_clicks * (num_clicks + 1) / 2) / pairs)


def grouped_auc(score: Floats, label: Ints, group: Ints) -> float:
    """Return the mean of the groups' AUCs, weighted by their rows, over groups with both labels. It is NaN where there
    are none.
    """
    parts = _groups(group)
    values = np.array([exact_auc(score[rows], label[rows]) for rows in parts])
    weights = np.array([len(rows) for rows in parts], dtype=np.float64)
    both = ~np.isnan(values)
    return float(np.average(values[both], weights=weights[both])) if both.any() else float("nan")
