"""A run reads only data that mean what they meant in training; each ingredient, changed alone, is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import fails
from packs import DATA_SCHEMA, SCHEMA, make_pack, values_of

from gmeta.cli import run
from gmeta.data.identity import content_checksum
from gmeta.data.layout import checksum_file
from gmeta.data.pack import manifest_checksum, open_pack
from gmeta.data.schema import DataSchema, NumericColumn, PackSchema
from gmeta.evaluation import predictions
from gmeta.evaluation.predictions import values_of_ids
from gmeta.runs.data import is_own_pack, require_fitting_pack, require_same_training_data
from gmeta.runs.directory import _write_data

pytestmark = pytest.mark.faults
Capture = pytest.CaptureFixture[str]

# The group is hashed, so that a hash seed is part of what must be equal.
HASHED = replace(
    DATA_SCHEMA, features=(replace(DATA_SCHEMA.features[0], hash_buckets=6), *DATA_SCHEMA.features[1:]), hash_seed=3
)


def statistics(label_sum: float = 3.0, item: str = "item1", count: int = 5) -> pa.Table:
    columns = {"value": [None, item, "item2"], "label_sum": [7.0, label_sum, 4.0], "count": [9, count, 4]}
    return pa.table({**columns, "value": pa.array(columns["value"], pa.string())})


def numeric(**changes: Any) -> PackSchema:
    return replace(SCHEMA, numeric=(NumericColumn(name="age", **changes), SCHEMA.numeric[1]))


def other_values(change: Callable[[list[str]], list[str]]) -> Callable[[str, int], list[str]]:
    return lambda table, num: change(values_of(table, num)) if table == "item" else values_of(table, num)


def hashed(seed: int, **changes: Any) -> DataSchema:
    return replace(HASHED, hash_seed=seed, **changes)


BASE: dict[str, Any] = {"data_schema": HASHED, "statistics": statistics()}
CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "content of a vocabulary": (
        {"values": other_values(lambda v: [*v[:4], "new", *v[5:]])},
        "vocabulary 'item': 1 of 39 ids stand for another value; id 5 is 'new', expected 'item5'",
    ),
    "order of a vocabulary": (
        {"values": other_values(lambda v: [v[1], v[0], *v[2:]])},
        "vocabulary 'item': 2 of 39 ids stand for another value; id 1 is 'item2', expected 'item1'",
    ),
    "border between two values": (
        {"values": other_values(lambda v: ["item", "1item2", *v[2:]])},
        "vocabulary 'item': 2 of 39 ids stand for another value",
    ),
    "hash seed": ({"data_schema": hashed(4)}, "table 'group' is encoded with hash seed 4, expected hash seed 3"),
    "hash for a vocabulary": (
        {"data_schema": DATA_SCHEMA},
        "table 'group' is encoded with a vocabulary, expected hash seed 3",
    ),
    "mean": ({"schema": numeric(mean=1e-9)}, "numeric column 'age': mean is 1e-09, expected 0.0"),
    "deviation": ({"schema": numeric(std=2.0)}, "numeric column 'age': std is 2.0, expected 1.0"),
    "logarithm": ({"schema": numeric(log=True)}, "numeric column 'age': log is True, expected False"),
    "label sum of an item": (
        {"statistics": statistics(label_sum=3.5)},
        "the item statistics: 1 of 3 entries differ; item 'item1' has (label sum, rows) (3.5, 5), expected (3.0, 5)",
    ),
    "rows of an item": ({"statistics": statistics(count=6)}, "the item statistics: 1 of 3 entries differ"),
    "items with statistics": ({"statistics": statistics(item="item9")}, "the item statistics: 2 of 4 entries differ"),
    "item statistics": ({"statistics": None}, "the item statistics differs, and there is no "),
    "threshold of the label": (
        {"data_schema": hashed(3, label_threshold=4.0)},
        "label_threshold is 4.0, expected None",
    ),
    "label": ({"schema": replace(SCHEMA, label="pay")}, "label is 'pay', expected 'click'"),
    "task": ({"schema": replace(SCHEMA, task="session")}, "task is 'session', expected 'user'"),
    "item": ({"schema": replace(SCHEMA, item=None)}, "item is None, expected 'item'"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a pack, a run on it, its plain twin, and for each change a pack that differs in it alone."""
    place = tmp_path_factory.mktemp("identity")
    make_pack(place / "pack", **BASE)
    words = ["--model.name", "melu", "--pack", place / "pack", "--loader.tasks_per_batch", 20, "--model.hidden", "[4]"]
    words += ["--schedule.epochs", 1, "--meta.adapt"]
    for name, adapt in (("run", "[head]"), ("plain", "[]")):
        assert run([str(word) for word in ["train", *words, adapt, "--run_dir", place / name]]) == 0
    for name, (changes, _) in CHANGES.items():
        make_pack(place / name, **{**BASE, **changes})
    return place


