"""What a training takes for settings that the user leaves out: those of the run it goes on with, or a recipe's."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from gmeta.config.deprecated import upgrade
from gmeta.config.train import USERS_KEYS, TrainConfig
from gmeta.core.nested import flat, nested
from gmeta.data.pack import open_pack
from gmeta.models.registry import is_foreign
from gmeta.recipes.recipes import recipe_for, recipe_lines
from gmeta.runs.bundle import assets_of, read_manifest
from gmeta.runs.directory import read_settings, recorded_settings

_PLACES = (
    "pack",
    "run_dir",
    "resume",
    "warm_start",
    "init_from",
    "init_map",
    "embedding.pretrained",
    "schedule.position",
)
"""Settings that are the user's alone."""
_OF_A_RUN = ("elastic.", "replay.pack")
"""Settings of one run, which another that begins with its bundle does not take over."""


def with_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a user's nested settings of `gmeta train` with what they leave out.

    A run that goes on takes it from its last checkpoint, where a recipe chose it or no model is named, and a warm start
    from its bundle. A new run without a model's name takes it from the recipe for its pack, and one on next items what
    else it leaves out. ValueError for a recipe that does not exist or does not fit the model, a bundle of another model
    or that is none, or where there is no pack.
    """
    given = {
        key: value
        for key, value in flat(values, whole=USERS_KEYS).items()
        if value not in ("", None) or key not in ("model.name", "recipe")
    }
    if not given.get("pack"):
        return dict(values)
    model = given.get("model.name")
    goes_on = bool(given.get("resume") or given.get("elastic.enabled"))
    recorded = recorded_settings(Path(str(given.get("run_dir", ""))), goes_on=goes_on)
    if recorded is None and given.get("warm_start"):
        found = _of_bundle(Path(str(given["warm_start"])), given)
        if _is_day_of_events(str(given["pack"])):
            found["next_item.targets"] = "last"  # the day's events; those before were learned on their days
        return _filled(found, given)
    if recorded is None and given.get("init_from"):
        read_manifest(Path(str(given["init_from"])))  # that it is no bundle is told before what follows from it
    if recorded is not None:
        found = _others_of(recorded)
        if given.get("recipe", found.get("recipe")) != found.get("recipe"):
            raise ValueError(
                f"recipe is {given['recipe']!r}, and the run to resume goes on with its own settings: leave it out, or "
                "start a new run_dir"
            )
        if model and (model != found.get("model.name") or not found.get("recipe")):
            return dict(values)  # another model is refused: the settings of the run's own would hide why
    elif model and not given.get("recipe") and not _of_next_items(str(given["pack"])):
        return dict(values)
    else:
        found = _chosen(given)
    return _filled(found, given)


def _of_next_items(pack: str) -> bool:
    """Say whether a pack is one of next items. A pack that is none is refused where it is read."""
    try:
        return open_pack(pack).schema.next_item
    except ValueError:
        return False


def _is_day_of_events(pack: str) -> bool:
    try:
        found = open_pack(pack)
        return found.schema.next_item and "day" in found.manifest
    except ValueError:
        return False


def _filled(found: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the user gives, and what was found for the rest, as sections."""
    whole = {**found, **given}
    if not whole.get("replay.pack") and "replay.fraction" not in given:
        whole.pop("replay.fraction", None)
    return nested(whole)


def _of_bundle(path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a bundle that a warm start goes on with, by dotted key.

    Raises ValueError where the user names another model, or they name code that the user did not name: a bundle may
    come from anyone.
    """
    found = {key: value for key, value in _others_of(read_settings(path)).items() if not key.startswith(_OF_A_RUN)}
    found |= {f"model.args.{key}": file for key, file in assets_of(path).items()}
    if given.get("embedding.pretrained"):
        found.pop("embedding.start", None)  # the bundle's rows began so; these do not
    model, named = str(found.get("model.name")), given.get("model.name")
    if named and named != model:
        raise ValueError(
            f"model.name is {named!r}, the bundle has {model!r}: a warm start goes on with the model of {path}. Leave "
            "model.name out, or begin a new training with what fits of the bundle: --init_from"
        )
    if is_foreign(model) and not named:
        raise ValueError(
            f"{path} has a model of its own, {model}: training with it runs that code. Where you trust it, name it "
            f"yourself: --model.name {shlex.quote(model)}"
        )
    return found


def _others_of(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return recorded settings by dotted key, but for those that are the user's alone."""
    old, _ = upgrade(dict(recorded), saved=True)
    return {key: value for key, value in flat(old, whole=USERS_KEYS).items() if key not in _PLACES}


def chosen_for(config: TrainConfig) -> list[str]:
    """Return what a recipe chose of a config, and why, in lines; none where no recipe was followed."""
    if not config.recipe or config.warm_start:
        return []
    settings = flat(asdict(config), whole=USERS_KEYS)
    asked = (
        "recipe",
        "model.features",
        "model.numeric",
        "loader.max_support_rows",
        "embedding.pretrained",
        "init_from",
    )
    given = {key: settings[key] for key in asked if key in settings}
    recipe = recipe_for(open_pack(config.pack), given)
    kept = tuple(choice for choice in recipe.choices if settings.get(choice.key) == choice.value)
    return recipe_lines(replace(recipe, choices=kept))


def _chosen(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the recipe for a user's settings, by dotted key."""
    recipe = recipe_for(open_pack(str(given["pack"])), given)
    return {**{choice.key: choice.value for choice in recipe.choices}, "recipe": recipe.name}
