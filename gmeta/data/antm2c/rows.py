"""Stage 3 of AntM2C: events to the rows of tasks, as `check` leaves those of other files, and their schema.

A row is where it was read and a few numbers: the wide columns of an event are joined when rows are dealt to shards, and
its lists are slices (`slices`), of the entries of each text and of the positive events of all users.

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
from gmeta.data.prepare.read import UnfitRows
from gmeta.data.prepare.settings import Settings
from gmeta.data.prepare.summary import Report
from gmeta.data.prepare.values import BEYOND_FLOAT32, id_value
from gmeta.data.schema import FLOAT32_MAX, DataSchema, parse_data_schema
from gmeta.data.sources import Connection, literal

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
    """The rows that a log became."""

    rows: str  # SQL of rows as `check` gives them
    refused: list[UnfitRows]
    schema: DataSchema
    counts: dict[str, Any]  # of reading, and `antm2c`
    images: str = ""  # SQL of the Parquet files (item, vector) of images; empty where none are read

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


def make_log_rows(con: Connection, config: PrepareConfig, settings: Settings, scratch: Path, tell: Report) -> MadeLog:
    """Make the rows of the log in `config.root`. ValueError for all that is the user's to mend."""
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
    _keep_lists(con, separator.mark)
    _make_rows(con)
    _name_values(con, schema)
    return MadeLog(_checked_rows(schema, images), _refused(con, schema, deep), schema, counts, images)


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
    titles = """SELECT count(DISTINCT coalesce(item_title, '')) AS titles,
                       count(*) FILTER (item_title IS NULL) AS lacking
                FROM wide JOIN log USING (event) GROUP BY item_id"""
    query = f"SELECT count(*) FILTER (titles > 1), coalesce(sum(lacking), 0)::BIGINT FROM ({titles})"
    found["items_of_several_titles"], found["rows_without_title"] = con.execute(query).fetchall()[0]
    return found


def _scalar(con: Connection, what: str) -> int:
    return int(con.execute(f"SELECT {what} FROM log").fetchall()[0][0])


def _make_histories(con: Connection) -> None:
    """Make table `positives` (place, value), the items of the positive events of all users, of each in order, and table
    `placed`: the events, each with the slice of it that is its history.
    """
    # a window over all rows at once would have to fit into memory: users are placed first, and rows within theirs
    known = f"least({HISTORY}, before)"
    con.execute(f"""
        CREATE TEMP TABLE placed AS
        SELECT * EXCLUDE (first, before), first + before AS place,
               {{'start': first + before - {known}, 'length': CAST({known} AS INTEGER)}} AS history
        FROM (SELECT *, CAST(sum(label) OVER (PARTITION BY user_id ORDER BY time, event ROWS UNBOUNDED PRECEDING)
                             - label AS BIGINT) AS before FROM log)
        JOIN (SELECT user_id, CAST(sum(sum(label)) OVER (ORDER BY user_id) - sum(label) AS BIGINT) AS first
              FROM log GROUP BY user_id) USING (user_id);
        DROP TABLE log;
        CREATE TEMP TABLE positives AS SELECT place, item_id AS value FROM placed WHERE label = 1""")


def _keep_lists(con: Connection, separator: str) -> None:
    """Make table `entries` (place, value), the entries of each text once, and table `listed` (text, slice, entries,
    bad), the texts, with the reason why one cannot be used.
    """
    value, checks = id_value("x", "VARCHAR", "VARCHAR") or ("x", [])
    checks = [*checks, (f"({value}) IS NULL", "has a missing element")]
    bad = " ".join(
        f"WHEN len(list_filter(entries, lambda x: {where})) > 0 THEN {literal(why)}" for where, why in checks
    )
    texts = " UNION ".join(f"SELECT {name} AS text FROM wide" for name in LISTS)
    con.execute(f"""
        CREATE TEMP TABLE listed AS
        SELECT text, {{'start': CAST(sum(length) OVER (ROWS UNBOUNDED PRECEDING) - length AS BIGINT), 'length': length}}
                     AS slice, entries, CASE {bad} END AS bad
        FROM (SELECT text, entries, CAST(least({ENTITIES}, len(entries)) AS INTEGER) AS length
              FROM (SELECT text, {_entries("text", separator)} AS entries FROM ({texts})));
        CREATE TEMP TABLE entries AS
        SELECT slice.start + unnest(range(slice.length)) AS place,
               unnest(list_transform(entries[-{ENTITIES}:], lambda x: {value})) AS value
        FROM listed""")


