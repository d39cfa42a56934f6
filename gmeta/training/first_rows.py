"""First rows of new ids, made of what else is known of them by the networks of `embedding.generator`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gmeta.core.batch import to_device
from gmeta.models.generator import NAME
from gmeta.training.run import Run

_CHUNK_IDS = 4096


def set_generated_rows(run: Run, feature: str, ids: Tensor) -> None:
    """Add what the feature's generator makes of an id's first training row to the rows of these ids, which hold the row
    of unknown ids; collective, all ranks give the same. An id without a training row keeps that row.
    """
    split = run.pack.split("train")
    known, first = np.unique(split.feature_ids(feature), return_index=True)
    chosen = np.isin(known, ids.numpy())
    known, first = known[chosen].astype(np.int64), first[chosen]
    made = [_generated(run, feature, first[start : start + _CHUNK_IDS]) for start in range(0, len(first), _CHUNK_IDS)]
    table = run.pack.schema.feature(feature).table
    fused = next(fused for fused in run.state.system.tables.fused.values() if table in fused.offsets)
    for start, rows in zip(range(0, len(known), _CHUNK_IDS), made, strict=True):
        fused.set_ids(table, torch.from_numpy(known[start : start + _CHUNK_IDS]), rows)


@torch.no_grad()
def _generated(run: Run, feature: str, rows: np.ndarray) -> Tensor:
    """Return the row of unknown ids with what the generator makes of these rows of the training split, [n, d]."""
    system, split = run.state.system, run.pack.split("train")
    _, query, _ = split.gather(split.rows_apart(rows))
    query = system.examples(query)
    query.dense[..., system.num_numeric - len(system.generated) :] = 1
    request = system.exchange.request(query=query)
    fetched = system.exchange.fetch(system.exchange.exchange_ids(request))
    index = to_device(system.learner.index_query(request.query, request.num_rows, {}), system.mesh.device)
    query = to_device(query, system.mesh.device, system.dtype)
    embedded = system.learner.embedded(fetched, index, query)
    dense = query.dense.flatten(0, 1)
    generators = getattr(system.learner.model, NAME)
    found: Tensor = generators(dense, embedded)[1][feature]
    return found.cpu()
