"""The coordinator's state machine, on a clock of the test's own: each message once, whatever happens around it."""

import itertools
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gmeta.elastic.actions import AdjustBatch, KillRestart
from gmeta.elastic.controller import Limits
from gmeta.elastic.coordinator import Conflict, Coordinator
from gmeta.elastic.journal import Journal, Unwritable
from gmeta.elastic.ledger import JobSpec, Ledger
from gmeta.elastic.messages import BadMessage
from gmeta.elastic.monitor import snapshot_from_json
from gmeta.elastic.trace import Trace
from gmeta.elastic.view import cells, history, state, work_item_counts
from gmeta.elastic.wire import to_wire

PLAN = JobSpec(num_samples=20, work_item_size=5, epochs=2, seed=1, lease_s=10.0)
TRAINER = JobSpec(num_samples=400, work_item_size=40, shuffle=False, mode="exactly_once", lease_s=1000.0)
NUMBERS = itertools.count()


class Bench:
    """A coordinator that can be stopped and started, with a clock that is set by hand."""

    def __init__(self, folder: Path, policy=lambda snapshot: [], trace: bool = False) -> None:
        self.path, self.policy, self.time, self.lines = folder / "job.journal", policy, 1000.0, []
        self.trace = folder / "trace.jsonl" if trace else None
        self.start()

    def start(self) -> None:
        trace = Trace(self.trace, self.lines.append) if self.trace else None
        self.it = Coordinator(
            Journal(self.path),
            self.policy,
            limits=Limits(short_steps=2, long_steps=4),
            trace=trace,
            clock=lambda: self.time,
            log=self.lines.append,
        )

    def restart(self) -> None:
        self.it.close()
        self.start()

    def send(self, name: str, request: str | None = None, run: str = "r", **fields: Any) -> dict[str, Any]:
        request = request or f"request-{next(NUMBERS)}"
        reply = self.it.handle(name, {"run": run, "request": request, **json.loads(json.dumps(fields))})
        return json.loads(json.dumps(reply))

    def open(self, spec: JobSpec = PLAN, pack: str = "p", **fields: Any) -> dict[str, Any]:
        return self.send("job", pack=pack, plan=to_wire(spec), **fields)

    def tick(self, seconds: float = 0.0) -> None:
        """Time passes as it does where ticks are frequent."""
        end = self.time + seconds
        while self.time < end:
            self.time = min(end, self.time + 0.5)
            self.it.tick()
        self.it.tick()

    def begin(self, world_size: int = 2, saved: Any = None, **fields: Any) -> int:
        values = {"pack": "p", "batch": 8, "first_step": 0, "ahead": 1, "report_s": 0.25, **fields}
        return self.send("begin", world_size=world_size, saved=saved, **values)["generation"]

    def report(self, generation: int, rank: int, first: int, count: int, **fields: Any) -> dict[str, Any]:
        steps = [[step, 0.1, 0.0, 0.0, 4] for step in range(first, first + count)]
        values = {"known": 0, "facts": {}, "about": None, **fields}
        return self.send("report", generation=generation, rank=rank, steps=steps, **values)


@pytest.fixture
def bench(tmp_path: Path):
    made = Bench(tmp_path)
    yield made
    made.it.close()


def names(reply: dict[str, Any]) -> list[list[int]]:
    return [[lease["epoch"], lease["shard"], lease["attempt"]] for lease in reply["leases"]]


def test_a_job_from_begin_to_end(bench: Bench):
    assert bench.open() == {"generation": 0, "finished": False}
    taken, reply = [], bench.send("lease", worker="a", count=3)
    while reply["reply"] != "END":
        assert reply["generation"] == 0
        taken += [(x["epoch"], p) for x in reply["leases"] for p in range(x["start"], x["stop"])]
        reply = bench.send("exchange", worker="a", count=3, generation=0, commit=names(reply), progress=[])
    assert sorted(taken) == [(epoch, position) for epoch in range(2) for position in range(20)]
    assert bench.open() == {"generation": 0, "finished": True}


