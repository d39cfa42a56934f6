"""Policies against stragglers: pure functions from what is known (a snapshot) to what shall be done (actions).

`nd` and `dd` are AntDT's two solutions (arXiv 2404.09679, for non-dedicated and dedicated clusters). The paper's
formulas and thresholds are not public; those here are ours, each with its reason. `static`, `lb_bsp` and `backup` are
there to compare with. None keeps a memory: a decision follows from its snapshot alone, so a recorded trace can be
replayed.
"""

from __future__ import annotations

import importlib
import math
import os
import statistics
import sys
from collections.abc import Sequence

from gmeta.elastic.actions import Action, AdjustAccumulation, AdjustBatch, DropLate, KillRestart
from gmeta.elastic.balance import MAX_ACCUMULATION, DeviceClass, Worker, accumulated, balanced, proportional
from gmeta.elastic.controller import Policy
from gmeta.elastic.monitor import Snapshot, StepStats, WorkerView

SETTLED_STEPS = 3
"""Steps of a generation to see before the first decision, because the first ones also fill caches and allocate."""
CHANGED = 1.25
"""A rank whose last few steps are so many times slower or faster than its last hundred has changed; otherwise the
hundred count. The median of 3 steps with noise of 5 % is off by 3 % (one standard deviation): noise alone never gets
there."""
CROWD = 4
"""With more ranks than this changed at once, the next one changes before the last is answered (about eight steps). Each
then counts as the median of its devices. For 64 simulated workers in bursts of 50 steps, equal batches reach 0.39 of
the ideal, following every rank 0.34, and this 0.36."""
GAIN = 0.05
"""The fraction of a step's time that new batches must win, once the last few steps were made under the present setting.
The worst of 4 medians of 3 steps is about 3 % off under noise of 5 %: less than this would be chasing noise."""
GAIN_UNSETTLED = 0.12
"""The same before that. Then the change must be one that noise and fixed costs cannot feign: a peer of 4 that returns
from 3 times slower to normal gives 17 %."""
GAIN_LONG = 0.03
"""The same once even the last hundred steps were all made under the present setting: their medians are off by 0.6 %."""
SLOW = 1.5
"""How many times slower than its peers' median a rank must be before a restart is considered (lambda)."""
RESTART_S = 30.0
"""What a restart is taken to cost: saving, starting processes, loading. Ours take 5 to 20 s on one machine; a cluster
has to find another one. A rank is restarted once it has cost the others as much. Whatever comes then, that is at most
twice what the best choice in hindsight would have cost (the ski-rental argument), and nobody knows what will come."""
CLASS_GAIN = 0.10
"""dd decides again only for a gain of so much. Classes of devices do not change their speeds, and what changes a single
rank is not its business."""
WHOLE_EXCESS = 0.05
"""dd takes equal micro-batches within a class unless unequal ones end earlier by more than this."""
STRIDE = 0.5
"""The fraction of the way to its goal that lb_bsp goes each time."""
LATE = 1.5
"""With backup a rank begins no micro-batch after so many times the median of all ranks' computing."""
PARTS = 4
"""The micro-batches of a step under backup. Each has its own fixed cost; with 4, a rank stops within a quarter of its
work."""
DEADLINE_CHANGED = 1.2
"""backup sets a new deadline only when it differs by this factor."""


def static(snapshot: Snapshot) -> list[Action]:
    """Do nothing: equal batches for ever, as DistributedDataParallel has them."""
    return []


def nd(snapshot: Snapshot) -> list[Action]:
    """Decide by AntDT-ND: divide the batch by measured speed, and restart a rank that stays far behind its peers.

    The tasks are the exact minimum of max_i b_i / v_i, with v_i tasks a second of compute, within `max_slots`. A fixed
    cost a_i of a step makes the measured b_i / T_i depend on b_i; repeating heals that. Where all T_i = a_i + b_i / v_i
    are equal, dividing by measured speed changes nothing, and each repetition leaves the fraction a_i / T_i of the
    error. So no fixed cost has to be told apart, which would be impossible from one number of tasks a rank.
    """
    views, old = snapshot.workers, snapshot.setting.tasks_per_rank
    if any(view.short is None for view in views):
        return []
    restart = _hopeless(snapshot)
    if restart:
        return [restart]
    costs = _costs(views)
    tasks = _balanced_tasks(snapshot, costs)
    if tasks is None:
        return []
    untried = any(cost is None and not n for cost, n in zip(costs, old, strict=True))
    settled = _settled(snapshot)
    exact = all(view.long is not None and snapshot.settled_steps >= view.long.steps for view in views)
    needed = GAIN_LONG if exact else GAIN if settled else GAIN_UNSETTLED
    worth = _gain(old, tasks, costs) > needed
    return [AdjustBatch(tuple(tasks))] if worth or (settled and untried) else []