@pytest.fixture
def run_dir(place: Path, tmp_path: Path) -> Path:
    shutil.copytree(place / "run", tmp_path / "run")
    return tmp_path / "run"


def forget_pack(path: Path) -> None:
    """Make a pack as releases made it that did not record the identity."""
    file = path / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["schema"]["identity"]
    file.write_text(json.dumps({**manifest, "xxh3": manifest_checksum(manifest)}))


def forget_run(path: Path) -> None:
    """Make a run as releases made it that did not record the identity."""
    schema = json.loads((path / "schema.json").read_text())
    del schema["pack"]["identity"], schema["tasks"], schema["rows"], schema["manifest"]
    (path / "schema.json").write_text(json.dumps(schema))
    for file in path.glob("checkpoints/*/state.json"):
        state = json.loads(file.read_text())
        del state["schema"]["identity"]
        file.write_text(json.dumps(state))
        sums = json.loads(file.with_name("checksums.json").read_text())
        sums["state.json"] = {"bytes": file.stat().st_size, "xxh3": checksum_file(file)}
        file.with_name("checksums.json").write_text(json.dumps(sums))


def contents(folder: Path) -> dict[str, bytes]:
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != ".lock"]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def resume_words(run_dir: Path, pack: Path) -> list[object]:
    words = ["train", "--model.name", "melu", "--pack", pack, "--run_dir", run_dir, "--loader.tasks_per_batch", 20]
    return [*words, "--model.hidden", "[4]", "--meta.adapt", "[head]", "--resume", "true", "--schedule.epochs", 2]


@pytest.mark.parametrize("change", CHANGES)
def test_other_data_are_refused_with_what_differs(place: Path, run_dir: Path, capsys: Capture, change: str) -> None:
    """By evaluate, by resume and as a plain run's; nothing of the run is changed."""
    before, expected = contents(run_dir), CHANGES[change][1]
    pack = place / change
    cure = "`gmeta predict`, which encodes them as the run does"
    fails(["evaluate", "--run_dir", run_dir, "--pack", pack], capsys, expected, str(pack), cure)
    fails(resume_words(run_dir, pack), capsys, expected, "is not the data that run", "name a new run_dir")
    other = run_dir.with_name("plain")
    shutil.copytree(place / "plain", other)
    _write_data(other, open_pack(pack), None, keep=False)
    words = ["evaluate", "--run_dir", run_dir, "--plain_run", other]
    fails(words, capsys, expected, f"run {other} was not trained on the data of run")
    assert contents(run_dir) == before


@pytest.mark.parametrize("change", CHANGES)
def test_packs_and_runs_without_a_record_are_told_apart_too(place: Path, run_dir: Path, change: str) -> None:
    """The identity is then computed from the files, on either side."""
    old_pack = run_dir.with_name("old")
    shutil.copytree(place / change, old_pack)
    forget_pack(old_pack)
    with pytest.raises(ValueError, match="was not encoded as the data of run"):
        require_fitting_pack(run_dir, open_pack(old_pack))
    forget_run(run_dir)
    for pack in (old_pack, place / change):
        with pytest.raises(ValueError, match="was not encoded as the data of run"):
            require_fitting_pack(run_dir, open_pack(pack))


