"""A tuning finds the same settings on any number of processes."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest
import yaml
from commands import gmeta, train_words
from harness import run_ranks
from packs import make_pack

from gmeta.config.train import LoaderConfig, ModelConfig, ScheduleConfig, TrainConfig
from gmeta.config.tune import TuneConfig
from gmeta.parallel.mesh import Mesh
from gmeta.training import session
from gmeta.tuning import baselines
from gmeta.tuning import tune as tuning
from gmeta.tuning.journal import TrialJournal

pytestmark = pytest.mark.dist

SPACE = "dense.lr: [1.0e300, 0.01, 0.001]\n"


def tuned(mesh: Mesh, settings: TuneConfig) -> int:
    """Tune on ranks that are joined already."""
    with (
        mock.patch.object(session, "open_mesh", return_value=mesh),
        mock.patch.object(session, "close_mesh"),
        mock.patch.object(tuning, "open_mesh", return_value=mesh),
        mock.patch.object(tuning, "close_mesh"),
        mock.patch.object(baselines, "open_mesh", return_value=mesh),
        mock.patch.object(baselines, "close_mesh"),
    ):
        return tuning.tune(settings)


@pytest.mark.parametrize("nproc", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_same_best_settings_on_several_ranks(tmp_path: Path, nproc: int) -> None:
    """Also with a trial that diverges on all of them."""
    pack = make_pack(tmp_path / "pack")
    (tmp_path / "space.yaml").write_text(SPACE)
    train = TrainConfig(
        pack=str(pack),
        run_dir=str(tmp_path / "best"),
        precision="float64",
        model=ModelConfig(name="melu", args={"hidden": [8]}),
        loader=LoaderConfig(tasks_per_batch=30),
        schedule=ScheduleConfig(epochs=3),
    )
    found = {}
    for ranks in (1, nproc):
        out = tmp_path / f"on-{ranks}"
        settings = TuneConfig(out=str(out), train=train, space=str(tmp_path / "space.yaml"), seeds=1)
        assert run_ranks(ranks, tuned, settings) == [0] * ranks
        found[ranks] = TrialJournal(out / "journal.jsonl").done, yaml.safe_load((out / "best.yaml").read_text())
    alone, best = found.pop(1)
    assert len(alone) == 4
    assert [done.trial for done in alone.values() if done.failed] == [0]
    for together, same in found.values():
        assert same == best
        assert alone.keys() == together.keys()
        for key, done in alone.items():
            assert done.values == pytest.approx(together[key].values, rel=1e-9)
            assert (done.failed is None) == (together[key].failed is None)


@pytest.mark.slow
def test_the_same_baselines_on_several_ranks(tmp_path: Path) -> None:
    """Fine-tuning is scored by all ranks; factor analysis is computed by rank 0, and the others do not wait for it."""
    pack = make_pack(tmp_path / "pack")
    (tmp_path / "space.yaml").write_text("dense.lr: [0.01]\n")
    gmeta(*train_words(pack, tmp_path / "plain", "--meta.adapt", "[]", "--precision", "float64", epochs=1))
    train = TrainConfig(
        pack=str(pack),
        run_dir="",
        precision="float64",
        model=ModelConfig(name="melu", args={"hidden": [8]}),
        loader=LoaderConfig(tasks_per_batch=30),
        schedule=ScheduleConfig(epochs=1),
    )
    found = []
    for ranks in (1, 2):
        settings = TuneConfig(
            out=str(tmp_path / f"on-{ranks}"),
            train=train,
            space=str(tmp_path / "space.yaml"),
            seeds=1,
            trials=1,
            baselines=True,
            plain_run=str(tmp_path / "plain"),
        )
        assert run_ranks(ranks, tuned, settings) == [0] * ranks
        found.append(json.loads((tmp_path / f"on-{ranks}" / "baselines.json").read_text()))
    values = [one.pop("values") for one in found]
    assert found[0] == found[1]
    for name in ("factor-analysis", "plain-finetuned"):
        assert values[0][name]["value"] == pytest.approx(values[1][name]["value"], rel=1e-9)


@pytest.mark.slow
def test_the_command_opens_and_closes_a_group_for_each_training(tmp_path: Path) -> None:
    pack = make_pack(tmp_path / "pack")
    (tmp_path / "space.yaml").write_text(SPACE)
    words = ["tune", "--pack", pack, "--space", tmp_path / "space.yaml", "--seeds", 1, "--schedule.epochs", 3]
    words += ["--loader.tasks_per_batch", 20, "--model.args.hidden", "[8]", "--run_dir", tmp_path / "best"]
    for nproc in (1, 2):
        gmeta(*words, "--out", tmp_path / f"on-{nproc}", "--nproc", nproc)
    texts = [yaml.safe_load((tmp_path / f"on-{nproc}" / "best.yaml").read_text()) for nproc in (1, 2)]
    assert texts[0] == texts[1]


KILLER = """
import inspect, os, signal, torch
from torch import nn

class Killer(nn.Module):
    def __init__(self, inputs, *, deadly: bool = False):
        super().__init__()
        self.deadly, self.layer = deadly, nn.Linear(inputs.width, 1)

    def forward(self, dense, embedded):
        if self.deadly and os.environ["RANK"] == "1" and any(f.function == "train_step" for f in inspect.stack()):
            os.kill(os.getpid(), signal.SIGKILL)
        return self.layer(torch.cat([dense, *embedded.values()], -1)).squeeze(-1)
"""


@pytest.mark.slow
def test_a_trial_that_kills_a_process_is_given_up_and_the_tuning_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "killer.py").write_text(KILLER)
    monkeypatch.chdir(tmp_path)
    pack = make_pack(tmp_path / "pack")
    (tmp_path / "space.yaml").write_text("model.args.deadly: [true, false]")
    words = ["tune", "--pack", pack, "--space", "space.yaml", "--seeds", 1, "--schedule.epochs", 1, "--out", "out"]
    gmeta(*words, "--loader.tasks_per_batch", 20, "--model.name", "killer:Killer", "--nproc", 2)
    done = TrialJournal(tmp_path / "out" / "journal.jsonl").done
    assert "ended each time" in str(done[0, 0].failed)
    assert done[1, 0].failed is None
    assert yaml.safe_load((tmp_path / "out" / "best.yaml").read_text())["model"]["args"]["deadly"] is False
