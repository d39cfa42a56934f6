"""Gathers, segment sums and pooling as sparse products equal loops, with their derivatives to second order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gmeta.core.selection import Selection, cat, product, select


def gather_rows(weight: Tensor, index: Tensor) -> Tensor:
    return product(weight, select(index.flatten(), None, len(weight))).view(*index.shape, weight.shape[1])


def segment_sum(values: Tensor, segments: Tensor, num: int) -> Tensor:
    return product(values, select(segments, None, num).transposed)


def bags(lengths: Tensor, pooling: str) -> Selection:
    lengths = lengths.flatten()
    weights = (1.0 / lengths.double()).repeat_interleave(lengths) if pooling == "mean" else None
    return select(torch.arange(int(lengths.sum())), lengths, int(lengths.sum()), weights)


def pool(values: Tensor, lengths: Tensor, pooling: str) -> Tensor:
    return product(values, bags(lengths, pooling)).view(*lengths.shape, values.shape[1])


def slow_segment_sum(values: Tensor, segments: Tensor, num: int) -> Tensor:
    out = [values.new_zeros(values.shape[1]) for _ in range(num)]
    for value, segment in zip(values, segments.tolist(), strict=True):
        out[segment] = out[segment] + value
    return torch.stack(out) if out else values.new_zeros(0, values.shape[1])


def slow_pool(values: Tensor, lengths: Tensor, pooling: str) -> Tensor:
    out, start = [], 0
    for length in lengths.flatten().tolist():
        total = values[start : start + length].sum(0)
        out.append(total / max(length, 1) if pooling == "mean" else total)
        start += length
    return torch.stack(out).view(*lengths.shape, values.shape[1])


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)


INDEX = torch.tensor([[4, 0, 4], [2, 4, 0]])
LENGTHS = torch.tensor([[2, 0, 1], [3, 0, 0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gather_rows(dtype: torch.dtype) -> None:
    weight = randn(6, 3).detach().to(dtype).requires_grad_()
    rows = gather_rows(weight, INDEX)
    assert torch.equal(rows, weight[INDEX])
    (rows * rows).sum().backward()
    expected = slow_segment_sum(2 * weight.detach()[INDEX.flatten()], INDEX.flatten(), 6)
    torch.testing.assert_close(weight.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_segment_sum(dtype: torch.dtype) -> None:
    values, segments = randn(6, 3).to(dtype), torch.tensor([3, 0, 3, 3, 5, 0])
    torch.testing.assert_close(segment_sum(values, segments, 7), slow_segment_sum(values, segments, 7))


@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_pool(pooling: str) -> None:
    values = randn(6, 3)
    pooled = pool(values, LENGTHS, pooling)
    torch.testing.assert_close(pooled, slow_pool(values, LENGTHS, pooling))
    assert not pooled[LENGTHS == 0].any()


@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_derivatives_to_second_order(pooling: str) -> None:
    weight, values = randn(6, 2), randn(6, 2)
    segments = torch.tensor([3, 0, 3, 3, 1, 0])
    for function, value in (
        (lambda w: gather_rows(w, INDEX).tanh(), weight),
        (lambda v: segment_sum(v, segments, 5).tanh(), values),
        (lambda v: pool(v, LENGTHS, pooling).tanh(), values),
    ):
        assert torch.autograd.gradcheck(function, value)
        assert torch.autograd.gradgradcheck(function, value)


@pytest.mark.parametrize("dim", [0, -1])
def test_cat(dim: int) -> None:
    parts = randn(2, 3), randn(2, 3)
    assert torch.equal(cat(parts, dim), torch.cat(parts, dim))
    assert torch.autograd.gradcheck(lambda *p: cat(p, dim).tanh(), parts)
    assert torch.autograd.gradgradcheck(lambda *p: cat(p, dim).tanh(), parts)


def test_gather_and_segment_sum_are_adjoint() -> None:
    weight, values = randn(6, 3), randn(6, 3).flip(0)
    gathered = gather_rows(weight, INDEX).view(6, 3)
    summed = segment_sum(values, INDEX.flatten(), 6)
    torch.testing.assert_close((gathered * values).sum(), (weight * summed).sum())
    matrix = bags(LENGTHS, "mean")
    pooled = torch.ones(6, 3, dtype=torch.float64)
    torch.testing.assert_close(
        (product(values, matrix) * pooled).sum(), (values * product(pooled, matrix.transposed)).sum()
    )


def test_a_matrix_of_bags_looks_up_and_pools_at_once() -> None:
    weight, index = randn(6, 3), torch.tensor([5, 5, 0, 1, 2, 5])
    together = product(weight, select(index, LENGTHS.flatten(), 6))
    torch.testing.assert_close(together.view(2, 3, 3), slow_pool(weight[index], LENGTHS, "sum"))


def test_empty() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    weight = randn(4, 3)
    assert gather_rows(weight, none.view(0, 2)).shape == (0, 2, 3)
    assert not segment_sum(randn(0, 3), none, 4).any()
    assert segment_sum(randn(0, 3), none, 0).shape == (0, 3)
    assert not pool(randn(0, 3), torch.zeros(2, 2, dtype=torch.int64), "mean").any()
    grad = torch.autograd.grad(gather_rows(weight, none).sum(), weight)[0]
    assert grad.shape == weight.shape
    assert not grad.any()


def test_repeatable_bitwise() -> None:
    values = torch.randn(5000, 4, generator=torch.Generator().manual_seed(1))
    segments = torch.randint(0, 7, (5000,), generator=torch.Generator().manual_seed(2))
    assert torch.equal(segment_sum(values, segments, 7), segment_sum(values, segments, 7))
