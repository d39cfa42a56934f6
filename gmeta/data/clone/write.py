"""`gmeta synth --kind antm2c`: the clone's files, its truth, and its statistics beside the published ones."""

from __future__ import annotations

import json
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pv
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import track
from rich.table import Table

from gmeta.config.data import SynthConfig
from gmeta.data.antm2c import published
from gmeta.data.clone.bounds import MEANING, REFERENCES, aucs_by_scene, scores_of_block
from gmeta.data.clone.images import write_images
from gmeta.data.clone.rows import BLOCK_USERS, CloneRows, draw_block, num_users, shifts
from gmeta.data.clone.texts import ItemTexts, table_of_rows
from gmeta.data.clone.world import CloneItems, draw_world
from gmeta.data.synthetic import whole_folder

LABEL = "synthetic, AntM2C schema"
"""How every number that is measured on a clone is labelled."""
_TEST = published.SPLITS.index("test")


def write_clone(config: SynthConfig) -> dict[str, Any]:
    """Write a clone of AntM2C's files to `config.out`, and return what its summary.json holds.

    The directory appears complete or not at all. Memory is bounded by one block of users, whatever their number.
    Raises ValueError when the directory exists.
    """
    with whole_folder(Path(config.out)) as work:
        return _write(config, work)


def _write(config: SynthConfig, root: Path) -> dict[str, Any]:
    (root / "_truth").mkdir(parents=True)
    world = draw_world(config.clone_rows, config.seed)
    shift = shifts(world, config.seed)
    texts = ItemTexts(world.items, config.seed)
    users = num_users(config.clone_rows)
    pq.write_table(_item_table(world.items), root / "_truth" / "items.parquet")
    images = write_images(root / published.IMAGES, world.items, config.seed)
    counts = _Counts(world.items)
    console = Console(stderr=True)
    blocks = range(-(-users // BLOCK_USERS))
    with ExitStack() as stack:
        writers: list[pv.CSVWriter] = []
        for block in track(blocks, "synth", console=console, disable=not console.is_terminal):
            first = block * BLOCK_USERS
            drawn, rows = draw_block(world, config.seed, block, min(BLOCK_USERS, users - first), shift)
            judged, scores = scores_of_block(world, shift, drawn, rows)
            rng = np.random.default_rng([config.seed, 4, block])
            table = table_of_rows(drawn, rows, world.items, texts, first, rng)
            if not writers:
                files = [root / f"antm2c_10m_part{part}.csv" for part in range(published.PARTS)]
                writers += [stack.enter_context(pv.CSVWriter(file, table.schema)) for file in files]
            # users are dealt to the parts in order, so that a user's rows lie in one
            ends = np.searchsorted(
                first + rows.user, [users * part // published.PARTS for part in range(published.PARTS + 1)]
            )
            for writer, (start, stop) in zip(writers, pairwise(ends), strict=True):
                writer.write_table(table.slice(start, stop - start))
            truth = table.select(["user_id", "item_id", "log_time", "label", "scene"]).take(pa.array(judged))
            for name, score in scores.items():
                truth = truth.append_column(name, pa.array(score))
            pq.write_table(truth, root / "_truth" / f"scores-{block:05d}.parquet")
            counts.add(rows)
    summary = {
        "label": LABEL,
        "settings": {"kind": config.kind, "rows": config.clone_rows, "seed": config.seed},
        "users": users,
        "images": images,
        **counts.told(),
        "reference": aucs_of_references(root),
    }
    (root / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    return summary


class _Counts:
    """What is counted of rows, block by block."""

    def __init__(self, items: CloneItems) -> None:
        self.items = items
        self.rows = np.zeros((len(published.SPLITS), published.SCENES), np.int64)
        self.positives = np.zeros(len(published.SPLITS), np.int64)
        self.seen = np.zeros((len(published.SPLITS), len(items)), bool)

    def add(self, rows: CloneRows) -> None:
        """Count the rows of a block."""
        np.add.at(self.rows, (rows.split, self.items.scene[rows.item]), 1)
        self.positives += np.bincount(rows.split, rows.label, len(self.positives)).astype(np.int64)
        self.seen[rows.split, rows.item] = True

    def told(self) -> dict[str, Any]:
        """Return rows of each split and scene, positives, and items of each split and in all."""
        names = published.SPLITS
        return {
            "rows": {name: of.tolist() for name, of in zip(names, self.rows, strict=True)},
            "positives": dict(zip(names, self.positives.tolist(), strict=True)),
            "items": {**dict(zip(names, self.seen.sum(1).tolist(), strict=True)), "all": int(self.seen.any(0).sum())},
        }


def _item_table(items: CloneItems) -> pa.Table:
    columns: dict[str, Any] = {"item_id": np.arange(len(items))}
    columns |= {name: getattr(items, name) for name in ("scene", "topic", "look", "has_image", "in_train", "effect")}
    columns |= {f"latent_{k}": items.latent[:, k] for k in range(items.latent.shape[1])}
    return pa.table(columns)


def aucs_of_references(root: Path) -> dict[str, dict[str, Any]]:
    """Return {reference: {"auc": of each scene, "auc_macro": their mean}} on the rows of test of a clone at `root`."""
    columns = ["log_time", "label", "scene", *REFERENCES]
    table = pa.concat_tables(pq.read_table(f, columns=columns) for f in sorted(root.glob("_truth/scores-*.parquet")))
    ends = published.VALID_ENDS.strftime(published.TIME_FORMAT)
    test = table.filter(pc.greater(table["log_time"], ends))
    label, scene = test["label"].to_numpy(), test["scene"].to_numpy()
    found = {}
    for name in REFERENCES:
        aucs = aucs_by_scene(test[name].to_numpy(), label, scene)
        found[name] = {"auc": aucs, "auc_macro": float(np.mean(aucs))}
    return found


def print_clone(summary: dict[str, Any]) -> None:
    """Print what `write_clone` returned: its counts beside the published ones, and what can be reached on it."""
    console = Console()
    console.print(f"{LABEL}: {summary['users']:,} users, {summary['images']:,} images")
    table = Table(title="a clone, and what is published of the real files")
    for heading in ("split", "rows", "clicked", "shares of scenes 0 to 4, %", "items"):
        table.add_column(heading, justify="left" if heading == "split" else "right")
    for number, name in enumerate(published.SPLITS):
        rows = np.array(summary["rows"][name])
        _add_split(table, name, rows, summary["positives"][name], f"{summary['items'][name]:,}")
        real = np.array(published.SCENE_THOUSANDS[number])
        items = {"train": published.TRAIN_ITEMS, "test": published.TEST_ITEMS}.get(name)
        share = published.POSITIVES[number] / published.ROWS[number]
        told = [f"{published.ROWS[number]:,}", f"{share:.1%}", _shares(real), "" if items is None else f"{items:,}"]
        table.add_row(f"  published, {name}", *told)
    console.print(table)
    bounds = Table(title="AUCs on the rows of test")
    for heading in ("reference", "macro", *(f"scene {number}" for number in range(published.SCENES))):
        bounds.add_column(heading, justify="left" if heading == "reference" else "right")
    for name, found in summary["reference"].items():
        bounds.add_row(name, *(f"{value:.4f}" for value in (found["auc_macro"], *found["auc"])))
    console.print(bounds)
    for name, meaning in MEANING.items():
        console.print(f"{name}: {meaning}")


def _add_split(table: Table, name: str, rows: Any, positives: int, items: str) -> None:
    table.add_row(name, f"{rows.sum():,}", f"{positives / max(1, rows.sum()):.1%}", _shares(rows), items)


def _shares(rows: Any) -> str:
    return " / ".join(f"{100 * share:.0f}" for share in rows / max(1, rows.sum()))
