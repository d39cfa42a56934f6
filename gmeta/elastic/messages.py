"""Checks of what clients send. `BadMessage` says which field is wrong, what was found and what it must be.

Messages name a work item `shard`, as the first release did.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from gmeta.elastic.ledger import JobSpec, Ledger
from gmeta.elastic.monitor import StepTime
from gmeta.elastic.wire import from_wire, to_wire, wire_name

MOST_WORK_ITEMS = 4096
"""The largest number of work items in one list of a message."""
MOST_RANKS = 65_536
_LARGEST = 1e100

WorkItemKey = tuple[int, int, int]  # epoch, work item, attempt
WorkItemProgress = tuple[int, int, int, int]  # ..., samples of the work item that are done


class BadMessage(ValueError):
    """A message that no coordinator would understand."""


def _bad(key: str, value: Any, rule: str) -> BadMessage:
    shown = f"of {value.bit_length()} bits" if type(value) is int and value.bit_length() > 256 else repr(value)
    return BadMessage(f"{key} is {shown if len(shown) <= 100 else shown[:100] + '…'}: must be {rule}")


def text(body: Mapping[str, Any], key: str, most: int = 500) -> str:
    """Return a string of 1 to `most` characters."""
    value = body.get(key)
    if not isinstance(value, str) or not _is_text(value) or not 1 <= len(value) <= most:
        raise _bad(key, value, f"text of 1 to {most} characters")
    return value


def integer(body: Mapping[str, Any], key: str, least: int = 0, most: int = 2**53) -> int:
    """Return a whole number within bounds."""
    value: Any = body.get(key)
    if not _is_whole(value) or not least <= value <= most:
        raise _bad(key, value, f"a whole number of {least} to {most}")
    return int(value)


def number(body: Mapping[str, Any], key: str) -> float:
    """Return a finite number above 0."""
    value: Any = body.get(key)
    if not _is_number(value) or not value > 0:
        raise _bad(key, value, "a number above 0")
    return float(value)


def mapping(body: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return an object."""
    value = body.get(key)
    if not isinstance(value, dict):
        raise _bad(key, value, "an object")
    return value


def work_item_keys(body: Mapping[str, Any], key: str) -> list[WorkItemKey]:
    """Return [[epoch, work item, attempt], ...]. The list is empty where the field is left out."""
    return [(e, s, a) for e, s, a in _rows(body, key, 3, "[epoch, work item, attempt]")]


def progress(body: Mapping[str, Any]) -> list[WorkItemProgress]:
    """Return [[epoch, work item, attempt, samples done], ...]; an empty list where the field is left out."""
    return [(e, s, a, d) for e, s, a, d in _rows(body, "progress", 4, "[epoch, work item, attempt, samples done]")]


def _rows(body: Mapping[str, Any], key: str, width: int, form: str) -> list[list[int]]:
    value = body.get(key, [])
    if not isinstance(value, list) or len(value) > MOST_WORK_ITEMS:
        raise _bad(key, value, f"a list of at most {MOST_WORK_ITEMS} {form}")
    for row in value:
        if not isinstance(row, list) or len(row) != width or not all(map(_is_whole, row)):
            raise _bad(f"an entry of {key}", row, f"{form}, all whole numbers")
    return value


def job_spec(body: Mapping[str, Any]) -> JobSpec:
    """Return the specification of a job, from the field `plan`."""
    found, known = mapping(body, "plan"), {wire_name(field.name): str(field.type) for field in fields(JobSpec)}
    unknown = sorted(found.keys() - known.keys())
    if unknown:
        raise BadMessage(f"plan has no field {unknown[0]!r}: it has {', '.join(known)}")
    fits = {
        "int": (_is_whole, "a whole number"),
        "float": (_is_number, "a number"),
        "bool": (lambda x: isinstance(x, bool), "true or false"),
        "Mode": (_is_text, "text"),
    }
    for name, value in found.items():
        check, rule = fits[known[name]]
        if not check(value):
            raise _bad(f"plan.{name}", value, rule)
    try:
        return JobSpec(**from_wire(found))
    except (TypeError, ValueError) as error:
        raise BadMessage(f"plan: {error}") from error


def steps(body: Mapping[str, Any]) -> list[StepTime]:
    """Return [[step, compute_s, input_s, wait_s, work], ...]."""
    value = body.get("steps")
    if not isinstance(value, list) or len(value) > 10_000:
        raise _bad("steps", value, "a list of at most 10000 [step, compute_s, input_s, wait_s, work]")
    for row in value:
        fine = isinstance(row, list) and len(row) == 5 and _is_whole(row[0]) and all(map(_is_number, row))
        if not fine or min(row) < 0:
            raise _bad("an entry of steps", row, "[step, compute_s, input_s, wait_s, work], none negative")
    return [StepTime(*row) for row in value]


def facts(body: Mapping[str, Any]) -> dict[str, float]:
    """Return {name: number}, the state of a node."""
    value = body.get("facts", {})
    if not isinstance(value, dict) or len(value) > 100 or not all(map(_is_number, value.values())):
        raise _bad("facts", value, "an object of at most 100 numbers")
    for name in value:
        if not _is_text(name) or len(name) > 100:
            raise _bad("a name in facts", name, "text of at most 100 characters")
    return value


def about(body: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return those fixed facts of a rank that were given; None where there are none."""
    if body.get("about") is None:
        return None
    value = mapping(body, "about")
    for key, found in value.items():
        if key == "max_slots":
            if found is not None and not (_is_whole(found) and found >= 1):
                raise _bad("about.max_slots", found, "a whole number of at least 1, or null")
        elif key not in ("role", "device", "node"):
            raise BadMessage(f"about has no field {key!r}: it has role, device, node, max_slots")
        elif not _is_text(found) or len(found) > 500:
            raise _bad(f"about.{key}", found, "text of at most 500 characters")
    return value


def saved(body: Mapping[str, Any], spec: JobSpec) -> dict[str, Any]:
    """Return a ledger from a checkpoint (`Ledger.save`), or a fresh one where there is none."""
    if body.get("saved") is None:
        return Ledger(spec).save()
    value, n = mapping(body, "saved"), spec.num_work_items
    for key, most in (("epoch", spec.epochs), ("cursor", n), ("num_done", n)):
        if not _is_whole(value.get(key)) or not 0 <= value[key] <= most:
            raise _bad(f"saved.{key}", value.get(key), f"a whole number of 0 to {most}, as this job has it")
    for key in ("again", "attempts"):
        rows = value.get(key)
        fine = isinstance(rows, list) and all(
            isinstance(row, list | tuple) and len(row) == 2 and all(map(_is_whole, row)) for row in rows
        )
        if not fine or not all(0 <= work_item < n and other >= 0 for work_item, other in rows or ()):
            raise _bad(f"saved.{key}", rows, f"pairs of a work item below {n} and a whole number")
    return {key: value[key] for key in ("epoch", "cursor", "again", "num_done", "attempts")}


def spec_differences(here: JobSpec, there: JobSpec) -> str:
    """Return what differs between the job's specification and a message's, in words; empty where nothing does."""
    theirs = to_wire(there)
    return ", ".join(
        f"plan.{name} is {value!r} there and {theirs[name]!r} in the message"
        for name, value in to_wire(here).items()
        if theirs[name] != value
    )


def _is_text(value: Any) -> bool:
    """Whether a value is text that can be written down: half of a surrogate pair, which JSON can spell, cannot."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _is_number(value: Any) -> bool:
    """Whether a value is a number that is left finite by what is done with it, such as the sum of many."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST
