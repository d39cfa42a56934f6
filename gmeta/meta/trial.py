"""A model is tried out once, before anything is trained, on a few random examples. What cannot be right is refused.

A model gets its examples in two forms: [n, ...] in plain training and in the reference engine, [T, S, ...] in the
factored one, padding included, in any batch, on any rank. So an example's logit may depend on nothing but the example,
and in training on its own dropout key. The trial compares the same examples in both forms and beside other
neighbours, watches the random state, the buffers and the inputs, and names the call where numbers part.
"""

from __future__ import annotations

import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gmeta.core.batch import id_of, mask_of, text_ids_of
from gmeta.core.errors import UserCodeError
from gmeta.meta.closed_form import finished, recording
from gmeta.meta.dropout import SeededDropout, example_keys
from gmeta.meta.factored import AdaptedPass, Unsupported
from gmeta.meta.fast_weights import FastWeights
from gmeta.meta.gather_plan import GatherPlan
from gmeta.meta.inner_loop import Adapted
from gmeta.meta.interception import Intercept
from gmeta.meta.modulation import Modulated
from gmeta.meta.reference import substituted
from gmeta.meta.views import Embedded
from gmeta.models.inputs import TextInput
from gmeta.models.last_layer import BayesianLinear

_LIBRARIES = (str(Path(__file__).parent), str(Path(torch.__file__).parent))
_TASKS, _ROWS = 2, 3
_CHANGED = 4  # the example whose neighbours must not notice: task 1, position 1


@dataclass(frozen=True, slots=True)
class _Examples:
    """Random examples in one form: with the leading dimensions [6] or [2, 3], or fewer."""

    dense: Tensor  # [*leading, F]
    values: dict[str, Tensor]  # table -> [n, slots, d]
    keys: Tensor  # int64 [*leading], of dropout: the same for the same example in every form
    plan: GatherPlan  # with the masks of all n examples
    given: dict[str, Tensor]  # [n, ...]
    leading: tuple[int, ...]
    labels: tuple[str, ...] = ()  # several labels, of which the model gives a logit each

    def of(self, *leading: int, start: int = 0) -> _Examples:
        """Return the examples from `start` on, with other leading dimensions."""
        which = slice(start, start + torch.Size(leading).numel())
        values = {table: value[which].clone() for table, value in self.values.items()}
        dense = self.dense.flatten(0, -2)[which].clone()
        keys = self.keys.flatten()[which].view(leading)
        plan = replace(self.plan, masks={name: mask[which] for name, mask in self.plan.masks.items()})
        given = {name: value[which].clone() for name, value in self.given.items()}
        return _Examples(dense.view(*leading, dense.shape[-1]), values, keys, plan, given, leading, self.labels)

    def changed(self) -> _Examples:
        """Return the same with one example that has zeros as numeric columns, as padding has, and other rows."""
        other = self.of(*self.leading)
        other.dense.flatten(0, -2)[_CHANGED] = 0
        for table, value in other.values.items():
            value[_CHANGED] = (value[_CHANGED].flip(-1) * 3 + 1) * self.present(table)[_CHANGED]
        for name, value in other.given.items():
            if value.is_floating_point():
                present = self.given.get(mask_of(name), value.new_ones(len(value), 1)).to(value.dtype)
                value[_CHANGED] = (value[_CHANGED] * 3 + 1) * present[_CHANGED].view(-1, *[1] * (value.dim() - 2))
        return other

    def present(self, table: str) -> Tensor:
        """Return 1 for each slot of a table that holds a value, and 0 for padding, [n, slots, 1]."""
        value, names = self.values[table], self.plan.features[table]
        whole = value.new_ones(len(value), 1, dtype=torch.bool)
        return torch.cat([self.plan.masks.get(name, whole) for name in names], 1).unsqueeze(-1).to(value.dtype)

    def longer(self) -> _Examples:
        """Return the same with sequences that are padded further, as beside a longer one in the batch."""
        values = {}
        for table, value in self.values.items():
            names = self.plan.features[table]
            parts = torch.split(value, self.plan.slots(names), 1)
            more = [part if n not in self.plan.masks else _wider(part) for n, part in zip(names, parts, strict=True)]
            values[table] = torch.cat(more, 1)
        plan = replace(self.plan, masks={name: _wider(mask) for name, mask in self.plan.masks.items()})
        sequences = {name for name in self.given if mask_of(name) in self.given or name.endswith(mask_of(""))}
        sequences |= {n for n, v in self.given.items() if n.endswith(text_ids_of("")) and v.shape[1] > 1}
        given = {name: _wider(value) if name in sequences else value for name, value in self.given.items()}
        return replace(self, values=values, plan=plan, given=given)


