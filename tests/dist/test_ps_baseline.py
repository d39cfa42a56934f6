"""The PS-style baseline learns what gmeta learns: same losses, norms, weights and rows, step by step."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import yaml
from packs import make_pack
from steps import one_step
from torch.distributed import HashStore

from gmeta.config.evaluation import EvaluateConfig
from gmeta.config.train import (
    DenseConfig,
    EmbeddingConfig,
    LoaderConfig,
    MetaConfig,
    ModelConfig,
    ScheduleConfig,
    TrainConfig,
)
from gmeta.evaluation.evaluate import evaluate
from gmeta.parallel.mesh import Mesh, PeerLost
from gmeta.recommender.build import load_system
from gmeta.runs.log import read_metrics
from gmeta.training.build import build_run

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from ps_baseline.plan import describe, plan_task
from ps_baseline.server import serve
from ps_baseline.session import Session, open_session, spread, tables_state
from ps_baseline.step import choose, engine_loss
from ps_baseline.taskfiles import TaskFiles, open_task_files
from ps_baseline.train import main
from ps_baseline.wire import Place, meet
from ps_baseline.worker import Client, slots, work

pytestmark = pytest.mark.dist
STEPS = 5


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pack(tmp_path_factory.mktemp("ps") / "pack")


@pytest.fixture(scope="module")
def files(pack: Path) -> TaskFiles:
    return open_task_files(pack, pack.with_name("files"))


def config(pack: Path, **changes: Any) -> TrainConfig:
    """Ragged tasks, every kind of feature, learned rates, a clip that bites, a schedule, float64; no dropout."""
    values: dict[str, Any] = {
        "pack": str(pack),
        "run_dir": "unused",
        "precision": "float64",
        "model": ModelConfig(name="melu", embedding_dim=5, args={"hidden": [12, 6], "layer_norm": True}),
        "meta": MetaConfig(inner_steps=2, learn_inner_lr=True, inner_lr=0.3),
        "embedding": EmbeddingConfig(lr=0.1, weight_decay=0.01, init_std=0.5),
        "dense": DenseConfig(lr=0.01, clip_norm=0.05, warmup_steps=3, decay="cosine", weight_decay=0.1),
        "loader": LoaderConfig(tasks_per_batch=7, window_batches=3),
        "schedule": ScheduleConfig(max_steps=STEPS),
    }
    return TrainConfig(**{**values, **changes})


def ours(settings: TrainConfig) -> dict[str, Any]:
    """gmeta, one process: (loss, support loss, examples, norm) of each step, then every weight and state."""
    run = build_run(settings, Mesh(), threading.Event())
    trace = []
    with run.loader:
        for _ in range(STEPS):
            stats = one_step(run)
            trace.append([stats[key] for key in ("loss", "support_loss", "samples", "grad_norm", "lr")])
    run.state.dense.close()
    tables = sorted(run.state.system.tables.state_dict().items())
    dense = {name: p.detach().numpy() for name, p in run.state.system.learner.named_parameters()}
    return {"trace": np.array(trace), **dense, **{f"table {i}": value.numpy() for i, (_, value) in enumerate(tables)}}


def theirs(settings: TrainConfig, files: TaskFiles, workers: int, servers: int) -> dict[str, Any]:
    """The same of the baseline, its processes played by threads."""
    places = [Place(rank, workers, servers, timeout_s=20) for rank in range(workers + servers)]
    sessions = [open_session(settings, files.schema, files.num_tasks, place) for place in places]
    store, said = HashStore(), list[str]()

    moved: list[list[int]] = []  # worker 0's, of each step

    def play(session: Session) -> list[list[float]]:
        links = meet(session.place, store)
        try:
            if session.place.server >= 0:
                serve(session, links)
                return []
            client = Client(session, links)
            records = list(work(session, files, client, say=said.append))
            client.end()
            if session.place.rank == 0:
                moved.extend([r.sent_bytes, r.received_bytes] for r in records)
            return [[r.loss, r.support_loss, r.samples, r.grad_norm, r.lr] for r in records]
        finally:
            links.close()

    with ThreadPoolExecutor(len(places)) as pool:
        traces = list(pool.map(play, sessions))
    assert traces[:workers] == [traces[0]] * workers
    assert set(said) == {"task step: hand-written inner loop"}
    dense = {name: p.detach().numpy() for name, p in sessions[0].system.learner.named_parameters()}
    states = [tables_state(session) for session in sessions[workers:]]
    rows = {f"table {i}": torch.cat(parts).numpy() for i, parts in enumerate(zip(*states, strict=True))}
    return {"trace": np.array(traces[0]), "bytes": np.array(moved), **dense, **rows}


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == {*b, "bytes"}
    for name in b:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-9, atol=1e-12, err_msg=name)


META = {
    "plain": MetaConfig(adapt=[]),
    "first": MetaConfig(inner_steps=2, learn_inner_lr=True, inner_lr=0.3, order="first"),
    "second": MetaConfig(inner_steps=2, learn_inner_lr=True, inner_lr=0.3, inner_prior=2),
}


@pytest.mark.parametrize(
    "sizes", [((1, 1), (2, 2)), pytest.param(((1, 2), (2, 1), (4, 1), (4, 2)), marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("kind", META)
def test_equals_gmeta(pack: Path, files: TaskFiles, kind: str, sizes: tuple[tuple[int, int], ...]) -> None:
    settings = config(pack, meta=META[kind])
    expected = ours(settings)
    assert not np.allclose(expected["trace"][0, 0], expected["trace"][-1, 0], rtol=1e-6)
    for workers, servers in sizes:
        assert_same(theirs(settings, files, workers, servers), expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"meta": MetaConfig(adapt=["embeddings.item", "decision"], inner_lr=0.3)},  # bags and one feature stay shared
        {"meta": MetaConfig(adapt=["head"]), "loader": LoaderConfig(tasks_per_batch=7, resample=True)},
        {
            "model": ModelConfig(name="taste", args={"task_features": ["group"], "dropout": 0.3}),
            "embedding": EmbeddingConfig(optimizer="adam"),
        },
    ],
    ids=["part", "resample", "taste-dropout"],
)
def test_equals_gmeta_with_other_settings(pack: Path, files: TaskFiles, changes: dict[str, Any]) -> None:
    settings = config(pack, **changes)
    assert_same(theirs(settings, files, 2, 2), ours(settings))


def test_a_model_that_the_hand_written_loop_does_not_know_takes_the_engine(pack: Path, files: TaskFiles) -> None:
    """What the loop leaves out shows on the first task: here, a hook that only the engine's call sees."""
    session = open_session(config(pack), files.schema, files.num_tasks, Place(0, 1, 1))
    learner = session.system.learner
    features = describe(learner, session.system.tables, files)
    task = plan_task(files.read(0), features, torch.float64)
    rows = torch.randn(len(task.rows), 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    batch = (0, 0, 7)
    assert choose(learner, features, task, rows, batch)[1] == "hand-written inner loop"
    learner.inner_loop, learner.inner_lr = replace(learner.inner_loop, lr=0.3), None
    expected = engine_loss(learner, features, task, rows.requires_grad_(), batch)[0]
    learner.register_forward_hook(lambda module, args, out: (2 * out[0], out[1]))
    step, reason = choose(learner, features, task, rows, batch)
    assert reason.startswith("gmeta's reference engine")
    torch.testing.assert_close(step(task, rows, batch)[0], 2 * expected)


def test_bytes_are_those_of_the_formula(pack: Path, files: TaskFiles) -> None:
    """benchmarks/ps_baseline/README.md; one worker, so that its tasks are all of the batch."""
    settings, servers = config(pack), 2
    session = open_session(settings, files.schema, files.num_tasks, Place(0, 1, servers))
    features = describe(session.system.learner, session.system.tables, files)
    (batch,) = islice(slots(settings, files, 0, 1), 1)
    tasks = [plan_task(files.read(int(t)), features, torch.float64) for t in batch.tasks]
    pulled = sum(len(task.rows) for task in tasks)
    messages = sum(sum(map(bool, task.support_counts + task.query_counts)) for task in tasks)
    distinct = len(torch.cat([task.rows for task in tasks]).unique())
    dense, row = 8 * sum(p.numel() for p in session.system.learner.parameters()), 8 * settings.model.embedding_dim
    sent = 16 * messages + 8 * pulled + 40 * servers + dense + (8 + row) * distinct
    received = row * pulled + 40 * servers + dense
    trace = theirs(settings, files, 1, servers)["bytes"]
    assert trace[0].tolist() == [sent, received]


def test_dense_parameters_are_spread() -> None:
    sizes = {"a": 10, "b": 6, "c": 5, "d": 1}
    assert spread(sizes, 1) == [["a", "b", "c", "d"]]
    assert spread(sizes, 2) == [["a", "d"], ["b", "c"]]
    assert spread({"a": 1}, 2) == [["a"], []]


@pytest.mark.faults
@pytest.mark.parametrize(("victim", "hangs"), [(0, False), (1, False), (2, False), (0, True), (2, True)])
def test_the_others_end_when_one_is_lost(pack: Path, files: TaskFiles, victim: int, hangs: bool) -> None:
    """Two workers, two servers; the victim hangs up, or stays silent, after meeting. All others say whom they miss."""
    places = [Place(rank, 2, 2, timeout_s=1.5 if hangs else 20) for rank in range(4)]
    sessions = [open_session(config(pack), files.schema, files.num_tasks, place) for place in places]
    store, over = HashStore(), threading.Event()

    def play(session: Session) -> str:
        links = meet(session.place, store)
        try:
            if session.place.rank == victim:
                if hangs:
                    over.wait(20)
            elif session.place.server >= 0:
                serve(session, links)
            else:
                list(work(session, files, Client(session, links), say=lambda text: None))
        except PeerLost as error:
            return str(error)
        finally:
            links.close()
        return "no complaint"

    start = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(play, session) for session in sessions]
        words = [future.result(15) for rank, future in enumerate(futures) if rank != victim]
        over.set()
    assert time.monotonic() - start < 15
    assert all(" lost " in word for word in words), words
    assert any(f"lost {places[victim].name}" in word for word in words), words


