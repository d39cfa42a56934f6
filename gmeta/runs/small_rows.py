"""Embedding rows in fewer bytes: what a bundle that is only served may hold."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

RowFormat = Literal["exact", "fp16", "int8"]
_STEPS = 127
_SCALE = "scale"


def packed(rows: Tensor, name: str, kind: RowFormat) -> dict[str, Tensor]:
    """Return what a file holds for rows [n, d]: `name`, and for int8 a scale for each row, float32 [n, 1].

    int8 rounds each row to 255 steps between its largest number and minus that. Raises ValueError for numbers that fp16
    cannot hold, or that are not finite.
    """
    if kind == "exact":
        return {name: rows}
    if not rows.isfinite().all() or (kind == "fp16" and not rows.half().isfinite().all()):
        raise ValueError(f"rows is {kind!r}, and a table holds {rows.abs().max():g}: keep its rows exact")
    if kind == "fp16":
        return {name: rows.half()}
    scale = rows.abs().amax(1, keepdim=True).float() / _STEPS
    steps = (rows / torch.where(scale > 0, scale, 1)).round().clamp(-_STEPS, _STEPS)
    return {name: steps.to(torch.int8), _SCALE: scale}


def unpacked(stored: dict[str, Tensor], name: str, ids: Tensor) -> Tensor:
    """Return rows [n, d] of what `packed` made, in a type that models compute in."""
    rows = stored[name].index_select(0, ids)
    if rows.dtype == torch.int8:
        return rows.float() * stored[_SCALE].index_select(0, ids)
    return rows.float() if rows.dtype == torch.float16 else rows
