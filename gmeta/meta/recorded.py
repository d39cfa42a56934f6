"""A learner's `adapt` and `score` by recorded programs, for servers, which see the same few shapes again and again.

Batches are padded to some sizes, so that the shapes are few. The first batch of a shape is computed by the learner, and
recorded; the program is made when the shape has come often enough to be worth it, and used once it gave, for a later
batch, what the learner gives. Batches of models that branch on numbers, or draw some, stay with the learner.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from cachetools import LRUCache
from torch import Tensor

from gmeta.core.batch import EmbeddedRows, Examples
from gmeta.meta.fast_weights import FastWeights
from gmeta.meta.gather_plan import GatherPlan
from gmeta.meta.learner import MetaLearner
from gmeta.meta.tape import NotRecordable, Program, Recording, record

_TASKS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
_ROWS = (0, *range(8, 65, 8), *(size * octave // 4 for octave in (64, 128, 256, 512) for size in (5, 6, 7, 8)))
"""Sizes that batches are padded to: at most a quarter more rows, from 32 on."""
_WORTH = 16
"""Batches of a shape after which a program is made: about what making it costs, in time that it would have saved."""
_MOST_PROGRAMS, _MOST_SHAPES = 256, 1024
_CLOSE = {torch.float32: 1e-5, torch.float64: 1e-9}
"""How far a program may be from the learner, as a share of the largest number; both run the same operations."""


class Programs:
    """The programs of a process. Models that compute alike, as the versions of one do, share them."""

    def __init__(self) -> None:
        self.made: LRUCache[bytes, Program] = LRUCache(_MOST_PROGRAMS)


@dataclass(eq=False, slots=True)
class _Shape:
    """What is known of batches of one shape. Without recording or program they are the learner's."""

    recording: Recording | None = None
    form: FastWeights | None = None  # of `adapt`: its result, with empty tensors
    batches: int = 0
    program: Program | None = None  # once it is checked
    constants: Sequence[Tensor] = ()


