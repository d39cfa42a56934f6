"""Low-rank adapters (LoRA: Hu et al., 2106.09685) for the linear layers of a part that is otherwise frozen.

Both matrices are plain `nn.Linear` modules, so that whatever adapts linear layers, such as the factored inner loop,
adapts them too, by their own names.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from gmeta.core.errors import require


class LoraLinear(nn.Module):
    """A frozen linear layer and what is learned on top of it: `base(x) + alpha / rank * up(down(x))`.

    `up` begins at zero, so that the layer begins as it was.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, generator: torch.Generator | None = None) -> None:
        super().__init__()
        place = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False, **place)
        self.up = nn.Linear(rank, base.out_features, bias=False, **place)
        self.scale = alpha / rank
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5), generator=generator)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output: [..., in] -> [..., out]."""
        base: Tensor = self.base(x)
        update: Tensor = self.up(self.down(x))
        return base + self.scale * update

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Return the base with the update added to its weight; it is changed in place."""
        self.base.weight += self.scale * (self.up.weight @ self.down.weight)
        return self.base


def add_lora(
    module: nn.Module,
    rank: int,
    *,
    alpha: float | None = None,
    targets: Sequence[str] = (),
    generator: torch.Generator | None = None,
) -> list[str]:
    """Freeze `module` and put a `LoraLinear` in place of its linear layers; return the names of these, in order.

    `targets` are the last parts of the names that get one, such as q_proj; none means all. `alpha` is twice the rank
    where it is None. Draws come from `generator`, or torch's own. Raises ValueError for a rank out of range, for a
    target that no linear layer is called, and where there is an adapter already.
    """
    require(rank >= 1, "rank", rank, "must be at least 1")
    if any(True for _ in _adapters(module)):
        raise ValueError("the module has adapters already: merge them first, or take a fresh one")
    found = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    last = {name.rpartition(".")[2] for name, _ in found}
    for target in targets:
        require(target in last, "targets", target, f"there is: {', '.join(sorted(last))}")
    chosen = [(name, layer) for name, layer in found if not targets or name.rpartition(".")[2] in targets]
    require(bool(chosen), "module", type(module).__name__, "it has no linear layer to adapt")
    module.requires_grad_(False)
    for name, layer in chosen:
        adapter = LoraLinear(layer, rank, 2.0 * rank if alpha is None else alpha, generator)
        _put(module, name, adapter.train(layer.training))
    return [name for name, _ in chosen]


def merge_lora(module: nn.Module) -> None:
    """Fold every adapter of `module` into its layer: the same outputs without the adapters. All stays frozen."""
    for name, adapter in list(_adapters(module)):
        _put(module, name, adapter.merged())


def _adapters(module: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    return ((name, part) for name, part in module.named_modules() if isinstance(part, LoraLinear))


def _put(module: nn.Module, name: str, part: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(module.get_submodule(parent), child, part)
