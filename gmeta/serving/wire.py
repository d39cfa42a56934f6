"""Bodies of requests: JSON, Arrow streams, and the Open Inference Protocol, all to one `Query`.

A query is a table of support rows and a table of candidates, of all of its tasks, in the columns of the training logs.
Bodies come from anyone: sizes are bounded before they are parsed, and everything is checked before it is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from pydantic_core import from_json

from gmeta.core.errors import nearest
from gmeta.data.prepare.direct import text_of
from gmeta.data.schema import DataSchema, Role
from gmeta.data.tables import TableLike
from gmeta.serving.arrow_body import read_streams
from gmeta.serving.refusal import Declined

PARTS = ("support", "candidates")


@dataclass(frozen=True)
class RequestLimits:
    """What a request may hold."""

    body_bytes: int
    rows: int
    tasks: int
    values: int  # of a many-valued feature in one row


class JsonTask(NamedTuple):
    """A task of a JSON body. The rows of the tasks lie behind each other."""

    key: Any  # as it was given
    support: int  # rows
    candidates: int


@dataclass(frozen=True)
class Query:
    """The tasks of one request."""

    support: TableLike | None
    candidates: TableLike | None
    states: dict[str, str] = field(default_factory=dict)  # task -> id of the state to score with
    version: str | None = None  # None: the current one
    num_tasks: int = 0
    num_rows: int = 0
    tasks: tuple[JsonTask, ...] = ()  # of a JSON body, in its order


@dataclass(frozen=True)
class Columns:
    """The columns that requests have."""

    task: str
    support: tuple[str, ...]  # needed, without the task
    candidates: tuple[str, ...]
    time: str | None
    weight: str | None
    labels: tuple[str, ...]  # several labels, in the order of the scores; empty: there is one
    known: frozenset[str]
    many: frozenset[str]
    optional: tuple[str, ...]  # known by the item's id where a request leaves them out

    @classmethod
    def of(cls, schema: DataSchema) -> Columns:
        """Return those of a schema."""
        roles: list[Role] = ["task", "item"] if schema.item_statistics else ["task"]
        labelled: list[Role] = [*roles, "label"]
        lists = [f.name for f in schema.features if f.kind != "categorical"]
        lists += [column.name for column in schema.numeric_sequence]
        all_roles: list[Role] = ["task", "label", "weight", "time", "item", "partition", "role"]
        return cls(
            task=schema.task,
            support=tuple(name for name in schema.columns(labelled) if name != schema.task),
            candidates=tuple(name for name in schema.columns(roles) if name != schema.task),
            time=schema.time,
            weight=schema.weight,
            labels=tuple(label.name for label in schema.labels),
            known=frozenset(
                [
                    *schema.columns([role for role in all_roles if getattr(schema, role) is not None]),
                    *schema.item_vectors(),
                ]
            ),
            many=frozenset(lists),
            optional=tuple(schema.item_vectors()),
        )

    def needed(self, part: str) -> tuple[str, ...]:
        """Return the columns that a part must have."""
        return self.support if part == "support" else self.candidates


def parse_json(body: bytes) -> dict[str, Any]:
    """Return a JSON object. NaN is no JSON, and the parser refuses what is nested more than 200 deep."""
    try:
        document = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise Declined(400, "invalid_json", _why_no_json(body, str(error))) from None
    if not isinstance(document, dict):
        found = "null" if document is None else kind_of(document)
        raise Declined(400, "invalid_json", f"the body is {found}: it must be an object")
    return document


def _why_no_json(body: bytes, error: str) -> str:
    if not body.strip():
        return "the body is empty: it must be a JSON object"
    if error.startswith("recursion limit"):
        return "the body is nested too deep: it may be 200 deep"
    cure = ": missing values are null, not NaN" if b"NaN" in body or b"Infinity" in body else ""
    return f"the body is no JSON ({error}){cure}"


def query_of_json(document: Mapping[str, Any], columns: Columns, limits: RequestLimits, *, scoring: bool) -> Query:
    """Read the body of `/v1/score` (`scoring`) or `/v1/adapt`."""
    refuse_unknown(document, ("tasks", "version"), "the body")
    tasks, version = document.get("tasks"), document.get("version")
    if not isinstance(tasks, list) or not tasks:
        raise Declined(422, "invalid_tasks", f"tasks is {kind_of(tasks)}: give a list of one task or more")
    if len(tasks) > limits.tasks:
        raise Declined(413, "too_many_tasks", f"{len(tasks)} tasks are more than {limits.tasks}: send them in parts")
    if version is not None and not isinstance(version, str):
        raise Declined(
            422, "invalid_version", f"version is {kind_of(version)}: give the name of a version, or leave it out"
        )
    known = ("key", "support", "state", "candidates") if scoring else ("key", "support")
    states: dict[str, str] = {}
    seen: set[str] = set()
    for place, task in enumerate(tasks):
        where = f"tasks[{place}]"
        if not isinstance(task, dict):
            raise Declined(422, "invalid_tasks", f"{where} is {kind_of(task)}: it must be an object")
        refuse_unknown(task, known, where)
        key = _key(task.get("key"), where)
        if key in seen:
            raise Declined(422, "duplicate_task", f"{where} has the key of an earlier task: send each task once")
        seen.add(key)
        if (state := task.get("state")) is not None:
            if "support" in task or not isinstance(state, str):
                raise Declined(422, "invalid_state", f"{where} must have an id of a state, or support rows, not both")
            states[key] = state
        for part in PARTS if scoring else ("support",):
            if part not in task and (part == "candidates" or not scoring):
                raise Declined(422, f"missing_{part}", f"{where} has no {part}: give its columns")
    support, num_support = _merged(tasks, "support", columns, limits)
    candidates, counts = _merged(tasks, "candidates", columns, limits) if scoring else (None, [0] * len(tasks))
    total = sum(num_support) + sum(counts)
    if total > limits.rows:
        raise Declined(413, "too_many_rows", f"{total:,} rows are more than {limits.rows:,}: send them in parts")
    return Query(
        support,
        candidates,
        states,
        version,
        len(tasks),
        total,
        tuple(JsonTask(t["key"], *rows) for t, *rows in zip(tasks, num_support, counts, strict=True)),
    )


def _merged(
    tasks: Sequence[Mapping[str, Any]], part: str, columns: Columns, limits: RequestLimits
) -> tuple[dict[str, list[Any]] | None, list[int]]:
    """Return the rows of all tasks as columns, and how many each task has."""
    having = [(place, task[part]) for place, task in enumerate(tasks) if part in task]
    if not having:
        return None, [0] * len(tasks)
    wanted = list(columns.needed(part))
    of_support = (columns.time, columns.weight) if part == "support" else ()
    for name in (*of_support, *columns.optional):
        given_by_some = any(isinstance(given, dict) and name in given for _, given in having)
        if given_by_some and name is not None and name not in wanted:
            wanted.append(name)
    merged: dict[str, list[Any]] = {columns.task: [], **{name: [] for name in wanted}}
    counts = [0] * len(tasks)
    for place, given in having:
        where = f"tasks[{place}].{part}"
        if not isinstance(given, dict):
            raise Declined(422, f"invalid_{part}", f"{where} is {kind_of(given)}: it must be an object of columns")
        counts[place] = rows = _num_rows(given, where, columns)
        if sum(counts) > limits.rows:
            raise Declined(413, "too_many_rows", f"{where}: more than {limits.rows:,} rows; send them in parts")
        for name in wanted:
            if name not in given:
                raise Declined(422, "missing_column", f"{where} has no column {name!r}: {nearest(name, given)}")
            value = given[name]
            values = value if isinstance(value, list) else [value] * rows
            if name in columns.many:
                _check_lists(values, f"{where}.{name}", limits)
            merged[name].extend(values)
        key = tasks[place]["key"]
        if columns.task not in wanted:
            merged[columns.task].extend([str(key)] * rows)
    return merged, counts


def _num_rows(given: Mapping[str, Any], where: str, columns: Columns) -> int:
    """Return how many rows columns have, of which a value that is no list stands for every row."""
    lengths = {}
    for name, value in given.items():
        if name not in columns.known:
            raise _unknown(where, name, columns)
        if isinstance(value, list):
            lengths[name] = len(value)
        elif isinstance(value, dict):
            raise Declined(
                422, "invalid_column", f"{where}.{name} is an object: give a list of values, or one for all rows"
            )
    if len(set(lengths.values())) > 1:
        raise Declined(422, "ragged_columns", f"the columns of {where} have different lengths: {lengths}")
    rows = next(iter(lengths.values()), 1 if given else 0)
    if not rows:
        cure = (
            "leave support out to score a task of which nothing is known" if where.endswith("support") else "give rows"
        )
        raise Declined(422, f"empty_{where.rpartition('.')[2]}", f"{where} has no rows: {cure}")
    return rows


def _check_lists(values: Sequence[Any], where: str, limits: RequestLimits) -> None:
    for value in values:
        if isinstance(value, list) and len(value) > limits.values:
            raise Declined(
                413, "list_too_long", f"{where} has a list of {len(value)} values: {limits.values} are the most"
            )


def _key(value: Any, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise Declined(
            422, "invalid_key", f"{where}.key is {kind_of(value)}: give the task's key, a text or a whole number"
        )
    return canonical(str(value), where)


def canonical(key: str, where: str) -> str:
    """Return a key in the one form of an id. Raises `Declined` for one that stands for a missing value."""
    text = text_of(key)
    if isinstance(text, int):
        raise Declined(422, "invalid_key", f"{where} has the key {key!r}, which is no id: give the task's own")
    return text


def refuse_unknown(given: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Raise `Declined` for a key that is not known, with the nearest one that is."""
    for name in given:
        if name not in known:
            raise Declined(422, "unknown_key", f"{where} has the key {name!r}: {nearest(name, known)}")


