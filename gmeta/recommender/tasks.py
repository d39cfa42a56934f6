"""Tasks of many requests, adapted and scored together: what a server batches, and the state that it keeps of each.

    encoded = [encode_rows(rec, table, "support") for table in …]     # one a request, one or more tasks each
    states = adapt_tasks(rec, encoded)                           # a TaskState for every task, in order
    scores = score_tasks(rec, candidates, states_of_candidates)  # an array for every table, in its order of rows

The scores are those of `rec.adapt(support).predict(candidates)`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from gmeta.data.loader import MAX_CELLS
from gmeta.data.order import bucket_by_size, ends_within
from gmeta.data.prepare.encoder import EncodedTables
from gmeta.data.prepare.new_texts import NewTexts, renumbered
from gmeta.data.schema import PackSchema
from gmeta.data.tables import TableLike
from gmeta.meta.fast_weights import FastWeights, LinearSite, LowRankUpdate
from gmeta.recommender.recommender import Recommender, require_finite
from gmeta.runs.data import require_clicks

TASKS_TOGETHER = 64
"""Tasks in one pass: beyond so many a task costs the same."""
_SUPPORT_STEP = 8
"""What is kept of each support row is padded to multiples of so many, so that most tasks' states have one layout."""


@dataclass(frozen=True)
class Layout:
    """How the numbers of a task's state lie behind each other."""

    shapes: tuple[tuple[int, ...], ...]  # of one task's tensors
    dtypes: tuple[torch.dtype, ...]
    form: FastWeights = field(compare=False)  # its names, with empty tensors


@dataclass(frozen=True, slots=True)
class TaskState:
    """What one task has learned from its support. It shares no memory with other tasks."""

    layout: Layout
    numbers: Tensor  # [n]
    rows: dict[str, Tensor]  # table -> int64 [p], the rows that are private to the task
    deltas: dict[str, Tensor]  # table -> [p, d], what was added to them
    num_support: int

    @property
    def nbytes(self) -> int:
        """Return the bytes of its numbers."""
        return sum(tensor.nbytes for tensor in (self.numbers, *self.rows.values(), *self.deltas.values()))


def encode_rows(rec: Recommender, table: TableLike, role: Literal["support", "candidates"]) -> EncodedTables | None:
    """Return raw rows in the model's encoding, None without rows; errors are those of `adapt` and `predict`."""
    encoded = rec._encode(table, role)
    if encoded is not None and role == "support":
        require_clicks(encoded.arrays["label"], rec.config.loss, role)
    return encoded


def encode_together(
    rec: Recommender, tables: Sequence[TableLike], role: Literal["support", "candidates"]
) -> tuple[EncodedTables, list[int]] | None:
    """Encode the rows of several tables at once, which costs little more than one of them. Return them as one table,
    with the number of tasks that each has; None where they are not alike, or some row is not a plain one.

    The tables are dicts of lists of the same columns, or Arrow tables of one schema.
    """
    merged: TableLike
    if all(isinstance(table, pa.Table) for table in tables):
        merged = pa.concat_tables(table.replace_schema_metadata() for table in tables)
    elif all(isinstance(table, dict) for table in tables):
        merged = {name: list(chain.from_iterable(table[name] for table in tables)) for name in tables[0]}
    else:
        return None
    task = rec.schema.task
    group = list(chain.from_iterable([number] * len(table[task]) for number, table in enumerate(tables)))
    try:
        found = rec._encoder.together(rec._arrow(merged, role), role, group)
        if found is not None and role == "support":
            require_clicks(found[0].arrays["label"], rec.config.loss, role)
    except ValueError:
        return None
    return found and (found[0], np.bincount(found[1], minlength=len(tables)).tolist())


def adapt_tasks(
    rec: Recommender, supports: Sequence[EncodedTables], wanted: Sequence[int] | None = None
) -> list[TaskState]:
    """Adapt to the tasks of some tables of support rows, or to those that are `wanted`, numbered through the tables;
    return their states in order.

    ValueError where the posterior of a task is not finite.
    """
    if not supports or (wanted is not None and not len(wanted)):
        return []
    joined = join_tables(supports, rec.schema)
    chosen = np.arange(len(joined.keys)) if wanted is None else np.asarray(wanted, np.int64)
    states: dict[int, TaskState] = {}
    with rec._rows(joined) as (of_all, split):
        at = of_all[chosen]
        for tasks in _groups(at.num_support, at.num_query, split.cells_per_row(at)):
            where = at[tasks]
            fast = rec._adapt(split.gather(where)[0])
            require_finite(fast, [joined.keys[task] for task in chosen[tasks].tolist()])
            states |= zip(tasks.tolist(), split_states(fast, where.num_support), strict=True)
    return [states[task] for task in range(len(chosen))]


