"""Texts out of Parquet, CSV and .txt files, block by block."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from pathlib import Path

from gmeta.core.errors import nearest
from gmeta.data.sources import Connection, RawPart, database, find_files, identifier, open_files, reading, scalar

_BLOCK = 8192
_TEXT_TYPES = ("VARCHAR", "ENUM")


class TextFiles:
    """The files that hold texts; `blocks` reads them anew each time."""

    def __init__(self, inputs: Sequence[str], column: str | None) -> None:
        """Find the files and their column. Raises ValueError where one is missing, or is not text."""
        self._lines = sorted(path for text in inputs for path in _line_files(text))
        tables = [text for text in inputs if not _line_files(text)]
        with database() as con:
            found = open_files(con, find_files(tables))[0] if tables else []
        self._parts = [(part, _column_of(part, column)) for part in found]
        if column is not None and not found:
            raise ValueError(f"column is {column!r}: a .txt file has no columns, leave it out")

    def blocks(self) -> Iterator[list[str | None]]:
        """Yield the texts in blocks; None where a table has no value. Raises ValueError that names a file, and where
        possible the line, which cannot be read or is not UTF-8.
        """
        for path in self._lines:
            yield from _lines(path)
        for part, column in self._parts:
            query = f"SELECT CAST({identifier(column)} AS VARCHAR) FROM ({part.query})"
            with database() as con, reading(part.file):
                cursor = con.execute(query)
                while rows := cursor.fetchmany(_BLOCK):
                    yield [text for (text,) in rows]
                _refuse_rejects(con, part.file)


def _line_files(text: str) -> list[Path]:
    """Return the .txt files that an input names; none where it names others."""
    if not text.lower().endswith(".txt"):
        return []
    path = Path(text)
    found = [path] if path.is_file() else [Path(name) for name in glob.glob(text) if Path(name).is_file()]
    if not found:
        raise ValueError(f"texts {text} does not exist or matches no file")
    return found


def _lines(path: Path) -> Iterator[list[str | None]]:
    block: list[str | None] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.rstrip(b"\r\n").decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path} is not UTF-8 in line {number} ({error.reason} at byte {error.start}): convert it"
                ) from None
            block.append(text)
            if len(block) == _BLOCK:
                yield block
                block = []
    if block:
        yield block


def _column_of(part: RawPart, column: str | None) -> str:
    """Return the column of a file that holds the texts."""
    if column is None and len(part.columns) == 1:
        column = next(iter(part.columns))
    if column is None:
        raise ValueError(f"{part.file} has the columns {', '.join(part.columns)}: say with --column which holds texts")
    if column not in part.columns:
        raise ValueError(f"{part.file} has no column {column!r}: {nearest(column, part.columns)}")
    kind = part.columns[column]
    if not kind.startswith(_TEXT_TYPES) or kind.endswith("]"):
        raise ValueError(f"{part.file}: column {column} is {kind}: it must be text, one a row")
    return column


def _refuse_rejects(con: Connection, file: str) -> None:
    """Raise ValueError where DuckDB has set lines of a CSV file aside, and forget them."""
    if not scalar(con, "SELECT count(*) FROM duckdb_tables() WHERE table_name = 'reject_errors'"):
        return
    rejects = con.execute("SELECT line, error_message FROM reject_errors ORDER BY line LIMIT 1").fetchall()
    con.execute("DROP TABLE reject_errors; DROP TABLE reject_scans")
    if rejects:
        line, message = rejects[0]
        raise ValueError(f"{file} cannot be read in line {line} ({message.splitlines()[0]}): mend the line")
