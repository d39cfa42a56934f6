"""What `gmeta export` writes: a model as a function of plain tensors, encoded as a run encodes them.

There are two. `Unadapted` scores examples as the model does before it has seen a task's support. `GivenState` scores
examples of tasks that were adapted elsewhere, from the tensors of `FastWeights.state_dict`: the low-rank updates of the
factored engine, its element-wise parameters, a task's own embedding rows, and the posterior of a last layer. Shapes
have names, and are dynamic.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmeta.core.batch import mask_of
from gmeta.data.schema import OOV
from gmeta.meta import closed_form
from gmeta.meta.factored import AdaptedPass
from gmeta.meta.fast_weights import FastWeights, LinearSite
from gmeta.meta.interception import Intercept
from gmeta.meta.losses import prediction
from gmeta.recommender.recommender import Recommender

OUTPUTS = ("logit", "prediction")
_SAMPLE = 3
"""A named dimension has this size while a graph is traced, plus its place among the names: no two are alike."""


@dataclass(frozen=True)
class Input:
    """An input of a graph. Dimensions are names, which stand for any size, or numbers."""

    name: str
    dims: tuple[str | int, ...]
    dtype: torch.dtype
    about: Mapping[str, Any]  # which feature, which columns, or which tensor of the fast weights

    def sample(self, sizes: Mapping[str, int]) -> Tensor:
        """Return a tensor to trace with: ids are 0, and lengths, and other numbers small."""
        shape = [sizes[dim] if isinstance(dim, str) else dim for dim in self.dims]
        return torch.zeros(shape, dtype=self.dtype)

    def describe(self) -> dict[str, Any]:
        """Return what export.json says."""
        kind = str(self.dtype).removeprefix("torch.")
        return {"name": self.name, "shape": list(self.dims), "dtype": kind, **self.about}


class _Encoded(nn.Module):
    """The model with its tables in the order of ids, on encoded examples whose first dimensions are `leading`."""

    def __init__(self, rec: Recommender, leading: tuple[str, ...]) -> None:
        super().__init__()
        system = rec.system
        self.leading = leading
        self.learner, self.loss = system.learner, rec.config.loss
        self.generated = system.generated
        self.num_numeric = system.num_numeric - len(system.generated)
        self.tables, self.positions = nn.ParameterList(), nn.ParameterList()
        self.aligned = {feature.name: feature.aligned for feature in rec.schema.features}
        self.features: dict[str, tuple[int, str | None]] = {}  # feature -> number of its table, how it is pooled
        self.table_names: list[str] = []
        self.fused_names: list[str] = []
        for fused in system.tables.fused.values():
            for spec in fused.specs:
                for feature, pooling in spec.features.items():
                    self.features[feature] = len(self.tables), pooling
                at = fused.permutation.forward(torch.arange(spec.num_ids) + fused.offsets[spec.name])
                self.positions.append(nn.Parameter(at, requires_grad=False))  # by which fast weights name rows
                self.tables.append(nn.Parameter(fused.weight[at].detach(), requires_grad=False))
                self.table_names.append(spec.name)
                self.fused_names.append(fused.name)
        self.of_examples = [*self._of_features(), *self._of_numbers(rec)]

    def _of_features(self) -> list[Input]:
        found, leading = [], self.leading
        for name in self.learner.features:
            number, pooling = self.features[name]
            about = {"feature": name, "table": self.table_names[number], "oov": OOV}
            if pooling is None:
                found.append(Input(f"ids_{name}", leading, torch.int64, about))
                continue
            about = {**about, "pooling": pooling}
            length = f"len_{self.aligned.get(name) or name}"
            found.append(Input(f"ids_{name}", (*leading, length), torch.int64, about))
            found.append(Input(f"lengths_{name}", leading, torch.int64, {"lengths_of": f"ids_{name}"}))
        return found

    def _of_numbers(self, rec: Recommender) -> list[Input]:
        if not self.num_numeric:
            return []
        columns = [column.name for column in rec.schema.numeric[: self.num_numeric]]
        return [Input("dense", (*self.leading, self.num_numeric), rec.system.dtype, {"columns": columns})]

    def inputs_of_model(
        self, tensors: Sequence[Tensor], own: Mapping[str, tuple[Tensor, Tensor]] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return `dense` and `embedded`, as a model reads them, from tensors in the order of `of_examples`.

        `own` has of each fused table the rows that tasks have changed, [T, K], -1 where there is none, and by what,
        [T, K, d].
        """
        given = dict(zip((one.name for one in self.of_examples), tensors, strict=True))
        embedded = {}
        for name in self.learner.features:
            number, pooling = self.features[name]
            ids = given[f"ids_{name}"]
            rows = F.embedding(ids, self.tables[number])
            if own is not None and name in self.learner.adapted.features:
                rows = rows + _changes(self.positions[number][ids], *own[self.fused_names[number]])
            if pooling is not None:
                lengths = given[f"lengths_{name}"].unsqueeze(-1)
                present = torch.arange(ids.shape[-1], device=ids.device) < lengths
                rows = rows * present.unsqueeze(-1).to(rows.dtype)
                if pooling == "none":
                    embedded[mask_of(name)] = present
                else:
                    rows = rows.sum(-2)
                    rows = rows / lengths.clamp(min=1).to(rows.dtype) if pooling == "mean" else rows
            embedded[name] = rows
        first = embedded[next(name for name in self.learner.features)]
        dense = given.get("dense", first.new_zeros(*first.shape[: len(self.leading)], 0))
        if self.generated:
            unknown = torch.stack([given[f"ids_{name}"] == OOV for name in self.generated], -1)
            dense = torch.cat([dense, unknown.to(dense.dtype)], -1)
        return dense, embedded

    def outputs(self, logit: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logit, and what `gmeta predict` calls the score."""
        return logit, prediction(self.loss)(logit)


class Unadapted(nn.Module):
    """Encoded examples [N] -> (logit [N], prediction [N]) of tasks of which nothing is known."""

    def __init__(self, rec: Recommender) -> None:
        super().__init__()
        self.encoded = _Encoded(rec, ("N",))
        self.inputs = self.encoded.of_examples

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """Return (logit [N], prediction [N]) from tensors in the order of `inputs`."""
        encoded, learner = self.encoded, self.encoded.learner
        dense, embedded = encoded.inputs_of_model(tensors)
        layer = learner.last_layer
        if layer is None:
            return encoded.outputs(learner.model(dense, embedded))
        with closed_form.recording(layer) as calls:
            learner.model(dense, embedded)
        bases, logits = calls.bases[0].unsqueeze(0), calls.outputs[0].unsqueeze(0)
        if learner.loss_name == "bce":
            prior = closed_form.prior_of(layer, 1)
            logits = closed_form.averaged(logits, closed_form.deviation(prior, bases))
        return encoded.outputs(closed_form.finished(learner.model, logits).squeeze(0))


class GivenState(nn.Module):
    """State of T tasks, and encoded examples [T, Q] of them -> (logit [T, Q], prediction [T, Q])."""

    def __init__(self, rec: Recommender) -> None:
        super().__init__()
        require_exportable_state(rec)
        self.encoded = _Encoded(rec, ("T", "Q"))
        self.adapted = rec.system.learner.adapted.parameters
        like = rec._without_support(1).state_dict()
        self.keys = [key for key in like if key != "num_tasks"]
        rest = {key: like[key] for key in like if _kind(key) not in ("pairs", "deltas")}
        self.like = FastWeights.from_state_dict(rest)
        names = {id(tensor): key for key, tensor in rest.items()}
        self.order = [names[id(tensor)] for tensor in self.like.tensors()]
        self.of_state = [_of_state(f"state_{number}", key, like[key]) for number, key in enumerate(self.keys)]
        self.inputs = [*self.of_state, *self.encoded.of_examples]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """Return (logit [T, Q], prediction [T, Q]) from tensors in the order of `inputs`."""
        encoded, learner = self.encoded, self.encoded.learner
        state = dict(zip(self.keys, tensors, strict=False))
        own = _own_rows(state)
        dense, embedded = encoded.inputs_of_model(tensors[len(self.keys) :], own)
        fast = self.like.filled(state[key] for key in self.order)
        leading = next(iter(embedded.values())).shape[:2]
        handler = _Updated(AdaptedPass(learner.model, self.adapted, fast, (leading[0], leading[1])), fast)
        layer = learner.last_layer
        if layer is None:
            with Intercept(handler):
                return encoded.outputs(learner.model(dense, embedded))
        with closed_form.recording(layer) as calls, Intercept(handler):
            learner.model(dense, embedded)
        assert fast.posterior is not None
        logits = closed_form.shifted(layer, fast.posterior, calls.bases[0], calls.outputs[0])
        if learner.loss_name == "bce":
            logits = closed_form.averaged(logits, closed_form.deviation(fast.posterior, calls.bases[0]))
        return encoded.outputs(closed_form.finished(learner.model, logits))


class _Updated:
    """Handles a forward pass as `AdaptedPass` does, but never forms a task's weight: which is cheaper depends on sizes
    that a graph does not know.
    """

    def __init__(self, other: AdaptedPass, fast: FastWeights) -> None:
        self.other, self.fast = other, fast

    def handle(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return the call's result, or NotImplemented for a call that has no adapted parameter."""
        if func is F.linear:
            return self._linear(*args, **kwargs)
        return self.other.handle(func, args, kwargs)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        site = LinearSite(self.other.names.get(id(weight)), self.other.names.get(id(bias)))
        if site not in self.fast.updates:
            return NotImplemented
        out = F.linear(input, weight, bias)
        for step in self.fast.updates[site]:  # input [T, Q, in], inputs [T, R, in], gradients [T, R, out]
            mix = torch.ones_like(input[..., :1]) @ torch.zeros_like(step.inputs[..., :1]).mT
            if site.weight is not None:
                mix = input @ step.inputs.mT
            out = out + (mix if site.bias is None else mix + 1) @ step.gradients
        return out


def require_exportable_state(rec: Recommender) -> None:
    """Raise ValueError, with the reason and what can be exported, unless a run's states can be scored in a graph."""
    learner = rec.system.learner
    cure = "export the unadapted model alone with --score false, or score states with gmeta.load"
    if not learner.adapted:
        raise ValueError("the run adapts nothing (meta.adapt []), so there is no state to score: say --score false")
    if learner.engine == "reference" and learner.adapted.steps:
        raise ValueError(
            f"the run adapts by the reference engine ({learner.engine_reason}), whole layers a task: {cure}"
        )


def require_exportable_model(rec: Recommender) -> None:
    """Raise ValueError where a graph would lack what the model reads, or where a task's layers do not start from what
    the model has.
    """
    learner = rec.system.learner
    if carried := [*learner.vectors, *(learner.sequences.keys() - learner.features.keys())]:
        raise ValueError(
            f"the model reads {min(carried)!r}, vectors or numbers that exported graphs have no input for yet; serve "
            "the run with gmeta.load, or train without it (model.features)"
        )
    if learner.texts:
        raise ValueError(
            f"the model reads the texts of {min(learner.texts)!r}, which exported graphs have no input for yet; serve "
            "the run with gmeta.load or gmeta serve"
        )
    if learner.routes:
        raise ValueError(
            f"the model routes examples by {min(learner.routes)!r}, whose id exported graphs have no input for yet; "
            "serve the run with gmeta.load or gmeta serve"
        )
    if rec.system.learner.modulator is not None:
        kind = rec.config.meta.modulation
        raise ValueError(
            f"meta.modulation is {kind!r}: where a task's layers start is computed from its support, which no exported "
            "graph sees; serve the run with gmeta.load, or train with --meta.modulation none"
        )


def trace(graph: Unadapted | GivenState, model: str) -> torch.export.ExportedProgram:
    """Return a graph with dynamic sizes. ValueError where the model's code cannot be traced."""
    names = dict.fromkeys(dim for one in graph.inputs for dim in one.dims if isinstance(dim, str))
    sizes = {name: _SAMPLE + place for place, name in enumerate(names)}
    dims = {name: torch.export.Dim(f"size_{place}", min=1) for place, name in enumerate(names)}
    shapes = tuple({at: dims[dim] for at, dim in enumerate(one.dims) if isinstance(dim, str)} for one in graph.inputs)
    try:
        with torch.no_grad():
            return torch.export.export(
                graph,
                tuple(one.sample(sizes) for one in graph.inputs),
                dynamic_shapes={"tensors": shapes},
                strict=False,
            )
    except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"model {model} cannot be exported ({reason}): its forward must be tensor operations, of any batch size"
        ) from error


