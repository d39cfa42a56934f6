"""Users' mistakes and broken disks around train, evaluate and predict: one message, exit code 2, nothing lost."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from commands import fails, train_words
from packs import make_pack, raw_rows, small_model
from safetensors.torch import load_file

from gmeta.cli import run
from gmeta.data.layout import checksum_file
from gmeta.parallel.mesh import Mesh
from gmeta.recommender.build import build_system
from gmeta.runs import checkpoint
from gmeta.runs.directory import read_config, read_schema

pytestmark = pytest.mark.faults
Capture = pytest.CaptureFixture[str]


def seal(path: Path) -> None:
    """Write the checksums of a checkpoint's files, as they are now."""
    files = [file for file in path.iterdir() if file.name != "checksums.json"]
    sums = {file.name: {"bytes": file.stat().st_size, "xxh3": checksum_file(file)} for file in files}
    (path / "checksums.json").write_text(json.dumps(sums))


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pack(tmp_path_factory.mktemp("data") / "pack")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, pack: Path) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    assert run(train_words(pack, run_dir)) == 0
    return run_dir


@pytest.fixture
def trained_copy(tmp_path: Path, trained: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def test_a_pack_that_is_none_creates_nothing(tmp_path: Path, capsys: Capture) -> None:
    fails(train_words(tmp_path, tmp_path / "run"), capsys, "is no task pack", "gmeta prepare")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--meta.iner_lr", 1], "did you mean meta.inner_lr?"),
        (["--meta.inner_lr", "abc"], "meta.inner_lr is 'abc': must be of type float"),
        (["--meta.inner_lr", -1], "meta.inner_lr is -1.0: must not be negative"),
        (["--meta.inner_steps", 0], "meta.inner_steps is 0: must be at least 1"),
        (["--meta.recompute", "true", "--meta.engine", "reference"], "meta.recompute is True: only the factored"),
        (["--meta.recompute", "true", "--meta.order", "first"], "meta.recompute is True: only the factored"),
        (["--loss", "mes"], "loss is 'mes': must be one of 'bce', 'mse'"),
        (["--meta.inner_loss", "mes"], "meta.inner_loss is 'mes': must be one of"),
        (["--schedule.metric", "acc"], "schedule.metric is 'acc': must be one of auc"),
        (["--loss", "mse", "--schedule.metric", "auc"], "schedule.metric is 'auc': needs loss bce"),
        (["--model.features", "[itm]"], "'itm', which is not in the pack: did you mean 'item'?"),
        (
            ["--model.name", "mellu"],
            "model.name is 'mellu': did you mean 'melu'? (your own model is named",
        ),
        (["--meta.adapt", "[embedings]"], "the nearest name is 'embeddings'"),
        (["--meta.modulation", "gates"], "meta.modulation is 'gates': must be one of"),
        (
            ["--meta.modulation", "film", "--meta.adapt", "[]"],
            "meta.modulation is 'film': it sets where SGD steps start, and meta.adapt [] takes none",
        ),
        (
            ["--model.name", "neural_linear", "--meta.modulation", "film", "--meta.adapt", "[last_layer]"],
            "meta.modulation is 'film': it sets where SGD steps start, and meta.adapt ['last_layer'] takes none",
        ),
        (["--meta.clusters", 0], "meta.clusters is 0: must be at least 1"),
        (["--seed", -1], "seed is -1"),
        (["--comm.wire", "int8"], "comm.wire is 'int8': must be one of"),
        (["--comm.node_size", 3], "comm.node_size is 3, world size is 1: it must divide the number of workers"),
        (["--nproc", 0], "nproc is 0"),
        (["--device", "cuda"], "0 CUDA devices"),
    ],
)
def test_config_mistakes(pack: Path, tmp_path: Path, capsys: Capture, words: list[object], expected: str) -> None:
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    fails([*train_words(pack, tmp_path / "run"), *words], capsys, expected)