def dd(snapshot: Snapshot) -> list[Action]:
    """Decide by AntDT-DD: set tasks and micro-batches by class of device, under memory caps. A single rank's troubles
    are left alone.

    It decides once there are enough steps, and again when the speed of a class has changed. All ranks of a class do the
    same. Only where the batch cannot be divided so, or where that would cost more than a few percent, do ranks of a
    class differ (by one task, at equal speeds).
    """
    if not _settled(snapshot):
        return []
    classes: dict[str, list[WorkerView]] = {}
    for view in snapshot.workers:
        classes.setdefault(view.device, []).append(view)
    cost: dict[str, float] = {}
    for device, members in classes.items():
        known = [c for view in members if (c := _cost(view)) is not None]
        if not known:
            return []
        cost[device] = statistics.median(known)
    costs = [cost[view.device] for view in snapshot.workers]
    found = _by_class(snapshot, classes, cost)
    if found is None:
        return []
    tasks, parts = found
    crowded = any(
        view.max_slots and b > c * view.max_slots
        for view, b, c in zip(
            snapshot.workers, snapshot.setting.tasks_per_rank, snapshot.setting.micro_batches, strict=True
        )
    )
    if not crowded and _gain(snapshot.setting.tasks_per_rank, tasks, costs) <= CLASS_GAIN:
        return []
    return [AdjustBatch(tasks), AdjustAccumulation(parts)]


def lb_bsp(snapshot: Snapshot) -> list[Action]:
    """Decide by LB-BSP (arXiv 1806.02508): set batch sizes by predicted speed, moved step by step.

    Of the paper it has batches in proportion to predicted speeds, changed gradually, with the simplest of predictors
    (the last value, which is here the median of the last few steps). It leaves out the paper's recurrent predictor,
    which also reads CPU and memory. It has no threshold and no restart, and follows whatever the last steps show.
    """
    costs = [_seconds_a_task(view.short) for view in snapshot.workers]
    if not _settled(snapshot) or any(cost is None for cost in costs):
        return []
    now, goal = (
        snapshot.setting.tasks_per_rank,
        proportional(snapshot.batch, [1 / cost for cost in costs if cost is not None]),
    )
    moved = proportional(snapshot.batch, [old + STRIDE * (new - old) for old, new in zip(now, goal, strict=True)])
    # A rank without tasks would never be measured again.
    tasks = tuple(moved) if min(moved) > 0 or snapshot.batch < len(moved) else _at_least_one(snapshot.batch, moved)
    return [] if tasks == now else [AdjustBatch(tasks)]


def backup(snapshot: Snapshot) -> list[Action]:
    """Decide by backup workers (arXiv 1604.00981): a step does not wait for the slowest. What that has not begun goes
    to the tail.

    The paper throws away the gradients of the last workers. Here a rank stops between micro-batches instead, so that
    what it has computed counts, and what it has not is done at the end of the epoch.
    """
    if not _settled(snapshot):
        return []
    times = [v.short.compute_s for v in snapshot.workers if v.short is not None and 0 < v.short.compute_s < math.inf]
    if not times:
        return []
    after, old = LATE * statistics.median(times), snapshot.setting.drop_after_s
    parts = tuple(min(PARTS, max(1, tasks)) for tasks in snapshot.setting.tasks_per_rank)
    same = old is not None and 1 / DEADLINE_CHANGED < after / old < DEADLINE_CHANGED
    if same and parts == snapshot.setting.micro_batches:
        return []
    return [AdjustAccumulation(parts), DropLate(after)]


