"""Damaged packs are refused by name, interrupted and failing writes leave nothing that looks like a pack."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file

from gmeta.data import pack as pack_module
from gmeta.data.pack import PackWriter, open_pack, verify_pack
from gmeta.data.schema import Feature, PackSchema

pytestmark = pytest.mark.faults

SCHEMA = PackSchema(
    features=(Feature(name="item", kind="categorical", num_ids=9, table="item"),),
    numeric=(),
    label="y",
    binary_label=True,
    task="user",
)


def shard(rows: int = 40, first_task: int = 0) -> dict[str, np.ndarray]:
    return {
        "ids": (np.arange(rows, dtype=np.int32) % 9)[:, None],
        "dense": np.zeros((rows, 0), np.float32),
        "label": (np.arange(rows) % 2).astype(np.float32),
        "item_cold": np.zeros(rows, np.uint8),
        "task_id": np.arange(rows // 4) + first_task,
        "row_start": np.arange(0, rows, 4),
        "num_support": np.full(rows // 4, 2, np.int32),
    }


def fill(writer: PackWriter) -> None:
    writer.add_shard("train", shard())
    writer.add_shard("train", shard(first_task=10))
    writer.write_vocab("item", pa.array([f"i{i}" for i in range(8)]), np.ones(8))
    writer.write_tasks(np.arange(20), pa.array(np.arange(20)), ["train"] * 20)
    (writer.directory / "rejects.parquet").write_bytes(bytes(100))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with PackWriter(tmp_path / "pack", SCHEMA) as writer:
        fill(writer)
        return writer.finish()


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def rewrite_manifest(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    """Change the manifest and give it a checksum that fits."""
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    del manifest["xxh3"]
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    manifest["xxh3"] = xxhash.xxh3_64(text.encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest, sort_keys=True, indent=1))


def test_a_newer_format_is_refused(path: Path) -> None:
    rewrite_manifest(path, lambda m: m.update(version=3, schema="of another kind"))
    with pytest.raises(ValueError, match="made by gmeta pack format 3; this gmeta reads up to 2: upgrade"):
        open_pack(path)


@pytest.mark.parametrize("what", ["nothing there", "a file", "an empty directory"])
def test_what_is_no_pack_is_refused(tmp_path: Path, what: str) -> None:
    target = tmp_path / "pack"
    if what == "a file":
        target.write_text("hello")
    if what == "an empty directory":
        target.mkdir()
    with pytest.raises(ValueError, match=r"pack is no task pack .*give the directory that `gmeta prepare` wrote"):
        open_pack(target)


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}", "\x00\xff"])
def test_a_manifest_that_is_none_is_refused(path: Path, text: str) -> None:
    (path / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"manifest\.json is damaged .*run `gmeta prepare` again, or restore"):
        open_pack(path)


def test_flipped_bits_of_the_manifest_are_refused(path: Path) -> None:
    size = (path / "manifest.json").stat().st_size
    for at in range(0, size, 7):
        flip(path / "manifest.json", at)
        try:
            open_pack(path)
        except ValueError as error:
            assert "manifest.json" in str(error) or "format" in str(error)  # noqa: PT017
        else:
            # A bit of white space may turn into other white space; what was read is still what was written.
            assert json.loads((path / "manifest.json").read_text())["version"] == 2
        flip(path / "manifest.json", at)
    open_pack(path)


@pytest.mark.parametrize("file", ["shard-00001.safetensors", "vocab/item.parquet", "tasks.parquet", "rejects.parquet"])
def test_missing_truncated_and_longer_files_are_named_at_opening(path: Path, file: str) -> None:
    target = path / file
    whole = target.read_bytes()
    for damaged, message in (
        (whole[:-1], f"has {len(whole) - 1} bytes"),
        (whole + b"x", f"the manifest says {len(whole)}"),
    ):
        target.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{file} has .*: run `gmeta prepare` again, or restore") as caught:
            open_pack(path)
        assert message in str(caught.value)
    target.unlink()
    with pytest.raises(ValueError, match=f"{file} is missing: run `gmeta prepare` again"):
        open_pack(path)


def test_a_flipped_bit_in_a_shard_is_found_at_first_use(path: Path) -> None:
    file = path / "shard-00001.safetensors"
    flip(file, file.stat().st_size - 5)
    split = open_pack(path).split("train")
    split.examples(np.arange(10))  # the sound shard
    for read in (lambda: split.examples(np.array([3, 12])), lambda: split.sizes(np.array([11])), lambda: split.task_id):
        with pytest.raises(ValueError, match=r"shard-00001\.safetensors is damaged \(checksum .*restore the file"):
            read()
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors is damaged"):
        verify_pack(path)


def test_a_flipped_bit_in_a_header_is_found(path: Path) -> None:
    file = path / "shard-00000.safetensors"
    for at in range(0, 8 + int.from_bytes(file.read_bytes()[:8], "little"), 11):
        flip(file, at)
        with pytest.raises(ValueError, match=r"shard-00000\.safetensors"):
            verify_pack(path)
        flip(file, at)
    verify_pack(path)


@pytest.mark.parametrize("file", ["vocab/item.parquet", "tasks.parquet", "rejects.parquet"])
def test_flipped_bits_beside_the_shards_are_found_by_verify(path: Path, file: str) -> None:
    flip(path / file, 40)
    open_pack(path)
    with pytest.raises(ValueError, match=f"{file} is damaged"):
        verify_pack(path)


@pytest.mark.parametrize(
    ("change", "tensor"),
    [
        (lambda t: {k: v for k, v in t.items() if k != "item_cold"}, "item_cold"),
        (lambda t: {**t, "more": torch.zeros(1)}, "more"),
        (lambda t: {**t, "label": t["label"].to(torch.float64)}, "label"),
        (lambda t: {**t, "label": t["label"][:-1].clone()}, "label"),
    ],
)
def test_a_shard_of_another_layout_is_refused_at_opening(path: Path, change, tensor: str) -> None:
    file = path / "shard-00000.safetensors"
    save_file(change({k: v.clone() for k, v in load_file(file).items()}), file)
    rewrite_manifest(path, lambda m: m["splits"]["train"]["shards"][0].update(bytes=file.stat().st_size))  # type: ignore[index]
    with pytest.raises(ValueError, match=rf"shard-00000\.safetensors does not fit the manifest \(tensor '{tensor}'"):
        open_pack(path)


def test_an_existing_path_is_never_touched(path: Path) -> None:
    with pytest.raises(ValueError, match=r"pack exists: remove it or choose another path"):
        PackWriter(path, SCHEMA)
    verify_pack(path)
    (path.parent / "empty").mkdir()
    with pytest.raises(ValueError, match="empty exists"):
        PackWriter(path.parent / "empty", SCHEMA)


def test_a_path_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with PackWriter(tmp_path / "pack", SCHEMA) as writer:
        fill(writer)
        (tmp_path / "pack").mkdir()
        with pytest.raises(ValueError, match="pack exists"):
            writer.finish()
    assert [p.name for p in tmp_path.iterdir()] == ["pack"]


def test_two_writers_of_one_path_are_refused(tmp_path: Path) -> None:
    with PackWriter(tmp_path / "pack", SCHEMA) as writer:
        fill(writer)
        with pytest.raises(ValueError, match=r"pack\.partial is being written by another process"):
            PackWriter(tmp_path / "pack", SCHEMA)
        writer.finish()
    verify_pack(tmp_path / "pack")


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    def fill_and_fail() -> None:
        with PackWriter(tmp_path / "pack", SCHEMA) as writer:
            fill(writer)
            raise error

    with pytest.raises(type(error)):
        fill_and_fail()
    assert list(tmp_path.iterdir()) == []


WRITE_AND_HANG = """
import sys, time
sys.path.insert(0, {here!r})
from test_pack_faults import PackWriter, SCHEMA, fill
writer = PackWriter(sys.argv[1], SCHEMA)
fill(writer)
print("filled", flush=True)
time.sleep(60)
"""


def test_what_a_killed_writer_left_is_replaced(tmp_path: Path) -> None:
    code = WRITE_AND_HANG.format(here=str(Path(__file__).parent))
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "pack")], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "filled\n"
        with pytest.raises(ValueError, match="is being written by another process"):
            PackWriter(tmp_path / "pack", SCHEMA)
        process.send_signal(signal.SIGKILL)
    assert [p.name for p in tmp_path.iterdir()] == ["pack.partial"]
    with pytest.raises(ValueError, match="pack is no task pack"):
        open_pack(tmp_path / "pack")
    with PackWriter(tmp_path / "pack", SCHEMA) as writer:
        fill(writer)
        writer.finish()
    verify_pack(tmp_path / "pack")
    assert [p.name for p in tmp_path.iterdir()] == ["pack"]


def fill_and_finish(writer: PackWriter) -> None:
    fill(writer)
    writer.finish()


def refuse(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "step", ["save_file", "checksum_file", "pq.write_table", "pq.ParquetWriter", "os.fsync", "os.rename"]
)
def test_a_full_disk_is_one_clear_error_and_no_pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    owner = getattr(pack_module, step.split(".")[0]) if "." in step else pack_module
    with PackWriter(tmp_path / "pack", SCHEMA) as writer:
        monkeypatch.setattr(owner, step.split(".")[-1], refuse)
        with pytest.raises(ValueError, match=r"cannot write .*pack.*: No space left on device; no pack was made: free"):
            fill_and_finish(writer)
        monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_everything_is_synced_before_the_pack_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    sync = os.fsync

    def note(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    with PackWriter(tmp_path / "pack", SCHEMA) as writer:
        fill_and_finish(writer)
    partial = tmp_path / "pack.partial"
    written = {partial / p.relative_to(tmp_path / "pack") for p in (tmp_path / "pack").rglob("*")}
    assert set(synced) == {*written, partial, tmp_path}
    assert synced[-2:] == [partial, tmp_path]  # the rename is last


def test_a_disk_that_refuses_for_real(tmp_path: Path) -> None:
    """The kernel refuses to let files grow, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with PackWriter(tmp_path / "pack", SCHEMA) as writer:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        try:
            with pytest.raises(ValueError, match=r"cannot write .*shard-00000\.safetensors: .*File too large"):
                writer.add_shard("train", shard(rows=4000))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write .*file/pack\.partial: (Not a directory|File exists)"):
        PackWriter(tmp_path / "file" / "pack", SCHEMA)


