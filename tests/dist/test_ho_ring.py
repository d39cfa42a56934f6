"""The three ring algorithms give what the backend gives, for any sizes and types, and send what they should."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import run_ranks
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from gmeta.parallel.mesh import Mesh
from gmeta.sharding.hierarchy import HierarchicalCollectives, node_mesh
from gmeta.sharding.ring import ALGORITHMS, Algorithm, Blocks
from gmeta.sharding.streams import CommStream

EVEN = [6] * 8
UNEVEN = [5, 0, 3, 8, 1, 2, 0, 13]


def blocks_of(rank: int, sizes: list[int], group_size: int, dtype: torch.dtype) -> list[list[Tensor]]:
    """Blocks [node][local rank] that a rank contributes to a sum; whole numbers, so that every order gives the same."""
    draws = torch.Generator().manual_seed(rank)
    parts = [torch.randint(-8, 9, (size,), generator=draws).to(dtype) for size in sizes]
    return [parts[start : start + group_size] for start in range(0, len(parts), group_size)]


def exchange(mesh: Mesh, group_size: int, sizes: list[int], dtype: torch.dtype, chunk_bytes: int) -> list[Any]:
    hierarchy = HierarchicalCollectives.open(node_mesh(group_size), "ho", 60.0, torch.device("cpu"))
    rings, n = hierarchy.rings, mesh.world_size
    rings.chunk_bytes = chunk_bytes
    sizes = sizes[:n]
    everyone = [blocks_of(rank, sizes, group_size, dtype) for rank in range(n)]
    i, j = divmod(mesh.rank, group_size)
    sums = [[torch.stack(parts).sum(0) for parts in zip(*rows, strict=True)] for rows in zip(*everyone, strict=True)]
    counts = []
    for algorithm in ALGORITHMS:
        before = hierarchy.sent.intra, hierarchy.sent.inter
        mine = [[torch.full_like(block, 99) for block in row] for row in everyone[0]]
        mine[i][j].copy_(everyone[mesh.rank][i][j])
        rings.all_gather(mine, algorithm)
        for g, row in enumerate(mine):
            for p, block in enumerate(row):
                assert torch.equal(block, everyone[g * group_size + p][g][p]), (algorithm, g, p)
        counts.append((hierarchy.sent.intra - before[0], hierarchy.sent.inter - before[1]))
        mine = [[block.clone() for block in row] for row in everyone[mesh.rank]]
        rings.reduce_scatter(mine, algorithm)
        assert torch.equal(mine[i][j], sums[i][j]), algorithm
        mine = [[block.clone() for block in row] for row in everyone[mesh.rank]]
        rings.all_reduce(mine, algorithm)
        assert_equal(mine, sums, algorithm)
    hierarchy.close()
    return counts


def assert_equal(found: Blocks, expected: Blocks, algorithm: Algorithm) -> None:
    for row, other in zip(found, expected, strict=True):
        for block, right in zip(row, other, strict=True):
            assert torch.equal(block, right), algorithm


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("sizes", [EVEN, UNEVEN])
@pytest.mark.parametrize(("ranks", "group_size"), [(2, 1), (2, 2), (4, 2), (4, 1), (4, 4)])
def test_all_algorithms(ranks: int, group_size: int, sizes: list[int], dtype: torch.dtype) -> None:
    run_ranks(ranks, exchange, group_size, sizes, dtype, 16)


@pytest.mark.slow
@pytest.mark.parametrize("group_size", [2, 4])
@pytest.mark.parametrize("chunk_bytes", [8, 1 << 20])
def test_eight_ranks(group_size: int, chunk_bytes: int) -> None:
    for sizes in (EVEN, UNEVEN):
        run_ranks(8, exchange, group_size, sizes, torch.float64, chunk_bytes)


def test_what_is_sent() -> None:
    """A flat ring sends 3/4 of V bytes between two nodes of two, from one rank; the other algorithms 1/4 from each."""
    flat, two_phase, ho = zip(*run_ranks(4, exchange, 2, EVEN, torch.float64, 16), strict=True)
    block = 6 * 8
    assert flat == ((3 * block, 0), (0, 3 * block)) * 2
    assert two_phase == ho == ((2 * block, block),) * 4


def asynchronous(mesh: Mesh) -> None:
    """Several collectives on their way in a stream, while the caller goes on."""
    hierarchy = HierarchicalCollectives.open(node_mesh(2), "ho", 60.0, mesh.device)
    stream = CommStream(mesh.device, "test")
    buffers = [torch.full((64,), -1.0, dtype=torch.float64) for _ in range(5)]
    for k, buffer in enumerate(buffers):
        buffer[hierarchy.own(64, "G")] = 10 * k + mesh.rank
    handles = [stream.submit(lambda b=buffer: hierarchy.gather(b, "G", "N")) for buffer in buffers]
    for k in (4, 0, 3, 1, 2):
        handles[k].wait()
        expected = torch.empty(64, dtype=torch.float64)
        for rank in range(4):  # local rank rank % 2 of node rank // 2 owns partition local_rank * 2 + node
            part = rank % 2 * 2 + rank // 2
            expected[part * 16 : (part + 1) * 16] = 10 * k + rank
        assert torch.equal(buffers[k], expected)
    failing = stream.submit(lambda: [][0])
    with pytest.raises(IndexError):
        failing.wait()
    with pytest.raises(IndexError):
        stream.submit(lambda: None).wait()
    stream.close()
    with pytest.raises(RuntimeError, match="closed"):
        stream.submit(lambda: None)
    with pytest.raises(ValueError, match="does not ascend"):
        HierarchicalCollectives.open(
            DeviceMesh("cpu", [[0, 2], [1, 3]], _init_backend=False), "flat", 60.0, mesh.device
        )
    hierarchy.close()


def test_lanes() -> None:
    run_ranks(4, asynchronous)
