"""Your own policy: gmeta coordinate --policy examples.own_policy:halve_the_slowest"""

from gmeta.elastic.actions import Action, AdjustBatch
from gmeta.elastic.monitor import Snapshot


def halve_the_slowest(snapshot: Snapshot) -> list[Action]:
    """Give half of the slowest rank's tasks to the fastest, once the last steps were made under the present setting."""
    times = [view.short.compute_s if view.short else 0.0 for view in snapshot.workers]
    if snapshot.settled_steps < 5 or max(times) < 1.5 * min(times):
        return []
    tasks, slow, fast = list(snapshot.setting.tasks_per_rank), times.index(max(times)), times.index(min(times))
    tasks[fast] += tasks[slow] // 2
    tasks[slow] -= tasks[slow] // 2
    return [AdjustBatch(tuple(tasks))]
