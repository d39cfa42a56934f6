"""Baselines are tuned on valid tasks, and `gmeta evaluate` measures them as they were tuned."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from commands import fails, gmeta, train_words
from packs import make_pack

from gmeta.config.evaluation import FactorConfig
from gmeta.config.train import LoaderConfig, MetaConfig, ModelConfig, ScheduleConfig, TrainConfig
from gmeta.config.tune import TuneConfig
from gmeta.data.pack import open_pack
from gmeta.evaluation.variants import FINETUNE_LR, baseline_rows
from gmeta.tuning import baselines
from gmeta.tuning import tune as tuning
from gmeta.tuning.baselines import _factor_value
from gmeta.tuning.journal import TrialJournal
from gmeta.tuning.tune import _Trained


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pack(tmp_path_factory.mktemp("baselines") / "pack")


@pytest.fixture(scope="module")
def plain(pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "run"
    gmeta(*train_words(pack, folder, "--meta.adapt", "[]", epochs=1))
    return folder


@pytest.fixture
def asked(pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., TuneConfig]:
    """A tuning of baselines behind a trial that trains nothing."""
    monkeypatch.setattr(tuning, "_train", lambda config, until, alone: _Trained(0.5, 0.0))
    (tmp_path / "space.yaml").write_text("dense.lr: [0.1]\n")

    def made(out: str = "out", plain_run: Path | None = None, trials: int = 3, budget: float = 30, **train: Any) -> Any:
        settings = {"pack": str(pack), "run_dir": "", "schedule": ScheduleConfig(epochs=1)}
        settings |= {
            "loader": LoaderConfig(tasks_per_batch=20),
            "model": ModelConfig(name="melu", args={"hidden": [8]}),
        }
        return TuneConfig(
            out=str(tmp_path / out),
            space=str(tmp_path / "space.yaml"),
            trials=trials,
            seeds=1,
            budget_minutes=budget,
            baselines=True,
            plain_run=None if plain_run is None else str(plain_run),
            train=TrainConfig(**{**settings, **train}),
        )

    return made


def test_factor_analysis_climbs_to_the_best_on_valid(
    asked: Callable[..., TuneConfig], pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tuning.tune(asked()) == 0
    found = json.loads((tmp_path / "out" / "baselines.json").read_text())
    settings, value = FactorConfig(**found["factor-analysis"]), found["values"]["factor-analysis"]
    train, valid = (baseline_rows(open_pack(pack), open_pack(pack).split(name)) for name in ("train", "valid"))
    assert value["metric"] == "logloss"
    assert value["value"] == _factor_value(train, valid, settings, 0, "logloss")
    done = TrialJournal(tmp_path / "out" / "factor-analysis.jsonl").done
    assert sorted(done, key=lambda key: key[1])[:3] == [(0, 0), (1, 0), (2, 0)]
    assert len(done) == 4
    assert value["value"] == min(one.values[0] for one in done.values())
    usual = FactorConfig(num_iterations=30)
    assert done[0, 0].values == [_factor_value(train, valid, usual, 0, "logloss")]
    assert "best factor-analysis: trial " in capsys.readouterr().out


def test_a_baseline_goes_on_where_it_was(
    asked: Callable[..., TuneConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tuning.tune(asked("whole")) == 0
    calls, usual = count(1), baselines.fit_baselines

    def killed(*arguments: Any, calls: Iterator[int] = calls, **more: Any) -> Any:
        if next(calls) == 3:
            raise SystemExit(137)
        return usual(*arguments, **more)

    monkeypatch.setattr(baselines, "fit_baselines", killed)
    with pytest.raises(SystemExit):
        tuning.tune(asked())
    assert len(TrialJournal(tmp_path / "out" / "factor-analysis.jsonl").done) == 2
    assert tuning.tune(asked()) == 0
    assert next(calls) == 6  # two finished before the kill, and two behind it
    texts = [(tmp_path / folder / "baselines.json").read_text() for folder in ("whole", "out")]
    assert texts[0] == texts[1]
    (tmp_path / "out" / "journal.jsonl").unlink()
    with pytest.raises(ValueError, match=r"factor-analysis.jsonl holds a tuning with metric 'logloss', now it is 'auc"):
        tuning.tune(asked(schedule=ScheduleConfig(epochs=1, metric="auc")))


def test_without_budget_no_baseline_is_tuned(
    asked: Callable[..., TuneConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tuning.tune(asked(budget=0)) == 0
    assert "not tried: trial 1, 2, 3 in rung 1" in capsys.readouterr().out
    assert "factor-analysis" not in json.loads((tmp_path / "out" / "baselines.json").read_text())


def test_what_was_tuned_is_what_evaluate_measures(
    asked: Callable[..., TuneConfig], plain: Path, pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the valid split both find the same values; fine-tuning is never worse than by the grid that evaluate tunes."""
    meta = MetaConfig(adapt=["dense"])
    assert tuning.tune(asked(plain_run=plain, meta=meta, schedule=ScheduleConfig(epochs=1, metric="logloss"))) == 0
    file = tmp_path / "out" / "baselines.json"
    found = json.loads(file.read_text())
    assert found["rows"] == json.loads((plain / "schema.json").read_text())["rows"]
    tried = TrialJournal(tmp_path / "out" / "plain-finetuned.jsonl").done
    assert len(tried) == 3 * len(FINETUNE_LR) + 6
    grid = [one.values[0] for one in list(tried.values())[: 3 * len(FINETUNE_LR)] if not one.failed]
    assert found["values"]["plain-finetuned"]["value"] <= min(grid)

    words = ["evaluate", "--run_dir", plain, "--plain_run", plain, "--split", "valid", "--resamples", 5]
    gmeta(*words)
    usual = pq.read_table(plain / "predictions.parquet")
    gmeta(*words, "--baseline_settings", file)
    evaluation = json.loads((plain / "evaluation.json").read_text())
    assert evaluation["settings"]["factor-analysis"] == found["factor-analysis"]
    assert evaluation["settings"]["plain-finetuned"] == found["plain-finetuned"]
    measured = {
        record["variant"]: record["value"]
        for record in evaluation["records"]
        if record["case"] == "all" and record["metric"] == "logloss"
    }
    for name in ("factor-analysis", "plain-finetuned"):
        assert measured[name] == pytest.approx(found["values"][name]["value"], rel=1e-6)
    tuned = pq.read_table(plain / "predictions.parquet")
    assert not np.allclose(tuned["factor-analysis"], usual["factor-analysis"])
    assert tuned["item-mean"] == usual["item-mean"]

    other = tmp_path / "other"
    gmeta(*train_words(pack, other, "--meta.adapt", "[]", epochs=1))
    fails([*words[:4], other, *words[5:], "--baseline_settings", file], capsys, "was tuned for run", "is another")


