"""Stage 3 of AntM2C: events to the rows of tasks, a Parquet file, with the schema that its columns have.

An event knows the last `HISTORY` positive events of its user that were earlier, by (time, part file, row): its own
label and later ones are not among them.
"""

from __future__ import annotations

import glob
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gmeta.config.data import PrepareConfig
from gmeta.core.errors import require
from gmeta.data.antm2c.published import DEEP_FEATURES, LOGS, SPLITS
from gmeta.data.antm2c.read import LISTS, DeepColumns, deep_columns, read_parts, separator_of
from gmeta.data.antm2c.tasks import OF_LOGS, TaskPlan, deal_events, plan_of
from gmeta.data.image_vectors import PARTS, image_dim
from gmeta.data.prepare.scratch import connect
from gmeta.data.prepare.settings import Settings
from gmeta.data.prepare.summary import Report
from gmeta.data.schema import DataSchema, parse_data_schema
from gmeta.data.sources import Connection, RawPart, in_order, literal, open_file

_ITEMS = "count(DISTINCT item_id)"
IMAGE, HAS_IMAGE = "image", "has_image"
"""The vector of an item's image, and the feature that says whether it has one."""
USER_SCENE = "user_scene"
"""The id of a user in a scene: what a user likes there, beside what the user likes anywhere."""
HISTORY, ENTITIES = 10, 10
"""Positive events in a history; entries kept of a list, the last ones."""

_HAS_ALREADY = (
    *("schema", "events", "items", "core", "holdout", "domains", "gaps", "label_threshold", "split_query", "roles"),
    *("support_size", "query_size", "query_ratio", "task_split", "partitions", "valid_fraction", "test_fraction"),
)
"""Settings that say what a log has already: its split, and the support and query of its tasks."""


@dataclass(frozen=True)
class MadeLog:
    """The rows that a log became, in a Parquet file."""

    rows: Path
    schema: DataSchema
    counts: dict[str, Any]  # of reading, and `antm2c`
    images: str = ""  # SQL of the Parquet files (item, vector) of images; empty where none are read

    def part(self, con: Connection) -> RawPart:
        """Open the rows."""
        return open_file(con, self.rows)

    def vectors(self) -> dict[str, str]:
        """Return SQL of value and vector of each vector that items own."""
        query = f"SELECT item AS value, CAST(vector AS FLOAT[]) AS vector FROM {self.images}"
        return {IMAGE: query} if self.images else {}


def log_schema(config: PrepareConfig) -> DataSchema | None:
    """Return the schema of the rows, but for `deep_features`, which files tell; None where the config names no log.

    Raises ValueError for a setting that has no effect, by name.
    """
    if config.dataset not in LOGS:
        for key in OF_LOGS:
            value = getattr(config, key)
            require(value in (None, []), key, value, "is for --dataset antm2c; leave it out")
        return None
    plan_of(config, 0)
    require(config.separator != "", "separator", config.separator, "must have a character")
    for key in ("input", *_HAS_ALREADY):
        value = getattr(config, key)
        if value not in (None, [], {}):
            raise ValueError(f"{key} has no effect on dataset {config.dataset}, which comes with it: leave it out")
    if config.root is None:
        raise ValueError(f"dataset {config.dataset} needs root, the directory with its files")
    return schema_of(DeepColumns((), (), ()), _images_of(config.images)[0], every_user=_of_items(config))


