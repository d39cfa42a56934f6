"""`gmeta train --warm_start`: a bundle grows into the ids of a new pack, and goes on exactly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from commands import fails, gmeta, logged
from torch import Tensor

from gmeta.parallel.mesh import Mesh
from gmeta.recommender.build import load_system
from gmeta.runs.bundle import open_bundle

SCHEMA = {"task": "user", "label": "click", "time": "at", "item": "item", "categorical": ["item", "city", "genre"]}
Prepare = Callable[..., Path]


def log(items: Sequence[int], users: Sequence[int], seed: int) -> str:
    """CSV rows of users, each of whom meets 12 of these items."""
    rng = np.random.default_rng(seed)
    lines = ["user,item,city,genre,click,at"]
    for user in users:
        for at, item in enumerate(rng.choice(items, 12)):
            click = int(rng.random() < (0.8 if (user + item) % 3 == 0 else 0.2))
            lines.append(f"u{user},i{item},c{user % 5},g{item % 4},{click},{at}")
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepare:
    """Make a pack of a log by its name: `day0` has items 0 to 29, `day1` 10 to 39, in an order of ids of its own."""
    place = tmp_path_factory.mktemp("warm")
    (place / "schema.yaml").write_text(yaml.safe_dump(SCHEMA))

    def made(name: str, items: Sequence[int] = range(30), users: Sequence[int] = range(40)) -> Path:
        if not (place / name).exists():
            (place / f"{name}.csv").write_text(log(items, users, len(items) + users[0]))
            words = ["--input", place / f"{name}.csv", "--schema", place / "schema.yaml", "--out", place / name]
            gmeta("prepare", *words, "--query_size", 4)
        return place / name

    return made


def train(pack: Path, run_dir: Path, *more: object) -> Path:
    words = ["--loader.tasks_per_batch", 10, "--schedule.eval_every", 2, "--precision", "float64"]
    gmeta("train", "--pack", pack, "--run_dir", run_dir, *words, *more)
    return run_dir


NEW = (
    "--model.name",
    "melu",
    "--model.args.hidden",
    "[8]",
    "--model.embedding_dim",
    6,
    "--embedding.optimizer",
    "adam",
)


@pytest.fixture(scope="module")
def base(prepared: Prepare) -> Path:
    """A bundle of step 3 of a run that ends with step 6."""
    pack = prepared("day0")
    run_dir = train(pack, pack.parent / "base", *NEW, "--schedule.max_steps", 6, "--schedule.checkpoint_every", 3)
    train(pack, pack.parent / "half", *NEW, "--schedule.max_steps", 3)
    gmeta("bundle", "--run_dir", pack.parent / "half", "--checkpoint", "last", "--out", pack.parent / "version")
    assert run_dir.exists()
    return pack.parent / "version"


def tensors(source: Path, which: str = "last") -> dict[str, Tensor]:
    system, _, _ = load_system(source, which, Mesh())
    return system.tensors()


def by_value(source: Path, table: str, which: str = "last") -> dict[str, Tensor]:
    """Raw value -> row."""
    import pyarrow.parquet as pq

    system, _, _ = load_system(source, which, Mesh())
    (fused,) = system.tables.fused.values()
    spec = next(spec for spec in fused.specs if spec.name == table)
    rows = fused.weight[fused.permutation.forward(torch.arange(spec.num_ids) + fused.offsets[table])]
    values = pq.read_table(source / "vocab" / f"{table}.parquet")["value"].to_pylist()
    return dict(zip(["", *values], rows, strict=True))


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
    still = ("--dense.lr", 0, "--embedding.lr", 0, "--dense.inner_lr_lr", 0, "--schedule.max_steps", 1)
    grown = train(pack, tmp_path / "grown", "--warm_start", base, *still, "--nproc", nproc)
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
    more = ("--dense.lr", 0, "--embedding.lr", 0, "--schedule.max_steps", 1, "--embedding.new_rows", "random")
    grown = train(pack, tmp_path / "grown", "--warm_start", base, *more)
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
    still = ("--dense.lr", 0, "--embedding.lr", 0, "--schedule.max_steps", 1, "--nproc", nproc)
    grown = train(pack, tmp_path / "grown", "--warm_start", tmp_path / "version", *still)
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
        (["--model.args.hidden", "[4]"], "model.args is"),
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


@pytest.mark.parametrize(
    "more",
    [
        ("--meta.inner_steps", 3, "--meta.inner_lr", 0.02, "--meta.order", "first", "--meta.inner_prior", 2),
        ("--meta.adapt", "[embeddings]"),
        ("--meta.adapt", "[]"),
        ("--meta.engine", "reference", "--meta.inner_loss", "mse"),
    ],
)
def test_the_inner_loop_may_be_another(prepared: Prepare, base: Path, tmp_path: Path, more: tuple[object, ...]) -> None:
    """What the bundle learned goes on, and a step is then that of the new settings."""
    pack = prepared("day0")
    still = ("--dense.lr", 0, "--embedding.lr", 0, "--schedule.max_steps", 1)
    run_dir = train(pack, tmp_path / "run", "--warm_start", base, *still, *more)
    for name, tensor in tensors(base).items():
        assert torch.equal(tensors(run_dir)[name], tensor), name
    (usual,) = (r for r in logged(train(pack, tmp_path / "usual", "--warm_start", base, *still)) if "support_loss" in r)
    (found,) = (r for r in logged(run_dir) if "support_loss" in r)
    assert found["loss"] != usual["loss"]


def test_learned_rates_go_on_by_step_and_name(
    prepared: Prepare, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """More steps repeat the last one's, other groups begin at meta.inner_lr, and rates may be learned from now on."""
    pack, still = prepared("day0"), ("--dense.lr", 0, "--embedding.lr", 0, "--schedule.max_steps", 1)
    learn = ("--meta.learn_inner_lr", "true", "--meta.inner_steps", 2)
    first = train(pack, tmp_path / "first", "--warm_start", base, *learn, "--dense.inner_lr_lr", 0.01)
    assert "inner rates of 2 steps begin without moments, those of embeddings, layers" in capsys.readouterr().err
    gmeta("bundle", "--run_dir", first, "--checkpoint", "last", "--out", tmp_path / "version")
    rates = tensors(first)["dense.inner_lr"]
    assert (rates != 0.1).all()
    names = ["embeddings", *(f"layers.{i}" for i in (0, 2))]
    assert rates.shape == (2, len(names))
    again = ("--warm_start", tmp_path / "version", "--dense.inner_lr_lr", 0, *still)
    same = train(pack, tmp_path / "same", *again)
    assert torch.equal(tensors(same)["dense.inner_lr"], rates)
    longer = train(pack, tmp_path / "longer", *again, "--meta.inner_steps", 3, "--meta.adapt", "[layers.2.*]")
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
    still = ("--dense.lr", 0, "--embedding.lr", 0, "--schedule.max_steps", 1, "--nproc", nproc)
    shrunk = train(pack, tmp_path / "shrunk", "--warm_start", base, *still)
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
