"""How a model reads embedded features: one [..., d] for each, which it concatenates without a copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gmeta.core.batch import mask_of
from gmeta.core.selection import cat
from gmeta.meta.gather_plan import GatherPlan


class Embedded:
    """Handles one forward pass, in which features that lie side by side are concatenated, or stacked, as a view.

    `features` is the model's `embedded`: feature -> [*leading, d], from the values [n, W, d] of each table. A sequence
    is [*leading, L, d], and `embedded[name + ".mask"]` bool [*leading, L] says which of these are values. `given` is
    what examples carry for the model as it is. Measured on 20 features of [2560, 16], one core: torch.cat was a quarter
    of a plain training step, and half of that again in its backward.
    """

    def __init__(
        self,
        values: Mapping[str, Tensor],
        plan: GatherPlan,
        leading: tuple[int, ...],
        given: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.tables = {table: values[table].view(*leading, *values[table].shape[1:]) for table in plan.features}
        self.features: dict[str, Tensor] = {}
        self.positions: dict[int, tuple[str, int]] = {}
        for table, names in plan.features.items():
            sequences = [name for name in names if name in plan.masks]
            vectors = names[: len(names) - len(sequences)]
            if sequences:
                parts = torch.split(self.tables[table], [len(vectors), *plan.slots(sequences)], -2)
                self.tables[table] = parts[0]
                self.features.update(zip(sequences, parts[1:], strict=True))
            if vectors:
                self.features.update(zip(vectors, self.tables[table].unbind(-2), strict=True))
            self.positions.update((id(self.features[name]), (table, i)) for i, name in enumerate(vectors))
        for name, mask in plan.masks.items():
            self.features[mask_of(name)] = mask.view(*leading, mask.shape[-1])
        self.features.update(given or {})

    def handle(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return the result of a call of `torch.cat` or `torch.stack`, or NotImplemented."""
        if func not in _JOINS or not _is_plain(args, kwargs):
            return NotImplemented
        parts, stack = args[0], func is torch.stack
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % (parts[0].dim() + stack)
        if dim == parts[0].dim() - 1:  # along d; for a stack, just before it
            return self._join(parts, stack)
        return NotImplemented if stack else cat(parts, dim)

    def _join(self, parts: Sequence[Tensor], stack: bool) -> Tensor:
        pieces = []
        start = 0
        while start < len(parts):
            end = start + 1
            position = self.positions.get(id(parts[start]))
            if position is None:
                pieces.append(parts[start].unsqueeze(-2) if stack else parts[start])
            else:
                table, first = position
                while end < len(parts) and self.positions.get(id(parts[end])) == (table, first + end - start):
                    end += 1
                run = self.tables[table]
                if end - start < run.shape[-2]:  # the derivative of narrow fills a whole tensor with zeros
                    run = run.narrow(-2, first, end - start)
                pieces.append(run if stack else run.flatten(-2))
            start = end
        return pieces[0] if len(pieces) == 1 else cat(pieces, -2 if stack else -1)


_JOINS = {torch.cat, torch.concat, torch.concatenate, torch.stack}


def _is_plain(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call is `func(tensors, dim)`, with tensors of one dtype and number of dimensions."""
    if not kwargs.keys() <= {"dim"} or not args or not isinstance(args[0], list | tuple) or not args[0]:
        return False
    return len({(part.dtype, part.dim()) for part in args[0]}) == 1 and args[0][0].dim() > 0