def choose_engine(
    model: nn.Module,
    adapted: Adapted,
    flat: _Examples,
    modulated: Mapping[str, int],
    engine: str,
) -> tuple[str, str]:
    """Try the model out on `try_examples` and return (engine, why); `engine` may be auto.

    `modulated` has the number of units of each modulated layer.
    The model, its buffers, gradients and flags, and the global random state are left as they were.
    Raises ValueError, which names the call where possible, for a model that mixes examples, returns another shape than
    one logit an example (one for each of several labels), draws random numbers without a seed, or changes its buffers
    or inputs; `UserCodeError` for
    one that raises. Where a model is right for [n, ...] alone, that is an error with `engine` factored, and the reason
    of taking the reference with auto; so is `Unsupported`, for what the factored engine cannot adapt.
    """
    _refuse_modules(model)
    parameters = {
        name: _noise(parameter, seed).requires_grad_(parameter.requires_grad)
        for seed, (name, parameter) in enumerate(model.named_parameters())
        if parameter.is_floating_point() and not parameter.any()  # what starts at 0 hides what it multiplies
    }
    with _undisturbed(model), substituted(model, parameters):
        _refuse_signature(model, flat)
        with torch.no_grad():
            for training in (False, True):
                model.train(training)
                _try_repeated(model, flat)
            logits = _try_alone(model, flat)
            _refuse_padding(model, flat, logits)
            _run(model, flat.of(1))
        _refuse_no_gradient(model, flat)
        finite = not bool(logits.isfinite().all()) or _finite_on_padding(model, flat)
        if not adapted or engine == "reference":
            with torch.no_grad():
                _run(model, flat.of(0))
        if not adapted:
            if not finite:
                raise ValueError(_not_finite(model))
            return engine, "none (plain training)"
        _refuse_second_reading(model, adapted, flat)
        if engine == "reference":
            return engine, "reference, as configured"
        both = flat.of(_TASKS, _ROWS)
        try:
            _refuse_another_answer(model, flat, both, logits)
            if not finite:
                raise Unsupported(next(iter((*adapted.parameters, *adapted.features))), _not_finite(model))
            _try_adapted(model, adapted, both, modulated)
        except ValueError as reason:  # each of these is right in the form that the reference engine gives
            if engine == "factored":
                raise
            with torch.no_grad():
                _run(model, flat.of(0))
            return "reference", f"reference, because {reason}"
    return "factored", "factored" if engine == "auto" else "factored, as configured"


@torch.no_grad()
def require_last_layer(model: nn.Module, layer: BayesianLinear, examples: _Examples) -> None:
    """Raise ValueError unless the model calls `layer` once, and returns what it returns, or what `finish` makes of
    it.
    """
    with _undisturbed(model), recording(layer) as calls:
        logits = _run(model, examples)
        outputs = [finished(model, output) for output in calls.outputs]
    if len(outputs) != 1 or not _same(outputs[0], logits):
        raise ValueError(
            f"{_name(model)}.forward calls its last layer {len(outputs)} times or changes what it returns: it "
            "must call it once and return its result (or self.finish of it), with all else in the offset"
        )


@torch.no_grad()
def _refuse_another_answer(model: nn.Module, flat: _Examples, both: _Examples, logits: Tensor) -> None:
    """Raise ValueError if the examples as [T, S, ...] get other logits than as [n, ...], and try both without any."""
    if not _same(_try_alone(model, both).flatten(0, 1), logits):
        where = _first_difference(model, flat, both)
        raise ValueError(
            f"{_name(model)}.forward mixes examples{where}: {_form(both)} gives other logits than the same "
            f"examples as {_form(flat)}{_cure(both)}"
        )
    for none in (flat.of(0, _ROWS), flat.of(0)):
        _run(model, none)


