"""What a model is made with may lie in an object store: it is copied to the cache once, and is whole or absent."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gmeta.config.text import EmbedConfig
from gmeta.core.files import is_url
from gmeta.runs.fetched import fetch_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "bucket"
    (folder / "shards").mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    (folder / "shards" / "a").write_text("vectors")
    (folder / "lock").write_text("")
    (folder / "shards" / ".partial-1").write_text("half")
    return folder


def sound(folder: Path) -> None:
    """What a test has nothing against."""


def test_a_folder_is_copied_once(folder: Path, tmp_path: Path) -> None:
    url, cache = f"file://{folder}", tmp_path / "cache"
    checked: list[Path] = []
    with ThreadPoolExecutor(4) as pool:
        found = {*pool.map(lambda _: fetch_folder(url, cache, checked.append), range(4))}
    (home,) = found
    assert len(checked) == 1
    assert home.parent == cache
    assert {path.relative_to(home).as_posix() for path in home.rglob("*") if path.is_file()} == {
        "manifest.json",
        "shards/a",
    }
    (folder / "shards" / "b").write_text("more")
    assert fetch_folder(url, cache, sound) != home
    assert (home / "shards" / "a").read_text() == "vectors"  # who reads it goes on


def test_what_is_damaged_is_not_kept(folder: Path, tmp_path: Path) -> None:
    def damaged(_: Path) -> None:
        raise ValueError("shard a is damaged")

    with pytest.raises(ValueError, match="bucket is not as it was written, copy it there again: shard a is damaged"):
        fetch_folder(f"file://{folder}", tmp_path / "cache", damaged)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert fetch_folder(f"file://{folder}", tmp_path / "cache", sound).is_dir()


def test_what_changes_meanwhile_and_what_is_empty_says_so(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(store: object, key: str, target: Path) -> None:
        target.write_text("longer than it was")

    monkeypatch.setattr("gmeta.runs.store.Folder.download", changed)
    with pytest.raises(ValueError, match=rf"{folder} was changed while it was read \(manifest.json\): try again"):
        fetch_folder(f"file://{folder}", tmp_path / "cache", sound)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="nothing holds no files"):
        fetch_folder(f"file://{tmp_path / 'nothing'}", tmp_path / "cache", sound)


def test_a_store_is_written_in_a_folder() -> None:
    with pytest.raises(ValueError, match=r"store is 's3://a/b': .*embed there, and copy the folder"):
        EmbedConfig(store="s3://a/b", texts="titles.csv", encoder="minilm", layers=3)
    assert is_url("gs://a/b")
    assert not is_url(os.sep + "a")