def make_log_rows(config: PrepareConfig, settings: Settings, scratch: Path, tell: Report) -> MadeLog:
    """Make the rows of the log in `config.root`, in `scratch`. ValueError for all that is the user's to mend."""
    folder = scratch / "log"
    folder.mkdir()
    with connect(folder, config) as con:
        fills = LOGS[str(config.dataset)]
        counts = read_parts(con, config, settings, scratch, tell, fills_times=fills)
        files = counts.pop("files")
        tell("looking at columns", 0, 1)
        separator = separator_of(con, config.separator)
        deep = deep_columns(con)
        counts["antm2c"] = {**_counts(con), "separator": separator.mark, "separated": round(separator.share, 4)}
        counts["antm2c"] |= {"likeliest_separator": separator.likeliest, "separated_otherwise": separator.unlike(files)}
        counts["antm2c"] |= {"filled_times": counts.pop("filled_times")} if fills else {}
        counts["antm2c"] |= {"numeric": deep.numeric, "codes": deep.categorical, "left_out": deep.left_out}
        tell("making histories", 0, 1)
        _make_histories(con)
        plan = plan_of(config, settings.seed)
        deal_events(con, plan)
        counts["antm2c"] |= _told(plan)
        dim, images = _images_of(config.images)
        if images:
            counts["antm2c"]["items_with_image"] = _with_image(con, images)
        schema = schema_of(deep, dim, every_user=_of_items(config))
        made = MadeLog(scratch / "log.parquet", schema, counts, images)
        _write(con, made, separator.mark, deep)
    (folder / "rows.duckdb").unlink()
    return made


def _of_items(config: PrepareConfig) -> bool:
    return config.tasks == "scene_item"


def _images_of(folder: str | None) -> tuple[int, str]:
    """Return the width of the vectors in a folder, and SQL that reads them; 0 and '' where there is none."""
    if folder is None:
        return 0, ""
    return image_dim(Path(folder)), f"read_parquet({literal(f'{glob.escape(folder)}/{PARTS}')})"


def _with_image(con: Connection, images: str) -> int:
    """Return how many items of the log have an image. ValueError where none has."""
    query = f"SELECT count(*) FROM (SELECT DISTINCT item_id FROM placed) WHERE item_id IN (SELECT item FROM {images})"
    found = int(con.execute(query).fetchall()[0][0])
    if not found:
        first = con.execute(f"SELECT item FROM {images} LIMIT 1").fetchall()[0][0]
        raise ValueError(
            f"no item of the log has an image, which are called {first!r} and so on: they are of another log, or their "
            "files are not called by items"
        )
    return found


def schema_of(deep: DeepColumns, image_width: int = 0, *, every_user: bool = False) -> DataSchema:
    """Return the schema of the rows; with the width of images these are among it.

    Then items of valid and test have ids too, since vectors of items lie by id. With `every_user` users of these have,
    so that a model goes on, on few rows, with the rows of all users that it knows.
    """
    known = "all" if image_width else "train"
    image = [{"name": IMAGE, "dim": image_width, "owner": "item", "dtype": "fp16"}] if image_width else []
    entities = [
        {"name": name, "table": "item_title", "text": True, "pooling": "none", "max_length": ENTITIES} for name in LISTS
    ]
    return parse_data_schema(
        {
            "task": "user",
            "label": "label",
            "time": "time",
            "item": "item_id",
            "scenario": "scene",
            "partition": "partition",
            "role": "role",
            "categorical": [
                {"name": "user_id", "vocabulary": "all" if every_user else "train"},
                USER_SCENE,
                {"name": "item_id", "vocabulary": known},
                "scene",
                *([HAS_IMAGE] if image else []),
                {"name": "item_title", "text": True, "nulls": "oov"},
                *({"name": name, "nulls": "oov"} for name in deep.categorical),
            ],
            "sequence": [
                {"name": "history", "table": "item_id", "pooling": "none", "max_length": HISTORY, "vocabulary": known},
                *entities,
            ],
            "numeric": [{"name": name, "nulls": "mean"} for name in deep.numeric],
            "vector": image,
        }
    )


