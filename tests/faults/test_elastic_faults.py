"""An elastic group under fire: whoever is killed, a task takes effect once an epoch, and the weights are the same."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

import psutil
import pytest
from forks import Forked, begin_worker
from packs import make_pack
from safetensors.torch import load_file
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

from gmeta.cli import run
from gmeta.data.pack import open_pack
from gmeta.lab.audit import Audit, audit
from gmeta.runs import checkpoint
from gmeta.runs.directory import read_config
from gmeta.runs.log import read_metrics
from gmeta.training.supervise import end_coordinator, start_coordinator

pytestmark = pytest.mark.faults

EPOCHS = 12  # of 8 batches
POLICIES = """
from gmeta.elastic.actions import AdjustAccumulation, AdjustBatch, DropLate, KillRestart

def restart_once(snapshot):
    return [KillRestart(1, "a test")] if snapshot.step >= 20 and snapshot.restarts_left == 2 else []

def lopsided(snapshot):
    ranks = len(snapshot.setting.tasks_per_rank)
    first = 1 + snapshot.step // 10 % 6
    return [AdjustBatch((first, 8 - first) if ranks == 2 else (8,)), AdjustAccumulation((2,) * ranks)]

def late(snapshot):
    ranks = len(snapshot.setting.tasks_per_rank)
    return [AdjustAccumulation((3,) * ranks), DropLate(1e-6 if snapshot.step % 20 < 15 else None)]

def nonsense(snapshot):
    if snapshot.step % 2:
        raise KeyError("broken")
    return [AdjustBatch((5, 5))]