def kind_of(value: Any) -> str:
    """Return in words what a JSON value is."""
    names = {
        type(None): "missing",
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
        list: "a list",
    }
    return names.get(type(value), "an object")


# ------------------------------------------------------------------------------------- tables of all tasks


def query_of_arrow(body: bytes, columns: Columns, limits: RequestLimits, *, scoring: bool) -> Query:
    """Read an Arrow body: one stream for each part, whose schema's metadata says `part`: support or candidates.

    Rows have the task's key in the task column. The metadata may have `states`, a JSON object from key to id of a
    state, and `version`.
    """
    found: dict[str, TableLike] = {}
    metadata: dict[str, str] = {}
    for table in read_streams(body, limits.body_bytes):
        own = {k.decode(errors="replace"): v.decode(errors="replace") for k, v in (table.schema.metadata or {}).items()}
        part = own.pop("part", "candidates" if scoring else "support")
        if part not in (PARTS if scoring else ("support",)) or part in found:
            raise Declined(422, "invalid_part", f"the body has a stream too many, for {part!r}: name its part")
        found[part], metadata = table, {**metadata, **own}
    states = parse_json(metadata["states"].encode()) if "states" in metadata else {}
    if not all(isinstance(state, str) for state in states.values()):
        raise Declined(422, "invalid_state", "states must map keys to ids of states")
    return check_columns(found, states, columns, limits, version=metadata.get("version"), scoring=scoring)


