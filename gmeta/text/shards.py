"""The files of a behaviour store: shards of vectors, and the index over their keys.

A shard is one safetensors file, `keys.high` and `keys.low` (uint64 bits, sorted) beside `records`, one row of bytes a
text. Its name is a hash of its keys, so that writing it again gives the same file, and writers need no numbers. It
appears by a rename, whole and on the disk, and is never changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gmeta.core.files import replacing, sync
from gmeta.data.layout import Array
from gmeta.data.pack import save_file

VectorDtype = Literal["fp16", "int8"]
Words: TypeAlias = NDArray[np.uint64]
Keys: TypeAlias = tuple[Words, Words]
"""The high and the low words of 128-bit hashes, uint64 [n] each."""

SHARD_TEXTS = 1 << 18
"""Texts of a shard that `merge_shards` makes: 200 MB where a text has 384 numbers of two bytes."""
INDEX = "index.safetensors"
_SCALE_BYTES = 4
_LARGEST = 127


# ------------------------------------------------------------------------------------------------ records


def record_bytes(dtype: VectorDtype, vectors: int, dim: int) -> int:
    """Return the bytes of a text's record: fp16 numbers, or per vector a float32 scale, and after all scales int8."""
    return vectors * (2 * dim if dtype == "fp16" else _SCALE_BYTES + dim)


def pack_records(values: Tensor, dtype: VectorDtype) -> NDArray[np.uint8]:
    """Return the records of vectors: float32 [n, vectors, d] -> uint8 [n, bytes].

    int8 numbers are multiples of a scale, 1/127 of the vector's largest. Raises ValueError for numbers that are not
    finite, or beyond what fp16 holds.
    """
    finite = torch.isfinite(values).flatten(1).all(-1)
    if not bool(finite.all()):
        raise ValueError(
            f"the encoder gives no finite numbers for {int((~finite).sum())} texts: its weights are broken"
        )
    if dtype == "fp16":
        half = values.half()
        if not bool(torch.isfinite(half).all()):
            largest = float(values.abs().max())
            raise ValueError(f"a vector holds {largest:.3g}, more than fp16 can: store int8, whose scale is free")
        return half.flatten(1).contiguous().numpy().view(np.uint8)
    scale = values.abs().amax(-1) / _LARGEST
    whole = torch.round(values / torch.where(scale > 0, scale, 1.0)[..., None]).to(torch.int8)
    parts = (scale.numpy().view(np.uint8), whole.flatten(1).numpy().view(np.uint8))
    return np.concatenate(parts, axis=1)


def unpack_records(records: NDArray[np.uint8], dtype: VectorDtype, vectors: int, dim: int, to: torch.dtype) -> Tensor:
    """Return the vectors of records: uint8 [n, bytes] -> [n, vectors, d] of type `to`."""
    shape, raw = (len(records), vectors, dim), torch.from_numpy(records)
    if dtype == "fp16":
        return raw.view(torch.float16).view(shape).to(to)
    scale = raw[:, : vectors * _SCALE_BYTES].contiguous().view(torch.float32)
    whole = raw[:, vectors * _SCALE_BYTES :].view(torch.int8)
    return whole.float().view(shape).mul_(scale[..., None]).to(to)


# ------------------------------------------------------------------------------------------------- shards


@dataclass(frozen=True)
class VectorShard:
    """A mapped shard: its sorted keys, and records uint8 [n, bytes]; `checksum` is what was written."""

    path: Path
    high: Words
    low: Words
    records: NDArray[np.uint8]
    checksum: str

    def __len__(self) -> int:
        return len(self.high)


def write_shard(folder: Path, keys: Keys, records: NDArray[np.uint8], spec: str) -> Path:
    """Write a shard of texts whose keys are distinct, in any order, with the hash of what its vectors are; return its
    path.

    Raises ValueError for keys that are not distinct, and where the disk refuses; nothing is left then.
    """
    order = key_order(keys)
    high, low = keys[0][order], keys[1][order]
    if not _firsts(high, low).all():
        raise ValueError("a shard's texts must differ, and some are the same: give each once")
    records = np.ascontiguousarray(records[order])
    path = folder / f"{xxhash.xxh3_64_hexdigest(high.tobytes() + low.tobytes())}.safetensors"
    tensors: dict[str, Array] = {
        "keys.high": high.view(np.int64),
        "keys.low": low.view(np.int64),
        "records": records,
    }
    with replacing(path) as partial:
        save_file(tensors, partial, {"xxh3": _checksum(high, low, records), "spec": spec})
    sync(folder)
    return path


