"""What the commands over files share: rank 0 deals the rows to parts on disk, and each rank computes some of them.

Every rank holds the whole model, and computes a part alone: what comes out does not depend on the number of ranks.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gmeta.core.errors import require
from gmeta.data.pack import lock_directory
from gmeta.data.prepare.parts import DealtParts
from gmeta.parallel.collectives import broadcast_from_rank_0, gather_to_rank_0, on_rank_0, raise_together
from gmeta.parallel.mesh import Mesh
from gmeta.runs import checkpoint
from gmeta.runs.bundle import is_bundle

PATIENCE_S = 86_400
"""Ranks wait so long for one that deals or computes. That a worker has died they notice at once."""


@contextmanager
def scratch_folder(out: Path, mesh: Mesh) -> Iterator[Path]:
    """Give all ranks a folder beside `out`, and remove it at the end; what a killed command left there too. Collective.

    Raises ValueError where there can be none.
    """
    path = out.with_name(f".{out.name}.scratch")

    def make() -> int:
        try:
            return lock_directory(path)
        except OSError as error:
            raise ValueError(f"cannot write {out}: {error.strerror or error}; name another file") from error

    lock = on_rank_0(make, mesh)
    try:
        yield path
    finally:
        if lock is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def same_checkpoint(source: Path, which: str, mesh: Mesh) -> str:
    """Return the checkpoint that rank 0 finds, for all ranks: a run that is training may have another the next moment.
    Collective. ValueError for a checkpoint of a bundle, which is one version.
    """
    if is_bundle(source):
        require(which == "best", "checkpoint", which, "a bundle is one version: leave it out")
    if is_bundle(source) or mesh.control_group is None:
        return which

    def find() -> int:
        return checkpoint.step_of(checkpoint.find_checkpoint(source / "checkpoints", which))

    return str(int(broadcast_from_rank_0(on_rank_0(find, mesh) or 0, mesh)))


def sum_over_parts(
    parts: DealtParts, mesh: Mesh, num_counts: int, compute: Callable[[int], NDArray[np.int64]]
) -> NDArray[np.int64]:
    """Compute this rank's parts, each of which gives int64 [num_counts], and return their sum over all ranks' parts on
    rank 0; collective. An error on any rank is raised on all.
    """
    error, total = None, np.zeros(num_counts, np.int64)
    try:
        for number in parts.numbers[mesh.rank :: mesh.world_size]:
            total += compute(number)
    except (ValueError, OSError) as problem:
        error = problem
    raise_together(error, mesh)
    summed: NDArray[np.int64] = gather_to_rank_0(total[None], mesh).sum(0)
    return summed