def task_digests(support: EncodedTables, schema: PackSchema) -> list[bytes]:
    """Return a checksum of the rows of each task: equal rows in one model's encoding give equal states."""
    arrays = _by_content(support, schema)
    starts = arrays["row_start"].tolist()
    digests = []
    for start, end in zip(starts, [*starts[1:], len(arrays["label"])], strict=True):
        digest = xxhash.xxh3_128()
        for name, array in arrays.items():
            if name in ("ids", "dense", "label", "weight") or name.endswith(".vector"):
                digest.update(array[start:end].tobytes())
            elif name.endswith(".offsets"):
                digest.update(np.diff(array[start : end + 1]).tobytes())
                digest.update(arrays[f"{name.removesuffix('.offsets')}.values"][array[start] : array[end]].tobytes())
        digests.append(digest.digest())
    return digests


def num_new_texts(rec: Recommender, encoded: EncodedTables) -> int:
    """Return how many texts the model would have to encode for these rows."""
    return rec._texts.num_new(encoded)


def _by_content(encoded: EncodedTables, schema: PackSchema) -> Mapping[str, NDArray[Any]]:
    """Return arrays in which new texts have hashes for ids, which mean the same in all requests."""
    tables = {feature.table for feature in schema.features if feature.num_texts is not None}
    texts = {table: encoded.texts.get(table, []) for table in tables}
    hashes = {table: [xxhash.xxh3_64_intdigest(text.encode()) for text in some] for table, some in texts.items()}
    ids = {table: -1 - (np.array(some, np.uint64) >> np.uint64(1)).astype(np.int64) for table, some in hashes.items()}
    return renumbered(encoded.arrays, schema, ids)


def state_without_support(rec: Recommender) -> TaskState:
    """Return the state of a task of which nothing is known."""
    (state,) = split_states(rec._without_support(1), np.zeros(1, np.int64))
    return state


def score_tasks(
    rec: Recommender, candidates: Sequence[EncodedTables], states: Sequence[Sequence[TaskState]]
) -> list[NDArray[np.float64]]:
    """Return the scores of the rows of each table, [rows], or [rows, K] of several labels; `states[i]` are those of the
    tasks of `candidates[i]`.
    """
    if not candidates:
        return []
    joined = join_tables(candidates, rec.schema)
    flat = [state for of_table in states for state in of_table]
    logits = np.zeros((len(joined.query_row), *rec._outputs))
    num_support = np.array([state.num_support for state in flat], np.int64)
    with rec._rows(joined) as (at, split):
        for tasks in _groups(num_support, at.num_query, split.cells_per_row(at)):
            _, query, _ = split.gather(at[tasks])
            found = rec._score(join_states([flat[task] for task in tasks.tolist()]), query).cpu()
            logits[query.row[query.mask].numpy()] = found[query.mask].double().numpy()
    scores = rec._predictions(torch.from_numpy(logits))
    out, start = [], 0
    for table in candidates:
        end = start + len(table.query_row)
        own = np.empty((end - start, *rec._outputs))
        own[table.query_row] = scores[start:end]
        out.append(own)
        start = end
    return out


def split_states(fast: FastWeights, num_support: NDArray[np.int64]) -> list[TaskState]:
    """Take the fast weights of T tasks apart."""
    rest = _compact(replace(fast, deltas={}, pairs={}))
    tensors, count = rest.tensors(), fast.num_tasks
    layout = Layout(
        tuple(tuple(tensor.shape[1:]) for tensor in tensors),
        tuple(tensor.dtype for tensor in tensors),
        rest.filled(tensor.new_empty(0) for tensor in tensors),
    )
    flat = torch.cat([t.reshape(count, -1) for t in tensors], 1) if tensors else torch.zeros(count, 0)
    private = {table: _by_task(keys, count) for table, keys in fast.pairs.items()}
    states = []
    for task, numbers in enumerate(flat.unbind()):
        rows = {table: fast.pairs[table][of_task[task], 1] for table, of_task in private.items()}
        deltas = {table: delta[private[table][task]] for table, delta in fast.deltas.items()}
        states.append(TaskState(layout, numbers.clone(), rows, deltas, int(num_support[task])))
    return states


def join_states(states: Sequence[TaskState]) -> FastWeights:
    """Return the fast weights of tasks that were taken apart, in order."""
    by_layout: dict[Layout, list[int]] = {}
    for position, state in enumerate(states):
        by_layout.setdefault(state.layout, []).append(position)
    parts = [_stacked([states[position] for position in positions]) for positions in by_layout.values()]
    if len(parts) == 1:
        return parts[0]
    order = np.argsort([position for positions in by_layout.values() for position in positions])
    return FastWeights.join(parts).of_tasks(order.tolist())


