"""The agent against a ledger and a controller in the same process: grants, settings, and the account of windows."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import pytest

from gmeta.elastic import ledger as ledgers
from gmeta.elastic.actions import AdjustBatch, KillRestart
from gmeta.elastic.agent import Agent, LeaseBook, RestartRequested
from gmeta.elastic.controller import Controller, Decided
from gmeta.elastic.ledger import Committed, JobSpec, Leased, Ledger
from gmeta.elastic.monitor import StepTime
from gmeta.elastic.wire import to_wire

TASKS, WINDOW = 60, 24


class Here:
    """What a coordinator answers, without one. `policy` sees snapshots; `broken` raises in place of answers."""

    def __init__(self, policy: Any = lambda snapshot: [], ranks: int = 1) -> None:
        self.ledger = Ledger(JobSpec(TASKS, WINDOW, epochs=50, shuffle=False, mode="exactly_once", lease_s=1e6))
        self.controller = Controller.begin(policy, world_size=ranks, batch=8, ahead=3, report_s=0.01)
        self.lock = threading.Lock()
        self.broken: Exception | None = None
        self.pause_s = 0.0

    def call(self, name: str, **fields: Any) -> dict[str, Any]:
        time.sleep(self.pause_s)
        if self.broken is not None:
            raise self.broken
        with self.lock:
            answer: dict[str, Any] = getattr(self, name)(**fields)
        return answer

    def report(self, generation: int, rank: int, known: int, steps: list[Any], **_: Any) -> dict[str, Any]:
        self.controller.report(rank, 0.0, [StepTime(*step) for step in steps], {})
        granted = self.controller.grant()
        if granted is not None:
            self.controller.apply(granted)
        settings = [to_wire(setting) for setting in self.controller.newer(known)]
        _, found = self.controller.decide(0.0)
        if isinstance(found, Decided):
            self.controller.apply(found)
        return {"until": self.controller.until, "settings": settings}

    def exchange(
        self, worker: str, generation: int, commit: list[Any], progress: list[Any], count: int
    ) -> dict[str, Any]:
        for epoch, work_item, attempt, done in progress:
            self._apply(ledgers.renew(self.ledger, 0, epoch, work_item, attempt, done, 0.0))
        for epoch, work_item, attempt in commit:
            record = ledgers.commit(self.ledger, 0, epoch, work_item, attempt)
            assert isinstance(record, Committed)
            self._apply(record)
        found = ledgers.lease(self.ledger, worker, count, 0.0) if count else ledgers.WAIT
        assert not isinstance(found, ledgers.Refusal)
        if not isinstance(found, Leased):
            return {"reply": found}
        self._apply(found)
        return {"reply": "SHARD", "leases": [to_wire(lease) for lease in found.leases]}

    def saved(self, generation: int, commit: list[Any], progress: list[Any]) -> dict[str, Any]:
        self.exchange("trainer", generation, commit, progress, 0)
        return {"saved": self.ledger.save()}

    def _apply(self, record: Any) -> None:
        assert not isinstance(record, ledgers.Refusal), record
        if record is not None:
            ledgers.apply(self.ledger, record)


def step_time(step: int) -> StepTime:
    return StepTime(step, 0.001, 0.0, 0.0, 8.0)


def run_steps(agent: Agent, first: int, steps: int, put_back: random.Random | None = None, check: Any = None) -> None:
    """Steps of 8 tasks in windows of 3 steps; each epoch has 7.5 and, where tasks are put back, a tail of one more."""
    step = first
    for _ in range(steps):
        epoch, index = divmod(step, 9 if put_back else 8)
        agent.setting(step)
        tasks = min(8, TASKS - index * 8) if index < 8 else 0
        left = put_back.randint(0, 3) if put_back is not None and index < 8 else 0
        agent.finished(step_time(step), epoch, index // 3, tasks - min(left, tasks))
        if index == (8 if put_back else 7):
            agent.finish_epoch(epoch)
        step += 1
        if check is not None:
            check(step, epoch, index)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("pause_s", [0.0, 0.003])
def test_the_ledger_follows_the_steps(late: bool, pause_s: float) -> None:
    """However slow the coordinator, a checkpoint holds the ledger of its very step."""
    here = Here()
    here.pause_s = pause_s
    agent = Agent(here, generation=0, rank=0, report_s=0.001, lease_book=LeaseBook(WINDOW, TASKS))
    epoch_steps = 9 if late else 8

    def check(step: int, epoch: int, index: int) -> None:
        if step % 5 and index != epoch_steps - 1:
            return
        saved = agent.saved()
        finished = index == epoch_steps - 1
        assert saved["epoch"] == epoch + finished
        if finished:
            assert (saved["num_done"], sum(done for _, done in saved["again"])) == (0, 0)
        elif not late:
            done = saved["num_done"] * WINDOW + sum(done for _, done in saved["again"])
            assert done == min(TASKS, (index + 1) * 8)

    run_steps(agent, 0, 4 * epoch_steps, random.Random(1) if late else None, check)
    agent.close()


def test_a_new_generation_goes_on_from_the_saved_ledger() -> None:
    """Killed in the tail, before the new agent has leased anything: the epoch's end still commits every window."""
    here = Here()
    agent = Agent(here, generation=0, rank=0, report_s=0.001, lease_book=LeaseBook(WINDOW, TASKS))
    run_steps(agent, 0, 8, random.Random(2))  # the tail of epoch 0 is to come
    saved = agent.saved()
    agent.close()
    assert saved["epoch"] == 0
    ledgers.apply(here.ledger, ledgers.rollback(here.ledger, saved))
    here.ledger.generation = 0  # `Here` knows one
    here.controller = Controller.begin(lambda snapshot: [], world_size=1, batch=8, first_step=8)
    here.pause_s = 0.02
    agent = Agent(here, generation=0, rank=0, report_s=0.001, lease_book=LeaseBook(WINDOW, TASKS))
    agent.finished(step_time(8), 0, 2, 0)
    agent.finish_epoch(0)
    here.pause_s = 0.0
    assert agent.saved()["epoch"] == 1
    agent.close()


