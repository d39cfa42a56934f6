"""Row gathers, segment sums and pooling, as products with one sparse selection matrix, exact to any order of
derivative.

A gather, a bag lookup and a segment sum are all `S @ x` or `S.T @ y` for a sparse matrix S, and each is the derivative
of the other. One matrix, stored by row and by column, therefore gives the forward pass, the backward pass and the
second derivative as sequential sums. Sums run in stored order on every device, so that results repeat bit for bit.

Measured on one CPU core in float32, with 51,200 lookups of 16 in 15,000 rows: a gather takes 0.2 ms (`index_select`
0.4), and its backward pass 0.3 ms (`index_add` 2.0).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Selection:
    """A sparse matrix S [num_rows, num_columns] of E entries, stored by row and by column."""

    columns: Tensor  # int64 [E], the column of each entry, in row order
    row_offsets: Tensor  # int64 [num_rows + 1], where each row's entries start
    rows: Tensor  # int64 [E], row of each entry, in column order
    column_offsets: Tensor  # int64 [num_columns + 1], where each column's entries start
    row_weights: Tensor | None = None  # float [E] entry values in row order; None: all one
    column_weights: Tensor | None = None  # float [E] the same values in column order

    @property
    def transposed(self) -> Selection:
        """Return S.T, which shares all tensors with S."""
        return Selection(
            self.rows, self.column_offsets, self.columns, self.row_offsets, self.column_weights, self.row_weights
        )


def offsets_of(lengths: Tensor) -> Tensor:
    """Return where each segment starts, and where the last one ends: int64 [N] -> int64 [N + 1]."""
    return F.pad(lengths.reshape(-1).cumsum(0), (1, 0))


def stable_order(keys: Tensor, bound: int) -> Tensor:
    """Return `keys.argsort(stable=True)` for int64 keys [E] in [0, bound)."""
    if keys.device.type != "cpu":
        return keys.argsort(stable=True)
    return torch.from_numpy(sort_keys(keys.numpy(), bound)[1])


def sort_keys(keys: Ints, bound: int) -> tuple[Ints, Ints]:
    """Return the sorted keys and the stable order that sorts them, for int64 keys [E] in [0, bound).

    Key and position share one word, so that numpy's vectorised sort of words gives both: measured on one core,
    51,200 keys in 0.7 ms, against 0.9 for torch's argsort and 3.3 for numpy's stable one.
    """
    bits = max(len(keys) - 1, 1).bit_length()
    if max(bound, 1).bit_length() + bits > 63:
        order = keys.argsort(kind="stable")
        return keys[order], order
    words = np.sort((keys << bits) | np.arange(len(keys)))
    return words >> bits, words & ((1 << bits) - 1)


def distinct(values: Ints, bound: int) -> tuple[Ints, Ints, Selection]:
    """Return the distinct values in ascending order, the position of each value among them, and the matrix that sums by
    them.

    The matrix is [distinct, values]; its sums run in the order of the values, so that they repeat bitwise.
    """
    ordered, order = sort_keys(values, bound)
    new = np.ones(len(values), bool)
    np.not_equal(ordered[1:], ordered[:-1], out=new[1:])
    starts = np.flatnonzero(new)
    index = np.empty(len(values), np.int64)
    index[order] = np.cumsum(new) - 1
    matrix = (order, np.append(starts, len(values)), index, np.arange(len(values) + 1))
    return ordered[starts], index, Selection(*map(torch.from_numpy, matrix))


def select(columns: Tensor, lengths: Tensor | None, num_columns: int, weights: Tensor | None = None) -> Selection:
    """Return the matrix whose row i has entries at the next `lengths[i]` of `columns`; without `lengths`, one entry a
    row.

    `columns` int64 [E], `lengths` int64 [num_rows] summing to E, `weights` float [E] in the order of `columns`.
    """
    order = stable_order(columns, num_columns)
    if lengths is None:
        row_offsets = torch.arange(len(columns) + 1, device=columns.device)
        rows = order
    else:
        row_offsets = offsets_of(lengths)
        rows = torch.repeat_interleave(lengths, output_size=len(columns)).index_select(0, order)
    column_offsets = offsets_of(torch.bincount(columns, minlength=num_columns))
    column_weights = None if weights is None else weights.index_select(0, order)
    return Selection(columns, row_offsets, rows, column_offsets, weights, column_weights)


class _Product(torch.autograd.Function):
    """Compute S @ values + base. The derivative by the values is the product with S.T, whose derivative is this product
    again.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, selection: Selection, base: Tensor | None) -> Tensor:
        ctx.selection = selection
        weights = selection.row_weights
        out = F.embedding_bag(
            selection.columns,
            values,
            selection.row_offsets,
            mode="sum",
            per_sample_weights=None if weights is None else weights.to(values.dtype),
            include_last_offset=True,
        )
        return out if base is None else out.add_(base)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        by_values, _, by_base = ctx.needs_input_grad
        grad = product(grads[0], ctx.selection.transposed) if by_values else None
        return grad, None, grads[0] if by_base else None


def product(values: Tensor, selection: Selection, base: Tensor | None = None) -> Tensor:
    """Return S @ values, or S @ values + base: [num_columns, d] -> [num_rows, d]."""
    return _Product.apply(values.contiguous(), selection, base)  # type: ignore[no-any-return, no-untyped-call]


class _Cat(torch.autograd.Function):
    """Compute torch.cat such that its second derivative is one torch.cat too. In the built-in one it pads each part to
    full size.
    """

    @staticmethod
    def forward(ctx: Any, dim: int, *parts: Tensor) -> Tensor:
        ctx.dim, ctx.sizes = dim, [part.shape[dim] for part in parts]
        return torch.cat(parts, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *torch.split(grads[0], ctx.sizes, ctx.dim))


def cat(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Compute torch.cat for graphs that are differentiated twice. The parts have one dtype and number of dimensions.

    Measured on 20 parts of [128, 10, 16]: a factored second-order step took 83 ms of CPU with torch.cat, 62 with this.
    """
    return _Cat.apply(dim, *parts)  # type: ignore[no-any-return, no-untyped-call]


class _Outer(torch.autograd.Function):
    """Compute a @ b.mT such that the derivatives are products with a row-major result. torch's own go through b.mT."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return torch.bmm(a, b.mT)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        by_a, by_b = ctx.needs_input_grad
        return torch.bmm(grads[0], b) if by_a else None, torch.bmm(grads[0].mT, a) if by_b else None


def bmm_nt(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b.mT for batches of small matrices: [T, n, k], [T, m, k] -> [T, n, m].

    Measured on [128, 10, 320], one core: the derivative by b takes 0.2 ms, torch's own 2.0.
    """
    return _Outer.apply(a, b)  # type: ignore[no-any-return, no-untyped-call]
