"""gmeta: recommendation models that adapt to new users, items and scenarios. The command line is `gmeta --help`.

Names are imported when they are first used, so that `import gmeta` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gmeta.config.train import TrainConfig
    from gmeta.core.batch import Bag, EmbeddedRows, Examples, TaskBatch
    from gmeta.data.loader import TaskLoader
    from gmeta.data.pack import PackWriter, open_pack, verify_pack
    from gmeta.data.schema import Feature, NumericColumn, PackSchema
    from gmeta.embedding.exchange import RowExchange
    from gmeta.embedding.table import ShardedTables, TableSpec
    from gmeta.meta.learner import MetaLearner
    from gmeta.optim.sparse import SparseOptimizer
    from gmeta.parallel.collectives import all_reduce_sum
    from gmeta.parallel.mesh import close_mesh, open_mesh

_HOMES = {
    "gmeta.core.batch": ("Bag", "EmbeddedRows", "Examples", "TaskBatch"),
    "gmeta.config.train": ("TrainConfig",),
    "gmeta.data.loader": ("TaskLoader",),
    "gmeta.data.pack": ("PackWriter", "open_pack", "verify_pack"),
    "gmeta.data.schema": ("Feature", "NumericColumn", "PackSchema"),
    "gmeta.embedding.exchange": ("RowExchange",),
    "gmeta.embedding.table": ("ShardedTables", "TableSpec"),
    "gmeta.meta.learner": ("MetaLearner",),
    "gmeta.optim.sparse": ("SparseOptimizer",),
    "gmeta.parallel.collectives": ("all_reduce_sum",),
    "gmeta.parallel.mesh": ("close_mesh", "open_mesh"),
}

__all__ = [
    "Bag",
    "EmbeddedRows",
    "Examples",
    "Feature",
    "MetaLearner",
    "NumericColumn",
    "PackSchema",
    "PackWriter",
    "RowExchange",
    "ShardedTables",
    "SparseOptimizer",
    "TableSpec",
    "TaskBatch",
    "TaskLoader",
    "TrainConfig",
    "all_reduce_sum",
    "close_mesh",
    "open_mesh",
    "open_pack",
    "verify_pack",
]

__version__ = version("gmeta")


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'gmeta' has no attribute {name!r}")
