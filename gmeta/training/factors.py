"""Where a neural linear model starts: with the item rows of factor analysis, fitted on the training rows by EM."""

from __future__ import annotations

import math

import numpy as np
import psutil
import torch
from torch import Tensor

from gmeta.data.pack import TaskPack
from gmeta.evaluation.baselines import fit_factors
from gmeta.models.neural_linear import NeuralLinear
from gmeta.parallel.collectives import fill_from_rank_0, on_rank_0
from gmeta.training.run import Run


def start_from_factors(run: Run) -> None:
    """Overwrite the rows of the item's id by its loadings and mean, [num_ids, d], and the noise by that of the fit;
    collective.

    Ids that no training row has, the out-of-vocabulary one among them, get the average item. For clicks, rows are
    in units of the logit at the mean click rate. ValueError where the model, or the pack, has no item to start.
    """
    state, pack = run.state, run.pack
    model, tables = state.system.learner.model, state.system.tables
    if not isinstance(model, NeuralLinear) or model.item is None:
        raise ValueError(
            "embedding.start is factors, which are the item rows of model neural_linear: take that model, and a pack "
            "whose schema names an item that is a feature, or leave embedding.start out"
        )
    table = pack.schema.feature(model.item).table
    fused = next(fused for fused in tables.fused.values() if table in fused.offsets)
    binary = run.config.loss == "bce"
    rows = torch.zeros(pack.schema.feature(model.item).num_ids + 1, fused.dim, dtype=torch.float64)
    fitted = on_rank_0(lambda: _fit(pack, model.item or "", fused.dim - 1, run.config.seed, binary), state.mesh)
    if fitted is not None:
        rows, mean = fitted
        rows[:-1, -1] += (math.log(mean / (1 - mean)) if binary else mean) - model.base_rate
    fill_from_rank_0([rows], state.mesh)
    fused.set_rows(table, rows[:-1])
    if not binary:
        with torch.no_grad():
            model.last.log_noise.fill_(float(rows[-1, 0].log()))


def _fit(pack: TaskPack, item: str, num_factors: int, seed: int, binary: bool) -> tuple[Tensor, float]:
    """Return each id's (loadings, mean), and in a last row the variance of labels: float64 [num_ids + 1, k + 1]; and
    the mean label, from which an item's mean is counted.
    """
    columns = pack.split("train").columns((item,))
    num_ids = pack.schema.feature(item).num_ids
    _, task = np.unique(columns.task, return_inverse=True)
    known, position = np.unique(columns.ids[item], return_inverse=True)
    needed = 3 * 8 * (int(task.max()) + 1 + len(known)) * (num_factors + 1) ** 2
    free = psutil.virtual_memory().available
    if needed > free // 2:
        raise ValueError(
            f"embedding.start is factors, whose fit takes {needed:,} bytes for {task.max() + 1:,} tasks and "
            f"{len(known):,} items, and {free:,} are free: set embedding.start to random, or a smaller "
            "model.embedding_dim"
        )
    mean = float(columns.label.mean())
    if binary and not 0 < mean < 1:
        raise ValueError(f"embedding.start is factors, and all training labels are {mean:g}: nothing can be fitted")
    model = fit_factors(task, position, columns.label.astype(np.float64) - mean, seed=seed, num_factors=num_factors)
    # A logit moves 1 / (p (1 - p)) times as far as the probability.
    scale = 1 / (mean * (1 - mean)) if binary else 1.0
    found = torch.cat([model.loadings, model.mean[:, None]], 1) * scale
    rows = found[-1].repeat(num_ids + 1, 1)
    rows[torch.from_numpy(known.astype(np.int64))] = found[:-1]
    rows[-1] = model.variance
    return rows, mean
