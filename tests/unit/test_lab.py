"""The laboratory: emulated devices, faults, the audit, what is measured, and its report."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import psutil
import pytest

from gmeta.config.cluster import LabConfig
from gmeta.config.train import LoaderConfig, ScheduleConfig, TrainConfig
from gmeta.data.loader import TaskLoader
from gmeta.data.pack import open_pack
from gmeta.elastic.scenario import Contention, Deterministic, Devices, Kill, Pause, Persistent, Scenario, Transient
from gmeta.lab.audit import audit, batches_of
from gmeta.lab.coordinator import Line
from gmeta.lab.device import Device, machines_so_far
from gmeta.lab.faults import Faults
from gmeta.lab.folder import LabFolder, read_lines
from gmeta.lab.measure import LabResult, executions, measure
from gmeta.lab.pack import write_lab_pack
from gmeta.lab.run import lab, run_lab
from gmeta.lab.timeline import spread, write_timeline

SCENARIO = Scenario(workers=2, steps=6, tasks_per_batch=8, slot_s=0.1, events=(Deterministic(0, 2.0),))


class Clock:
    """Seconds that pass only in sleep."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


MADE: list[Device] = []


@pytest.fixture(autouse=True)
def _closed_devices():
    yield
    while MADE:
        MADE.pop().close()


def device(folder: LabFolder, scenario: Scenario, rank: int = 0, incarnation: int = 0) -> tuple[Device, Clock]:
    clock = Clock()
    MADE.append(Device(scenario, rank, incarnation, folder, now=clock, sleep=clock.sleep))
    return MADE[-1], clock


def parts(folder: LabFolder, rank: int = 0) -> list[dict[str, float]]:
    return [line for line in read_lines(folder.worker(rank)) if line["kind"] == "part"]


# The emulated device


def test_a_device_takes_as_long_as_the_scenario_says(tmp_path):
    emulate, clock = device(LabFolder(tmp_path), replace(SCENARIO, fixed_s=0.05))
    clock.now += 0.01  # real computing
    emulate(0, 4.0, True, 0.01)
    assert clock.now == pytest.approx(1000.0 + 2 * (0.05 + 4 * 0.1))
    emulate(0, 1.5, False, 0.0)
    assert clock.now == pytest.approx(1000.9 + 2 * (0.05 + 1.5 * 0.1))


def test_a_fast_rank_is_not_slowed(tmp_path):
    emulate, clock = device(LabFolder(tmp_path), SCENARIO, rank=1)
    emulate(0, 4.0, True, 0.0)
    assert clock.now == pytest.approx(1000.4)


def test_no_work_takes_no_time(tmp_path):
    emulate, clock = device(LabFolder(tmp_path), replace(SCENARIO, fixed_s=0.5))
    emulate(0, 0.0, True, 0.0)
    assert clock.now == 1000.0


def test_real_computing_that_takes_longer_is_on_record(tmp_path):
    emulate, clock = device(LabFolder(tmp_path), SCENARIO)
    clock.now += 1.0
    emulate(0, 1.0, True, 1.0)
    assert clock.now == 1001.0
    assert parts(LabFolder(tmp_path))[0]["spent_s"] > parts(LabFolder(tmp_path))[0]["target_s"]


def test_noise_is_that_of_the_step_and_rank(tmp_path):
    noisy = replace(SCENARIO, noise=0.1)
    for number in range(2):
        emulate, _ = device(LabFolder(tmp_path / str(number)), noisy)
        for step in range(3):
            emulate(step, 2.0, True, 0.0)
            emulate(step, 2.0, False, 0.0)
    first, again = (parts(LabFolder(tmp_path / str(number))) for number in range(2))
    assert [p["target_s"] for p in first] == [p["target_s"] for p in again]
    assert first[0]["target_s"] == first[1]["target_s"] != first[2]["target_s"]