def test_an_exchange_that_ends_the_epoch_leases_from_the_next(bench: Bench):
    bench.open()
    held = names(bench.send("lease", worker="a", count=4))
    assert bench.send("lease", worker="b", count=1)["reply"] == "WAIT"
    reply = bench.send("exchange", worker="a", count=1, generation=0, commit=held, progress=[])
    assert names(reply)[0][0] == 1


def test_count_zero_only_gives_back(bench: Bench):
    bench.open()
    held = names(bench.send("lease", worker="a", count=2))
    reply = bench.send("exchange", worker="a", count=0, generation=0, commit=held, progress=[])
    assert reply["reply"] == "WAIT"
    assert work_item_counts(bench.it.ledger) == {"todo": 2, "doing": 0, "done": 2, "lost": 0, "quarantined": 0}


@pytest.mark.parametrize("restarted", [False, True])
def test_a_repeated_message_gets_the_same_reply(bench: Bench, restarted: bool):
    bench.open(request="job")
    first = bench.send("lease", request="again", worker="a", count=2)
    before = asdict(bench.it.ledger)
    if restarted:
        bench.restart()
    assert bench.send("lease", request="again", worker="a", count=2) == first
    assert len(bench.it.ledger.doing) == 2
    assert bench.open(request="job") == {"generation": 0, "finished": False}
    if not restarted:
        assert asdict(bench.it.ledger) == before


def test_a_stale_commit_refuses_the_whole_message(bench: Bench):
    bench.open()
    good, late = names(bench.send("lease", worker="a", count=2))
    bench.send("fail", generation=0, shards=[late], reason="out of memory")
    before = asdict(bench.it.ledger)
    for name, fields in (
        ("commit", {"shards": [good, late]}),
        ("exchange", {"worker": "a", "count": 2, "commit": [good, late], "progress": []}),
        ("renew", {"progress": [[*late, 3], [*good, 2]]}),
    ):
        with pytest.raises(Conflict, match="attempt 1 at work item") as caught:
            bench.send(name, generation=0, **fields)
        assert caught.value.stale
        assert caught.value.lost == [late]
        assert asdict(bench.it.ledger) == before
    assert bench.send("commit", generation=0, shards=[good]) == {"done": 1}
    assert bench.send("commit", generation=0, shards=[good]) == {"done": 0}, "repeated under another request"


def test_progress_survives_the_worker(bench: Bench):
    bench.open()
    (held,) = names(bench.send("lease", worker="a", count=1))
    bench.send("renew", generation=0, progress=[[*held, 3]])
    with pytest.raises(Conflict, match="2 samples of work item") as caught:
        bench.send("renew", generation=0, progress=[[*held, 2]])
    assert not caught.value.stale
    bench.tick(10.5)
    leases = bench.send("lease", worker="b", count=4)["leases"]
    (again,) = [x for x in leases if x["shard"] == held[1]]
    assert (again["attempt"], again["done"]) == (2, 3)


def test_leases_run_out_by_the_coordinators_clock(bench: Bench):
    bench.open()
    held = names(bench.send("lease", worker="a", count=4))
    bench.tick(9.5)
    bench.send("renew", generation=0, progress=[[*held[0], 0]])
    bench.tick(1.0)
    assert [lease.key for lease in bench.it.ledger.doing.values()] == [tuple(held[0][:2])]


def test_time_away_does_not_count(bench: Bench):
    bench.open()
    bench.send("lease", worker="a", count=4)
    bench.tick(8.0)
    bench.time += 500.0  # stopped, and continued
    bench.it.tick()
    bench.tick(0.5)
    assert len(bench.it.ledger.doing) == 4
    bench.time += 500.0
    bench.restart()
    bench.tick(9.5)
    assert len(bench.it.ledger.doing) == 4, "fresh deadlines after a restart"
    bench.tick(1.0)
    assert not bench.it.ledger.doing


def test_a_host_clock_that_was_set_back(bench: Bench):
    bench.open()
    bench.send("lease", worker="a", count=1)
    bench.time = 10.0
    bench.restart()
    assert bench.it.now() == 1000.0
    bench.tick(11.0)
    assert not bench.it.ledger.doing


