"""What a policy may ask for, and the setting that all ranks train under: who computes how much of a batch, and how.

The actions are AntDT's (arXiv 2404.09679), as far as they are known: ADJUST_BATCH, ADJUST_ACCUMULATION, DROP_LATE (what
backup workers are for, without lost data) and KILL_RESTART; no action at all is NONE. None of them changes what batch k
is, only who computes which part of it, so none changes what is learned.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gmeta.elastic.balance import proportional
from gmeta.elastic.wire import from_wire, to_wire


@dataclass(frozen=True)
class Setting:
    """How ranks share batches from step `step` on. All ranks apply it at that step, or none does."""

    number: int  # 0 at the start of a generation, one more with each decision
    step: int  # the first step under it
    tasks_per_rank: tuple[int, ...]  # the sum is the global batch
    micro_batches: tuple[int, ...]  # of each rank: it computes its tasks in so many parts
    drop_after_s: float | None = None  # a rank begins no further part after so many seconds of a step; None never drops
    restart: int | None = None  # the rank to replace: before this step all ranks save, end and are started again

    @property
    def slots(self) -> tuple[int, ...]:
        """Return `tasks_per_rank` under its former name, for policies that were written before."""
        warnings.warn("Setting.slots is called tasks_per_rank now", FutureWarning, stacklevel=2)
        return self.tasks_per_rank

    @staticmethod
    def equal(batch: int, world_size: int, step: int = 0) -> Setting:
        """Return the setting to begin with: every rank has equally many tasks, in one part."""
        return Setting(0, step, tuple(proportional(batch, [1.0] * world_size)), (1,) * world_size)


@dataclass(frozen=True)
class AdjustBatch:
    """Set the tasks of each rank. Their sum stays the global batch; a rank may get none."""

    tasks_per_rank: tuple[int, ...]


@dataclass(frozen=True)
class AdjustAccumulation:
    """Set the micro-batches of each rank, which computes its tasks in so many parts and adds up their gradients."""

    micro_batches: tuple[int, ...]


@dataclass(frozen=True)
class DropLate:
    """Let ranks begin no further micro-batch `after_s` seconds into a step; what is left goes to the epoch's tail.

    None turns this off. Without micro-batches (AdjustAccumulation) there is no point at which to stop.
    """

    after_s: float | None


@dataclass(frozen=True)
class KillRestart:
    """Save, end all workers, replace that of `rank`, and go on from the checkpoint."""

    rank: int
    reason: str = ""


Action = AdjustBatch | AdjustAccumulation | DropLate | KillRestart

NAMES: dict[type, str] = {
    AdjustBatch: "ADJUST_BATCH",
    AdjustAccumulation: "ADJUST_ACCUMULATION",
    DropLate: "DROP_LATE",
    KillRestart: "KILL_RESTART",
}


def apply_actions(setting: Setting, actions: Sequence[Action], step: int) -> Setting:
    """Return the setting from `step` on, after `actions`. ValueError says which action is impossible, and why."""
    world_size, batch = len(setting.tasks_per_rank), sum(setting.tasks_per_rank)
    new = replace(setting, number=setting.number + 1, step=step, restart=None)
    for action in actions:
        if isinstance(action, AdjustBatch):
            tasks = _whole_numbers(action, action.tasks_per_rank, world_size, least=0)
            if sum(tasks) != batch:
                raise ValueError(f"ADJUST_BATCH {list(tasks)} sums to {sum(tasks)}: the global batch has {batch} tasks")
            new = replace(new, tasks_per_rank=tasks)
        elif isinstance(action, AdjustAccumulation):
            parts = _whole_numbers(action, action.micro_batches, world_size, least=1)
            if max(parts) > batch:
                raise ValueError(f"ADJUST_ACCUMULATION {list(parts)}: a batch has {batch} tasks, and no more parts")
            new = replace(new, micro_batches=parts)
        elif isinstance(action, DropLate):
            after = action.after_s
            if after is not None and not (isinstance(after, int | float) and 0 < after < float("inf")):
                raise ValueError(f"DROP_LATE after {after!r} s: must be a number above 0, or None for never")
            new = replace(new, drop_after_s=after)
        elif isinstance(action, KillRestart):
            if action.rank not in range(world_size):
                raise ValueError(f"KILL_RESTART of rank {action.rank!r}: ranks are 0 to {world_size - 1}")
            new = replace(new, restart=int(action.rank))
        else:
            raise ValueError(f"{action!r} is no action: a policy returns a list of {', '.join(NAMES.values())}")
    return new


def _whole_numbers(action: Action, values: Any, world_size: int, least: int) -> tuple[int, ...]:
    try:
        numbers = tuple(int(value) for value in values)
        are_whole = all(number == value for number, value in zip(numbers, values, strict=True))
    except (TypeError, ValueError):
        are_whole, numbers = False, ()
    if not are_whole or len(numbers) != world_size or any(number < least for number in numbers):
        raise ValueError(
            f"{NAMES[type(action)]} {values!r}: must be {world_size} whole numbers, one a rank, of at least {least}"
        )
    return numbers


def to_json(action: Action) -> dict[str, Any]:
    """Return {"action": its name, and its fields}."""
    return {"action": NAMES[type(action)], **to_wire(action)}


def action_from_json(values: Mapping[str, Any]) -> Action:
    """Return the action that `to_json` wrote."""
    kinds = {name: kind for kind, name in NAMES.items()}
    fields = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items() if key != "action"}
    action: Action = kinds[values["action"]](**from_wire(fields))
    return action


def setting_from_json(values: Mapping[str, Any]) -> Setting:
    """Return a `Setting` from its JSON object."""
    fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
    return Setting(**from_wire(fields))
