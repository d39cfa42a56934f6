"""The behaviour store gives back what was put in, by text, from any number of shards; and refuses what is another's."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from gmeta.text import shards as files
from gmeta.text.shards import KeyIndex, pack_records, unpack_records, write_shard
from gmeta.text.store import BehaviourStore, StoreSpec, open_behaviours, text_keys, writing_store

SPEC = StoreSpec(
    encoder="0" * 32,
    layers=3,
    pooling="mean",
    vectors=1,
    template="{text}",
    max_tokens=32,
    precision="float32",
    dtype="fp16",
    dim=12,
)


def texts(start: int, end: int) -> list[str]:
    return [f"text {i} é" for i in range(start, end)]


def vectors(n: int, seed: int = 0, spec: StoreSpec = SPEC) -> torch.Tensor:
    return torch.randn(n, spec.vectors, spec.dim, generator=torch.Generator().manual_seed(seed))


def made(folder: Path, *sizes: int, spec: StoreSpec = SPEC) -> torch.Tensor:
    """A store with a shard of each size; returns all vectors, in the order of `texts`."""
    values = vectors(sum(sizes), spec=spec)
    ends = np.cumsum([0, *sizes])
    with writing_store(folder, spec) as writer:
        for start, end in pairwise(ends):
            writer.append(texts(start, end), values[start:end])
    return values


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("dtype", ["fp16", "int8"])
@pytest.mark.parametrize("sizes", [(40,), (1, 30, 9)])
def test_what_was_put_in_comes_out(tmp_path: Path, dtype: str, count: int, sizes: tuple[int, ...]) -> None:
    spec = replace(SPEC, dtype=dtype, vectors=count)
    values = made(tmp_path / "store", *sizes, spec=spec)
    store = open_behaviours(tmp_path / "store")
    assert (len(store), len(store.shards), store.spec) == (40, len(sizes), spec)
    asked = [texts(0, 40)[i] for i in (7, 39, 0, 7, 12)]
    found = store.read(store.rows(asked).reshape(5, 1))
    expected = values[[7, 39, 0, 7, 12]][:, None]
    assert found.shape == (5, 1, count, 12)
    scale = expected.abs().amax(-1, keepdim=True)
    gap = (found - expected).abs()
    assert (gap <= (expected.abs() * 2**-10 if dtype == "fp16" else scale / 127 * 0.51)).all()
    half = store.read(torch.from_numpy(store.rows(asked)), torch.float16)
    assert half.dtype == torch.float16
    assert torch.equal(
        half.float() if dtype == "fp16" else found[:, 0].half(), found[:, 0] if dtype == "fp16" else half
    )
    assert store.read(np.empty((0, 3), np.int64)).shape == (0, 3, count, 12)
    store.verify()


def begin(folder: Path, spec: StoreSpec) -> None:
    with writing_store(folder, spec):
        pass


def test_texts_that_are_missing_are_told(tmp_path: Path) -> None:
    made(tmp_path / "store", 3, 4)
    store = open_behaviours(tmp_path / "store")
    assert (store.find(["text 1 é", "nothing", ""]) >= 0).tolist() == [True, False, False]
    with pytest.raises(ValueError, match=r"lacks 2 of 3 texts, the first is 'nothing': encode them with `gmeta embed`"):
        store.rows(["text 1 é", "nothing", ""])
    for rows in ([-1], [7], [3, -5]):
        with pytest.raises(ValueError, match=r"rows must be in \[0, 7\)"):
            store.read(np.array(rows))
    with pytest.raises(ValueError, match="text 1 is no Unicode"):
        store.find(["a", "\udc80"])
    with pytest.raises(ValueError, match="text 0 is 3: it must be text"):
        store.find([3])  # type: ignore[list-item]


def test_a_store_without_texts_opens(tmp_path: Path) -> None:
    made(tmp_path / "store")
    store = open_behaviours(tmp_path / "store")
    assert len(store) == 0
    assert store.find(["a"]).tolist() == [-1]
    assert store.find([]).tolist() == []
    store.verify()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("encoder", "1" * 32),
        ("layers", 2),
        ("pooling", "last"),
        ("vectors", 2),
        ("template", "Title: {text}"),
        ("max_tokens", 31),
        ("precision", "bfloat16"),
        ("dim", 13),
        ("dtype", "int8"),
    ],
)
def test_a_store_of_other_vectors_is_refused(tmp_path: Path, key: str, value: object) -> None:
    made(tmp_path / "store", 3)
    other = replace(SPEC, **{key: value})  # type: ignore[arg-type]
    message = rf"is a store of other vectors \({key} .*, not {value!r}\): name another store"
    with pytest.raises(ValueError, match=message):
        begin(tmp_path / "store", other)
    with pytest.raises(ValueError, match=message):
        open_behaviours(tmp_path / "store").require(other)
    same = key == "dtype"  # the same vectors, kept in another way
    assert (text_keys(SPEC, ["a"])[0] == text_keys(other, ["a"])[0]).all() == same


def test_shards_are_merged_and_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "SHARD_TEXTS", 16)
    monkeypatch.setattr("gmeta.text.store.SHARD_TEXTS", 16)
    values = made(tmp_path / "store", 20, 3, 5, 8, 16)
    before = open_behaviours(tmp_path / "store")
    with writing_store(tmp_path / "store", SPEC) as writer:
        writer.merge(most=3)
        assert len(open_behaviours(tmp_path / "store").shards) == 5
        writer.append(texts(0, 4), values[:4])  # as a writer that was killed leaves it: there twice
        writer.merge(most=3)
    after = open_behaviours(tmp_path / "store")
    # Full shards are left alone; of the others the four that are in a full one are gone.
    assert sorted(map(len, after.shards)) == [16, 16, 20]
    assert len(after) == 52
    for store in (before, after):  # the old files stay mapped
        assert torch.equal(store.read(store.rows(texts(0, 52))), values.half().float())
    with writing_store(tmp_path / "store", None) as writer:
        names = {path.name for path in (tmp_path / "store/shards").iterdir()}
        writer.merge()
        assert {path.name for path in (tmp_path / "store/shards").iterdir()} == names


def test_the_written_index_is_read_and_a_stale_one_is_not(tmp_path: Path) -> None:
    values = made(tmp_path / "store", 20, 30)
    path = tmp_path / "store/index.safetensors"
    assert not path.exists()
    with writing_store(tmp_path / "store", SPEC) as writer:
        writer.merge(most=5)
        with safe_open(path, framework="np") as file:
            assert len(file.get_tensor("rows")) == 50
        mapped = open_behaviours(tmp_path / "store")
        assert torch.equal(mapped.read(mapped.rows(texts(0, 50))), values.half().float())
        writer.append(["new"], vectors(1, 9))
    store = open_behaviours(tmp_path / "store")
    assert torch.equal(
        store.read(store.rows(["new", *texts(0, 50)])), torch.cat([vectors(1, 9), values]).half().float()
    )
    assert len(store) == 51


def test_keys_that_share_a_word_are_told_apart() -> None:
    high = np.array([1, 5, 5, 5, 9], np.uint64)
    low = np.array([4, 1, 2, 7, 0], np.uint64)
    index = KeyIndex((high, low), np.array([10, 11, 12, 13, 14]))
    asked = (np.array([5, 5, 5, 9, 1, 0, 10, 5], np.uint64), np.array([7, 2, 3, 0, 4, 0, 0, 1], np.uint64))
    assert index.find(asked).tolist() == [13, 12, -1, 14, 10, -1, -1, 11]


def test_keys_do_not_change_from_release_to_release() -> None:
    """A key is written down: stores outlive the code that made them."""
    high, low = text_keys(SPEC, ["Toy Story (1995)", ""])
    assert [f"{word:016x}" for word in (*high.tolist(), *low.tolist())] == GOLDEN_KEYS


GOLDEN_KEYS = ["deac7f7fd356b1b4", "60b751b8c01467fb", "09ad5b9050d96b8b", "9eb5d7e9f92e9920"]


def test_numbers_that_cannot_be_kept_are_refused(tmp_path: Path) -> None:
    bad, large = vectors(2), vectors(2)
    bad[1, 0, 3], large[0, 0, 0] = torch.nan, 7e4
    with writing_store(tmp_path / "store", SPEC) as writer:
        with pytest.raises(ValueError, match="gives no finite numbers for 1 texts"):
            writer.append(["a", "b"], bad)
        with pytest.raises(ValueError, match=r"holds 7e\+04, more than fp16 can: store int8"):
            writer.append(["a", "b"], large)
        with pytest.raises(ValueError, match=r"vectors is \(2, 1, 11\)"):
            writer.append(["a", "b"], large[..., :11])
    found = unpack_records(pack_records(large, "int8"), "int8", 1, 12, torch.float32)
    assert found[0, 0, 0] == pytest.approx(7e4)
    zeros = torch.zeros(2, 1, 12)
    assert not unpack_records(pack_records(zeros, "int8"), "int8", 1, 12, torch.float32).any()


# ---------------------------------------------------------------------------------------------- damage


def refused(folder: Path, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        open_behaviours(folder).verify()


def test_damage_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    refused(folder, "is no behaviour store .*`gmeta embed` makes one")
    made(folder, 20)
    (shard,) = (folder / "shards").iterdir()
    whole = shard.read_bytes()
    for at in (3, len(whole) - 5, len(whole) - 20 * 24 - 8):  # header, records, keys
        shard.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        refused(folder, f"{shard.name} is damaged")
    shard.write_bytes(whole[:-1])
    refused(folder, f"{shard.name} is damaged .*remove it and run `gmeta embed` again")
    shard.write_bytes(whole)
    open_behaviours(folder).verify()
    manifest = json.loads((folder / "manifest.json").read_text())
    for change, words in (
        ({"layers": 4}, "was changed since it was written"),
        ({"format": "x"}, "has the format 'x'"),
        ({"version": 3}, "has version 3, this release reads 2"),
    ):
        (folder / "manifest.json").write_text(json.dumps({**manifest, **change}))
        refused(folder, words)
    (folder / "manifest.json").write_text("{")
    refused(folder, "manifest.json cannot be read")


def test_a_damaged_index_is_found(tmp_path: Path) -> None:
    made(tmp_path / "store", 20, 30)
    with writing_store(tmp_path / "store", SPEC) as writer:
        writer.merge(most=5)
    index = tmp_path / "store/index.safetensors"
    whole = index.read_bytes()
    index.write_bytes(whole[:-8] + bytes(8))
    refused(tmp_path / "store", "index.safetensors is damaged: remove it")
    index.write_bytes(whole[:-9])  # what cannot be opened is not needed
    open_behaviours(tmp_path / "store").verify()


@pytest.mark.parametrize("column", ["keys.high", "records"])
def test_a_damaged_shard_is_merged_with_no_other(tmp_path: Path, column: str) -> None:
    """New checksums and a new index would call it sound."""
    folder = tmp_path / "store"
    made(folder, 20, 5)
    with writing_store(folder, SPEC) as writer:
        writer.merge(most=5)  # an index is written
    damaged = max((folder / "shards").iterdir(), key=lambda path: path.stat().st_size)
    whole = bytearray(damaged.read_bytes())
    start, end = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])[column]["data_offsets"]
    whole[8 + int.from_bytes(whole[:8], "little") + (start + end) // 2] ^= 64
    damaged.write_bytes(whole)
    refused(folder, f"{damaged.name} is damaged")
    files_before = sorted((folder / "shards").iterdir())
    with writing_store(folder, SPEC) as writer, pytest.raises(ValueError, match=f"{damaged.name} is damaged"):
        writer.merge()
    assert sorted((folder / "shards").iterdir()) == files_before


def test_a_lost_manifest_is_not_made_anew(tmp_path: Path) -> None:
    """Another one would call the vectors what they are not."""
    made(tmp_path / "store", 5)
    (tmp_path / "store/manifest.json").unlink()
    with pytest.raises(ValueError, match=r"has lost its manifest\.json, .*restore the file, or embed into another"):
        begin(tmp_path / "store", replace(SPEC, layers=SPEC.layers + 1))


def test_an_empty_store_becomes_another(tmp_path: Path) -> None:
    other = replace(SPEC, layers=SPEC.layers + 1)
    begin(tmp_path / "store", SPEC)
    begin(tmp_path / "store", other)
    assert open_behaviours(tmp_path / "store").spec == other
    made(tmp_path / "full", 5)
    with pytest.raises(ValueError, match="is a store of other vectors"):
        begin(tmp_path / "full", other)


def test_a_shard_of_another_store_is_refused(tmp_path: Path) -> None:
    made(tmp_path / "store", 5)
    with writing_store(tmp_path / "other", replace(SPEC, layers=SPEC.layers + 1)) as writer:
        writer.append(texts(0, 7), vectors(7))
    (shard,) = (tmp_path / "other/shards").iterdir()
    shutil.copy(shard, tmp_path / "store/shards")
    refused(tmp_path / "store", "is a shard of another store, whose vectors are others: move it away")


def test_a_text_is_appended_once(tmp_path: Path) -> None:
    with writing_store(tmp_path / "store", SPEC) as writer, pytest.raises(ValueError, match="give each once"):
        writer.append(["a", "a"], vectors(2))


def test_one_process_writes_a_store_at_a_time(tmp_path: Path) -> None:
    with writing_store(tmp_path / "store", SPEC), pytest.raises(ValueError, match="is being written by another proc"):
        begin(tmp_path / "store", SPEC)
    begin(tmp_path / "store", SPEC)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").write_text("")
    with pytest.raises(ValueError, match=r"holds other files and no manifest\.json: name an empty folder"):
        begin(tmp_path / "other", SPEC)


def test_what_a_killed_writer_left_is_removed_and_never_read(tmp_path: Path) -> None:
    made(tmp_path / "store", 5)
    left = tmp_path / "store/shards/.partial-00000000-1234.safetensors"
    left.write_bytes(b"half")
    assert len(open_behaviours(tmp_path / "store")) == 5
    with writing_store(tmp_path / "store", SPEC):
        assert not left.exists()


def test_a_full_disk_leaves_the_store_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path / "store", 5)

    def full(_: object) -> None:
        raise OSError(28, os.strerror(28))

    with writing_store(tmp_path / "store", SPEC) as writer:
        monkeypatch.setattr("gmeta.data.pack.sync", full)
        with pytest.raises(ValueError, match=r"cannot write .*No space left on device; free space there"):
            writer.append(["new"], vectors(1))
        monkeypatch.undo()
        assert len(list((tmp_path / "store/shards").iterdir())) == 1
        writer.append(["new"], vectors(1))
    assert len(open_behaviours(tmp_path / "store")) == 6


def test_a_reader_beside_a_merging_writer_sees_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = made(tmp_path / "store", 9, 9)
    real, merged = files.map_shard, []

    def late(path: Path, num_bytes: int, spec: str) -> files.VectorShard:
        if not merged:  # between the listing and the opening
            merged.append(True)
            with writing_store(tmp_path / "store", SPEC) as writer:
                writer.merge()
        return real(path, num_bytes, spec)

    monkeypatch.setattr("gmeta.text.store.map_shard", late)
    store: BehaviourStore = open_behaviours(tmp_path / "store")
    assert len(store.shards) == 1
    assert torch.equal(store.read(store.rows(texts(0, 18))), values.half().float())


def test_a_shard_has_one_name_and_one_content(tmp_path: Path) -> None:
    keys = text_keys(SPEC, texts(0, 9))
    records = pack_records(vectors(9), "fp16")
    first = write_shard(tmp_path, keys, records, "spec")
    whole = first.read_bytes()
    order = np.random.default_rng(0).permutation(9)
    assert write_shard(tmp_path, (keys[0][order], keys[1][order]), records[order], "spec") == first
    assert first.read_bytes() == whole
