"""`gmeta train --warm_start`: a bundle grows into the ids of a new pack, and goes on exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import fails, gmeta, logged
from days import NEW, STILL, Prepare, by_value, preparing, tensors, train

from gmeta.parallel.mesh import Mesh
from gmeta.recommender.build import load_system
from gmeta.runs.bundle import open_bundle


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepare:
    """`day0` has items 0 to 29, `day1` 10 to 39."""
    return preparing(tmp_path_factory.mktemp("warm"))


@pytest.fixture(scope="module")
def base(prepared: Prepare) -> Path:
    """A bundle of step 3 of a run that ends with step 6."""
    pack = prepared("day0")
    run_dir = train(pack, pack.parent / "base", *NEW, "--schedule.max_steps", 6, "--schedule.checkpoint_every", 3)
    train(pack, pack.parent / "half", *NEW, "--schedule.max_steps", 3)
    gmeta("bundle", "--run_dir", pack.parent / "half", "--checkpoint", "last", "--out", pack.parent / "version")
    assert run_dir.exists()
    return pack.parent / "version"


def test_to_go_on_is_to_resume(prepared: Prepare, base: Path, tmp_path: Path) -> None:
    pack = prepared("day0")
    more = ("--schedule.max_steps", 6, "--schedule.checkpoint_every", 3)
    warm = train(pack, tmp_path / "warm", "--warm_start", base, "--schedule.position", "continue", *more)
    whole = base.parent / "base"
    for name, tensor in tensors(whole).items():
        assert torch.equal(tensors(warm)[name], tensor), name
    assert [r for r in logged(whole) if r["step"] > 3] == [r for r in logged(warm) if r["step"] > 3]


@pytest.mark.parametrize("nproc", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_rows_and_moments_follow_their_values(prepared: Prepare, base: Path, tmp_path: Path, nproc: int) -> None:
    """With rates of 0 nothing but the growth happens."""
    pack = prepared("day1", range(10, 40), range(100, 140))
    grown = train(pack, tmp_path / "grown", "--warm_start", base, *STILL, "--nproc", nproc)
    before, after = (by_value(source, "item") for source in (base, grown))
    assert len(before.keys() & after.keys()) > 15
    assert len(after.keys() - before.keys()) > 5
    for value, row in after.items():
        assert torch.equal(row, before.get(value, before[""])), value
    for name, tensor in tensors(base).items():
        if name.startswith("dense."):
            assert torch.equal(tensors(grown)[name], tensor), name


@pytest.mark.slow
def test_workers_agree_after_growth(prepared: Prepare, base: Path, tmp_path: Path) -> None:
    pack = prepared("day1", range(10, 40), range(100, 140))
    runs = [
        train(pack, tmp_path / str(n), "--warm_start", base, "--schedule.max_steps", 4, "--nproc", n) for n in (1, 2, 4)
    ]
    first, *others = ([record["loss"] for record in logged(run) if "loss" in record] for run in runs)
    for losses in others:
        np.testing.assert_allclose(losses, first, rtol=1e-9)


def test_days_keep_the_keys_of_state(prepared: Prepare, base: Path, tmp_path: Path) -> None:
    """Weights and every moment have the same ids after each day, and sensible numbers."""
    version = base
    for day, items in enumerate((range(10, 40), range(5, 50), range(20, 60)), start=1):
        pack = prepared(f"day{day}", items, range(100 * day, 100 * day + 40))
        run_dir = train(pack, tmp_path / f"run{day}", "--warm_start", version, "--schedule.max_steps", 4)
        version = tmp_path / f"version{day}"
        gmeta("bundle", "--run_dir", run_dir, "--checkpoint", "last", "--out", version)
        bundle = open_bundle(version, training=True)
        for table, entry in bundle.manifest["tables"].items():
            ids = torch.arange(entry["ids"])
            for name in ("rows", "exp_avg", "exp_avg_sq", "steps"):
                values = bundle.rows(table, ids, name)
                assert len(values) == entry["ids"]
                assert values.double().abs().max() < 1e3


def test_new_rows_may_be_random(prepared: Prepare, base: Path, tmp_path: Path) -> None:
    pack = prepared("day1", range(10, 40), range(100, 140))
    grown = train(pack, tmp_path / "grown", "--warm_start", base, *STILL, "--embedding.new_rows", "random")
    before, after = (by_value(source, "item") for source in (base, grown))
    new = torch.stack([row for value, row in after.items() if value not in before])
    assert len(new.unique(dim=0)) == len(new)


@pytest.mark.parametrize("nproc", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_new_rows_may_be_generated(prepared: Prepare, tmp_path: Path, nproc: int) -> None:
    """A new item's row is that of unknown items, and what the network makes of its genre."""
    generator = ("--embedding.generator", "{item: [genre]}", "--embedding.init_std", 0.5)
    train(prepared("day0"), tmp_path / "base", *NEW, *generator, "--schedule.max_steps", 6)
    gmeta("bundle", "--run_dir", tmp_path / "base", "--checkpoint", "last", "--out", tmp_path / "version")
    pack = prepared("day1", range(10, 40), range(100, 140))
    grown = train(pack, tmp_path / "grown", "--warm_start", tmp_path / "version", *STILL, "--nproc", nproc)
    before, after = (by_value(source, "item") for source in (tmp_path / "version", grown))
    genres = by_value(grown, "genre")
    system, _, _ = load_system(grown, "last", Mesh())
    network = system.learner.model.id_generators.networks[0]
    new = after.keys() - before.keys()
    assert len(new) > 5
    for value in new:
        made = network(genres[f"g{int(value[1:]) % 4}"])
        assert made.abs().max() > 1e-6
        torch.testing.assert_close(after[value], before[""] + made)


