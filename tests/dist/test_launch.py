import os
import random
import signal
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest
from forks import begin_process
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

from gmeta.parallel.launch import launch, module_command

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module", autouse=True)
def forked_workers():
    """Real ones here."""


def _launcher(behaviour: str, folder: Path, environment: dict[str, str]) -> None:
    sys.stderr = (folder / "stderr").open("w", buffering=1)
    os.dup2(sys.stderr.fileno(), 2)  # the workers inherit it
    os.dup2(os.open(folder / "stdout", os.O_CREAT | os.O_WRONLY | os.O_APPEND), 1)
    os.environ.pop("OMP_NUM_THREADS", None)
    os.environ.update({"PYTHONPATH": str(Path(__file__).parent), **environment})
    sys.exit(launch(2, [behaviour, str(folder)], module="launch_target"))


def start(behaviour: str, folder: Path, **environment: str) -> BaseProcess:
    return begin_process(_launcher, behaviour, folder, environment)


def finish(process: BaseProcess, folder: Path) -> tuple[int, str]:
    process.join(60)
    assert process.exitcode is not None, "the launcher hangs"
    return process.exitcode, (folder / "stderr").read_text()


def wait_for(folder: Path, pattern: str, count: int) -> list[Path]:
    for _ in range(1500):
        found = sorted(folder.glob(pattern))
        if len(found) == count:
            return found
        time.sleep(0.02)
    raise AssertionError(f"no {count} x {pattern} in {folder}")


def test_workers_meet_and_end_well(tmp_path):
    threads = str(max(1, (os.cpu_count() or 1) // 2))
    assert finish(start("collectives", tmp_path), tmp_path) == (0, "")
    assert [f.read_text() for f in sorted(tmp_path.glob("rank-*"))] == [f"2.0 2 {threads}"] * 2


def test_a_worker_leaves_with_its_last_words_and_is_not_taken_apart(tmp_path):
    assert finish(start("leaving", tmp_path), tmp_path) == (0, "")
    assert (tmp_path / "stdout").read_text() == "the last words" * 2
    assert sorted(file.name for file in tmp_path.glob("*-*")) == ["exit-function-0", "exit-function-1"]


def test_a_killed_rank_is_named_once(tmp_path):
    code, err = finish(start("killed", tmp_path, OMP_NUM_THREADS="3"), tmp_path)
    assert code == 128 + signal.SIGKILL
    assert err.startswith("gmeta: error: rank 1 (pid ")
    assert "was killed by SIGKILL" in err
    assert "--resume true" in err
    assert err.count("gmeta: error") == 1, err
    assert (tmp_path / "rank-0").read_text() == "2.0 2 3"  # the user's own choice of threads stays


@pytest.mark.parametrize("behaviour", ["mistake", "mistake-on-1"])
def test_a_users_mistake_is_told_once(tmp_path, behaviour):
    assert finish(start(behaviour, tmp_path), tmp_path) == (
        2,
        "gmeta train: error: dense.lr is -1: must not be negative\n",
    )


def test_a_failing_rank_takes_the_others_down(tmp_path):
    code, err = finish(start("bug", tmp_path), tmp_path)
    assert code == 3
    assert "rank 1" in err
    assert "exit code 3" in err
    for file in tmp_path.glob("pid-0"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_request_lets_workers_save(tmp_path, number):
    process = start("stoppable", tmp_path)
    wait_for(tmp_path, "ready-*", 2)
    os.kill(process.pid, number)
    code, err = finish(process, tmp_path)
    assert code == 75
    assert err == "stopping: workers in training save first; once more kills them\n"
    assert len(list(tmp_path.glob("saved-*"))) == 2


def test_a_stop_request_before_the_workers_have_met_is_no_failure(tmp_path):
    """One dies of it, the other waits for that one in vain."""
    process = start("late", tmp_path)
    wait_for(tmp_path, "ready-*", 2)
    os.kill(process.pid, signal.SIGTERM)
    code, err = finish(process, tmp_path)
    assert code == 128 + signal.SIGTERM
    assert err == "stopping: workers in training save first; once more kills them\n"


@pytest.mark.parametrize("started", [0, 1])
def test_a_stop_request_between_two_starts_ends_both(tmp_path, monkeypatch, started):
    """Wherever the signal finds it, also inside `start()` of torch's context."""
    begin, asked = SubprocessHandler._popen, []

    def told_to_stop(handler, *arguments):
        if handler.local_rank_id == started:
            os.kill(os.getpid(), signal.SIGTERM)
        return begin(handler, *arguments)

    monkeypatch.setattr(SubprocessHandler, "_popen", told_to_stop)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    assert launch(2, ["stoppable", str(tmp_path)], module="launch_target", asked=asked) in (75, 128 + signal.SIGTERM)
    assert asked == [signal.SIGTERM]


def test_a_second_signal_kills(tmp_path):
    process = start("stubborn", tmp_path)
    wait_for(tmp_path, "ready-*", 2)
    os.kill(process.pid, signal.SIGINT)
    while "stopping" not in (tmp_path / "stderr").read_text():
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    code, err = finish(process, tmp_path)
    assert code == 128 + signal.SIGKILL
    assert "was killed by SIGKILL" in err


def test_one_worker_told_to_stop_stops_the_run_cleanly(tmp_path):
    # rank 0 leaves with 75 first; rank 1 is then told to end, and has saved too
    process = start("stoppable", tmp_path)
    wait_for(tmp_path, "ready-*", 2)
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 2
    workers[0].terminate()
    assert finish(process, tmp_path) == (75, "")
    assert len(list(tmp_path.glob("saved-*"))) == 2


def test_the_current_folder_replaces_no_module_of_a_worker(tmp_path):
    """As with `python -P`; what only the folder has is found by `find_model`, which looks there last."""
    (tmp_path / "random.py").write_text("raise SystemExit('this random.py ran')")
    (tmp_path / "elsewhere").mkdir()
    probe = tmp_path / "elsewhere" / "probe.py"
    probe.write_text("import random, sys\nprint(sys.argv[1:], __name__, '' in sys.path, random.__file__)")
    done = subprocess.run(
        [*module_command("probe"), "a", "b c"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(probe.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    assert done.stdout == f"['a', 'b c'] __main__ False {random.__file__}\n"


def test_workers_do_not_run_what_lies_in_the_current_folder(tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    (place / "random.py").write_text("raise SystemExit('this random.py ran')")
    here = Path.cwd()
    os.chdir(place)
    try:
        process = start("leaving", tmp_path)
        assert finish(process, tmp_path) == (0, "")
    finally:
        os.chdir(here)
    assert (tmp_path / "stdout").read_text() == "the last words" * 2