def _refuse_modules(model: nn.Module) -> None:
    """Raise ValueError for modules that cannot be right, wherever they are used."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"model has batch norm at {name!r}, which mixes tasks and is not supported: use layer norm instead"
            )
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.weight.requires_grad:
            raise ValueError(
                f"model has an embedding table of its own at {name!r}, which would be neither sharded nor updated by "
                "row: make it a feature of the pack (the model gets its rows as embedded[name]); for positions and "
                "other small sets, index an nn.Parameter"
            )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(f"model has the lazy parameter {name!r}: give its layer the size of its input")


def _refuse_signature(model: nn.Module, examples: _Examples) -> None:
    try:
        inspect.signature(model.forward).bind(examples.dense, {})
    except TypeError as error:
        raise ValueError(
            f"{_name(model)}.forward{inspect.signature(model.forward)} cannot be called with (dense, embedded), a "
            f"tensor and a dict of tensors: {error}"
        ) from error


def _refuse_no_gradient(model: nn.Module, examples: _Examples) -> None:
    """Raise ValueError where a model has something to train, and its logits depend on none of it."""
    rows = {table: value.clone().requires_grad_() for table, value in examples.values.items()}
    if not rows and not any(parameter.requires_grad for parameter in model.parameters()):
        return
    with torch.enable_grad():
        if not any(_run(model, given).requires_grad for given in (examples, replace(examples, values=rows))):
            raise ValueError(
                f"{_name(model)}.forward returns logits without a gradient, so nothing would be trained: leave out "
                "detach(), torch.no_grad() and numpy"
            )


def _refuse_padding(model: nn.Module, examples: _Examples, logits: Tensor) -> None:
    """Raise ValueError where what is behind a sequence's values counts."""
    further = examples.longer()
    if further.plan.masks or further.given:
        if _same(_run(model, further), logits):
            return
        where = mask_of(next(iter(further.plan.masks), "name"))
        raise ValueError(
            f"{_name(model)}.forward gives other logits where sequences are padded further, as they are beside a "
            f"longer one: use embedded[{where!r}], True for values, as gmeta.models.inputs.masked_mean does"
        )


def _wider(value: Tensor) -> Tensor:
    """Pad [n, L, ...] to [n, L + 2, ...]."""
    return torch.cat([value, value.new_zeros(len(value), 2, *value.shape[2:])], 1)


def try_examples(
    model: nn.Module,
    features: Mapping[str, int],
    num_numeric: int,
    sequences: Mapping[str, int] | None = None,
    vectors: Mapping[str, int] | None = None,
    texts: Mapping[str, TextInput] | None = None,
    routes: Mapping[str, int] | None = None,
) -> _Examples:
    """Make six examples [6, ...] of random numbers, with features of one width side by side, as tables hold them.

    Arguments are those of `MetaLearner`. Sequences have 0 to 3 values, and as many each in one example.
    """
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    number = _TASKS * _ROWS
    plan, values = GatherPlan({}, {}, {}, {}), {}
    sequences, vectors = sequences or {}, vectors or {}
    mask = torch.arange(3, device=like.device) < torch.tensor([2, 3, 0, 1, 3, 1], device=like.device).unsqueeze(-1)
    plan.masks.update({name: mask for name in features if name in sequences})
    for dim in dict.fromkeys(features.values()):
        of_width = [name for name, width in features.items() if width == dim]
        names = tuple(sorted(of_width, key=sequences.__contains__))
        plan.features[f"width {dim}"] = names
        values[f"width {dim}"] = _noise(like.new_empty(number, sum(plan.slots(names)), dim), dim)
    given = {name: _noise(like.new_empty(number, width), 7) for name, width in vectors.items()}
    for name in sequences.keys() - features.keys():
        given[name] = _noise(like.new_empty(number, 3, sequences[name]), 8) * mask.unsqueeze(-1).to(like.dtype)
        given[mask_of(name)] = mask
    for name, text in (texts or {}).items():
        ids = torch.arange(number * 3, device=like.device).view(number, 3) * 5 % text.num_texts * mask
        given[text_ids_of(name)] = ids if text.is_sequence else ids[:, :1]
    for name, num_ids in (routes or {}).items():
        given[id_of(name)] = torch.arange(number, device=like.device).unsqueeze(-1) % num_ids
    keys = example_keys((0, 0, 0), torch.arange(_TASKS), 0, torch.arange(_ROWS)).flatten().to(like.device)
    made = _Examples(_noise(like.new_empty(number, num_numeric), 0), values, keys, plan, given, (number,))
    return replace(made, values={table: value * made.present(table) for table, value in values.items()})