def test_a_restart_reads_all_of_it(tmp_path: Path):
    bench = Bench(tmp_path, policy=lambda s: [AdjustBatch((3, 5)), KillRestart(1)] if s.step >= 2 else [])
    bench.open(TRAINER)
    generation = bench.begin()
    bench.report(generation, 0, 0, 3, about={"role": "worker", "max_slots": 6})
    bench.report(generation, 1, 0, 3)
    bench.tick(1.0)
    bench.send("lease", worker="rank 0", count=2)
    before, controller = asdict(bench.it.ledger), bench.it.controller
    bench.restart()
    after = bench.it.controller
    assert asdict(bench.it.ledger) | {"doing": 0} == before | {"doing": 0}
    assert (after.settings, after.until, after.restarts) == (
        controller.settings,
        controller.until,
        controller.restarts,
    )
    assert after.settings[-1].tasks_per_rank == (3, 5)
    assert len(after.restarts) == 1
    assert after.monitor.snapshot(0.0, after.settings[-1], 0).workers[0].max_slots == 6
    bench.it.close()


def test_a_trainer_rolls_back(bench: Bench):
    bench.open(TRAINER)
    first = bench.begin()
    held = names(bench.send("exchange", worker="rank 0", count=2, generation=first, commit=[], progress=[]))
    saved = bench.send("saved", generation=first, progress=[[*held[1], 7]], commit=[held[0]])["saved"]
    assert saved["again"] == [[1, 7]]
    bench.send("commit", generation=first, shards=[held[1]])
    second = bench.begin(saved=saved)
    assert (first, second) == (1, 2)
    for name, fields in (
        ("commit", {"shards": [held[1]]}),
        ("exchange", {"worker": "rank 0", "count": 1, "commit": [], "progress": []}),
        ("saved", {"progress": [], "commit": [held[1]]}),
        ("report", {"rank": 0, "known": 0, "steps": [], "facts": {}, "about": None}),
    ):
        with pytest.raises(Conflict, match="of generation 1") as caught:
            bench.send(name, generation=first, **fields)
        assert caught.value.stale
    (lease,) = bench.send("exchange", worker="rank 0", count=1, generation=second, commit=[], progress=[])["leases"]
    assert (lease["shard"], lease["done"], lease["attempt"]) == (1, 7, 2)


def test_settings_come_with_the_grant_that_reaches_them(tmp_path: Path):
    bench = Bench(tmp_path, policy=lambda s: [AdjustBatch((2, 6))] if s.step >= 3 else [], trace=True)
    bench.open(TRAINER)
    generation = bench.begin()
    first = bench.report(generation, 0, 0, 3)
    assert first["settings"] == []
    bench.report(generation, 1, 0, 3)
    bench.tick(1.0)
    (setting,) = bench.report(generation, 1, 3, 1)["settings"]
    assert setting["slots"] == [2, 6]
    assert setting["step"] == first["until"] + 1
    later = bench.report(generation, 0, 3, 4, known=1)
    assert later["settings"] == []
    assert later["until"] >= setting["step"]
    bench.it.close()
    lines = [json.loads(line) for line in bench.trace.read_text().splitlines()]
    assert [line["kind"] for line in lines][:3] == ["begin", "report", "report"]
    (made,) = [line for line in lines if line["kind"] == "decide" and line["actions"]]
    assert made["setting"] == setting
    assert bench.policy(snapshot_from_json(made["snapshot"])) == [AdjustBatch((2, 6))]


@pytest.mark.parametrize(
    ("policy", "problem"),
    [
        (lambda s: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda s: [AdjustBatch((1, 1))], "sums to 2: the global batch has 8 tasks"),
        (lambda s: ["faster"], "'faster' is no action"),
        (lambda s: None, "TypeError"),
        (lambda s: sys.exit(3), "SystemExit: 3"),
        (lambda s: [KillRestart(0, reason=object())], "has no attribute 'tolist'"),
    ],
    ids=["raises", "wrong sum", "no action", "no list", "leaves", "no text"],
)
def test_a_policy_that_talks_nonsense(tmp_path: Path, policy, problem: str):
    bench = Bench(tmp_path, policy)
    bench.open(TRAINER)
    generation = bench.begin()
    for step in range(5):
        bench.report(generation, 0, step, 1)
        bench.tick(1.0)
    (line,) = bench.lines
    assert problem in line
    assert "training goes on" in line
    assert bench.it.controller.settings[-1].tasks_per_rank == (4, 4)
    assert next(iter(bench.it.problems.values())) > 3
    bench.it.close()