def test_plain_runs_that_do_not_fit_are_refused(
    asked: Callable[..., TuneConfig], plain: Path, pack: Path, tmp_path: Path
) -> None:
    other = str(make_pack(tmp_path / "other", seed=3))
    with pytest.raises(ValueError, match=r"was trained on .*: train it on"):
        tuning.tune(asked(plain_run=plain, pack=other))
    with pytest.raises(ValueError, match=r"plain_run .* has no effect without --baselines true"):
        TuneConfig(out="", train=TrainConfig(pack="", run_dir=""), plain_run="run")
    adapted = tmp_path / "adapted"
    gmeta(*train_words(pack, adapted, epochs=1))
    with pytest.raises(ValueError, match=r"was trained with meta.adapt \['embeddings', 'dense'\]: need \[\]"):
        tuning.tune(asked(plain_run=adapted))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"format": 2}, "has format 2; this gmeta reads 1"),
        ({"factors": {}}, "unknown key 'factors', did you mean"),
        ({"tasks": "0"}, "was tuned on other tasks"),
        (
            {"rows": {"train": "0"}},
            "its rows are others: the same tasks have other labels, features or support in test, train",
        ),
        ({"rows": "0"}, "rows is '0', and holds no checksums"),
        ({"factor-analysis": [1]}, "factor-analysis is [1], and holds no settings"),
        ({"factor-analysis": {"num_factor": 1}}, "factor-analysis: unknown key num_factor: did you mean num_factors?"),
        ({"factor-analysis": {"num_factors": 0}}, "num_factors is 0: must be at least 1"),
        ({"plain-finetuned": {"steps": 1, "inner_lr": 0.1, "adapt": []}}, "adapt is []"),
    ],
)
def test_settings_that_gmeta_did_not_write_are_refused(
    plain: Path, pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], told: str
) -> None:
    run_id = (plain / "run_id").read_text().strip()
    good = {"format": 1, "tasks": open_pack(pack).tasks_checksum(), "plain_run": run_id, "values": {}}
    (tmp_path / "baselines.json").write_text(json.dumps({**good, **change}))
    words = ["evaluate", "--run_dir", plain, "--plain_run", plain, "--baseline_settings", tmp_path / "baselines.json"]
    fails(words, capsys, told)
