"""Files of a trained run that are damaged, edited or swapped: no command gives other predictions without a word."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq
import pytest
import torch
from commands import fails, gmeta, train_words
from packs import make_pack, raw_rows
from safetensors.torch import load_file, save_file

from gmeta.data.identity import content_checksum
from gmeta.runs import checkpoint
from gmeta.runs.checkpoint import read_state, step_dir

pytestmark = pytest.mark.faults
Capture = pytest.CaptureFixture[str]
Place = Callable[..., Path]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints 3, 6 and 9 of which the last is the best, its pack, and files to predict."""
    place = tmp_path_factory.mktemp("place")
    make_pack(place / "pack")
    gmeta(*train_words(place / "pack", place / "run", "--schedule.keep_last", 9, "--seed", 5, epochs=3))
    best = [read_state(step_dir(place / "run" / "checkpoints", step))["best_step"] for step in (3, 6, 9)]
    assert best == [3, 6, 9], "the premise: each is better than those before"
    rows = raw_rows("group3")
    pq.write_table(pa.table({**rows, "click": [1, 0, 1]}), place / "support.parquet")
    pq.write_table(pa.table(rows), place / "query.parquet")
    return place


@pytest.fixture
def run_dir(place: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(place / "run", tmp_path / "run"))


def evaluate(run_dir: Path, *more: object) -> list[object]:
    return ["evaluate", "--run_dir", run_dir, "--resamples", 2, "--baselines", "false", *more]


def predict(run_dir: Path, place: Path, out: str = "scores.parquet") -> list[object]:
    files = ["--support", place / "support.parquet", "--query", place / "query.parquet", "--out", run_dir.parent / out]
    return ["predict", "--run_dir", run_dir, *files]


def test_the_step_that_was_used_is_recorded(place: Path, run_dir: Path, capsys: Capture) -> None:
    for which, step in (("best", 9), ("last", 9), ("3", 3)):
        gmeta(*evaluate(run_dir, "--checkpoint", which))
        settings = json.loads((run_dir / "evaluation.json").read_text())["settings"]
        assert (settings["checkpoint"], settings["step"]) == (which, step)
        assert pq.read_schema(run_dir / "predictions.parquet").metadata[b"step"] == str(step).encode()
        gmeta(*predict(run_dir, place), "--checkpoint", which)
        assert pq.read_schema(run_dir.parent / "scores.parquet").metadata[b"step"] == str(step).encode()
    gmeta(*predict(run_dir, place, "scores.csv"), "--checkpoint", "3")
    assert "scored by step 3" in " ".join(capsys.readouterr().out.split())
    gmeta(*evaluate(run_dir, "--plain_run", plain_twin(place, run_dir)))
    assert json.loads((run_dir / "evaluation.json").read_text())["settings"]["plain_step"] == 3


def plain_twin(place: Path, run_dir: Path) -> Path:
    plain = run_dir.with_name("plain")
    gmeta(*train_words(place / "pack", plain, "--meta.adapt", "[]", epochs=1))
    return plain


def test_no_damage_to_the_newest_state_is_silent(run_dir: Path) -> None:
    """Whichever bit is flipped, and whatever valid JSON is put there: a warning says which file, and why."""
    root = run_dir / "checkpoints"
    file = step_dir(root, 9) / "state.json"
    content = file.read_bytes()
    rng = np.random.default_rng(0)
    edited = {**json.loads(content), "best_step": 3}
    changes = [json.dumps(edited).encode(), content[:-1], content + b" ", b"", b"{}"]
    for place in rng.integers(0, len(content), 40):
        flipped = bytearray(content)
        flipped[place] ^= 1 << int(rng.integers(0, 8))
        changes.append(bytes(flipped))
    for change in changes:
        file.write_bytes(change)
        with pytest.warns(UserWarning, match=r"an older checkpoint has to say which is the best: .*step-00000009"):
            assert checkpoint.find_checkpoint(root, "best") == step_dir(root, 6)
    file.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoint.find_checkpoint(root, "best") == step_dir(root, 9)


def test_a_best_checkpoint_that_is_gone_is_told_of(run_dir: Path) -> None:
    root = run_dir / "checkpoints"
    shutil.rmtree(step_dir(root, 9))
    state = step_dir(root, 6) / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "best_step": 3}))
    reseal(state)
    shutil.rmtree(step_dir(root, 3))
    with pytest.warns(UserWarning, match="step-00000003, the best checkpoint, is not there: taking the last"):
        assert checkpoint.find_checkpoint(root, "best") == step_dir(root, 6)


def reseal(file: Path) -> None:
    sums = json.loads(file.with_name("checksums.json").read_text())
    sums[file.name] = {"bytes": file.stat().st_size, "xxh3": checkpoint.checksum_file(file)}
    file.with_name("checksums.json").write_text(json.dumps(sums))


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("seed: 5\n", "seed: 6\n", "has seed 6, but"),
        ("seed: 5\n", "", "has seed"),
        ("\nloss: bce\n", "\nloss: mse\n", "has loss 'mse', but"),
        ("precision: float32\n", "precision: bf16\n", "has precision 'bf16', but"),
        ("inner_prior: 0.0\n", "inner_prior: 1.0\n", "has meta.inner_prior 1.0, but"),
        ("inner_lr: 0.1\n", "inner_lr: 0.2\n", "has meta.inner_lr 0.2, but"),
        ("    layer_norm: false\n", "    layer_norm: true\n", "has model.args.layer_norm True, but"),
        ("    layer_norm: false\n", "", "has model.args.layer_norm None, but"),
    ],
)
def test_a_config_that_is_not_the_checkpoints_is_refused(
    place: Path, run_dir: Path, capsys: Capture, old: str, new: str, expected: str
) -> None:
    config = run_dir / "config.yaml"
    text = config.read_text()
    assert text.count(old) == 1, text
    config.write_text(text.replace(old, new))
    for words in (evaluate(run_dir), predict(run_dir, place)):
        fails(words, capsys, f"{config} {expected}", "step-00000009 was trained with", "take the one that a checkpoint")
    assert not (run_dir / "evaluation.json").exists()
    assert not (run_dir.parent / "scores.parquet").exists()


