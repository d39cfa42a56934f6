"""The behaviour store: what `low` makes of short texts, each encoded once, on disk, mapped, and read by row.

`open_behaviours` reads one and `writing_store` appends to one; docs/text.md has the format. A store holds vectors of
one encoder, split, pooling and template: its `StoreSpec`, which is part of every key, so that none can be mixed up.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from gmeta.core.errors import require
from gmeta.core.files import make_folder, only_writer, read_mapping, write_text
from gmeta.data.pack import manifest_checksum
from gmeta.text.encoder import MAX_VECTORS, POOLINGS, TextEncoder, TextPooling
from gmeta.text.folder import require_unicode
from gmeta.text.shards import (
    INDEX,
    SHARD_TEXTS,
    Keys,
    VectorDtype,
    VectorShard,
    map_shard,
    merge_shards,
    open_index,
    pack_records,
    record_bytes,
    remove_partial_shards,
    shard_paths,
    unpack_records,
    verify_index,
    verify_shard,
    write_index,
    write_shard,
)

FORMAT = "gmeta-behaviour-store"
VERSION = 2
PLACEHOLDER = "{text}"
_MANIFEST = "manifest.json"
_SHARDS = "shards"
_LOCK = "lock"
_OURS = {_SHARDS, _LOCK, INDEX}


@dataclass(frozen=True, kw_only=True)
class StoreSpec:
    """What the vectors of a store are: whose, of which layer, pooled how, from which text, kept how."""

    encoder: str
    """Digest of the encoder: weights, config and tokenizer."""
    layers: int
    """Layers of the encoder below the split."""
    pooling: TextPooling
    vectors: int
    """Vectors of a text, from equal segments of it."""
    template: str
    """What is encoded, with {text} where the text goes."""
    max_tokens: int
    """Tokens that a text is cut at."""
    precision: str
    """What the encoder computed in: bfloat16, float32 or float64."""
    dtype: VectorDtype
    dim: int

    def __post_init__(self) -> None:
        for key, least in (("layers", 0), ("vectors", 1), ("max_tokens", 1), ("dim", 1)):
            value = getattr(self, key)
            require(type(value) is int and value >= least, key, value, f"must be a whole number of at least {least}")
        require(self.vectors <= MAX_VECTORS, "vectors", self.vectors, f"must be at most {MAX_VECTORS}")
        require(self.pooling in POOLINGS, "pooling", self.pooling, f"must be one of {', '.join(POOLINGS)}")
        known = ("bfloat16", "float32", "float64")
        require(self.precision in known, "precision", self.precision, f"must be one of {', '.join(known)}")
        require(self.dtype in ("fp16", "int8"), "dtype", self.dtype, "must be fp16 or int8")
        require_template(self.template)

    def prefix(self) -> bytes:
        """Return 16 bytes for all that makes a vector what it is, besides its text; how it is kept is no part."""
        what = {key: value for key, value in asdict(self).items() if key != "dtype"}
        return xxhash.xxh3_128_digest(json.dumps(what, sort_keys=True).encode())

    def differences(self, asked: StoreSpec) -> list[str]:
        """Return a line for each field in which this is not what is asked for."""
        ours, theirs = asdict(self), asdict(asked)
        return [f"{key} {ours[key]!r}, not {theirs[key]!r}" for key in ours if ours[key] != theirs[key]]


def require_template(template: str) -> None:
    """Raise ValueError unless a template has one place for the text."""
    ok = isinstance(template, str) and template.count(PLACEHOLDER) == 1
    require(ok, "template", template, f"must hold {PLACEHOLDER} once, such as 'Title: {PLACEHOLDER}'")


def render(template: str, text: str) -> str:
    """Return what is encoded for a text; braces in the text stay as they are."""
    return template.replace(PLACEHOLDER, text)


def spec_of(
    encoder: TextEncoder,
    *,
    pooling: TextPooling = "mean",
    vectors: int = 1,
    template: str = PLACEHOLDER,
    max_tokens: int = 128,
    dtype: VectorDtype = "fp16",
) -> StoreSpec:
    """Return what a store of this encoder's vectors is; a text has at most as many tokens as the encoder has."""
    return StoreSpec(
        encoder=encoder.digest,
        layers=encoder.layers,
        pooling=pooling,
        vectors=vectors,
        template=template,
        max_tokens=min(max_tokens, encoder.max_tokens),
        precision=str(next(encoder.low.parameters()).dtype).removeprefix("torch."),
        dtype=dtype,
        dim=encoder.dim,
    )


