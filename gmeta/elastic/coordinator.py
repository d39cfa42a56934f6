"""The coordinator's state machine, without HTTP: one job, one journal, one method a message.

Every message is decided on first, which changes nothing. Then its records and its reply go to the journal in one
transaction, then they are applied, then the reply leaves. A message sent again (the same `request`) gets the reply that
is in the journal. So at whatever moment the process is killed, a client that repeats its message loses nothing and has
nothing done twice. After a restart the journal is read from its start.

Leases run by this process's own clock, which starts at wall time and then only counts seconds. So no host's clock can
expire a lease. Time in which the coordinator was away or stopped, when nobody could renew, does not count.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from gmeta.elastic import ledger as ledgers
from gmeta.elastic import messages
from gmeta.elastic.actions import to_json
from gmeta.elastic.activity import Activity
from gmeta.elastic.controller import Controller, Decided, Granted, Limits, Policy, RejectedDecision
from gmeta.elastic.journal import Journal, Unwritable
from gmeta.elastic.ledger import JobSpec, Leased, Ledger, Refusal
from gmeta.elastic.messages import BadMessage
from gmeta.elastic.monitor import Snapshot, snapshot_to_json
from gmeta.elastic.records import Began, Introduced, Record, from_row, to_row
from gmeta.elastic.trace import Trace
from gmeta.elastic.wire import from_wire, to_wire, wire_name

AWAY_S = 1.0
"""After so many seconds without a tick the process counts as stopped; leases are prolonged by the time that it was."""
IDLE_DECIDE_S = 1.0
"""Seconds between two questions to the policy while nothing new is reported, because ranks may be silent."""
DECIDE_SHARE = 0.1
"""The fraction of the coordinator's time that policies may take."""


class Conflict(ValueError):
    """A message that is understood but not followed (HTTP 409).

    `stale` says that its sender is out of date; `lost` has those of its work items that are no longer its sender's.
    """

    def __init__(self, reason: str, stale: bool = False, lost: list[list[int]] | None = None) -> None:
        super().__init__(reason)
        self.stale = stale
        self.lost = lost or []


@dataclass
class Job:
    """What all messages must agree with."""

    run: str
    pack: str
    spec: JobSpec


@dataclass(frozen=True)
class ShownDecision:
    """What the page shows of a decision."""

    now: float
    generation: int
    step: int
    actions: list[dict[str, Any]]


Decision = tuple[list[Record], dict[str, Any]]
"""The records of a change, and the reply."""


def steady_clock() -> Callable[[], float]:
    """Return a clock: the wall time of now, plus the seconds that pass. Setting the host's clock does not move it."""
    wall, start = time.time(), time.monotonic()
    return lambda: wall + time.monotonic() - start