"""


def command(pack: Path, run_dir: Path, *extra: object, nproc: int = 2, elastic: bool = True) -> list[str]:
    words: list[object] = ["train", "--model.name", "melu", "--pack", pack, "--run_dir", run_dir, "--nproc", nproc]
    words += ["--schedule.epochs", EPOCHS, "--schedule.eval_every", 20, "--schedule.checkpoint_every", 6]
    words += ["--schedule.patience", 500, "--meta.learn_inner_lr", "true", "--loader.tasks_per_batch", 8]
    words += [
        "--loader.window_batches",
        3,
        "--dense.warmup_steps",
        9,
        "--model.args.hidden",
        "[16]",
        "--model.args.dropout",
        0.2,
    ]
    words += ["--embedding.optimizer", "adam", "--dense.decay", "cosine", "--timeout_s", 20]
    words += ["--elastic.enabled", str(elastic).lower(), "--elastic.policy", "static", *extra]
    return [sys.executable, "-m", "gmeta", *map(str, words)]


class Started(subprocess.Popen[str]):
    """A run whose words go to a file: a pipe that nobody reads is full after 64 KB, and stops who writes to it."""

    said: TextIO


def start(arguments: list[str], path: Path | None = None) -> Started:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - `end` closes it
    process = Started(arguments, stderr=said, stdout=said, text=True, env=environment)
    process.said = said
    return process


def end(process: Started, timeout_s: float = 240) -> str:
    """What it said, once it has ended; no traceback."""
    process.wait(timeout_s)
    with process.said as file:
        file.seek(0)
        said = file.read()
    assert "Traceback" not in said, said
    return said


def finish(process: Started, timeout_s: float = 240) -> str:
    said = end(process, timeout_s)
    assert process.returncode == 0, said
    return said


def processes(process: Started, word: str) -> list[psutil.Process]:
    """Children that run gmeta's command `word`; those that train are workers.

    A process that is just being started still shows the words of its launcher, but not yet a rank.
    """
    found = []
    try:
        children = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:  # it has just ended
        return []
    for child in children:
        try:
            words, started = child.cmdline(), word != "train" or "RANK" in child.environ()
        except psutil.Error:
            continue
        if "gmeta" in words and word in words and started:
            found.append(child)
    return found


def steps_logged(run_dir: Path) -> int:
    metrics = run_dir / "metrics.jsonl"
    return len(re.findall('"kind": "train"', metrics.read_text())) if metrics.exists() else 0


def wait_for_step(process: Started, run_dir: Path, step: int, timeout_s: float = 120) -> None:
    end = time.monotonic() + timeout_s
    while process.poll() is None and steps_logged(run_dir) < step:
        assert time.monotonic() < end, f"step {step} did not come"
        time.sleep(0.02)


def learned(run_dir: Path) -> dict[str, bytes]:
    """Bytes of every tensor of the last checkpoint."""
    last = checkpoint.step_dir(run_dir / "checkpoints", checkpoint.steps_saved(run_dir / "checkpoints")[-1])
    files = sorted(last.glob("*.safetensors"))
    return {f"{file.name}:{key}": value.numpy().tobytes() for file in files for key, value in load_file(file).items()}


def assert_each_task_once(run_dir: Path) -> None:
    """By the order and what the trainer logged; no ledger has a part in it."""
    config = read_config(run_dir)
    records = [record for record in read_metrics(run_dir / "metrics.jsonl") if record["kind"] == "train"]
    split = open_pack(config.pack).split("train")
    assert audit(records, split, config) == Audit(expected=split.num_tasks * config.schedule.epochs)


def losses(run_dir: Path) -> list[float]:
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if record["kind"] == "train"]


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pack(tmp_path_factory.mktemp("pack") / "pack")


@pytest.fixture(scope="module")
def undisturbed(pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without a coordinator; its launcher is this process, which has imported torch already."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    assert run(command(pack, run_dir, elastic=False)[3:]) == 0
    return run_dir


def kill(process: Started, who: str, rng: random.Random) -> bool:
    """SIGKILL one worker, the coordinator, or both; False where none was left."""
    victims = []
    if who in ("worker", "both"):
        victims += rng.sample(found, 1) if (found := processes(process, "train")) else []
    if who in ("coordinator", "both"):
        victims += processes(process, "coordinate")[:1]
    for victim in victims:
        victim.send_signal(signal.SIGKILL)
    return bool(victims)


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[Forked]:
    """The workers that this process has launched."""
    found: list[Forked] = []

    def begin(*arguments: Any) -> Forked:
        found.append(begin_worker(*arguments))
        return found[-1]

    monkeypatch.setattr(SubprocessHandler, "_popen", begin)
    return found


def test_a_kill_of_both_changes_nothing(
    pack: Path, tmp_path: Path, begun: list[Forked], capfd: pytest.CaptureFixture[str]
) -> None:
    """A short run of forked workers, launched from here; what follows kills whole processes."""
    run_dir, plain, ended = tmp_path / "run", tmp_path / "plain", threading.Event()
    assert run(command(pack, plain, "--schedule.epochs", 3, elastic=False)[3:]) == 0
    before = len(begun)

    def kill_both() -> bool:
        while not ended.wait(0.02):
            if steps_logged(run_dir) >= 8:
                begun[before + 1].send_signal(signal.SIGKILL)
                (coordinator,) = [c for c in psutil.Process().children() if "coordinate" in c.cmdline()]
                coordinator.kill()
                return True
        return False

    with ThreadPoolExecutor(1) as pool:
        killing = pool.submit(kill_both)
        code = run(command(pack, run_dir, "--schedule.epochs", 3)[3:])
        ended.set()
    said = capfd.readouterr().err
    assert (code, killing.result()) == (0, True), said
    for expected in ("restart 1, from the checkpoint of step", "was killed by SIGKILL", "the coordinator ended"):
        assert expected in said, said
    assert_each_task_once(run_dir)
    assert losses(run_dir) == losses(plain)
    assert learned(run_dir) == learned(plain)


@pytest.mark.slow
@pytest.mark.parametrize("who", ["worker", "coordinator", "both"])
def test_a_kill_changes_nothing(pack: Path, undisturbed: Path, tmp_path: Path, who: str) -> None:
    run_dir = tmp_path / "run"
    process = start(command(pack, run_dir))
    wait_for_step(process, run_dir, 25)
    assert kill(process, who, random.Random(1))
    said = finish(process)
    assert ("restart 1, from the checkpoint of step" in said) == (who != "coordinator")
    assert ("was killed by SIGKILL" in said) == (who != "coordinator")
    assert ("the coordinator ended" in said) == (who != "worker")
    saved = read_config(run_dir).elastic
    assert (saved.url, saved.token_file) == (None, None), "the coordinator ended with its launcher"
    assert_each_task_once(run_dir)
    assert losses(run_dir) == losses(undisturbed)
    assert learned(run_dir) == learned(undisturbed)


def soak(pack: Path, undisturbed: Path, run_dir: Path, kills: int, epochs: int, seed: int) -> None:
    rng = random.Random(seed)
    steps = 8 * epochs
    process = start(command(pack, run_dir, "--schedule.epochs", epochs))
    for number in range(kills):
        wait_for_step(process, run_dir, int((steps - 10) * (number + rng.random()) / kills) + 1)
        time.sleep(rng.random() * 0.2)
        who = rng.choice(["worker", "coordinator", "both"])
        while not kill(process, who, rng):  # those of before are dead, and the next ones not there yet
            assert process.poll() is None, "the launcher has ended"
            time.sleep(0.05)
    finish(process, 600)
    assert_each_task_once(run_dir)
    assert losses(run_dir) == losses(undisturbed)
    assert learned(run_dir) == learned(undisturbed)
    committed = surviving_commits(next(run_dir.glob("coordinator-*.db")))
    assert committed == {(epoch, window) for epoch in range(epochs) for window in range(3)}


def surviving_commits(journal: Path) -> set[tuple[int, int]]:
    """(epoch, work item) that are done at the journal's end, by its records alone; none is done twice."""
    with sqlite3.connect(f"file:{journal}?mode=ro", uri=True) as db:
        records = [(kind, json.loads(body)) for kind, body in db.execute("SELECT kind, body FROM records ORDER BY seq")]
    done: set[tuple[int, int]] = set()
    for kind, body in records:
        if kind == "RolledBack":
            saved = body["saved"]
            again = {(saved["epoch"], work_item) for work_item, _ in saved["again"]}
            leased = {(saved["epoch"], work_item) for work_item in range(saved["cursor"])}
            done = {(e, s) for e, s in done if e < saved["epoch"]} | (leased - again)
        elif kind == "Committed":
            key = (body["epoch"], body["shard"])
            assert key not in done, f"{key} was committed twice"
            done.add(key)
    return done


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_hundred_kills(pack: Path, tmp_path: Path) -> None:
    epochs = 150
    undisturbed = tmp_path / "undisturbed"
    finish(start(command(pack, undisturbed, "--schedule.epochs", epochs, elastic=False)))
    soak(pack, undisturbed, tmp_path / "run", kills=100, epochs=epochs, seed=3)