def _noise(like: Tensor, seed: int) -> Tensor:
    """Return normal numbers, from a generator of their own."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Restore training flags, buffers and the global random state at the end. Raises ValueError if a buffer changed."""
    flags = [(module, module.training) for module in model.modules()]
    buffers = [(module, name, b) for module in model.modules() for name, b in module._buffers.items() if b is not None]
    kept = [buffer.clone() for _, _, buffer in buffers]
    states = [(set_, get()) for get, set_ in _generators(model)]
    names = {id(buffer): name for name, buffer in model.named_buffers()}
    changed = None
    try:
        yield
    finally:
        for (module, name, buffer), value in zip(buffers, kept, strict=True):
            if module._buffers.get(name) is not buffer or not torch.equal(buffer.nan_to_num(), value.nan_to_num()):
                changed = changed or names[id(buffer)]
            module._buffers[name] = buffer
            with torch.no_grad():
                buffer.copy_(value)
        for module, training in flags:
            module.training = training
        for set_, state in states:
            set_(state)
    if changed is not None:
        raise ValueError(
            f"{_name(model)}.forward changes its buffer {changed!r}: examples would change each other through it; "
            "compute it from the inputs, or keep it fixed"
        )


def _generators(model: nn.Module) -> list[tuple[Callable[[], Tensor], Callable[[Tensor], None]]]:
    """Return how to read and write the state of the global generators that the model may draw from."""
    found: list[tuple[Callable[[], Tensor], Callable[[Tensor], None]]] = [(torch.get_rng_state, torch.set_rng_state)]
    for device in {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}:
        found.append((partial(torch.cuda.get_rng_state, device), partial(torch.cuda.set_rng_state, device=device)))
    return found


def _run(model: nn.Module, examples: _Examples, *handlers: Any) -> Tensor:
    """Return the logits of examples. Raises ValueError where the model fails, errs in shape, or changes its inputs."""
    given = examples.of(*examples.leading)
    shaped = {name: value.view(*given.leading, *value.shape[1:]) for name, value in given.given.items()}
    embedded = Embedded(given.values, given.plan, given.leading, shaped)
    inputs = (given.dense, *given.values.values(), *given.given.values(), *given.plan.masks.values())
    versions = [tensor._version for tensor in inputs]
    try:
        with Intercept(*handlers, embedded, SeededDropout(lambda: examples.keys)):
            out = model(given.dense, embedded.features)
    except Unsupported:
        raise
    except Exception as error:
        known = f" (embedded has: {', '.join(embedded.features) or 'nothing'})" if isinstance(error, KeyError) else ""
        raise UserCodeError(
            f"{_name(model)}.forward fails{_raised_at(error)} for {_form(given)}: {type(error).__name__}: {error}"
            f"{known}{_cure(given)}"
        ) from error
    expected = (*given.leading, *([len(examples.labels)] if examples.labels else []))
    if not isinstance(out, Tensor) or tuple(out.shape) != expected:
        found = f"{list(out.shape)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
        raise ValueError(
            f"{_name(model)}.forward returns {found} for {_form(given)}: it must return {_wanted(examples, expected)}"
        )
    if versions != [tensor._version for tensor in inputs]:
        raise ValueError(
            f"{_name(model)}.forward changes its inputs in place: every inner step reads them again; use an operation "
            "that makes a new tensor"
        )
    return out


