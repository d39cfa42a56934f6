"""A pack, a run and settings of an earlier release still work; tests/data/old/make.py says how they were made."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow.csv as csv
import pyarrow.parquet as pq
import pytest
import yaml
from commands import gmeta

from gmeta.data.pack import open_pack, verify_pack
from gmeta.runs import checkpoint

FILES = Path(__file__).resolve().parents[1] / "data" / "old"


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(FILES, tmp_path_factory.mktemp("old") / "files"))


@pytest.fixture(autouse=True)
def _in_its_folder(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run names its pack by a relative path."""
    monkeypatch.chdir(old)


def vocabularies(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.parquet")}


def test_it_is_what_that_release_wrote(old: Path) -> None:
    verify_pack("pack")
    assert open_pack("pack").schema.identity is None, "that release recorded no identity"
    assert sum(file.stat().st_size for file in FILES.rglob("*") if file.is_file()) < 200_000


def test_evaluate_gives_the_same_scores(old: Path) -> None:
    expected = pq.read_table(FILES / "run" / "predictions.parquet")
    gmeta("evaluate", "--run_dir", "run", "--resamples", 10)
    found = pq.read_table("run/predictions.parquet")
    assert set(expected.column_names) <= set(found.column_names)
    for name in expected.column_names:
        np.testing.assert_allclose(found[name].to_numpy(), expected[name].to_numpy(), rtol=1e-6, err_msg=name)


def test_predict_gives_the_same_scores(old: Path) -> None:
    gmeta("predict", "--run_dir", "run", "--support", "support.csv", "--query", "query.csv", "--out", "again.csv")
    expected, found = csv.read_csv("scores.csv"), csv.read_csv("again.csv")
    assert found.column_names == expected.column_names
    for name in ("score", "score_before"):
        np.testing.assert_allclose(found[name].to_numpy(), expected[name].to_numpy(), rtol=1e-6)
    assert found.drop(["score", "score_before"]) == expected.drop(["score", "score_before"])


def test_training_goes_on(old: Path, tmp_path: Path) -> None:
    shutil.copytree(FILES / "run", tmp_path / "run")
    before = vocabularies(tmp_path / "run" / "vocab")
    gmeta("train", "--config", "train.yaml", "--run_dir", tmp_path / "run", "--resume", "true", "--schedule.epochs", 3)
    assert checkpoint.steps_saved(tmp_path / "run" / "checkpoints")[-1] == 15
    assert vocabularies(tmp_path / "run" / "vocab") == before
    gmeta("evaluate", "--run_dir", tmp_path / "run", "--resamples", 2, "--baselines", "false")


def test_an_epoch_that_was_begun_in_another_order_is_named(
    old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--config", "train.yaml", "--run_dir", tmp_path / "run", "--loader.tasks_per_batch", 3]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT_VERSION", 2)
        gmeta("train", *words, "--schedule.max_steps", 2)
    gmeta("train", *words, "--resume", "true", "--schedule.max_steps", 3)
    assert "drew epochs in another order" in capsys.readouterr().err
    gmeta("train", *words, "--resume", "true", "--schedule.max_steps", 4)
    assert "drew epochs in another order" not in capsys.readouterr().err


def test_its_settings_and_its_pack_train_a_new_run(
    old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each old key is told once, with the new one where there is one."""
    gmeta("train", "--config", "train.yaml", "--run_dir", tmp_path / "run")
    assert checkpoint.steps_saved(tmp_path / "run" / "checkpoints")[-1] == 10
    told = capsys.readouterr().err
    for old_key, new_key in (("dense.placement", "dense.sharding"), ("model.hidden", "model.args.hidden")):
        assert told.count(f"{old_key} is now {new_key}") == 1
    for dropped in ("comm.fetch", "comm.dedup", "comm.dense", "loader.ahead", "loader.sequential"):
        assert told.count(f"{dropped} is gone") == 1
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["model"]["args"]["hidden"] == [6]


def test_its_schema_and_log_make_the_same_vocabularies(old: Path, tmp_path: Path) -> None:
    """The identity recorded now is the one computed from the old pack's files."""
    gmeta("prepare", "--input", "log.csv", "--schema", "schema.yaml", "--out", tmp_path / "pack", "--query_size", 2)
    recorded, computed = open_pack(tmp_path / "pack").schema.identity, open_pack("pack").identity().schema.identity
    assert recorded is not None
    assert computed is not None
    assert computed["city"] == "hash seed 3"
    for table in ("item", "tags", "item_statistics"):
        assert recorded[table] == computed[table]
