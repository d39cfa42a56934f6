"""`placement="auto"`: what the planner takes, with and without a limit, beside what was placed by hand."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from harness import run_ranks
from test_paro import ADAMW, Tower, open_engine, tower

from gmeta.parallel.auto import Auto, resolve
from gmeta.parallel.cost import Links, Workload
from gmeta.parallel.levels import group_mesh
from gmeta.parallel.mesh import Mesh
from gmeta.parallel.paro import paro
from gmeta.parallel.placement import Bytes, Groups, Placement, memory_bytes
from gmeta.parallel.schedule import choose, plan

SLOW = Links(inter_bits_s=1e8, intra_bits_s=1e10, inter_latency_s=1e-5, intra_latency_s=1e-6)
GROUPS = Groups(2, 2)


def size(dtype: torch.dtype = torch.float64) -> tuple[int, int]:
    params = list(tower(dtype).parameters())
    return sum(p.numel() for p in params), sum(p.numel() for p in params if p.requires_grad)


def taken(mesh: Mesh, auto: Auto, placement: Any = "auto", **settings: Any) -> dict[str, str]:
    engine = open_engine(mesh, 2, placement, torch.float64, auto=auto, **settings)
    found = engine.placements
    engine.backward(engine(torch.ones(1, 5, dtype=settings.get("compute_dtype", torch.float64))).sum())
    engine.step()
    assert sum(engine.memory_bytes().values()) <= (auto.memory_bytes or 1e9)
    engine.close()
    return found


def test_the_fastest_that_fits_is_taken() -> None:
    params, trained = size()
    sizes = Bytes(8, 8, 16)
    work = Workload(params, trained, 4, 0.0, 3, sizes)
    whole = sum(memory_bytes(Placement.parse("NNN"), GROUPS, params, trained, sizes).values())
    for cap in (None, 0.7 * whole, 0.55 * whole):
        expected = choose(plan(GROUPS, SLOW, work, cap)).placement
        ranks = run_ranks(4, taken, Auto(accumulation=4, memory_bytes=cap and 1.02 * cap, links=SLOW))
        assert {name for found in ranks for name in found.values()} == {expected}


def test_what_was_placed_by_hand_stays() -> None:
    (found, *_) = run_ranks(4, taken, Auto(links=SLOW, replicate=True), {"": "auto", "layers.0": "GGG", "end": "IIG"})
    assert found.pop("end.weight") == "IIG"
    assert {name.split(".")[1] for name, letters in found.items() if letters == "GGG"} == {"0"}
    assert {letters for name, letters in found.items() if not name.startswith("layers.0")} == {"NNN"}


def test_links_are_measured() -> None:
    ranks = run_ranks(4, taken, Auto())
    assert all(found == ranks[0] for found in ranks)


def test_optimizers_are_tried_out() -> None:
    """Momentum costs one number a parameter, AdamW two, master weights one more, and in fp32."""
    from gmeta.parallel.auto import _bytes

    sgd = partial(torch.optim.SGD, lr=0.1)
    assert _bytes(Tower(), sgd, None, None) == Bytes(4, 4, 0)
    assert _bytes(Tower(), partial(sgd, momentum=0.9), None, None) == Bytes(4, 4, 4)
    assert _bytes(Tower(), ADAMW, torch.bfloat16, None) == Bytes(2, 2, 12)
    assert _bytes(Tower(), ADAMW, torch.bfloat16, torch.float32) == Bytes(2, 4, 12)


def refused(mesh: Mesh) -> list[str]:
    said = []
    for placement, limit in (("auto", 100.0), ({"": "auto", "begin": "NNN"}, 100.0)):
        with pytest.raises(ValueError, match="GB") as error:
            resolve(tower(torch.float64), ADAMW, group_mesh(2), placement, Auto(memory_bytes=limit, links=SLOW))
        said.append(str(error.value))
    return said


def test_what_fits_nowhere() -> None:
    for nowhere, by_hand in run_ranks(4, refused):
        assert "no placement fits" in nowhere
        assert "ranks would do" in nowhere
        assert "what is placed by hand takes" in by_hand


def test_one_process_needs_no_plan() -> None:
    engine = paro(Tower(), ADAMW, None, "auto")
    assert set(engine.placements.values()) == {"NNN"}
    engine.close()
