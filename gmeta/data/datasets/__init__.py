"""Named data sets, for `gmeta prepare --dataset NAME --root DIRECTORY`.

To add one, write a file beside `movielens.py` with a `DataSet` (a schema, a query, the usual settings), and name it in
`DATA_SETS`.
"""

from __future__ import annotations

from pathlib import Path

from gmeta.data.datasets.dataset import DataSet
from gmeta.data.datasets.movielens import ML_1M, ML_1M_MELU, ML_100K
from gmeta.data.sources import Connection, RawPart

DATA_SETS: dict[str, DataSet] = {"ml-100k": ML_100K, "ml-1m": ML_1M, "ml-1m-melu": ML_1M_MELU}


def open_data_set(con: Connection, name: str, root: str | None) -> RawPart:
    """Open the raw rows of a named data set whose files are in `root`.

    Raises ValueError where files are missing, and says where to get them.
    """
    data = DATA_SETS[name]
    if root is None:
        raise ValueError(f"dataset {name} needs root, the directory with {', '.join(data.files)}. {data.origin}")
    missing = [f for f in data.files if not any((Path(root) / option).is_file() for option in f.split(" or "))]
    if missing:
        raise ValueError(f"dataset {name}: {root} lacks {', '.join(missing)}. {data.origin}")
    return data.open(con, Path(root))