def _stacked(states: Sequence[TaskState]) -> FastWeights:
    """Return the fast weights of tasks of one layout."""
    layout, count = states[0].layout, len(states)
    flat = torch.stack([state.numbers for state in states])
    sizes = [int(np.prod(shape)) for shape in layout.shapes]
    tensors = (
        part.reshape(count, *shape).to(dtype)
        for part, shape, dtype in zip(torch.split(flat, sizes, 1), layout.shapes, layout.dtypes, strict=True)
    )
    pairs, deltas = {}, {}
    for table in states[0].rows:
        rows = [state.rows[table] for state in states]
        task = torch.repeat_interleave(torch.tensor([len(part) for part in rows])).to(rows[0].device)
        pairs[table] = torch.stack([task, torch.cat(rows)], 1)
    for table in states[0].deltas:
        deltas[table] = torch.cat([state.deltas[table] for state in states])
    return replace(layout.form.filled(iter(tensors)), num_tasks=count, pairs=pairs, deltas=deltas)


def _compact(fast: FastWeights) -> FastWeights:
    """Write all steps of a site as one update, of its change of the weight where that is smaller than the steps are.

    A state of many steps on many rows then is as small as what it changes.
    """
    return replace(fast, updates={site: (_one_update(site, steps),) for site, steps in fast.updates.items() if steps})


def _one_update(site: LinearSite, steps: Sequence[LowRankUpdate]) -> LowRankUpdate:
    """Return the update of rank R that all steps are together.

    A change C [out, in] of the weight is the update of inputs C and gradients I. That would change the bias by 1, so
    that one row more, of inputs 0, takes it to what it is.
    """
    inputs, gradients = torch.cat([s.inputs for s in steps], 1), torch.cat([s.gradients for s in steps], 1)
    count, rank, num_out = gradients.shape
    rows = (num_out if site.weight is not None else 0) + (site.bias is not None)
    if rank <= rows or inputs.dtype not in (torch.float32, torch.float64):
        more = -rank % _SUPPORT_STEP
        return LowRankUpdate(F.pad(inputs, (0, 0, 0, more)), F.pad(gradients, (0, 0, 0, more)))
    changes, units = [], []
    if site.weight is not None:
        changes.append(torch.bmm(gradients.mT, inputs))
        units.append(torch.eye(num_out, dtype=inputs.dtype, device=inputs.device).expand(count, -1, -1))
    if site.bias is not None:
        changes.append(inputs.new_zeros(count, 1, inputs.shape[2]))
        units.append(gradients.sum(1, keepdim=True) - float(site.weight is not None))
    return LowRankUpdate(torch.cat(changes, 1), torch.cat(units, 1))


def _by_task(pairs: Tensor, num_tasks: int) -> tuple[Tensor, ...]:
    """Return where each task's pairs are among [P, 2]."""
    order = pairs[:, 0].argsort(stable=True)
    return torch.split(order, torch.bincount(pairs[:, 0], minlength=num_tasks).tolist())


def _groups(
    num_support: NDArray[np.int64], num_query: NDArray[np.int64], cells_per_row: NDArray[np.int64]
) -> Iterator[NDArray[np.int64]]:
    """Yield the tasks of each pass, those of about one size together."""
    for members in bucket_by_size(num_support, num_query, TASKS_TOGETHER):
        start = 0
        for end in ends_within(num_support[members], num_query[members], cells_per_row[members], MAX_CELLS):
            yield members[start:end]
            start = end


def join_tables(tables: Sequence[EncodedTables], schema: PackSchema) -> EncodedTables:
    """Return the tasks of all tables as those of one; there is at least one table. `schema` is that of their rows."""
    if len(tables) == 1:
        return tables[0]
    arrays: dict[str, NDArray[np.generic]] = {}
    sizes = [len(table.arrays["label"]) for table in tables]
    first_row = np.cumsum([0, *sizes[:-1]])
    new, of_tables = NewTexts(schema), []
    for table in tables:
        ids = {name: np.array([new.id_of(name, text) for text in texts]) for name, texts in table.texts.items()}
        of_tables.append(renumbered(table.arrays, schema, ids))
    for name in tables[0].arrays:
        parts = [found[name] for found in of_tables]
        if name == "row_start":
            parts = [part + start for part, start in zip(parts, first_row, strict=True)]
        elif name.endswith(".offsets"):
            parts = _shifted(parts)
        arrays[name] = np.concatenate(parts)
    keys = [key for table in tables for key in table.keys]
    arrays["task_id"] = np.arange(len(keys))
    return EncodedTables(keys, arrays, np.concatenate([table.query_row for table in tables]), new.lists())


def _shifted(offsets: Sequence[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
    """Return offsets [rows + 1] of tables behind each other."""
    out, start = [np.zeros(1, np.int64)], 0
    for part in offsets:
        out.append(part[1:] + start)
        start += int(part[-1])
    return out