POLICIES: dict[str, Policy] = {"static": static, "nd": nd, "dd": dd, "lb_bsp": lb_bsp, "backup": backup}


def load_policy(text: str) -> Policy:
    """Return a policy by its name, or anyone's function as `module:function` (the current folder is searched too).

    ValueError names the known ones, or says what cannot be imported.
    """
    if text in POLICIES:
        return POLICIES[text]
    module, colon, name = text.partition(":")
    if not (colon and module and name):
        raise ValueError(f"policy is {text!r}: must be one of {', '.join(POLICIES)}, or your own as module:function")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # importing a user's file may raise anything
        raise ValueError(f"policy {text!r} cannot be imported ({type(error).__name__}: {error})") from error
    if not callable(found):
        raise ValueError(f"policy {text!r} is a {type(found).__name__}: must be a function of a snapshot")
    policy: Policy = found
    return policy


def _settled(snapshot: Snapshot) -> bool:
    """Whether the last few steps of all ranks were all made under the setting in force."""
    steps = max((view.short.steps for view in snapshot.workers if view.short is not None), default=0)
    return all(v.short for v in snapshot.workers) and snapshot.settled_steps >= max(SETTLED_STEPS, steps)


def _seconds_a_task(stats: StepStats | None) -> float | None:
    """Compute seconds a task, or None where unknown. Limits far from any real speed keep sums of speeds finite."""
    return stats.slot_s if stats is not None and 1e-12 < stats.slot_s < 1e12 else None


def _costs(views: Sequence[WorkerView]) -> list[float | None]:
    """Return the seconds a task of each rank, by which nd divides."""
    costs = [_cost(view) for view in views]
    usual = [_seconds_a_task(view.long) for view in views]
    changed = [i for i, long in enumerate(usual) if long is not None and costs[i] != long]
    if len(changed) <= CROWD:
        return costs
    steady: dict[str, list[float]] = {}
    for i, cost in enumerate(costs):
        if cost is not None and cost == usual[i]:
            steady.setdefault(views[i].device, []).append(cost)
    medians = {device: statistics.median(known) for device, known in steady.items()}
    for i in changed:
        costs[i] = medians.get(views[i].device, usual[i])
    return costs


def _cost(view: WorkerView) -> float | None:
    """Return the seconds a task over the last hundred steps, which is exact, unless the last few show that it is past.

    A rank without recent tasks keeps the speed of its last hundred steps, until those hold no task either.
    """
    short, long = _seconds_a_task(view.short), _seconds_a_task(view.long)
    if short is None or long is None:
        return short or long
    return long if 1 / CHANGED < short / long < CHANGED else short


def _balanced_tasks(snapshot: Snapshot, costs: Sequence[float | None]) -> list[int] | None:
    """Return the tasks of each rank that end first. A rank of unknown speed keeps its tasks, and is given one where it
    has none.

    That is the case once its last task was a hundred steps ago. So even a hopeless rank is tried about once in a
    hundred steps, and its task is taken away again as soon as it is measured. None where nothing is known, or where
    memory caps leave no choice.
    """
    setting = snapshot.setting
    kept = [max(1, old) if cost is None else 0 for old, cost in zip(setting.tasks_per_rank, costs, strict=True)]
    free = snapshot.batch - sum(kept)
    known = [i for i, cost in enumerate(costs) if cost is not None]
    if not known or free < 0:
        return None
    workers = [
        Worker(1 / (costs[i] or 1.0), most=None if cap is None else max(0, cap) * setting.micro_batches[i])
        for i in known
        for cap in [snapshot.workers[i].max_slots]
    ]
    if sum(free if worker.most is None else worker.most for worker in workers) < free:
        return None
    for i, tasks in zip(known, balanced(free, workers), strict=True):
        kept[i] = tasks
    return kept


def _gain(old: Sequence[int], new: Sequence[int], costs: Sequence[float | None]) -> float:
    """Return the fraction of a step's time that `new` tasks win over `old`, by ranks of known speed."""
    before = max((b * cost for b, cost in zip(old, costs, strict=True) if cost is not None), default=0.0)
    after = max((b * cost for b, cost in zip(new, costs, strict=True) if cost is not None), default=0.0)
    return 1 - after / before if before > 0 else 0.0


