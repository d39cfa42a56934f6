# ruff: noqa: E402
"""The head-to-head with DLRover, without DLRover: what its audits count, what is said where it is left out."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))  # scripts, no package

import dlrover_ledger
import ledger_audit
from ledger_audit import Coverage, Scene, coverage
from puppet import Puppet


def test_every_sample_once_is_neither_missing_nor_repeated():
    assert coverage(30, [range(20, 30), range(0, 10), range(10, 20)]) == Coverage(missing=0, repeated=0)


def test_samples_nobody_finished_are_missing_and_further_times_are_repeats():
    assert coverage(30, [range(0, 10), range(0, 10), range(5, 15)]) == Coverage(missing=15, repeated=15)
    assert coverage(30, []) == Coverage(missing=30, repeated=0)


def test_a_sample_that_does_not_exist_is_an_error():
    with pytest.raises(ValueError, match=r"sample 30 was finished: there are only 30"):
        coverage(30, [range(20, 31)])


class Service:
    """Shards of 10 samples, first come first served; `hidden` ones appear after so many answers of END."""

    def __init__(self, shards: int, hidden: int | None = None, ends_before_hidden: int = 0, poison_after: int = 99):
        self.todo = [10 * shard for shard in range(shards)]
        self.hidden, self.ends_left = hidden, ends_before_hidden
        self.failures, self.poison_after = 0, poison_after

    def ask(self, do: str, key: int = -1) -> dict:
        if do == "take":
            return self._take()
        if do == "fail":
            self.failures += 1
            self.todo.append(key)
        return {"accepted": True}

    def _take(self) -> dict:
        if self.failures >= self.poison_after:
            return {"reply": "REFUSED", "reason": "shard 0 is quarantined"}
        if self.todo:
            start = self.todo.pop(0)
            return {"reply": "SHARD", "key": start, "start": start, "stop": start + 10}
        self.ends_left -= 1
        if self.hidden is not None and self.ends_left < 0:
            self.todo, self.hidden = [self.hidden], None
            return self._take()
        return {"reply": "END"}


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(ledger_audit, "ASK_AGAIN_S", 0.0)


def scene(service: Service, shards: int) -> Scene:
    return Scene([service, service], 10 * shards)


def test_workers_that_finish_all_are_told_the_end_in_time():
    found = scene(Service(5), 5)
    assert found.drain((0, 1), watch_s=0.0) == {0: "END AFTER ALL", 1: "END AFTER ALL"}
    assert found.coverage == Coverage(0, 0)


def test_an_end_while_samples_are_missing_is_early_even_if_they_come_later():
    found = scene(Service(4, hidden=40, ends_before_hidden=3), 5)
    assert found.drain((0, 1), watch_s=60.0) == {0: "END", 1: "END"}
    assert found.coverage == Coverage(0, 0), "a worker that was told the end asks again"
    assert found.taken[-1][1] == 40


def test_a_shard_that_never_comes_is_missing():
    found = scene(Service(4), 5)
    assert found.drain((0, 1), watch_s=0.0) == {0: "END", 1: "END"}
    assert found.coverage == Coverage(missing=10, repeated=0)


def test_a_failing_shard_is_counted_by_its_attempts_and_workers_hear_of_it():
    found = scene(Service(3, poison_after=2), 3)
    assert found.drain((0, 1), watch_s=0.0, poison=0) == {0: "REFUSED", 1: "REFUSED"}
    assert sum(start == 0 for _, start in found.taken) == 2
    assert found.coverage == Coverage(missing=10, repeated=0)


def test_speed_is_the_median_turn_and_waits_of_all_turns():
    speed = dlrover_ledger.Speed(rates=[100.0, 300.0, 200.0], waits=[0.001] * 98 + [0.5, 0.25])
    assert speed.numbers() == {"shards/s": 200.0, "wait p50": 1.0, "wait p99": 500.0}


def test_without_dlrover_its_rows_are_left_out_and_the_cure_is_named():
    found = {"worker killed": {"gmeta": {"missing": 0, "served again after": 3.05}}}
    text = dlrover_ledger.show(found, dlrover_ledger.QUICK, with_dlrover=False)
    assert "DLRover's rows are left out" in text
    assert "--dlrover_python PATH" in text
    assert "pip install 'dlrover[k8s]==0.6.1' protobuf" in text
    assert "left out" not in dlrover_ledger.show(found, dlrover_ledger.QUICK, with_dlrover=True)
    assert [s.variant for case in ledger_audit.AUDITS for s in dlrover_ledger.of(case, None)].count("gmeta") == 4
    assert all(s.variant.startswith("gmeta") for case in ledger_audit.AUDITS for s in dlrover_ledger.of(case, None))


def test_what_never_happened_is_no_number():
    found = {"worker killed": {"gmeta": {"missing": 0, "served again after": 3.05}, "dlrover": {"missing": 10}}}
    text = dlrover_ledger.show(found, dlrover_ledger.QUICK, with_dlrover=True)
    assert [line.split("|")[3].strip() for line in text.splitlines() if line.startswith("| dlrover")] == ["never"]
    records = [(r.variant, r.metric, r.value, r.unit) for r in dlrover_ledger.records_of(found)]
    assert records == [
        ("gmeta", "missing", 0, "1"),
        ("gmeta", "served again after", 3.05, "s"),
        ("dlrover", "missing", 10, "1"),
    ]


def test_an_interpreter_that_cannot_run_dlrover_is_refused_with_the_cure(tmp_path):
    assert "cannot be run" in dlrover_ledger.unusable(tmp_path / "python")
    problem = dlrover_ledger.unusable(Path(sys.executable))
    assert "cannot import DLRover (ModuleNotFoundError: No module named 'dlrover')" in problem
    assert "pip install 'dlrover[k8s]==0.6.1' protobuf" in problem
    words = [sys.executable, str(BENCHMARKS / "dlrover_ledger.py"), "--dlrover_python", str(tmp_path / "python")]
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "cannot be run" in ended.stderr
    assert "Traceback" not in ended.stderr


WORKER = """
import sys
sys.path.append(sys.argv[1])
from puppet import serve
class Worker:
    def add(self, a, b):
        print("noise")
        return {"sum": a + b}
    def die(self):
        sys.exit("worn out")
serve(Worker())
"""


def test_a_puppet_answers_and_its_last_words_are_told(tmp_path):
    puppet = Puppet([sys.executable, "-c", WORKER, str(BENCHMARKS)], "w0", {}, tmp_path / "log")
    try:
        assert puppet.ask("add", a=2, b=3) == {"sum": 5}
        with pytest.raises(RuntimeError, match=r"worker w0 did not answer; its last words:\nnoise\nworn out"):
            puppet.ask("die")
    finally:
        puppet.end()


def test_a_stopped_puppet_answers_after_it_goes_on(tmp_path):
    puppet = Puppet([sys.executable, "-c", WORKER, str(BENCHMARKS)], "w0", {}, tmp_path / "log")
    try:
        puppet.signal(signal.SIGSTOP)
        puppet.send("add", a=1, b=1)
        puppet.signal(signal.SIGCONT)
        assert puppet.receive() == {"sum": 2}
    finally:
        puppet.end()