def test_settings_that_change_no_number_are_free(run_dir: Path) -> None:
    config = run_dir / "config.yaml"
    config.write_text(config.read_text().replace("engine: auto", "engine: reference"))
    gmeta(*evaluate(run_dir))


def test_a_stray_file_in_a_checkpoint_is_refused(place: Path, run_dir: Path, capsys: Capture) -> None:
    """A file of tensors would be read like the others."""
    last = step_dir(run_dir / "checkpoints", 9)
    (file,) = last.glob("*.safetensors")
    tensors = {name: torch.zeros_like(tensor) for name, tensor in load_file(file).items()}
    save_file(tensors, last / "zz.safetensors")
    cure = "was not saved with zz.safetensors: remove that file"
    for words in (evaluate(run_dir), predict(run_dir, place)):
        fails(words, capsys, cure)
    resume = train_words(place / "pack", run_dir, "--seed", 5, "--resume", "true", epochs=4)
    fails(resume, capsys, cure)
    (last / "zz.safetensors").unlink()
    gmeta(*resume)


def test_a_checkpoint_under_another_name_is_refused(place: Path, run_dir: Path, capsys: Capture) -> None:
    root = run_dir / "checkpoints"
    shutil.move(step_dir(root, 3), step_dir(root, 12))
    fails(evaluate(run_dir, "--checkpoint", "last"), capsys, "step-00000012 is of step 3", "its own name again")
    fails(train_words(place / "pack", run_dir, "--seed", 5, "--resume", "true"), capsys, "step-00000012 is of step 3")


def test_other_names_are_no_checkpoints(place: Path, run_dir: Path) -> None:
    root = run_dir / "checkpoints"
    for name in ("step-12", "step-²", "step-000000010", "step-"):
        shutil.copytree(step_dir(root, 3), root / name)
    assert checkpoint.steps_saved(root) == [3, 6, 9]
    gmeta(*evaluate(run_dir, "--checkpoint", "last"))
    gmeta(*train_words(place / "pack", run_dir, "--seed", 5, "--resume", "true", epochs=4))


def swap_vocabulary(run_dir: Path, *, recorded: bool) -> None:
    """Exchange two items in the run's vocabulary; with `recorded`, schema.json says that it is right."""
    file = run_dir / "vocab" / "item.parquet"
    table = pq.read_table(file)
    order = np.arange(table.num_rows)
    order[:2] = [1, 0]
    values = table["value"].combine_chunks().take(pa.array(order))
    pq.write_table(table.set_column(table.column_names.index("value"), "value", values), file)
    if recorded:
        schema = json.loads((run_dir / "schema.json").read_text())
        schema["pack"]["identity"]["item"] = content_checksum(file, ("value", "id"))
        (run_dir / "schema.json").write_text(json.dumps(schema))


def test_swapped_vocabularies_and_schemas_are_refused(place: Path, run_dir: Path, capsys: Capture) -> None:
    """Of the run itself, where they agree with each other."""
    schema = (run_dir / "schema.json").read_text()
    swap_vocabulary(run_dir, recorded=False)
    fails(predict(run_dir, place), capsys, "item.parquet is missing, or not what the run was trained with")
    shutil.copy(place / "run" / "vocab" / "item.parquet", run_dir / "vocab")
    swap_vocabulary(run_dir, recorded=True)
    expected = f"{run_dir / 'schema.json'} is not what", "what an id of 'item' means is another"
    fails(predict(run_dir, place), capsys, *expected)
    fails(train_words(place / "pack", run_dir, "--seed", 5, "--resume", "true"), capsys, *expected)
    shutil.copy(place / "run" / "vocab" / "item.parquet", run_dir / "vocab")
    for section, change in (
        ("pack", lambda found: found["numeric"][0].update(mean=1.5)),
        ("data", lambda found: found["numeric"][0].update(log=True)),
        ("data", lambda found: found.update(hash_seed=7)),
        ("data", lambda found: found["numeric"].pop()),  # rows would have fewer columns than the model reads
    ):
        found = json.loads(schema)
        change(found[section])
        (run_dir / "schema.json").write_text(json.dumps(found))
        fails(predict(run_dir, place), capsys, expected[0])
    found = json.loads(schema)
    del found["pack"]["identity"]  # as an earlier release, which recorded none
    (run_dir / "schema.json").write_text(json.dumps(found))
    gmeta(*predict(run_dir, place))
    swap_vocabulary(run_dir, recorded=False)
    fails(predict(run_dir, place), capsys, *expected)
    (run_dir / "schema.json").write_text(schema)
    shutil.copy(place / "run" / "vocab" / "item.parquet", run_dir / "vocab")
    gmeta(*predict(run_dir, place, "again.csv"))
    assert csv.read_csv(run_dir.parent / "again.csv").num_rows == 3
