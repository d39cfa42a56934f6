"""From the facts of a pack to settings of `gmeta train`, each with the reason for it.

A recipe is a plain function of facts. Its numbers come from `benchmarks/quality.py`, which says on which data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gmeta.core.errors import nearest
from gmeta.data.pack import TaskPack
from gmeta.models.inputs import input_spec, usual_features
from gmeta.recipes.facts import PackFacts, read_facts

AUTO = "auto"

FEW_TASKS, LONG_TASKS = 200, 500
"""Fewer tasks of so many rows each are scenarios, not users or items."""
MAX_FACTOR_VECTORS = 200_000
"""Factor analysis is fitted in memory on rank 0: about 7 kB for each task and item, at 16 numbers a row."""


@dataclass(frozen=True)
class Choice:
    """A setting of a recipe, and why."""

    key: str  # dotted
    value: Any
    why: str


@dataclass(frozen=True)
class Recipe:
    """What was chosen for a pack, without what the user gave."""

    name: str
    why: str
    choices: tuple[Choice, ...]


def recipe_for(pack: TaskPack, given: Mapping[str, Any]) -> Recipe:
    """Return the recipe that `given`, the user's settings by dotted key, names, or else the one that fits the pack.

    What the user gives is reckoned with, and not chosen again. ValueError for a recipe that does not
    exist, or is for another model, or a
    feature that the pack lacks.
    """
    features = given.get("model.features") or usual_features(pack.schema)
    facts = read_facts(pack, list(input_spec(pack.schema, features=features, numeric=False, embedding_dim=1).features))
    fitting, why = _fitting(facts)
    name = str(given.get("recipe") or AUTO)
    name = fitting if name == AUTO else name
    if name not in RECIPES:
        raise ValueError(f"recipe is {name!r}: {nearest(name, [AUTO, *RECIPES])}")
    choices = [*_losses(facts, given), *RECIPES[name](facts, given)]
    model = given.get("model.name")
    for choice in choices:
        if choice.key == "model.name" and model not in (None, "", choice.value):
            raise ValueError(
                f"recipe is {name!r}, whose model is {choice.value!r}, and model.name is {model!r}: "
                "leave one of the two out"
            )
    why = why if name == fitting else f"named, where {fitting} would fit: {why}"
    return Recipe(name, why, tuple(choice for choice in choices if choice.key not in given))


def recipe_lines(recipe: Recipe) -> list[str]:
    """Return the recipe in lines for a user: its name, then one setting a line with the reason."""
    settings = [f"{choice.key}: {_shown(choice.value)}" for choice in recipe.choices]
    width = min(40, max((len(setting) for setting in settings), default=0))
    head = f"recipe {recipe.name}: {recipe.why}. A setting that you give replaces the recipe's:"
    return [head, *(f"  {s:<{width}}  {c.why}" for s, c in zip(settings, recipe.choices, strict=True))]


def _shown(value: Any) -> str:
    """Return a value as YAML has it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)


def _fitting(facts: PackFacts) -> tuple[str, str]:
    rows = f"{facts.num_tasks:,} training tasks of {facts.median_rows:,} rows (median)"
    if facts.num_tasks < FEW_TASKS and facts.median_rows >= LONG_TASKS:
        return "scenarios", f"{rows} are scenarios"
    if facts.item is not None and facts.rows_per_item < facts.median_rows / 2:
        return "cold_items", f"{rows}, and only {facts.rows_per_item:.0f} an id of {facts.item}"
    return "cold_users", rows


def _losses(facts: PackFacts, given: Mapping[str, Any]) -> list[Choice]:
    """Return the loss that fits the labels, and the metric that chooses the checkpoint."""
    if facts.binary:
        loss = Choice("loss", "bce", "every label is 0 or 1")
    else:
        loss = Choice("loss", "mse", "labels have other values than 0 and 1")
    return [loss, Choice("schedule.metric", "loss", "of valid tasks, after adaptation")]


def _cold_users(facts: PackFacts, given: Mapping[str, Any]) -> list[Choice]:
    return _neural_linear(facts)


def _cold_items(facts: PackFacts, given: Mapping[str, Any]) -> list[Choice]:
    return _neural_linear(facts)


def _neural_linear(facts: PackFacts) -> list[Choice]:
    """Return a Bayesian linear last layer whose item rows start from factor analysis, where that can be fitted."""
    model = "each task solves a Bayesian linear last layer in closed form"
    choices = [
        Choice("model.name", "neural_linear", model),
        Choice("meta.adapt", ["last_layer"], "in closed form"),
        Choice("model.embedding_dim", 13, "12 bases of a task and an item's mean"),
        Choice("loader.resample", True, "a new support every epoch keeps small data from overfitting"),
        Choice("loader.tasks_per_batch", 32 if facts.num_tasks < 4000 else 64, f"{facts.num_tasks:,} training tasks"),
        *_outer_loop(),
        *_task_features(facts),
    ]
    vectors = facts.num_tasks + facts.num_items
    if facts.item is not None and vectors <= MAX_FACTOR_VECTORS:
        choices.append(Choice("embedding.start", "factors", f"rows of {facts.item} begin at factor analysis's"))
        choices.append(Choice("embedding.lr", 0.002, "they are good from the start"))
    else:
        reason = "the schema names no item that varies within tasks" if facts.item is None else f"{vectors:,} vectors"
        choices.append(Choice("embedding.lr", 0.01, f"rows begin at random: {reason}"))
    choices.append(Choice("schedule.epochs", 8, "passes over the training tasks"))
    return choices


def _outer_loop() -> list[Choice]:
    return [
        Choice("dense.lr", 0.003, "with decay to 0"),
        Choice("dense.decay", "cosine", "the last steps average out noise"),
        Choice("dense.clip_norm", 5.0, "one odd task must not move all"),
        Choice("embedding.optimizer", "adam", "rows of rare ids move as far as those of frequent ones"),
    ]


def _task_features(facts: PackFacts) -> list[Choice]:
    names = list(facts.task_features)
    why = "they do not vary within a task: they shift its prior"
    return [Choice("model.args.task_features", names, why)] if names and facts.varying else []


def _scenarios(facts: PackFacts, given: Mapping[str, Any]) -> list[Choice]:
    """Return a last layer in closed form over learned features of users and items: few tasks, each with many rows."""
    model = "each task solves a Bayesian linear last layer over learned features"
    choices = [
        Choice("model.name", "neural_linear", model),
        Choice("meta.adapt", ["last_layer"], "in closed form"),
        Choice("model.embedding_dim", 17, "16 bases of a task, and a mean"),
        Choice("model.args.hidden", [64], "many rows a task: a wider tower"),
        Choice("loader.episode_rows", 400, f"{facts.num_tasks} tasks alone are few: each is many episodes an epoch"),
        Choice("loader.max_support_rows", 300, "the last rows: as many as episodes have"),
        Choice("loader.resample", True, "a new support every epoch keeps small data from overfitting"),
        Choice("loader.tasks_per_batch", 16, "episodes are long"),
        Choice("embedding.lr", 0.005, "rows begin at random"),
        Choice("schedule.epochs", 15, "passes over the training rows"),
        *_outer_loop(),
    ]
    return choices + _task_features(facts)


RECIPES: dict[str, Callable[[PackFacts, Mapping[str, Any]], list[Choice]]] = {
    "cold_users": _cold_users,
    "cold_items": _cold_items,
    "scenarios": _scenarios,
}
"""Add a recipe: a function here, and its name in `RecipeName` of config/train.py."""
