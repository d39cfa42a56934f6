"""What the live page shows of a coordinator, as JSON. With 1,024 workers it is small enough to be sent every second."""

from __future__ import annotations

from bisect import bisect
from dataclasses import asdict
from typing import Any

from gmeta.elastic.activity import History, Point
from gmeta.elastic.coordinator import Coordinator
from gmeta.elastic.ledger import Ledger
from gmeta.elastic.wire import to_wire

CELLS = 480
"""The most cells of the bar of work items."""
MOST_LINES = 16
"""Workers whose history is sent in numbers; of more, the slowest half as many and the fastest."""
HEAT_LEVELS = "0123456789abcdefghijklmnopqrstuvwxyz"
"""Batch time relative to the median at that time: 'i' is the median, a step is 2 ** (1 / 6), '.' is unknown."""

_HEAT_BOUNDS = [2 ** ((level - 17.5) / 6) for level in range(len(HEAT_LEVELS) - 1)]


def state(coordinator: Coordinator) -> dict[str, Any]:
    """Return all that the page shows."""
    job, now = coordinator.job, coordinator.now()
    values: dict[str, Any] = {
        "now": now,
        "started": coordinator.started,
        "job": {"run": job.run, "pack": job.pack, "plan": to_wire(job.spec)} if job else None,
        "problems": [{"problem": text, "count": count} for text, count in coordinator.problems.items()],
        "actions": [asdict(action) for action in reversed(coordinator.actions)],
        "action_counts": dict(coordinator.counts),
    }
    if job is not None:
        ledger = coordinator.ledger
        values |= {
            "generation": ledger.generation,
            "finished": ledger.finished,
            "epoch": ledger.epoch,
            "shards": work_item_counts(ledger),
            "cells": cells(ledger),
            "samples_done": samples_done(ledger),
        }
    workers = table(coordinator, now)
    return values | {
        "group": worker_group(coordinator),
        "workers": workers,
        **history(coordinator.activity.history, workers),
    }


def work_item_counts(ledger: Ledger) -> dict[str, int]:
    """Return the number of work items of the current epoch in each state."""
    doing, lost = len(ledger.doing), len(ledger.lost)
    quarantined = sum(epoch == ledger.epoch for epoch, _ in ledger.quarantined)
    if ledger.finished:
        done, doing, lost = ledger.spec.num_work_items, 0, 0
        quarantined = 0
    else:
        done = ledger.num_done
    todo = ledger.spec.num_work_items - done - doing - lost - quarantined
    return {"todo": todo, "doing": doing, "done": done, "lost": lost, "quarantined": quarantined}


def samples_done(ledger: Ledger) -> int:
    """Return the samples done in all epochs; the last work item of an epoch counts as a full one."""
    spec = ledger.spec
    held = [lease.done for lease in ledger.doing.values()]
    now = ledger.num_done * spec.work_item_size + sum(held) + sum(ledger.again.values()) + sum(ledger.lost.values())
    return ledger.epoch * spec.num_samples + min(now, spec.num_samples)


