"""MovieLens: GroupLens' ratings of films by users, in the three forms that papers use.

`ml-100k` reads RecBole's files, `ml-1m` GroupLens' own, and `ml-1m-melu` has the cold and warm partitions of MeLU
(Lee et al., KDD 2019).
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from gmeta.data.datasets.dataset import DataSet
from gmeta.data.schema import parse_data_schema
from gmeta.data.sources import Connection, RawPart, described, literal, md5_64, numbered, read_csv

NEW_USER_FRACTION = 0.2
"""MeLU's fraction of new users: 1,208 of 6,040."""
_GROUPLENS = "Download {} from https://grouplens.org/datasets/movielens/ and unpack it there"
_RATINGS = ("user_id", "item_id", "rating", "timestamp")
_USERS = ("user_id", "gender", "age", "occupation", "zip")


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
        FROM ({numbered(read("inter"))}) r
        LEFT JOIN {read("user")} u USING (user_id) LEFT JOIN {read("item")} i USING (item_id)"""
    return described(con, str(root / "ml-100k.inter"), query, ordered=True)


ML_100K = DataSet(
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
    settings={"task_split": "user", "valid_fraction": 0.1, "test_fraction": 0.2, "min_task_rows": 2},
)


def _ml_1m(con: Connection, root: Path) -> RawPart:
    _register(con, "ml_users", root / "users.dat", _USERS)
    _register(con, "ml_movies", root / "movies.dat", ("item_id", "title", "genres"))
    ratings = numbered(read_csv(root / "ratings.dat", _RATINGS, "::", header=False, quote=""))
    query = f"""
        SELECT r.__row, r.user_id, r.item_id, r.rating, r.timestamp, u.gender, u.age, u.occupation,
               left(u.zip, 3) AS zip, regexp_extract(m.title, '\\((\\d{{4}})\\)\\s*$', 1) AS release_year,
               string_split(m.genres, '|') AS genre
        FROM ({ratings}) r LEFT JOIN ml_users u USING (user_id) LEFT JOIN ml_movies m USING (item_id)"""
    return described(con, str(root / "ratings.dat"), query, ordered=True)


ML_1M = DataSet(
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
    settings={"task_split": "user", "valid_fraction": 0.1, "test_fraction": 0.2, "min_task_rows": 2},
)


def _ml_1m_melu(con: Connection, root: Path) -> RawPart:
    facts = ("item_id", "title", "year", "rate", "released", "genre", "director", "writer", "actor")
    _register(con, "ml_users", root / "users.dat", _USERS)
    _register(con, "ml_facts", root / "movies_extrainfos.dat", facts)
    file = root / "ratings.csv"
    if file.is_file():
        ratings = numbered(read_csv(file, ("user_id", "item_id", "rating", "partition"), ",", header=True))
    else:
        file = root / "ratings.dat"
        ratings = _melu_partition(numbered(read_csv(file, _RATINGS, "::", header=False, quote="")))

    def names(column: str) -> str:
        return f"list_filter(string_split({column}, ', '), lambda x: x NOT IN ('', 'N/A'))"

    query = f"""
        SELECT r.__row, r.user_id, r.item_id, r.rating, r.partition, u.gender, u.age, u.occupation,
               left(u.zip, 5) AS zip, f.year, f.rate,
               {names("f.genre")} AS genre, {names("f.director")} AS director, {names("f.actor")} AS actor
        FROM ({ratings}) r LEFT JOIN ml_users u USING (user_id) LEFT JOIN ml_facts f USING (item_id)"""
    return described(con, str(file), query, ordered=True)


def _melu_partition(ratings: str) -> str:
    """Return MeLU's partitions: films of 1998 to 2000 are cold; a fifth of the users is new.

    MeLU drew its new users at random and kept no list, so ours (by a fixed hash) are as many but not the same.
    """
    order = f"ORDER BY {md5_64(literal('melu'), 'user_id')}, user_id"
    new = f"row_number() OVER ({order}) <= round({NEW_USER_FRACTION} * count(*) OVER ())"
    users = f"SELECT user_id, {new} AS new FROM ml_users"
    return f"""
        SELECT r.*, CASE WHEN f.item_id IS NULL THEN 'no_film_facts'
                         WHEN CAST(f.year AS INTEGER) >= 1998 THEN if(n.new, 'user_item_cold', 'item_cold')
                         ELSE if(n.new, 'user_cold', 'warm') END AS partition
        FROM ({ratings}) r LEFT JOIN ({users}) n USING (user_id) LEFT JOIN ml_facts f USING (item_id)"""


ML_1M_MELU = DataSet(
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
)


def _register(con: Connection, name: str, path: Path, columns: tuple[str, ...]) -> None:
    """Register a small `::`-separated file, UTF-8 or Latin-1, as view `name`. Further fields of a line are ignored."""
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
