"""Kill a two-process run at random moments, resume it, and end bit-equal to a run that nobody disturbed.

Who is not to be killed is launched from the test's own process, which has imported torch already.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from commands import logged
from forks import Forked
from packs import make_pack
from safetensors.torch import load_file

from gmeta.cli import run
from gmeta.runs import checkpoint

pytestmark = pytest.mark.faults

STEPS = 40


def command(pack: Path, run_dir: Path, resume: bool, nproc: int = 2) -> list[str]:
    words: list[object] = ["train", "--model.name", "melu", "--pack", pack, "--run_dir", run_dir]
    words += ["--nproc", nproc, "--resume", str(resume).lower()]
    words += ["--schedule.epochs", 1000, "--schedule.max_steps", STEPS, "--schedule.eval_every", 20]
    words += ["--schedule.checkpoint_every", 6, "--schedule.patience", 50, "--meta.learn_inner_lr", "true"]
    words += ["--loader.tasks_per_batch", 8, "--dense.warmup_steps", 9]
    words += ["--model.args.hidden", "[16]", "--model.args.dropout", 0.2]
    words += ["--embedding.optimizer", "adam", "--dense.decay", "cosine", "--timeout_s", 20]
    return [str(word) for word in words]


def start(words: list[str]) -> Forked:
    """A launcher, whose workers are interpreters of their own."""
    return Forked(["-m", "gmeta", *words], {**os.environ, "OMP_NUM_THREADS": "1"}, pipes=(1, 2))


def workers(process: Forked) -> list[psutil.Process]:
    """The launcher's workers that run gmeta."""
    try:
        children = psutil.Process(process.pid).children(recursive=True)
        return [child for child in children if "gmeta" in " ".join(child.cmdline())]
    except psutil.NoSuchProcess:
        return []


def wait_for_step(process: Forked, run_dir: Path, step: int) -> None:
    """Until metrics.jsonl holds the step, or the run has ended."""
    metrics = run_dir / "metrics.jsonl"
    while process.poll() is None:
        if metrics.exists() and f'"step": {step},' in metrics.read_text():
            return
        time.sleep(0.02)


def final_state(run_dir: Path) -> tuple[dict[str, bytes], list[dict[str, float]]]:
    """Bytes of every tensor of the last checkpoint, and the losses of every step."""
    last = run_dir / "checkpoints" / f"step-{STEPS:08d}"
    tensors = {}
    for file in sorted(last.glob("*.safetensors")):
        tensors |= {f"{file.name}:{key}": value.numpy().tobytes() for key, value in load_file(file).items()}
    return tensors, logged(run_dir)


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pack(tmp_path_factory.mktemp("pack") / "pack")


@pytest.fixture(scope="module")
def undisturbed(pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two processes that nobody disturbed."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    assert run(command(pack, run_dir, resume=False)) == 0
    return run_dir


def kill_and_compare(pack: Path, undisturbed: Path, tmp_path: Path, kills: int, seed: int) -> None:
    rng = random.Random(seed)
    disturbed = tmp_path / "disturbed"
    for number in range(kills):
        process = start(command(pack, disturbed, resume=number > 0))
        # Kills spread over the run; some land in a save, because every sixth step saves.
        wait_for_step(process, disturbed, int(STEPS * (number + rng.random()) / kills) + 1)
        time.sleep(rng.random() * 0.1)
        victims = workers(process)
        if victims:
            rng.choice(victims).send_signal(signal.SIGKILL)
            _, err = process.communicate(timeout=120)
            assert process.returncode not in (0, 2), err
            assert "Traceback" not in err, err
            assert "rank" in err, err
            assert "SIGKILL" in err, err
        else:
            process.communicate(timeout=120)
    assert run(command(pack, disturbed, resume=True)) == 0
    ours, theirs = final_state(disturbed), final_state(undisturbed)
    assert ours[0].keys() == theirs[0].keys()
    assert ours[0] == theirs[0]
    assert ours[1] == theirs[1]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("kills", "seed"), [pytest.param(1, 1, marks=pytest.mark.slow), pytest.param(10, 2, marks=pytest.mark.slow)]
)
def test_kills_change_nothing(pack: Path, undisturbed: Path, tmp_path: Path, kills: int, seed: int) -> None:
    kill_and_compare(pack, undisturbed, tmp_path, kills=kills, seed=seed)


def test_sigterm_saves_after_the_step_and_resumes_bit_equal(
    pack: Path, undisturbed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """On as many processes; on one, as far as sums in another order allow. Its launcher is this process."""
    run_dir, alone = tmp_path / "run", tmp_path / "alone"
    words, ended = command(pack, run_dir, resume=False), threading.Event()
    with ThreadPoolExecutor(1) as pool, ignored(signal.SIGTERM):
        telling = pool.submit(stop_after, 20, run_dir / "metrics.jsonl", ended)
        code = run(words)
        ended.set()
    said = capfd.readouterr()
    assert (code, telling.result()) == (75, True), said
    assert "Traceback" not in said.err
    assert "--resume" in said.out + said.err
    shutil.copytree(run_dir, alone)
    assert run(command(pack, run_dir, resume=True)) == 0
    assert final_state(run_dir) == final_state(undisturbed)
    assert run(command(pack, alone, resume=True, nproc=1)) == 0
    losses = [[r["loss"] for r in final_state(d)[1] if r["kind"] == "train"] for d in (alone, undisturbed)]
    assert len(losses[0]) == STEPS
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def stop_after(step: int, metrics: Path, ended: threading.Event) -> bool:
    """Tell this process to stop once the step is logged; whether that was before the run had ended."""
    while not ended.wait(0.02):
        if metrics.exists() and f'"step": {step},' in metrics.read_text():
            os.kill(os.getpid(), signal.SIGTERM)
            return True
    return False


@contextmanager
def ignored(number: signal.Signals) -> Iterator[None]:
    """A signal that comes when nobody waits for it does not end the tests."""
    before = signal.signal(number, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(number, before)


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_run_in_time(pack: Path, tmp_path: Path) -> None:
    """A stopped process answers nothing: the others give up after timeout_s, and the message says what to do."""
    run_dir = tmp_path / "run"
    words = [*command(pack, run_dir, resume=False), "--timeout_s", "5", "--schedule.max_steps", "100000"]
    process = start(words)
    wait_for_step(process, run_dir, 10)
    saved = checkpoint.steps_saved(run_dir / "checkpoints")
    victim = workers(process)[-1]
    victim.suspend()
    _, err = process.communicate(timeout=120)
    assert process.returncode not in (0, 2, 75)
    assert "Traceback" not in err
    assert "did not answer within 5 s" in err, err
    assert checkpoint.steps_saved(run_dir / "checkpoints")[: len(saved)] == saved
    assert not victim.is_running()


def test_workers_do_not_outlive_their_launcher(pack: Path, tmp_path: Path) -> None:
    """Whoever kills the launcher meant the run: its workers save and end, and the directory is free again."""
    run_dir = tmp_path / "run"
    process = start([*command(pack, run_dir, resume=False), "--schedule.max_steps", "100000"])
    wait_for_step(process, run_dir, 10)
    left = workers(process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    _, alive = psutil.wait_procs(left, timeout=60)
    assert not alive
    step = checkpoint.steps_saved(run_dir / "checkpoints")[-1]
    assert f'"step": {step},' in (run_dir / "metrics.jsonl").read_text().splitlines()[-1]
