"""The packs of the benchmark, each made when a cell first asks for it."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import duckdb

from gmeta.benchmark.cells import CellFolder
from gmeta.config.benchmark import BenchmarkConfig
from gmeta.data.antm2c.published import DEEP_FEATURES, TIME_FORMAT, TRAIN_ENDS, VALID_ENDS
from gmeta.data.antm2c.read import part_files
from gmeta.data.sources import literal

NEW_USERS = 0.1
"""The share of users that no training task has, in track new_users."""
_TRAIN_ENDS = f"TIMESTAMP {literal(TRAIN_ENDS.strftime(TIME_FORMAT))}"
_TEST = f"strptime(log_time, {literal(TIME_FORMAT)}) > TIMESTAMP {literal(VALID_ENDS.strftime(TIME_FORMAT))}"


_MEMORY = "2GB"
_WITHOUT_DEEP = f"* REPLACE ({', '.join(f'NULL AS {name}' for name in DEEP_FEATURES)})"


def make_pack(folder: CellFolder, config: BenchmarkConfig, name: str, rows: tuple[int, ...]) -> None:
    """Make a pack of the benchmark where it is not there.

    all, in_scenes (a task is a user in a scene), scene_S (rows of one scene), new_users, new_S (all but a scene, whose
    test tasks know so many `rows`), known_S_N (the last N rows of a scene before test, alone). The last two are without
    deep_features: rows of one scene would make other columns of them, and what is trained on one goes on on the other.
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
    elif kind == "scene":
        root = rows_of_scene(root, made, int(of))
    elif kind == "new":
        root = _filtered(root, made, f"SELECT {_WITHOUT_DEEP} FROM log")
        more = ["--tasks", "scene_item", "--new_scene", of, "--new_scene_rows", f"[{','.join(map(str, rows))}]"]
    elif kind == "known":
        scene, number = map(int, of.split("_"))
        root = known_rows(root, made, scene, number)
        more = ["--tasks", "scene_item"]
    if config.images:
        more += ["--images", config.images]
    folder.gmeta("packs", "prepare", "--dataset", "antm2c", "--root", root, *more, "--out", folder.pack(name))
    for scratch in (made, Path(f"{made}.spill")):
        shutil.rmtree(scratch, ignore_errors=True)


def rows_of_scene(root: Path, out: Path, scene: int) -> Path:
    """Write files of the log's form with the rows of one scene."""
    return _filtered(root, out, f"SELECT * FROM log WHERE scene = {literal(str(scene))}")


def known_rows(root: Path, out: Path, scene: int, number: int) -> Path:
    """Write files of the log's form with the last `number` rows of a scene before test, and its rows of test.

    Those before test are trained on, whatever their split: they get times of train, in their order.
    """
    mine = f"SELECT * FROM log WHERE scene = {literal(str(scene))}"
    last = "row_number() OVER (ORDER BY log_time DESC, part DESC, row DESC)"
    moved = f"strftime({_TRAIN_ENDS} - to_seconds({last}), {literal(TIME_FORMAT)}) AS log_time"
    known = f"SELECT * REPLACE ({moved}) FROM ({mine} AND NOT {_TEST}) QUALIFY {last} <= {number}"
    return _filtered(root, out, f"SELECT {_WITHOUT_DEEP} FROM ({known} UNION ALL {mine} AND {_TEST})")


def scene_rows(root: Path) -> dict[int, int]:
    """Return how many rows each scene has before test. ValueError where a part file is missing."""
    with duckdb.connect() as con:
        rows = f"FROM {_log(part_files(root))} WHERE NOT {_TEST}"
        return dict(con.execute(f"SELECT CAST(scene AS INTEGER), count(*) {rows} GROUP BY 1 ORDER BY 1").fetchall())


def _filtered(root: Path, out: Path, query: str) -> Path:
    """Write files of the log's form with the rows that a query over `log` finds, in their order."""
    out.mkdir(parents=True, exist_ok=True)
    parts = part_files(root)
    with duckdb.connect(config={"memory_limit": _MEMORY, "temp_directory": f"{out}.spill"}) as con:
        con.execute(f"CREATE VIEW log AS SELECT * FROM {_log(parts)}")
        for number, _ in enumerate(parts):
            path = literal(str(out / f"antm2c_10m_part{number}.csv"))
            con.execute(f"""COPY (SELECT * EXCLUDE (part, row) FROM ({query}) WHERE part = {number} ORDER BY row)
                            TO {path} (FORMAT csv, HEADER, NULL '')""")
    return out


def _log(parts: Iterable[Path]) -> str:
    """Return SQL of all rows as text, with the number of their part and their place in it."""
    read = [
        f"""SELECT {number} AS part, row_number() OVER () AS row, * FROM
            read_csv({literal(str(path))}, all_varchar = true, header = true, parallel = false)"""
        for number, path in enumerate(parts)
    ]
    return f"({' UNION ALL BY NAME '.join(read)})"
