"""Stage 1 of AntM2C: its part files to table `log`, every value in its one form, and what its columns are.

`log` (event, part, user_id, item_id, time, label, split, scene) has a row an event. `event` rises by (part file, row),
so that repeats stay events of their own. What is wide stays where it was checked: view `wide` (event, item_title, the
four lists as text, d0 … d26 as text) has these events, and rows that were set aside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

from gmeta.config.data import PrepareConfig
from gmeta.data.antm2c.published import (
    COLUMNS,
    DEEP_FEATURES,
    PARTS,
    SCENES,
    SEQUENCES,
    TIME_FORMAT,
    TRAIN_ENDS,
    VALID_ENDS,
)
from gmeta.data.prepare.read import UnfitRows, check_all
from gmeta.data.prepare.settings import Settings
from gmeta.data.prepare.summary import Report
from gmeta.data.schema import FLOAT32_MAX, parse_data_schema
from gmeta.data.sources import Connection, RawPart, literal, open_file, scalar

LISTS = (*SEQUENCES, "item_entity_names")
"""Columns that hold a list of entities each, as one text."""
_EVENT = "(CAST(file AS BIGINT) << 40) + row"
FILLED_TIME = "2023-08-01 12:00:00"
"""What public code takes for a time that it cannot parse; such rows are of train."""
_MONTHS = ("2023-07-01", "2023-10-01")
"""Times outside are taken for damage: the log is of August 2023."""
SEPARATORS = (",", ";", "|", "\x01", "\x02", "\t", "#", "^", "/", "_", " ")
"""What may stand between the entries of a list, the likeliest first."""
_LOOKED_AT = 50_000
"""Events that are looked at, about, to find what separates the entries of lists."""
FEW_VALUES = 64
"""A `deep_features` column of whole numbers with at most so many distinct ones is taken for codes."""


@dataclass(frozen=True)
class DeepColumns:
    """What the columns without a meaning hold, told by rows of train alone."""

    numeric: tuple[str, ...]
    categorical: tuple[str, ...]
    left_out: tuple[str, ...]  # one value, or none
    beyond: tuple[str, ...] = ()  # numeric ones that a row, of train or not, has beyond float32


def part_files(root: Path) -> list[Path]:
    """Return the part files of a directory. ValueError names those that are missing."""
    found, missing = [], []
    for number in range(PARTS):
        name = f"antm2c_10m_part{number}"
        there = [root / f"{name}{ending}" for ending in (".csv", ".csv.gz", "") if (root / f"{name}{ending}").is_file()]
        found += there[:1]
        missing += [] if there else [name]
    if missing:
        raise ValueError(
            f"{root} lacks {', '.join(missing)} (as .csv, .csv.gz, or without an ending). AntM2C is given out on "
            "request, see arXiv 2308.16437; `gmeta synth --kind antm2c` makes a clone of its files"
        )
    return found


def read_parts(
    con: Connection, config: PrepareConfig, settings: Settings, scratch: Path, tell: Report, *, fills_times: bool
) -> dict[str, Any]:
    """Make table `log` of the part files in `config.root`; returns the counts of the rows that were read.

    With `fills_times` a time that cannot be parsed is `FILLED_TIME`. ValueError names files, rows and values that
    cannot be used.
    """
    parts = [open_part(con, path) for path in part_files(Path(config.root or ""))]
    schema = parse_data_schema(
        {
            "task": "user_id",
            "label": "label",
            "item": "item_id",
            "categorical": [{"name": name, "nulls": "oov"} for name in COLUMNS if name not in ("user_id", "label")],
        }
    )
    plain = replace(settings, task_split="user", split_query="random", roles=None)
    names = {feature.name: f"f{number}" for number, feature in enumerate(schema.features)}
    parsed = f"try_strptime(CAST({names['log_time']} AS VARCHAR), {literal(TIME_FORMAT)})"
    time = f"coalesce({parsed}, TIMESTAMP {literal(FILLED_TIME)})" if fills_times else parsed
    refused = _refusals(names, None if fills_times else parsed)
    counts = check_all(con, config, schema, plain, scratch, tell, parts, refused=refused)
    wide = {name: names[name] for name in ("item_title", *LISTS)}
    wide |= {f"d{number}": names[name] for number, name in enumerate(DEEP_FEATURES)}
    first, second = (f"TIMESTAMP {literal(ends.strftime(TIME_FORMAT))}" for ends in (TRAIN_ENDS, VALID_ENDS))
    con.execute(f"""
        CREATE TEMP TABLE log AS
        SELECT {_EVENT} AS event, file AS part, user_id, item_id, scene, time, label,
               CASE WHEN time <= {first} THEN 'train' WHEN time <= {second} THEN 'valid' ELSE 'test' END AS split
        FROM (SELECT file, row, task AS user_id, item AS item_id, {names["scene"]} AS scene, {time} AS time, label
              FROM raw_rows);
        CREATE TEMP VIEW wide AS
        SELECT {_EVENT} AS event, {", ".join(f"{column} AS {name}" for name, column in wide.items())} FROM checked""")
    if fills_times:
        counts["filled_times"] = scalar(con, f"SELECT count(*) FROM raw_rows WHERE {parsed} IS NULL")
    con.execute("DROP VIEW raw_rows; DELETE FROM rejects")  # which are written
    # Rows are joined by event, wide ones on the left: DuckDB would copy them to a hash table, as the fewer ones.
    con.execute("SET disabled_optimizers='statistics_propagation,join_order,build_side_probe_side'")
    return counts


def open_part(con: Connection, path: Path) -> RawPart:
    """Open a part file. ValueError where it is none of AntM2C."""
    part = open_file(con, path)
    missing = [name for name in COLUMNS if name not in part.columns]
    if missing:
        raise ValueError(f"{path} has no column {', '.join(missing)}: it is no part of AntM2C, or its header is lost")
    return part


def _refusals(names: Mapping[str, str], time: str | None) -> list[UnfitRows]:
    """Return which rows cannot be used: `names` has SQL of columns, `time` SQL of the time, None where any goes."""
    scenes = ", ".join(literal(str(scene)) for scene in range(SCENES))
    scene, text = f"CAST({names['scene']} AS VARCHAR)", names["log_time"]
    found = []
    if time is not None:
        found.append(UnfitRows(f"{time} IS NULL", "log_time", text, "is no time such as 2023-08-01"))
        outside = f"{time} < TIMESTAMP {literal(_MONTHS[0])} OR {time} >= TIMESTAMP {literal(_MONTHS[1])}"
        found.append(UnfitRows(outside, "log_time", text, "is not of August 2023, nor near it"))
    unknown = f"{scene} IS NULL OR {scene} NOT IN ({scenes})"
    found.append(UnfitRows(unknown, "scene", scene, f"is no scene: these are {scenes}"))
    return [*found, UnfitRows("label NOT IN (0, 1)", "label", "label", "is neither 0 nor 1")]


@dataclass(frozen=True)
class Separator:
    """What separates the entries of lists, as far as some of them tell."""

    mark: str  # '' where none is in a hundredth of the lists, which then have one entry each
    share: float  # of lists with text that have it
    likeliest: str  # the mark that most lists have
    by_part: dict[int, float]  # part -> share of its lists

    def unlike(self, files: Sequence[str]) -> list[str]:
        """Return the part files whose lists have it less than half as often as those of another."""
        most = max(self.by_part.values(), default=0.0)
        return [files[part] for part, share in self.by_part.items() if share < most / 2]


def separator_of(con: Connection, given: str | None) -> Separator:
    """Return what separates the entries of lists: unless it is given, what most lists have."""
    step = max(1, scalar(con, "SELECT count(*) FROM log") // _LOOKED_AT)
    some = f"wide JOIN (SELECT event, part FROM log WHERE event % {step} = 0) USING (event)"
    union = " UNION ALL ".join(f"SELECT {name} AS text, part FROM sampled" for name in LISTS)
    con.execute(f"""CREATE TEMP TABLE sampled AS SELECT part, {", ".join(LISTS)} FROM {some};
                    CREATE TEMP TABLE lists AS SELECT * FROM ({union}) WHERE text IS NOT NULL""")
    asked = SEPARATORS if given is None else (given, *SEPARATORS)
    shares = con.execute(
        f"SELECT {', '.join(f'avg(CAST(contains(text, {literal(mark)}) AS INTEGER))' for mark in asked)} FROM lists"
    ).fetchall()[0]
    found = {mark: share or 0.0 for mark, share in zip(asked, shares, strict=True)}
    best = max(found, key=lambda mark: found[mark])
    mark = given if given is not None else best if found[best] >= 0.01 else ""
    has = f"avg(CAST(contains(text, {literal(mark)}) AS INTEGER))"
    by_part = dict(con.execute(f"SELECT part, {has} FROM lists GROUP BY part ORDER BY part").fetchall())
    con.execute("DROP TABLE lists; DROP TABLE sampled")
    return Separator(mark, found[mark] if mark else 0.0, best, by_part)


def deep_columns(con: Connection) -> DeepColumns:
    """Return what the `deep_features` hold in rows of train."""
    columns = [f"d{i}, TRY_CAST(d{i} AS DOUBLE) AS n{i}" for i in range(len(DEEP_FEATURES))]
    rows = f"(SELECT split, {', '.join(columns)} FROM wide JOIN log USING (event))"
    train, rest = f"{rows} WHERE split = 'train'", f"{rows} WHERE split <> 'train'"
    facts = "min(d{i}) <> max(d{i}), count(d{i}) = count(n{i}), bool_or(n{i} <> floor(n{i})), max(abs(n{i}))"
    every = ", ".join(facts.format(i=i) for i in range(len(DEEP_FEATURES)))
    found = con.execute(f"SELECT {every} FROM {train}").fetchall()[0]
    several, numbers, fractions, largest = (found[fact::4] for fact in range(4))
    kept = [i for i, differ in enumerate(several) if differ]
    numeric = [i for i in kept if numbers[i] and isfinite(largest[i])]
    few = _true_of(con, f"count(DISTINCT d{{i}}) <= {FEW_VALUES}", train, [i for i in numeric if not fractions[i]])
    numeric = [i for i in numeric if i not in few]
    beyond = _true_of(con, f"max(abs(n{{i}})) FILTER (NOT isnan(n{{i}})) > {FLOAT32_MAX!r}", rest, numeric)
    beyond |= {i for i in numeric if largest[i] > FLOAT32_MAX}
    places = (numeric, [i for i in kept if i not in numeric], [i for i in range(len(found) // 4) if i not in kept])
    return DeepColumns(*(tuple(DEEP_FEATURES[i] for i in some) for some in (*places, sorted(beyond))))


def _true_of(con: Connection, fact: str, rows: str, columns: Sequence[int]) -> set[int]:
    """Return the columns of which a fact about `rows` is true: SQL that has {i} for the column's number."""
    if not columns:
        return set()
    found = con.execute(f"SELECT {', '.join(fact.format(i=i) for i in columns)} FROM {rows}").fetchall()[0]
    return {i for i, is_true in zip(columns, found, strict=True) if is_true}
