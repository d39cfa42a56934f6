"""The truth of a stream of days: one file a day, which tells of every row that happened on it what the click came from.

A row is known by its user and its time, which no two rows share. So the truth is found for rows whose item a pack knows
by no id, and for rows that came late.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset as pads

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

START_US = 1_700_006_400_000_000
"""Midnight UTC at which day 0 begins, in microseconds since 1970: 15 November 2023."""
DAY_US = 86_400_000_000


def day_name(day: int) -> str:
    """Return what the day's folder of rows and its file of truth are called; they sort by day up to day 99."""
    return f"day={day:02d}"


def truth_file(truth: Path, day: int) -> Path:
    """Return the path of what is known of the rows that happened on `day`, below the stream's folder of truth."""
    return truth / "rows" / f"{day_name(day)}.parquet"


def row_truth(truth: Path, user: Ints, time: Ints, dim: int) -> tuple[Floats, Floats, Floats]:
    """Return for rows of these users and times [R] the logit without taste [R], the item's latent vector of that day
    [R, K] and the user's taste [R, K].

    Raises ValueError that names a row which is not in the stream.
    """
    base, latent, taste = np.empty(len(user)), np.empty((len(user), dim)), np.empty((len(user), dim))
    day = (time - START_US) // DAY_US
    for number in np.unique(day):
        at = np.flatnonzero(day == number)
        file = truth_file(truth, int(number))
        if not file.exists():
            raise _unknown(user[at[0]], time[at[0]])
        wanted, code = np.unique(user[at], return_inverse=True)
        known = pads.dataset(file).to_table(filter=pads.field("user_id").isin(pa.array(wanted)))
        # A user's place among those wanted and the time within the day make one number of a row.
        key = code * DAY_US + time[at] % DAY_US
        theirs = np.searchsorted(wanted, known["user_id"].to_numpy())
        known_key = theirs * DAY_US + known["timestamp"].to_numpy().astype(np.int64) % DAY_US
        order = np.argsort(known_key)
        place = np.searchsorted(known_key[order], key)
        found = np.append(known_key[order], -1)[place] == key
        if not found.all():
            missing = at[~found][0]
            raise _unknown(user[missing], time[missing])
        rows = order[place]
        base[at] = known["base"].to_numpy()[rows]
        for k in range(dim):
            latent[at, k] = known[f"latent_{k}"].to_numpy()[rows]
            taste[at, k] = known[f"taste_{k}"].to_numpy()[rows]
    return base, latent, taste


def _unknown(user: int, time: int) -> ValueError:
    return ValueError(f"user_id {user} has no row at time {time} in the truth: the rows are of another log")