def _make_rows(con: Connection) -> None:
    """Make table `rows`: what is narrow of each row, with the slices of its lists."""
    joins = " ".join(f"JOIN listed l{i} ON l{i}.text IS NOT DISTINCT FROM wide.{name}" for i, name in enumerate(LISTS))
    slices = ", ".join(f"l{i}.slice AS {name}" for i, name in enumerate(LISTS))
    # one join after the other: each holds a table, and only one at a time makes room by going to disk
    con.execute(f"""
        CREATE TEMP TABLE sliced AS SELECT event, {slices} FROM wide {joins};
        CREATE TEMP TABLE events AS
        SELECT event, label, epoch_us(time) AS time, user_id, item_id, scene, history, {", ".join(LISTS)}
        FROM placed JOIN sliced USING (event);
        DROP TABLE sliced;
        CREATE TEMP TABLE rows AS
        SELECT row, event, task, partition, role = 'query' AS is_query, label, time, user_id, item_id, scene, history,
               {", ".join(LISTS)} FROM dealt JOIN events USING (event);
        DROP TABLE events; DROP TABLE dealt""")


def _name_values(con: Connection, schema: DataSchema) -> None:
    """Make the views that rows have slices of."""
    for i, feature in enumerate(schema.features):
        if feature.kind != "categorical":
            source = "positives" if feature.name == "history" else "entries"
            con.execute(f"CREATE TEMP VIEW values_{i} AS SELECT place, value FROM {source}")


def _checked_rows(schema: DataSchema, images: str) -> str:
    """Return SQL of the rows as `check` gives them."""
    number = {name: f"d{place}" for place, name in enumerate(DEEP_FEATURES)}
    wide = ["event", "item_title"]
    made = {USER_SCENE: "concat_ws('/', user_id, scene)"}
    made[HAS_IMAGE] = f"if(item_id IN (SELECT item FROM {images}), 'yes', 'no')"
    found = {name: name for name in ("task", "label", "time", "partition", "is_query")} | {"item": "item_id"}
    for i, feature in enumerate(schema.features):
        deep = number.get(feature.name)
        wide += [deep] if deep else []
        found[f"f{i}"] = made.get(feature.name) or deep or feature.name
    for i, numeric in enumerate(schema.numeric):
        value = f"TRY_CAST({number[numeric.name]} AS DOUBLE)"
        wide.append(f"CASE WHEN NOT isnan({value}) THEN {value} END AS n{i}")
        found[f"n{i}"] = f"n{i}"
    columns = ", ".join(f"{value} AS {name}" for name, value in found.items())
    return f"SELECT 0 AS file, row, {columns} FROM (SELECT {', '.join(wide)} FROM wide) JOIN rows USING (event)"


def _refused(con: Connection, schema: DataSchema, deep: DeepColumns) -> list[UnfitRows]:
    """Return which rows cannot be used for an entry of a list, or a number that is too large."""
    found = []
    reasons = con.execute("SELECT DISTINCT bad FROM listed WHERE bad IS NOT NULL ORDER BY bad").fetchall()
    for name in LISTS if reasons else ():
        bad = f"""(SELECT row AS bad_row, CAST(entries AS VARCHAR) AS entries, bad
                   FROM rows JOIN wide USING (event) JOIN listed ON text = wide.{name} WHERE bad IS NOT NULL)"""
        for (reason,) in reasons:
            where = f"row IN (SELECT bad_row FROM {bad} WHERE bad = {literal(reason)})"
            found.append(UnfitRows(where, name, f"(SELECT entries FROM {bad} WHERE bad_row = row)", reason))
    numeric = {column.name: f"n{i}" for i, column in enumerate(schema.numeric)}
    return found + [
        UnfitRows(f"abs({numeric[name]}) > {FLOAT32_MAX!r}", name, numeric[name], BEYOND_FLOAT32)
        for name in deep.beyond
    ]


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
