import gc
import os
import signal
import sys
import time
import weakref
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import run_ranks
from torch import nn

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))  # scripts, no package

from study.outer_reduce import CentralReduce, NoOverlap

from gmeta.parallel.collectives import (
    GradientBuckets,
    all_reduce_sum,
    all_to_all,
    broadcast_from_rank_0,
    exchange_counts,
    gather_to_rank_0,
    on_rank_0,
    raise_together,
)
from gmeta.parallel.mesh import Mesh, PeerLost, barrier

pytestmark = pytest.mark.dist
WORLDS = [1, 2, 4]


def test_parameters_do_not_keep_the_process_groups() -> None:
    net = nn.Linear(2, 2)
    buckets = GradientBuckets(net.parameters(), Mesh())
    dead = weakref.ref(buckets)
    del buckets
    gc.collect()
    assert dead() is None
    net(torch.ones(1, 2)).sum().backward()
    assert net.bias.grad is not None


def _ragged_all_to_all(mesh: Mesh, dtype: torch.dtype) -> None:
    # rank s sends (s + r) % 3 rows to rank r, and rank 1 sends nothing
    def size(s, r):
        return 0 if s == 1 else (s + r) % 3

    send = [size(mesh.rank, r) for r in range(mesh.world_size)]
    receive = [size(s, mesh.rank) for s in range(mesh.world_size)]
    rows = torch.full((sum(send), 3), mesh.rank, dtype=dtype)
    got = all_to_all(rows, send, receive, mesh.row_group, mesh).wait()
    expected = torch.repeat_interleave(torch.arange(mesh.world_size), torch.tensor(receive))
    assert torch.equal(got, expected[:, None].expand(-1, 3).to(dtype))


@pytest.mark.parametrize("world", WORLDS[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bfloat16, torch.float16])
def test_all_to_all_moves_ragged_rows(world, dtype):
    run_ranks(world, _ragged_all_to_all, dtype)


def _counts(mesh: Mesh) -> None:
    counts = torch.tensor([[10 * mesh.rank + r for r in range(mesh.world_size)], [7] * mesh.world_size])
    asked = exchange_counts(counts, mesh.stages[0].ids, mesh)
    assert asked == [[10 * s + mesh.rank for s in range(mesh.world_size)], [7] * mesh.world_size]


@pytest.mark.parametrize("world", WORLDS[1:])
def test_counts(world):
    run_ranks(world, _counts)


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(4, 5)
        self.b = nn.Linear(5, 3)
        self.unused = nn.Parameter(torch.ones(2))
        self.low = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        self.to(torch.float64)
        self.low.data = self.low.data.bfloat16()

    def forward(self, x):
        return (torch.relu(self.a(x)) @ self.b.weight.T + self.b.bias * self.low).square().sum()


# ways to sum dense gradients: the product's, with a size of bucket in MiB, and those of the study
REDUCES = {
    **{f"buckets of {mb:g}": partial(GradientBuckets, bucket_mb=mb) for mb in (1e-6, 1e-4, 4.0)},
    "no overlap": NoOverlap,
    "central": CentralReduce,
    "central, no overlap": partial(CentralReduce, overlap=False),
}


def _summed(mesh: Mesh, how: str, steps: int):
    """Six inputs, cut over ranks unevenly: the last rank has none and makes no graph."""
    net = _Net()
    params = [p for p in net.parameters() if "central" not in how or p.dtype == torch.float64]
    reduce = REDUCES[how](params, mesh)
    data = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    cuts = {1: [6], 2: [6, 0], 4: [1, 3, 2, 0]}[mesh.world_size]
    mine = data.split(cuts)[mesh.rank]
    for _ in range(steps):
        net.zero_grad(set_to_none=True)
        reduce.begin(several=False)
        if len(mine):
            net(mine).backward()
        reduce.flush()
        reduce.finish()
    reduce.close()
    return {name: p.grad for name, p in net.named_parameters() if any(p is q for q in params)}


@pytest.mark.parametrize("how", REDUCES)
@pytest.mark.parametrize("world", [2, 4])
def test_gradients_are_summed_as_in_one_process(world, how):
    (expected,) = run_ranks(1, _summed, "buckets of 4", 1)
    for grads in run_ranks(world, _summed, how, 2):
        assert len(grads) >= len(expected) - 1
        for name, got in grads.items():
            want = expected[name]
            torch.testing.assert_close(got, want, rtol=1e-12 if want.dtype == torch.float64 else 1e-2, atol=1e-14)


def test_buckets_give_unused_parameters_zeros():
    (grads,) = run_ranks(1, _summed, "buckets of 4", 1)
    assert torch.equal(grads["unused"], torch.zeros(2, dtype=torch.float64))


def _started(mesh: Mesh, several: bool) -> list[int]:
    """Buckets that are on their way at the end of backward, and after `flush`."""
    net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    buckets = GradientBuckets(net.parameters(), mesh, bucket_mb=300 / 2**20)
    buckets.begin(several)
    net(torch.ones(1, 8)).sum().backward()
    started = [len(buckets._pending)]
    buckets.flush()
    started.append(len(buckets._pending))
    buckets.finish()
    return started


