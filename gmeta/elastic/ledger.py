"""The ledger of a job: which samples are still to do, which are in whose hands, which are done.

It is pure: it has no clock, no I/O and no randomness. A work item is a range of positions in the order of an epoch.
Work items are leased to workers, renewed with progress, and committed; a lease that fails or runs out gives its work
item back (AntDT, arXiv 2404.09679, calls this "stateful dynamic data sharding"; the fencing and the modes are ours).
Every function *decides*: it returns the record of a change, or a `Refusal`, and changes nothing; `apply` makes the
change. So a service writes a record to its journal, then applies it, then replies. A journal that is read from its
start gives the same ledger, and an audit needs the records alone.

    record = lease(ledger, "worker-3", 2, now)     # Leased, WAIT, END or Refusal
    apply(ledger, record)

Fencing: every lease of a work item has a higher attempt number, and every rollback a higher generation. A message that
names an older one is refused, however late it comes.

What a mode promises for every sample of an epoch:

    at_least_once  It is taken at least once: what a lost worker had not reported is given out again.
    at_most_once   It is taken at most once: a work item counts as done when it is leased, and is never given out again.
    exactly_once   It takes effect exactly once: the ledger is saved in the checkpoint that holds the effects, and both
                   are rolled back together. Until then the work item of a lost lease is not given out again, because
                   some of its effects may be in the model.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Mode = Literal["at_least_once", "at_most_once", "exactly_once"]
WorkItemState = Literal["TODO", "DOING", "DONE", "QUARANTINED"]
WorkItemId = tuple[int, int]  # epoch, work item

_MASK = 2**64 - 1
_MOST_WORK_ITEMS = 10_000_000  # an order of as many takes seconds and half a gigabyte


@dataclass(frozen=True)
class JobSpec:
    """What there is to do: `num_samples` positions an epoch, in work items of `work_item_size` (the last may be
    shorter)."""

    num_samples: int
    work_item_size: int
    epochs: int = 1
    seed: int = 0
    shuffle: bool = True
    """Whether an epoch's work items are given out in a seeded order; otherwise they come one after the other."""
    mode: Mode = "at_least_once"
    lease_s: float = 60.0
    max_failures: int = 3
    """The number of failed or lost attempts at one work item after which it is quarantined."""
    skip_quarantined: bool = False
    """Whether to go on without quarantined work items; otherwise nothing more is leased once there is one."""

    def __post_init__(self) -> None:
        for name in ("num_samples", "work_item_size", "epochs", "max_failures"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}: must be a whole number of at least 1")
        if self.num_work_items > _MOST_WORK_ITEMS:
            raise ValueError(
                f"{self.num_work_items:,} work items an epoch are more than {_MOST_WORK_ITEMS:,}: raise work_item_size"
            )
        if not self.lease_s > 0:
            raise ValueError(f"lease_s is {self.lease_s}: must be more than 0")
        if self.mode not in ("at_least_once", "at_most_once", "exactly_once"):
            raise ValueError(f"mode is {self.mode!r}: must be one of at_least_once, at_most_once, exactly_once")

    @property
    def num_work_items(self) -> int:
        """Return the number of work items of an epoch."""
        return -(-self.num_samples // self.work_item_size)

    def positions(self, work_item: int) -> range:
        """Return the positions of a work item in its epoch's order."""
        start = work_item * self.work_item_size
        return range(start, min(start + self.work_item_size, self.num_samples))

    def order(self, epoch: int) -> list[int]:
        """Return the order in which an epoch's work items are given out."""
        if not self.shuffle:
            return list(range(self.num_work_items))
        state = _mix(self.seed) ^ _mix(epoch + 1)
        return sorted(range(self.num_work_items), key=lambda work_item: (_mix(state, work_item), work_item))


def Plan(num_samples: int, shard_size: int, **settings: Any) -> JobSpec:
    """Return a `JobSpec` under its former name, by which `work_item_size` was called `shard_size`."""
    warnings.warn("Plan is called JobSpec now, and its shard_size work_item_size", FutureWarning, stacklevel=2)
    return JobSpec(num_samples, shard_size, **settings)


def _mix(state: int, value: int = 0) -> int:
    """Apply the output function of splitmix64 (Steele, Lea and Flood, OOPSLA 2014), because an order outlives Python's
    generators.
    """
    x = (state + value * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


@dataclass(frozen=True)
class Lease:
    """A work item in a worker's hands. This attempt or earlier ones have reported `done` of its samples finished."""

    epoch: int
    work_item: int
    attempt: int
    worker: str
    deadline: float
    done: int = 0

    @property
    def key(self) -> WorkItemId:
        """Return (epoch, work item)."""
        return self.epoch, self.work_item


# Records: every change that the ledger can make, as it stands in the journal.


@dataclass(frozen=True)
class Leased:
    """Work items were given to a worker."""

    leases: tuple[Lease, ...]


@dataclass(frozen=True)
class Renewed:
    """A lease was renewed, with its progress."""

    lease: Lease


@dataclass(frozen=True)
class Committed:
    """A work item is done."""

    epoch: int
    work_item: int
    attempt: int


@dataclass(frozen=True)
class Returned:
    """An attempt failed or ran out. As the mode says, the work item is to do again, lost, or quarantined."""

    epoch: int
    work_item: int
    attempt: int
    reason: str
    begun: bool = True
    """Whether the worker had begun it. Only then the work item may be at fault, and the attempt counts as a failure."""


@dataclass(frozen=True)
class RolledBack:
    """All is as in `saved` again (`Ledger.save`), except the generation and the attempts, which never go back."""

    generation: int
    saved: Mapping[str, Any]


LedgerRecord = Leased | Renewed | Committed | Returned | RolledBack


@dataclass(frozen=True)
class Refusal:
    """Why a message changes nothing. A `stale` one comes from a lost lease or an older generation: its work is
    dropped."""

    reason: str
    stale: bool = False


WAIT: Literal["WAIT"] = "WAIT"
"""There is nothing to lease now, but others hold work items: ask again. This is never the end of the data."""
END: Literal["END"] = "END"
"""Every work item of every epoch is done (or quarantined, where that is skipped)."""


@dataclass
class Ledger:
    """The state of a job. An epoch's work items are leased in its order; the next epoch begins when all of them are
    done."""

    spec: JobSpec
    generation: int = 0
    epoch: int = 0
    cursor: int = 0  # a place in the epoch's order: work items before it have been leased at least once
    again: dict[int, int] = field(default_factory=dict)  # work items to lease again, in this order -> samples done
    doing: dict[int, Lease] = field(default_factory=dict)  # by work item
    lost: dict[int, int] = field(
        default_factory=dict
    )  # exactly_once: work items that wait for a rollback -> samples done
    num_done: int = 0  # work items of the epoch
    attempts: dict[WorkItemId, int] = field(default_factory=dict)  # how often each work item was leased
    failures: dict[WorkItemId, int] = field(
        default_factory=dict
    )  # these survive a rollback, or a poisonous work item would loop
    quarantined: dict[WorkItemId, str] = field(default_factory=dict)  # -> the reason of the last failure
    _order: tuple[int, list[int]] = field(default=(-1, []), compare=False, repr=False)

    @property
    def order(self) -> list[int]:
        """Return the order of the current epoch."""
        if self._order[0] != self.epoch:
            self._order = (self.epoch, self.spec.order(self.epoch))
        return self._order[1]

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.epoch >= self.spec.epochs

    def state(self, epoch: int, work_item: int) -> WorkItemState:
        """Return TODO, DOING (also while it is lost until the rollback), DONE or QUARANTINED."""
        if (epoch, work_item) in self.quarantined:
            return "QUARANTINED"
        if epoch != self.epoch:
            return "DONE" if epoch < self.epoch else "TODO"
        if work_item in self.doing or work_item in self.lost:
            return "DOING"
        return "TODO" if work_item in self.again or (epoch, work_item) not in self.attempts else "DONE"

    def todo(self) -> Iterator[tuple[int, int]]:
        """Yield (work item, samples done) for the work items that may be leased now, in order."""
        if not self.finished:
            yield from self.again.items()
            for position in range(
                self.cursor, len(self.order)
            ):  # no slice: a lease would copy what is left of the epoch
                if (self.epoch, self.order[position]) not in self.quarantined:
                    yield self.order[position], 0

    def save(self) -> dict[str, Any]:
        """Return the part that a checkpoint keeps, for JSON. Work items in hand are to be leased again."""
        return {
            "epoch": self.epoch,
            "cursor": self.cursor,
            "again": [*self.again.items(), *self.lost.items(), *((s, x.done) for s, x in self.doing.items())],
            "num_done": self.num_done,
            "attempts": [(work_item, n) for (epoch, work_item), n in self.attempts.items() if epoch == self.epoch],
        }


# Decisions


def lease(ledger: Ledger, worker: str, count: int, now: float) -> Leased | Literal["WAIT", "END"] | Refusal:
    """Lease up to `count` work items to `worker`. Call `expired` first, so that leases that ran out can be given
    again."""
    if count < 1:
        return Refusal(f"{count} work items were asked for: must be at least 1")
    if ledger.finished:
        return END
    if ledger.quarantined and not ledger.spec.skip_quarantined:
        (epoch, work_item), reason = next(iter(ledger.quarantined.items()))
        return Refusal(
            f"work item {work_item} of epoch {epoch} is quarantined after {ledger.spec.max_failures} failures: {reason}"
        )
    found = tuple(
        Lease(
            ledger.epoch,
            work_item,
            ledger.attempts.get((ledger.epoch, work_item), 0) + 1,
            worker,
            now + ledger.spec.lease_s,
            done,
        )
        for (work_item, done), _ in zip(ledger.todo(), range(count), strict=False)
    )
    if found:
        return Leased(found)
    if ledger.lost and not ledger.doing:
        return Refusal(
            f"work items {sorted(ledger.lost)} were lost: restart from a checkpoint and roll the ledger back"
        )
    return WAIT


def renew(
    ledger: Ledger, generation: int, epoch: int, work_item: int, attempt: int, done: int, now: float
) -> Renewed | Refusal | None:
    """Keep a lease, and report that `done` samples of it are finished. None: accepted, with nothing to record."""
    held = _held(ledger, generation, epoch, work_item, attempt)
    if not isinstance(held, Lease):
        return held
    size = len(ledger.spec.positions(work_item))
    if not held.done <= done <= size:
        return Refusal(f"{done} samples of work item {work_item} are reported done: must be {held.done} to {size}")
    return Renewed(replace(held, done=done, deadline=max(held.deadline, now + ledger.spec.lease_s)))


def commit(ledger: Ledger, generation: int, epoch: int, work_item: int, attempt: int) -> Committed | Refusal | None:
    """Mark the work item as done. None: it was already, by this attempt (a repeated message), or when it was leased."""
    held = _held(ledger, generation, epoch, work_item, attempt)
    return Committed(epoch, work_item, attempt) if isinstance(held, Lease) else held


def fail(
    ledger: Ledger, generation: int, epoch: int, work_item: int, attempt: int, reason: str, begun: bool = True
) -> Returned | Refusal | None:
    """Return a work item that its worker gives up on. With `begun` False the worker only ends, and is not at fault."""
    held = _held(ledger, generation, epoch, work_item, attempt)
    return Returned(epoch, work_item, attempt, reason, begun or held.done > 0) if isinstance(held, Lease) else held


def expired(ledger: Ledger, now: float) -> list[Returned]:
    """Return the leases whose deadline has passed. A clock that jumps back keeps leases longer, never shorter."""
    return [
        Returned(x.epoch, x.work_item, x.attempt, f"worker {x.worker!r} did not renew its lease", _begun(ledger, x))
        for x in ledger.doing.values()
        if x.deadline < now
    ]


def _begun(ledger: Ledger, held: Lease) -> bool:
    """Whether it has progress, or is the first of its worker's leases, which are worked on one after the other."""
    first = next(lease for lease in ledger.doing.values() if lease.worker == held.worker)
    return held.done > 0 or first.work_item == held.work_item


def rollback(ledger: Ledger, saved: Mapping[str, Any]) -> RolledBack:
    """Go back to `saved` in a new generation: from now on no message of an older one counts."""
    return RolledBack(ledger.generation + 1, saved)


def _held(ledger: Ledger, generation: int, epoch: int, work_item: int, attempt: int) -> Lease | Refusal | None:
    """Return the lease that a message is about. It is None where this very attempt has done it already."""
    if generation != ledger.generation:
        return Refusal(f"the message is of generation {generation}, the ledger is in {ledger.generation}", stale=True)
    if not (0 <= epoch < ledger.spec.epochs and 0 <= work_item < ledger.spec.num_work_items):
        return Refusal(f"there is no work item {work_item} of epoch {epoch}")
    if epoch > ledger.epoch:
        return Refusal(f"epoch {epoch} has not begun")
    found = ledger.doing.get(work_item) if epoch == ledger.epoch else None
    if found is not None and found.attempt == attempt:
        return found
    latest = ledger.attempts.get((epoch, work_item), 0)
    if attempt == latest and ledger.state(epoch, work_item) == "DONE":
        return None
    return Refusal(
        f"attempt {attempt} at work item {work_item} of epoch {epoch} is over; the last was {latest}", stale=True
    )


# Changes


def apply(ledger: Ledger, record: LedgerRecord) -> None:
    """Make the change that was decided."""
    if isinstance(record, RolledBack):
        _roll_back(ledger, record)
    elif isinstance(record, Leased):
        for found in record.leases:
            _take(ledger, found)
    elif isinstance(record, Renewed):
        ledger.doing[record.lease.work_item] = record.lease
    elif isinstance(record, Committed):
        del ledger.doing[record.work_item]
        ledger.num_done += 1
    else:
        _give_back(ledger, record)
    _end_epoch(ledger)


def _take(ledger: Ledger, found: Lease) -> None:
    if found.work_item in ledger.again:
        del ledger.again[found.work_item]
    else:
        ledger.cursor = ledger.order.index(found.work_item, ledger.cursor) + 1
    ledger.attempts[found.key] = found.attempt
    if ledger.spec.mode == "at_most_once":
        ledger.num_done += 1
    else:
        ledger.doing[found.work_item] = found


def _give_back(ledger: Ledger, record: Returned) -> None:
    held, key = ledger.doing.pop(record.work_item), (record.epoch, record.work_item)
    if record.begun:
        ledger.failures[key] = ledger.failures.get(key, 0) + 1
    if ledger.failures.get(key, 0) >= ledger.spec.max_failures:
        ledger.quarantined[key] = record.reason
    elif ledger.spec.mode == "exactly_once":
        ledger.lost[record.work_item] = held.done
    else:
        ledger.again[record.work_item] = held.done


def _roll_back(ledger: Ledger, record: RolledBack) -> None:
    saved = record.saved
    ledger.generation = record.generation
    ledger.epoch, ledger.cursor, ledger.num_done = saved["epoch"], saved["cursor"], saved["num_done"]
    ledger.again = {s: done for s, done in saved["again"] if (ledger.epoch, s) not in ledger.quarantined}
    ledger.attempts = {key: n for key, n in ledger.attempts.items() if key[0] < ledger.epoch}
    ledger.attempts |= {(ledger.epoch, work_item): n for work_item, n in saved["attempts"]}
    ledger.doing, ledger.lost = {}, {}


def _end_epoch(ledger: Ledger) -> None:
    skipped = sum(epoch == ledger.epoch for epoch, _ in ledger.quarantined) if ledger.spec.skip_quarantined else 0
    if not ledger.finished and ledger.num_done + skipped == ledger.spec.num_work_items:
        ledger.epoch += 1
        ledger.cursor = ledger.num_done = 0