def _counts(con: Connection) -> dict[str, Any]:
    """Return what is published of the real files too: rows, positives, users and items of each split, and scenes."""
    found: dict[str, Any] = {"users": _scalar(con, "count(DISTINCT user_id)"), "items": _scalar(con, _ITEMS)}
    for split in SPLITS:
        where = f"FROM log WHERE split = {literal(split)}"
        values = con.execute(
            f"SELECT count(*), coalesce(sum(label), 0)::BIGINT, count(DISTINCT user_id), {_ITEMS} {where}"
        ).fetchall()
        names = ("rows", "positives", "users", "items")
        scenes = con.execute(f"SELECT scene, count(*) {where} GROUP BY scene ORDER BY scene").fetchall()
        found[split] = {**dict(zip(names, values[0], strict=True)), "scenes": dict(scenes)}
    titles = "(SELECT item_id FROM log GROUP BY item_id HAVING count(DISTINCT coalesce(item_title, '')) > 1)"
    found["items_of_several_titles"] = con.execute(f"SELECT count(*) FROM {titles}").fetchall()[0][0]
    found["rows_without_title"] = _scalar(con, "count(*) FILTER (item_title IS NULL)")
    return found


def _scalar(con: Connection, what: str) -> int:
    return int(con.execute(f"SELECT {what} FROM log").fetchall()[0][0])


def _make_histories(con: Connection) -> None:
    """Make table `placed`: the events with how many positive ones the user had before, and table `positives` with the
    last positive items of a user after its n-th positive event.
    """
    before = ", ".join(f"lag(item_id, {back}) OVER w" for back in range(HISTORY - 1, 0, -1))
    con.execute(f"""
        CREATE TABLE placed AS
        SELECT *, coalesce(sum(label) OVER (w ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0)::BIGINT AS earlier
        FROM log WINDOW w AS (PARTITION BY user_id ORDER BY time, event);
        DROP TABLE log;
        CREATE TABLE positives AS
        SELECT user_id, earlier + 1 AS earlier, list_filter([{before}, item_id], lambda x: x IS NOT NULL) AS history
        FROM placed WHERE label = 1 WINDOW w AS (PARTITION BY user_id ORDER BY time, event)""")


def _write(con: Connection, made: MadeLog, separator: str, deep: DeepColumns) -> None:
    """Write the rows, of each task in order; those of supports in valid and test a second time."""
    lists = ", ".join(f"{_entries(name, separator)} AS {name}" for name in LISTS)
    number = {name: f"d{place}" for place, name in enumerate(DEEP_FEATURES)}
    columns = [f"TRY_CAST({number[name]} AS DOUBLE) AS {name}" for name in deep.numeric]
    columns += [f"{number[name]} AS {name}" for name in deep.categorical]
    if made.images:
        columns.append(f"if(item_id IN (SELECT item FROM {made.images}), 'yes', 'no') AS {HAS_IMAGE}")
    features = ", ".join(
        [
            "user_id",
            f"concat_ws('/', user_id, scene) AS {USER_SCENE}",
            "item_id",
            "scene",
            "item_title",
            "coalesce(history, []) AS history",
            lists,
            *columns,
        ]
    )
    with in_order(con):
        con.execute(f"""
            COPY (
                SELECT task AS "user", label, time, partition, role, {features}
                FROM dealt JOIN placed USING (event) LEFT JOIN positives USING (user_id, earlier)
                ORDER BY task, partition, place)
            TO {literal(str(made.rows))} (FORMAT parquet)""")


def _told(plan: TaskPlan) -> dict[str, Any]:
    """Return what the manifest says of the tasks."""
    told: dict[str, Any] = {"tasks": plan.tasks}
    if plan.new_scene is not None:
        told |= {"new_scene": plan.new_scene, "new_scene_rows": list(plan.new_scene_rows)}
    return told | ({"new_users": plan.new_users} if plan.new_users else {})


def _entries(name: str, separator: str) -> str:
    """Return SQL of a list's entries, without empty ones; an empty list where there is no text."""
    if not separator:
        return f"if({name} IS NULL, [], [{name}])"
    parts = f"string_split({name}, {literal(separator)})"
    return f"coalesce(list_filter(list_transform({parts}, lambda x: trim(x)), lambda x: x <> ''), [])"