def test_a_version_without_moments(prepared: Prepare, base: Path, tmp_path: Path, capsys: Any) -> None:
    gmeta("bundle", "--run_dir", base.parent / "half", "--out", tmp_path / "bare", "--training", "false")
    pack = prepared("day0")
    train(pack, tmp_path / "run", "--warm_start", tmp_path / "bare", "--schedule.max_steps", 4)
    assert "which holds no moments" in capsys.readouterr().err
    words = ["train", "--pack", pack, "--run_dir", tmp_path / "no", "--warm_start", tmp_path / "bare"]
    fails([*words, "--schedule.position", "continue"], capsys, "has no training/ part", "--training true")


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--model.args.hidden", "[4]"], "model.args.hidden is [4], the bundle has"),
        (["--loss", "mse"], "loss is 'mse', the bundle has 'bce'"),
        (["--model.embedding_dim", "4"], "model.embedding_dim is 4"),
        (["--embedding.optimizer", "sgd"], "embedding.optimizer is 'sgd', the bundle has 'adam'"),
        (["--meta.modulation", "film"], "meta.modulation is 'film', the bundle has 'none'"),
        (
            ["--schedule.position", "continue", "--loader.tasks_per_batch", "20"],
            "loader.tasks_per_batch is 20, ",
        ),
        (["--schedule.position", "continue", "--meta.inner_steps", "2"], "meta.inner_steps is 2, "),
    ],
)
def test_what_cannot_go_on_is_named(
    prepared: Prepare, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], told: str
) -> None:
    words = ["train", "--pack", prepared("day0"), "--run_dir", tmp_path / "run", "--warm_start", base]
    fails([*words, *more], capsys, told)


def test_the_inner_loop_may_be_another(prepared: Prepare, base: Path, tmp_path: Path) -> None:
    """What the bundle learned goes on; a step is that of the new settings."""
    pack, losses = prepared("day0"), []
    others = ("--meta.inner_steps", 3, "--meta.inner_lr", 0.02, "--meta.order", "first", "--meta.adapt", "[embeddings]")
    for number, more in enumerate(((), others, ("--meta.adapt", "[]"))):
        run_dir = train(pack, tmp_path / str(number), "--warm_start", base, *STILL, *more)
        found = tensors(run_dir)
        for name, tensor in tensors(base).items():
            assert torch.equal(found[name], tensor), name
        losses.append(logged(run_dir)[0]["loss"])
    assert len(set(losses)) == 3