def test_a_policy_that_computes_with_numpy(tmp_path: Path):
    bench = Bench(tmp_path, lambda s: [AdjustBatch(np.array([2, 6]))])
    bench.open(TRAINER)
    bench.report(bench.begin(), 0, 0, 1)
    bench.tick(1.0)
    assert not bench.lines
    bench.restart()
    assert bench.it.controller.settings[-1].tasks_per_rank == (2, 6)
    json.dumps(state(bench.it))
    bench.it.close()


def test_a_full_disk_changes_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    bench.open()
    held = names(bench.send("lease", worker="a", count=2))
    before = asdict(bench.it.ledger)

    def full(*_: Any) -> None:
        raise Unwritable("the journal cannot be written")

    with monkeypatch.context() as patch:
        patch.setattr(bench.it.journal, "write", full)
        for name, fields in (("commit", {"shards": held}), ("fail", {"shards": held, "reason": "x"})):
            with pytest.raises(Unwritable):
                bench.send(name, generation=0, **fields)
        with pytest.raises(Unwritable):
            bench.send("exchange", request="later", worker="a", count=2, generation=0, commit=held, progress=[])
        bench.tick(20.0)
        assert asdict(bench.it.ledger) == before
        assert bench.lines == ["the journal cannot be written"]
    bench.tick()
    assert not bench.it.ledger.doing, "what ran out meanwhile is taken back when there is room"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"run": "other"}, r"is of run 'r', the message of run 'other'.*another --journal"),
        ({"pack": "q"}, r"is of the pack 'p', the message of 'q'.*another --journal"),
        ({"spec": JobSpec(20, 4, epochs=2, seed=1, lease_s=10.0)}, r"plan.shard_size is 5 there and 4 in the message;"),
    ],
)
def test_another_job(bench: Bench, fields: dict[str, Any], message: str):
    bench.open()
    with pytest.raises(Conflict, match=message) as caught:
        bench.open(**fields)
    assert not caught.value.stale
    bench.restart()
    with pytest.raises(Conflict, match=message):
        bench.open(**fields)


SHARDS = "of at most 4096 [epoch, work item, attempt]"


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("lease", {"worker": "", "count": 1}, "worker is '': must be text of 1 to 200 characters"),
        ("lease", {"worker": "a", "count": 1.5}, "count is 1.5: must be a whole number of 0 to 4096"),
        ("lease", {"worker": "a", "count": True}, "count is True"),
        ("commit", {"generation": 0}, None),
        ("commit", {"generation": None, "shards": []}, "generation is None"),
        ("commit", {"generation": 0, "shards": "all"}, "shards is 'all': must be a list of at most"),
        ("commit", {"generation": 0, "shards": [[0, 1]]}, "an entry of shards is [0, 1]"),
        ("renew", {"generation": 0, "progress": [[0, 1, 1, "x"]]}, "an entry of progress is"),
        ("fail", {"generation": 0, "shards": [], "reason": 7}, "reason is 7"),
        ("job", {"pack": "p", "plan": {"num_sample": 3}}, "plan has no field 'num_sample'"),
        ("job", {"pack": "p", "plan": {"num_samples": "3", "shard_size": 1}}, "plan.num_samples is '3'"),
        ("job", {"pack": "p", "plan": {"num_samples": 3}}, "plan: "),
        ("job", {"pack": "p", "plan": {"num_samples": 0, "shard_size": 1}}, "plan: num_samples is 0"),
        ("begin", {"pack": "p", "saved": {"epoch": 99}}, "saved.epoch is 99: must be a whole number of 0 to 2"),
        (
            "begin",
            {"pack": "p", "saved": {"epoch": 0, "cursor": 1, "num_done": 0, "again": [[99, 0]], "attempts": []}},
            "saved.again is [[99, 0]]",
        ),
        ("begin", {"pack": "p", "world_size": 0}, "world_size is 0: must be a whole number of 1"),
    ],
)
def test_messages_that_make_no_sense(bench: Bench, name: str, fields: dict[str, Any], message: str | None):
    bench.open()
    before = asdict(bench.it.ledger)
    if message is None:
        assert bench.send(name, **fields) == {"done": 0}
    else:
        with pytest.raises(BadMessage) as caught:
            bench.send(name, **fields)
        assert str(caught.value).startswith(message)
    assert asdict(bench.it.ledger) == before


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 2}, "rank is 2: must be a whole number of 0 to 1"),
        ({"steps": [[0, float("1e400"), 0, 0, 0]]}, "an entry of steps is"),
        ({"steps": [[0, -1, 0, 0, 0]]}, "an entry of steps is"),
        ({"facts": {"load": "high"}}, "facts is"),
        ({"about": {"rank": 3}}, "about has no field 'rank'"),
        ({"about": {"max_slots": 0}}, "about.max_slots is 0"),
    ],
)
def test_reports_that_make_no_sense(bench: Bench, fields: dict[str, Any], message: str):
    bench.open(TRAINER)
    values = {"generation": bench.begin(), "rank": 0, "known": 0, "steps": [], "facts": {}, "about": None} | fields
    with pytest.raises(BadMessage) as caught:
        bench.it.handle("report", {"run": "r", "request": "x", **values})
    assert str(caught.value).startswith(message)