def test_all_ranks_see_the_same_settings() -> None:
    """A policy that changes its mind all the time; ranks ask at different moments, and never disagree."""
    here = Here(lambda s: [AdjustBatch((4 + s.step % 4, 4 - s.step % 4))], ranks=2)
    agents = [Agent(here, generation=0, rank=r, report_s=0.002 * (1 + r), lease_book=None) for r in range(2)]
    seen: list[dict[int, Any]] = [{}, {}]

    def rank(number: int) -> None:
        for step in range(150):
            seen[number][step] = agents[number].setting(step)
            agents[number].finished(step_time(step), 0, 0, 8)
            time.sleep(0.001 * (1 - number))

    threads = [threading.Thread(target=rank, args=(r,)) for r in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert seen[0] == seen[1]
    assert len({setting.number for setting in seen[0].values()}) > 3
    for agent in agents:
        agent.close()


def test_a_restart_is_raised_at_its_step() -> None:
    here = Here(lambda s: [KillRestart(0)] if s.step > 3 else [])
    agent = Agent(here, generation=0, rank=0, report_s=0.001)
    with pytest.raises(RestartRequested, match="the worker of rank 0 is replaced") as caught:
        run_steps(agent, 0, 500)
    assert caught.value.setting.restart == 0
    agent.close()


@pytest.mark.parametrize("wait", ["setting", "saved"])
def test_an_error_of_the_thread_reaches_the_trainer(wait: str) -> None:
    here = Here()
    here.broken = ValueError("the message is of generation 1, the ledger is in 2")
    agent = Agent(here, generation=0, rank=0, report_s=0.001, lease_book=LeaseBook(WINDOW, TASKS))
    with pytest.raises(ValueError, match="generation 1"):
        agent.setting(0) if wait == "setting" else [agent.saved() for _ in range(100)]
    agent.close()


def test_who_waits_when_the_agent_closes_is_told() -> None:
    here = Here()
    here.pause_s = 0.05
    agent = Agent(here, generation=0, rank=0, report_s=10.0)
    waiting = threading.Timer(0.3, agent.close)
    waiting.start()
    with pytest.raises(RuntimeError, match="closed"):
        agent.setting(10**6)
    waiting.join()
