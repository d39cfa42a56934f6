"""Raw click logs with what users did before each row: packs, runs and bundles that read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from commands import gmeta

SCHEMA: dict[str, Any] = {
    "task": "user",
    "label": "click",
    "item": "item",
    "time": "time",
    "categorical": ["item", "place"],
    "sequence": [{"name": "last", "table": "item", "pooling": "none", "max_length": 4}],
    "numeric": ["age"],
}
WIDE = {
    **SCHEMA,
    "sequence": [*SCHEMA["sequence"], {"name": "kinds", "aligned": "last"}],
    "numeric_sequence": [{"name": "gaps", "aligned": "last", "log": True}],
}
"""The same, with what stands beside each value of the history."""


def history_rows(num_users: int = 40, each: int = 12, seed: int = 0, first_user: int = 0) -> dict[str, list[Any]]:
    """Clicks on items whose kind the user clicked before: a model that compares an item with the history knows more."""
    rng = np.random.default_rng(seed)
    columns: dict[str, list[Any]] = {
        name: [] for name in ("user", "item", "place", "time", "last", "kinds", "gaps", "age", "click")
    }
    for user in range(first_user, first_user + num_users):
        liked, seen, times = rng.integers(0, 3), [], []
        for time in np.sort(rng.integers(0, 10_000, each)).tolist():
            item = int(rng.integers(0, 30))
            click = int(rng.random() < (0.8 if item % 3 == liked else 0.2))
            row = (f"u{user}", f"i{item}", f"p{rng.integers(0, 3)}", time, [f"i{i}" for i in seen])
            row += ([f"k{i % 3}" for i in seen], [float(time - t) for t in times], float(rng.normal()), click)
            for column, value in zip(columns.values(), row, strict=True):
                column.append(value)
            if click:
                seen, times = [*seen, item][-6:], [*times, time][-6:]
    return columns


def history_pack(folder: Path, schema: dict[str, Any] | None = None, **columns: Any) -> Path:
    """Write the log, its schema and the pack of it below `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({**history_rows(), **columns}), folder / "log.parquet")
    (folder / "schema.yaml").write_text(yaml.safe_dump(schema or SCHEMA))
    words = ["--input", folder / "log.parquet", "--schema", folder / "schema.yaml", "--out", folder / "pack"]
    gmeta("prepare", *words, "--query_size", 4)
    return folder / "pack"