@pytest.mark.parametrize("old", ["none", "pack", "run", "both"])
def test_equal_data_in_another_place_are_accepted(place: Path, run_dir: Path, tmp_path: Path, old: str) -> None:
    pack, plain = tmp_path / "copy", tmp_path / "plain"
    shutil.copytree(place / "pack", pack)
    shutil.copytree(place / "plain", plain)
    # Another release of a library may write the same vocabulary in other bytes.
    vocabulary = pq.read_table(pack / "vocab" / "item.parquet")
    file = tmp_path / "item.parquet"
    pq.write_table(vocabulary, file, compression="none", row_group_size=7, use_dictionary=False)
    assert file.read_bytes() != (pack / "vocab" / "item.parquet").read_bytes()
    assert content_checksum(file, ("value", "id")) == open_pack(pack).identity().schema.identity["item"]
    if old in ("pack", "both"):
        forget_pack(pack)
    if old in ("run", "both"):
        shutil.copy(file, run_dir / "vocab" / "item.parquet")
        forget_run(run_dir)
        forget_run(plain)
    require_fitting_pack(run_dir, open_pack(pack))
    require_same_training_data(run_dir, plain)
    if old in ("none", "both"):
        vocab = contents(run_dir / "vocab")
        assert run([str(word) for word in resume_words(run_dir, pack)]) == 0
        assert contents(run_dir / "vocab") == vocab


def test_other_tasks_or_splits(place: Path, run_dir: Path, tmp_path: Path, capsys: Capture) -> None:
    """A pack of the same encoding may be evaluated, but neither trained on nor compared with."""
    pack = make_pack(tmp_path / "cut", train=50, valid=30, **BASE)
    assert run(["evaluate", "--run_dir", str(run_dir), "--pack", str(pack), "--resamples", "2"]) == 0
    fails(resume_words(run_dir, pack), capsys, "its tasks, or the splits they lie in, are others")
    plain = tmp_path / "plain"
    shutil.copytree(place / "plain", plain)
    _write_data(plain, open_pack(pack), None, keep=False)
    words = ["evaluate", "--run_dir", run_dir, "--plain_run", plain]
    fails(words, capsys, "its tasks, or the splits they lie in, are others", "train it again on the pack of the other")


def test_other_rows_of_the_same_tasks(place: Path, run_dir: Path, tmp_path: Path, capsys: Capture) -> None:
    """A pack of the same tasks with other labels may be evaluated, as another, but neither trained on nor compared
    with; runs that did not record their rows go on as they did.
    """

    def relabel(arrays: dict[str, np.ndarray]) -> None:
        if arrays["task_id"][0] == 0:  # the training tasks
            arrays["label"][:] = 1 - arrays["label"]

    pack, expected = (
        make_pack(tmp_path / "relabelled", change=relabel, **BASE),
        "its rows are others: the same tasks have other labels, features or support in train. ",
    )
    assert open_pack(pack).tasks_checksum() == open_pack(place / "pack").tasks_checksum()
    fails(resume_words(run_dir, pack), capsys, expected, "name a new run_dir")
    assert not is_own_pack(run_dir, open_pack(pack))
    plain = tmp_path / "plain"
    shutil.copytree(place / "plain", plain)
    _write_data(plain, open_pack(pack), None, keep=False)
    fails(
        ["evaluate", "--run_dir", run_dir, "--plain_run", plain], capsys, expected, "was not trained on the data of run"
    )

    # A pack that was made again in its own place is another one too.
    here = tmp_path / "here"
    shutil.copytree(run_dir, here)
    config = (here / "config.yaml").read_text()
    (here / "config.yaml").write_text(config.replace(str(place / "pack"), str(pack)))
    assert not is_own_pack(here, open_pack(pack))
    schema = json.loads((here / "schema.json").read_text())
    (here / "schema.json").write_text(json.dumps({**schema, "rows": "0"}))
    with pytest.raises(ValueError, match=r"schema.json is no schema of a run \(rows is '0'\): restore it"):
        is_own_pack(here, open_pack(pack))
    del schema["rows"]
    (here / "schema.json").write_text(json.dumps(schema))
    assert is_own_pack(here, open_pack(pack))
    assert run([str(word) for word in resume_words(here, pack)]) == 0