def test_before_there_is_a_job(bench: Bench):
    for name, fields in (
        ("lease", {"worker": "a", "count": 1}),
        ("commit", {"generation": 0, "shards": []}),
        ("begin", {"pack": "p"}),
    ):
        with pytest.raises(Conflict, match="there is no job yet"):
            bench.send(name, **fields)
    bench.open()
    with pytest.raises(Conflict, match="no worker group has begun"):
        bench.report(0, 0, 0, 1)
    for body in ([], "x", {"run": "r"}, {"run": "r", "request": ""}):
        with pytest.raises(BadMessage):
            bench.it.handle("lease", body)


@pytest.mark.parametrize("shuffle", [False, True])
def test_the_shard_bar_shows_what_is_where(shuffle: bool):
    ledger = Ledger(JobSpec(num_samples=12, work_item_size=1, shuffle=shuffle))
    _, second, third, fourth = ledger.order[:4]
    ledger.cursor, ledger.num_done = 6, 3
    ledger.attempts = {(0, s): 1 for s in ledger.order[:6]}
    ledger.again, ledger.quarantined = {second: 0}, {(0, third): "boom"}
    ledger.doing = {fourth: None}  # type: ignore[dict-item]
    assert cells(ledger) == "90qd99000000"
    assert cells(ledger, most=6) == "4q9000"


def test_the_heat_strip_is_relative_to_the_median(bench: Bench):
    bench.open()
    kept, work = bench.it.activity.history, {"a": 0.1, "b": 0.2, "c": 0.4, "d": None, "e": 100.0}
    kept.add(1.0, {name: (1.0, None if name == "d" else 0.2) for name in work})
    kept.add(2.0, {name: (2.0, value) for name, value in work.items()})
    rows = [{"name": name, "batch_s": value} for name, value in work.items()]
    seen = history(kept, rows)
    assert seen["heat"] == {"a": "i6", "b": "ic", "c": "ii", "d": "..", "e": "iz"}
    assert seen["total"] == [5.0, 10.0]


def test_the_state_is_json_and_small_with_many_workers(bench: Bench):
    spec = JobSpec(num_samples=8 * 1024, work_item_size=1)
    bench.open(spec)
    for second in range(150):
        for worker in range(second % 4, 1024, 4) if second % 10 == 0 else range(0, 1024, 256):
            held = names(bench.send("lease", worker=f"w{worker}", count=1))
            bench.send("commit", generation=0, shards=held)
        bench.tick(1.0)
    seen = state(bench.it)
    assert len(seen["workers"]) > 256
    assert len(seen["lines"]) == 16
    assert len(seen["times"]) < 120
    assert {len(row) for row in seen["heat"].values()} == {len(seen["times"])}
    assert len(json.dumps(seen, allow_nan=False)) < 400_000
