"""The main job through the command line, small: logs, pack, training, evaluation, prediction, report."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from commands import fails, gmeta

from gmeta.cli import COMMANDS, run
from gmeta.data.pack import open_pack
from gmeta.evaluation.metrics import metric
from gmeta.evaluation.score import score_split, to_predictions
from gmeta.parallel.mesh import Mesh
from gmeta.recommender.build import load_system


def melu_words(pack: Path) -> list[object]:
    return ["train", "--model.name", "melu", "--pack", pack, "--loader.tasks_per_batch", 60]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a log, a pack, a run and its plain twin."""
    out = tmp_path_factory.mktemp("pipeline")
    gmeta("synth", "--out", out / "log", "--users", 300, "--items", 30)
    schema = out / "log" / "schema.yaml"
    gmeta("prepare", "--input", f"[{out}/log/*.parquet]", "--schema", schema, "--out", out / "pack")
    train = [*melu_words(out / "pack"), "--model.args.hidden", "[8]"]
    train += ["--schedule.epochs", 2, "--schedule.eval_every", 2]
    gmeta(*train, "--run_dir", out / "run")
    gmeta(*train, "--run_dir", out / "plain", "--meta.adapt", "[]")
    return out


def test_a_run_directory_holds_all_of_a_run(out: Path) -> None:
    run_dir = out / "run"
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert config["model"]["args"]["hidden"] == [8]
    assert json.loads((run_dir / "environment.json").read_text())["packages"]["torch"]
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    train = [record for record in records if record["kind"] == "train"]
    assert [record["step"] for record in train] == list(range(1, len(train) + 1))
    shares = [r["input_share"] + r["exchange_share"] + r["compute_share"] for r in train]
    assert shares == pytest.approx([1.0] * len(train))
    assert {"loss_before", "loss_after", "auc_after", "gauc_after"} <= {k for r in records for k in r}
    assert list((run_dir / "tensorboard").iterdir())


def test_the_resolved_config_trains_the_same_model(out: Path, tmp_path: Path) -> None:
    gmeta("train", "--config", out / "run" / "config.yaml", "--run_dir", tmp_path / "again")
    lines = [(path / "metrics.jsonl").read_text().splitlines() for path in (out / "run", tmp_path / "again")]
    losses = [[json.loads(line).get("loss") for line in found] for found in lines]
    assert losses[0] == losses[1]


def test_evaluate_and_report(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gmeta("evaluate", "--run_dir", out / "run", "--plain_run", out / "plain", "--resamples", 50)
    table = capsys.readouterr().out
    evaluation = json.loads((out / "run" / "evaluation.json").read_text())
    for variant in ("before", "after", "plain", "plain-finetuned", "item-mean+task-bias", "factor-analysis"):
        assert variant in table
        assert variant in evaluation["variants"]
    assert {"case", "variant", "metric", "value", "unit", "low", "high", "n"} <= evaluation["records"][0].keys()
    assert evaluation["settings"]["plain-finetuned"]["steps"] in (1, 3, 10, 30)
    predictions = pq.read_table(out / "run" / "predictions.parquet")
    assert predictions.num_rows == 30 * 10
    gmeta("report", "--run_dir", out / "run")
    page = (out / "run" / "report.html").read_text()
    assert "plain-finetuned" in page
    assert "http://" not in page.replace("http://www.w3.org", "")


@pytest.mark.parametrize(("kind", "beside_a_twin"), [("cluster", False), ("film", True)])
def test_a_modulated_run_is_trained_saved_and_evaluated(
    out: Path, tmp_path: Path, kind: str, beside_a_twin: bool
) -> None:
    train = [*melu_words(out / "pack"), "--schedule.max_steps", 6]
    gmeta(*train, "--run_dir", tmp_path, "--meta.modulation", kind, "--dense.lr", 0.05)
    words = ("--split", "valid", "--checkpoint", "last", "--baselines", "false", "--resamples", 2)
    gmeta("evaluate", "--run_dir", tmp_path, *words, *(("--plain_run", out / "plain") if beside_a_twin else ()))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if line["kind"] == "valid"][-1]
    records = json.loads((tmp_path / "evaluation.json").read_text())["records"]
    found = {(r["variant"], r["metric"]): r["value"] for r in records if r["case"] == "all"}
    for variant in ("before", "after"):
        assert found[variant, "auc"] == pytest.approx(logged[f"auc_{variant}"], abs=1e-3)  # rounded