def _wanted(examples: _Examples, shape: tuple[int, ...]) -> str:
    """Return which logits a model must give."""
    if examples.labels:
        names = ", ".join(examples.labels)
        return f"{len(examples.labels)} logits an example, one for each of {names}: {list(shape)}{_cure(examples)}"
    return f"one logit an example, {list(shape)}; a last dimension of 1 is left out by .squeeze(-1){_cure(examples)}"


def _cure(examples: _Examples) -> str:
    """Return what to do where the form [tasks, examples, ...] is the fault."""
    if len(examples.leading) == 1:
        return ""
    return (
        "; the factored engine gives any leading dimensions: work on the last ones only (dim=-1, x[..., 0], "
        "flatten(-2)), or set meta.engine to 'reference', which calls the model with [examples, ...]"
    )


def _raised_at(error: Exception) -> str:
    """Return the last line of the model's own code in a traceback, in words."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(_LIBRARIES)]
    return f" at {Path(frames[-1].filename).name}, line {frames[-1].lineno}," if frames else ""


def _form(examples: _Examples) -> str:
    shapes = [f"dense {list(examples.dense.shape)}"]
    shapes += [f"embedded {[*examples.leading, value.shape[-1]]}" for value in examples.values.values()]
    return " and ".join(shapes)


def _name(model: nn.Module) -> str:
    return type(model).__name__


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether numbers agree up to rounding, which differs with the form of a product."""
    tolerance = 1e-9 if one.dtype == torch.float64 else 1e-3
    scale = max(1.0, float(other.abs().nan_to_num(posinf=0).max())) if other.numel() else 1.0
    return torch.allclose(one, other, rtol=0, atol=tolerance * scale, equal_nan=True)


def _others(values: Tensor) -> Tensor:
    """Return all but the changed example, of values [6, ...]."""
    return torch.cat([values[:_CHANGED], values[_CHANGED + 1 :]])


def _try_alone(model: nn.Module, examples: _Examples) -> Tensor:
    """Return the logits of examples in one form. Raises ValueError where they depend on their neighbours."""
    logits = _run(model, examples)
    last = len(examples.leading) - 1
    changed = _run(model, examples.changed())
    mixes = not _same(_others(changed.flatten(0, last)), _others(logits.flatten(0, last)))
    if not mixes and len(examples.leading) == 1:  # a maximum may not notice one changed example
        half = len(logits) // 2
        mixes = not _same(torch.cat([_run(model, examples.of(half, start=start)) for start in (0, half)]), logits)
    if mixes:
        where = _first_difference(model, examples, examples.changed())
        raise ValueError(
            f"{_name(model)}.forward mixes examples{where}: for {_form(examples)}, an example gets other logits beside "
            "other examples. A logit may depend on its own example alone, whatever is in the batch or in its "
            f"padding{_cure(examples)}"
        )
    return logits


def _try_repeated(model: nn.Module, examples: _Examples) -> None:
    """Raise ValueError for a model that draws random numbers other than those of dropout that is seeded."""
    generators = _generators(model)
    before = [get() for get, _ in generators]
    one, other = _run(model, examples), _run(model, examples)
    drawn = not all(torch.equal(get(), state) for (get, _), state in zip(generators, before, strict=True))
    if drawn or not torch.equal(one.nan_to_num(), other.nan_to_num()):
        calls = _Calls(model)
        _run(model, examples, calls)
        where = calls.drawing or (" from a generator of its own" if not drawn else "")
        mode = "while training" if model.training else "in evaluation"
        raise ValueError(
            f"{_name(model)}.forward draws random numbers{where} {mode}, which no seed of gmeta reaches: a run would "
            "not repeat. nn.Dropout is seeded by (seed, step, task); give other layers dropout=0 and put nn.Dropout "
            "behind them"
        )


def _finite_on_padding(model: nn.Module, examples: _Examples) -> bool:
    """Whether an example of zeros leaves all gradients finite, though no loss reads it."""
    leaves = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.enable_grad():
        out = _run(model, examples.changed())
        rows = torch.arange(len(out), device=out.device).view(-1, *[1] * (out.dim() - 1))
        loss = torch.where(rows == _CHANGED, 0, out).sum()
        grads = torch.autograd.grad(loss, leaves, allow_unused=True) if leaves and loss.requires_grad else ()
    return bool(loss.isfinite()) and all(bool(grad.isfinite().all()) for grad in grads if grad is not None)


