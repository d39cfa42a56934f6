"""The smoke sample of a bundle: a few valid tasks with their scores, which a server computes again before it serves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gmeta.config.train import TrainConfig
from gmeta.data.pack import open_pack
from gmeta.recommender.recommender import load
from gmeta.recommender.smoke import SMOKE, smoke_scores
from gmeta.runs.bundle import BundleWriter
from gmeta.runs.data import is_own_pack

_TASKS, _ROWS = 8, 256
"""So many tasks, of so many rows at most."""


def add_smoke(writer: BundleWriter, run_dir: Path, trained: TrainConfig, manifest: Mapping[str, Any]) -> None:
    """Add the sample to a bundle that has all its other files; nothing where the run's own pack is not there.

    `manifest` is what `finish` will be given.
    """
    if not (Path(trained.pack) / "manifest.json").exists():
        return
    pack = open_pack(trained.pack)
    if not is_own_pack(run_dir, pack):
        return
    arrays = pack.split("valid").sample(_TASKS, _ROWS)
    if not arrays or not len(arrays["task_id"]):
        return
    # make_bundle has asked for trust
    rec = load(writer.preview(manifest), trust_model=True, device="cpu", mapped=True)
    scores = smoke_scores(rec, arrays)
    tensors = {name: torch.from_numpy(array.copy()) for name, array in {**arrays, "score": scores}.items()}
    writer.add_tensors(SMOKE, tensors)
