"""Bundles of a growing model, made in milliseconds: nobody trains them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from packs import DATA_SCHEMA, SCHEMA

from gmeta.data.schema import PackSchema
from gmeta.runs.bundle import ROWS, BundleWriter

DIM = 4
MODEL = "melu"


class Growing:
    """Days of a model with a table `item` that grows and forgets, `tags` that grows, and `group` that is hashed."""

    def __init__(self, seed: int = 0, items: int = 60) -> None:
        self._rng = np.random.default_rng(seed)
        self.values: dict[str, list[str | None]] = {
            "item": [f"item {i}" for i in range(items)],
            "tags": [f"tag {i}" for i in range(7)],
        }
        self.counts = {table: np.ones(len(values), np.int64) for table, values in self.values.items()}
        self.last_days = {table: np.zeros(len(values), np.int32) for table, values in self.values.items()}
        self.day = 0
        self.rows = {table: self._new_rows(n) for table, n in (*self._sizes().items(), ("group", 8))}
        self.dense = torch.zeros(3, 2)

    def _sizes(self) -> dict[str, int]:
        return {table: len(values) + 1 for table, values in self.values.items()}

    def _new_rows(self, number: int) -> dict[str, torch.Tensor]:
        rows = torch.from_numpy(self._rng.normal(size=(number, DIM)).astype(np.float32))
        return {ROWS: rows, "exp_avg": rows / 3, "steps": torch.zeros(number, dtype=torch.int32)}

    def next_day(self, *, changed: int = 5, arrive: int = 4, leave: int = 2) -> None:
        """Some rows are trained, some ids arrive, some are evicted."""
        self.day += 1
        for table, new in (("item", arrive), ("tags", self.day % 2)):
            known = self.values[table]
            known += [f"{table} of day {self.day}, {i}" for i in range(new)]
            self.counts[table] = np.concatenate([self.counts[table], np.ones(new, np.int64)])
            self.last_days[table] = np.concatenate([self.last_days[table], np.full(new, self.day, np.int32)])
            more = self._new_rows(new)
            self.rows[table] = {name: torch.cat([rows, more[name]]) for name, rows in self.rows[table].items()}
        for table, rows in self.rows.items():
            at = torch.from_numpy(self._rng.choice(len(rows[ROWS]), min(changed, len(rows[ROWS])), replace=False))
            for values in rows.values():
                values[at] += 1
            if table in self.counts:
                self.counts[table][at[at > 0] - 1] += 1
                self.last_days[table][at[at > 0] - 1] = self.day
        for gone in self._rng.choice(len(self.values["item"]), leave, replace=False):
            self.values["item"][gone] = None
            for values in self.rows["item"].values():
                values[gone + 1] = 0
        self.dense += 1

    def schema(self) -> PackSchema:
        """The schema of this day."""
        sizes = {**self._sizes(), "group": 8}
        return replace(SCHEMA, features=tuple(replace(f, num_ids=sizes[f.table]) for f in SCHEMA.features))

    def write(
        self, path: Path, *, parent: str | None = None, training: bool = True, history: int = 0, **manifest: Any
    ) -> Path:
        """Write this day's bundle. Its `training/` has so many numbers of `history`, other ones each day."""
        scratch = path.with_name(path.name + ".vocab")
        scratch.mkdir(parents=True)
        with BundleWriter(path) as writer:
            writer.add_json("schema.json", {"pack": self.schema().to_json(), "data": DATA_SCHEMA.to_json()})
            writer.add_json("config.yaml", {"model": {"name": MODEL}})
            writer.add_tensors("dense.safetensors", {"dense.w": self.dense})
            for table, values in self.values.items():
                file = scratch / f"{table}.parquet"
                ids = pa.array(np.arange(1, len(values) + 1))
                last_day = pa.array(self.last_days[table])
                columns = {"value": pa.array(values), "id": ids, "count": pa.array(self.counts[table])}
                pq.write_table(pa.table({**columns, "last_day": last_day}), file)
                writer.add_file(file, f"vocab/{table}.parquet")
                file.unlink()
            for table, rows in self.rows.items():
                held = {name: values for name, values in rows.items() if training or name == ROWS}
                reads = {name: values.__getitem__ for name, values in held.items()}
                writer.add_table(table, len(rows[ROWS]), DIM, reads)
            if training:
                writer.add_json("training/state.json", {"progress": {"step": self.day}})
                if history:
                    writer.add_json("training/history.json", {str(n): self.day for n in range(history)})
            writer.finish(
                {
                    "id": f"run{self.day}/{self.day}",
                    "parent": parent,
                    "step": self.day,
                    "day": self.day,
                    "model": {"name": MODEL, "source": None},
                    **manifest,
                }
            )
        scratch.rmdir()
        return path


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def verdict(bundle: Path, *, passed: bool = True, current: str | None = None) -> dict[str, Any]:
    """What a gate says of a bundle."""
    candidate = json.loads((bundle / "manifest.json").read_text())["id"]
    return {
        "format": "gmeta-gate",
        "version": 1,
        "passed": passed,
        "candidate": candidate,
        "current": current,
        "rules": [],
    }