def test_a_moved_pack_still_opens(path: Path, tmp_path: Path) -> None:
    shutil.move(path, tmp_path / "elsewhere")
    verify_pack(tmp_path / "elsewhere")


CRAFTED: list[tuple[list[str | int], object, str]] = [
    (["vocab", "item", "file"], "vocab/../../outside.parquet", "no plain name"),
    (["vocab", "item", "file"], "/etc/hostname", "no plain name"),
    (["splits", "train", "shards", 0, "file"], "..\\outside", "no plain name"),
    (["tasks", "file"], "", "no plain name"),
    (["others", 0, "file"], ["x"], "no plain name"),
    (["others", 0, "bytes"], 100.0, "size 100.0"),
    (["splits", "train", "shards", 0, "rows"], -1, "count -1"),
    (["splits", "train", "rows"], "40", "count '40'"),
    (["splits", "late"], {}, "split 'late'"),
    (["vocab"], [], "has no attribute"),
    (["schema", "features", 0, "num_ids"], "9", "num_ids is '9'"),
    (["data_schema"], {"features": "SELECT"}, "key 'task' is missing"),
]


@pytest.mark.parametrize(("where", "value", "said"), CRAFTED, ids=lambda x: str(x)[:40])
def test_a_crafted_manifest_is_refused_though_its_checksum_is_right(
    path: Path, where: list[str | int], value: object, said: str
) -> None:
    (path.parent / "outside.parquet").write_bytes((path / "vocab" / "item.parquet").read_bytes())
    manifest = json.loads((path / "manifest.json").read_text())
    inside = manifest
    for key in where[:-1]:
        inside = inside[key]
    inside[where[-1]] = value
    manifest["xxh3"] = pack_module.manifest_checksum(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"is no manifest of a task pack .*prepare. again") as caught:
        open_pack(path)
    assert said in str(caught.value)


def test_a_manifest_nested_too_deeply_is_refused(path: Path) -> None:
    (path / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is damaged"):
        open_pack(path)