@pytest.mark.slow
def test_five_kills(pack: Path, undisturbed: Path, tmp_path: Path) -> None:
    soak(pack, undisturbed, tmp_path / "run", kills=5, epochs=EPOCHS, seed=5)


@pytest.mark.slow
@pytest.mark.parametrize("nproc", [1, 2])
def test_unequal_slots_and_micro_batches_learn_the_same(
    pack: Path, undisturbed: Path, tmp_path: Path, nproc: int
) -> None:
    (tmp_path / "policies.py").write_text(POLICIES)
    run_dir = tmp_path / "run"
    words = ["--elastic.policy", "policies:lopsided", "--precision", "float64"]
    finish(start(command(pack, run_dir, *words, nproc=nproc), tmp_path))
    finish(start(command(pack, tmp_path / "plain", "--precision", "float64", elastic=False)))
    assert_each_task_once(run_dir)
    assert losses(run_dir) == pytest.approx(losses(tmp_path / "plain"), rel=1e-9)
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    slots = {tuple(record["slots"]) for record in records if record["kind"] == "train"}
    assert len(slots) > (1 if nproc == 1 else 3), slots


@pytest.mark.slow
def test_a_kill_changes_nothing_of_episodes(pack: Path, tmp_path: Path) -> None:
    words = ["--loader.episode_rows", "4"]
    finish(start(command(pack, tmp_path / "plain", *words, elastic=False)))
    process = start(command(pack, tmp_path / "run", *words))
    wait_for_step(process, tmp_path / "run", 20)
    assert kill(process, "worker", random.Random(3))
    finish(process)
    assert learned(tmp_path / "run") == learned(tmp_path / "plain")
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")


