"""Where raw rows come from: Parquet and CSV files, and named data sets.

A source is a list of `RawPart`: a SQL query in DuckDB's dialect whose column `__row` is the row's number in its file
(from 1, a CSV header not counted) and whose other columns are what a `DataSchema` names. To add a data set, write a
function like `_ml_100k` and list it in `DATA_SETS`.
"""

from __future__ import annotations

import csv
import glob
import gzip
import io
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from gmeta.data.schema import DataSchema, parse_data_schema

Connection: TypeAlias = duckdb.DuckDBPyConnection

PARQUET = (".parquet", ".pq")
CSV = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
DELIMITERS = ",\t;|"
RESERVED = ("__row", "__problem", "file_row_number")
"""Columns that reading and staging add: DuckDB would take a file's own column of the name, in any case, for ours."""
NEW_USER_SHARE = 0.2
"""MeLU's share of new users: 1,208 of 6,040."""


@dataclass(frozen=True)
class RawPart:
    """Raw rows of one file."""

    file: str  # as told to the user
    query: str
    columns: dict[str, str]  # name -> DuckDB type
    ordered: bool  # rows are numbered as they are read, so they must be read in order


@dataclass(frozen=True)
class DataSet:
    """A named data set: what its columns mean, how to read it, and the settings it is usually prepared with."""

    schema: DataSchema
    open: Callable[[Connection, Path], RawPart]
    files: tuple[str, ...]
    origin: str
    settings: Mapping[str, Any]


def identifier(name: str) -> str:
    """`name` quoted as a SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """`text` quoted as a SQL string."""
    return "'" + text.replace("'", "''") + "'"


def md5_64(*parts: str) -> str:
    """SQL for a 64-bit hash of the joined SQL strings. MD5 gives the same numbers in any engine and version."""
    return f"md5_number_lower(concat_ws('|', {', '.join(parts)}))"


def scalar(con: Connection, query: str) -> Any:
    """The one value that `query` gives. (A result that is not fetched to its end blocks the connection.)"""
    ((value,),) = con.execute(query).fetchall()
    return value


# ------------------------------------------------------------------------------------------------- files


def find_files(inputs: Iterable[str]) -> list[Path]:
    """Files that `inputs` (files, globs, directories) stand for, sorted. ValueError names what matches nothing."""
    found: set[Path] = set()
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            files = [p for p in path.rglob("*") if p.is_file() and _is_data(p.relative_to(path))]
            if not files:
                raise ValueError(f"input {text} is a directory without Parquet or CSV files")
        else:
            files = (
                [path] if path.is_file() else [Path(p) for p in glob.glob(text, recursive=True) if Path(p).is_file()]
            )
            if not files:
                raise ValueError(f"input {text} does not exist or matches no file")
        found.update(files)
    odd = sorted(p for p in found if not p.name.lower().endswith(PARQUET + CSV))
    if odd:
        raise ValueError(
            f"input {odd[0]} is neither Parquet nor CSV by its name: it must end in {', '.join(PARQUET + CSV)}"
        )
    return sorted(found)


def _is_data(path: Path) -> bool:
    """Whether a file below a directory is meant: as other readers do, not where a name begins with _ or a dot."""
    return path.name.lower().endswith(PARQUET + CSV) and not any(part.startswith(("_", ".")) for part in path.parts)


def open_file(con: Connection, path: Path) -> RawPart:
    """A Parquet or CSV file as raw rows. ValueError where it is empty, unreadable, or its columns clash."""
    is_parquet = path.name.lower().endswith(PARQUET)
    names, query = _parquet(path) if is_parquet else _csv(path)
    _require_distinct(names, path)
    require_free(names, RESERVED, path)
    return _part(con, str(path), query, ordered=not is_parquet)


def _part(con: Connection, file: str, query: str, *, ordered: bool) -> RawPart:
    described = con.execute(f"DESCRIBE {query}").fetchall()
    return RawPart(file, query, {name: kind for name, kind, *_ in described if name != "__row"}, ordered)


def _parquet(path: Path) -> tuple[list[str], str]:
    try:
        names = pq.read_schema(path).names
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is no readable Parquet file ({error}): write it again") from None
    source = f"read_parquet({literal(str(path))}, file_row_number=true, hive_partitioning=false)"
    return names, f"SELECT file_row_number + 1 AS __row, * EXCLUDE (file_row_number) FROM {source}"


def _csv(path: Path) -> tuple[list[str], str]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header = file.readline().decode("utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path} is no readable UTF-8 CSV file ({error}): convert it") from None
    rows = {d: next(csv.reader(io.StringIO(header), delimiter=d), []) for d in DELIMITERS}
    delimiter = max(DELIMITERS, key=lambda d: len(rows[d]))
    if not rows[delimiter]:
        raise ValueError(f"{path} is empty: its first line must name the columns")
    return rows[delimiter], _numbered(read_csv(path, rows[delimiter], delimiter, header=True))


def read_csv(path: Path, names: Iterable[str], delimiter: str, *, header: bool, quote: str = '"') -> str:
    """SQL that reads a CSV file as text. Nothing is guessed; broken lines go to DuckDB's table `reject_errors`."""
    columns = ", ".join(f"{literal(n)}: 'VARCHAR'" for n in dict.fromkeys(names))
    return (
        f"read_csv({literal(str(path))}, auto_detect=false, columns={{{columns}}}, delim={literal(delimiter)}, "
        f"quote={literal(quote)}, escape={literal(quote)}, header={str(header).lower()}, store_rejects=true)"
    )


