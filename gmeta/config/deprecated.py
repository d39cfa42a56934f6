"""Settings that were renamed or dropped.

Runs, checkpoints, YAML files and flags of the release before name the old keys. They are read for one release, with a
warning that names the new key. `upgrade` renames them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

RENAMED = {
    "dense.placement": "dense.sharding",
    "dense.group_size": "dense.node_size",
    "model.hidden": "model.args.hidden",
    "model.bottom": "model.args.bottom",
    "model.layer_norm": "model.args.layer_norm",
    "model.dropout": "model.args.dropout",
    "model.task_features": "model.args.task_features",
}
"""Old key of `gmeta train` to the new one."""

RENAMED_BY_COMMAND: dict[str, Mapping[str, str]] = {
    "train": RENAMED,
    "plan": {"group_size": "node_size", "groups": "nodes"},
    "doctor": {"group_size": "node_size"},
}
"""Old key of every command that has one, to the new key."""

DROPPED: dict[str, Any] = {
    "comm.fetch": "fused",
    "comm.dedup": True,
    "comm.dense": "all_reduce",
    "comm.overlap": True,
    "loader.sequential": True,
    "loader.size_buckets": True,
    "loader.ahead": "ids",
}
"""Switches that existed for comparison, and the one value that is left. The others live in benchmarks/study."""

_TAKES = {
    "melu": {"hidden", "layer_norm", "dropout"},
    "dlrm": {"hidden", "bottom", "layer_norm", "dropout"},
    "taste": {"hidden", "bottom", "dropout", "task_features"},
}
"""Arguments of each built-in model. The old sections gave every model all of them, and ignored the rest."""


def upgrade(
    values: Mapping[str, Any], *, saved: bool = False, command: str = "train", model: str | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Return a command's settings under today's names, and one sentence for each old name that was found.

    `saved` settings belong to a run of the release before: how it was measured is history, so that every value of a
    dropped switch is accepted. `model` is the model's name where something else than `values` decides on it.

    Raises ValueError when a key is named by its old and its new name, or a dropped switch asks for what is gone.
    """
    new = _copy(values)
    told = []
    takes = _TAKES.get(model or model_of(values) or "melu")
    for old, name in RENAMED_BY_COMMAND[command].items():
        if not _has(new, old):
            continue
        value = _pop(new, old)
        argument = name.rpartition(".")[2]
        if old.startswith("model.") and takes is not None and argument not in takes:
            told.append(f"{old} has no effect on this model and is left out")
            continue
        if _has(new, name):
            raise ValueError(f"{old} is the old name of {name}, and both are set: leave {old} out")
        _put(new, name, value)
        told.append(f"{old} is now {name}; the old name works in this release only")
    for old, kept in DROPPED.items() if command == "train" else ():
        if not _has(new, old):
            continue
        value = _pop(new, old)
        if value != kept and not saved:
            raise ValueError(f"{old} is {value!r}: this comparison moved to benchmarks/study; leave {old} out")
        told.append(f"{old} is gone, gmeta always does what {kept!r} did; leave it out")
    return new, told


def model_of(values: Mapping[str, Any]) -> str | None:
    """Return the model that settings name, if they do."""
    section = values.get("model")
    name = section.get("name") if isinstance(section, Mapping) else None
    return None if name is None else str(name)


def upgrade_words(
    words: Sequence[str], command: str = "train", model: str | None = None
) -> tuple[list[str], list[str]]:
    """Return command-line words under today's names, and one sentence for each old name; errors as `upgrade`."""
    out: list[str] = []
    told: list[str] = []
    position = 0
    renamed, dropped = RENAMED_BY_COMMAND[command], DROPPED if command == "train" else {}
    named = {word.partition("=")[0][2:] for word in words if word.startswith("--")}
    while position < len(words):
        word = words[position]
        key, equals, value = word[2:].partition("=")
        position += 1
        if not word.startswith("--") or not (key in renamed or key in dropped):
            out.append(word)
            continue
        given = [value] if equals else list(words[position : position + 1])
        position += not equals
        if key in dropped:
            asked = yaml.safe_load(given[0]) if given else None
            if asked != DROPPED[key]:
                raise ValueError(f"{key} is {asked!r}: this comparison moved to benchmarks/study; leave --{key} out")
            told.append(f"{key} is gone, gmeta always does what {DROPPED[key]!r} did; leave it out")
            continue
        if renamed[key] in named:
            raise ValueError(f"{key} is the old name of {renamed[key]}, and both are set: leave --{key} out")
        takes = _TAKES.get(model or "melu")
        if key.startswith("model.") and takes is not None and key.rpartition(".")[2] not in takes:
            told.append(f"{key} has no effect on this model and is left out")
            continue
        out += [f"--{renamed[key]}", *given]
        told.append(f"{key} is now {renamed[key]}; the old name works in this release only")
    return out, told


def _copy(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in values.items()}


def _has(values: Mapping[str, Any], key: str) -> bool:
    section, _, rest = key.partition(".")
    if not rest:
        return section in values
    inside = values.get(section)
    return isinstance(inside, Mapping) and _has(inside, rest)


def _pop(values: dict[str, Any], key: str) -> Any:
    section, _, rest = key.partition(".")
    if not rest:
        return values.pop(section)
    value = _pop(values[section], rest)
    if not values[section]:
        del values[section]
    return value


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    section, _, rest = key.partition(".")
    if rest:
        inside = values.setdefault(section, {})
        _put(inside, rest, value)
    else:
        values[section] = value