def check_columns(
    found: Mapping[str, TableLike],
    states: dict[str, str],
    columns: Columns,
    limits: RequestLimits,
    *,
    version: str | None = None,
    scoring: bool = True,
) -> Query:
    """Return the query of tables that hold all tasks, with the task's key in each row; Arrow tables or lists."""
    required = "candidates" if scoring else "support"
    if required not in found:
        raise Declined(422, f"missing_{required}", f"the body has no {required}")
    states = {canonical(key, "states"): state for key, state in states.items()}
    total, keys = 0, set()
    for part, table in found.items():
        names = list(table.column_names if isinstance(table, pa.Table) else table)
        for name in names:
            if name not in columns.known:
                raise _unknown(part, name, columns)
        for name in (columns.task, *columns.needed(part)):
            if names.count(name) != 1:
                raise Declined(422, "missing_column", f"{part} must have one column {name!r}: {nearest(name, names)}")
        if len(set(names)) < len(names):
            raise Declined(422, "missing_column", f"{part} has a column twice: leave one out")
        lengths = {name: len(table[name]) for name in names}
        if len(set(lengths.values())) > 1:
            raise Declined(422, "ragged_columns", f"the columns of {part} have different lengths: {lengths}")
        rows = lengths[columns.task]
        if not rows:
            raise Declined(422, f"empty_{part}", f"{part} has no rows")
        total += rows
        if total > limits.rows:
            raise Declined(413, "too_many_rows", f"more than {limits.rows:,} rows: send them in parts")
        for name in columns.many & set(names):
            _check_lengths(table[name], f"{part}.{name}", limits)
        keys |= set(
            table[columns.task].unique().to_pylist() if isinstance(table, pa.Table) else map(str, table[columns.task])
        )
    if len(keys) > limits.tasks:
        raise Declined(413, "too_many_tasks", f"{len(keys)} tasks are more than {limits.tasks}: send them in parts")
    return Query(found.get("support"), found.get("candidates"), states, version, len(keys), total)


def _check_lengths(values: Any, where: str, limits: RequestLimits) -> None:
    if not isinstance(values, pa.ChunkedArray):
        _check_lists(values, where, limits)
    elif pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        longest = pc.max(pc.list_value_length(values)).as_py() or 0
        if longest > limits.values:
            raise Declined(
                413, "list_too_long", f"{where} has a list of {longest} values: {limits.values} are the most"
            )


def _unknown(where: str, name: str, columns: Columns) -> Declined:
    hint = nearest(name, sorted(columns.known))
    return Declined(422, "unknown_feature", f"{where} has a column {name!r} that the model does not know: {hint}")
