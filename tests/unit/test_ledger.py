"""The ledger: any interleaving of calls, crashes, clock jumps and rollbacks delivers what its mode promises."""

import json
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from gmeta.elastic.ledger import (
    END,
    WAIT,
    Committed,
    JobSpec,
    Leased,
    Ledger,
    Refusal,
    Renewed,
    Returned,
    apply,
    commit,
    expired,
    fail,
    lease,
    renew,
    rollback,
)


def take(ledger: Ledger, worker: str, count: int = 1, now: float = 0.0) -> list:
    record = lease(ledger, worker, count, now)
    assert isinstance(record, Leased), record
    apply(ledger, record)
    return list(record.leases)


def finish(ledger: Ledger, found) -> None:
    record = commit(ledger, ledger.generation, found.epoch, found.work_item, found.attempt)
    assert isinstance(record, Committed), record
    apply(ledger, record)


def test_every_epoch_has_its_own_order_and_every_position():
    spec = JobSpec(num_samples=103, work_item_size=10, epochs=3, seed=7)
    orders = [spec.order(epoch) for epoch in range(3)]
    assert orders[0] == [8, 4, 0, 5, 10, 3, 2, 6, 9, 1, 7], "journals refer to it: it may not change"
    assert len({tuple(order) for order in orders}) == 3
    for order in orders:
        assert sorted(p for work_item in order for p in spec.positions(work_item)) == list(range(103))
    assert JobSpec(103, 10, seed=8).order(0) != orders[0]


def test_wait_is_not_the_end():
    ledger = Ledger(JobSpec(num_samples=2, work_item_size=1, epochs=2))
    first, second = take(ledger, "a", 5)
    assert lease(ledger, "b", 1, 0.0) == WAIT
    finish(ledger, first)
    assert lease(ledger, "b", 1, 0.0) == WAIT
    assert [ledger.state(0, s) for s in (first.work_item, second.work_item)] == ["DONE", "DOING"]
    finish(ledger, second)
    assert ledger.epoch == 1
    for found in take(ledger, "b", 5):
        finish(ledger, found)
    assert lease(ledger, "a", 1, 0.0) == END


def test_a_late_commit_is_refused_and_a_repeated_one_is_not():
    ledger = Ledger(JobSpec(num_samples=1, work_item_size=1, lease_s=10))
    (old,) = take(ledger, "slow")
    (record,) = expired(ledger, 11.0)
    apply(ledger, record)
    (new,) = take(ledger, "fast", now=11.0)
    assert (old.attempt, new.attempt) == (1, 2)
    late = commit(ledger, 0, 0, old.work_item, old.attempt)
    assert isinstance(late, Refusal)
    assert late.stale
    finish(ledger, new)
    assert commit(ledger, 0, 0, new.work_item, new.attempt) is None
    assert commit(ledger, 0, 0, old.work_item, old.attempt).stale


def test_progress_is_kept_and_cannot_go_back():
    ledger = Ledger(JobSpec(num_samples=10, work_item_size=10, lease_s=10))
    (found,) = take(ledger, "a")
    record = renew(ledger, 0, 0, 0, found.attempt, 4, 5.0)
    assert isinstance(record, Renewed)
    assert record.lease.deadline == 15.0
    apply(ledger, record)
    assert renew(ledger, 0, 0, 0, found.attempt, 3, 5.0).reason.startswith("3 samples of work item 0")
    assert renew(ledger, 0, 0, 0, found.attempt, 11, 5.0).reason.endswith("must be 4 to 10")
    assert renew(ledger, 0, 0, 0, found.attempt, 4, 1.0).lease.deadline == 15.0, "a clock that jumps back"
    apply(ledger, fail(ledger, 0, 0, 0, found.attempt, "out of memory"))
    (again,) = take(ledger, "b")
    assert (again.done, again.attempt) == (4, 2)


@pytest.mark.parametrize("skip", [False, True])
def test_a_poisonous_shard_is_set_aside(skip: bool):
    ledger = Ledger(JobSpec(num_samples=2, work_item_size=1, max_failures=2, skip_quarantined=skip))
    bad = ledger.order[0]
    for _ in range(2):
        held = take(ledger, "a", 2)
        (found,) = (x for x in held if x.work_item == bad)
        apply(ledger, fail(ledger, 0, 0, bad, found.attempt, "boom"))
    assert ledger.state(0, bad) == "QUARANTINED"
    answer = lease(ledger, "a", 1, 0.0)
    if skip:
        assert answer == WAIT
        (other,) = ledger.doing.values()
        finish(ledger, other)
        assert lease(ledger, "a", 1, 0.0) == END
    else:
        assert answer.reason == f"work item {bad} of epoch 0 is quarantined after 2 failures: boom"


