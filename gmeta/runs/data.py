"""Decide which data a run fits: its own pack, packs that were encoded alike, and other runs of the same data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gmeta.config.train import LossName
from gmeta.core.files import read_mapping
from gmeta.data.identity import DataIdentity, identity_difference, identity_of, table_identities, vocabulary_file
from gmeta.data.pack import TaskPack, open_pack
from gmeta.runs.directory import (
    read_config,
    read_rows_checksums,
    read_schema,
    read_tasks_checksum,
    rows_difference,
    tasks_difference,
)


def run_identity(run_dir: Path) -> DataIdentity:
    """Return the identity of the data that a run was trained on."""
    schema, data_schema = read_schema(run_dir)
    return identity_of(schema, data_schema, run_dir / "vocab")


def require_fitting_pack(run_dir: Path, pack: TaskPack) -> None:
    """Raise ValueError with what differs, unless the pack's ids and numbers mean what they meant in training."""
    if lines := identity_difference(run_identity(run_dir), pack.identity()):
        raise ValueError(
            f"{pack.path} was not encoded as the data of run {run_dir}: {'; '.join(lines)}. "
            "Score its raw rows with `gmeta predict`, which encodes them as the run does, or train a run on this pack"
        )


def require_clicks(label: NDArray[Any], loss: LossName, source: str) -> None:
    """Raise ValueError where labels [N] of `source` are no clicks, and the run was trained on clicks. Those of several
    labels, [N, K], were checked by the schema.
    """
    if label.ndim == 1 and loss == "bce" and not np.isin(label, (0, 1)).all():
        wrong = label[~np.isin(label, (0, 1))][0]
        raise ValueError(f"{source} has label {wrong:g}: the run was trained on clicks, which are 0 or 1")


def require_scores(run_dir: Path) -> None:
    """Raise ValueError for a run that finds next items, and scores no examples."""
    if read_schema(run_dir)[0].next_item:
        raise ValueError(
            f"{run_dir} finds next items and scores no examples: use gmeta recommend, or from Python NextItems.open of "
            "gmeta.recommender.next_items"
        )


def require_own_vocabularies(run_dir: Path) -> None:
    """Raise ValueError where the run's vocabulary files are not those that it was trained with."""
    schema, data_schema = read_schema(run_dir)
    if schema.identity is None:
        return
    found = table_identities(schema, data_schema, run_dir / "vocab")
    for table, expected in schema.identity.items():
        if found.get(table) != expected:
            raise ValueError(
                f"{vocabulary_file(run_dir / 'vocab', table)} is missing, or not what the run was trained with: "
                "copy it again from the pack, or train again"
            )


def require_same_training_data(run_dir: Path, other: Path) -> None:
    """Raise ValueError with what differs, unless two runs were trained on the same data, tasks, splits and rows."""
    lines = identity_difference(run_identity(run_dir), run_identity(other))
    mine, theirs = _trained_tasks(run_dir), _trained_tasks(other)
    known = mine is not None and theirs is not None
    lines += tasks_difference(mine, theirs)
    lines = lines or rows_difference(read_rows_checksums(run_dir), read_rows_checksums(other))
    if not known and read_config(run_dir).pack != read_config(other).pack:
        lines.append(
            "whether it had the same tasks is not recorded, and the packs of both runs are not there to compare"
        )
    if lines:
        raise ValueError(
            f"run {other} was not trained on the data of run {run_dir}: {'; '.join(lines)}. "
            "Only runs of one pack can be compared: train it again on the pack of the other"
        )


def _trained_tasks(run_dir: Path) -> str | None:
    """Return the checksum of a run's tasks and splits, recorded or that of its pack; None where neither is there."""
    recorded = read_tasks_checksum(run_dir)
    if recorded is not None:
        return recorded
    pack = Path(read_config(run_dir).pack)
    return open_pack(pack).tasks_checksum() if (pack / "manifest.json").exists() else None


def is_own_pack(run_dir: Path, pack: TaskPack) -> bool:
    """Say whether a run was trained on this very pack, here or in another place. A pack that was made again with other
    rows is another, also in the same place.
    """
    if rows_difference(read_rows_checksums(run_dir), pack.rows_checksums()):
        return False
    if Path(read_config(run_dir).pack).resolve() == pack.path.resolve():
        return True
    recorded = read_mapping(run_dir / "schema.json", "restore it").get("manifest")
    return recorded is not None and recorded == pack.manifest["xxh3"]