def cells(ledger: Ledger, most: int = CELLS) -> str:
    """Return the epoch's work items in the order in which they are given out, cut into at most `most` cells of a
    character each.

    0 to 9 is the part of a cell that is done; a letter says what is in it: d being done, l lost, q quarantined.
    """
    total = ledger.spec.num_work_items
    count = min(most, total)
    if ledger.finished:
        return "9" * count
    done = [0] * count
    for cell in range(count):  # whatever was leased counts as done here, and what is not is taken off below
        start, stop = -(-cell * total // count), -(-(cell + 1) * total // count)
        done[cell] = max(0, min(stop, ledger.cursor) - start)
    marks: dict[int, str] = {}
    position = {work_item: i for i, work_item in enumerate(ledger.order)} if ledger.spec.shuffle else None
    bad = [work_item for epoch, work_item in ledger.quarantined if epoch == ledger.epoch]
    for mark, found in (("", ledger.again), ("d", ledger.doing), ("l", ledger.lost), ("q", bad)):
        for work_item in found:
            at = work_item if position is None else position[work_item]
            cell = at * count // total
            done[cell] -= at < ledger.cursor
            if mark:
                marks[cell] = mark
    sizes = [-(-(cell + 1) * total // count) - -(-cell * total // count) for cell in range(count)]
    return "".join(marks.get(cell) or str(9 * max(0, done[cell]) // sizes[cell]) for cell in range(count))


def worker_group(coordinator: Coordinator) -> dict[str, Any] | None:
    """Return the state of a trainer's ranks; None where workers pull work items."""
    began, controller = coordinator.began, coordinator.controller
    if began is None or controller is None:
        return None
    seen = coordinator.snapshot
    return {
        "world_size": began.world_size,
        "batch": began.batch,
        "step": seen.step if seen is not None else began.first_step,
        "until": controller.until,
        "setting": to_wire(controller.settings[-1]),
        "step_s": controller.monitor.step_s(),
        "restarts": len(controller.restarts),
    }


def table(coordinator: Coordinator, now: float) -> list[dict[str, Any]]:
    """Return one row a worker: what it did last."""
    holding, seen, controller = coordinator.holding(), coordinator.snapshot, coordinator.controller
    latest = coordinator.activity.history
    rows = []
    for rank, name in enumerate(coordinator.shown()):
        work = coordinator.activity.workers.get(name)
        row: dict[str, Any] = {
            "name": name,
            "throughput": last(latest.throughput.get(name)),
            "batch_s": last(latest.batch_s.get(name)),
            "silent_s": round(now - work.seen, 2) if work is not None else None,
        }
        if controller is not None:
            setting = controller.settings[-1]
            row |= {"slots": setting.tasks_per_rank[rank], "micro_batches": setting.micro_batches[rank]}
            if seen is not None and rank < len(seen.workers):
                view = seen.workers[rank]
                row |= {"role": view.role, "device": view.device, "node": view.node, "facts": dict(view.facts)}
                if view.short is not None:
                    row |= {key: getattr(view.short, key) for key in ("compute_s", "input_s", "wait_s")}
        else:
            row["holding"] = holding.get(name, 0)
        rows.append(row)
    return rows


def last(series: list[Point] | None) -> Point:
    """Return the newest known value of the last three, because a work item may take longer than a point."""
    return next((value for value in reversed((series or [])[-3:]) if value is not None), None)


def history(kept: History, workers: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the lines of a few workers and of all together, and a heat strip of every worker.

    It is made once a point: with 1,024 workers it takes about 50 ms, in which nobody else is answered.
    """
    if kept.drawn is None:
        kept.drawn = _history(kept, workers)
    return kept.drawn


def _history(kept: History, workers: list[dict[str, Any]]) -> dict[str, Any]:
    names = [row["name"] for row in workers if row["name"] in kept.batch_s]
    if len(names) > MOST_LINES:
        by_time = sorted((row["batch_s"] or 0.0, row["name"]) for row in workers if row["name"] in kept.batch_s)
        drawn = {name for _, name in (*by_time[: MOST_LINES // 2], *by_time[-MOST_LINES // 2 :])}
    else:
        drawn = set(names)
    points = range(len(kept.times))
    total = [_sum([kept.throughput[name][i] for name in names]) for i in points]
    medians = [_median([kept.batch_s[name][i] for name in names]) for i in points]
    bounds = [[median * bound for bound in _HEAT_BOUNDS] if median else [] for median in medians]
    return {
        "times": [round(time, 2) for time in kept.times],
        "spacing_s": kept.spacing_s,
        "total": [_short(value) for value in total],
        "median_s": [_short(value) for value in medians],
        "lines": {
            name: {
                "throughput": [_short(value) for value in kept.throughput[name]],
                "batch_s": [_short(value) for value in kept.batch_s[name]],
            }
            for name in names
            if name in drawn
        },
        "heat": {name: _heat(kept.batch_s[name], bounds) for name in names},
    }


def _median(values: list[Point]) -> Point:
    """Return the median, or None where fewer than half are known: at the end of the data it would be the slowest."""
    known = sorted(value for value in values if value is not None)
    return known[len(known) // 2] if 2 * len(known) >= len(values) and known else None


def _sum(values: list[Point]) -> Point:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _short(value: Point) -> Point:
    return float(f"{value:.4g}") if value is not None else None


def _heat(values: list[Point], bounds: list[list[float]]) -> str:
    return "".join(
        [HEAT_LEVELS[bisect(row, value)] if row and value else "." for value, row in zip(values, bounds, strict=True)]
    )
