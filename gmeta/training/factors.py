"""Where a neural linear model starts: with the item rows of Bayesian factor analysis of the training rows."""

from __future__ import annotations

import numpy as np
import psutil
import torch
from torch import Tensor

from gmeta.config.train import TrainConfig
from gmeta.data.pack import TaskPack
from gmeta.models.neural_linear import NeuralLinear
from gmeta.parallel.collectives import fill_from_rank_0, on_rank_0
from gmeta.training.bayes_factors import fit_items
from gmeta.training.run import Run


def start_from_factors(run: Run) -> None:
    """Overwrite the rows of the item's id by its loadings and mean, [num_ids, d], and the noise by that of the fit;
    collective.

    Ids that no training row has, the out-of-vocabulary one among them, get the average item. ValueError where the
    model, or the pack, has no item to start.
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
    rows = torch.zeros(pack.schema.feature(model.item).num_ids, fused.dim, dtype=torch.float64)
    noise = torch.zeros(1, dtype=torch.float64)
    fitted = on_rank_0(lambda: _fit(pack, model.item or "", fused.dim - 1, run.config, binary), state.mesh)
    if fitted is not None:
        scale = model.last.scale
        rows, noise = fitted[0], torch.full_like(noise, fitted[1] / scale**2)
        rows[:, -1] -= model.base_rate
        rows /= scale
    fill_from_rank_0([rows, noise], state.mesh)
    fused.set_rows(table, rows)
    if not binary:
        with torch.no_grad():
            model.last.log_noise.fill_(float(noise.log()))


def _fit(pack: TaskPack, item: str, num_factors: int, config: TrainConfig, binary: bool) -> tuple[Tensor, float]:
    """Return each id's (loadings, mean), float64 [num_ids, k + 1], and the variance of labels about them.

    Where the labels show no factors, loadings are near 0, which training would hardly leave: those of known ids then
    get random numbers of `embedding.init_std`, in units of the labels' deviation.
    """
    columns = pack.split("train").columns((item,))
    num_ids = pack.schema.feature(item).num_ids
    _, task = np.unique(columns.task, return_inverse=True)
    known, position = np.unique(columns.ids[item], return_inverse=True)
    needed = 4 * 8 * (int(task.max()) + 1 + len(known)) * (num_factors + 1) ** 2
    free = psutil.virtual_memory().available
    if needed > free // 2:
        raise ValueError(
            f"embedding.start is factors, whose fit takes {needed:,} bytes for {task.max() + 1:,} tasks and "
            f"{len(known):,} items, and {free:,} are free: set embedding.start to random, or a smaller "
            "model.embedding_dim"
        )
    if columns.label.min() == columns.label.max():
        raise ValueError(
            f"embedding.start is factors, and all training labels are {columns.label[0]:g}: nothing can be fitted"
        )
    found = fit_items(task, position, columns.label, seed=config.seed, num_factors=num_factors, binary=binary)
    own = found.mean[:-1].clone()
    least = config.embedding.init_std * (1.0 if binary else float(columns.label.std()))
    if float(own[:, :-1].square().mean().sqrt()) < least:
        generator = torch.Generator().manual_seed(config.seed)
        own[:, :-1] += least * torch.randn(len(own), num_factors, generator=generator, dtype=own.dtype)
    rows = found.mean[-1].repeat(num_ids, 1)
    rows[torch.from_numpy(known.astype(np.int64))] = own
    return rows, found.variance
