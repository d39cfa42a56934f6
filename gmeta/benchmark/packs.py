"""The packs of the benchmark, each made when a cell first asks for it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

from gmeta.benchmark.cells import CellFolder
from gmeta.config.benchmark import BenchmarkConfig
from gmeta.data.antm2c.published import DEEP_FEATURES, PARTS, TIME_FORMAT, TRAIN_ENDS, VALID_ENDS
from gmeta.data.antm2c.read import open_part, part_files
from gmeta.data.sources import Connection, database, literal, md5_64, reading, scalar

_T = TypeVar("_T")

NEW_USERS = 0.1
"""The share of users that no training task has, in track new_users."""
SOME_ROWS = 50_000
"""Rows before test, about, of the users of track towers."""

_MEMORY = "2GB"
_WITHOUT_DEEP = f"* REPLACE ({', '.join(f'NULL AS {name}' for name in DEEP_FEATURES)})"


def make_pack(folder: CellFolder, config: BenchmarkConfig, name: str, rows: tuple[int, ...]) -> None:
    """Make a pack of the benchmark where it is not there.

    all, in_scenes (a task is a user in a scene), some_users (all rows of these), scene_S (rows of one scene),
    new_users, new_S (all but a scene, whose test tasks know so many `rows`), known_S_N (the last N rows of a scene
    before test, alone). The last two are without deep_features: rows of one scene would make other columns of them, and
    what is trained on one goes on on the other.
    """
    if (folder.pack(name) / "manifest.json").exists():
        return
    kind, _, of = name.partition("_")
    root, more = Path(config.root), list[object]()
    made = folder.out / "rows" / name
    if name == "in_scenes":
        more = ["--tasks", "user_scene"]
    elif name == "new_users":
        more = ["--new_users", NEW_USERS]
    elif name == "some_users":
        root = apart(rows_of_some_users, root, made, SOME_ROWS)
    elif kind == "scene":
        root = apart(rows_of_scene, root, made, int(of))
    elif kind == "new":
        root = apart(without_deep, root, made)
        more = ["--tasks", "scene_item", "--new_scene", of, "--new_scene_rows", f"[{','.join(map(str, rows))}]"]
    elif kind == "known":
        scene, number = map(int, of.split("_"))
        root = apart(known_rows, root, made, scene, number)
        more = ["--tasks", "scene_item"]
    if config.images:
        more += ["--images", config.images]
    folder.gmeta("packs", "prepare", "--dataset", "antm2c", "--root", root, *more, "--out", folder.pack(name))
    for scratch in (made, Path(f"{made}.spill")):
        shutil.rmtree(scratch, ignore_errors=True)


def rows_of_scene(root: Path, out: Path, scene: int) -> Path:
    """Write files of the log's form with the rows of one scene."""
    return _filtered(root, out, f"SELECT * FROM log WHERE scene = {literal(str(scene))}")


def rows_of_some_users(root: Path, out: Path, number: int) -> Path:
    """Write files of the log's form with all rows of so many users that about `number` are before test."""
    share = f"{number} / (SELECT count(*) FROM log WHERE NOT {_test()})"
    drawn = f"{md5_64(literal('some_users'), 'user_id')} % 1000000"
    return _filtered(root, out, f"SELECT * FROM log WHERE {drawn} < 1e6 * {share}")


def known_rows(root: Path, out: Path, scene: int, number: int) -> Path:
    """Write files of the log's form with the last `number` rows of a scene before test, and its rows of test.

    Those before test are trained on, whatever their split: they get times of train, in their order.
    """
    mine = f"SELECT * FROM log WHERE scene = {literal(str(scene))}"
    last = "row_number() OVER (ORDER BY log_time DESC, part DESC, row DESC)"
    moved = f"strftime({_at(TRAIN_ENDS)} - to_seconds({last}), {literal(TIME_FORMAT)}) AS log_time"
    known = f"SELECT * REPLACE ({moved}) FROM ({mine} AND NOT {_test()}) QUALIFY {last} <= {number}"
    return _filtered(root, out, f"SELECT {_WITHOUT_DEEP} FROM ({known} UNION ALL {mine} AND {_test()})")


def without_deep(root: Path, out: Path) -> Path:
    """Write files of the log's form with all rows, without what `deep_features` hold."""
    return _filtered(root, out, f"SELECT {_WITHOUT_DEEP} FROM log")


def scene_rows(root: Path) -> dict[int, int]:
    """Return how many rows each scene has before test, of scenes with rows in every split.

    Raises:
        ValueError: a part file is missing or damaged, or has lines, scenes or times that cannot be used.
    """
    time = f"try_strptime(log_time, {literal(TIME_FORMAT)})"
    before, trained = f"{time} <= {_at(VALID_ENDS)}", f"{time} <= {_at(TRAIN_ENDS)}"
    with _log_of(root) as con:
        bad = f"{time} IS NULL OR TRY_CAST(scene AS INTEGER) IS NULL"
        wrong = scalar(con, f"SELECT count(*) FROM log WHERE {bad}")
        if wrong:
            raise ValueError(
                f"{wrong:,} rows of {root} have no time or no scene that can be used: gmeta prepare --dataset antm2c "
                "names them; mend them first"
            )
        found = con.execute(f"""
            SELECT CAST(scene AS INTEGER), count(*) FILTER ({before}) FROM log GROUP BY 1
            HAVING count(*) FILTER ({trained}) > 0 AND count(*) FILTER ({before} AND NOT {trained}) > 0
               AND count(*) FILTER (NOT {before}) > 0 ORDER BY 1""").fetchall()
        return dict(found)


def apart(function: Callable[..., _T], *args: object) -> _T:
    """Run a function in a process of its own: a command's memory is told as at least that of who starts it."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def _filtered(root: Path, out: Path, query: str) -> Path:
    """Write files of the log's form with the rows that a query over `log` finds, in their order."""
    out.mkdir(parents=True, exist_ok=True)
    with _log_of(root, spill=f"{out}.spill") as con:
        for number in range(PARTS):
            path = literal(str(out / f"antm2c_10m_part{number}.csv"))
            con.execute(f"""COPY (SELECT * EXCLUDE (part, row) FROM ({query}) WHERE part = {number} ORDER BY row)
                            TO {path} (FORMAT csv, HEADER, NULL '')""")
    return out


@contextmanager
def _log_of(root: Path, spill: str = "") -> Iterator[Connection]:
    """Yield a connection with a view `log`: all rows as text, with the number of their part and their place in it."""
    config = {"memory_limit": _MEMORY, **({"temp_directory": spill} if spill else {})}
    with database(**config) as con, reading(str(root)):
        parts = [open_part(con, path) for path in part_files(root)]
        read = [
            f"SELECT {number} AS part, __row AS row, * EXCLUDE (__row) FROM ({part.query})"
            for number, part in enumerate(parts)
        ]
        con.execute(f"CREATE VIEW log AS {' UNION ALL BY NAME '.join(read)}")
        yield con
        torn = scalar(con, "SELECT count(*) FROM reject_errors")
        if torn:
            raise ValueError(
                f"{torn:,} lines of the files in {root} cannot be read: gmeta prepare --dataset antm2c names them"
            )


def _test() -> str:
    """Return SQL of whether a row is of test."""
    return f"try_strptime(log_time, {literal(TIME_FORMAT)}) > {_at(VALID_ENDS)}"


def _at(time: datetime) -> str:
    return f"TIMESTAMP {literal(time.strftime(TIME_FORMAT))}"
