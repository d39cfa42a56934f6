"""Ranks that use other parts of the model than their peers, steps that use less of it, backward passes that fail."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from harness import run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gmeta.parallel.mesh import Mesh
from gmeta.sharding.flat_parameters import FlatParameter
from gmeta.sharding.hierarchy import HierarchicalCollectives, node_mesh
from gmeta.sharding.order import leaves_of, reordered
from gmeta.sharding.paro import paro

STEPS, WIDTH = 5, 6
REPLICATED = ["NNN", "NNI", "NII", "NIG", "NGG"]
ADAMW = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
SGD = partial(torch.optim.SGD, lr=0.1)
Model = Callable[[], nn.Module]


class Parts(nn.Module):
    """A trunk and parts of equal sizes, of which `forward` computes those that it is told, in that order."""

    def __init__(self, num_parts: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(WIDTH, WIDTH)
        self.parts = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(num_parts))

    def forward(self, x: Tensor, using: Sequence[int]) -> Tensor:
        x = torch.tanh(self.trunk(x))
        for number in using:
            x = x + self.parts[number](x)
        return x


def towers(step: int, rank: int) -> list[int]:
    """Every rank has a task of its own."""
    return [(rank + step) % 4]


def experts(step: int, rank: int) -> list[int]:
    """A router chooses two of four, in any order; nobody chooses one of them."""
    return [[0, 2], [2, 1], [1, 0], [0, 1]][(step + rank) % 4]


def layer_drop(step: int, rank: int) -> list[int]:
    """Each layer is dropped or not; one rank drops all in one step."""
    draws = torch.Generator().manual_seed(10 * step + rank)
    return [] if (step, rank) == (2, 1) else [n for n in range(4) if torch.rand(1, generator=draws) > 0.4]


def by_node(step: int, rank: int) -> list[int]:
    """The ranks of a node agree, nodes differ."""
    return layer_drop(step, rank // 2)


def batch(step: int, rank: int) -> Tensor:
    draws = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(4, WIDTH, generator=draws, dtype=torch.float64)


def reference(ranks: int, choose: Callable[[int, int], list[int]], optimizer: Any) -> dict[str, Tensor]:
    """One process, which skips what has no gradient."""
    model = Parts().double()
    update = optimizer(model.parameters())
    for step in range(STEPS):
        update.zero_grad(set_to_none=True)
        for rank in range(ranks):
            (model(batch(step, rank), choose(step, rank)).square().mean() / ranks).backward()
        update.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def trained(mesh: Mesh, strategies: Sequence[Any], choose: Callable[[int, int], list[int]], optimizer: Any) -> None:
    expected = reference(mesh.world_size, choose, optimizer)
    for strategy in strategies:
        engine = paro(
            Parts().double(), optimizer, node_mesh(min(2, mesh.world_size)) if mesh.world_size > 1 else None, strategy
        )
        for step in range(STEPS):
            engine.backward(engine(batch(step, mesh.rank), choose(step, mesh.rank)).square().mean())
            engine.step()
        same(engine, expected, strategy)
        engine.close()


def same(engine: Any, expected: dict[str, Tensor], about: Any) -> None:
    with engine.unsharded():
        for name, p in engine.module.named_parameters():
            torch.testing.assert_close(
                p.detach(), expected[name], rtol=1e-12, atol=1e-13, msg=lambda m, n=name: f"{about} {n}: {m}"
            )


@pytest.mark.parametrize(
    ("ranks", "choose"),
    [
        (2, towers),
        (2, experts),
        pytest.param(2, layer_drop, marks=pytest.mark.slow),
        *(pytest.param(4, choose, marks=pytest.mark.slow) for choose in (layer_drop, towers, experts)),
    ],
)
def test_ranks_that_use_other_parts(ranks: int, choose: Any) -> None:
    """Reduced in each rank's own order, gradients of equal sizes were added up with each other's."""
    run_ranks(ranks, trained, [*REPLICATED, {"": "IIG", "parts": "NIG"}], choose, ADAMW)


def test_nodes_that_use_other_parts() -> None:
    run_ranks(4, trained, ["III", "IIG", "IGG"], by_node, ADAMW)


def first_or_never(_step: int, rank: int) -> list[int]:
    """Half of the ranks of a node compute the last part first, and so get its gradient last."""
    return [5, 0, 1, 2, 3, 4] if rank % 2 else [0, 1, 2, 3, 4]


def test_nobody_waits_for_a_reduction_whose_rank_waits_for_a_gathering() -> None:
    run_ranks(4, trained, [{"": "IIG", "parts.5": "NIG"}, {"": "GGG", "parts.5": "NGG"}], first_or_never, ADAMW)


def same_on_all(step: int, _rank: int) -> list[int]:
    return [[0, 1, 2, 3], [3, 1], [2, 0], [1], [3, 2, 1, 0]][step]


@pytest.mark.parametrize("ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_steps_that_use_other_parts(ranks: int) -> None:
    """All ranks alike use some, in any order. What nobody uses is neither decayed nor moved by its momentum."""
    run_ranks(ranks, trained, ["NNN", "NIG", "III", "IIG", "GGG"], same_on_all, ADAMW)


def like_ddp(mesh: Mesh) -> None:
    model = Parts().double()
    wrapped = DistributedDataParallel(model, process_group=mesh.dense_group, find_unused_parameters=True)
    update = SGD(model.parameters())
    engine = paro(Parts().double(), SGD, node_mesh(2), "NNN")
    for step in range(STEPS):
        update.zero_grad()
        for forward, backward in ((wrapped, Tensor.backward), (engine, engine.backward)):
            backward(forward(batch(step, mesh.rank), layer_drop(step, mesh.rank)).square().mean())
        update.step()
        engine.step()
    same(engine, dict(model.named_parameters()), "DDP")
    engine.close()


def test_layer_drop_equals_ddp() -> None:
    run_ranks(4, like_ddp)


def refused(mesh: Mesh, strategy: str) -> str:
    engine = paro(Parts().double(), SGD, node_mesh(2), strategy, timeout_s=20)
    with pytest.raises(RuntimeError) as error:
        engine.backward(engine(batch(0, mesh.rank), [mesh.rank % 2]).square().mean())
    return str(error.value)


@pytest.mark.parametrize("strategy", ["III", "GGG"])
def test_ranks_that_share_parameters_and_call_others(strategy: str) -> None:
    """They would mix the parts' parameters."""
    for rank, said in enumerate(run_ranks(4, refused, strategy)):
        assert f"rank {rank} gathers parts.{rank % 2}.0.weight while another rank gathers parts.{1 - rank % 2}" in said
        assert "NIG" in said