def map_shard(path: Path, num_bytes: int, spec: str) -> VectorShard:
    """Map a shard whose records have `num_bytes`. Raises ValueError where it is damaged, of another size, or written
    with another `spec`.
    """
    try:
        with safe_open(path, framework="pt") as file:
            high, low = (file.get_tensor(f"keys.{word}").numpy().view(np.uint64) for word in ("high", "low"))
            records = file.get_tensor("records").numpy()
            checksum, written = ((file.metadata() or {})[name] for name in ("xxh3", "spec"))
    except (SafetensorError, OSError, KeyError) as error:
        raise ValueError(_damaged(path, str(error))) from None
    if written != spec:
        raise ValueError(f"{path} is a shard of another store, whose vectors are others: move it away")
    if not len(high) == len(low) == len(records) or records.shape[1:] != (num_bytes,) or records.dtype != np.uint8:
        raise ValueError(_damaged(path, f"records are {records.shape}, expected ({len(high)}, {num_bytes})"))
    return VectorShard(path, high, low, records, checksum)


def shard_paths(folder: Path) -> list[Path]:
    """Return the shards of a folder by name; what is being written has a name with a dot before."""
    return sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("."))


def verify_shard(shard: VectorShard) -> None:
    """Raise ValueError unless the bytes of a shard are those that were written, and its keys rise."""
    if (found := _checksum(shard.high, shard.low, shard.records)) != shard.checksum:
        raise ValueError(_damaged(shard.path, f"checksum {found}, written as {shard.checksum}"))
    before, after = (shard.high[:-1], shard.low[:-1]), (shard.high[1:], shard.low[1:])
    if not ((before[0] < after[0]) | ((before[0] == after[0]) & (before[1] < after[1]))).all():
        raise ValueError(_damaged(shard.path, "its keys do not rise"))


def _damaged(path: Path, why: str) -> str:
    return f"{path} is damaged ({why}): remove it and run `gmeta embed` again, which encodes its texts anew"


def _checksum(*arrays: NDArray[np.uint64] | NDArray[np.uint8]) -> str:
    digest = xxhash.xxh3_64()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).view(np.uint8).reshape(-1).data)
    return digest.hexdigest()


def remove_partial_shards(folder: Path) -> int:
    """Remove what killed writers left in a folder, and return how many files that were. Only its one writer may."""
    left = list(folder.glob(".partial-*"))
    for path in left:
        path.unlink(missing_ok=True)
    return len(left)


def merge_shards(folder: Path, shards: Sequence[VectorShard], known: KeyIndex, spec: str) -> None:
    """Write the texts of `shards` that `known` lacks into shards of `SHARD_TEXTS`, then remove `shards`.

    A kill in between leaves some texts twice, with the same vectors: harmless, and mended by the next merge. Raises
    ValueError for a damaged shard, and merges none then: the new checksums would call its bytes sound.
    """
    for shard in shards:
        verify_shard(shard)
    high, low, shard_of, row_of = _joined(shards)
    order = key_order((high, low))
    order = order[_firsts(high[order], low[order])]
    order = order[known.find((high[order], low[order])) < 0]
    written = set()
    for start in range(0, len(order), SHARD_TEXTS):
        part = order[start : start + SHARD_TEXTS]
        records = np.empty((len(part), shards[0].records.shape[1]), np.uint8)
        for number, shard in enumerate(shards):
            here = shard_of[part] == number
            records[here] = shard.records[row_of[part[here]]]
        written.add(write_shard(folder, (high[part], low[part]), records, spec))
    for shard in shards:
        if shard.path not in written:
            shard.path.unlink(missing_ok=True)
    sync(folder)


# -------------------------------------------------------------------------------------------------- index