class RecordedLearner:
    """Adapts and scores as a `MetaLearner` in evaluation mode does, to the last bits."""

    def __init__(
        self,
        learner: MetaLearner,
        tables: Mapping[str, tuple[str, ...]],
        programs: Programs,
        note: Callable[[str], None],
    ) -> None:
        """`tables` are the features that read each table, in the learner's order. `note` is told, once for each reason,
        why batches stay with the learner. ValueError says why all would.
        """
        if why := _not_recordable(learner, tables):
            raise ValueError(f"the model's passes cannot be recorded: {why}")
        self._learner, self._programs, self.tables = learner, programs, tables
        self._plan = GatherPlan(dict(tables), {}, {}, {})  # without lookups: the values are looked up
        self._shapes: LRUCache[object, _Shape] = LRUCache(_MOST_SHAPES)
        self._note, self._noted = note, set[str]()

    def adapt(self, values: Mapping[str, Tensor], support: Examples) -> FastWeights:
        """Return the fast weights of every task, as `MetaLearner.adapt` does.

        `values[table]` [T * S, F, d] are what the features of the table read.
        """
        count, size = _padded_shape(support.mask)
        inputs = [*_padded(support, count, size), *_padded_values(values, support.mask.shape, (count, size))]
        if support.weight is not None:
            inputs.append(F.pad(support.weight, (0, size - support.mask.shape[1], 0, count - support.mask.shape[0])))
        made: list[FastWeights] = []

        def run(dense: Tensor, label: Tensor, mask: Tensor, *rest: Tensor) -> Sequence[Tensor]:
            rows = EmbeddedRows(dict(zip(values, rest[: len(values)], strict=True)), {}, {})
            (weight,) = rest[len(values) :] or (None,)
            made.append(self._learner.adapt(rows, _examples(dense, label, mask, weight), self._plan))
            return made[-1].tensors()

        shape, tensors = self._run(("adapt",), run, inputs)
        if made:
            shape.form = made[-1].filled(tensor.new_empty(0) for tensor in made[-1].tensors())
        assert shape.form is not None
        fast = shape.form.filled(tensor[: len(support.mask)] for tensor in tensors)
        return replace(fast, num_tasks=len(support.mask))

    def score(self, fast: FastWeights, values: Mapping[str, Tensor], query: Examples) -> Tensor:
        """Return the logits [T, Q], as `MetaLearner.score` does; `values` are as in `adapt`."""
        count, size = _padded_shape(query.mask)
        state = [_more_tasks(tensor, count) for tensor in fast.tensors()]
        form = replace(fast, num_tasks=count)

        def run(dense: Tensor, label: Tensor, mask: Tensor, *rest: Tensor) -> Sequence[Tensor]:
            rows = EmbeddedRows(dict(zip(values, rest[: len(values)], strict=True)), {}, {})
            own = form.filled(iter(rest[len(values) :]))
            return [self._learner.score(own, rows, _examples(dense, label, mask), self._plan)]

        sites = tuple((site, len(steps)) for site, steps in fast.updates.items())
        kind = ("score", sites, tuple(fast.values), tuple(fast.modulation), fast.posterior is None)
        inputs = [*_padded(query, count, size), *_padded_values(values, query.mask.shape, (count, size)), *state]
        _, (logits,) = self._run(kind, run, inputs)
        return logits[: query.mask.shape[0], : query.mask.shape[1]]

    def _run(
        self, kind: tuple[object, ...], function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]
    ) -> tuple[_Shape, Sequence[Tensor]]:
        """Compute `function(*inputs)`, by a program where there is one."""
        key = kind, tuple((tensor.shape, tensor.dtype) for tensor in inputs)
        shape = self._shapes.get(key)
        with torch.no_grad():
            if shape is None:
                shape = self._shapes[key] = _Shape()
                return shape, self._recorded(shape, function, inputs)
            if shape.program is not None:
                return shape, shape.program(inputs, shape.constants)
            outputs = function(*inputs)
        shape.batches += 1
        if shape.recording is not None:
            self._check(shape, shape.recording, inputs, outputs)
        return shape, outputs

    def _recorded(
        self, shape: _Shape, function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        try:
            shape.recording, outputs = record(function, inputs)
        except NotRecordable as reason:
            self._refuse(str(reason))
            return function(*inputs)
        return outputs

    def _check(self, shape: _Shape, recording: Recording, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Use the program from now on, where there is one or it is due, and it computes this batch as the learner."""
        digest = recording.digest
        program = self._programs.made.get(digest)
        if program is None:
            if shape.batches < _WORTH:
                return
            try:
                program = self._programs.made[digest] = Program(recording, inputs)
            except NotRecordable as reason:
                self._refuse(str(reason))
        shape.recording = None
        if program is None:
            return
        if all(map(_close, program(inputs, recording.constants), outputs)):
            shape.program, shape.constants = program, recording.constants
        else:
            self._refuse("the model computes other numbers on another batch of the same shape than was recorded")

    def _refuse(self, reason: str) -> None:
        if reason not in self._noted:
            self._noted.add(reason)
            self._note(f"some batches are computed without recorded programs: {reason}")


def _not_recordable(learner: MetaLearner, tables: Mapping[str, tuple[str, ...]]) -> str:
    if not tables:
        return "it embeds no feature"
    if learner.adapted.features:
        return "embedding rows adapt"
    if learner.sequences or learner.vectors:
        return f"it reads {next(iter((*learner.sequences, *learner.vectors)))!r}, which is not one row of a table"
    if learner.engine == "reference" and learner.adapted.steps:
        return "its engine is the reference"
    return ""


def _close(found: Tensor, expected: Tensor) -> bool:
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    if torch.equal(found, expected) or not found.is_floating_point():
        return torch.equal(found, expected)
    bound = _CLOSE.get(found.dtype, 1e-2) * float(expected.abs().nan_to_num(0, 0, 0).max())
    return torch.allclose(found, expected, rtol=0, atol=bound, equal_nan=True)


def _padded_shape(mask: Tensor) -> tuple[int, int]:
    """Return the sizes (T, S) that a batch is padded to."""
    return _TASKS[bisect_left(_TASKS, mask.shape[0])], _ROWS[bisect_left(_ROWS, mask.shape[1])]


def _padded(examples: Examples, count: int, size: int) -> list[Tensor]:
    """Return dense columns, labels and mask, [count, size, ...]."""
    tasks, rows = count - examples.mask.shape[0], size - examples.mask.shape[1]
    if not tasks and not rows:
        return [examples.dense, examples.label, examples.mask]
    dense = F.pad(examples.dense, (0, 0, 0, rows, 0, tasks))
    return [dense, F.pad(examples.label, (0, rows, 0, tasks)), F.pad(examples.mask, (0, rows, 0, tasks))]


def _padded_values(values: Mapping[str, Tensor], shape: Sequence[int], padded: tuple[int, int]) -> list[Tensor]:
    """Pad the values of T * S rows to those of count * size: [T * S, F, d] -> [count * size, F, d]."""
    if tuple(shape) == padded:
        return list(values.values())
    more = (0, 0, 0, 0, 0, padded[1] - shape[1], 0, padded[0] - shape[0])
    return [F.pad(own.view(*shape, *own.shape[1:]), more).flatten(0, 1) for own in values.values()]


def _more_tasks(tensor: Tensor, count: int) -> Tensor:
    """Add tasks of zeros: [T, ...] -> [count, ...]."""
    if len(tensor) == count:
        return tensor
    return torch.cat([tensor, tensor.new_zeros(count - len(tensor), *tensor.shape[1:])])


def _examples(dense: Tensor, label: Tensor, mask: Tensor, weight: Tensor | None = None) -> Examples:
    return Examples({}, {}, dense, label, mask, mask, mask, weight)
