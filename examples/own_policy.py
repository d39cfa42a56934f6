"""Your own policy: gmeta coordinate --policy examples.own_policy:halve_the_slowest"""

from gmeta.elastic.actions import Action, AdjustBatch
from gmeta.elastic.monitor import Snapshot


def halve_the_slowest(snapshot: Snapshot) -> list[Action]:
    """Once the window shows the setting in force: half of the slowest rank's slots go to the fastest."""
    times = [view.short.compute_s if view.short else 0.0 for view in snapshot.workers]
    if snapshot.settled_steps < 5 or max(times) < 1.5 * min(times):
        return []
    slots, slow, fast = list(snapshot.setting.slots), times.index(max(times)), times.index(min(times))
    slots[fast] += slots[slow] // 2
    slots[slow] -= slots[slow] // 2
    return [AdjustBatch(tuple(slots))]