def test_runs_whose_tasks_cannot_be_known(place: Path, run_dir: Path, tmp_path: Path) -> None:
    """Runs too old to have recorded them are compared by their packs, or by the name of a pack that is gone."""
    plain = tmp_path / "plain"
    shutil.copytree(place / "plain", plain)
    for path in (run_dir, plain):
        forget_run(path)
        config = (path / "config.yaml").read_text()
        (path / "config.yaml").write_text(config.replace(str(place / "pack"), "/gone"))
    require_same_training_data(run_dir, plain)
    (plain / "config.yaml").write_text((plain / "config.yaml").read_text().replace("/gone", "/elsewhere"))
    with pytest.raises(ValueError, match="whether it had the same tasks is not recorded"):
        require_same_training_data(run_dir, plain)


def test_evaluations_of_other_packs_lie_beside_the_own(
    place: Path, run_dir: Path, tmp_path: Path, capsys: Capture
) -> None:
    """Two packs of one name too; a copy of the own pack counts as the own one."""
    words = ["evaluate", "--run_dir", str(run_dir), "--resamples", "2", "--baselines", "false"]
    assert run(words) == 0
    names = ("evaluation.json", "predictions.parquet")
    own = {name: (run_dir / name).read_bytes() for name in names}
    capsys.readouterr()
    packs = [make_pack(tmp_path / name / "cut", test=test, **BASE) for name, test in (("a", 19), ("b", 18))]
    written = set()
    for pack in packs:
        assert run([*words, "--pack", str(pack)]) == 0
        said = capsys.readouterr().out.replace("\n", "")
        found = {file for file in run_dir.glob("evaluation-cut-*.json") if file not in written}
        (file,) = found
        assert f"{pack} is not the run's own pack: written to {file}" in said
        assert json.loads(file.read_text())["settings"]["pack"] == str(pack)
        assert file.with_name(file.name.replace("evaluation", "predictions")).with_suffix(".parquet").exists()
        written |= found
    assert run([*words, "--pack", str(packs[0]), "--out", str(tmp_path / "out")]) == 0
    assert {*names, "report.html"} == {file.name for file in (tmp_path / "out").iterdir()}
    assert str(packs[0]) in (tmp_path / "out" / "report.html").read_text()
    assert set(run_dir.glob("evaluation-cut-*.json")) == written
    assert run(["report", "--run_dir", str(run_dir)]) == 0
    assert not [pack for pack in packs if str(pack) in (run_dir / "report.html").read_text()]
    assert {name: (run_dir / name).read_bytes() for name in names} == own
    shutil.copytree(place / "pack", tmp_path / "moved")
    (run_dir / "evaluation.json").unlink()
    assert run([*words, "--pack", str(tmp_path / "moved")]) == 0
    assert (run_dir / "evaluation.json").exists()


def test_predictions_name_unknown_items_null(place: Path, run_dir: Path) -> None:
    assert run(["evaluate", "--run_dir", str(run_dir), "--resamples", "2", "--baselines", "false"]) == 0
    found = pq.read_table(run_dir / "predictions.parquet")
    columns = ["task_id", "task", "item", "row", "label", "before", "before.ranking", "after", "after.ranking"]
    assert found.column_names == columns
    split = open_pack(place / "pack").split("test")
    ids = split.columns(("item",)).ids["item"][found["row"].to_numpy()]
    assert found["item"].to_pylist() == [f"item{i}" if i else None for i in ids.tolist()]
    assert None in found["item"].to_pylist()
    assert found["task"].to_pylist() == [f"u{i}" for i in found["task_id"].to_pylist()]


