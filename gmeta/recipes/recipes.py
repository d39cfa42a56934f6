"""From the facts of a pack to settings of `gmeta train`, each with the reason for it.

A recipe is a plain function of facts. Its numbers come from `benchmarks/quality.py`, which says on which data; those of
scenarios from single runs (docs/quality.md, remarks).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gmeta.core.errors import nearest
from gmeta.core.numbers import label_unit
from gmeta.data.pack import TaskPack
from gmeta.models.inputs import input_spec, usual_features
from gmeta.recipes.facts import PackFacts, read_facts

AUTO = "auto"
NEXT_ITEM = "next_item"

FEW_TASKS, LONG_TASKS = 200, 500
"""Fewer tasks of so many rows each are scenarios, not users or items."""
LONG_HISTORY = 40
"""Rows of a task from which on its past level may be another: on MovieLens-100K (median 54) drift gains .004 AUC in the
test, on the synthetic log (24, without drift) it gains nothing, and keeping the order costs .0005."""
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

    What the user gives is reckoned with, and not chosen again. ValueError for a recipe that does not exist, or is for
    another model, or a feature that the pack lacks.
    """
    if pack.schema.next_item:
        return _next_item(pack, given)
    if pack.schema.labels:
        raise ValueError(
            f"{pack.path} has {len(pack.schema.labels)} labels, and recipes are for one: name a model that gives a "
            "logit for each, such as --model.name melu"
        )
    features = given.get("model.features") or usual_features(pack.schema)
    known = list(input_spec(pack.schema, features=features, numeric=False, embedding_dim=1).tables)
    facts = read_facts(pack, known, numeric=given.get("model.numeric", True))
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
                f"recipe is {name!r}, whose model is {choice.value!r}, and model.name is {model!r}: leave one of the "
                "two out; the config.yaml of a run holds what a recipe chose for its model, so start another from your "
                "own settings"
            )
    why = why if name == fitting else f"named, where {fitting} would fit: {why}"
    return Recipe(name, why, tuple(choice for choice in choices if choice.key not in given))


def _next_item(pack: TaskPack, given: Mapping[str, Any]) -> Recipe:
    """Return the settings of a pack of next items, whatever model is named."""
    name = str(given.get("recipe") or AUTO)
    if name not in (AUTO, NEXT_ITEM):
        raise ValueError(f"recipe is {name!r}, and {pack.path} is a pack of next items: leave it out")
    choices = [
        Choice("model.name", "sasrec", "a causal Transformer over the ids of items"),
        Choice("model.embedding_dim", 64, "width of items and states"),
        Choice("meta.adapt", [], "a history is read as it is"),
        Choice("loader.max_support_rows", 50, "the last events of a history"),
        Choice("loader.tasks_per_batch", 128, "users"),
        Choice("embedding.optimizer", "adagrad", "rows of rare ids take larger steps"),
        Choice("embedding.lr", 0.05, "rates fall as a row is trained"),
        Choice("embedding.init_std", 0.0128, "short rows say little before they are trained"),
        Choice("dense.lr", 0.001, "with Adam"),
        Choice("schedule.epochs", 100, "passes, fewer where valid users say so"),
    ]
    if "valid" in pack.splits:
        choices.append(Choice("schedule.metric", "ndcg@10", "of valid targets, among all items"))
        choices.append(Choice("schedule.patience", 10, "validations without a better one"))
    why = f"{pack.split('train').num_tasks:,} histories of {pack.catalogue().num_ids - 1:,} items"
    return Recipe(NEXT_ITEM, why, tuple(choice for choice in choices if choice.key not in given))


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
    if facts.lists:
        return "cold_items", f"{rows}, which have lists of their own, as items do: {', '.join(facts.lists)}"
    return "cold_users", rows


def _losses(facts: PackFacts, given: Mapping[str, Any]) -> list[Choice]:
    """Return the losses that fit the labels, and the metric that chooses the checkpoint."""
    if facts.binary:
        loss = Choice("loss", "bce", "every label is 0 or 1")
    else:
        loss = Choice("loss", "mse", "labels have other values than 0 and 1")
    choices = [loss]
    if given.get("loss") in ("l1", "huber"):
        choices.append(
            Choice("meta.inner_loss", "mse", f"loss {given['loss']} has no closed form, the squared one has")
        )
    if facts.has_valid:
        choices.append(Choice("schedule.metric", "loss", "of valid tasks, after adaptation"))
    return choices


def _cold_users(facts: PackFacts, given: Mapping[str, Any]) -> list[Choice]:
    return [
        *_last_layer(facts, "over vectors of items"),
        Choice("model.embedding_dim", 13, "at most 12 bases of a task, and a mean"),
        *_support(facts, given),
        *_task_features(facts),
        *_rows(facts, given, lr=0.002),
        *_outer_loop(lr=0.003),
        *_schedule(facts, given),
    ]


