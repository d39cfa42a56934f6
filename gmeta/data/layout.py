"""The files of a task pack: the arrays of a shard, and how a file is known to be the one that was written.

This module imports no torch, so that `gmeta prepare` need not: to import it takes two CPU seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash
from numpy.typing import NDArray

from gmeta.data.item_vectors import DTYPE, array_name
from gmeta.data.schema import PackSchema

CURE = "run `gmeta prepare` again, or restore the file"

Array = NDArray[Any]
SAFETENSORS_DTYPE = {"int64": "I64", "float32": "F32", "int32": "I32", "float16": "F16", "uint8": "U8"}
"""In the order in which a safetensors file stores them: the widest first, so that each starts aligned."""
CHUNK_BYTES = 1 << 20


def shard_layout(schema: PackSchema, rows: int, tasks: int) -> dict[str, tuple[str, tuple[int | None, ...]]]:
    """Return name -> (numpy dtype, shape) of every tensor of a shard; None is a length that the shard decides."""
    layout: dict[str, tuple[str, tuple[int | None, ...]]] = {
        "ids": ("int32", (rows, len(one_valued(schema)))),
        "dense": ("float32", (rows, len(schema.numeric))),
        "label": ("float32", (rows, len(schema.labels)) if schema.labels else (rows,)),
        "item_cold": ("uint8", (rows,)),
        "task_id": ("int64", (tasks,)),
        "row_start": ("int64", (tasks,)),
        "num_support": ("int32", (tasks,)),
    }
    if schema.time is not None:
        layout["time"] = ("int64", (rows,))
    if schema.weight is not None:
        layout["weight"] = ("float32", (rows,))
    layout |= {array_name(v.name): (DTYPE[v.dtype], (rows, v.dim)) for v in schema.vector if v.owner == "row"}
    for name, dtype in ragged(schema).items():
        layout[f"{name}.values"] = (dtype, (None,))
        layout[f"{name}.offsets"] = ("int64", (rows + 1,))
    return layout


def one_valued(schema: PackSchema) -> tuple[str, ...]:
    """Return the features that are columns of `ids`, in column order."""
    return tuple(f.name for f in schema.features if f.kind == "categorical")


def many_valued(schema: PackSchema) -> tuple[str, ...]:
    """Return the features that are stored as `<name>.values` and `<name>.offsets`."""
    return tuple(f.name for f in schema.features if f.kind != "categorical")


def ragged(schema: PackSchema) -> dict[str, str]:
    """Return name -> numpy dtype of what is stored as `<name>.values` and `<name>.offsets`: many-valued features, and
    numeric sequences.
    """
    return {**dict.fromkeys(many_valued(schema), "int32"), **{c.name: "float32" for c in schema.numeric_sequence}}


def checksum_file(path: Path) -> str:
    """Return the xxh3-64 of a file's bytes, as 16 hex digits."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def check_entry(entry: Mapping[str, Any]) -> None:
    """Raise ValueError unless a manifest entry names a file below the pack's folder, its size and its checksum."""
    file, size, checksum = entry["file"], entry["bytes"], entry["xxh3"]
    plain = isinstance(file, str) and "\\" not in file and "\0" not in file
    if not plain or not file or {"", ".", ".."} & set(file.split("/")):
        raise ValueError(f"it names the file {file!r}, which is no plain name in the pack")
    if type(size) is not int or size < 0 or not isinstance(checksum, str):
        raise ValueError(f"{file} has the size {size!r} and the checksum {checksum!r}")


def check_size(root: Path, entry: Mapping[str, Any], cure: str = CURE) -> Path:
    """Return the path of a manifest entry's file. Raises ValueError where it is missing or of another size."""
    path = root / str(entry["file"])
    if not path.is_file():
        raise ValueError(f"{path} is missing: {cure}")
    if path.stat().st_size != entry["bytes"]:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, the manifest says {entry['bytes']}: {cure}")
    return path


def verified_file(root: Path, entry: Mapping[str, Any], cure: str = CURE) -> Path:
    """Return the path of a manifest entry's file. Raises ValueError where its bytes are not those that were written."""
    path = check_size(root, entry, cure)
    if (found := checksum_file(path)) != entry["xxh3"]:
        raise ValueError(f"{path} is damaged (checksum {found}, the manifest says {entry['xxh3']}): {cure}")
    return path