def test_unknown_key_in_yaml(pack: Path, tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"pack: {pack}\nrun_dir: {tmp_path}/run\nembedding: {{learning_rate: 1}}\n")
    fails(["train", "--config", file], capsys, "learning_rate")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"meta: 3\n", "meta is 3 in"),
        (b"pack: [x\nrun_dir: y\n", "cannot be read (while parsing a flow sequence"),
        (b"", "holds no mapping"),
        (b"\xff\xfe\x00", "cannot be read ('utf-8' codec"),
    ],
)
def test_config_files_that_are_none(tmp_path: Path, capsys: Capture, content: bytes, expected: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_bytes(content)
    fails(["train", "--config", file], capsys, expected, str(file))
    fails(["train", f"--config={file}"], capsys, expected, str(file))


def test_labels_that_are_no_clicks(tmp_path: Path, capsys: Capture, pack: Path) -> None:
    from gmeta.data.schema import pack_schema_from_json

    schema = json.loads((pack / "manifest.json").read_text())["schema"]
    file = tmp_path / "config.yaml"
    file.write_text(f"pack: {pack}\nrun_dir: x\n")
    (tmp_path / "run").mkdir()
    shutil.copy(file, tmp_path / "run" / "config.yaml")
    with pytest.raises(ValueError, match="loss is 'bce' but label 'click' has values other than 0 and 1"):
        build_system(read_config(tmp_path / "run"), pack_schema_from_json({**schema, "binary_label": False}), Mesh())


def test_damaged_shard(pack: Path, tmp_path: Path, capsys: Capture) -> None:
    broken = tmp_path / "pack"
    shutil.copytree(pack, broken)
    shard = broken / "shard-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-10] ^= 4
    shard.write_bytes(content)
    fails(train_words(broken, tmp_path / "run"), capsys, "shard-00000.safetensors is damaged")


def test_an_existing_run_is_not_overwritten(pack: Path, trained: Path, capsys: Capture) -> None:
    fails(train_words(pack, trained), capsys, "already holds a run", "--resume")


def test_two_runs_in_one_directory(pack: Path, tmp_path: Path, capsys: Capture) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with (run_dir / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        fails(train_words(pack, run_dir), capsys, "is being written by another run")


def test_resume_with_another_model(pack: Path, trained_copy: Path, capsys: Capture) -> None:
    words = train_words(pack, trained_copy, "--resume", "true", "--model.args.hidden", "[9]")
    fails(words, capsys, "model.args.hidden is [9]", "has [8]", "start a new run_dir")


def test_checkpoint_of_another_model(trained_copy: Path) -> None:
    config = replace(read_config(trained_copy), model=small_model("melu"))
    schema, _ = read_schema(trained_copy)
    tensors = build_system(config, schema, Mesh(), training=False).tensors()
    last = checkpoint.find_checkpoint(trained_copy / "checkpoints", "last")
    with pytest.raises(ValueError, match=r"is of another model: .*expected"):
        checkpoint.load_tensors(last, tensors, Mesh())


def test_data_of_another_schema(trained_copy: Path, capsys: Capture) -> None:
    file = trained_copy / "schema.json"
    schema = json.loads(file.read_text())
    schema["pack"]["features"][1]["num_ids"] += 5
    file.write_text(json.dumps(schema))
    fails(["evaluate", "--run_dir", trained_copy], capsys, "feature 'item': num_ids is 40, expected 45")


def test_damaged_checkpoint(trained_copy: Path, capsys: Capture) -> None:
    last = checkpoint.find_checkpoint(trained_copy / "checkpoints", "last")
    (file,) = last.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-10] ^= 4
    file.write_bytes(content)
    fails(["evaluate", "--run_dir", trained_copy, "--checkpoint", "last"], capsys, "is damaged", str(file))
    file.write_bytes(content[:-100])
    fails(["evaluate", "--run_dir", trained_copy, "--checkpoint", "last"], capsys, "bytes, expected", str(file))
    file.unlink()
    fails(["evaluate", "--run_dir", trained_copy, "--checkpoint", "last"], capsys, "is not whole")


def test_a_checkpoint_that_lists_nothing_is_damaged(pack: Path, trained_copy: Path, capsys: Capture) -> None:
    last = checkpoint.find_checkpoint(trained_copy / "checkpoints", "last")
    cure = "delete this checkpoint and resume from an older one"
    (last / "checksums.json").write_text("{}")
    fails(["evaluate", "--run_dir", trained_copy, "--checkpoint", "last"], capsys, "does not list state.json", cure)
    (last / "state.json").write_text("{}")
    seal(last)
    fails(train_words(pack, trained_copy, "--resume", "true"), capsys, "state.json is damaged", cure)


def test_a_run_dir_that_is_a_file_is_refused(pack: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "file").write_text("mine")
    for run_dir in (tmp_path / "file", tmp_path / "file" / "run"):
        fails(train_words(pack, run_dir), capsys, f"cannot write {run_dir}", "name another run_dir")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("missing", ["config.yaml", "metrics.jsonl", "schema.json"])
def test_a_run_that_lost_a_file_is_still_a_run(pack: Path, trained_copy: Path, capsys: Capture, missing: str) -> None:
    (trained_copy / missing).unlink()
    fails(train_words(pack, trained_copy), capsys, "already holds a run")
    words = train_words(pack, trained_copy, "--resume", "true", "--loader.tasks_per_batch", 10)
    fails(words, capsys, "loader.tasks_per_batch is 10, but the run to resume has 20")
    assert run(train_words(pack, trained_copy, "--resume", "true")) == 0


@pytest.mark.parametrize("content", [b"", b"[1, 2]", b"\xff\xfe\x00garbage", b"model: 3\npack: [", b'{"a": 1}'])
@pytest.mark.parametrize(
    "name",
    ["config.yaml", "schema.json", "checkpoints/step-00000006/checksums.json", "checkpoints/step-00000006/state.json"],
)
def test_damaged_run_files(trained_copy: Path, capsys: Capture, name: str, content: bytes) -> None:
    (trained_copy / name).write_bytes(content)
    fails(["evaluate", "--run_dir", trained_copy, "--checkpoint", "last"], capsys, name.removesuffix("/checksums.json"))


def test_a_damaged_last_checkpoint_does_not_hide_the_best(trained_copy: Path) -> None:
    (trained_copy / "checkpoints" / "step-00000006" / "state.json").write_text("")
    with pytest.warns(UserWarning, match=r"an older checkpoint has to say which is the best: .*step-00000006"):
        assert checkpoint.find_checkpoint(trained_copy / "checkpoints", "best").name == "step-00000003"
    assert checkpoint.find_checkpoint(trained_copy / "checkpoints", "3").name == "step-00000003"


def test_damaged_vocabulary_is_not_copied(pack: Path, tmp_path: Path, capsys: Capture) -> None:
    broken = tmp_path / "pack"
    shutil.copytree(pack, broken)
    file = broken / "vocab" / "item.parquet"
    file.write_bytes(b"x" * file.stat().st_size)
    fails(train_words(broken, tmp_path / "run"), capsys, "item.parquet is damaged")


def test_a_metric_that_is_not_defined_is_no_best(tmp_path: Path, capsys: Capture) -> None:
    """A valid split of one task has no GAUC at times; that must neither be best nor use up the patience."""
    pack = make_pack(tmp_path / "pack", valid=1, seed=4)
    words = train_words(pack, tmp_path / "run", "--schedule.metric", "auc", "--schedule.patience", 1)
    shard = next(iter(json.loads((pack / "manifest.json").read_text())["splits"]["valid"]["shards"]))
    label = load_file(pack / shard["file"])["label"]
    support = load_file(pack / shard["file"])["num_support"]
    assert len(set(label[int(support) :].tolist())) == 1, "the premise: one class, hence no AUC"
    assert run(words) == 0
    said = capsys.readouterr().err
    state = checkpoint.read_state(checkpoint.find_checkpoint(tmp_path / "run" / "checkpoints", "last"))
    assert "is not defined on the valid split" in said
    assert state["best_step"] is None
    assert state["progress"]["step"] == 6


def test_resume_of_a_finished_run_says_so(pack: Path, trained_copy: Path, capsys: Capture) -> None:
    assert run(train_words(pack, trained_copy, "--resume", "true")) == 0
    said = capsys.readouterr().err
    assert "nothing left to train after step 6: schedule.epochs is" in said
    assert "done after step 6 of 6" in said


def test_nproc_in_yaml(pack: Path, tmp_path: Path, capfd: Capture) -> None:
    """`nproc` is a key like any other; workers do not start workers."""
    file = tmp_path / "config.yaml"
    words = train_words(pack, tmp_path / "run")[1:]
    pairs = dict(zip((w.removeprefix("--") for w in words[::2]), words[1::2], strict=True))
    file.write_text("nproc: 2\n" + "".join(f"{key}: {value}\n" for key, value in pairs.items() if "." not in key))
    more = [word for key, value in pairs.items() if "." in key for word in (f"--{key}", value)]
    code = run(["train", "--config", str(file), *more])
    said = capfd.readouterr().err
    assert code == 0, said
    assert "on 2 process(es)" in said


def test_a_run_is_evaluated_from_anywhere(pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(pack, tmp_path / "pack")
    monkeypatch.chdir(tmp_path)
    assert run(train_words(Path("pack"), Path("run"))) == 0
    monkeypatch.chdir("/")
    assert run(["evaluate", "--run_dir", str(tmp_path / "run"), "--resamples", "10"]) == 0


def test_full_disk_in_an_evaluation(trained_copy: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    fails(["evaluate", "--run_dir", trained_copy, "--resamples", 10], capsys, "evaluation.json", "No space left")
    assert not list(trained_copy.glob(".partial-*"))


def test_no_such_checkpoint(trained: Path, tmp_path: Path, capsys: Capture) -> None:
    fails(["evaluate", "--run_dir", trained, "--checkpoint", "7"], capsys, "must be best, last or one of [3, 6]")
    fails(["evaluate", "--run_dir", tmp_path], capsys, "holds no run")


def test_full_disk_in_a_save(pack: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second save fails; the first stays, and a resume goes on from it."""
    saves = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if "checkpoints" in os.readlink(f"/proc/self/fd/{descriptor}"):
            saves.append(descriptor)
            if (run_dir / "checkpoints" / "step-00000003").exists() and len(saves) > 8:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    run_dir = tmp_path / "run"
    monkeypatch.setattr(os, "fsync", fsync)
    fails(train_words(pack, run_dir), capsys, "cannot save", "No space left on device", "--resume")
    monkeypatch.undo()
    assert checkpoint.steps_saved(run_dir / "checkpoints") == [3]
    assert not list((run_dir / "checkpoints").glob(".partial-*"))
    assert run(train_words(pack, run_dir, "--resume", "true")) == 0
    assert checkpoint.steps_saved(run_dir / "checkpoints")[-1] == 6


def test_a_loss_that_is_not_finite(pack: Path, tmp_path: Path, capsys: Capture) -> None:
    run_dir = tmp_path / "run"
    words = train_words(pack, run_dir, "--loss", "mse", "--meta.inner_lr", 1e30, "--meta.inner_steps", 4)
    fails(words, capsys, "gradient norm is", "no weights were changed", "not-finite-step-00000000.json")
    found = json.loads((run_dir / "not-finite-step-00000000.json").read_text())
    assert len(found["task_id"]) == 20
    assert not (run_dir / "checkpoints").exists()


def test_resume_is_bit_equal_in_one_process(pack: Path, tmp_path: Path, trained: Path) -> None:
    run_dir = tmp_path / "run"
    assert run(train_words(pack, run_dir, "--schedule.max_steps", 4, "--schedule.checkpoint_every", 4)) == 0
    assert run(train_words(pack, run_dir, "--resume", "true")) == 0
    (ours,) = checkpoint.step_dir(run_dir / "checkpoints", 6).glob("*.safetensors")
    (theirs,) = checkpoint.step_dir(trained / "checkpoints", 6).glob("*.safetensors")
    expected = load_file(theirs)
    for name, value in load_file(ours).items():
        assert torch.equal(value, expected[name]), name


def test_a_resumed_run_may_compute_the_same_another_way(pack: Path, trained_copy: Path) -> None:
    more = ["--resume", "true", "--schedule.epochs", 3]
    for changes in (["--meta.recompute", "true"], ["--meta.engine", "reference"]):
        assert run(train_words(pack, trained_copy, *more, *changes)) == 0


def raw_files(folder: Path) -> tuple[Path, Path]:
    """Support and query files that fit the pack of `make_pack`."""
    rows = raw_rows()
    support, query = folder / "support.parquet", folder / "query.parquet"
    pq.write_table(pa.table({**rows, "click": [1, 0, 1]}), support)
    pq.write_table(pa.table({name: values[::-1] for name, values in rows.items()}), query)
    return support, query


def test_predict(trained: Path, tmp_path: Path, capsys: Capture) -> None:
    support, query = raw_files(tmp_path)
    out = tmp_path / "scores.parquet"
    words = ["predict", "--run_dir", trained, "--support", support, "--query", query, "--out", out]
    assert run([str(word) for word in words]) == 0
    found = pq.read_table(out)
    assert found["item"].to_pylist() == ["item3", "item2", "item1"]
    assert all(0 < score < 1 for score in found["score"].to_pylist())
    assert found["score"].to_pylist() != found["score_before"].to_pylist()
    fails([*words[:-1], tmp_path / "x.json"], capsys, "must end in .parquet or .csv")
    fails([*words[:3], "--support", tmp_path / "nope.csv", *words[5:]], capsys, "nope.csv")
    pq.write_table(pq.read_table(query).drop(["item"]), query)
    fails(words, capsys, "no column 'item'")
    support, query = raw_files(tmp_path)
    table = pq.read_table(support)
    pq.write_table(table.set_column(table.schema.get_field_index("click"), "click", [[1, 0, 3]]), support)
    fails(words, capsys, "label 3", "0 or 1")
