"""The space of a tuning: which settings vary and how; and the trials that are drawn from it.

dense.lr: {low: 0.0003, high: 0.01, log: true}   # any number between, evenly in its logarithm
meta.inner_steps: [1, 3, 5]                      # one of these
loader.tasks_per_batch: [32]                     # always this
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from gmeta.config.parse import known_keys, parse_mapping
from gmeta.config.train import TrainConfig
from gmeta.core.errors import closest, require
from gmeta.core.files import read_mapping
from gmeta.core.nested import put
from gmeta.meta.inner_loop import LAST_LAYER

TrialSettings = dict[str, Any]
"""Dotted key of `gmeta train` -> value."""

NOT_TUNED = {
    "recipe": "all trials start from one; vary what it sets",
    "pack": "trials are compared on one pack",
    "run_dir": "every trial has a run directory of its own under out",
    "seed": "seeds are averaged: set how many with seeds",
    "resume": "tune goes on by itself",
    "device": "it changes no metric",
    "timeout_s": "it changes no metric",
    "schedule.": "rungs are cut from the schedule, which all trials share",
    "elastic.": "trials are not elastic",
    "comm.": "it is no question of quality",
}
"""Keys that no space may vary, or how they begin, and why."""

_MAX_DRAWS = 1000
"""Draws in a row that may give a trial that is there already; the space is then taken to have no more."""


@dataclass(frozen=True)
class Range:
    """Numbers between two, both included; `log` draws evenly in the logarithm. Whole ends give whole numbers."""

    low: float
    high: float
    log: bool = False

    def at(self, u: float) -> float:
        """Return the number at `u` in [0, 1) of the way, with four significant digits."""
        whole = isinstance(self.low, int) and isinstance(self.high, int)
        low, high = (self.low - 0.5, self.high + 0.5) if whole else (self.low, self.high)
        value = low * (high / low) ** u if self.log else low + (high - low) * u
        if whole:
            return min(max(round(value), int(self.low)), int(self.high))
        return min(max(float(f"{value:.4g}"), self.low), self.high)

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}" + (", logarithmic" if self.log else "")


Space = dict[str, list[Any] | Range]

_RATES: Space = {"dense.lr": Range(0.0003, 0.01, log=True), "embedding.lr": Range(0.005, 0.2, log=True)}
_INNER: Space = {"meta.inner_lr": Range(0.01, 1.0, log=True), "meta.inner_steps": [1, 3, 5]}
_OF_MODEL: dict[str, Space] = {
    "melu": {"model.args.dropout": [0.0, 0.2]},
    "dlrm": {"model.args.dropout": [0.0, 0.2]},
    "taste": {"model.args.dropout": [0.0, 0.2, 0.4], "meta.inner_prior": [0.0, 5.0, 25.0]},
    "neural_linear": {
        "embedding.lr": Range(0.0002, 0.02, log=True),
        "model.embedding_dim": [7, 13, 25],
        "model.args.dropout": [0.0, 0.3],
    },
}


def built_in_space(config: TrainConfig) -> Space:
    """Return a small space for a model: rates, what the inner loop does (where there is one), and what the model is
    most sensitive to.
    """
    steps = [name for name in config.meta.adapt if name != LAST_LAYER]  # what SGD adapts, not a closed form
    space = {**_RATES, **(_INNER if steps else {}), **_OF_MODEL.get(config.model.name, {})}
    return {key: values for key, values in space.items() if config.meta.adapt or not key.startswith("meta.")}


def read_space(path: Path) -> Space:
    """Return the space that a YAML file describes. Raises ValueError that names the file and the key."""
    found = read_mapping(path, "it must hold lines such as `dense.lr: {low: 0.0003, high: 0.01, log: true}`")
    if not found:
        raise ValueError(f"{path} names no setting: give at least one, such as `meta.inner_steps: [1, 3, 5]`")
    known = [key for key in known_keys(TrainConfig) if _reason(key) is None]
    space: Space = {}
    for key, values in found.items():
        try:
            _require_tunable(str(key), known)
            space[str(key)] = _range(str(key), values) if isinstance(values, dict) else _list(str(key), values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return space


def _reason(key: str) -> str | None:
    """Return why a key is not tuned; None where it may be."""
    section = key.partition(".")[0]
    return next((why for name, why in NOT_TUNED.items() if name in (key, f"{section}.")), None)


def _require_tunable(key: str, known: list[str]) -> None:
    if (why := _reason(key)) is not None:
        raise ValueError(f"{key} cannot be tuned: {why}")
    inside = [name for name in known if name.startswith(f"{key}.")]
    if inside:
        raise ValueError(f"{key} is a section: name a setting, such as {inside[0]}: [value, value]")
    if key in known or key.startswith("model.args."):
        return
    near = closest(key, known)
    hint = f"did you mean {near}?" if near else "`gmeta train --help` lists the keys"
    raise ValueError(f"unknown key {key}: {hint}")


def _list(key: str, values: Any) -> list[Any]:
    how = "list the values, such as [1, 3], or give {low: 0.001, high: 0.1, log: true}"
    if not isinstance(values, list):
        raise ValueError(f"{key} is {values!r}: {how}")
    require(bool(values), key, values, how)
    require(all(values.count(value) == 1 for value in values), key, values, "a value stands there twice")
    return values


def _range(key: str, values: dict[Any, Any]) -> Range:
    how = "a range is {low: 0.001, high: 0.1, log: true}, without log for even steps; a list of values stands in [ ]"
    require({"low", "high"} <= set(values) <= {"low", "high", "log"}, key, values, how)
    low, high, log = _number(key, values["low"]), _number(key, values["high"]), values.get("log", False)
    require(isinstance(log, bool), f"{key}: log", log, "must be true or false")
    require(low < high, f"{key}: low", low, f"must be less than high, {high!r}")
    require(not log or low > 0, f"{key}: low", low, "must be more than 0 with log")
    return Range(low, high, log)


def _number(key: str, value: Any) -> float:
    if isinstance(value, str):  # YAML takes 1e-3, without a point, for text
        with suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{key} has {value!r}: low and high must be finite numbers")
    return value


def draw_trials(space: Space, count: int, seed: int, first: Iterable[TrialSettings] = ()) -> list[TrialSettings]:
    """Return different settings of a space: all of them, in order, where they are finite and at most `count`.

    Otherwise `first`, and then settings drawn at random (Bergstra & Bengio 2012), the same for the same seed, until
    there are `count` or the space has no more.
    """
    trials = [dict(settings) for settings in first][:count]
    sizes = [len(values) for values in space.values() if isinstance(values, list)]
    if len(sizes) == len(space) and math.prod(sizes) <= count and not trials:
        grid: list[TrialSettings] = [{}]
        for key, values in space.items():
            assert isinstance(values, list)
            grid = [{**settings, key: value} for settings in grid for value in values]
        return grid
    draws, misses = random.Random(seed), 0
    while len(trials) < count and misses < _MAX_DRAWS:
        drawn = {key: _value(values, draws.random()) for key, values in space.items()}
        if drawn in trials:
            misses += 1
        else:
            trials.append(drawn)
    return trials


def _value(values: list[Any] | Range, u: float) -> Any:
    return values.at(u) if isinstance(values, Range) else values[int(u * len(values))]


def as_json(space: Space) -> dict[str, Any]:
    """Return a space as JSON has it."""
    return {key: asdict(values) if isinstance(values, Range) else values for key, values in space.items()}


def in_one_line(settings: TrialSettings) -> str:
    """Return settings in one line."""
    return ", ".join(f"{key} {value}" for key, value in settings.items())


def settings_of(config: TrainConfig, keys: Iterable[str]) -> TrialSettings:
    """Return what a config, with its model's defaults filled in, says at dotted keys."""
    values = asdict(config)
    return {key: reduce(getitem, key.split("."), values) for key in keys}


def with_settings(config: TrainConfig, settings: TrialSettings, source: str) -> TrainConfig:
    """Return a config with other settings. Raises ValueError with `source`, the key and what it must be."""
    values = asdict(config)
    for key, value in settings.items():
        put(values, key, value)
    return parse_mapping(TrainConfig, values, source)