def _refuse_second_reading(model: nn.Module, adapted: Adapted, examples: _Examples) -> None:
    """Raise ValueError for a model that reads adapted parameters in its backward pass: they are no task's by then."""
    shared = dict(model.named_parameters(remove_duplicate=False))
    own = {name: (shared[name].detach() * 1.1).requires_grad_() for name in adapted.parameters}
    with torch.enable_grad():
        with substituted(model, own):
            within, after = _run(model, examples).sum(), _run(model, examples).sum()
            if not own or not within.requires_grad:
                return
            expected = torch.autograd.grad(within, list(own.values()), allow_unused=True, materialize_grads=True)
        found = torch.autograd.grad(after, list(own.values()), allow_unused=True, materialize_grads=True)
    for name, one, other in zip(own, found, expected, strict=True):
        if not _same(one, other):
            raise ValueError(
                f"{_name(model)}.forward computes with {name!r} again in the backward pass, as torch.utils.checkpoint "
                "does: there it would find the shared weights, not those of a task. Leave the checkpoint out (what "
                "saves memory in inner steps is meta.recompute), or do not adapt what it holds"
            )


def _not_finite(model: nn.Module) -> str:
    return (
        f"{_name(model)}.forward has gradients that are not finite for an example whose numeric columns are all 0, as "
        "in padding: guard the quotient, root or logarithm, as in x / y.clamp(min=1e-6)"
    )


def _try_adapted(model: nn.Module, adapted: Adapted, examples: _Examples, modulated: Mapping[str, int]) -> None:
    """Raise `Unsupported` if the factored engine cannot adapt the model."""
    modulation = {layer: Modulated(examples.dense.new_ones(_TASKS, units), None) for layer, units in modulated.items()}
    fast = FastWeights(_TASKS, modulation=modulation)
    with torch.enable_grad():
        taped = AdaptedPass(model, adapted.parameters, fast, (_TASKS, _ROWS))
        _run(model, examples, taped)
        taped.finish()


class _Calls:
    """A handler that keeps what each torch function returned, where it was called, and which one drew numbers first."""

    def __init__(self, model: nn.Module) -> None:
        self.generators = [get for get, _ in _generators(model)]
        self.found: list[tuple[str, Any]] = []
        self.drawing = ""

    def handle(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return the result of a call, computed here unless another handler replaces it."""
        name = getattr(func, "__name__", "")
        if "dropout" in name or name in ("cat", "concat", "concatenate", "stack"):
            return NotImplemented
        before = [get() for get in self.generators]
        out = func(*args, **kwargs)
        where = f" in {name}{_line()}"
        if not self.drawing and any(
            not torch.equal(get(), state) for get, state in zip(self.generators, before, strict=True)
        ):
            self.drawing = where
        kept = out[0] if isinstance(out, tuple) and out else out
        if name != "__get__":
            self.found.append((where, kept.detach().clone() if isinstance(kept, Tensor) else None))
        return out


def _line() -> str:
    """Return where the model's own code is, of the frames above."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
        frame = frame.f_back
    return f" ({Path(frame.f_code.co_filename).name}, line {frame.f_lineno})"


def _first_difference(model: nn.Module, one: _Examples, other: _Examples) -> str:
    """Return the first call whose result is not the same for the examples that are the same, in words; or nothing."""
    calls = []
    for examples in (one, other):
        calls.append(_Calls(model))
        _run(model, examples, calls[-1])
    number = _TASKS * _ROWS
    for (where, first), (_, second) in zip(calls[0].found, calls[1].found, strict=False):
        if not isinstance(first, Tensor) or not isinstance(second, Tensor):
            continue
        if first.shape[: len(one.leading)] != one.leading:
            continue
        rest = first.shape[len(one.leading) :]
        if second.shape != (*other.leading, *rest):
            return where
        values = [tensor.reshape(number, *rest) for tensor in (first, second)]
        if one.leading == other.leading:
            values = [_others(value) for value in values]
        if not values[0].is_floating_point():
            values = [value.double() for value in values]
        if not _same(*values):
            return where
    return ""
