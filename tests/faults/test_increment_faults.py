"""Damage to what a base carries is named, and leaves no pack behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from commands import fails, gmeta

from gmeta.data.pack import manifest_checksum

pytestmark = pytest.mark.faults

SCHEMA = {
    "task": "user",
    "label": "click",
    "time": "at",
    "item": "item",
    "categorical": [{"name": "item", "min_count": 4}],
    "numeric": ["price"],
    "item_statistics": True,
}


def log(path: Path, day: int) -> Path:
    rows = [f"u{u},i{u % 7 + day},{u % 2},{u}.5,{10 * day + k}" for u in range(20) for k in range(4)]
    path.write_text("\n".join(["user,item,click,price,at", *rows, f"u0,rare{day},1,2,{10 * day}"]) + "\n")
    return path


@pytest.fixture(scope="module")
def days(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packs `0` and `1`, and the log of day 2."""
    place = tmp_path_factory.mktemp("damage")
    (place / "schema.yaml").write_text(yaml.safe_dump(SCHEMA))
    first = ["--schema", place / "schema.yaml", "--query_size", 1]
    for day, more in enumerate((first, ["--base", place / "0"], [])):
        log(place / f"{day}.csv", day)
        if more:
            gmeta("prepare", "--input", place / f"{day}.csv", "--out", place / str(day), *more)
    return place


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("change", [flip, Path.unlink, lambda file: file.write_bytes(file.read_bytes()[:-9])])
@pytest.mark.parametrize(
    ("day", "file"),
    [
        ("0", "vocab/item.parquet"),
        ("0", "vocab/item_statistics.parquet"),
        ("0", "increment/pending/item.parquet"),
        ("0", "tasks.parquet"),
        ("0", "shard-00000.safetensors"),  # the history of a first pack
        ("1", "vocab/item.parquet"),
        ("1", "increment/pending/item.parquet"),
        ("1", "increment/history/00000.parquet"),
        ("1", "increment/tasks.parquet"),
        ("1", "increment/chain.json"),
        ("1", "manifest.json"),
    ],
)
def test_damage_is_named(
    days: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], day: str, file: str, change: Callable[[Path], None]
) -> None:
    shutil.copytree(days / day, tmp_path / "base")
    change(tmp_path / "base" / file)
    words = ["prepare", "--base", tmp_path / "base", "--input", days / "2.csv", "--out", tmp_path / "out"]
    fails(words, capsys, "base" if file == "manifest.json" else file)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_pack_that_nobody_prepared_is_no_base(days: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from packs import make_pack

    make_pack(tmp_path / "made")
    words = ["--input", days / "2.csv", "--out", tmp_path / "out"]
    fails(["prepare", "--base", tmp_path / "made", *words], capsys, "was not made by `gmeta prepare`")
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle/manifest.json").write_text(json.dumps({"format": "gmeta-bundle", "xxh3": "0"}))
    fails(["prepare", "--base", tmp_path / "bundle", *words], capsys, "manifest.json is damaged")


def test_settings_of_a_manifest_are_checked(days: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A checksum says that a manifest is whole, not who wrote it."""
    shutil.copytree(days / "1", tmp_path / "base")
    file = tmp_path / "base/manifest.json"
    manifest = json.loads(file.read_text())
    manifest["settings"]["query_size"] = "1); DROP TABLE tasks"
    manifest["xxh3"] = manifest_checksum(manifest)
    file.write_text(json.dumps(manifest))
    words = ["prepare", "--base", tmp_path / "base", "--input", days / "2.csv", "--out", tmp_path / "out"]
    fails(words, capsys, "settings.query_size is '1); DROP TABLE tasks'")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--history_rows", "5"], "history_rows is 5: has no effect without base"),
        (["--evict_after_days", "5"], "evict_after_days is 5: has no effect without base"),
        (["--base", "x", "--evict_below", "5"], "evict_below is 5: has no effect without evict_after_days"),
        (["--base", "x", "--evict_after_days", "0"], "evict_after_days is 0: must be at least 1"),
    ],
)
def test_settings_that_do_nothing_are_refused(capsys: pytest.CaptureFixture[str], words: list[str], told: str) -> None:
    fails(["prepare", "--out", "x", "--input", "x", *words], capsys, told)