def test_a_run_that_recomputed_is_compared_with_a_plain_one(out: Path, tmp_path: Path) -> None:
    """Fine-tuning the plain model is of first order, which has nothing to recompute."""
    train = [*melu_words(out / "pack"), "--schedule.max_steps", 2]
    gmeta(*train, "--run_dir", tmp_path, "--meta.recompute", "true")
    words = ("--split", "valid", "--checkpoint", "last", "--baselines", "false", "--plain_run", out / "plain")
    gmeta("evaluate", "--run_dir", tmp_path, *words, "--resamples", 2)
    assert "plain-finetuned" in json.loads((tmp_path / "evaluation.json").read_text())["variants"]


def test_a_twin_that_diverges_on_the_measured_split_is_left_out(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(out / "run", tmp_path / "run")
    monkeypatch.setattr("gmeta.evaluation.variants._tune", lambda *args: (3, 1e30))
    words = ("--plain_run", out / "plain", "--resamples", 2, "--baselines", "false")
    gmeta("evaluate", "--run_dir", tmp_path / "run", *words)
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert found["variants"] == ["before", "after", "plain"]
    assert "diverges on a task" in found["settings"]["plain-finetuned"]["left_out"]
    assert "plain-finetuned is left out" in capsys.readouterr().err


def test_a_task_whose_scores_are_not_finite_is_named(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(out / "run", tmp_path / "run")
    words = ["evaluate", "--run_dir", tmp_path / "run", "--baselines", "false", "--resamples", 2]
    said = fails([*words, "--steps", 3, "--inner_lr", 1e30], capsys)
    tasks = pq.read_table(out / "pack" / "tasks.parquet").to_pylist()
    (named,) = re.findall(r"task '(\w+)' .*has scores that are not finite in variant 'after'.*lower inner_lr", said)
    assert named in [task["key"] for task in tasks if task["split"] == "test"]


def test_a_plain_twin_is_reported_by_its_own_loss(out: Path, tmp_path: Path) -> None:
    """What a model of loss mse returns is a value, also beside a run of clicks whose logits become probabilities.

    Fine-tuning it diverges at the largest rates of the grid, which then are not chosen.
    """
    train = [*melu_words(out / "pack"), "--schedule.max_steps", 1]
    gmeta(*train, "--run_dir", tmp_path, "--meta.adapt", "[]", "--loss", "mse")
    gmeta("evaluate", "--run_dir", out / "run", "--plain_run", tmp_path, "--resamples", 2, "--baselines", "false")
    found = pq.read_table(out / "run" / "predictions.parquet")
    system, _, _ = load_system(tmp_path, "best", Mesh())
    scores = score_split(system, open_pack(out / "pack").split("test"), tasks_per_batch=256)
    assert scores is not None
    np.testing.assert_allclose(found["plain"].to_numpy(), scores.before, atol=1e-6)
    gmeta("evaluate", "--run_dir", tmp_path, "--resamples", 2, "--baselines", "false", "--relevant_label", 1)
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    assert evaluation["settings"]["relevant_label"] == 1
    values = {r["metric"]: r["value"] for r in evaluation["records"] if r["case"] == "all"}
    assert values["map@5"] == pytest.approx(metric("map@5", scores.before, scores.label, scores.task), abs=1e-3)
    assert "auc" not in values


def test_a_learning_curve_of_every_variant(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a plain twin and the truth; without support, adapting and fine-tuning change nothing."""
    gmeta("evaluate", "--run_dir", out / "run", "--resamples", 2, "--baselines", "false")
    names = ("evaluation.json", "predictions.parquet")
    own = {name: (out / "run" / name).read_bytes() for name in names}
    words = ("--plain_run", out / "plain", "--truth", out / "log", "--support_sizes", "0,3,9999", "--resamples", 5)
    capsys.readouterr()
    gmeta("evaluate", "--run_dir", out / "run", *words, "--out", tmp_path / "deep" / "curve")
    said = capsys.readouterr().out
    assert "tasks with fewer" in said
    assert f"written to {tmp_path / 'deep' / 'curve'}" in said.replace("\n", "")
    assert {name: (out / "run" / name).read_bytes() for name in names} == own
    found = json.loads((tmp_path / "deep" / "curve" / "evaluation.json").read_text())
    assert "Learning curve" in (tmp_path / "deep" / "curve" / "report.html").read_text()
    assert pq.read_table(tmp_path / "deep" / "curve" / "predictions.parquet").num_rows == 300
    gmeta("compare", out / "run", tmp_path / "deep" / "curve", "--resamples", 2)
    assert "curve against run, 300 query rows" in capsys.readouterr().out
    assert found["settings"]["support_sizes"] == [0, 3, 9999]
    records = found["support_curve"]["records"]
    values = {(r["size"], r["variant"]): r["value"] for r in records if r["metric"] == "logloss"}
    whole = {r["variant"]: r["value"] for r in found["records"] if (r["case"], r["metric"]) == ("all", "logloss")}
    assert {variant for _, variant in values} == set(whole) == set(found["variants"])
    assert {"plain-finetuned", "posterior", "factor-analysis"} <= set(whole)
    for variant, value in whole.items():
        assert values[9999, variant] == pytest.approx(value, rel=1e-6)
    for adapted, start in (("after", "before"), ("plain-finetuned", "plain"), ("posterior", "prior")):
        assert values[0, adapted] == pytest.approx(values[0, start], rel=1e-9)
        assert len({values[size, adapted] for size in (0, 3, 9999)}) == 3
        assert len({values[size, start] for size in (0, 3, 9999)}) == 1


def test_a_run_that_adapts_nothing_has_a_flat_curve(out: Path, tmp_path: Path) -> None:
    words = ("--support_sizes", 5, "--resamples", 2, "--baselines", "false", "--out", tmp_path)
    gmeta("evaluate", "--run_dir", out / "plain", *words)
    found = json.loads((tmp_path / "evaluation.json").read_text())
    whole = [r["value"] for r in found["records"] if r["case"] == "all"]
    assert [r["value"] for r in found["support_curve"]["records"]] == whole
    assert found["support_curve"]["differences"] == []
    assert "Learning curve" in (tmp_path / "report.html").read_text()


def test_an_evaluation_is_not_written_over_a_run_or_a_file(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words: list[object] = ["evaluate", "--run_dir", out / "run", "--out"]
    fails([*words, out / "run"], capsys, f"out is {out / 'run'}: it holds a run", "name another folder")
    fails([*words, out / "plain"], capsys, "it holds a run")
    (tmp_path / "file").write_text("")
    fails([*words, tmp_path / "file"], capsys, "out is", "no folder can be made there", "name another")
    fails([*words, tmp_path / "x", "--relevant_label", 4], capsys, "relevant_label is 4", "for ratings")


def test_more_steps_at_evaluation_than_in_training(out: Path) -> None:
    gmeta("evaluate", "--run_dir", out / "run", "--steps", 5, "--inner_lr", 0.3, "--baselines", "false")
    assert set(json.loads((out / "run" / "evaluation.json").read_text())["variants"]) == {"before", "after"}


def test_auc_of_saturated_predictions_is_that_of_the_logits(out: Path) -> None:
    """A wild inner rate drives probabilities to 0 and 1, where they lose the order that the logits keep."""
    gmeta("evaluate", "--run_dir", out / "run", "--inner_lr", 3000, "--baselines", "false", "--resamples", 2)
    records = json.loads((out / "run" / "evaluation.json").read_text())["records"]
    found = {(r["variant"], r["metric"]): r["value"] for r in records if r["case"] == "all"}
    system, _, _ = load_system(out / "run", "best", Mesh())
    scores = score_split(system, open_pack(out / "pack").split("test"), tasks_per_batch=256, inner_lr=3000)
    assert scores is not None
    assert len(np.unique(to_predictions(scores.after, "bce"))) < len(np.unique(scores.after))
    table = pq.read_table(out / "run" / "predictions.parquet")
    for variant, logits in (("before", scores.before), ("after", scores.after)):
        assert found[variant, "auc"] == metric("auc", logits, scores.label, scores.task)
        np.testing.assert_array_equal(table[f"{variant}.ranking"].to_numpy(), logits)


def by_key(table: pa.Table, task: str, item: str, value: str) -> dict[tuple[str, str], list[float]]:
    """Raw task key and raw item -> the values of their rows, in rising order."""
    out: dict[tuple[str, str], list[float]] = {}
    for row in table.select([task, item, value]).to_pylist():
        out.setdefault((str(row[task]), str(row[item])), []).append(row[value])
    return {key: sorted(values) for key, values in out.items()}


def test_predict_equals_evaluate(out: Path, tmp_path: Path) -> None:
    """The same support and query as raw files give each user and item the same scores as the pack."""
    tasks = pq.read_table(out / "pack" / "tasks.parquet").to_pydict()
    users = {int(k) for k, split in zip(tasks["key"], tasks["split"], strict=True) if split == "test"}
    log = [row for row in pq.read_table(out / "log" / "part-00000.parquet").to_pylist() if row["user_id"] in users]
    log.sort(key=lambda row: (row["user_id"], row["timestamp"]))
    by_user = {user: [row for row in log if row["user_id"] == user] for user in sorted(users)}
    sides = {"support": slice(None, -10), "query": slice(-10, None)}
    for name, part in sides.items():
        rows = [row for found in by_user.values() for row in found[part]]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
    files = ("--support", tmp_path / "support.parquet", "--query", tmp_path / "query.parquet")
    gmeta("predict", "--run_dir", out / "run", *files, "--out", tmp_path / "scores.csv")
    gmeta("predict", "--run_dir", out / "run", *files, "--out", tmp_path / "scores.parquet")
    found = pq.read_table(tmp_path / "scores.parquet")
    gmeta("evaluate", "--run_dir", out / "run", "--baselines", "false")
    expected = pq.read_table(out / "run" / "predictions.parquet")
    for ours, theirs in (("score", "after"), ("score_before", "before")):
        scored = by_key(found, "user_id", "item_id", ours)
        known = by_key(expected, "task", "item", theirs)
        assert scored.keys() == known.keys()
        for key, values in scored.items():
            # The order of tasks differs, and with it padding and rounding.
            assert values == pytest.approx(known[key], abs=1e-5)
    assert len((tmp_path / "scores.csv").read_text().splitlines()) == found.num_rows + 1


def test_help_does_not_import_torch() -> None:
    """Nor that of any command, asked for one after the other."""
    asked = [["--help"], *([name, "--help"] for name in COMMANDS)]
    code = f"import sys; from gmeta.cli import run\nfor words in {asked}:\n"
    code += "    try: run(words)\n    except SystemExit: pass\n"
    code += "    assert not {'torch', 'duckdb', 'pyarrow'} & set(sys.modules), f'heavy import: {words}'"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("usage: gmeta") == len(asked)


def test_prepare_does_not_import_torch() -> None:
    code = "import sys, gmeta.data.prepare.prepare; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("words", [["train", "--help"], ["--help"], ["--version"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_ends_a_command_without_a_word(words: list[str], unbuffered: str) -> None:
    """As `gmeta train --help | head -1` does; here the reader is gone before the first line."""
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-m", "gmeta", *words]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, env=environment, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


def test_a_wrong_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["trian"]) == 2
    assert "did you mean train?" in capsys.readouterr().err
