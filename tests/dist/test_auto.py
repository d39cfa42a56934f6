"""`sharding="auto"`: what the planner takes, with and without a limit, beside what was placed by hand."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from harness import run_ranks
from test_paro import ADAMW, Tower, open_engine, tower
from torch import Tensor

from gmeta.parallel.mesh import Mesh
from gmeta.sharding import links as network
from gmeta.sharding.auto import AutoSharding, choose_strategies
from gmeta.sharding.hierarchy import HierarchicalCollectives, node_mesh
from gmeta.sharding.links import measure_links
from gmeta.sharding.paro import paro
from gmeta.sharding.ring import Ring
from gmeta.sharding.schedule import Links, Workload, advise, choose
from gmeta.sharding.strategy import ElementBytes, NodeLayout, ShardingStrategy, memory_bytes

SLOW = Links(inter_bits_s=1e8, intra_bits_s=1e10, inter_latency_s=1e-5, intra_latency_s=1e-6)
LAYOUT = NodeLayout(2, 2)


def size(dtype: torch.dtype = torch.float64) -> tuple[int, int]:
    params = list(tower(dtype).parameters())
    return sum(p.numel() for p in params), sum(p.numel() for p in params if p.requires_grad)


def taken(mesh: Mesh, auto: AutoSharding, strategy: Any = "auto", **settings: Any) -> dict[str, str]:
    engine = open_engine(mesh, 2, strategy, torch.float64, auto=auto, **settings)
    found = engine.strategies
    engine.backward(engine(torch.ones(1, 5, dtype=settings.get("compute_dtype", torch.float64))).sum())
    engine.step()
    assert sum(engine.memory_bytes().values()) <= (auto.memory_bytes or 1e9)
    engine.close()
    return found


def test_the_fastest_that_fits_is_taken() -> None:
    params, trained = size()
    sizes = ElementBytes(8, 8, 16)
    work = Workload(params, trained, 4, 0.0, 3, sizes)
    whole = sum(memory_bytes(ShardingStrategy.parse("NNN"), LAYOUT, params, trained, sizes).values())
    for cap in (None, 0.8 * whole, 0.675 * whole):
        expected = choose(advise(LAYOUT, SLOW, work, cap)).strategy
        ranks = run_ranks(4, taken, AutoSharding(accumulation=4, memory_bytes=cap and 1.02 * cap, links=SLOW))
        assert {name for found in ranks for name in found.values()} == {expected}


def test_what_was_placed_by_hand_stays() -> None:
    (found, *_) = run_ranks(
        4, taken, AutoSharding(links=SLOW, replicate=True), {"": "auto", "layers.0": "GGG", "end": "IIG"}
    )
    assert found.pop("end.weight") == "IIG"
    assert {name.split(".")[1] for name, letters in found.items() if letters == "GGG"} == {"0"}
    assert {letters for name, letters in found.items() if not name.startswith("layers.0")} == {"NNN"}


def test_what_was_placed_by_hand_takes_of_the_limit() -> None:
    """All of it fits replicated; beside a layer that is kept whole, the rest does not."""
    params, trained = size()
    whole = sum(memory_bytes(ShardingStrategy.parse("NNN"), LAYOUT, params, trained, ElementBytes(8, 8, 16)).values())
    auto = AutoSharding(links=SLOW, replicate=True, memory_bytes=1.1 * whole)
    assert set(run_ranks(4, taken, auto)[0].values()) == {"NNN"}
    less = AutoSharding(links=SLOW, replicate=True, memory_bytes=0.9 * whole)
    (found, *_) = run_ranks(4, taken, less, {"": "auto", "layers.0": "NNN"})
    assert {letters for name, letters in found.items() if name.startswith("layers.0")} == {"NNN"}
    assert "NNN" not in {letters for name, letters in found.items() if not name.startswith("layers.0")}


def told_differently(mesh: Mesh) -> dict[str, str]:
    """Rank 0 takes rows for slow and computing for long; the others not."""
    slow = Links(1e5, 1e10, 1e-5, 1e-6)
    return taken(
        mesh, AutoSharding(links=slow if mesh.rank == 0 else Links(1e12, 1e4), memory_bytes=None if mesh.rank else 1e9)
    )


def test_ranks_that_are_told_different_things_agree() -> None:
    ranks = run_ranks(4, told_differently)
    assert all(found == ranks[0] for found in ranks)


def measured(mesh: Mesh, shared: bool) -> Links:
    """Messages that take alpha + beta * size, beside 5 ms once; slower between groups when both of a group send."""

    def took(_levels: Any, ring: Ring, message: Tensor, count: int) -> float:
        crossing = ring.crossing[0]
        bits_s = 1e8 if crossing else 1e9
        if crossing and shared and took.everyone:  # type: ignore[attr-defined]
            bits_s /= 2
        return 0.005 + count * ((2e-3 if crossing else 1e-3) + 8 * message.nbytes / bits_s)

    def look(*args: Any) -> Any:
        calls.append(args)
        took.everyone = len(calls) < 3  # type: ignore[attr-defined]  # the third looks at one rank of each group
        return real(*args)

    calls: list[Any] = []
    real, network._exchanges_s = network._measured, took  # type: ignore[assignment]
    network._measured = look
    hierarchy = HierarchicalCollectives.open(node_mesh(2), "backend", 60.0, mesh.device)
    found = measure_links(hierarchy, mesh.device)
    hierarchy.close()
    return found


@pytest.mark.parametrize("shared", [False, True])
def test_links_are_measured(shared: bool) -> None:
    """Latency and bandwidth come out of messages in a row; what is paid once does not count."""
    for links in run_ranks(4, measured, shared):
        assert links.shared_nic == shared
        assert links.intra_bits_s == pytest.approx(1e9, rel=1e-3)
        assert links.inter_bits_s == pytest.approx(1e8, rel=1e-3)
        assert links.intra_latency_s == pytest.approx(1e-3 + 8e-9 * 1024, rel=1e-3)
        assert links.inter_latency_s == pytest.approx(2e-3 + 8e-8 * 1024 * (1 + shared), rel=1e-3)


def test_measured_links_make_a_plan() -> None:
    ranks = run_ranks(4, taken, AutoSharding())
    assert all(found == ranks[0] for found in ranks)


def test_optimizers_are_tried_out() -> None:
    """Momentum costs one number a parameter, AdamW two, master weights one more, and in fp32."""
    from gmeta.sharding.auto import _bytes

    sgd = partial(torch.optim.SGD, lr=0.1)
    assert _bytes(Tower(), sgd, None, None) == ElementBytes(4, 4, 0)
    assert _bytes(Tower(), partial(sgd, momentum=0.9), None, None) == ElementBytes(4, 4, 4)
    assert _bytes(Tower(), ADAMW, torch.bfloat16, None) == ElementBytes(2, 2, 12)
    assert _bytes(Tower(), ADAMW, torch.bfloat16, torch.float32) == ElementBytes(2, 4, 12)


def refused(mesh: Mesh) -> list[str]:
    said = []
    for strategy, limit in (("auto", 100.0), ({"": "auto", "begin": "NNN"}, 100.0)):
        with pytest.raises(ValueError, match="GB") as error:
            choose_strategies(
                tower(torch.float64), ADAMW, node_mesh(2), strategy, AutoSharding(memory_bytes=limit, links=SLOW)
            )
        said.append(str(error.value))
    return said


def test_what_fits_nowhere() -> None:
    for nowhere, by_hand in run_ranks(4, refused):
        assert "no strategy fits" in nowhere
        assert "would do" in nowhere
        assert "what is sharded by hand takes" in by_hand


def test_one_process_needs_no_plan() -> None:
    engine = paro(Tower(), ADAMW, None, "auto")
    assert set(engine.strategies.values()) == {"NNN"}
    engine.close()
