"""Settings that were renamed or dropped.

Runs, checkpoints, YAML files and flags of the release before name the old keys. They are read for one release, with a
warning that names the new key. `upgrade` renames them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from gmeta.core.nested import put

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
    "tune": RENAMED,
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
    model = model or model_of(values)
    trains = RENAMED_BY_COMMAND[command] is RENAMED
    replay = new.get("replay")
    if trains and isinstance(replay, dict) and replay.get("pack") == "" and replay.get("fraction") is not None:
        _pop(new, "replay.fraction")  # config.yaml of a run without replay had the default of both
    for old, name in RENAMED_BY_COMMAND[command].items():
        if not _has(new, old):
            continue
        value = _pop(new, old)
        kept, sentence = _renamed(old, name, model, twice=_has(new, name))
        told.append(sentence)
        if kept:
            put(new, name, value)
    for old in DROPPED if trains else ():
        if _has(new, old):
            value = _pop(new, old)
            told.append(_dropped(old, DROPPED[old] if saved else value))
    return new, told


def _renamed(old: str, name: str, model: str | None, *, twice: bool, flag: str = "") -> tuple[bool, str]:
    """Return whether a renamed key has an effect, and the sentence that tells of it."""
    if old.startswith("model."):
        takes = _TAKES.get(model or "melu")
        if takes is not None and name.rpartition(".")[2] not in takes:
            return False, f"{old} has no effect on this model and is left out"
    if twice:
        raise ValueError(f"{old} is the old name of {name}, and both are set: leave {flag}{old} out")
    return True, f"{old} is now {name}; the old name works in this release only"


def _dropped(old: str, value: Any, flag: str = "") -> str:
    """Return the sentence that tells of a dropped switch."""
    kept = DROPPED[old]
    if value != kept:
        raise ValueError(f"{old} is {value!r}: this comparison moved to benchmarks/study; leave {flag}{old} out")
    return f"{old} is gone, gmeta always does what {kept!r} did; leave it out"


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
    renamed = RENAMED_BY_COMMAND[command]
    dropped = DROPPED if renamed is RENAMED else {}
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
            told.append(_dropped(key, _value(given[0]) if given else None, flag="--"))
            continue
        kept, sentence = _renamed(key, renamed[key], model, twice=renamed[key] in named, flag="--")
        told.append(sentence)
        if kept:
            out += [f"--{renamed[key]}", *given]
    return out, told


def _value(text: str) -> Any:
    """Read a value as YAML, or as the text itself where it is none."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


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