# Parameters that are not trained in every step


def frozen_later(mesh: Mesh, strategies: list[str]) -> None:
    def freeze(model: nn.Module, step: int) -> None:
        for p in model.parts[1].parameters():
            p.requires_grad_(not 2 <= step < 4)

    for strategy in strategies:
        model, engine = Parts().double(), paro(Parts().double(), ADAMW, node_mesh(2), strategy)
        update = ADAMW(model.parameters())
        for step in range(STEPS):
            freeze(model, step)
            freeze(engine.module, step)
            update.zero_grad(set_to_none=True)
            for rank in range(mesh.world_size):
                (model(batch(step, rank), [0, 1]).square().mean() / mesh.world_size).backward()
            update.step()
            engine.backward(engine(batch(step, mesh.rank), [0, 1]).square().mean())
            engine.step()
        same(engine, dict(model.named_parameters()), strategy)
        engine.close()


def test_parameters_that_are_frozen_for_some_steps() -> None:
    run_ranks(4, frozen_later, ["NNN", "GGG"])


def test_parameters_that_are_trained_too_late() -> None:
    model = Parts()
    model.parts[1].requires_grad_(False)
    engine = paro(model, ADAMW, None, "IIG")
    model.parts[1].requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"parts.1.0.weight was frozen when the engine was made"):
        engine.backward(engine(batch(0, 0).float(), [0]).sum())


def test_state_of_parameters_that_nobody_has_used() -> None:
    """All of them can be saved; a parameter that is used for the first time afterwards starts as it would have."""
    model, engine = Parts().double(), paro(Parts().double(), ADAMW, None, "NNN")
    update = ADAMW(model.parameters())
    for step in range(STEPS):
        using = [0] if step < 3 else [0, 1]
        update.zero_grad(set_to_none=True)
        model(batch(step, 0), using).square().mean().backward()
        update.step()
        engine.backward(engine(batch(step, 0), using).square().mean())
        engine.step()
        assert "optimizer.parts.3.0.weight.exp_avg" in engine.state()
    same(engine, dict(model.named_parameters()), "saved")
    engine.close()


# Backward passes that fail