def test_learned_rates_go_on_by_step_and_name(
    prepared: Prepare, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """More steps repeat the last one's, other groups begin at meta.inner_lr, and rates may be learned from now on."""
    pack = prepared("day0")
    learn = ("--meta.learn_inner_lr", "true", "--meta.inner_steps", 2)
    first = train(pack, tmp_path / "first", "--warm_start", base, *STILL, *learn, "--dense.inner_lr_lr", 0.01)
    assert "inner rates of 2 steps begin without moments, those of embeddings, layers" in capsys.readouterr().err
    gmeta("bundle", "--run_dir", first, "--checkpoint", "last", "--out", tmp_path / "version")
    rates = tensors(first)["dense.inner_lr"]
    assert (rates != 0.1).all()
    assert rates.shape == (2, 3)  # of embeddings, layers.0, output
    again = ("--warm_start", tmp_path / "version", *STILL)
    same = train(pack, tmp_path / "same", *again)
    assert torch.equal(tensors(same)["dense.inner_lr"], rates)
    longer = train(pack, tmp_path / "longer", *again, "--meta.inner_steps", 3, "--meta.adapt", "[head]")
    assert torch.equal(tensors(longer)["dense.inner_lr"], rates[[0, 1, 1], 2:])
    fixed = train(pack, tmp_path / "fixed", *again, "--meta.learn_inner_lr", "false")
    assert "dense.inner_lr" not in tensors(fixed)
    assert "are left out: meta.learn_inner_lr is false" in capsys.readouterr().err
    words = ["train", "--pack", pack, "--run_dir", tmp_path / "no", *again, "--meta.inner_lr", 0.2]
    fails(words, capsys, "meta.inner_lr is 0.2, the bundle has 0.1")


@pytest.mark.parametrize("nproc", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_tables_shrink(prepared: Prepare, base: Path, tmp_path: Path, nproc: int) -> None:
    """A pack of fewer items and cities: those that are left keep their rows and moments, the others go."""
    pack = prepared("less", range(3, 12), range(0, 40, 5))
    shrunk = train(pack, tmp_path / "shrunk", "--warm_start", base, *STILL, "--nproc", nproc)
    for table in ("item", "city"):
        before, after = by_value(base, table), by_value(shrunk, table)
        assert 1 < len(after) < len(before)
        assert after.keys() < before.keys()
        for value, row in after.items():
            assert torch.equal(row, before[value]), value
    gmeta("bundle", "--run_dir", shrunk, "--out", tmp_path / "version")
    assert open_bundle(tmp_path / "version", training=True).manifest["tables"]["item"]["ids"] == 10


def test_a_position_needs_a_warm_start(prepared: Prepare, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--pack", prepared("day0"), "--run_dir", tmp_path / "run", "--model.name", "melu"]
    fails([*words, "--schedule.position", "continue"], capsys, "schedule.position is 'continue': only a warm_start has")


def test_a_position_needs_the_same_tasks(
    prepared: Prepare, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pack = prepared("day1", range(10, 40), range(100, 140))
    words = ["train", "--pack", pack, "--run_dir", tmp_path / "run", "--warm_start", base]
    fails([*words, "--schedule.position", "continue"], capsys, "has other tasks")


def test_a_bundle_runs_no_code_that_the_user_did_not_name(
    prepared: Prepare, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    version = tmp_path / "version"
    version.mkdir()
    (version / "config.yaml").write_text("{pack: p, run_dir: r, model: {name: 'evil:Model'}, elastic: {enabled: true}}")
    words = ["train", "--pack", prepared("day0"), "--run_dir", tmp_path / "run", "--warm_start", version]
    fails(words, capsys, "has a model of its own, evil:Model", "name it yourself: --model.name evil:Model")
    told = fails([*words, "--model.name", "evil:Model"], capsys, "evil")
    assert "name it yourself" not in told
