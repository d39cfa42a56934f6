"""Raw rows from Parquet and CSV files, as SQL that DuckDB runs.

A `RawPart` is the SQL of one file. Its column `__row` is the row's number in the file (from 1, a CSV header not
counted); the other columns are the file's own and those that its folders name (`day=2024-11-03/part-0.parquet`). Named
data sets, whose rows come from several files, are in `gmeta/data/datasets`.
"""

from __future__ import annotations

import csv
import glob
import gzip
import io
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import unquote

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

Connection: TypeAlias = duckdb.DuckDBPyConnection

PARQUET = (".parquet", ".pq")
CSV = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
DELIMITERS = ",\t;|"
RESERVED = ("__row", "__problem", "file_row_number")
"""Columns that reading and staging add: DuckDB would take a file's own column of the name, in any case, for ours."""
NO_VALUE = "__HIVE_DEFAULT_PARTITION__"
"""What Hive and Spark call the folder of the rows whose partition column is missing."""


@dataclass(frozen=True)
class RawPart:
    """The raw rows of one file, or of one named data set."""

    file: str  # as told to the user
    query: str  # SQL
    columns: dict[str, str]  # name -> DuckDB type
    ordered: bool  # rows are numbered as they are read, so they must be read in order


def database(file: str | Path = ":memory:", **settings: Any) -> Connection:
    """Open a database. DuckDB would draw bars on stderr where it takes a process for an interactive one, as it does
    every spawned one.
    """
    con = duckdb.connect(file, config=settings)
    con.execute("SET enable_progress_bar = false")
    return con


