"""What a step writes into metrics.jsonl."""

from __future__ import annotations

from typing import Any

from gmeta.training.late_tasks import dropped_tasks
from gmeta.training.membership import Membership
from gmeta.training.state import TrainState
from gmeta.training.statistics import InFlightStep
from gmeta.training.step import sum_names


def step_record(
    state: TrainState, started: InFlightStep, stats: dict[str, float], membership: Membership | None
) -> dict[str, Any]:
    """Return the record of a finished step; `docs/training.md` lists the fields."""
    seconds = started.watch.seconds
    total = sum(seconds.values())
    record: dict[str, Any] = {
        "step": started.step + 1,
        "epoch": started.batch.epoch,
        "loss": stats["loss"],
        "support_loss": stats["support_loss"],
        "lr": stats["lr"],
        "grad_norm": stats["grad_norm"],
        "tasks_per_s": stats["tasks"] / total,
        "samples_per_s": stats["samples"] / total,
        "padding": 1 - stats["samples"] / max(1.0, stats["cells"]),
        **{f"{phase}_share": value / total for phase, value in seconds.items()},
        "time_s": state.progress.seconds,
    }
    if state.mesh.is_main and state.mesh.world_size > 1:
        record["comm"] = traffic_record(state, started)
    if membership is not None:
        record |= _split_record(started, stats, membership)
    return record


def _split_record(started: InFlightStep, stats: dict[str, float], membership: Membership) -> dict[str, Any]:
    """Return how an elastic group split the batch, and the tasks (positions in the split) that were put back."""
    split = started.batch.batch_split
    if split is None:
        return {}
    return {
        "generation": membership.generation,
        "index": started.batch.index,
        "slots": list(split.tasks_per_rank),
        "agent_cpu_s": membership.agent.cpu_s,  # since the generation began
        "put_back": dropped_tasks(started.batch, stats).tolist(),
    }


def traffic_record(state: TrainState, started: InFlightStep) -> dict[str, Any]:
    """Return what this rank sent in a step, and what the formulas say it had to."""
    routed = started.routed
    expected = state.system.exchange.expected_traffic(
        routed,
        control_bytes=(8 * len(sum_names(started.batch)), 8),  # the sums, the squared norm of the row gradients
        marked=started.batch.drop_after_s is not None,
    )
    state.dense.add_expected(expected.dense)
    return {"measured": routed.traffic.record(), "predicted": expected.record()}
