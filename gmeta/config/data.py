"""Settings of the commands that make data: `gmeta prepare` and `gmeta synth`."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from gmeta.core.errors import require, require_numbers, require_seed, require_size

HISTORY_ROWS = 50
"""Rows of earlier days that the support of a task has at most, unless a setting says otherwise."""


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Turn raw ratings or click logs into a task pack. Settings left unset take the named data set's own value."""

    out: str
    """Task pack directory to create."""
    base: str | None = None
    """Task pack, or bundle of a run that was trained on one, that the pack of `input` continues: a new day. Schema and
    settings are the base's; only this day's files are read. Ids go on: a known value keeps its id."""
    input: list[str] | str = field(default_factory=list)
    """Parquet or CSV file, glob or directory, or a list of them: [a.csv, logs/]."""
    schema: str | None = None
    """YAML file that says what the columns of `input` mean; the end of this help has one with all keys."""
    events: str | None = None
    """YAML file that makes `input` events of a next-item pack, instead of `schema`: it maps user and item, and where
    there are some domain, time and text, to columns."""
    items: str | None = None
    """Parquet or CSV file of items, for `events`: its columns item, domain and text have the names that they have
    there. Items that no event has are in the catalogue too. Unset: the items of the events."""
    core: int | None = None
    """For events: users and items with fewer events are left out, over all domains together, until none is. 0 when
    unset: all stay."""
    holdout: str | int | None = None
    """Which events are targets. leave_one_out, when unset: of each user and domain the last one is of split test, the
    one before of valid. leave_last_out: the last one is of test, and none of valid, for a last training with settings
    and steps that were chosen before. A time, as a number in the unit of the time column, or a date such as 2024-11-03:
    events from it on, the first half of them of valid."""
    domains: list[str] | str = field(default_factory=list)
    """For events: the domain that is kept, or a list of them: [Beauty, Toys]. Unset: all."""
    gaps: bool | None = None
    """For events with times: true adds a feature of each event, the time since the user's previous one in powers of two
    of seconds. Times that are no dates of our days are a counter, whose steps are taken for seconds."""
    dataset: str | None = None
    """Named data set, instead of `input` and `schema`: ml-100k, ml-1m or ml-1m-melu; antm2c, or antm2c-legacy, which
    fills times that cannot be parsed; of events amazon-3domain or amazon-office."""
    root: str | None = None
    """Directory that holds the named data set's files."""
    images: str | None = None
    """For antm2c: folder of vectors that `gmeta embed-images` made of the images; unset: no images are read."""
    separator: str | None = None
    """For antm2c: what separates the entries of its lists. Unset: what most lists have, which is told."""
    tasks: Literal["user", "user_scene", "scene_item"] | None = None
    """For antm2c: what a task is, in each split: a user, a user in a scene, or an item of a scene. user when unset."""
    new_scene: int | None = None
    """For antm2c: a scene that is left out. Tasks of train and valid are of the other scenes, those of test of this
    one: they know the last new_scene_rows of its rows before test, and are judged on its rows of test."""
    new_scene_rows: list[int] | int = field(default_factory=list)
    """For new_scene: the number of known rows, or several, each of which has test tasks of its own, called task@rows.
    [0, 100, 1000, 10000] when unset."""
    new_users: float | None = None
    """For antm2c: fraction of the users held out, drawn by the seed: no task of train is of theirs, all of valid and
    test are."""
    label_threshold: float | None = None
    """Labels of at least this become 1, others 0; unset: the schema's, or labels as they are."""
    split_query: Literal["last", "random", "column"] | None = None
    """Which rows of a task are query: its last by time, random ones, or those that the schema's role column says.
    Unset: column where the schema names a role, else last where it names a time."""
    roles: dict[str, Any] = field(default_factory=dict)
    """Value of the role column to support or query, for split_query column; rows of other values cannot be used.
    Unset: support and query are called so."""
    support_size: int | None = None
    """Number of support rows of a task: its first by time (split_query last) or random ones. All others are query, up
    to query_size where that is set too. Smaller tasks have fewer, so that a query row is left."""
    query_size: int | None = None
    """Number of query rows of a task (10 when unset). Smaller tasks have fewer, so that a support row is left. With
    support_size, the most query rows: the next ones after the support; rows after them are left out and counted."""
    query_ratio: float | None = None
    """Fraction of a task's rows that are query, instead of query_size."""
    min_task_rows: int | None = None
    """Smaller tasks are left out and counted. Unset: 1, which keeps all; a task of one row has it as its query, and no
    support."""
    max_task_rows: int | None = None
    """Larger tasks are left out and counted, or shortened as max_task_rows_keep says; unset: no limit."""
    max_task_rows_keep: Literal["last", "random", "drop"] | None = None
    """What is kept of a task beyond max_task_rows: its last rows by time, or random ones, which are then cut into
    support and query; other rows are counted. drop, when unset: nothing, the task is left out."""
    max_train_task_rows: int | None = None
    """Training tasks beyond this keep so many rows, chosen as max_task_rows_keep says (drop or unset: the last by time,
    random ones with split_query random or without a time); valid and test tasks stay whole. Unset: no limit but
    max_task_rows."""
    task_split: Literal["user", "time", "column"] | None = None
    """Who is train, valid and test: random tasks, tasks by their first time, or the schema's partition column.
    Unset: column where the schema names a partition, else user."""
    partitions: dict[str, Any] = field(default_factory=dict)
    """Partition value to split, for task_split column; other values are left out and counted.
    Unset: train, valid and test are called so."""
    valid_fraction: float | None = None
    """Fraction of the tasks (with task_split column: of the training users) held out as valid; 0.1 when unset
    and no partition is called valid."""
    test_fraction: float | None = None
    """Fraction of the tasks held out as test; 0.1 when unset. Not for task_split column."""
    on_bad_rows: Literal["fail", "quarantine"] = "fail"
    """Rows that cannot be used stop the command, or go to rejects.parquet in the pack with their reason."""
    history_rows: int = HISTORY_ROWS
    """Rows of earlier days that a task's support has at most, its last ones; the query has rows of the new day alone.
    With base; not with task_split column."""
    evict_after_days: int | None = None
    """Values not seen for so many days lose their ids, and tasks their older rows. With base. Unset: never."""
    evict_below: int | None = None
    """Only values seen fewer times than this in all lose their ids. Unset: all that evict_after_days names."""
    memory_limit: str = "2GB"
    """Memory that DuckDB may use before it spills to disk beside `out`."""
    threads: int = 0
    """DuckDB threads; 0 is one a core. The pack does not depend on it."""
    shard_mb: int = 128
    """Size of a shard in megabytes; one is encoded while the one before is saved."""
    seed: int = 0
    """Seed of random splits and of the stored order."""

    @property
    def inputs(self) -> list[str]:
        """Return `input` as a list."""
        return [self.input] if isinstance(self.input, str) else self.input

    @property
    def kept_domains(self) -> list[str]:
        """Return `domains` as a list."""
        return [self.domains] if isinstance(self.domains, str) else self.domains

    def __post_init__(self) -> None:
        require_numbers(self)
        require(self.query_size is None or self.query_size >= 1, "query_size", self.query_size, "must be at least 1")
        ratio, valid, test = self.query_ratio, self.valid_fraction, self.test_fraction
        require(ratio is None or 0 < ratio < 1, "query_ratio", ratio, "must be above 0 and below 1")
        require(ratio is None or self.query_size is None, "query_ratio", ratio, "unset query_size to use it")
        support = self.support_size
        require(support is None or support >= 1, "support_size", support, "must be at least 1")
        require(support is None or ratio is None, "support_size", support, "unset query_ratio to use it")
        require(valid is None or 0 <= valid < 1, "valid_fraction", valid, "must be in [0, 1)")
        require(test is None or 0 <= test < 1, "test_fraction", test, "must be in [0, 1)")
        require((valid or 0) + (test or 0) < 1, "test_fraction", test, "must leave tasks to train on")
        low, high = self.min_task_rows, self.max_task_rows
        require(low is None or low >= 1, "min_task_rows", low, "must be at least 1")
        require(high is None or high >= max(2, low or 2), "max_task_rows", high, f"must be at least {max(2, low or 2)}")
        for name, split in self.partitions.items():
            known = split in ("train", "valid", "test")
            require(known, f"partitions[{name!r}]", split, "splits are train, valid and test")
        for name, side in self.roles.items():
            require(side in ("support", "query"), f"roles[{name!r}]", side, "roles are support and query")
        core = self.core
        require(core is None or core >= 0, "core", core, "must be 0, which leaves nothing out, or more")
        history, days, below = self.history_rows, self.evict_after_days, self.evict_below
        require(history >= 0, "history_rows", history, "must be 0 or more")
        require(history == HISTORY_ROWS or self.base is not None, "history_rows", history, "has no effect without base")
        require(days is None or days >= 1, "evict_after_days", days, "must be at least 1")
        require(days is None or self.base is not None, "evict_after_days", days, "has no effect without base")
        require(below is None or below >= 1, "evict_below", below, "must be at least 1")
        require(below is None or days is not None, "evict_below", below, "has no effect without evict_after_days")
        require_size("memory_limit", self.memory_limit)
        most = 4 * max(4, os.cpu_count() or 1)
        require(0 <= self.threads <= most, "threads", self.threads, f"must be 0 (one a core) to {most}")
        require(1 <= self.shard_mb <= 4096, "shard_mb", self.shard_mb, "must be in [1, 4096]")
        require_seed(self.seed)


