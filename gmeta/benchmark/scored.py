"""What cells predicted, in one order, so that they can be paired row by row."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from gmeta.evaluation.predictions import RANKING_SUFFIX

AFTER = "after"
_LEAST = 1e-7


@dataclass(frozen=True)
class Scored:
    """Rows [N] with what one model says of them, by unit, scene, and then time."""

    unit: NDArray[Any]  # [N], what is resampled: the user, or the item
    scene: NDArray[np.int64]  # [N]
    row: NDArray[np.int64]  # [N], place in the split of the pack
    known: NDArray[np.int64]  # [N], known rows of a new scene; -1 where tasks are not called by it
    label: NDArray[np.float64]  # [N]
    logit: NDArray[np.float64]  # [N]

    @property
    def score(self) -> NDArray[np.float64]:
        """Return click probabilities, [N]."""
        found: NDArray[np.float64] = 1 / (1 + np.exp(-self.logit))
        return found

    def where(self, mask: NDArray[np.bool_]) -> Scored:
        """Return some rows."""
        return Scored(**{name: value[mask] for name, value in vars(self).items()})

    def shifted(self, shifts: dict[int, float]) -> Scored:
        """Return the rows with a number added to the logits of each scene."""
        return replace(self, logit=self.logit + np.array([shifts.get(int(s), 0.0) for s in self.scene]))


def read_scored(file: Path, pack: str, variant: str = AFTER) -> Scored:
    """Read what a variant of a run predicted; of a run that adapts nothing its only one. `pack` is the pack's name,
    which says what keys of tasks are.

    Rows of scenes that train lacks are left out, but where a scene is new.
    """
    table = pq.read_table(file)
    variants = json.loads((table.schema.metadata or {})[b"variants"])
    name = variant if variant in variants else variants[0]
    score = table[name].to_numpy().astype(np.float64).clip(_LEAST, 1 - _LEAST)
    ranking = f"{name}{RANKING_SUFFIX}"
    logit = (
        table[ranking].to_numpy().astype(np.float64) if ranking in table.column_names else np.log(score / (1 - score))
    )
    tasks, scenes = map(str, table["task"].to_pylist()), table["scenario"].to_pylist()
    known = [-1] * len(scenes)
    if is_new_scene(pack):
        keys, _, rows = zip(*(task.rpartition("@") for task in tasks), strict=True)
        units, known = list(keys), list(map(int, rows))
        scenes = [unit.partition("/")[0] for unit in units]  # predictions name no scene that train lacks
    else:
        units = [task.rpartition("/")[0] for task in tasks] if pack == "in_scenes" else list(tasks)
    found = Scored(
        np.array(units),
        np.array([-1 if scene is None else int(scene) for scene in scenes]),
        table["row"].to_numpy().astype(np.int64),
        np.array(known, np.int64),
        table["label"].to_numpy().astype(np.float64),
        logit,
    )
    return _in_order(found.where(found.scene >= 0))


def is_new_scene(pack: str) -> bool:
    """Whether a pack's test tasks are items of a scene that train lacks, called by the rows that they know."""
    kind, _, scene = pack.partition("_")
    return kind == "new" and scene.isdecimal()


def rows_of_all(parts: Sequence[Scored]) -> Scored:
    """Return the rows of several, in the one order."""
    return _in_order(Scored(**{name: np.concatenate([getattr(p, name) for p in parts]) for name in vars(parts[0])}))


def aligned(first: Scored, other: Scored, what: str) -> Scored:
    """Return the logits of `other` on the rows of `first`, whose columns both then share. ValueError where they do not
    have the same rows.
    """
    same = np.array_equal(first.unit, other.unit) and np.array_equal(first.scene, other.scene)
    if not same or not np.array_equal(first.label, other.label):
        raise ValueError(f"{what} has other rows than the others: remove its folder under cells, and run it again")
    return replace(first, logit=other.logit)


def _in_order(found: Scored) -> Scored:
    return found.where(np.lexsort((np.arange(len(found.unit)), found.scene, found.unit)))  # type: ignore[arg-type]
