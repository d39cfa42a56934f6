"""Muon over partitions: momentum is kept in parts, and each matrix is orthogonalised by one rank, which gathers it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gmeta.sharding.flat_parameters import FlatParameter
from gmeta.sharding.hierarchy import HierarchicalCollectives
from gmeta.sharding.strategy import ShardScope

NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Factors of the powers 1, 3 and 5 of an iteration. It is steep at zero, so small singular values grow in few steps."""
_DEFAULTS = {
    "momentum": 0.95,
    "nesterov": True,
    "ns_steps": 5,
    "ns_coefficients": NS_COEFFICIENTS,
    "ns_eps": 1e-7,
    "ns_dtype": torch.bfloat16,
    "adjust_lr_fn": "original",
}


def orthogonalise(
    matrix: Tensor,
    steps: int = 5,
    coefficients: tuple[float, float, float] = NS_COEFFICIENTS,
    eps: float = 1e-7,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Return a matrix with the singular vectors of `matrix` [rows, columns] and singular values near 1 (most are from
    .5 to 1.5), in `dtype`, by Newton-Schulz iterations.
    """
    a, b, c = coefficients
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix).to(dtype)
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for groups with `use_muon`, AdamW for the others.

    A group with `use_muon` holds matrices, such as the weights of hidden layers: embeddings, output layers and vectors
    are for AdamW. Its options are those of `torch.optim.Muon` (`momentum`, `nesterov`, `ns_steps`, `ns_coefficients`,
    `adjust_lr_fn`: "original" or "match_rms_adamw"), `ns_eps`, and `ns_dtype`, in which matrices are orthogonalised;
    `weight_decay` and `maximize` are as in AdamW, so decay is 0.01 by default, not 0.1.
    Under `paro` the parameters are partitions; elsewhere they are whole, and the updates are the same.
    """

    def __init__(self, params: Any, lr: float = 1e-3, **options: Any) -> None:
        self.shapes: dict[Tensor, torch.Size] = {}
        self.used: frozenset[str] = frozenset()  # names of what gets an update in this step, set by the engine
        self._exchange: MatrixExchange | None = None
        self._names: dict[Tensor, str] = {}
        super().__init__(params, lr=lr, **options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group. ValueError names a shape that is no matrix, or an unknown `adjust_lr_fn`."""
        if param_group.get("use_muon"):
            param_group = _DEFAULTS | param_group
            if param_group["adjust_lr_fn"] not in ("original", "match_rms_adamw"):
                raise ValueError(
                    f"adjust_lr_fn is {param_group['adjust_lr_fn']!r}: must be original or match_rms_adamw"
                )
        super().add_param_group(param_group)
        if param_group.get("use_muon"):
            for param in self.param_groups[-1]["params"]:
                if param.ndim != 2:
                    raise ValueError(
                        f"Muon updates matrices, and a parameter of shape {list(param.shape)} is in a group with "
                        "use_muon: put it into a group of its own, which AdamW updates"
                    )
                self.shapes[param] = param.shape

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy is made of; the exchange, which knows names alone, is shared by all copies."""
        own = {"shapes": self.shapes, "used": self.used, "_exchange": self._exchange, "_names": self._names}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what `__getstate__` gave, or the groups and state that `load_state_dict` has read. ValueError where the
        latter are not of a `Muon` with the same groups.
        """
        torch.optim.Optimizer.__setstate__(self, state)  # AdamW's looks for its own state of every parameter
        loaded = {param for group in self.param_groups if group.get("use_muon") for param in group["params"]}
        if loaded != self.shapes.keys():
            raise ValueError(
                "the state is of an optimizer with other groups: use_muon differs for "
                f"{len(loaded ^ self.shapes.keys())} parameters; make the groups as they were when it was saved"
            )

    def bind(self, exchange: MatrixExchange, names: Mapping[Tensor, str]) -> None:
        """Take partitions for parameters from now on: `names` are theirs, `exchange` brings matrices together."""
        self._exchange, self._names = exchange, dict(names)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one update of the parameters that have a gradient. Collective where parameters are partitions."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = [(param, param.grad) for param in self.shapes]
        self._step_matrices()
        for param in self.shapes:  # the others are AdamW's
            param.grad = None
        inspect.unwrap(torch.optim.AdamW.step)(self)  # as it is wrapped it would call the hooks of this step again
        for param, gradient in gradients:
            param.grad = gradient
        return loss

    def _step_matrices(self) -> None:
        groups = {param: group for group in self.param_groups if group.get("use_muon") for param in group["params"]}
        directions = {}
        for param, group in groups.items():
            if param.grad is not None:
                gradient, state = -param.grad if group["maximize"] else param.grad, self.state[param]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(gradient)
                momentum = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
                directions[param] = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        for param, update in self._orthogonalised(directions, groups).items():
            group, (rows, columns) = groups[param], self.shapes[param]
            longest, ratio = max(rows, columns), max(1.0, rows / columns)
            factor = math.sqrt(ratio) if group["adjust_lr_fn"] == "original" else 0.2 * math.sqrt(longest)
            lr = float(group["lr"])
            param.mul_(1 - lr * group["weight_decay"])
            param.add_(update.view(param.shape), alpha=-lr * factor)

    def _orthogonalised(
        self, directions: Mapping[Tensor, Tensor], groups: Mapping[Tensor, Mapping[str, Any]]
    ) -> dict[Tensor, Tensor]:
        def orthogonal(param: Tensor, matrix: Tensor) -> Tensor:
            options = (groups[param][f"ns_{name}"] for name in ("steps", "coefficients", "eps", "dtype"))
            return orthogonalise(matrix, *options).to(matrix.dtype)

        if self._exchange is None:
            return {param: orthogonal(param, direction) for param, direction in directions.items()}
        by_name = {self._names[param]: param for param in groups}
        pieces = {self._names[param]: direction for param, direction in directions.items()}
        used, self.used = by_name.keys() & self.used, frozenset()
        solved = self._exchange.apply(used, pieces, lambda name, matrix: orthogonal(by_name[name], matrix))
        return {by_name[name]: piece for name, piece in solved.items()}


@dataclass(frozen=True)
class _Matrix:
    """A matrix whose elements are spread over the ranks of a group."""

    name: str
    shape: torch.Size
    parts: tuple[tuple[int, int, int], ...]  # (position of a rank, first element, one after the last), where not empty

    @property
    def cost(self) -> int:
        """Return a number in proportion to the time of an iteration."""
        return math.prod(self.shape) * min(self.shape)


@dataclass
class _Group:
    """The matrices that are spread over one group of ranks, and who orthogonalises which."""

    ranks: dist.ProcessGroup | None  # None where one rank has them whole
    size: int
    position: int
    matrices: list[_Matrix] = field(default_factory=list)
    owners: dict[str, int] = field(default_factory=dict)  # by name: position of the rank

    def assign(self) -> None:
        """Give each matrix, the costliest first, to the rank that has least to do."""
        load = [0] * self.size
        for matrix in sorted(self.matrices, key=lambda matrix: (-matrix.cost, matrix.name)):
            owner = load.index(min(load))
            self.owners[matrix.name] = owner
            load[owner] += matrix.cost


class MatrixExchange:
    """Brings the parts of each matrix together at one rank, its owner, and sends parts of the result back.

    A rank holds, beside its parts, the matrices that it owns, which are about as large as its parts: an owner is chosen
    for each matrix so that ranks have as much to compute. Ranks that have a matrix whole compute it each for itself.
    """

    def __init__(self, flats: Iterable[FlatParameter], hierarchy: HierarchicalCollectives) -> None:
        self._hierarchy = hierarchy
        self._groups: dict[tuple[ShardScope, torch.dtype], _Group] = {}
        for flat in flats:
            if flat.master is not None:
                scope = flat.strategy.state
                group = self._groups.setdefault((scope, flat.master.dtype), self._open(scope))
                for span in flat.spans:
                    if len(span.shape) == 2 and span.stop > span.start:
                        parts = self._parts(flat.size, scope, group, span.start, span.stop)
                        group.matrices.append(_Matrix(span.name, span.shape, parts))
        for group in self._groups.values():
            group.assign()

    def __deepcopy__(self, memo: dict[int, Any]) -> MatrixExchange:
        """Return the same one: process groups cannot be copied."""
        return self

    def _open(self, scope: ShardScope) -> _Group:
        ring = {"N": None, "I": self._hierarchy.rings.intra, "G": self._hierarchy.rings.world}[scope]
        return _Group(None, 1, 0) if ring is None else _Group(ring.group, ring.size, ring.position)

    def _parts(
        self, size: int, scope: ShardScope, group: _Group, start: int, stop: int
    ) -> tuple[tuple[int, int, int], ...]:
        """Return which elements, counted from `start`, of `start` to `stop` in a buffer of `size` each rank has."""
        found = []
        for position in range(group.size):
            node, local_rank = divmod(position, self._hierarchy.layout.node_size) if scope == "G" else (0, position)
            own = self._hierarchy.partition(size, scope, node, local_rank)
            first, last = max(own.start, start), min(own.stop, stop)
            if first < last:
                found.append((position, first - start, last - start))
        return tuple(found)

    def apply(
        self, names: AbstractSet[str], pieces: Mapping[str, Tensor], solve: Callable[[str, Tensor], Tensor]
    ) -> dict[str, Tensor]:
        """Return this rank's parts, flattened, of `solve(name, matrix)` for matrices `names`, which all ranks give
        alike. Collective.

        `pieces` are this rank's flattened parts of the matrices; a name of which it has nothing is missing.
        """
        found: dict[str, Tensor] = {}
        for (_, dtype), group in self._groups.items():
            used = [matrix for matrix in group.matrices if matrix.name in names]
            if group.ranks is None:
                for matrix in used:
                    found[matrix.name] = solve(matrix.name, pieces[matrix.name].view(matrix.shape)).flatten()
            elif used:
                found |= self._solve_in_turn(group, dtype, used, pieces, solve)
        return found

    def _solve_in_turn(
        self,
        group: _Group,
        dtype: torch.dtype,
        used: Sequence[_Matrix],
        pieces: Mapping[str, Tensor],
        solve: Callable[[str, Tensor], Tensor],
    ) -> dict[str, Tensor]:
        device = self._hierarchy.rings.helper.device
        everyone, owners = range(group.size), group.owners
        # What goes from rank to rank, matrix by matrix, in one order on both sides: to owners, and later back.
        held = [[m for m in used if owners[m.name] == owner and m.name in pieces] for owner in everyone]
        mine = [matrix for matrix in used if owners[matrix.name] == group.position]
        wanted = [[(m, start, stop) for m in mine for rank, start, stop in m.parts if rank == q] for q in everyone]
        sizes = [sum(stop - start for _, start, stop in parts) for parts in wanted]
        sent = [[pieces[matrix.name] for matrix in matrices] for matrices in held]
        received = self._swap(group, sent, torch.empty(sum(sizes), dtype=dtype, device=device), sizes)
        wholes = {matrix.name: torch.empty(matrix.shape, dtype=dtype, device=device) for matrix in mine}
        for parts, run in zip(wanted, torch.split(received, sizes), strict=True):
            for (matrix, start, stop), part in zip(
                parts, torch.split(run, [stop - start for _, start, stop in parts]), strict=True
            ):
                wholes[matrix.name].view(-1)[start:stop] = part
        solved = {name: solve(name, whole).flatten() for name, whole in wholes.items()}
        back = [[solved[matrix.name][start:stop] for matrix, start, stop in parts] for parts in wanted]
        sizes = [sum(piece.numel() for piece in parts) for parts in sent]
        received = self._swap(group, back, torch.empty(sum(sizes), dtype=dtype, device=device), sizes)
        found: dict[str, Tensor] = {}
        for matrices, run in zip(held, torch.split(received, sizes), strict=True):
            lengths = [pieces[matrix.name].numel() for matrix in matrices]
            found |= {matrix.name: part for matrix, part in zip(matrices, torch.split(run, lengths), strict=True)}
        return found

    def _swap(self, group: _Group, sent: Sequence[Sequence[Tensor]], into: Tensor, sizes: Sequence[int]) -> Tensor:
        """Send each rank its tensors, and fill `into` with `sizes` elements from each; returns it."""
        runs = [torch.cat(list(tensors)) if tensors else into.new_empty(0) for tensors in sent]
        with self._hierarchy.naming_lost_peers():
            lengths = [run.numel() for run in runs]
            dist.all_to_all_single(into, torch.cat(runs), list(sizes), lengths, group=group.ranks)
        self._count(group, runs)
        return into

    def _count(self, group: _Group, runs: Sequence[Tensor]) -> None:
        m = self._hierarchy.layout.node_size
        for position, run in enumerate(runs):
            if position == group.position:
                continue
            if group.size == m or position // m == group.position // m:
                self._hierarchy.sent.intra += run.nbytes
            else:
                self._hierarchy.sent.inter += run.nbytes