STREAM_RATES = {"active": 0.1, "user_turnover": 0.05, "item_turnover": 0.02, "drift": 0.1, "late": 0.02}
"""Settings of `SynthConfig` that only a stream of days has, and what they are when unset."""


@dataclass(frozen=True, kw_only=True)
class SynthConfig:
    """Generate a click log whose truth is known, with a schema for `gmeta prepare` and reference AUCs.

    With `days` it is a stream: a folder of rows a day. With `--kind antm2c` it is a clone of AntM2C's files: five
    scenes, texts and images."""

    out: str
    """Directory to create: the log's Parquet files, schema.yaml, summary.json and _truth/."""
    kind: Literal["clicks", "antm2c"] = "clicks"
    """clicks: a log with the settings below. antm2c: CSV files and images as AntM2C's, of about `rows` rows; out, rows
    and seed are its only settings."""
    rows: int | None = None
    """With antm2c: about how many rows; 1,000,000 when unset. There are as many users and items a row as in the real
    files."""
    users: int = 20_000
    """Users, each of them a task. With days: those who are there on any one day."""
    items: int = 500
    """Items, drawn by Zipf popularity. With days: those on offer on any one day."""
    rows_per_user: int = 24
    """Mean rows of a user, with days on a day on which he is active; each number is uniform between half and one and a
    half of it."""
    latent_dim: int = 2
    """Dimensions of the taste and of the item latents, 1 to 3. The exact posterior is computed on a grid of as many."""
    taste_std: float = 2.2
    """Standard deviation of the logit's part that only a user's own rows reveal."""
    side_std: float = 1.5
    """Standard deviation of the logit's part that user features and items explain together."""
    item_std: float = 0.7
    """Standard deviation of the logit's part that the item alone explains."""
    item_side_share: float = 0.3
    """Fraction of the variance of item latents that category and brand reveal; only clicks reveal the rest."""
    bias: float = -0.5
    """Logit of the average row. It sets the click rate."""
    zipf: float = 0.8
    """Exponent of item popularity: probability is proportional to rank ** -zipf; 0 is uniform."""
    num_query: int = 10
    """Last rows of a user, by time, that count as the query where the summary's AUCs are measured."""
    days: int | None = None
    """Days of a stream, 1 to 100, each a folder day=00, day=01, …: users and items come and go, tastes and popularity
    drift, some rows are late. Unset: one log that does not change."""
    active: float | None = None
    """With days: fraction of the users there who have rows on a day; who arrives is active too. 0.1 when unset."""
    user_turnover: float | None = None
    """With days: fraction of the users who leave a day; as many new ones arrive. 0.05 when unset."""
    item_turnover: float | None = None
    """With days: fraction of the items that leave a day; as many new ones arrive. 0.02 when unset."""
    drift: float | None = None
    """With days: how far what is learned of items and user features moves a day, in its own standard deviations; so
    does popularity. 0 is not at all, 1 is a new world every day. 0.1 when unset."""
    late: float | None = None
    """With days: fraction of the rows that lie in the file of one of the next three days. 0.02 when unset."""
    seed: int = 0
    """Seed. The same seed and sizes give the same files."""

    @property
    def clone_rows(self) -> int:
        """Return about how many rows a clone of AntM2C has."""
        return 1_000_000 if self.rows is None else self.rows

    def rate(self, name: str) -> float:
        """Return a setting of `STREAM_RATES`, or its default where it is unset."""
        given: float | None = getattr(self, name)
        return STREAM_RATES[name] if given is None else given

    def __post_init__(self) -> None:
        require_numbers(self)
        require(
            self.rows is None or self.kind == "antm2c", "rows", self.rows, "is for --kind antm2c; set users instead"
        )
        require(self.rows is None or self.rows >= 1000, "rows", self.rows, "must be at least 1000")
        if self.kind == "antm2c":
            for setting in fields(self):
                value = getattr(self, setting.name)
                own = setting.name in ("out", "kind", "rows", "seed") or value == setting.default
                require(own, setting.name, value, "is not for --kind antm2c, whose settings are out, rows and seed")
        require(self.users >= 1, "users", self.users, "must be at least 1")
        require(self.items >= 1, "items", self.items, "must be at least 1")
        require(self.rows_per_user >= 2, "rows_per_user", self.rows_per_user, "must be at least 2")
        require(1 <= self.latent_dim <= 3, "latent_dim", self.latent_dim, "must be in [1, 3]")
        for key in ("taste_std", "side_std", "item_std", "zipf"):
            require(getattr(self, key) >= 0, key, getattr(self, key), "must not be negative")
        require(0 <= self.item_side_share <= 1, "item_side_share", self.item_side_share, "must be in [0, 1]")
        require(self.num_query >= 1, "num_query", self.num_query, "must be at least 1")
        days = self.days
        require(days is None or 1 <= days <= 100, "days", days, "must be in [1, 100]")
        for key in STREAM_RATES:
            value = getattr(self, key)
            require(value is None or 0 <= value <= 1, key, value, "must be in [0, 1]")
            require(value is None or days is not None, key, value, "is for a stream: set days too, or leave it out")
        require_seed(self.seed)