def test_a_replaced_machine_is_no_longer_slow(tmp_path):
    scenario = replace(SCENARIO, events=(Persistent(0, 3.0, from_step=2, until="restart"),))
    for incarnation, expected in ((0, [1.0, 3.0]), (1, [1.0, 1.0])):
        folder = LabFolder(tmp_path / str(incarnation))
        emulate, _ = device(folder, scenario, incarnation=incarnation)
        for step in (1, 2):
            emulate(step, 1.0, True, 0.0)
        assert [p["factor"] for p in parts(folder)] == expected


def test_machines_are_counted_by_the_restarts_decided(tmp_path):
    trace = tmp_path / "trace.jsonl"
    decided = [{"kind": "decide", "setting": setting} for setting in (None, {"restart": None}, {"restart": 1})]
    trace.write_text("".join(json.dumps(line) + "\n" for line in [{"kind": "begin"}, *decided]))
    assert (machines_so_far(trace, 0), machines_so_far(trace, 1)) == (0, 1)
    assert machines_so_far(tmp_path / "none.jsonl", 0) == 0


def test_a_contended_device_computes_instead_of_sleeping(tmp_path):
    scenario = replace(SCENARIO, slot_s=0.02, events=(Contention(0),))
    emulate = Device(scenario, 0, 0, LabFolder(tmp_path), sleep=lambda _: pytest.fail("it slept"))
    MADE.append(emulate)
    before = time.thread_time()
    emulate(0, 1.0, True, 0.0)
    assert time.thread_time() - before >= 0.02  # CPU time: however busy the machine is
    assert parts(LabFolder(tmp_path))[0]["factor"] >= 1.0


def test_the_clock_starts_once(tmp_path):
    folder = LabFolder(tmp_path)
    assert folder.elapsed_s() is None
    assert folder.start_clock(5.0) == 5.0
    assert folder.start_clock(7.0) == folder.clock() == 5.0


def test_a_scenario_is_written_as_it_was_read(tmp_path):
    events = (
        Transient((0, 1), 3.0, 0.2, mean_steps=5.0),
        Kill("rank 1 + coordinator", at_step=3),
        Pause(1, 1.0, 2.0),
        Persistent(0, 2.0, from_s=1.0, until="restart"),
    )
    scenario = replace(SCENARIO, events=events, devices=(Devices("fast", 1, 2.0, max_slots=5),))
    LabFolder(tmp_path).write_scenario(scenario)
    assert LabFolder(tmp_path).scenario() == scenario


# Faults


@pytest.fixture
def sleeper(tmp_path):
    """A process that is taken for rank 0's worker."""
    process = subprocess.Popen([sys.executable, "-c", "import time\nwhile True: time.sleep(0.1)"])
    folder = LabFolder(tmp_path)
    folder.worker(0).parent.mkdir()
    folder.worker(0).write_text(json.dumps({"kind": "start", "pid": process.pid, "incarnation": 0}) + "\n")
    yield folder, process
    process.kill()
    process.wait()


class FakeCoordinator:
    def __init__(self) -> None:
        self.kills: list[float] = []

    def kill(self, away_s: float) -> None:
        self.kills.append(away_s)


