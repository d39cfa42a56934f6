"""The smoke sample of a bundle: a few tasks, valid ones where there are any, and scores that servers compute anew."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from gmeta.data.pack import TaskPack
from gmeta.recommender.next_items import NextItems
from gmeta.recommender.recommender import load
from gmeta.recommender.smoke import SMOKE, smoke_scores
from gmeta.runs.bundle import BundleWriter

_TASKS, _ROWS = 8, 256
"""So many tasks, of so many rows at most."""


def add_smoke(writer: BundleWriter, pack: TaskPack, manifest: Mapping[str, Any]) -> None:
    """Add a sample of the run's own pack to a bundle that has all its other files; `manifest` is what `finish` will be
    given.
    """
    name = "valid" if "valid" in pack.splits else "train"
    arrays = pack.split(name).sample(_TASKS, _ROWS)
    if not arrays or not len(arrays["task_id"]):
        return
    # make_bundle has asked for trust
    open_run = NextItems.open if pack.schema.next_item else load
    rec = open_run(writer.preview(manifest), trust_model=True, device="cpu", mapped=True)
    scores = smoke_scores(rec, arrays)
    tensors = {name: torch.from_numpy(array.copy()) for name, array in {**arrays, "score": scores}.items()}
    writer.add_tensors(SMOKE, tensors)