def test_buckets_start_during_the_only_backward_or_after_several():
    assert run_ranks(2, _started, False) == [[4, 4]] * 2
    assert run_ranks(2, _started, True) == [[0, 4]] * 2


def _helpers(mesh: Mesh) -> None:
    x = torch.tensor([float(mesh.rank), 1.0], dtype=torch.float64)
    world = mesh.world_size
    assert all_reduce_sum(x, mesh).tolist() == [world * (world - 1) / 2, world]
    assert x.tolist() == [mesh.rank, 1]
    assert broadcast_from_rank_0(0.1 + mesh.rank, mesh) == 0.1
    barrier(mesh)


@pytest.mark.parametrize("world", WORLDS)
def test_helpers(world):
    run_ranks(world, _helpers)


def _gather(mesh: Mesh, dtype: str) -> None:
    length = [2, 0, 3, 1][mesh.rank]
    mine = np.arange(length * 2).reshape(length, 2).astype(dtype) + np.array(mesh.rank).astype(dtype)
    got = gather_to_rank_0(mine, mesh)
    assert got.dtype == np.dtype(dtype)
    if mesh.rank != 0:
        assert got.shape == (0, 2)
        return
    want = [
        np.arange(n * 2).reshape(n, 2).astype(dtype) + np.array(r).astype(dtype) for r, n in enumerate([2, 0, 3, 1])
    ]
    np.testing.assert_array_equal(got, np.concatenate(want[: mesh.world_size]))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("dtype", ["int64", "float32", "bool"])
def test_gather_joins_ragged_arrays(world, dtype):
    run_ranks(world, _gather, dtype)


def test_gather_refuses_objects():
    with pytest.raises(ValueError, match="dtype object"):
        gather_to_rank_0(np.array([{}, {}]), Mesh())


def _raise_together(mesh: Mesh, failing: int | None) -> str:
    try:
        raise_together(
            ValueError("row 7 is bad: gr\N{LATIN SMALL LETTER U WITH DIAERESIS}n") if mesh.rank == failing else None,
            mesh,
        )
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("world", WORLDS)
def test_an_error_on_one_rank_is_raised_on_all(world):
    assert run_ranks(world, _raise_together, None) == [""] * world
    assert run_ranks(world, _raise_together, world - 1) == ["row 7 is bad: grün"] * world


def _on_rank_0(mesh: Mesh, error: type[Exception] | None) -> tuple[int | None, str]:
    def action() -> int:
        if error is not None:
            raise error("no room")
        return mesh.rank + 7

    try:
        return on_rank_0(action, mesh), ""
    except (ValueError, OSError) as problem:
        return None, f"{type(problem).__name__}: {problem}"


@pytest.mark.parametrize("world", WORLDS)
def test_what_rank_0_does_alone_fails_on_all(world):
    assert run_ranks(world, _on_rank_0, None) == [(7, "")] + [(None, "")] * (world - 1)
    for error in (ValueError, OSError):
        assert run_ranks(world, _on_rank_0, error) == [(None, f"{error.__name__}: no room")] * world


def _die(mesh: Mesh) -> str:
    if mesh.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        all_reduce_sum(torch.ones(3), mesh)
    except PeerLost as error:
        return str(error)
    return ""


def _hang(mesh: Mesh, how: str) -> str:
    if mesh.rank == 1:
        time.sleep(2.2)
        return "slept"
    try:
        barrier(mesh) if how == "barrier" else all_to_all(torch.ones(2), [1, 1], [1, 1], mesh.row_group, mesh).wait()
    except PeerLost as error:
        return str(error)
    return ""


def test_a_dead_peer_is_named_as_the_cause():
    with pytest.raises(AssertionError, match="the process died, exit code -9") as failure:
        run_ranks(2, _die)
    assert "rank 0" not in str(failure.value)  # it got its PeerLost and went on


@pytest.mark.parametrize(("how", "words"), [("all_to_all", "did not answer within 1 s"), ("barrier", "waited 1 s")])
def test_a_silent_peer_is_given_up(how, words):
    message, slept = _run_and_drop(_hang, how)
    assert words in message
    assert slept == "slept"


def _run_and_drop(function, *args):
    from harness import _POOLS

    try:
        return run_ranks(2, function, *args, mesh_timeout_s=1)
    finally:
        _POOLS.pop((2, 1, 0)).close()  # its groups are unusable after a time-out


def _fail(mesh: Mesh) -> None:
    if mesh.rank == 0:
        raise KeyError("needle")
    barrier(mesh)


def test_the_harness_shows_the_failing_rank():
    with pytest.raises(AssertionError, match=r"--- rank 0 ---\n(.|\n)*KeyError: 'needle'"):
        run_ranks(2, _fail, mesh_timeout_s=1)