def wait_for(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def whats(folder: LabFolder) -> list[str]:
    return [line["what"] for line in read_lines(folder.faults)]


def test_a_worker_and_the_coordinator_are_killed_at_their_step(sleeper):
    folder, process = sleeper
    coordinator = FakeCoordinator()
    scenario = replace(SCENARIO, events=(Kill("rank 0 + coordinator", at_step=2, away_s=0.5),))
    faults = Faults(scenario, folder, coordinator, None)
    folder.start_clock(time.time())
    with folder.worker(0).open("a") as file:
        file.write(json.dumps({"kind": "part", "step": 0}) + "\n")
    time.sleep(0.1)
    assert process.poll() is None
    with folder.worker(0).open("a") as file:
        file.write(json.dumps({"kind": "part", "step": 1}) + "\n")
    assert process.wait(60) == -signal.SIGKILL
    wait_for(lambda: coordinator.kills == [0.5])
    faults.close()
    assert whats(folder) == ["kill rank 0", "kill coordinator"]


def test_a_worker_is_stopped_and_goes_on(sleeper):
    folder, process = sleeper
    folder.start_clock(time.time())
    faults = Faults(replace(SCENARIO, events=(Pause(0, 0.0, 1.0),)), folder, FakeCoordinator(), None)
    wait_for(lambda: psutil.Process(process.pid).status() == psutil.STATUS_STOPPED)
    wait_for(lambda: len(whats(folder)) == 2)
    wait_for(lambda: psutil.Process(process.pid).status() != psutil.STATUS_STOPPED)
    faults.close()
    assert whats(folder) == ["stop rank 0", "continue rank 0"]


def test_no_worker_stays_stopped(sleeper):
    folder, process = sleeper
    folder.start_clock(time.time())
    faults = Faults(replace(SCENARIO, events=(Pause(0, 0.0, 1000.0),)), folder, FakeCoordinator(), None)
    wait_for(lambda: whats(folder) == ["stop rank 0"])
    faults.close()
    wait_for(lambda: psutil.Process(process.pid).status() != psutil.STATUS_STOPPED)


def test_a_worker_that_is_not_there_is_on_record(tmp_path):
    folder = LabFolder(tmp_path)
    folder.start_clock(time.time())
    faults = Faults(replace(SCENARIO, events=(Kill("rank 0", at_s=0.0),)), folder, FakeCoordinator(), None)
    wait_for(lambda: whats(folder) == ["no rank 0 to signal"])
    faults.close()


def test_a_burner_ends_with_the_run(tmp_path):
    folder = LabFolder(tmp_path)
    folder.start_clock(time.time())
    faults = Faults(replace(SCENARIO, events=(Contention(0),)), folder, FakeCoordinator(), None)
    wait_for(lambda: whats(folder) == ["burner beside rank 0"])
    (burner,) = [p for p in psutil.Process(os.getpid()).children() if "while True: pass" in p.cmdline()]
    assert len(burner.cpu_affinity()) == 1
    faults.close()
    assert not burner.is_running()


def has_ended(connection: socket.socket) -> bool:
    try:
        return connection.recv(10) == b""
    except ConnectionResetError:
        return True


def test_a_line_that_is_cut_refuses_until_it_is_mended():
    with socket.create_server(("127.0.0.1", 0)) as server:
        line = Line(server.getsockname()[1])
        try:
            with socket.create_connection(("127.0.0.1", line.port)) as near:
                far, _ = server.accept()
                near.sendall(b"ask")
                assert far.recv(10) == b"ask"
                far.sendall(b"answer")
                assert near.recv(10) == b"answer"
                line.cut()
                assert has_ended(near)
                far.close()
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", line.port))
            line.mend()
            socket.create_connection(("127.0.0.1", line.port)).close()
        finally:
            line.close()


# The audit


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    path = tmp_path_factory.mktemp("lab") / "pack"
    write_lab_pack(path, 40, seed=1)
    return open_pack(path).split("train")


CONFIG = TrainConfig(
    pack="",
    run_dir="",
    loader=LoaderConfig(tasks_per_batch=8, window_batches=2),
    schedule=ScheduleConfig(epochs=2),
)


def records(back: dict[int, list[int]] | None = None) -> list[dict[str, object]]:
    """Return the records of two epochs of five batches. What a step of the first epoch put back comes in its tail."""
    found, step, tail = [], 0, sum(map(len, (back or {}).values()))
    for epoch in range(2):
        sizes = [8] * 5 + ([tail] if tail and epoch == 0 else [])
        for index, size in enumerate(sizes):
            step += 1
            put = (back or {}).get(step, [])
            found.append({"step": step, "epoch": epoch, "index": index, "slots": [size - 3, 3], "put_back": put})
    return found


def tasks_of_batch(split, epoch: int, index: int) -> list[int]:
    return list(batches_of(split, CONFIG, epoch))[index].tolist()


def test_a_whole_run_passes(split):
    found = audit(records(), split, CONFIG)
    assert found.exactly_once
    assert found.expected == 80


def test_tasks_put_back_come_in_the_tail(split):
    back = {2: tasks_of_batch(split, 0, 1)[:2], 4: tasks_of_batch(split, 0, 3)[5:]}
    assert audit(records(back), split, CONFIG).exactly_once


@pytest.mark.parametrize(
    "loader", [{"episode_rows": 4}, {"max_support_rows": 1}, {"episode_rows": 5, "max_support_rows": 2}]
)
def test_batches_are_those_of_the_loader(split, loader):
    """Episodes count as tasks, and supports as they are read."""
    config = replace(CONFIG, loader=replace(CONFIG.loader, **loader))
    given = TaskLoader(split, tasks_per_batch=8, window_batches=2, seed=config.seed, prefetch=0, **loader)
    batches = [batch for epoch in range(2) for batch in batches_of(split, config, epoch)]
    assert len(batches) == 2 * given.batches_per_epoch
    for tasks in batches:
        assert next(given).task_id.tolist() == given._locate(tasks, 0).task_id.tolist()
    steps = []
    for number, tasks in enumerate(batches):
        epoch, index = divmod(number, given.batches_per_epoch)
        steps.append({"step": number, "epoch": epoch, "index": index, "slots": [len(tasks)], "put_back": []})
    found = audit(steps, split, config)
    assert found.exactly_once
    assert found.expected == 2 * given.num_tasks


def test_a_lost_task_is_found(split):
    back = {2: tasks_of_batch(split, 0, 1)[:2]}
    without_tail = [r for r in records(back) if r["index"] != 5]
    found = audit(without_tail, split, CONFIG)
    assert (found.lost, found.repeated, found.exactly_once) == (2, 0, False)


def test_a_lost_step_is_found(split):
    found = audit(records()[:4] + records()[5:], split, CONFIG)
    assert (found.lost, found.repeated) == (8, 0)


def test_a_repeated_step_is_found(split):
    found = audit([*records(), records()[0]], split, CONFIG)
    assert (found.lost, found.repeated, found.exactly_once) == (0, 8, False)


def test_slots_that_do_not_sum_to_the_batch_are_found(split):
    wrong = records()
    wrong[3]["slots"] = [4, 3]
    assert not audit(wrong, split, CONFIG).exactly_once


def test_tasks_that_were_never_there_are_found(split):
    back = {2: tasks_of_batch(split, 0, 0)[:1]}
    assert audit(records(back), split, CONFIG).problems


# What is measured, and the report


def test_the_ideal_is_the_best_division():
    assert replace(SCENARIO, slot_s=0.1).ideal_step_s(9, [2.0, 1.0]) == pytest.approx(0.6)


@pytest.fixture
def finished(tmp_path) -> tuple[LabFolder, Scenario]:
    """What four steps leave, the third of which was made twice: rank 0 is twice as slow, slots are 4 and 4."""
    folder = LabFolder(tmp_path)
    scenario = replace(SCENARIO, steps=4)
    folder.start_clock(1000.0)
    for rank, took in enumerate((0.8, 0.4)):
        lines: list[dict[str, object]] = [{"kind": "start", "pid": 1, "incarnation": 0}]
        for number, step in enumerate((0, 1, 2, 2, 3)):
            if number == 3:
                lines.append({"kind": "start", "pid": 2, "incarnation": 0})
            at = number + (5.0 if number >= 3 else 0.0)
            part = {"kind": "part", "step": step, "first": True, "work": 4.0, "factor": 2.0 - rank, "at": at}
            lines.append({**part, "took_s": took, "target_s": took, "spent_s": 0.01})
        folder.worker(rank).parent.mkdir(exist_ok=True)
        folder.worker(rank).write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder.faults.write_text(json.dumps({"at": 2.5, "what": "kill rank 1 <b>"}) + "\n")
    setting = {"step": 3, "restart": None}
    actions = [{"action": "ADJUST_BATCH", "slots": [3, 5]}]
    trace = [
        {"kind": "report", "rank": 0, "steps": [[1, 0.8, 0.1, 0.1, 4.0]]},
        {"kind": "decide", "now": 1001.5, "setting": setting, "actions": actions},
    ]
    folder.trace.write_text("".join(json.dumps(line) + "\n" for line in trace))
    return folder, scenario


def finished_records() -> list[dict[str, object]]:
    rows = [
        {"step": step, "epoch": 0, "index": step - 1, "slots": [4, 4], "put_back": [], "generation": 1 + (step > 2)}
        for step in (1, 2, 3, 4)
    ]
    train = [{**row, "kind": "train", "agent_cpu_s": 0.1 * row["step"], "time_s": 2.0 * row["step"]} for row in rows]
    return [*train, {"kind": "valid", "step": 4, "auc_before": 0.5, "auc_after": 0.75}]


def test_a_run_is_measured(finished):
    folder, scenario = finished
    found = measure(folder, scenario, "nd", finished_records(), 4)
    assert found.jct_s == pytest.approx(9.8)
    assert found.ideal_s == pytest.approx(4 * 0.6)  # 3 slots at half the speed, 5 at the full one
    assert found.achieved == pytest.approx(2.4 / 9.8)
    assert found.busy_s == pytest.approx(5 * 1.2)
    assert (found.restarts, found.repeated_steps, found.decisions) == (1, 1, 1)
    assert found.restart_s == pytest.approx(8 - 2.8)
    assert found.overhead_s == pytest.approx(0.2)
    assert found.agent_cpu_share == pytest.approx((0.2 + 0.4) / 8)
    assert found.metrics == {"auc_after": 0.75}


def test_micro_batches_of_a_step_are_one_execution(tmp_path):
    emulate, _ = device(LabFolder(tmp_path), SCENARIO)
    emulate(0, 2.0, True, 0.0)
    emulate(0, 1.0, False, 0.0)
    emulate(1, 2.0, True, 0.0)
    found = executions(LabFolder(tmp_path), 0)
    assert [(e.step, e.work) for e in found] == [(0, 3.0), (1, 2.0)]
    assert found[0].busy_s == pytest.approx(0.6)


def test_seconds_are_spread_over_bins():
    bins = [0.0] * 4
    spread(bins, 1.0, 0.5, 2.25)
    np.testing.assert_allclose(bins, [0.5, 1.0, 0.25, 0.0])


class Page(HTMLParser):
    """Checks that what is opened is closed, and collects what would be loaded from elsewhere."""

    VOID = frozenset({"meta"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.outside: list[str] = []
        self.words = ""

    def handle_starttag(self, tag, attrs):
        self.outside += [value for key, value in attrs if key in ("src", "href") and value]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data


def test_the_report_is_one_page_that_shows_what_was_done(finished):
    folder, scenario = finished
    result = measure(folder, scenario, "nd", finished_records(), 4)
    text = write_timeline(folder, scenario, result).read_text()
    page = Page()
    page.feed(text)
    assert not page.open
    assert not page.outside
    assert "kill rank 1 <b>" in page.words
    assert "ADJUST_BATCH" in page.words
    assert "24%" in page.words
    assert text.count("<svg") == 2


def test_a_report_of_a_run_without_incidents(tmp_path):
    folder, scenario = LabFolder(tmp_path), replace(SCENARIO, workers=1, events=())
    emulate, _ = device(folder, scenario)
    emulate(0, 8.0, True, 0.0)
    result = LabResult("static", 1, 1, 0.8, 0.8, 0.8, 0.0, 0, 0.0, 0, 0, 0)
    assert "<svg" in write_timeline(folder, scenario, result).read_text()


# The user's mistakes


def test_a_folder_in_use_is_left_alone(tmp_path):
    (tmp_path / "something").touch()
    with pytest.raises(ValueError, match="is not empty: name a new folder"):
        run_lab(SCENARIO, "nd", tmp_path)


def test_a_scenario_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        lab(LabConfig(scenario=str(tmp_path / "none.yaml"), out=str(tmp_path / "out")))


def test_a_policy_that_is_not_there_ends_the_run_with_the_coordinators_words(tmp_path):
    with pytest.raises(ValueError, match="must be one of static, nd"):
        run_lab(SCENARIO, "fastest", tmp_path / "out")
