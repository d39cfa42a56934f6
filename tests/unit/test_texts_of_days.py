"""Texts from day to day: new ones, those of older rows, replayed packs, and what a model brings into its bundles."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import gmeta
from text_models import LATER, Shelf, day_rows, text_pack, text_rows

import gmeta as package
from gmeta.config.delivery import BundleConfig
from gmeta.core.batch import text_ids_of
from gmeta.data.pack import open_pack
from gmeta.data.replay import replayed_texts, require_older
from gmeta.data.shards import PackSplit
from gmeta.delivery.bundle import make_bundle
from gmeta.runs.bundle import assets_of, manifest_text, read_manifest, sealed
from gmeta.runs.delta import apply_delta, make_delta

Row = tuple[str, tuple[str, ...]]
EVICT = ("--evict_after_days", 1)


def of_times(*logs: Mapping[str, list[Any]]) -> dict[int, set[Row]]:
    """What the rows of each time hold."""
    found: dict[int, set[Row]] = defaultdict(set)
    for log in logs:
        for time, item, last in zip(log["time"], log["item"], log["last"], strict=True):
            found[time].add((item, tuple(last[-4:])))
    return found


def texts_of_rows(split: PackSplit, table: Sequence[str], *parts: PackSplit) -> list[tuple[int, Row]]:
    """The time, the item and the history of all rows of a split, or of one of `parts`, as a batch has them."""
    every, found = list(table), []
    times = np.concatenate([part.times() for part in parts or (split,)])  # type: ignore[misc]
    for side in split.examples(np.arange(split.num_tasks))[:2]:
        item, last = (side.given[text_ids_of(name)][side.mask].tolist() for name in ("item", "last"))
        rows = [(every[i[0]], tuple(every[j] for j in row if j)) for i, row in zip(item, last, strict=True)]
        found += zip(times[side.row[side.mask].numpy()].tolist(), rows, strict=True)
    return found


def next_day(base: Path, day: int, out: Path, *more: object) -> Path:
    pq.write_table(pa.table(day_rows(day)), out.with_suffix(".parquet"))
    gmeta("prepare", "--input", out.with_suffix(".parquet"), "--base", base, "--out", out, "--history_rows", 5, *more)
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack, a run and a bundle of a model with a file of its own, and a day on each of them."""
    folder = tmp_path_factory.mktemp("days")
    text_pack(folder)
    (folder / "shelf").mkdir()
    (folder / "shelf" / "scale.txt").write_text("0.5")
    config: dict[str, Any] = {"pack": str(folder / "pack"), "run_dir": str(folder / "run")}
    config |= {"loader": {"tasks_per_batch": 20}, "schedule": {"epochs": 2}, "dense": {"lr": 0.05}}
    config |= {"model": {"name": "text_models:Shelf", "args": {"scale": str(folder / "shelf")}}}
    package.train({**config, "meta": {"adapt": ["head"], "inner_lr": 0.5}})
    bundled(folder / "run", folder / "bundle")
    next_day(folder / "pack", 1, folder / "day1")
    return folder


def bundled(run_dir: Path, out: Path) -> None:
    make_bundle(BundleConfig(run_dir=str(run_dir), out=str(out), training=True, trust_model=True))


def check_day(pack: Path, day: int) -> int:
    """Every row of a day's pack has the texts of its log; returns how many rows come from earlier days."""
    found = open_pack(pack)
    known = of_times(text_rows(), *(day_rows(number) for number in range(1, day + 1)))
    older = 0
    for name in found.splits:
        for time, row in texts_of_rows(found.split(name), found.text_tables()["item"]):
            assert row in known[time], (name, time)
            older += time < day * LATER
    return older


def test_a_day_has_the_texts_of_its_rows_and_of_older_ones(folder: Path, tmp_path: Path) -> None:
    """Also where the base is a bundle, and where an older text was evicted, or became known since."""
    assert check_day(folder / "day1", 1) >= 20
    days = {}
    for name, base in (("of-day", folder / "day1"), ("of-bundle", folder / "bundle")):
        days[name] = next_day(base, 2, tmp_path / name)
        assert check_day(days[name], 2) >= 20
    evicted = next_day(folder / "day1", 2, tmp_path / "evicted", *EVICT)
    assert check_day(evicted, 2) >= 20
    gone = pq.read_table(open_pack(evicted).vocab_file("item"))["value"].null_count
    assert gone, "nothing was evicted"
    whole = open_pack(days["of-day"])
    texts, vocabulary = whole.text_tables()["item"], pq.read_table(whole.vocab_file("item"))["value"].to_pylist()
    assert "New on day 2" in vocabulary
    further = texts[whole.schema.feature("item").num_ids :]
    assert len(further) == len(set(further))
    assert not set(further) & set(vocabulary)