class KeyIndex:
    """Sorted keys, and the row that each stands for; a key that is there twice has its first row."""

    def __init__(self, keys: Keys, rows: NDArray[np.int64] | None = None) -> None:
        """Take keys that rise, and their rows; None where these are 0, 1, 2, …"""
        self.keys = keys
        self.rows = rows

    def __len__(self) -> int:
        return len(self.keys[0])

    def find(self, keys: Keys) -> NDArray[np.int64]:
        """Return the row of each key, int64 [n]; -1 where there is none."""
        high, low = self.keys
        found = np.full(len(keys[0]), -1, np.int64)
        place = np.searchsorted(high, keys[0])
        left = np.arange(len(place))
        while len(left):  # more than once only for keys that share their high word
            left = left[place[left] < len(high)]
            left = left[high[place[left]] == keys[0][left]]
            same = low[place[left]] == keys[1][left]
            hits = left[same]
            found[hits] = place[hits] if self.rows is None else self.rows[place[hits]]
            left = left[~same]
            place[left] += 1
        return found


def open_index(folder: Path, shards: Sequence[VectorShard]) -> KeyIndex:
    """Return the index over shards, whose rows count through them: mapped where the one that was written is of these
    shards, made in memory (24 bytes a text) otherwise.
    """
    if len(shards) == 1:
        return KeyIndex((shards[0].high, shards[0].low))
    path = folder / INDEX
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("shards") == _names(shards):
                high, low, rows = (file.get_tensor(name).numpy() for name in ("high", "low", "rows"))
                return KeyIndex((high.view(np.uint64), low.view(np.uint64)), rows)
    except (SafetensorError, OSError):
        pass  # not written yet, or damaged: it holds nothing that the shards do not
    return _merged_index(shards)


def write_index(folder: Path, shards: Sequence[VectorShard]) -> None:
    """Write the index over shards, where there are several: readers then map it. ValueError where the disk refuses."""
    if len(shards) < 2:
        (folder / INDEX).unlink(missing_ok=True)
        return
    made = _merged_index(shards)
    assert made.rows is not None
    high, low = (words.view(np.int64) for words in made.keys)
    with replacing(folder / INDEX) as partial:
        save_file({"high": high, "low": low, "rows": made.rows}, partial, {"shards": _names(shards)})


def verify_index(folder: Path, shards: Sequence[VectorShard], index: KeyIndex) -> None:
    """Raise ValueError unless an index is the one over these shards."""
    if index.rows is None:
        return  # it is the keys of the one shard
    made = _merged_index(shards)
    assert made.rows is not None
    ours, theirs = (*index.keys, index.rows), (*made.keys, made.rows)
    if not all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True)):
        raise ValueError(f"{folder / INDEX} is damaged: remove it, `gmeta embed compact` writes it anew")


def key_order(keys: Keys) -> NDArray[np.int64]:
    """Return the order in which keys rise; equal ones keep theirs."""
    order: NDArray[np.int64] = np.lexsort((keys[1], keys[0]))
    return order


def _merged_index(shards: Sequence[VectorShard]) -> KeyIndex:
    high, low, shard_of, row_of = _joined(shards)
    order = key_order((high, low))
    order = order[_firsts(high[order], low[order])]
    rows = (np.cumsum([0, *map(len, shards)])[shard_of] + row_of)[order]
    return KeyIndex((high[order], low[order]), rows)


def _joined(shards: Sequence[VectorShard]) -> tuple[Words, Words, NDArray[np.int64], NDArray[np.int64]]:
    """Return the keys of all shards, and of each the number of its shard and its row there."""
    sizes = [len(shard) for shard in shards]
    empty = [np.empty(0, np.uint64)]
    high = np.concatenate([*empty, *(shard.high for shard in shards)])
    low = np.concatenate([*empty, *(shard.low for shard in shards)])
    shard_of = np.repeat(np.arange(len(shards)), sizes)
    row_of = np.concatenate([np.empty(0, np.int64), *(np.arange(size) for size in sizes)])
    return high, low, shard_of, row_of


def _firsts(high: Words, low: Words) -> NDArray[np.bool_]:
    """Return which of sorted keys differ from the one before."""
    return np.append(True, (high[1:] != high[:-1]) | (low[1:] != low[:-1]))[: len(high)]


def _names(shards: Sequence[VectorShard]) -> str:
    return xxhash.xxh3_64_hexdigest(" ".join(f"{shard.path.name} {len(shard)}" for shard in shards).encode())