@pytest.mark.slow
def test_tasks_that_were_late_take_effect_in_their_epoch(pack: Path, tmp_path: Path) -> None:
    (tmp_path / "policies.py").write_text(POLICIES)
    run_dir = tmp_path / "run"
    process = start(command(pack, run_dir, "--elastic.policy", "policies:late"), tmp_path)
    wait_for_step(process, run_dir, 45)
    assert kill(process, "worker", random.Random(2))
    finish(process)
    assert_each_task_once(run_dir)
    assert len(losses(run_dir)) > 8 * EPOCHS, "nothing was late"


@pytest.mark.slow
def test_a_replaced_worker_costs_no_step(pack: Path, undisturbed: Path, tmp_path: Path) -> None:
    (tmp_path / "policies.py").write_text(POLICIES)
    run_dir = tmp_path / "run"
    said = finish(start(command(pack, run_dir, "--elastic.policy", "policies:restart_once"), tmp_path))
    step = re.search(r"step (\d+): before step \1 the worker of rank 1 is replaced", said)
    assert step, said
    assert f"restart 1, from the checkpoint of step {step[1]}" in said
    assert_each_task_once(run_dir)
    assert losses(run_dir) == losses(undisturbed)
    assert learned(run_dir) == learned(undisturbed)


@pytest.mark.slow
def test_a_policy_that_talks_nonsense_is_logged_and_does_no_harm(pack: Path, undisturbed: Path, tmp_path: Path) -> None:
    (tmp_path / "policies.py").write_text(POLICIES)
    run_dir = tmp_path / "run"
    finish(start(command(pack, run_dir, "--elastic.policy", "policies:nonsense"), tmp_path))
    log = (run_dir / "coordinator.log").read_text()
    assert "sums to 10" in log
    assert "KeyError" in log
    assert learned(run_dir) == learned(undisturbed)


def test_sigterm_before_the_first_step_ends_the_run(
    pack: Path, tmp_path: Path, begun: list[Forked], capfd: pytest.CaptureFixture[str]
) -> None:
    """Workers that cannot save yet die of it; that is no failure to recover from."""

    def stop() -> None:
        while len(begun) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    teller = threading.Thread(target=stop, daemon=True)
    teller.start()
    code = run(command(pack, tmp_path / "run")[3:])
    said = capfd.readouterr().err
    assert code in (143, 75), said
    assert "restart 1" not in said