def test_a_replayed_pack_keeps_its_texts(folder: Path, tmp_path: Path) -> None:
    """Its texts without a row are numbered behind those of the day, and an evicted text is read too."""
    older = open_pack(folder / "pack")
    for pack in (open_pack(folder / "day1"), open_pack(next_day(folder / "day1", 2, tmp_path / "day", *EVICT))):
        require_older(pack, older)
        parts = [pack.split("train"), older.split("train"), older.split("valid")]
        both = parts[0].followed_by(parts[1]).followed_by(parts[2])
        table = replayed_texts(pack, older)["item"]
        day = pack.manifest["day"]["number"]
        known = of_times(text_rows(), *(day_rows(number) for number in range(1, day + 1)))
        rows = texts_of_rows(both, table, *parts)
        assert all(row in known[time] for time, row in rows)
        assert max(ids.max() for ids in (both.feature_ids("item"), both.feature_ids("last"))) < len(table)
        assert len(rows) == both.num_rows
        assert len(table) == len(list(table)) > len(pack.text_tables()["item"])


@pytest.fixture(scope="module")
def later(folder: Path) -> Path:
    """A bundle of a warm start on the day and on replayed rows, by what the first bundle holds alone."""
    shutil.copytree(folder / "bundle", folder / "copy")
    words = ["train", "--pack", folder / "day1", "--run_dir", folder / "run1", "--warm_start", folder / "copy"]
    words += ["--model.name", "text_models:Shelf", "--replay.pack", folder / "pack", "--schedule.epochs", 1]
    away = (folder / "shelf").rename(folder / "away")
    gmeta(*words)
    away.rename(folder / "shelf")
    shutil.copytree(folder / "copy" / "assets" / "shelf", folder / "shelf1")
    bundled(folder / "run1", folder / "bundle1")
    return folder / "bundle1"


def test_a_day_is_judged(folder: Path, later: Path, tmp_path: Path) -> None:
    """Each pack with its own texts, whatever the versions were trained on."""
    words = ["gate", "--candidate", later, "--current", folder / "bundle", "--pack", folder / "day1"]
    (tmp_path / "rules.yaml").write_text("rules: [{rule: difference, metric: auc, margin: 1}]")
    gmeta(*words, "--rules", tmp_path / "rules.yaml", "--out", tmp_path / "gate", "--trust_model", "true")
    assert (tmp_path / "gate" / "verdict.json").exists()


def test_a_bundle_holds_what_its_model_needs(folder: Path, later: Path, tmp_path: Path) -> None:
    """And a delta what of it is new: the same bytes, files and scores."""
    bundle = folder / "bundle"
    assert assets_of(bundle) == {"scale": str(bundle / "assets" / "shelf")}
    assert assets_of(folder / "run") == {}
    listed = {entry["file"] for entry in read_manifest(bundle)["files"]}
    assert {"assets/shelf/scale.txt", "assets/texts.txt", "vocab/item+texts.parquet"} <= listed
    rows = pa.table(text_rows(4, 12, seed=3, first_user=700))
    expected = package.load(folder / "run", model=Shelf).adapt(rows).predict(rows)
    assert package.load(bundle, model=Shelf).adapt(rows).predict(rows).tolist() == expected.tolist()
    how = make_delta(bundle, later, tmp_path / "delta")["how"]
    assert how["assets/shelf/scale.txt"] == "same"
    assert not (tmp_path / "delta" / "files" / "assets" / "shelf").exists()
    assert how["assets/texts.txt"] == "whole"
    apply_delta(bundle, tmp_path / "delta", tmp_path / "made")
    found, expected = (package.load(path, model=Shelf).adapt(rows).predict(rows) for path in (tmp_path / "made", later))
    assert found.tolist() == expected.tolist()


def test_a_bundle_that_names_a_file_elsewhere_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "bundle", tmp_path / "bundle")
    manifest = sealed({**read_manifest(folder / "bundle"), "assets": {"scale": "../other"}})
    (tmp_path / "bundle" / "manifest.json").write_text(manifest_text(manifest))
    with pytest.raises(ValueError, match=r"names the file '\.\./other', which is no plain name"):
        package.load(tmp_path / "bundle", model=Shelf)