def _hopeless(snapshot: Snapshot) -> KillRestart | None:
    """Return the rank to restart: slow for a hundred steps, compared with ranks of its role and device, if a restart
    pays.

    The median of the hundred tells of half of them; that nothing had to be changed for as many steps tells that the
    slowness did not come and go. (A rank so slow that it got no tasks at all is judged after half as many, because
    later none of its steps would be left.) A restart pays once steps, were the rank like its peers, would have been so
    much shorter that RESTART_S has been lost. A class of slow devices has no fast peers: it is balanced, not restarted.
    """
    views, steps = snapshot.workers, min((v.long.steps if v.long else 0 for v in snapshot.workers), default=0)
    if snapshot.restarts_left < 1 or not steps or snapshot.settled_steps < steps / 2:
        return None
    groups: dict[tuple[str, str], list[tuple[float, int]]] = {}
    for i, view in enumerate(views):
        cost = _seconds_a_task(view.long)
        if cost is not None:
            groups.setdefault((view.role, view.device), []).append((cost, i))
    speed = sum(1 / cost for members in groups.values() for cost, _ in members)
    step_s = max((view.long.compute_s for view in views if view.long is not None), default=0.0)
    best: tuple[float, KillRestart] | None = None
    for members in groups.values():
        (cost, slowest), peers = max(members), sorted(members)[:-1]
        lately = _seconds_a_task(views[slowest].short) if snapshot.setting.tasks_per_rank[slowest] else cost
        long_enough = snapshot.settled_steps >= steps or not snapshot.setting.tasks_per_rank[slowest]
        if not peers or lately is None or not long_enough:
            continue
        usual = statistics.median(peer for peer, _ in peers)
        lost = (1 - speed / (speed - 1 / cost + 1 / usual)) * step_s * snapshot.settled_steps
        if min(cost, lately) > SLOW * usual and lost > RESTART_S and (best is None or lost > best[0]):
            reason = f"{cost / usual:.1f} times slower than its peers for {snapshot.settled_steps} steps"
            best = lost, KillRestart(views[slowest].rank, reason)
    return best[1] if best else None


def _by_class(
    snapshot: Snapshot, classes: dict[str, list[WorkerView]], cost: dict[str, float]
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Return (tasks, micro-batches) of every rank; None where the memory of all devices does not hold the batch."""
    caps = {device: min((m.max_slots for m in ms if m.max_slots), default=None) for device, ms in classes.items()}
    devices = [view.device for view in snapshot.workers]
    even: tuple[list[int], list[int]] | None = None
    try:
        kinds = [DeviceClass(len(ms), Worker(1 / cost[d], most=caps[d])) for d, ms in classes.items()]
        chosen = dict(zip(classes, accumulated(snapshot.batch, kinds), strict=True))
        even = (
            [chosen[d].micro_batch * chosen[d].accumulation for d in devices],
            [chosen[d].accumulation for d in devices],
        )
    except ValueError:
        pass  # no equal micro-batches give the batch
    try:
        workers = [
            Worker(1 / cost[d], most=None if (cap := caps[d]) is None else MAX_ACCUMULATION * cap) for d in devices
        ]
        tasks = balanced(snapshot.batch, workers)
    except ValueError:
        return None if even is None else (tuple(even[0]), tuple(even[1]))
    if even and _gain(even[0], tasks, [cost[d] for d in devices]) <= WHOLE_EXCESS:
        return tuple(even[0]), tuple(even[1])
    parts = [1 if (cap := caps[d]) is None else max(1, -(-b // cap)) for b, d in zip(tasks, devices, strict=True)]
    return tuple(tasks), tuple(parts)


def _at_least_one(batch: int, tasks: Sequence[int]) -> tuple[int, ...]:
    """Return `tasks` with one more for ranks that have none, taken from those that have most."""
    found = [max(1, n) for n in tasks]
    for _ in range(sum(found) - batch):
        found[found.index(max(found))] -= 1
    return tuple(found)