def _numbered(source: str) -> str:
    return f"SELECT row_number() OVER () AS __row, * FROM {source}"


def _require_distinct(names: list[str], path: Path) -> None:
    seen: dict[str, str] = {}
    for name in names:
        # DuckDB's names are case-insensitive.
        if name.lower() in seen:
            raise ValueError(f"{path} has two columns called {seen[name.lower()]!r} and {name!r}: rename one")
        seen[name.lower()] = name


def require_free(names: Iterable[str], ours: Iterable[str], path: Path) -> None:
    """ValueError where a column of the file has, in any case, the name of one that is to be added."""
    taken = {name.lower(): name for name in names}
    for name in ours:
        if name in taken:
            raise ValueError(f"{path} has a column {taken[name]!r}, a name that gmeta uses itself: rename the column")


# --------------------------------------------------------------------------------------- named data sets


def open_data_set(con: Connection, name: str, root: str | None) -> RawPart:
    """The raw rows of a named data set. ValueError where files are missing, and where to get them."""
    data = DATA_SETS[name]
    if root is None:
        raise ValueError(f"dataset {name} needs root, the directory with {', '.join(data.files)}. {data.origin}")
    missing = [f for f in data.files if not any((Path(root) / option).is_file() for option in f.split(" or "))]
    if missing:
        raise ValueError(f"dataset {name}: {root} lacks {', '.join(missing)}. {data.origin}")
    return data.open(con, Path(root))


