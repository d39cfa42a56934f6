"""gmeta: recommendation models that adapt to new users, items and scenarios. The command line is `gmeta --help`.

    run = gmeta.train("train.yaml", model=TwoTowers)       # all that `gmeta train` does
    with gmeta.Trainer("train.yaml") as trainer: ...       # a loop of your own
    rec = gmeta.load(run)                                  # adapt to examples, score candidates
    scores = rec.adapt(support).predict(candidates)

Names are imported when they are first used, so that `import gmeta` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gmeta.config.train import TrainConfig
    from gmeta.core.batch import Examples, TaskBatch
    from gmeta.data.loader import TaskLoader
    from gmeta.data.pack import PackWriter, open_pack, verify_pack
    from gmeta.data.schema import Feature, NumericColumn, PackSchema
    from gmeta.embedding.exchange import RowExchange
    from gmeta.embedding.table import ShardedTables, TableSpec
    from gmeta.meta.fast_weights import FastWeights
    from gmeta.meta.inner_loop import InnerLoop
    from gmeta.meta.learner import MetaLearner
    from gmeta.models.inputs import InputSpec
    from gmeta.optim.sparse import SparseOptimizer
    from gmeta.parallel.mesh import close_mesh, open_mesh
    from gmeta.recommender.recommender import AdaptedTasks, Recommender, load
    from gmeta.training.trainer import Trainer, train

_HOMES = {
    "gmeta.training.trainer": ("Trainer", "train"),
    "gmeta.recommender.recommender": ("AdaptedTasks", "Recommender", "load"),
    "gmeta.models.inputs": ("InputSpec",),
    "gmeta.config.train": ("TrainConfig",),
    "gmeta.data.pack": ("PackWriter", "open_pack", "verify_pack"),
    "gmeta.data.schema": ("Feature", "NumericColumn", "PackSchema"),
    "gmeta.data.loader": ("TaskLoader",),
    "gmeta.core.batch": ("Examples", "TaskBatch"),
    "gmeta.embedding.exchange": ("RowExchange",),
    "gmeta.embedding.table": ("ShardedTables", "TableSpec"),
    "gmeta.meta.fast_weights": ("FastWeights",),
    "gmeta.meta.inner_loop": ("InnerLoop",),
    "gmeta.meta.learner": ("MetaLearner",),
    "gmeta.optim.sparse": ("SparseOptimizer",),
    "gmeta.parallel.mesh": ("close_mesh", "open_mesh"),
}

__all__ = [
    "AdaptedTasks",
    "Examples",
    "FastWeights",
    "Feature",
    "InnerLoop",
    "InputSpec",
    "MetaLearner",
    "NumericColumn",
    "PackSchema",
    "PackWriter",
    "Recommender",
    "RowExchange",
    "ShardedTables",
    "SparseOptimizer",
    "TableSpec",
    "TaskBatch",
    "TaskLoader",
    "TrainConfig",
    "Trainer",
    "close_mesh",
    "load",
    "open_mesh",
    "open_pack",
    "train",
    "verify_pack",
]

__version__ = version("gmeta")


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'gmeta' has no attribute {name!r}")
