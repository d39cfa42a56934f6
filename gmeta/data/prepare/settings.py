"""What decides the content of a pack besides its rows: settings of the command, of the named data set, and defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from gmeta.config.data import PrepareConfig
from gmeta.core.errors import nearest, require
from gmeta.data.antm2c.published import LOGS
from gmeta.data.datasets import DATA_SETS
from gmeta.data.events.data_sets import EVENT_SETS
from gmeta.data.pack import SPLITS
from gmeta.data.schema import DataSchema, load_data_schema


@dataclass(frozen=True)
class Settings:
    """What decides the content of a pack besides its rows and the schema."""

    split_query: str
    query_size: int | None
    query_ratio: float | None
    min_task_rows: int
    max_task_rows: int | None
    task_split: str
    partitions: dict[str, str]
    valid_fraction: float
    test_fraction: float
    shard_mb: int
    seed: int
    support_size: int | None = None
    max_task_rows_keep: str | None = None
    max_train_task_rows: int | None = None
    roles: dict[str, str] | None = None
    keeps: str | None = None  # which rows a task keeps that is shortened, last or random; None where none is

    @property
    def shortens(self) -> bool:
        """Say whether tasks beyond max_task_rows are shortened; else they are left out."""
        return self.max_task_rows_keep in ("last", "random")

    def to_json(self) -> dict[str, Any]:
        """Return what the manifest records: all settings, but for those with a default that are unset.

        So a pack that uses none of these has the bytes that earlier releases gave it.
        """
        unset = {f.name for f in fields(self) if f.default is None and getattr(self, f.name) is None}
        return {key: value for key, value in asdict(self).items() if key not in unset}


_KINDS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "dict[str, str]": (dict,),
    "None": (type(None),),
}


def settings_from_json(stored: Mapping[str, Any]) -> Settings:
    """Return the settings that `Settings.to_json` wrote, other keys left out.

    The kind of every value is checked: a manifest may come from anyone, and numbers go into SQL. ValueError names the
    setting.
    """
    found: dict[str, Any] = {}
    for item in fields(Settings):
        value = found[item.name] = stored.get(item.name)
        kinds = [kind for name in str(item.type).split(" | ") for kind in _KINDS[name]]
        texts = [*value, *value.values()] if isinstance(value, dict) else []
        if type(value) not in kinds or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"settings.{item.name} is {value!r}: must be {item.type}")
    return Settings(**found)


def resolve_settings(config: PrepareConfig, of_rows: DataSchema | None = None) -> tuple[DataSchema, Settings]:
    """Return the data schema and the settings; what is unset is taken from the named data set or the defaults. Rows
    that are made of events, or of a log, have the schema `of_rows`.
    """
    usual: dict[str, Any] = {}
    if of_rows is not None:
        schema = of_rows
    elif config.dataset is not None:
        if config.dataset not in DATA_SETS:
            raise ValueError(
                f"dataset is {config.dataset!r}: {nearest(config.dataset, [*DATA_SETS, *LOGS, *EVENT_SETS])}"
            )
        if config.input or config.schema is not None:
            raise ValueError(f"dataset {config.dataset} comes with its files and schema: leave input and schema out")
        schema, usual = DATA_SETS[config.dataset].schema, dict(DATA_SETS[config.dataset].settings)
    elif not config.input or config.schema is None:
        raise ValueError(
            "name --input and --schema (of events --input and --events), or --dataset and --root; "
            "`gmeta prepare --help` explains them"
        )
    else:
        schema = load_data_schema(config.schema)
    if config.label_threshold is not None:
        schema = replace(schema, label_threshold=float(config.label_threshold))
    if config.task_split not in (None, usual.get("task_split")):
        usual = {k: v for k, v in usual.items() if k not in ("partitions", "valid_fraction", "test_fraction")}

    def pick(key: str, default: Any) -> Any:
        value = getattr(config, key)
        return usual.get(key, default) if value is None else value

    task_split = pick("task_split", "user" if schema.partition is None else "column")
    partitions = as_ids(config.partitions) or usual.get("partitions") or {name: name for name in SPLITS}
    by_column = task_split == "column"
    by_time = "random" if schema.time is None else "last"
    split_query = pick("split_query", by_time if schema.role is None else "column")
    usual_query = config.query_ratio is None and config.support_size is None and split_query != "column"
    roles = as_ids(config.roles) or {"support": "support", "query": "query"}
    given_valid = by_column and "valid" in partitions.values()
    settings = Settings(
        split_query=split_query,
        query_size=pick("query_size", 10) if usual_query else config.query_size,
        query_ratio=config.query_ratio,
        min_task_rows=pick("min_task_rows", 1),
        max_task_rows=pick("max_task_rows", None),
        task_split=task_split,
        partitions=partitions if by_column else {},
        valid_fraction=(config.valid_fraction or 0.0) if given_valid else pick("valid_fraction", 0.1),
        test_fraction=0.0 if by_column else pick("test_fraction", 0.1),
        shard_mb=config.shard_mb,
        seed=config.seed,
        support_size=config.support_size,
        max_task_rows_keep=config.max_task_rows_keep,
        max_train_task_rows=config.max_train_task_rows,
        roles=roles if split_query == "column" else None,
        keeps=_keeps(config, by_time if split_query == "column" else split_query),
    )
    _check_settings(config, schema, settings)
    _check_sizes(settings)
    return schema, settings


def as_ids(names: Mapping[Any, str]) -> dict[str, str]:
    """Return a mapping of column values by the text that these are compared as: YAML reads 0 and true as no text."""
    return {str(name).lower() if isinstance(name, bool) else str(name): side for name, side in names.items()}


def _keeps(config: PrepareConfig, usual: str) -> str | None:
    """Return which rows a task keeps that is shortened; None where none is."""
    if config.max_task_rows_keep in ("last", "random"):
        return config.max_task_rows_keep
    return None if config.max_train_task_rows is None else usual


def _check_settings(config: PrepareConfig, schema: DataSchema, settings: Settings) -> None:
    if schema.time is None:
        for key, value in (("split_query", "last"), ("task_split", "time"), ("max_task_rows_keep", "last")):
            if getattr(settings, key) == value:
                raise ValueError(f"{key} is {value!r}, but the schema names no time column: add the key time to it")
    if settings.split_query == "column":
        if schema.role is None:
            raise ValueError("split_query is 'column', but the schema names no column: add the key role to it")
        for key in ("support_size", "query_size", "query_ratio"):
            if getattr(config, key) is not None:
                raise ValueError(f"{key} has no effect with split_query column: the role column says what is query")
    elif config.roles:
        raise ValueError(f"roles has no effect with split_query {settings.split_query}: set split_query to column")
    if settings.task_split == "column" and schema.partition is None:
        raise ValueError("task_split is 'column', but the schema names no column: add the key partition to it")
    if settings.task_split == "column" and config.test_fraction is not None:
        raise ValueError("test_fraction has no effect with task_split column: map a partition to test")
    if settings.task_split != "column" and config.partitions:
        raise ValueError(f"partitions has no effect with task_split {settings.task_split}: set task_split to column")
    if settings.task_split == "column" and "train" not in settings.partitions.values():
        raise ValueError(f"partitions is {settings.partitions}: map a partition to train")


def _check_sizes(settings: Settings) -> None:
    """Raise ValueError for sizes of which no task could have all."""
    least, most, train = settings.min_task_rows, settings.max_task_rows, settings.max_train_task_rows
    require(most is None or most >= max(2, least), "max_task_rows", most, f"must be at least {max(2, least)}")
    if train is not None:
        require(train >= max(2, least), "max_train_task_rows", train, f"must be at least {max(2, least)}")
        require(most is None or train <= most, "max_train_task_rows", train, f"must be at most max_task_rows ({most})")
    keep = settings.max_task_rows_keep
    require(keep is None or most is not None or train is not None, "max_task_rows_keep", keep, "set max_task_rows too")
    support, query = settings.support_size or 0, settings.query_size or 0
    for key, limit in (("max_task_rows", most), ("max_train_task_rows", train)):
        if limit is not None and max(support + query, support + 1, query + 1) > limit:
            sizes = [f"{name} {size}" for name, size in (("support_size", support), ("query_size", query)) if size]
            needed = " and ".join(sizes if len(sizes) == 2 else [*sizes, "a row of the other side"])
            raise ValueError(f"{key} is {limit}: it leaves no task the rows for {needed}; raise it, or lower the sizes")
