"""The texts of a pack by id. A feature of texts has an id in each row, and its table has the texts beside it.

The vocabulary of such a table is its first texts: ids below `num_ids`, which have embedding rows. All other texts that
rows of any split have follow, up to `num_texts`; these ids mean something in one pack alone, and
`vocab/<table>+texts.parquet` lists them. They lie beside the vocabularies, so that what copies and verifies these takes
them along.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload
from urllib.parse import quote

import pyarrow as pa

from gmeta.data.identity import vocabulary_file, vocabulary_values
from gmeta.data.schema import PackSchema

_CURE = "copy it again from the pack, or prepare the pack again"


def further_texts_file(directory: Path, table: str) -> Path:
    """Return where a directory of vocabularies holds the texts of a table that are not in its vocabulary."""
    return directory / f"{quote(table, safe='')}+texts.parquet"  # no table's own file: its name would have no plus


class TextTable(Sequence[str]):
    """The texts of one table by id. Position 0, and ids that stand for nothing any more, have the empty text.

    Its files are opened, and with `verify` verified, when a text is first asked for.
    """

    def __init__(self, directory: Path, table: str, num_ids: int, num_texts: int, verify: Mapping[str, Any]) -> None:
        self._directory, self._table, self._sizes = directory, table, (num_ids, num_texts)
        self._verify = verify
        self._values: pa.Array | None = None

    def __len__(self) -> int:
        return self._sizes[1]

    @overload
    def __getitem__(self, position: int) -> str: ...
    @overload
    def __getitem__(self, position: slice) -> list[str]: ...
    def __getitem__(self, position: int | slice) -> str | list[str]:
        found = self._texts()[position]
        return [text or "" for text in found.to_pylist()] if isinstance(position, slice) else found.as_py() or ""

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), 1 << 16):
            yield from self[start : start + (1 << 16)]

    def _texts(self) -> pa.Array:
        """Return all texts. ValueError where a file is missing, damaged, or of another size."""
        if self._values is None:
            num_ids, num_texts = self._sizes
            files = [vocabulary_file(self._directory, self._table)]
            files += [further_texts_file(self._directory, self._table)] * (num_texts > num_ids)
            parts = [pa.array([""], pa.large_string())]
            for file, size in zip(files, (num_ids - 1, num_texts - num_ids), strict=False):
                if file.name in self._verify:
                    self._verify[file.name]()
                parts.append(vocabulary_values(file, _CURE).cast(pa.large_string()))
                if len(parts[-1]) != size:
                    raise ValueError(f"{file} holds {len(parts[-1]):,} texts, the schema says {size:,}: {_CURE}")
            self._values = pa.concat_arrays(parts)
        return self._values


def open_text_tables(
    directory: Path, schema: PackSchema, verify: Mapping[str, Any] | None = None
) -> dict[str, TextTable]:
    """Return the texts of each table of texts, from a directory of vocabularies. `verify[file name]` verifies one."""
    return {
        f.table: TextTable(directory, f.table, f.num_ids, f.num_texts, verify or {})
        for f in schema.features
        if f.num_texts is not None
    }