def test_predictions_are_written_in_blocks(place: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["evaluate", "--run_dir", str(run_dir), "--resamples", "2"]
    assert run(words) == 0
    whole = pq.read_table(run_dir / "predictions.parquet")
    monkeypatch.setattr(predictions, "_BLOCK_ROWS", 7)
    assert run(words) == 0
    file = pq.ParquetFile(run_dir / "predictions.parquet")
    assert file.read().equals(whole, check_metadata=True)
    assert file.metadata.num_row_groups == -(-whole.num_rows // 7) > 2
    told = {key.decode(): value.decode() for key, value in file.schema_arrow.metadata.items()}
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    assert json.loads(told["variants"]) == evaluation["variants"]
    assert (told["loss"], told["step"]) == ("bce", str(evaluation["settings"]["step"]))


def test_items_without_a_vocabulary_get_no_column(tmp_path: Path) -> None:
    """They are hashed, or no feature: their raw values are not kept."""
    item = replace(DATA_SCHEMA.features[1], hash_buckets=39)
    hashed_item = replace(DATA_SCHEMA, features=(DATA_SCHEMA.features[0], item, DATA_SCHEMA.features[2]))
    packs = {"hashed": {"data_schema": hashed_item}, "none": {"schema": replace(SCHEMA, item=None)}}
    packs["no feature"] = {"schema": replace(SCHEMA, item="movie")}
    for name, changes in packs.items():
        pack = open_pack(make_pack(tmp_path / name, **changes))
        assert values_of_ids(pack, pack.schema.item) is None


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_a_column_of_unknown_values_is_a_warning(place: Path, tmp_path: Path, capsys: Capture, command: str) -> None:
    """Values written in another way, such as item_1 for item1, are all unknown: the scores say nothing."""
    run_dir = tmp_path / "run"
    shutil.copytree(place / "run", run_dir)
    files = [tmp_path / "support.parquet", tmp_path / "query.parquet"]
    row = {"user": "a", "group": "g", "tags": ["tags1", "tags2"], "age": 1.0, "price": 2.0, "click": 1}
    for file in files:
        pq.write_table(pa.Table.from_pylist([{**row, "item": f"item_{i}"} for i in range(6)]), file)
    if command == "predict":
        words = ["--support", files[0], "--query", files[1], "--out", tmp_path / "scores.csv"]
        where = f"{files[0]} and {files[1]}"
    else:
        pack = make_pack(tmp_path / "pack", change=lambda arrays: arrays["ids"][:, 1].fill(0), **BASE)
        words = ["--pack", pack, "--resamples", 2, "--baselines", "false"]
        where = f"{pack}, split test,"
    assert run([str(word) for word in [command, "--run_dir", run_dir, *words]]) == 0
    said = capsys.readouterr().err
    assert f"{command}: warning: the run does not know the values of {where} in column 'item' (100%): " in said
    assert "'tags'" not in said


def test_a_vocabulary_that_is_not_the_runs_is_refused_in_predict(
    place: Path, run_dir: Path, tmp_path: Path, capsys: Capture
) -> None:
    """It would encode the raw rows without complaint."""
    shutil.copy(place / "order of a vocabulary" / "vocab" / "item.parquet", run_dir / "vocab" / "item.parquet")
    files = [tmp_path / "support.csv", tmp_path / "query.csv"]
    for file in files:
        file.write_text("user,group,item,tags,age,price,click\n")
    words = ["predict", "--run_dir", run_dir, "--support", files[0], "--query", files[1], "--out", tmp_path / "s.csv"]
    fails(words, capsys, "item.parquet is missing, or not what the run was trained with", "copy it again")


def test_a_vocabulary_that_was_lost_comes_back_with_a_resume(place: Path, run_dir: Path) -> None:
    expected = contents(run_dir / "vocab")
    (run_dir / "vocab" / "item.parquet").unlink()
    (run_dir / "schema.json").unlink()
    assert run([str(word) for word in resume_words(run_dir, place / "pack")]) == 0
    assert contents(run_dir / "vocab") == expected
    assert (run_dir / "schema.json").read_text() == (place / "run" / "schema.json").read_text()