class Breaking(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise MemoryError("no room")


def slowed(seconds: float) -> Callable[[], None]:
    """Have every sum of gradients take longer; call what is returned to end it."""
    names = ("reduce_scatter", "all_reduce")
    real = {name: getattr(HierarchicalCollectives, name) for name in names}

    def slow(name: str, *args: Any) -> None:
        time.sleep(seconds)
        real[name](*args)

    for name in names:
        setattr(HierarchicalCollectives, name, lambda *args, name=name: slow(name, *args))
    return lambda: [setattr(HierarchicalCollectives, name, real[name]) for name in names] and None


def failing(mesh: Mesh, strategies: list[str], everywhere: bool) -> None:
    """A backward pass fails before the trunk, or on rank 1 before some parts too; the step is dropped."""
    model = Parts().double()
    for rank in range(mesh.world_size):
        (model(batch(1, rank), [0, 1, 2, 3]).square().mean() / mesh.world_size).backward()
    SGD(model.parameters()).step()
    restore = slowed(0.02)
    try:
        for strategy in strategies:
            engine = paro(Parts().double(), SGD, node_mesh(2), strategy)
            engine.backward(engine(batch(2, mesh.rank), [0, 1]).square().mean(), last=False)
            late = 2 if mesh.rank == 1 and not everywhere else 0
            handle = engine.module.parts[late].register_forward_hook(lambda *args: Breaking.apply(args[2]))
            with pytest.raises(MemoryError):
                engine.backward(engine(batch(0, mesh.rank), [0, 1, 2, 3]).square().mean())
            handle.remove()
            engine.backward(engine(batch(1, mesh.rank), [0, 1, 2, 3]).square().mean())
            engine.step()
            same(engine, dict(model.named_parameters()), strategy)
            engine.close()
    finally:
        restore()


def test_a_failed_backward_pass_leaves_nothing_in_flight() -> None:
    """Sums of the failed pass were still written into the buffers that the next one fills."""
    run_ranks(4, failing, ["NNN", "NNI", "NIG", "III"], True)


def test_a_backward_pass_that_fails_elsewhere_on_each_rank() -> None:
    run_ranks(4, failing, ["NNN", "NII", "NIG"], False)


# Saving


def test_a_part_of_a_sharded_module_is_not_saved_empty() -> None:
    engine = paro(Parts(), ADAMW, None, "IIG")
    for part in (engine.module, engine.module.parts, engine.module.parts[2], engine.module.parts[2][0]):
        with pytest.raises(RuntimeError, match=r"holds a part of (trunk|parts.\d.0).weight only: call state_dict\(\)"):
            part.state_dict()
        with engine.unsharded():
            assert all(value.numel() for value in part.state_dict().values())
    engine.close()
    assert all(value.numel() for value in engine.module.parts.state_dict().values())


# Memory


def staged(mesh: Mesh, strategy: str) -> float:
    """The largest number of staging buffers alive at once, with links that are slower than backward."""
    alive, most, lock, real = [0], [0], threading.Lock(), FlatParameter._stage

    def freed() -> None:
        with lock:
            alive[0] -= 1

    def stage(flat: FlatParameter) -> Tensor:
        begun = flat._staging is None
        buffer = real(flat)
        if begun:
            with lock:
                alive[0] += 1
                most[0] = max(most[0], alive[0])
            weakref.finalize(buffer, freed)
        return buffer

    engine = paro(Parts(12), SGD, node_mesh(2), strategy)
    restore, FlatParameter._stage = slowed(0.02), stage  # type: ignore[method-assign]
    try:
        for _ in range(2):
            engine.backward(engine(batch(0, mesh.rank).float(), range(12)).sum())
            engine.step()
    finally:
        restore()
        FlatParameter._stage = real  # type: ignore[method-assign]
    engine.close()
    return most[0]


@pytest.mark.parametrize("strategy", ["NIG", *(pytest.param(s, marks=pytest.mark.slow) for s in ("IIG", "GGG"))])
def test_two_staging_buffers_at_once(strategy: str) -> None:
    """One is filled while another one is reduced; it was all thirteen."""
    assert max(run_ranks(4, staged, strategy)) == 2


# Helpers


def test_leaves_of_a_loss() -> None:
    a, b, c = (torch.ones(2, requires_grad=True) for _ in range(3))
    leaves, hides = leaves_of((a * b).sum() + 0 * b.sum())
    assert (leaves, hides) == ({a, b}, False)
    assert leaves_of(c)[0] == {c}
    assert leaves_of(Breaking.apply(a).sum()) == ({a}, True)


def test_places_of_some() -> None:
    assert reordered("abcd", [3, 0, 1, 2]) == list("cbda")
    assert reordered("abcd", [0, 0, 0, 0]) == list("abcd")