def _kind(key: str) -> str:
    return key if key == "num_tasks" else str(json.loads(key)[0])


def _own_rows(state: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]] | None:
    """Return which rows of each fused table the tasks have changed, and by what; None where they adapt none."""
    found: dict[str, dict[str, Tensor]] = {"pairs": {}, "deltas": {}}
    for key, tensor in state.items():
        kind, *name = json.loads(key)
        if kind in found:
            found[kind][name[0]] = tensor
    return {table: (found["pairs"][table], found["deltas"][table]) for table in found["pairs"]} or None


def _changes(positions: Tensor, rows: Tensor, deltas: Tensor) -> Tensor:
    """Return by what each task has changed the rows at `positions` [T, …]: [T, …, d]."""
    same = positions.flatten(1).unsqueeze(-1) == rows.unsqueeze(1)  # [T, n, K]
    return (same.to(deltas.dtype) @ deltas).view(*positions.shape, deltas.shape[-1])


def _of_state(name: str, key: str, like: Tensor) -> Input:
    """Return the input for a tensor of the fast weights of one task."""
    kind, *of = json.loads(key)
    about = {"state": key}
    if kind == "pairs":
        return Input(name, ("T", f"K_{of[0]}"), torch.int64, {**about, "padding": -1})
    rows = {"inputs": "R", "gradients": "R", "deltas": f"K_{of[0]}"}.get(kind)
    rest = like.shape[1 if kind == "deltas" or rows is None else 2 :]
    return Input(name, ("T", *([] if rows is None else [rows]), *rest), like.dtype, about)