def _register(con: Connection, name: str, path: Path, columns: tuple[str, ...]) -> None:
    """A small `::`-separated file, UTF-8 or Latin-1, as view `name`; further fields of a line are ignored."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    rows = [line.split("::") for line in text.replace("\r\n", "\n").split("\n") if line]
    for number, row in enumerate(rows, 1):
        if len(row) < len(columns):
            raise ValueError(f"{path}, line {number}: {len(row)} fields, expected {len(columns)}: download it again")
    con.register(name, pa.table({c: pa.array([row[i] for row in rows], pa.string()) for i, c in enumerate(columns)}))


def _ml_100k(con: Connection, root: Path) -> RawPart:
    def read(suffix: str) -> str:
        path = root / f"ml-100k.{suffix}"
        with path.open(encoding="utf-8") as file:
            names = [field.split(":")[0] for field in file.readline().rstrip("\n").split("\t")]
        return read_csv(path, names, "\t", header=True, quote="")

    query = f"""
        SELECT r.__row, r.user_id, r.item_id, r.rating, r.timestamp, u.gender, u.occupation,
               CAST(TRY_CAST(u.age AS INTEGER) // 10 * 10 AS VARCHAR) AS age,
               left(u.zip_code, 3) AS zip, i.release_year, string_split(i.class, ' ') AS class
        FROM ({_numbered(read("inter"))}) r
        LEFT JOIN {read("user")} u USING (user_id) LEFT JOIN {read("item")} i USING (item_id)"""
    return _part(con, str(root / "ml-100k.inter"), query, ordered=True)


_RATINGS = ("user_id", "item_id", "rating", "timestamp")
_USERS = ("user_id", "gender", "age", "occupation", "zip")


def _ml_1m(con: Connection, root: Path) -> RawPart:
    _register(con, "ml_users", root / "users.dat", _USERS)
    _register(con, "ml_movies", root / "movies.dat", ("item_id", "title", "genres"))
    ratings = _numbered(read_csv(root / "ratings.dat", _RATINGS, "::", header=False, quote=""))
    query = f"""
        SELECT r.__row, r.user_id, r.item_id, r.rating, r.timestamp, u.gender, u.age, u.occupation,
               left(u.zip, 3) AS zip, regexp_extract(m.title, '\\((\\d{{4}})\\)\\s*$', 1) AS release_year,
               string_split(m.genres, '|') AS genre
        FROM ({ratings}) r LEFT JOIN ml_users u USING (user_id) LEFT JOIN ml_movies m USING (item_id)"""
    return _part(con, str(root / "ratings.dat"), query, ordered=True)


def _ml_1m_melu(con: Connection, root: Path) -> RawPart:
    facts = ("item_id", "title", "year", "rate", "released", "genre", "director", "writer", "actor")
    _register(con, "ml_users", root / "users.dat", _USERS)
    _register(con, "ml_facts", root / "movies_extrainfos.dat", facts)
    file = root / "ratings.csv"
    if file.is_file():
        ratings = _numbered(read_csv(file, ("user_id", "item_id", "rating", "partition"), ",", header=True))
    else:
        file = root / "ratings.dat"
        ratings = _melu_partition(_numbered(read_csv(file, _RATINGS, "::", header=False, quote="")))

    def names(column: str) -> str:
        return f"list_filter(string_split({column}, ', '), lambda x: x NOT IN ('', 'N/A'))"

    query = f"""
        SELECT r.__row, r.user_id, r.item_id, r.rating, r.partition, u.gender, u.age, u.occupation,
               left(u.zip, 5) AS zip, f.year, f.rate,
               {names("f.genre")} AS genre, {names("f.director")} AS director, {names("f.actor")} AS actor
        FROM ({ratings}) r LEFT JOIN ml_users u USING (user_id) LEFT JOIN ml_facts f USING (item_id)"""
    return _part(con, str(file), query, ordered=True)


def _melu_partition(ratings: str) -> str:
    """MeLU's partitions: films of 1998 to 2000 are cold; a fifth of the users is new.

    MeLU drew its new users at random and kept no list, so ours (by a fixed hash) are as many but not the same.
    """
    order = f"ORDER BY {md5_64(literal('melu'), 'user_id')}, user_id"
    new = f"row_number() OVER ({order}) <= round({NEW_USER_SHARE} * count(*) OVER ())"
    users = f"SELECT user_id, {new} AS new FROM ml_users"
    return f"""
        SELECT r.*, CASE WHEN f.item_id IS NULL THEN 'no_film_facts'
                         WHEN CAST(f.year AS INTEGER) >= 1998 THEN if(n.new, 'user_item_cold', 'item_cold')
                         ELSE if(n.new, 'user_cold', 'warm') END AS partition
        FROM ({ratings}) r LEFT JOIN ({users}) n USING (user_id) LEFT JOIN ml_facts f USING (item_id)"""


_GROUPLENS = "Download {} from https://grouplens.org/datasets/movielens/ and unpack it there"

DATA_SETS: dict[str, DataSet] = {
    "ml-100k": DataSet(
        schema=parse_data_schema(
            {
                "task": "user_id",
                "label": "rating",
                "time": "timestamp",
                "item": "item_id",
                "categorical": [
                    "user_id",
                    "item_id",
                    {"name": "age", "nulls": "oov"},
                    "gender",
                    "occupation",
                    {"name": "zip", "nulls": "oov"},
                    {"name": "release_year", "nulls": "oov"},
                ],
                "multi": [{"name": "class", "nulls": "oov"}],
                "item_statistics": True,
            }
        ),
        open=_ml_100k,
        files=("ml-100k.inter", "ml-100k.user", "ml-100k.item"),
        origin="These are MovieLens-100K as RecBole's atomic files (tab separated, header name:type): "
        + "recbole.io lists downloads and the conversion of the original from https://grouplens.org/datasets/movielens/",
        settings={"task_split": "user", "valid_fraction": 0.1, "test_fraction": 0.2},
    ),
    "ml-1m": DataSet(
        schema=parse_data_schema(
            {
                "task": "user_id",
                "label": "rating",
                "time": "timestamp",
                "item": "item_id",
                "categorical": ["user_id", "item_id", "gender", "age", "occupation", "zip", "release_year"],
                "multi": ["genre"],
                "item_statistics": True,
            }
        ),
        open=_ml_1m,
        files=("ratings.dat", "users.dat", "movies.dat"),
        origin=_GROUPLENS.format("ml-1m.zip"),
        settings={"task_split": "user", "valid_fraction": 0.1, "test_fraction": 0.2},
    ),
    "ml-1m-melu": DataSet(
        schema=parse_data_schema(
            {
                "task": "user_id",
                "label": "rating",
                "item": "item_id",
                "partition": "partition",
                "categorical": [
                    "user_id",
                    "item_id",
                    # Two films have no facts; their ratings are in no partition.
                    {"name": "rate", "nulls": "oov"},
                    {"name": "year", "nulls": "oov"},
                    "gender",
                    "age",
                    "occupation",
                    "zip",
                ],
                "multi": [{"name": name, "nulls": "oov"} for name in ("genre", "director", "actor")],
                "item_statistics": True,
            }
        ),
        open=_ml_1m_melu,
        files=("ratings.dat or ratings.csv", "users.dat", "movies_extrainfos.dat"),
        origin=_GROUPLENS.format("ml-1m.zip")
        + ", and put movies_extrainfos.dat of github.com/hoyeoplee/MeLU beside its files",
        settings={
            "task_split": "column",
            "partitions": {"item_cold": "train", "user_item_cold": "test"},
            "valid_fraction": 0.08,
            "split_query": "random",
            "query_size": 10,
            "min_task_rows": 13,
            "max_task_rows": 100,
        },
    ),
}