class Coordinator:
    """Reads the journal, and goes on from there. `policy` decides on settings; `log` hears of each problem once."""

    def __init__(
        self,
        journal: Journal,
        policy: Policy,
        *,
        limits: Limits | None = None,
        trace: Trace | None = None,
        clock: Callable[[], float] | None = None,
        log: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
    ) -> None:
        self.journal, self.policy, self.limits, self._log = journal, policy, limits or Limits(), log
        self.trace: Trace | None = None  # opened after the journal was read, which the trace holds already
        self.job: Job | None = None
        self._ledger: Ledger | None = None
        self.controller: Controller | None = None
        self.began: Began | None = None
        self.snapshot: Snapshot | None = None  # the last that a policy was asked about
        self.activity = Activity()
        self.actions: deque[ShownDecision] = deque(maxlen=200)
        self.counts: Counter[str] = Counter()  # of actions, by name
        self.problems: dict[str, int] = {}  # problem -> how often it occurred
        self._about: dict[int, Mapping[str, Any]] = {}
        self._decided, self._decide_s, self._news = 0.0, 0.0, False
        last = self._restore()
        self.trace = trace
        steady = clock or steady_clock()
        ahead = max(0.0, last - steady())  # the journal's time goes on, even if the host's clock was set back
        self.now: Callable[[], float] = lambda: steady() + ahead
        self._ticked = self.started = self.now()
        if self._ledger is not None:
            self._prolong(self.now() + self._ledger.spec.lease_s)

    def _restore(self) -> float:
        """Apply what the journal holds, and return the time of its last record."""
        found, last = self.journal.job(), 0.0
        if found is not None:
            try:
                self._open(found)
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                raise ValueError(
                    f"journal {self.journal.path} is damaged (its job, {error!r}): restore it from a copy, or name "
                    "another --journal to begin anew"
                ) from error
        for last, record in self.journal.records():
            try:
                self._apply(record, last)
            except (LookupError, ValueError, TypeError, ArithmeticError, AttributeError, AssertionError) as error:
                raise ValueError(
                    f"journal {self.journal.path} is damaged ({type(record).__name__} does not follow from what is "
                    f"before it): restore it from a copy, or name another --journal to begin anew"
                ) from error
        self.activity = Activity()  # what happened before this process began is no throughput of now
        return last

    def _open(self, job: Mapping[str, Any]) -> None:
        self.job = Job(job["run"], job["pack"], JobSpec(**from_wire(job["plan"])))
        self._ledger = Ledger(self.job.spec)

    @property
    def ledger(self) -> Ledger:
        """Return the job's ledger. `Conflict` before there is a job."""
        if self._ledger is None:
            raise Conflict("there is no job yet: open one first (/v1/job)")
        return self._ledger

    # Messages

    def handle(self, name: str, body: Any) -> dict[str, Any]:
        """Return the reply to message `name`. Where it raises BadMessage, Conflict or Unwritable, nothing was
        changed.
        """
        if not isinstance(body, dict):
            raise BadMessage("the message is no JSON object")
        request, run = messages.text(body, "request", 64), messages.text(body, "run")
        if self.job is not None and self.job.run != run:
            raise Conflict(
                f"journal {self.journal.path} is of run {self.job.run!r}, the message of run {run!r}: "
                "start a coordinator of that run's own, with another --journal"
            )
        found = self.journal.reply(request)
        if found is not None:
            return found
        now = self.now()
        if name == "job" and self.job is None:
            return self._create_job(body, request, now)
        records, reply = _DECISIONS[name](self, body, now)
        if records:
            self._write(records, now, request, reply)
        return reply

    def _create_job(self, body: Mapping[str, Any], request: str, now: float) -> dict[str, Any]:
        spec = messages.job_spec(body)
        job = {"run": messages.text(body, "run"), "pack": messages.text(body, "pack"), "plan": to_wire(spec)}
        reply = {"generation": 0, "finished": False}
        self.journal.write([], now, request, reply, job)
        self._open(job)
        return reply

    def _job(self, body: Mapping[str, Any], now: float) -> Decision:
        assert self.job is not None
        self._check_pack(body)
        difference = messages.spec_differences(self.job.spec, messages.job_spec(body))
        if difference:
            raise Conflict(
                f"journal {self.journal.path} is of another job: {difference}; "
                "correct the message, or start a coordinator with another --journal"
            )
        return [], {"generation": self.ledger.generation, "finished": self.ledger.finished}

    def _check_pack(self, body: Mapping[str, Any]) -> None:
        pack = messages.text(body, "pack")
        if self.job is not None and self.job.pack != pack:
            raise Conflict(
                f"journal {self.journal.path} is of the pack {self.job.pack!r}, the message of {pack!r}: "
                "name the pack that the run began with, or start a coordinator with another --journal"
            )

    def _lease(self, body: Mapping[str, Any], now: float) -> Decision:
        return self._leased(body, now, self.ledger, [])

    def _exchange(self, body: Mapping[str, Any], now: float) -> Decision:
        records, after, _ = self._returned(body, now)
        if body["generation"] != after.generation:  # a trainer that was replaced meanwhile, with nothing to commit
            reason = f"the message is of generation {body['generation']}, the ledger is in {after.generation}"
            raise Conflict(reason, stale=True)
        return self._leased(body, now, after, records)

    def _leased(self, body: Mapping[str, Any], now: float, after: Ledger, records: list[Record]) -> Decision:
        """Lease up to `count` work items of the ledger `after` those records."""
        worker, count = messages.text(body, "worker", 200), messages.integer(body, "count", 0, messages.MOST_WORK_ITEMS)
        if self.began is None:
            self.activity.seen(worker, now)
        found = ledgers.lease(after, worker, count, now) if count else ledgers.WAIT
        if isinstance(found, Leased):
            leases = [
                {
                    **{wire_name(key): getattr(lease, key) for key in ("epoch", "work_item", "attempt", "done")},
                    "start": after.spec.positions(lease.work_item).start,
                    "stop": after.spec.positions(lease.work_item).stop,
                }
                for lease in found.leases
            ]
            return [*records, found], {"reply": "SHARD", "generation": after.generation, "leases": leases}
        if isinstance(found, Refusal):
            if not records:
                raise Conflict(found.reason, found.stale)
            found = ledgers.WAIT  # its commits count; when it asks again, it hears of the refusal
        if found == ledgers.END or after.finished:
            return records, {"reply": "END"}
        return records, {"reply": "WAIT", "retry_s": self._retry_s()}

    def _retry_s(self) -> float:
        """Return the pause before a waiting worker asks again: short where there are few, at most 500 questions a
        second in all.
        """
        return min(2.0, max(0.05, 0.002 * len(self.activity.workers)))

    def _commit(self, body: Mapping[str, Any], now: float) -> Decision:
        records, _, done = self._returned(body, now, commits="shards")
        return records, {"done": done}

    def _renew(self, body: Mapping[str, Any], now: float) -> Decision:
        return self._returned(body, now)[0], {}

    def _saved(self, body: Mapping[str, Any], now: float) -> Decision:
        records, after, _ = self._returned(body, now)
        return records, {"saved": after.save()}

    def _fail(self, body: Mapping[str, Any], now: float) -> Decision:
        generation, reason = messages.integer(body, "generation"), messages.text(body, "reason", 2000)
        decide = _Decider(self.ledger)
        for number, (e, s, a) in enumerate(messages.work_item_keys(body, "shards")):  # the worker was at the first one
            decide(ledgers.fail(decide.after, generation, e, s, a, reason, begun=number == 0), [e, s, a])
        return decide.records(), {}

    def _returned(
        self, body: Mapping[str, Any], now: float, commits: str = "commit"
    ) -> tuple[list[Record], Ledger, int]:
        """Take progress, then commits; return their records, the ledger after them, and how many work items are newly
        done."""
        decide = _Decider(self.ledger)
        progress, work_items = messages.progress(body), messages.work_item_keys(body, commits)
        generation = messages.integer(body, "generation")
        for e, s, a, done in progress:
            decide(ledgers.renew(decide.after, generation, e, s, a, done, now), [e, s, a])
        for e, s, a in work_items:
            decide(ledgers.commit(decide.after, generation, e, s, a), [e, s, a])
        records = decide.records()
        return records, decide.after, sum(isinstance(record, ledgers.Committed) for record in records)

    def _begin(self, body: Mapping[str, Any], now: float) -> Decision:
        ledger = self.ledger
        self._check_pack(body)
        back = ledgers.rollback(ledger, messages.saved(body, ledger.spec))
        began = Began(
            back.generation,
            messages.integer(body, "world_size", 1, messages.MOST_RANKS),
            messages.integer(body, "batch", 1),
            messages.integer(body, "first_step"),
            messages.integer(body, "ahead", 0, 10_000),
            messages.number(body, "report_s"),
        )
        return [back, began], {"generation": back.generation}

    def _report(self, body: Mapping[str, Any], now: float) -> Decision:
        controller, began = self.controller, self.began
        generation = messages.integer(body, "generation")
        if controller is None or began is None:
            raise Conflict("no worker group has begun: rank 0 says so first (/v1/begin)")
        if generation != began.generation:
            raise Conflict(
                f"the report is of generation {generation}, the worker group of {began.generation}", stale=True
            )
        rank = messages.integer(body, "rank", 0, began.world_size - 1)
        known = messages.integer(body, "known", -1)
        steps, facts, about = messages.steps(body), messages.facts(body), messages.about(body)
        records: list[Record] = []
        if about is not None and about != self._about.get(rank):
            records.append(Introduced(rank, about))
        controller.report(rank, now, steps, facts)
        self.activity.reported(rank, steps, now)
        self._news = True
        if self.trace is not None:
            self.trace.write("report", now, generation, rank=rank, steps=body["steps"], facts=facts)
        granted = controller.grant()
        if granted is not None:
            records.append(granted)
        settings = [to_wire(setting) for setting in controller.newer(known)]
        return records, {"until": controller.until if granted is None else granted.until, "settings": settings}

    # Changes

    def _write(self, records: list[Record], now: float, request: str | None = None, reply: Any = None) -> None:
        """Write records to the journal, then apply them."""
        self.journal.write(records, now, request, reply)
        for record in records:
            self._apply(record, now)

    def _apply(self, record: Record, now: float) -> None:
        if isinstance(record, Granted | Decided):
            assert self.controller is not None
            self.controller.apply(record)
            if isinstance(record, Decided):
                self._remember(record)
        elif isinstance(record, Introduced):
            assert self.controller is not None
            self._about[record.rank] = record.about
            self.controller.monitor.introduce(record.rank, **record.about)
        elif isinstance(record, Began):
            self._begin_group(record, now)
        else:
            if self.began is None:  # in a trainer rank 0 leases for all ranks, and each reports its own steps
                self.activity.changed(self.ledger, record, now)
            ledgers.apply(self.ledger, record)

    def _begin_group(self, record: Began, now: float) -> None:
        self.began = record
        self.controller = Controller.begin(
            self.policy,
            world_size=record.world_size,
            batch=record.batch,
            first_step=record.first_step,
            ahead=record.ahead,
            report_s=record.report_s,
            limits=self.limits,
            restarts=self.controller.restarts if self.controller is not None else (),
        )
        self.snapshot, self._news, self._about = None, False, {}
        self.activity.restart()
        if self.trace is not None:
            values = {"world_size": record.world_size, "batch": record.batch, "first_step": record.first_step}
            self.trace.write("begin", now, record.generation, **values)

    def _remember(self, record: Decided) -> None:
        assert self.began is not None
        done = [to_json(action) for action in record.actions]
        self.counts.update(action["action"] for action in done)
        self.actions.append(ShownDecision(record.now, self.began.generation, record.setting.step, done))

    # Time

    def tick(self) -> None:
        """Expire leases, ask the policy, keep the history. To be called many times a second."""
        now = self.now()
        away, self._ticked = now - self._ticked - AWAY_S, now
        try:
            if self._ledger is not None:
                if away > 0:
                    for work_item, lease in self._ledger.doing.items():
                        self._ledger.doing[work_item] = replace(lease, deadline=lease.deadline + away)
                records: list[Record] = [*ledgers.expired(self._ledger, now)]
                if records:
                    self._write(records, now)
            self._decide(now)
        except Unwritable as error:  # the next tick tries again
            self.note(str(error))
        if now >= self.activity.history.due:
            self.activity.sample(now, self.shown(), self.holding())
        if self.trace is not None:
            self.trace.flush()

    def _prolong(self, deadline: float) -> None:
        doing = self.ledger.doing
        for work_item, lease in doing.items():
            doing[work_item] = replace(lease, deadline=max(lease.deadline, deadline))

    def _decide(self, now: float) -> None:
        controller, began = self.controller, self.began
        pause = self._decide_s / DECIDE_SHARE if self._news else IDLE_DECIDE_S
        if controller is None or began is None or now - self._decided < pause:
            return
        start = time.perf_counter()
        self._decided, self._news = now, False
        self.snapshot, decision = controller.decide(now)
        if isinstance(decision, Decided):
            decision = _plain(decision)
        if isinstance(decision, Decided):
            self._write([decision], now)
        problem = decision.problem if isinstance(decision, RejectedDecision) else None
        if problem is not None:
            self.note(f"the policy was not followed ({problem}); training goes on as it was")
        if self.trace is not None:
            made = decision if isinstance(decision, Decided) else None
            self.trace.write(
                "decide",
                now,
                began.generation,
                snapshot=snapshot_to_json(self.snapshot),
                actions=[to_json(action) for action in made.actions] if made else [],
                setting=to_wire(made.setting) if made else None,
                problem=problem,
            )
        self._decide_s = time.perf_counter() - start

    def note(self, text: str) -> None:
        """Count a problem, and tell the log of the first of its kind. At most 50 kinds are told apart."""
        if text not in self.problems and len(self.problems) >= 50:
            text = "further problems"
        self.problems[text] = self.problems.get(text, 0) + 1
        if self.problems[text] == 1:
            self._log(text)

    # What the page shows

    def holding(self) -> Counter[str]:
        """Return the number of leases of each worker."""
        return Counter(lease.worker for lease in self._ledger.doing.values()) if self._ledger is not None else Counter()

    def shown(self) -> list[str]:
        """Return the names of the workers on the page: the ranks of a trainer, or the workers that pull work items."""
        if self.began is not None:
            return [f"rank {rank}" for rank in range(self.began.world_size)]
        return sorted(self.activity.workers, key=_natural)

    def close(self) -> None:
        """Close the files."""
        self.journal.close()
        if self.trace is not None:
            self.trace.close()


