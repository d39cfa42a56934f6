"""The order of a user's events over all domains, as `hold_out` orders the events of a pack."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def interleaved(user: Ints, domain: Ints, time: Ints | None) -> Ints:
    """Return the order, int64 [N], of events that come in the order of each domain: user by user, by time, or without
    times by their place in their domain.

    Event k of the n that a user has in a domain stands at (k + 0.5) / n. `domain` numbers domains in the order of their
    names, by which ties are broken; events of one domain at one time stay as they are.
    """
    place = np.arange(len(user))
    if time is not None:
        return np.lexsort((place, domain, time, user))
    order = np.lexsort((place, domain, user))
    first = np.ones(len(order), bool)
    first[1:] = (user[order][1:] != user[order][:-1]) | (domain[order][1:] != domain[order][:-1])
    start = np.flatnonzero(first)
    size = np.diff(np.append(start, len(order)))
    share = (np.arange(len(order)) - np.repeat(start, size) + 0.5) / np.repeat(size, size)
    return order[np.lexsort((np.arange(len(order)), domain[order], share, user[order]))]
