"""How long before an event its user's previous one was: a feature of events, in powers of two of seconds.

    gap = floor(log2(1 + seconds))

The first event of a history has none. Seconds are whole ones, by the unit of the time column; times that are no dates
of our days are a counter, whose steps are taken for seconds. `prepare` computes gaps in SQL over the rows of each task,
`Gaps` those of events that a trained model is asked about.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gmeta.data.catalogue import read_gap_unit
from gmeta.data.events.columns import GAP
from gmeta.data.identity import vocabulary_file, vocabulary_values
from gmeta.data.prepare.times import per_second, time_unit
from gmeta.data.schema import OOV, PackSchema
from gmeta.data.sources import Connection, scalar

COUNTER = "counter"
"""The unit of times that are no dates."""
_STARTS = (np.uint64(1) << np.arange(64, dtype=np.uint64)) - np.uint64(1)
"""From how many seconds on a gap is 0, 1, 2, …"""

Ints = NDArray[np.int64]


def unit_of_events(con: Connection) -> str:
    """Return the unit of the times of table `placed`."""
    return time_unit(scalar(con, "SELECT max(time) FROM placed")) or COUNTER


def gap_sql(time: str, before: str, unit: str) -> str:
    """Return SQL of the gap of an event at `time`, NULL where nothing is `before` it."""
    seconds = f"({time}::HUGEINT - {before}) // {per_second(unit)}"
    return f"length(bin(1 + {seconds})) - 1"


def gap_buckets(user: Ints, time: NDArray[Any], unit: str) -> Ints:
    """Return the gap of each event [N], -1 of a user's first; a user's events lie behind each other, in order."""
    found = np.full(len(user), -1, np.int64)
    later = np.flatnonzero(user[1:] == user[:-1]) + 1
    passed, ticks = time[later] - time[later - 1], per_second(unit)
    # a difference beyond int64 is right in uint64, since it is not negative
    seconds = np.floor(passed / ticks) if passed.dtype.kind == "f" else passed.view(np.uint64) // np.uint64(ticks)
    found[later] = np.searchsorted(_STARTS, seconds, side="right") - 1
    return found


@dataclass(frozen=True)
class Gaps:
    """The gaps that a trained run reads."""

    unit: str  # of the times of its events
    ids: Ints  # [65], of each gap; the last is that of none

    @classmethod
    def of_run(cls, vocab_folder: Path, schema: PackSchema) -> Gaps | None:
        """Return those of a run; None where its events have none. ValueError for files that are damaged."""
        if all(feature.name != GAP for feature in schema.features):
            return None
        cure = "copy it again from the pack, or prepare the pack again"
        file = vocabulary_file(vocab_folder, schema.feature(GAP).table)
        ids = np.full(len(_STARTS) + 1, OOV)
        ids[np.array(vocabulary_values(file, cure).to_pylist(), np.int64)] = np.arange(1, schema.feature(GAP).num_ids)
        return cls(read_gap_unit(vocab_folder) or COUNTER, ids)

    def of_events(self, user: Ints, time: NDArray[Any]) -> Ints:
        """Return the id of each event's gap, in the order of `gap_buckets`. ValueError for another unit of time: each
        user's own last time tells it, so that nobody's answer depends on who is asked about beside.
        """
        lasts = time[np.flatnonzero(np.append(user[1:] != user[:-1], True))] if len(time) else time
        for last in np.unique(lasts).tolist() if self.unit != COUNTER else ():
            if (unit := time_unit(int(last))) not in (None, self.unit):
                raise ValueError(
                    f"the last time of a user's events is {int(last)}, in {unit}, and the run reads gaps between times "
                    f"in {self.unit}, which its own events had: write times in {self.unit}"
                )
        return self.ids[gap_buckets(user, time, self.unit)]