def test_a_poisonous_shard_does_not_loop_through_rollbacks():
    ledger = Ledger(
        JobSpec(num_samples=3, work_item_size=1, mode="exactly_once", max_failures=2, skip_quarantined=True)
    )
    start = json.loads(json.dumps(ledger.save()))
    bad = ledger.order[0]
    for _ in range(2):
        found = next(x for x in take(ledger, "a", 3) if x.work_item == bad)
        apply(ledger, fail(ledger, ledger.generation, 0, bad, found.attempt, "boom"))
        apply(ledger, rollback(ledger, start))
    rest = take(ledger, "a", 3)
    assert bad not in [x.work_item for x in rest]
    for found in rest:
        finish(ledger, found)
    assert ledger.finished


def test_old_generations_are_refused():
    ledger = Ledger(JobSpec(num_samples=4, work_item_size=1, mode="exactly_once"))
    start = ledger.save()
    (found,) = take(ledger, "a")
    apply(ledger, rollback(ledger, start))
    answer = commit(ledger, 0, 0, found.work_item, found.attempt)
    assert answer == Refusal("the message is of generation 0, the ledger is in 1", stale=True)
    assert take(ledger, "b")[0].work_item == found.work_item


def test_messages_about_nothing():
    ledger = Ledger(JobSpec(num_samples=4, work_item_size=2, epochs=2))
    assert commit(ledger, 0, 0, 9, 1).reason == "there is no work item 9 of epoch 0"
    assert commit(ledger, 0, 1, 0, 1).reason == "epoch 1 has not begun"
    assert commit(ledger, 0, 0, 0, 1).stale
    assert lease(ledger, "a", 0, 0.0).reason.startswith("0 work items were asked for")
    for bad in ({"num_samples": 0}, {"work_item_size": 0}, {"lease_s": 0.0}, {"mode": "often"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            JobSpec(**{"num_samples": 1, "work_item_size": 1, **bad})


class Interleavings(RuleBasedStateMachine):
    """Workers that crash, stall and come back; a clock that jumps; a trainer that saves and restarts.

    The audit stands beside the ledger and counts, for every sample of every epoch, how often it was taken and (for
    exactly_once) how often it is in the model; it shares no code with it.
    """

    @initialize(
        mode=st.sampled_from(["at_least_once", "at_most_once", "exactly_once"]),
        samples=st.integers(1, 17),
        size=st.integers(1, 5),
        epochs=st.integers(1, 3),
        seed=st.integers(0, 5),
    )
    def begin(self, mode: str, samples: int, size: int, epochs: int, seed: int) -> None:
        self.spec = JobSpec(samples, size, epochs, seed, mode, lease_s=10.0, max_failures=10**6)
        self.ledger = Ledger(self.spec)
        self.journal: list = []
        self.now = 0.0
        self.held: list = []  # [lease, samples finished, generation]
        self.zombies: list = []  # leases of workers that are believed dead, and still send
        self.taken: Counter = Counter()
        self.model: Counter = Counter()
        self.checkpoint = (json.dumps(self.ledger.save()), Counter())
        self.torn = False  # effects are in the model that the ledger knows nothing of: no checkpoint is made of that

    def write(self, record) -> None:
        self.journal.append(record)
        apply(self.ledger, record)

    def samples(self, found, start: int, stop: int) -> list:
        return [(found.epoch, position) for position in self.spec.positions(found.work_item)[start:stop]]

    @rule(count=st.integers(1, 3), worker=st.sampled_from("abc"))
    def ask(self, count: int, worker: str) -> None:
        record = lease(self.ledger, worker, count, self.now)
        if isinstance(record, Leased):
            self.write(record)
            self.held += [[found, found.done, self.ledger.generation] for found in record.leases]

    @precondition(lambda self: self.held)
    @rule(data=st.data(), count=st.integers(1, 4))
    def work(self, data, count: int) -> None:
        """A step: samples are computed, take effect, and are reported."""
        job = data.draw(st.sampled_from(self.held))
        found, done, generation = job
        stop = min(done + count, len(self.spec.positions(found.work_item)))
        samples = self.samples(found, done, stop)
        if self.spec.mode == "exactly_once":
            record = renew(self.ledger, generation, found.epoch, found.work_item, found.attempt, stop, self.now)
            if isinstance(record, Refusal):
                assert record.stale
                return
            self.write(record)
            self.model.update(samples)
        self.taken.update(samples)
        job[1] = stop

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def report(self, data) -> None:
        found, done, generation = data.draw(st.sampled_from(self.held))
        record = renew(self.ledger, generation, found.epoch, found.work_item, found.attempt, done, self.now)
        if isinstance(record, Renewed):
            self.write(record)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def end(self, data) -> None:
        job = data.draw(st.sampled_from(self.held))
        found, done, generation = job
        if done < len(self.spec.positions(found.work_item)):
            return
        self.held.remove(job)
        record = commit(self.ledger, generation, found.epoch, found.work_item, found.attempt)
        if isinstance(record, Committed):
            self.write(record)
            assert commit(self.ledger, generation, found.epoch, found.work_item, found.attempt) is None
        else:
            assert record is None or record.stale

    @precondition(lambda self: self.held)
    @rule(data=st.data(), told=st.booleans())
    def crash(self, data, told: bool) -> None:
        job = data.draw(st.sampled_from(self.held))
        self.held.remove(job)
        self.zombies.append(job)
        found, _, generation = job
        if told:
            record = fail(self.ledger, generation, found.epoch, found.work_item, found.attempt, "killed")
            if isinstance(record, Returned):
                self.write(record)

    @precondition(lambda self: self.held and self.spec.mode == "exactly_once")
    @rule(data=st.data())
    def die_amid_a_step(self, data) -> None:
        """Samples are in the model, and nobody has said so."""
        job = data.draw(st.sampled_from(self.held))
        found, done, generation = job
        held = self.ledger.doing.get(found.work_item)
        if held is not None and (generation, *held.key) == (self.ledger.generation, *found.key):
            self.model.update(self.samples(found, done, done + 2))
            self.torn = True
        self.held.remove(job)

    @precondition(lambda self: self.zombies)
    @rule(data=st.data())
    def rise(self, data) -> None:
        """A worker that was given up commits after all: counted only if nobody has been given its work item since."""
        found, done, generation = data.draw(st.sampled_from(self.zombies))
        before = json.dumps(self.ledger.save())
        if done < len(self.spec.positions(found.work_item)):
            return
        record = commit(self.ledger, generation, found.epoch, found.work_item, found.attempt)
        if isinstance(record, Committed):
            self.write(record)
        else:
            assert json.dumps(self.ledger.save()) == before

    @rule(jump=st.sampled_from([-100.0, 0.5, 5.0, 11.0, 1000.0]))
    def clock(self, jump: float) -> None:
        self.now += jump
        for record in expired(self.ledger, self.now):
            self.write(record)

    @precondition(lambda self: not self.torn)
    @rule()
    def save(self) -> None:
        self.checkpoint = (json.dumps(self.ledger.save()), Counter(self.model))

    @precondition(lambda self: self.spec.mode == "exactly_once")
    @rule()
    def restart(self) -> None:
        saved, model = self.checkpoint
        self.write(rollback(self.ledger, json.loads(saved)))
        self.model = Counter(model)
        self.torn = False
        self.zombies += self.held
        self.held = []

    @rule()
    def coordinator_restarts(self) -> None:
        """The journal alone gives the same ledger."""
        again = Ledger(self.spec)
        for record in self.journal:
            apply(again, record)
        assert again == self.ledger
        self.ledger = again

    def teardown(self) -> None:
        if not hasattr(self, "plan"):
            return
        self.zombies += self.held
        self.held = []
        for _ in range(10_000):
            self.clock(1000.0)
            record = lease(self.ledger, "last", 2, self.now)
            if record == END:
                break
            if isinstance(record, Refusal):
                assert self.spec.mode == "exactly_once"
                self.restart()
                continue
            assert isinstance(record, Leased), record
            self.write(record)
            for found in record.leases:
                samples = self.samples(found, found.done, self.spec.work_item_size)
                self.taken.update(samples)
                self.model.update(samples)
                result = commit(self.ledger, self.ledger.generation, found.epoch, found.work_item, found.attempt)
                if isinstance(result, Committed):
                    self.write(result)
        else:
            raise AssertionError("the data has no end")
        everything = {(epoch, p) for epoch in range(self.spec.epochs) for p in range(self.spec.num_samples)}
        if self.spec.mode == "at_least_once":
            assert set(self.taken) == everything
        elif self.spec.mode == "at_most_once":
            assert set(self.taken) <= everything
            assert all(count == 1 for count in self.taken.values())
        else:
            assert self.model == Counter(everything)


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_shards_that_a_lost_worker_had_not_begun_are_not_to_blame():
    ledger = Ledger(JobSpec(num_samples=6, work_item_size=1, max_failures=2, lease_s=10.0, shuffle=False))
    for round_ in range(2):
        leased = lease(ledger, "crashes", 3, now=100.0 * round_)
        apply(ledger, leased)
        first = [record.begun for record in expired(ledger, 100.0 * round_ + 50)]
        assert first == [True, False, False]
        for record in expired(ledger, 100.0 * round_ + 50):
            apply(ledger, record)
    assert list(ledger.quarantined) == [(0, 0)]
    assert ledger.failures == {(0, 0): 2}


def test_a_shard_with_progress_was_begun():
    ledger = Ledger(JobSpec(num_samples=6, work_item_size=2, lease_s=10.0, shuffle=False))
    apply(ledger, lease(ledger, "w", 2, now=0.0))
    apply(ledger, renew(ledger, 0, 0, 1, 1, 1, now=0.0))
    assert [record.begun for record in expired(ledger, 50.0)] == [True, True]


@pytest.mark.parametrize("value", [0, True, 2.5, "4"])
def test_counts_are_whole_numbers(value: object):
    with pytest.raises(ValueError, match=f"epochs is {value!r}: must be a whole number of at least 1"):
        JobSpec(num_samples=8, work_item_size=2, epochs=value)


def test_more_shards_than_an_order_can_have_are_refused():
    with pytest.raises(
        ValueError, match=r"1,000,000,000,000 work items an epoch are more than 10,000,000: raise work_item_size"
    ):
        JobSpec(num_samples=10**12, work_item_size=1)
