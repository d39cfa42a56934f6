"""The texts of a pack by id. A feature of texts has an id in each row, and its table has the texts beside it.

The vocabulary of such a table is its first texts: ids below `num_ids`, which have embedding rows. All other texts that
rows of any split have follow, up to `num_texts`; these ids mean something in one pack alone, and
`vocab/<table>+texts.parquet` lists them. They lie beside the vocabularies, so that what copies and verifies these takes
them along.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, overload
from urllib.parse import quote

import pyarrow as pa
import pyarrow.compute as pc

from gmeta.data.identity import vocabulary_file, vocabulary_values
from gmeta.data.schema import Feature, PackSchema

_PIECE = 1 << 16
_CURE = "copy it again from the pack, or prepare the pack again"


def further_texts_file(directory: Path, table: str) -> Path:
    """Return where a directory of vocabularies holds the texts of a table that are not in its vocabulary."""
    return directory / f"{quote(table, safe='')}+texts.parquet"  # no table's own file: its name would have no plus


class TextTable(Sequence[str]):
    """The texts of one table by id. Position 0, and ids that stand for nothing any more, have the empty text.

    `read` gives them as an Arrow array of so many, when a text is first asked for.
    """

    def __init__(self, num_texts: int, read: Callable[[], pa.Array]) -> None:
        self._num_texts, self._read = num_texts, read
        self._values: pa.Array | None = None

    def __len__(self) -> int:
        return self._num_texts

    @overload
    def __getitem__(self, position: int) -> str: ...
    @overload
    def __getitem__(self, position: slice) -> list[str]: ...
    def __getitem__(self, position: int | slice) -> str | list[str]:
        found = self.values()[position]
        return [text or "" for text in found.to_pylist()] if isinstance(position, slice) else found.as_py() or ""

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _PIECE):
            yield from self[start : start + _PIECE]

    def values(self) -> pa.Array:
        """Return all texts, NULL for ids that stand for nothing. ValueError where a file is missing or damaged."""
        if self._values is None:
            self._values = self._read()
        return self._values

    def followed_by(self, older: TextTable, num_ids: int) -> TextTable:
        """Return these texts, and behind them those of an older pack from id `num_ids` on, which its vocabulary lacks.
        The ids before mean the same in both, but for those that stand for nothing any more: they have the older texts.
        """

        def read() -> pa.Array:
            ours, theirs = self.values(), older.values()
            head = pc.coalesce(ours.slice(0, num_ids), theirs.slice(0, num_ids))
            return pa.concat_arrays([head, ours.slice(num_ids), theirs.slice(num_ids)])

        return TextTable(len(self) + len(older) - num_ids, read)


def _read_texts(directory: Path, feature: Feature, verify: Mapping[str, Any]) -> pa.Array:
    """Return the texts of a feature's table. ValueError where a file is missing, damaged, or of another size."""
    num_ids, num_texts = feature.num_ids, feature.num_texts or 0
    files = [vocabulary_file(directory, feature.table)]
    files += [further_texts_file(directory, feature.table)] * (num_texts > num_ids)
    parts = [pa.array([""], pa.large_string())]
    for file, size in zip(files, (num_ids - 1, num_texts - num_ids), strict=False):
        if file.name in verify:
            verify[file.name]()
        parts.append(vocabulary_values(file, _CURE).cast(pa.large_string()))
        if len(parts[-1]) != size:
            raise ValueError(f"{file} holds {len(parts[-1]):,} texts, the schema says {size:,}: {_CURE}")
    return pa.concat_arrays(parts)


def open_text_tables(
    directory: Path, schema: PackSchema, verify: Mapping[str, Any] | None = None
) -> dict[str, TextTable]:
    """Return the texts of each table of texts, from a directory of vocabularies. `verify[file name]` verifies one."""
    return {
        f.table: TextTable(f.num_texts, partial(_read_texts, directory, f, verify or {}))
        for f in schema.features
        if f.num_texts is not None
    }