def test_not_finite_stops_all(pack: Path, files: TaskFiles) -> None:
    with pytest.raises(ValueError, match=r"step [0-4]: loss is .*no weights were changed"):
        theirs(config(pack, dense=DenseConfig(lr=1e200)), files, 2, 2)


def command_line(pack: Path, run_dir: Path, *words: str) -> list[str]:
    file = run_dir.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(asdict(config(pack, run_dir=str(run_dir)))))
    return ["--config", str(file), "--workers", "2", "--servers", "2", "--timeout_s", "60", *words]


@pytest.mark.slow
def test_gmeta_evaluates_what_the_baseline_trained(
    pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    assert main(command_line(pack, run_dir)) == 0, capsys.readouterr()
    records = read_metrics(run_dir / "metrics.jsonl")
    expected = ours(config(pack))
    np.testing.assert_allclose([r["loss"] for r in records], expected["trace"][:, 0], rtol=1e-9)
    assert all(r["samples_per_s"] > 0 and r["tasks_per_s"] > 0 and r["sent_bytes"] > 0 for r in records)
    system, _, _ = load_system(run_dir, "last", Mesh())
    for name, p in system.learner.named_parameters():
        np.testing.assert_allclose(p.detach().numpy(), expected[name], rtol=1e-9, atol=1e-12, err_msg=name)
    assert evaluate(EvaluateConfig(run_dir=str(run_dir), resamples=2, baselines=False)) == 0
    assert main(command_line(pack, run_dir)) == 2
    assert "already holds a run" in capsys.readouterr().err


@pytest.mark.faults
def test_a_killed_server_ends_the_run(pack: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = command_line(pack, tmp_path / "run", "--schedule.epochs", "1000000", "--schedule.max_steps", "0")
    metrics = tmp_path / "run" / "metrics.jsonl"
    said = ""
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(main, words)
        while not (metrics.exists() and metrics.stat().st_size):
            assert not running.done(), capfd.readouterr()
            time.sleep(0.05)
        said += capfd.readouterr().err
        pids = [int(pid) for pid in re.findall(r" is (\d+)", said)]
        os.kill(pids[3], signal.SIGKILL)
        assert running.result(60) == 128 + signal.SIGKILL
    said = capfd.readouterr().err
    assert "server 1 was killed by SIGKILL" in said
    assert "lost server 1" in said
    assert not any(psutil.pid_exists(pid) for pid in pids)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--workers", "0"], "workers is 0"),
        (["--workers", "8"], "tasks_per_batch is 7"),
        (["--precision", "bf16"], "precision is 'bf16'"),
        (["--resume", "true"], "resume is True"),
        (["--nproc", "2"], "--workers and --servers"),
    ],
)
def test_mistakes_are_told(
    pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], complaint: str
) -> None:
    assert main(command_line(pack, tmp_path / "run", *words)) == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