class _Decider:
    """Decides on one message after the other upon a copy of the ledger; the ledger itself stays as it is."""

    def __init__(self, ledger: Ledger) -> None:
        # The other fields are not changed by renewals, commits and failures, and may be large.
        self.after = replace(
            ledger,
            doing=dict(ledger.doing),
            again=dict(ledger.again),
            lost=dict(ledger.lost),
            failures=dict(ledger.failures),
            quarantined=dict(ledger.quarantined),
        )
        self._records: list[Record] = []
        self._lost: list[list[int]] = []
        self._refusal: Refusal | None = None

    def __call__(self, found: ledgers.LedgerRecord | Refusal | None, work_item: list[int]) -> None:
        if isinstance(found, Refusal):
            self._refusal = self._refusal or found
            if found.stale:
                self._lost.append(work_item)
            elif self._refusal.stale:  # told before a loss: without the lost work items the message would fail again
                self._refusal = found
        elif found is not None:
            self._records.append(found)
            ledgers.apply(self.after, found)

    def records(self) -> list[Record]:
        """Return the records of all messages. `Conflict` where any was refused."""
        if self._refusal is not None:
            raise Conflict(self._refusal.reason, self._refusal.stale, self._lost)
        return self._records


def _plain(decided: Decided) -> Decided | RejectedDecision:
    """Return the decision as it will be read from the journal: a policy may have used numpy's numbers, or put anything
    else in it.
    """
    try:
        kind, body = to_row(decided)
        found = from_row(kind, json.loads(json.dumps(body, default=lambda value: value.tolist(), allow_nan=False)))
    except Exception as error:  # whatever a user's objects raise, training goes on
        return RejectedDecision(decided.now, f"{type(error).__name__}: {error}")
    assert isinstance(found, Decided)
    return found


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts w2 before w10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


_DECISIONS: dict[str, Callable[[Coordinator, Mapping[str, Any], float], Decision]] = {
    "job": Coordinator._job,
    "lease": Coordinator._lease,
    "commit": Coordinator._commit,
    "renew": Coordinator._renew,
    "fail": Coordinator._fail,
    "exchange": Coordinator._exchange,
    "begin": Coordinator._begin,
    "report": Coordinator._report,
    "saved": Coordinator._saved,
}
MESSAGES = tuple(_DECISIONS)
"""The names of the POST requests."""