class BehaviourStore:
    """An open store, as it was when it was opened: texts -> rows -> vectors, without a copy in memory.

    Rows count through the shards; they hold for this object alone, since another opening may find more shards.
    """

    def __init__(self, folder: Path, spec: StoreSpec, shards: Sequence[VectorShard]) -> None:
        self.folder = folder
        self.spec = spec
        self.shards = tuple(shards)
        self.index = open_index(folder, self.shards)
        self._prefix = spec.prefix()
        self._starts = np.cumsum([0, *map(len, self.shards)])

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self.index)

    def keys(self, texts: Sequence[str]) -> Keys:
        """Return the keys of texts in this store. Raises ValueError for one that is no Unicode."""
        return text_keys(self.spec, texts)

    def find(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Return the row of each text, int64 [n]; -1 where it is not in the store."""
        return self.index.find(self.keys(texts))

    def rows(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Return the row of each text, int64 [n]. Raises ValueError, naming the first, where texts are missing."""
        found = self.find(texts)
        if (missing := np.flatnonzero(found < 0)).size:
            raise ValueError(
                f"{self.folder} lacks {missing.size} of {len(texts)} texts, the first is {texts[missing[0]]!r}: encode "
                "them with `gmeta embed`, with the settings of this store"
            )
        return found

    def read(self, rows: NDArray[np.int64] | Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the vectors of rows: int64 of any shape [...] -> [..., vectors, d], copied out of the files.

        float16 from an fp16 store takes no conversion. Raises ValueError for a row that is not there, such as -1.
        """
        wanted = rows.cpu().numpy() if isinstance(rows, Tensor) else np.asarray(rows)
        flat = wanted.reshape(-1)
        if not flat.size:
            return torch.empty(*wanted.shape, self.spec.vectors, self.spec.dim, dtype=dtype)
        if not (flat.min() >= 0 and flat.max() < self._starts[-1]):
            raise ValueError(f"rows must be in [0, {self._starts[-1]}), found {flat.min()} to {flat.max()}")
        records = self._records(flat)
        found = unpack_records(records, self.spec.dtype, self.spec.vectors, self.spec.dim, dtype)
        return found.view(*wanted.shape, self.spec.vectors, self.spec.dim)

    def _records(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        if len(self.shards) == 1:
            return np.take(self.shards[0].records, rows, axis=0)
        num_bytes = record_bytes(self.spec.dtype, self.spec.vectors, self.spec.dim)
        order = np.argsort(rows)
        ordered = rows[order]
        bounds = np.searchsorted(ordered, self._starts)
        sorted_records = np.empty((len(rows), num_bytes), np.uint8)
        for number, (start, end) in enumerate(pairwise(bounds)):
            if start < end:
                inside = ordered[start:end] - self._starts[number]
                # Without a check of its own numpy writes where it is told; rows were checked before.
                np.take(self.shards[number].records, inside, axis=0, out=sorted_records[start:end], mode="clip")
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        return np.take(sorted_records, place, axis=0)

    def require(self, asked: StoreSpec) -> None:
        """Raise ValueError, naming what differs, unless this store holds what is asked for."""
        if found := self.spec.differences(asked):
            raise ValueError(
                f"{self.folder} is a store of other vectors ({'; '.join(found)}): name another store, or the settings "
                "of this one" + (", or restore the encoder's folder" if self.spec.encoder != asked.encoder else "")
            )

    def verify(self) -> None:
        """Read every byte. Raises ValueError that names what is damaged."""
        for shard in self.shards:
            verify_shard(shard)
            for start in range(0, len(shard), SHARD_TEXTS // 16):
                part = shard.records[start : start + SHARD_TEXTS // 16]
                values = unpack_records(part, self.spec.dtype, self.spec.vectors, self.spec.dim, torch.float32)
                if not bool(torch.isfinite(values).all()):
                    raise ValueError(f"{shard.path} holds numbers that are not finite: remove it and embed again")
        verify_index(self.folder, self.shards, self.index)  # what it is compared with is sound now


def text_keys(spec: StoreSpec, texts: Sequence[str]) -> Keys:
    """Return the keys of texts: the 128-bit XXH3 of the spec and the text. Raises ValueError for what is no Unicode."""
    prefix = spec.prefix()
    try:
        hashed = b"".join([xxhash.xxh3_128_digest(prefix + text.encode()) for text in texts])
    except (UnicodeEncodeError, AttributeError):
        require_unicode(texts)
        raise
    words = np.frombuffer(hashed, dtype=">u8").reshape(-1, 2).astype(np.uint64)
    return np.ascontiguousarray(words[:, 0]), np.ascontiguousarray(words[:, 1])


def open_behaviours(folder: str | Path) -> BehaviourStore:
    """Open a store. Raises ValueError where there is none, and where its manifest or a shard's header is damaged."""
    path = Path(folder)
    spec = _read_manifest(path)
    num_bytes = record_bytes(spec.dtype, spec.vectors, spec.dim)
    while True:
        paths = shard_paths(path / _SHARDS)
        try:
            return BehaviourStore(path, spec, [map_shard(found, num_bytes, spec.prefix().hex()) for found in paths])
        except ValueError:
            if shard_paths(path / _SHARDS) == paths:
                raise
            # else a writer has merged shards meanwhile, and removed one that was found


def _read_manifest(folder: Path) -> StoreSpec:
    path = folder / _MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder} is no behaviour store (it has no {_MANIFEST}): `gmeta embed` makes one")
    cure = "restore the file, or embed into another folder"
    found = read_mapping(path, cure)
    if found.get("format") != FORMAT:
        raise ValueError(f"{path} has the format {found.get('format')!r}, expected {FORMAT}: name a behaviour store")
    if found.get("version") != VERSION:
        raise ValueError(f"{path} has version {found.get('version')!r}, this release reads {VERSION}: embed anew")
    if found.get("xxh3") != manifest_checksum(found):
        raise ValueError(f"{path} was changed since it was written: {cure}")
    try:
        spec = StoreSpec(**{field.name: found[field.name] for field in fields(StoreSpec)})
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}: {cure}") from None
    return spec


