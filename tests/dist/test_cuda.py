"""The same training on CUDA: same numbers as on CPU, without a wait of the host, and repeatable bit for bit."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
from commands import train_words
from packs import make_pack, small_model
from safetensors.torch import load_file
from test_late_statistics import SAVE_EVERY, run_loop, settings_of
from test_train import assert_same, config, run_steps

from gmeta.cli import run
from gmeta.config.train import DenseConfig, EmbeddingConfig, MetaConfig, TrainConfig
from gmeta.core.batch import RowGradients, to_device
from gmeta.core.selection import product, select
from gmeta.embedding.table import STATE, ShardedTables, TableSpec
from gmeta.optim.dense import global_norm, square_sum
from gmeta.optim.sparse import SparseOptimizer
from gmeta.parallel.mesh import Mesh
from gmeta.runs import checkpoint
from gmeta.training.build import build_run
from gmeta.training.statistics import Stopwatch
from gmeta.training.step import finish_step, train_step

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA, none here")]


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pack(tmp_path_factory.mktemp("data") / "pack")


def cuda() -> Mesh:
    return Mesh(device=torch.device("cuda", 0))


@pytest.mark.parametrize("model", ["melu", "dlrm", "taste"])
@pytest.mark.parametrize("adapt", [["embeddings", "dense"], []])
@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
def test_the_whole_step_never_waits(pack: Path, model: str, adapt: list[str], precision: str) -> None:
    settings = TrainConfig(
        pack=str(pack),
        run_dir="unused",
        precision=precision,  # type: ignore[arg-type]
        model=small_model(model),
        meta=MetaConfig(adapt=adapt, learn_inner_lr=True),
        embedding=EmbeddingConfig(optimizer="adam", weight_decay=0.1),
        dense=DenseConfig(clip_norm=0.1),
    )
    training = build_run(settings, cuda(), threading.Event())
    assert training.state.read_late
    with training.loader:
        for warm in (False, False, True, True):  # the first steps load kernels and make state
            prepared = next(training.loader)
            torch.cuda.set_sync_debug_mode("error" if warm else "default")
            try:
                started = train_step(training.state, prepared, Stopwatch(cuda().device))
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert finish_step(training.state, started)["grad_norm"] > 0
            assert sum(started.watch.seconds.values()) > 0


@pytest.mark.parametrize("optimizer", ["sgd", "rowwise_adagrad", "adagrad", "adam"])
def test_twenty_steps_equal_the_cpu(pack: Path, optimizer: str) -> None:
    """float64: losses, norms, every weight and row, with clipping that bites, decay and learned rates."""
    settings = config(pack, embedding=EmbeddingConfig(optimizer=optimizer, lr=0.05, weight_decay=0.1, init_std=0.5))
    assert_same(run_steps(cuda(), settings, 20), run_steps(Mesh(), settings, 20), 1e-9)


@pytest.mark.parametrize(("precision", "tolerance"), [("tf32", 2e-3), ("bf16", 3e-2)])
def test_lower_precision_is_near(pack: Path, precision: str, tolerance: float) -> None:
    """Loss and gradient norm of the first steps are those of float32, up to a relative tolerance."""
    wide, low = (run_steps(cuda(), config(pack, precision=p), 3)["trace"] for p in ("float32", precision))
    assert abs(low[:, [0, 2]] / wide[:, [0, 2]] - 1).max() < tolerance


@pytest.mark.parametrize("name", list(STATE))
def test_updates_equal_the_cpu_and_never_wait(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, grad = (
        torch.randperm(9000, generator=generator)[:5000].sort().values,
        torch.randn(5000, 8, generator=generator),
    )
    dense = [torch.randn(64, 32, generator=generator), torch.randn(64, generator=generator)]
    found = []
    for mesh in (Mesh(), cuda()):
        tables = ShardedTables(
            [TableSpec("a", 9000, 8, {"a": None})],
            mesh=mesh,
            seed=0,
            init_std=1.0,
            dtype=torch.float32,
            optimizer=name,
        )
        gradients = {"d8": RowGradients(rows.to(mesh.device), grad.to(mesh.device))}
        there = [g.to(mesh.device) for g in dense]
        stored, ok = tables.fused["d8"], torch.ones((), dtype=torch.bool, device=mesh.device)
        torch.cuda.set_sync_debug_mode("error")
        try:
            norm = global_norm(square_sum(there, mesh), gradients, mesh)
            for flag in (ok, ~ok, ok):
                SparseOptimizer(name, lr=0.1, weight_decay=0.1).step(
                    tables.fused, gradients, grad_scale=1 / norm, ok=flag
                )
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found.append([t.cpu() for t in (norm, stored.weight, *stored.state.values())])
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


def test_segment_sum_and_its_double_backward_equal_the_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(500, 7, dtype=torch.float64, generator=generator)
    segments = torch.randint(0, 40, (500,), generator=generator)

    def derivatives(device: str) -> list[torch.Tensor]:
        leaf = values.to(device).requires_grad_()
        total = product(leaf, select(segments.to(device), None, 50).transposed)
        (first,) = torch.autograd.grad(total.pow(3).sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), leaf)
        return [t.detach().cpu() for t in (total, first, second)]

    torch.testing.assert_close(derivatives("cuda"), derivatives("cpu"), rtol=1e-12, atol=1e-12)


def test_copies_are_whole_and_cast(pack: Path) -> None:
    value = {"a": torch.arange(100_000.0), "b": [torch.arange(7)], "empty": torch.zeros(0, 3)}
    moved = to_device(value, cuda().device, torch.float64)
    assert moved["a"].dtype == torch.float64
    assert moved["b"][0].dtype == torch.int64
    torch.testing.assert_close(moved["a"].cpu(), value["a"].double())
    assert moved["empty"].shape == (0, 3)


@pytest.mark.parametrize("poison", [3, SAVE_EVERY - 1])
def test_no_step_after_a_bad_one_changes_anything(tmp_path: Path, poison: int) -> None:
    end, changed = run_loop(cuda(), settings_of(tmp_path, "run"), True, poison)
    assert f"step {poison}: loss is nan" in end
    assert changed == [True] * poison + [False] * (len(changed) - poison)


def test_resume_is_bit_equal(pack: Path, tmp_path: Path) -> None:
    def train(name: str, *more: object) -> dict[str, torch.Tensor]:
        words = ["--device", "cuda", "--embedding.optimizer", "adam", "--dense.clip_norm", 0.1]
        assert run(train_words(pack, tmp_path / name, *words, *more)) == 0
        last = checkpoint.find_checkpoint(tmp_path / name / "checkpoints", "last")
        (file,) = last.glob("*.safetensors")
        return load_file(file)

    whole = train("whole")
    train("parts", "--schedule.max_steps", 4, "--schedule.checkpoint_every", 4)
    parts = train("parts", "--resume", "true")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    steps = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in steps if record["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