def identifier(name: str) -> str:
    """Quote `name` as a SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """Quote `text` as a SQL string."""
    return "'" + text.replace("'", "''") + "'"


def only_file(path: Path) -> str:
    """Quote the path of one file that DuckDB is to read.

    DuckDB takes the paths that it reads for patterns: `a[1].csv` would be `a1.csv`. The paths that it writes
    (COPY … TO), and those that pyarrow reads, are taken as they are. Raises ValueError for a pattern's characters
    beside a backslash, which would part folders.
    """
    pattern = glob.escape(str(path))
    if pattern != str(path) and "\\" in pattern:
        raise ValueError(f"{path} has a backslash and one of *?[ in its name, which cannot be read together: rename it")
    return literal(pattern)


def md5_64(*parts: str) -> str:
    """Return SQL for a 64-bit hash of the joined SQL strings. MD5 gives the same numbers in any engine and version."""
    return f"md5_number_lower(concat_ws('|', {', '.join(parts)}))"


def confine(con: Connection, paths: Iterable[Path], folders: Iterable[Path] = ()) -> None:
    """Let a connection touch these files, and what is in these folders, alone from here on; nothing can take that back.

    What it is told next depends on files that may come from anyone, such as a run's schema.json.
    """
    # DuckDB compares a path before it takes it for a pattern, and after.
    known = {text for path in paths for text in (str(path), glob.escape(str(path)))}
    con.execute(f"SET allowed_paths = [{', '.join(map(literal, sorted(known)))}]")
    con.execute(f"SET allowed_directories = [{', '.join(literal(str(folder)) for folder in folders)}]")
    con.execute("SET enable_external_access = false")


def scalar(con: Connection, query: str) -> Any:
    """Run `query` and return its one value. (A result that is not fetched to its end blocks the connection.)"""
    ((value,),) = con.execute(query).fetchall()
    return value


@contextmanager
def in_order(con: Connection) -> Iterator[None]:
    """Have DuckDB keep the order of rows, which takes memory, in what runs meanwhile."""
    con.execute("SET preserve_insertion_order=true")
    yield
    con.execute("SET preserve_insertion_order=false")


# ------------------------------------------------------------------------------------------------- files


def find_files(inputs: Iterable[str]) -> list[Path]:
    """Find the files that `inputs` (files, directories, globs) stand for, sorted.

    What exists under its literal name is no pattern, brackets and stars or not. Raises ValueError for what matches
    nothing, and for a file that is neither Parquet nor CSV by its name.
    """
    found: set[Path] = set()
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            files = _data_below(path)
            if not files:
                raise ValueError(f"input {text} is a directory without Parquet or CSV files")
        else:
            files = [path] if path.is_file() else _matches(path)
            if not files:
                hint = "; in a pattern, a bracket that belongs to the name is written [[]" if "[" in text else ""
                raise ValueError(f"input {text} does not exist or matches no file{hint}")
        found.update(files)
    odd = sorted(p for p in found if not p.name.lower().endswith(PARQUET + CSV))
    if odd:
        raise ValueError(
            f"input {odd[0]} is neither Parquet nor CSV by its name: it must end in {', '.join(PARQUET + CSV)}"
        )
    return sorted(found)


def _data_below(directory: Path) -> list[Path]:
    """Find the data files below a directory: as for other readers, no name on the way may begin with _ or a dot."""
    below = (path for path in directory.rglob("*") if path.is_file() and path.name.lower().endswith(PARQUET + CSV))
    return [p for p in below if not any(part.startswith(("_", ".")) for part in p.relative_to(directory).parts)]


def _matches(pattern: Path) -> list[Path]:
    """Find the files that match a pattern, or else the data files below the directories that match it.

    The pattern begins after the directories that exist under their literal names. As below a directory, names that
    begin with _ are left out, unless the pattern has such a name itself; a star matches no dot at the beginning.
    """
    known, wild = Path(), list(pattern.parts)
    while wild and (known / wild[0]).exists():
        known /= wild.pop(0)
    found = [Path(p) for p in glob.glob(str(Path(glob.escape(str(known)), *wild)), recursive=True)]
    if not any(part.startswith("_") for part in wild):
        found = [path for path in found if not any(part.startswith("_") for part in path.relative_to(known).parts)]
    files = [path for path in found if path.is_file()]
    folders = [path for path in found if path.is_dir() and not path.name.startswith(("_", "."))]
    return files or [file for folder in folders for file in _data_below(folder)]


def open_files(con: Connection, paths: Sequence[Path]) -> tuple[list[RawPart], list[Path]]:
    """Open the files of one input. Returns their rows, and the files that are empty, which have none.

    Raises ValueError where all are empty, and as `open_file` does.
    """
    empty = {path for path in paths if _is_empty(path)}
    if len(empty) == len(paths):
        which = (
            f"{paths[0]} is empty" if len(paths) == 1 else f"all of its {len(paths)} files are empty, {paths[0]} first"
        )
        raise ValueError(f"the input has no rows: {which}")
    return [open_file(con, path) for path in paths if path not in empty], sorted(empty)


def open_file(con: Connection, path: Path) -> RawPart:
    """Open a Parquet or CSV file as raw rows.

    The columns that the folders above it name (`key=value`, as Hive and Spark write them) are text columns beside its
    own; where the file has a column of that name, the file's is taken. Raises ValueError for a file that is empty or
    cannot be read, and where the names of columns clash.
    """
    if _is_empty(path):
        raise ValueError(f"{path} is empty: it has neither rows nor names of columns")
    is_parquet = path.name.lower().endswith(PARQUET)
    names, columns, source = _parquet(path) if is_parquet else _csv(path)
    _require_distinct(names, path)
    own = {name.lower() for name in names}
    in_path = {name: value for name, value in partition_columns(path).items() if name.lower() not in own}
    require_free([*names, *in_path], RESERVED, path)
    select = [*columns, *(f"CAST({_value(value)} AS VARCHAR) AS {identifier(n)}" for n, value in in_path.items())]
    return described(con, str(path), f"SELECT {', '.join(select)} FROM {source}", ordered=not is_parquet)


def described(con: Connection, file: str, query: str, *, ordered: bool) -> RawPart:
    """Make the `RawPart` of a query; DuckDB tells its columns."""
    columns = con.execute(f"DESCRIBE {query}").fetchall()
    return RawPart(file, query, {name: kind for name, kind, *_ in columns if name != "__row"}, ordered)


@contextmanager
def reading(file: str) -> Iterator[None]:
    """Turn what DuckDB cannot read of a file into a ValueError that names the file."""
    try:
        yield
    except duckdb.Error as error:
        if not (is_damage(error) or isinstance(error, duckdb.ConversionException)):
            raise
        text = not file.lower().endswith(PARQUET)
        cure = "write it again" + (", with line ends of one kind and every quote closed" if text else "")
        raise ValueError(f"{file} cannot be read ({str(error).splitlines()[0]}): {cure}") from error


def is_damage(error: duckdb.Error) -> bool:
    """Tell whether DuckDB could not read its input. For most faults of a Parquet page it has no class of error."""
    known = isinstance(error, duckdb.InvalidInputException | duckdb.IOException) and not is_full_disk(error)
    return known or type(error) is duckdb.Error


def is_full_disk(error: duckdb.Error) -> bool:
    """Tell whether DuckDB had no space to write."""
    signs = ("max_temp_directory_size", "No space left", "File too large", "Disk quota")
    return any(sign in str(error) for sign in signs)


def partition_columns(path: Path) -> dict[str, str | None]:
    """Read the columns that the folders directly above a file name (`day=2024-11-03`), the outermost first.

    Names and values are percent-decoded; a value is None where it is missing. Of two folders with one name the inner
    one counts.
    """
    found: dict[str, str | None] = {}
    for folder in path.absolute().parents:
        name, equals, value = folder.name.partition("=")
        if not (name and equals):
            break
        found.setdefault(unquote(name), None if value == NO_VALUE else unquote(value))
    return dict(reversed(found.items()))


def _value(text: str | None) -> str:
    return "NULL" if text is None else literal(text)


def _is_empty(path: Path) -> bool:
    """Tell whether a file has no content: no byte, or for CSV nothing after decompression but a byte order mark."""
    if path.name.lower().endswith(PARQUET):
        return path.stat().st_size == 0
    return _first_line(path) == ""


def _first_line(path: Path) -> str:
    """Read a CSV file's first line, up to CR, LF or CR LF, which it keeps; empty where the file is."""
    try:
        # Latin-1 decodes any bytes: those of later lines, which are read along, may be broken.
        with (
            gzip.open(path) if path.suffix == ".gz" else path.open("rb") as binary,
            io.TextIOWrapper(binary, "latin-1", newline="") as text,
        ):
            line = text.readline()
        return line.encode("latin-1").decode("utf-8-sig")
    except (UnicodeDecodeError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is no readable UTF-8 CSV file ({error}): convert it") from None


def _require_whole(path: Path) -> None:
    """Raise ValueError for a damaged gzip file: DuckDB takes the damage for its end and checks no sum."""
    try:
        with gzip.open(path) as content:
            while content.read(1 << 20):
                pass
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}): compress it again") from None


