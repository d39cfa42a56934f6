"""Workers that start again and again on one store: torchrun's outlives them, with all that they left in it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from gmeta.parallel.mesh import agree_on_start


@pytest.fixture
def stores() -> list[TCPStore]:
    """One connection a rank, of which the first is the server."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return [server, *(TCPStore("127.0.0.1", server.port, is_master=False) for _ in range(3))]


def start(stores: list[TCPStore], ranks: list[int], first: int | None = None) -> set[str]:
    """What the ranks agree on; `first` comes while the others are away, so that it meets what is left of them."""
    limit = timedelta(seconds=20)

    def agree(rank: int) -> str:
        if first is not None and rank != first:
            begun.wait(0.2)
        return agree_on_start(stores[rank], rank, len(ranks), limit)

    begun = threading.Event()
    with ThreadPoolExecutor(len(ranks)) as pool:
        return set(pool.map(agree, ranks))


def test_each_start_has_a_name_of_its_own(stores: list[TCPStore]) -> None:
    """Whoever comes first, and however many there are: nobody takes the name of an earlier start for this one's."""
    names = set()
    for ranks, first in (([0, 1], None), ([0, 1], 1), ([0, 1, 2, 3], 3), ([0, 1, 2], 0), ([0, 1, 2, 3], 2)):
        (name,) = start(stores, ranks, first)
        assert name not in names
        names.add(name)


def test_a_start_that_failed_half_way_does_no_harm(stores: list[TCPStore]) -> None:
    """Its rank 0 was killed before it heard the others; or heard one of them, which was killed then."""
    stores[0].set("gmeta-start", "dead")
    stores[0].set("dead/1", "who was killed too")
    assert len(start(stores, [0, 1, 2], first=1)) == 1
    stores[0].set("gmeta-start", "dead again")
    stores[0].set("dead again/heard", "one,another")
    assert len(start(stores, [0, 1, 2], first=2)) == 1


def test_a_rank_0_that_does_not_come_is_told_of(stores: list[TCPStore]) -> None:
    stores[0].set("gmeta-start", "an earlier one")
    with pytest.raises(RuntimeError, match="rank 0 did not come"):
        agree_on_start(stores[1], 1, 2, timedelta(seconds=0.3))