@contextmanager
def writing_store(folder: str | Path, spec: StoreSpec | None) -> Iterator[StoreWriter]:
    """Give the one writer of a store, which is made where it is missing; None takes the spec of one that exists.

    What killed writers left is removed, and an empty store becomes one of `spec`. Raises ValueError where another
    process writes the store, where the store has another spec, and where the folder holds something else.
    """
    path = Path(folder)
    if spec is None:
        spec = _read_manifest(path)
    else:
        make_folder("store", str(folder))
    manifest = path / _MANIFEST
    others = [entry for entry in path.iterdir() if entry.name not in _OURS and not entry.name.startswith(".partial-")]
    if others and not manifest.exists():
        raise ValueError(f"store {folder} holds other files and no {_MANIFEST}: name an empty folder, or a store")
    if not manifest.exists() and shard_paths(path / _SHARDS):
        raise ValueError(
            f"store {folder} has lost its {_MANIFEST}, which says what the vectors in {_SHARDS} are: restore the file, "
            "or embed into another folder"
        )
    with only_writer(path / _LOCK, f"the store {folder}"):
        if manifest.exists() and len(store := open_behaviours(path)):
            store.require(spec)
        remove_partial_shards(make_folder("store", str(path / _SHARDS)))
        if not manifest.exists() or _read_manifest(path) != spec:
            values: dict[str, Any] = {"format": FORMAT, "version": VERSION, **asdict(spec)}
            values["xxh3"] = manifest_checksum(values)
            write_text(manifest, json.dumps(values, indent=1, sort_keys=True) + "\n")
        yield StoreWriter(path, spec)


class StoreWriter:
    """Appends to a store, and merges its shards; `writing_store` makes one."""

    def __init__(self, folder: Path, spec: StoreSpec) -> None:
        self.folder = folder
        self.spec = spec

    def append(self, texts: Sequence[str], vectors: Tensor) -> None:
        """Add distinct texts with their vectors, float32 [n, vectors, d], as one shard.

        Raises ValueError for numbers that the store cannot hold, and where the disk is full: the store stays as it was.
        """
        append_shard(self.folder, self.spec, texts, vectors)

    def merge(self, most: int = 1) -> None:
        """Write small shards together where there are more than `most` of them, and write the index."""
        store = open_behaviours(self.folder)
        small = [shard for shard in store.shards if len(shard) < SHARD_TEXTS]
        if len(small) > most:
            large = [shard for shard in store.shards if len(shard) >= SHARD_TEXTS]
            merge_shards(self.folder / _SHARDS, small, open_index(self.folder, large), self.spec.prefix().hex())
            store = open_behaviours(self.folder)
        write_index(self.folder, store.shards)


def append_shard(folder: Path, spec: StoreSpec, texts: Sequence[str], vectors: Tensor) -> None:
    """Add a shard to a store that `writing_store` holds, maybe in another process; `StoreWriter.append` explains."""
    expected = (len(texts), spec.vectors, spec.dim)
    require(tuple(vectors.shape) == expected, "vectors", tuple(vectors.shape), f"the store wants {expected}")
    records = pack_records(vectors.float().cpu(), spec.dtype)
    write_shard(folder / _SHARDS, text_keys(spec, texts), records, spec.prefix().hex())