def _parquet(path: Path) -> tuple[list[str], list[str], str]:
    """Return a Parquet file's column names, the SQL of its columns with `__row`, and the SQL that reads it."""
    try:
        names = pq.read_schema(path).names
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is no readable Parquet file ({error}): write it again") from None
    source = f"read_parquet({only_file(path)}, file_row_number=true, hive_partitioning=false)"
    return names, ["file_row_number + 1 AS __row", "* EXCLUDE (file_row_number)"], source


def _csv(path: Path) -> tuple[list[str], list[str], str]:
    """Return a CSV file's column names, the SQL of its columns with `__row`, and the SQL that reads it.

    Columns without a name get the one that pandas gives them, `Unnamed: 0` for the first: an index that was written
    along, or what follows a last comma.
    """
    header = _first_line(path).rstrip("\r\n")
    if path.suffix == ".gz":
        _require_whole(path)
    try:
        rows = {d: next(csv.reader(io.StringIO(header), delimiter=d), []) for d in DELIMITERS}
    except csv.Error as error:
        raise ValueError(f"{path} has a first line that names no columns ({error}): write it again") from None
    delimiter = max(DELIMITERS, key=lambda d: len(rows[d]))
    names = [name or f"Unnamed: {place}" for place, name in enumerate(rows[delimiter])]
    if not names:
        raise ValueError(f"{path} has an empty first line: it must name the columns")
    return names, ["row_number() OVER () AS __row", "*"], read_csv(path, names, delimiter, header=True)


def read_csv(path: Path, names: Iterable[str], delimiter: str, *, header: bool, quote: str = '"') -> str:
    """Return SQL that reads a CSV file as text. Nothing is guessed; broken lines go to table `reject_errors`."""
    compression = "gzip" if path.suffix == ".gz" else "none"
    columns = ", ".join(f"{literal(n)}: 'VARCHAR'" for n in dict.fromkeys(names))
    return (
        f"read_csv({only_file(path)}, auto_detect=false, columns={{{columns}}}, delim={literal(delimiter)}, "
        f"quote={literal(quote)}, escape={literal(quote)}, header={str(header).lower()}, store_rejects=true, "
        f"compression={literal(compression)}, hive_partitioning=false)"
    )


def numbered(source: str) -> str:
    """Return SQL of the rows of `source` with their number as `__row`; they must be read in order."""
    return f"SELECT row_number() OVER () AS __row, * FROM {source}"


def _require_distinct(names: list[str], path: Path) -> None:
    seen: dict[str, str] = {}
    for name in names:
        # DuckDB's names are case-insensitive.
        if name.lower() in seen:
            raise ValueError(f"{path} has two columns called {seen[name.lower()]!r} and {name!r}: rename one")
        seen[name.lower()] = name


def require_free(names: Iterable[str], ours: Iterable[str], path: Path) -> None:
    """Raise ValueError where a column has, in any case, the name of one that is to be added."""
    taken = {name.lower(): name for name in names}
    for name in ours:
        if name in taken:
            raise ValueError(f"{path} has a column {taken[name]!r}, a name that gmeta uses itself: rename the column")
