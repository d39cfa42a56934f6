"""What a task's adaptation changed, as plain tensors: made by `adapt`, read by `score`, stored by whoever serves."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gmeta.meta.modulation import Modulated


class LinearSite(NamedTuple):
    """A call of `F.linear` with an adapted weight, an adapted bias, or both: their names in the model."""

    weight: str | None
    bias: str | None

    @property
    def name(self) -> str:
        """Return the parameter that messages and inner rates go by."""
        return self.weight or self.bias or ""


@dataclass(frozen=True, slots=True)
class LowRankUpdate:
    """What one inner step changed at a site: W by `gradients^T inputs`, b by the sum of `gradients` over R."""

    inputs: Tensor  # A [T, R, in]
    gradients: Tensor  # -rate * D [T, R, out]


@dataclass(frozen=True, slots=True)
class Posterior:
    """The normal posterior of T tasks' last layers, (weight, bias), D numbers each."""

    mean: Tensor  # [T, D]
    spread: Tensor  # F [T, D, D], whose F F^T is the covariance

    def tensors(self) -> list[Tensor]:
        """Return the tensors, in the order of the fields."""
        return [self.mean, self.spread]


@dataclass(frozen=True, slots=True)
class FastWeights:
    """The adapted state of T tasks: plain tensors and names, no graph of its own and nothing of the model.

    The factored engine fills `updates`, `modulation` and, for element-wise parameters, `values`. The reference engine
    fills `values` with whole parameters. Both fill `deltas`: delta p belongs to `pairs[table][p]`, a (task, row). The
    closed form fills `posterior`.
    """

    num_tasks: int
    updates: dict[LinearSite, tuple[LowRankUpdate, ...]] = field(default_factory=dict)  # one for each inner step
    values: dict[str, Tensor] = field(default_factory=dict)  # parameter -> the tasks' own values [T, *shape]
    deltas: dict[str, Tensor] = field(default_factory=dict)  # table -> change of the tasks' private rows [P, d]
    pairs: dict[str, Tensor] = field(default_factory=dict)  # table -> int64 [P, 2]: position of the task, row
    modulation: dict[str, Modulated] = field(default_factory=dict)  # where the tasks' linear layers started
    posterior: Posterior | None = None  # of the tasks' last layers, where they were solved for

    def tensors(self) -> list[Tensor]:
        """Return all tensors that gradients flow through, in an order that `filled` knows."""
        parts = [
            tensor for steps in self.updates.values() for step in steps for tensor in (step.inputs, step.gradients)
        ]
        starts = [tensor for start in self.modulation.values() for tensor in start.tensors()]
        solved = [] if self.posterior is None else self.posterior.tensors()
        return [*parts, *self.values.values(), *self.deltas.values(), *starts, *solved]

    def filled(self, tensors: Iterator[Tensor]) -> FastWeights:
        """Return the same state with other tensors instead of `tensors()`."""
        return FastWeights(
            self.num_tasks,
            {
                site: tuple(LowRankUpdate(next(tensors), next(tensors)) for _ in steps)
                for site, steps in self.updates.items()
            },
            {name: next(tensors) for name in self.values},
            {table: next(tensors) for table in self.deltas},
            self.pairs,
            {layer: start.filled(tensors) for layer, start in self.modulation.items()},
            None if self.posterior is None else Posterior(next(tensors), next(tensors)),
        )

    def detach(self) -> FastWeights:
        """Return the same state without a graph."""
        return self.filled(tensor.detach() for tensor in self.tensors())

    def with_row_ids(self, row_ids: Mapping[str, Tensor]) -> FastWeights:
        """Return the same state whose pairs name rows by id: `row_ids[table]` int64 [U] are those of the rows
        fetched.
        """
        pairs = {
            table: torch.stack([keys[:, 0], row_ids[table].to(keys.device)[keys[:, 1]]], 1)
            for table, keys in self.pairs.items()
        }
        return replace(self, pairs=pairs)

    def of_tasks(self, positions: Sequence[int]) -> FastWeights:
        """Return the state of the tasks at `positions`, in that order. A position may come twice. The tensors are
        copies.

        IndexError for a position outside 0 to T - 1.
        """
        for position in positions:
            if not 0 <= position < self.num_tasks:
                raise IndexError(f"task {position} of fast weights that hold {self.num_tasks} tasks")
        chosen = torch.tensor(list(positions), dtype=torch.int64)
        deltas, pairs = {}, {}
        for table, keys in self.pairs.items():
            which = chosen.to(keys.device)
            order = keys[:, 0].argsort(stable=True)
            counts = torch.bincount(keys[:, 0], minlength=self.num_tasks)
            starts, sizes = (counts.cumsum(0) - counts)[which], counts[which]
            task = torch.repeat_interleave(sizes)
            within = torch.arange(len(task), device=keys.device) - (sizes.cumsum(0) - sizes)[task]
            found = order[starts[task] + within]
            pairs[table] = torch.stack([task, keys[found, 1]], 1)
            if table in self.deltas:
                deltas[table] = self.deltas[table][found]
        rest = replace(self, deltas={})
        taken = rest.filled(tensor[chosen.to(tensor.device)] for tensor in rest.tensors())
        return replace(taken, num_tasks=len(chosen), deltas=deltas, pairs=pairs)

    @staticmethod
    def join(parts: Sequence[FastWeights]) -> FastWeights:
        """Return the tasks of all parts as one state, in order. ValueError when the parts are of different inner
        loops.
        """
        if len({_form(part) for part in parts}) != 1:
            raise ValueError(
                f"cannot join {len(parts)} fast weights of different inner loops: adapt all tasks with one model, one "
                "engine and one number of steps"
            )
        first = parts[0]
        pairs = {}
        for table in first.pairs:
            start, shifted = 0, []
            for part in parts:
                shifted.append(part.pairs[table] + torch.tensor([start, 0], device=part.pairs[table].device))
                start += part.num_tasks
            pairs[table] = torch.cat(shifted)
        updates = {}
        for site, steps in first.updates.items():
            longest = max(part.updates[site][0].inputs.shape[1] for part in parts) if steps else 0
            updates[site] = tuple(
                LowRankUpdate(
                    torch.cat([_padded(part.updates[site][step].inputs, longest) for part in parts]),
                    torch.cat([_padded(part.updates[site][step].gradients, longest) for part in parts]),
                )
                for step in range(len(steps))
            )
        modulation = {
            layer: start_of.filled(
                map(torch.cat, zip(*(part.modulation[layer].tensors() for part in parts), strict=True))
            )
            for layer, start_of in first.modulation.items()
        }
        posteriors = [part.posterior for part in parts if part.posterior is not None]
        return FastWeights(
            sum(part.num_tasks for part in parts),
            updates,
            {name: torch.cat([part.values[name] for part in parts]) for name in first.values},
            {table: torch.cat([part.deltas[table] for part in parts]) for table in first.deltas},
            pairs,
            modulation,
            Posterior(*map(torch.cat, zip(*(p.tensors() for p in posteriors), strict=True))) if posteriors else None,
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything as one flat dict of tensors, for `torch.save` or safetensors; `from_state_dict` reads
        it.
        """
        out = {"num_tasks": torch.tensor([self.num_tasks])}
        for site, steps in self.updates.items():
            for step, update in enumerate(steps):
                out[_key("inputs", step, *site)] = update.inputs
                out[_key("gradients", step, *site)] = update.gradients
        for kind, tensors in (("values", self.values), ("deltas", self.deltas), ("pairs", self.pairs)):
            out |= {_key(kind, name): tensor for name, tensor in tensors.items()}
        for layer, start in self.modulation.items():
            out[_key("scale", layer)] = start.scale
            if start.shift is not None:
                out[_key("shift", layer)] = start.shift
        if self.posterior is not None:
            out |= {_key("posterior", "mean"): self.posterior.mean, _key("posterior", "spread"): self.posterior.spread}
        return {name: tensor.contiguous() for name, tensor in out.items()}

    @staticmethod
    def from_state_dict(state: Mapping[str, Tensor]) -> FastWeights:
        """Return the fast weights that `state_dict` wrote, whatever the order of its entries."""
        found: dict[str, dict[tuple[int | str | None, ...], Tensor]] = {}
        for key, tensor in state.items():
            if key != "num_tasks":
                kind, *name = json.loads(key)
                found.setdefault(kind, {})[tuple(name)] = tensor
        inputs, gradients = found.get("inputs", {}), found.get("gradients", {})
        updates: dict[LinearSite, tuple[LowRankUpdate, ...]] = {}
        for step, weight, bias in sorted(inputs, key=lambda name: int(name[0] or 0)):
            site = LinearSite(*(None if name is None else str(name) for name in (weight, bias)))
            update = LowRankUpdate(inputs[step, weight, bias], gradients[step, weight, bias])
            updates[site] = (*updates.get(site, ()), update)
        plain = {
            kind: {str(name): tensor for (name,), tensor in found.get(kind, {}).items()}
            for kind in ("values", "deltas", "pairs", "scale", "shift", "posterior")
        }
        modulation = {layer: Modulated(scale, plain["shift"].get(layer)) for layer, scale in plain["scale"].items()}
        num_tasks = int(state["num_tasks"])
        posterior = Posterior(**plain["posterior"]) if plain["posterior"] else None
        return FastWeights(num_tasks, updates, plain["values"], plain["deltas"], plain["pairs"], modulation, posterior)


def _form(fast: FastWeights) -> object:
    """Return what two states must share to be joined."""
    updates = frozenset((site, len(steps)) for site, steps in fast.updates.items())
    shifts = frozenset((layer, start.shift is None) for layer, start in fast.modulation.items())
    solved = fast.posterior is not None
    return updates, frozenset(fast.values), frozenset(fast.deltas), frozenset(fast.pairs), shifts, solved


def _padded(rows: Tensor, length: int) -> Tensor:
    """Pad with rows of zeros, which change nothing: [T, R, n] -> [T, length, n]."""
    return F.pad(rows, (0, 0, 0, length - rows.shape[1]))


def _key(kind: str, *name: int | str | None) -> str:
    return json.dumps([kind, *name])