@pytest.mark.slow
def test_torchrun_starts_the_group_again(pack: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Its store outlives a group that was killed, with the addresses of the dead in it."""
    run_dir, token = tmp_path / "run", tmp_path / "token"
    words = ["coordinate", "--journal", tmp_path / "job.db", "--token_file", token, "--policy", "static"]
    coordinator, port = start_coordinator(words, 0, tmp_path / "coordinator.log")
    try:
        train = command(pack, run_dir, "--elastic.url", f"http://127.0.0.1:{port}", "--elastic.token_file", token)[3:]
        at = train.index("--nproc")
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        process = start([*torchrun, "--max_restarts", "3", "-m", "gmeta", *train[:at], *train[at + 2 :]])
        wait_for_step(process, run_dir, 25)
        processes(process, "train")[-1].kill()
        process.wait(240)
        with process.said as file:  # torchrun tells of the killed worker in its own way
            file.seek(0)
            said = file.read()
    finally:
        end_coordinator(coordinator)
    assert process.returncode == 0, said
    assert "resumed from" in said
    assert_each_task_once(run_dir)
    assert losses(run_dir) == losses(undisturbed)


def agent(pack: Path, run_dir: Path, coordinator: str, token: Path, endpoint: str) -> Started:
    """torchrun on one of up to two nodes, with one worker each."""
    words = command(pack, run_dir, "--elastic.url", coordinator, "--elastic.token_file", token)[3:]
    words += ["--schedule.epochs", "40"]
    at = words.index("--nproc")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc_per_node", "1"]
    torchrun += ["--rdzv_backend", "c10d", "--rdzv_endpoint", endpoint, "--rdzv_conf", "last_call_timeout=3"]
    return start([*torchrun, "--max_restarts", "5", "-m", "gmeta", *words[:at], *words[at + 2 :]])


@pytest.mark.slow
def test_a_node_that_joins_a_torchrun_job_resumes(pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The agents count their own restarts: the first one has made one when the second begins."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # as docs/elastic.md says
    run_dir, token = tmp_path / "run", tmp_path / "token"
    words = ["coordinate", "--journal", tmp_path / "job.db", "--token_file", token, "--policy", "static"]
    coordinator, port = start_coordinator(words, 0, tmp_path / "coordinator.log")
    with socket.create_server(("127.0.0.1", 0)) as free:
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    at = (pack, run_dir, f"http://127.0.0.1:{port}", token, endpoint)
    try:
        agents = [agent(*at)]
        wait_for_step(agents[0], run_dir, 10)
        processes(agents[0], "train")[-1].kill()
        wait_for_step(agents[0], run_dir, 15)
        agents.append(agent(*at))
        said = [finish(each) for each in agents]
    finally:
        end_coordinator(coordinator)
    assert "on 2 process(es)" in said[0] + said[1]
    assert_each_task_once(run_dir)


@pytest.mark.slow
def test_another_number_of_workers_goes_on(pack: Path, undisturbed: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = start(command(pack, run_dir))
    wait_for_step(process, run_dir, 25)
    process.send_signal(signal.SIGTERM)
    end(process)
    assert process.returncode == 75
    finish(start(command(pack, run_dir, nproc=1)))  # an elastic run goes on by itself
    assert_each_task_once(run_dir)
    assert losses(run_dir) == pytest.approx(losses(undisturbed), rel=1e-4)


@pytest.mark.slow
def test_restarts_that_lead_nowhere_end_the_run(pack: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = start(command(pack, run_dir, "--schedule.checkpoint_every", 1000000, "--elastic.max_restarts", 1))
    for _ in range(2):
        wait_for_step(process, run_dir, 5)
        assert kill(process, "worker", random.Random(1))
        time.sleep(1.0)
        while process.poll() is None and not processes(process, "train"):
            time.sleep(0.05)
        (run_dir / "metrics.jsonl").unlink(missing_ok=True)
    said = end(process)
    assert process.returncode == 128 + signal.SIGKILL
    assert "1 restarts without a new checkpoint: giving up" in said


def test_a_coordinator_that_stays_away_is_named(pack: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    token = tmp_path / "token"
    token.write_text("0123456789abcdef\n")
    token.chmod(0o600)
    words = ["--elastic.url", "http://127.0.0.1:9", "--elastic.token_file", token, "--elastic.patience_s", 1]
    code = run(command(pack, run_dir, *words)[3:])
    said = capfd.readouterr().err
    assert code == 2, said
    assert "Traceback" not in said
    assert "http://127.0.0.1:9" in said
