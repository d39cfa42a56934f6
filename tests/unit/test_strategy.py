"""The rule, the 14 strategies, and the formulas, against the numbers of the paper's notes."""

from __future__ import annotations

import pytest

from gmeta.sharding.checkpoint import boxes
from gmeta.sharding.strategy import (
    STRATEGIES,
    NodeLayout,
    NodeTraffic,
    ShardingStrategy,
    memory_bytes,
    nearest_strategies,
    sent_bytes,
)


def test_the_fourteen() -> None:
    assert set(STRATEGIES) == {
        *("NNN", "NNI", "NNG", "NII", "NIG", "NGG", "INI", "ING", "III", "IIG", "IGG", "GNG", "GIG", "GGG")
    }
    assert all(str(ShardingStrategy.parse(name)) == name for name in STRATEGIES)


@pytest.mark.parametrize(
    ("name", "valid"), [("GGN", ["GGG"]), ("NIN", ["NNN", "NII", "NIG"]), ("INN", ["NNN", "INI", "ING"])]
)
def test_nearest(name: str, valid: list[str]) -> None:
    assert nearest_strategies(name) == valid


def test_memory_of_the_paper() -> None:
    """65 B parameters on 4 groups of 8, in GB."""
    layout = NodeLayout(8, 4)
    found = {p: sum(memory_bytes(ShardingStrategy.parse(p), layout, 65_000_000_000).values()) / 1e9 for p in STRATEGIES}
    for strategy, gb in {"IIG": 56.9, "IGG": 44.7, "GGG": 32.5, "III": 130, "NGG": 158}.items():
        assert found[strategy] == pytest.approx(gb, abs=0.5)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_bytes_between_groups(accumulation: int) -> None:
    """In multiples of P, the bytes of all parameters, from the paper's notes."""
    m, ng, s = 8, 4, accumulation
    layout, n = NodeLayout(m, ng), m * ng
    ring, across = (n - 1) / n, (ng - 1) / ng
    expected = {
        "GGG": 3 * s * ring,
        "NGG": (s + 1) * ring,
        "IGG": s * ring + across,
        "GNG": (2 * s + 1) * ring,
        "GIG": 2 * s * ring + across,
        "NNN": 2 * ring,
        "NNG": 2 * ring,
        "NIG": across + ring,
        "ING": ring + across,
        **dict.fromkeys(("IIG", "III", "NII", "NNI", "INI"), 2 * across),
    }
    for name in STRATEGIES:
        sent = sent_bytes(ShardingStrategy.parse(name), layout, params=1.0, updated=1.0, grads=1.0, accumulation=s)
        assert sent.inter == pytest.approx(expected[name]), name


def test_hierarchical_sends_less_between_groups_never_more() -> None:
    layout = NodeLayout(4, 3)
    for name in STRATEGIES:
        flat, two = (
            sent_bytes(ShardingStrategy.parse(name), layout, params=1.0, updated=1.0, grads=1.0, flat=flat)
            for flat in (True, False)
        )
        assert two.inter <= flat.inter + 1e-12


def test_one_rank_sends_nothing() -> None:
    for name in STRATEGIES:
        found = sent_bytes(
            ShardingStrategy.parse(name), NodeLayout(1, 1), params=1.0, updated=1.0, grads=1.0, accumulation=3
        )
        assert found == NodeTraffic(0.0, 0.0)


def test_frozen_parameters_cost_no_gradient() -> None:
    found = sent_bytes(ShardingStrategy.parse("IIG"), NodeLayout(2, 2), params=10.0, updated=0.0, grads=0.0)
    assert found.inter == 0.0
    assert memory_bytes(ShardingStrategy.parse("IIG"), NodeLayout(2, 2), 10, 0) == {
        "params": 10.0,
        "grads": 0.0,
        "state": 0.0,
    }


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4), (1, 6), (4, 1, 2)])
def test_boxes_cover_a_range(shape: tuple[int, ...]) -> None:
    import numpy as np

    numbers = np.arange(np.prod(shape)).reshape(shape)
    for start in range(numbers.size + 1):
        for stop in range(start, numbers.size + 1):
            found = [
                numbers[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))].ravel()
                for offsets, sizes in boxes(shape, start, stop)
            ]
            assert len(found) <= 2 * len(shape) - 1
            assert np.concatenate([[], *found]).tolist() == list(range(start, stop))