def _cold_items(facts: PackFacts, given: Mapping[str, Any]) -> list[Choice]:
    return [
        *_last_layer(facts, "over vectors of users"),
        Choice("model.embedding_dim", 16, "at most 15 bases of a task, and a mean"),
        *_support(facts, given),
        *_task_features(facts),
        Choice("embedding.init_std", 0.3, "what describes an item is to matter from the start"),
        *_rows(facts, given, lr=0.003),
        *_outer_loop(lr=0.02),
        *_schedule(facts, given),
    ]


def _support(facts: PackFacts, given: Mapping[str, Any]) -> list[Choice]:
    """Return how training draws supports: in the order of time where a task's level may drift, else anew each epoch."""
    if not _drifts(facts, given):
        return [Choice("loader.resample", True, "a new support every epoch, of all rows of a task: data go further")]
    why = f"the query is last by time, and over {facts.median_rows} rows a task's level may drift"
    order = Choice("loader.resample", False, "drift needs supports in the order of time")
    return [Choice("model.args.drift_std", 0.5, why), order]


def _drifts(facts: PackFacts, given: Mapping[str, Any]) -> bool:
    rows = given.get("loader.max_support_rows") or facts.median_rows
    in_order = facts.query_is_last and not given.get("loader.resample")
    return in_order and min(rows, facts.median_rows) >= LONG_HISTORY


def _schedule(facts: PackFacts, given: Mapping[str, Any]) -> list[Choice]:
    batch = 32 if facts.num_tasks < 1000 else 64
    return [
        Choice("loader.tasks_per_batch", batch, f"{facts.num_tasks:,} training tasks"),
        Choice("schedule.epochs", 4 if _drifts(facts, given) else 5, "passes over them"),
    ]


def _scenarios(facts: PackFacts, given: Mapping[str, Any]) -> list[Choice]:
    return [
        *_last_layer(facts, "over learned features of users and items"),
        Choice("model.embedding_dim", 17, "16 bases of a task, and a mean"),
        Choice("model.args.hidden", [64], "many rows a task: a wider tower"),
        *_support(facts, given),
        *_episodes(facts),
        *_task_features(facts),
        *_rows(facts, given, lr=0.002, random_lr=0.005),
        *_outer_loop(lr=0.003),
        Choice("loader.tasks_per_batch", 16, "they are long"),
        Choice("schedule.epochs", 15, "passes over the training rows"),
    ]


def _last_layer(facts: PackFacts, over: str) -> list[Choice]:
    model = f"each task solves a Bayesian linear last layer {over}"
    choices = [Choice("model.name", "neural_linear", model), Choice("meta.adapt", ["last_layer"], "in closed form")]
    if not facts.binary and (unit := label_unit(facts.label_std)) != 1:
        why = "the labels' deviation: rates and priors are in units of it"
        choices.append(Choice("model.args.label_scale", unit, why))
    return choices


def _rows(facts: PackFacts, given: Mapping[str, Any], lr: float, random_lr: float = 0.01) -> list[Choice]:
    """Return where rows begin, and their rate: `lr` where factor analysis can be fitted, else `random_lr`."""
    for key in ("embedding.pretrained", "init_from"):
        if given.get(key):
            return [Choice("embedding.lr", random_lr, f"{key} sets first rows, and not factor analysis")]
    vectors = facts.num_tasks + facts.num_items
    if given.get("embedding.start") == "random":
        reason = "you say so"
    elif facts.item is None or facts.item in given.get("model.args.task_features", ()):
        reason = "the model reads no item that varies within tasks (item in the schema)"
    elif not facts.label_std:
        reason = "all labels are alike, and factor analysis finds nothing in them"
    elif vectors > MAX_FACTOR_VECTORS:
        reason = f"{vectors:,} tasks and items are too many for factor analysis"
    else:
        start = Choice("embedding.start", "factors", f"rows of {facts.item} begin at Bayesian factor analysis")
        return [start, Choice("embedding.lr", lr, "they are good from the start")]
    return [Choice("embedding.lr", random_lr, f"rows begin at random: {reason}")]


def _episodes(facts: PackFacts) -> list[Choice]:
    why = f"{facts.num_tasks} tasks alone are few: each is many episodes an epoch"
    return [] if facts.roles_are_given else [Choice("loader.episode_rows", 400, why)]


def _outer_loop(lr: float) -> list[Choice]:
    return [
        Choice("dense.lr", lr, "with decay to 0"),
        Choice("dense.decay", "cosine", "the last steps average out noise"),
        Choice("dense.clip_norm", 5.0, "one odd task must not move all"),
        Choice("embedding.optimizer", "adam", "rows of rare ids move as far as those of frequent ones"),
    ]


def _task_features(facts: PackFacts) -> list[Choice]:
    names = list(facts.task_features)
    why = "they do not vary within a task: they shift its prior"
    return [Choice("model.args.task_features", names, why)] if names and facts.varying else []


RECIPES: dict[str, Callable[[PackFacts, Mapping[str, Any]], list[Choice]]] = {
    "cold_users": _cold_users,
    "cold_items": _cold_items,
    "scenarios": _scenarios,
}
"""Add a recipe: a function here, and its name in `RecipeName` of config/train.py."""
