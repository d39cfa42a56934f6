"""Compare the stored ranks of next-item runs, paired over users: what `gmeta compare` measures of these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gmeta.evaluation.documents import Json
from gmeta.evaluation.next_item import (
    MODEL,
    NEXT_ITEM_HEADLINE,
    POPULARITY_CLASSES,
    Places,
    RankedRows,
    measure_places,
)
from gmeta.evaluation.ranking import PLACE_METRICS
from gmeta.evaluation.slices import Scenarios, estimate_fields, verdict_of

RANK_COLUMNS = ("user", "candidates", "history", "domains", "popularity", f"{MODEL}.rank", f"{MODEL}.sampled_rank")
"""Columns that predictions of a next-item run have."""


def read_places(file: Path) -> Places:
    """Return where the run's model ranked each target, in the order of the rows' numbers."""
    table = pq.read_table(file, columns=["row", f"{MODEL}.rank", f"{MODEL}.sampled_rank"]).sort_by("row")
    return Places(table[f"{MODEL}.rank"].to_numpy(), table[f"{MODEL}.sampled_rank"].to_numpy())


def read_ranked_rows(file: Path, scenarios: Sequence[str]) -> RankedRows:
    """Return what is known of the targets, in the order of the rows' numbers; `scenarios` have a slice of their own."""
    table = pq.read_table(file).sort_by("row")
    user = table["user"].combine_chunks().dictionary_encode().indices.to_numpy()
    domain = None
    if scenarios:
        place = {name: number for number, name in enumerate(scenarios)}
        texts = table["scenario"].cast(pa.string()).to_pylist()
        domain = Scenarios(tuple(scenarios), np.array([place.get(text, len(scenarios)) for text in texts]))
    classes = [POPULARITY_CLASSES.index(name) for name in table["popularity"].to_pylist()]
    return RankedRows(
        user=user.astype(np.int64),
        popularity=np.array(classes, np.int64),
        history=table["history"].to_numpy(),
        domains=table["domains"].to_numpy(),
        candidates=table["candidates"].to_numpy(),
        domain=domain,
    )


def compare_places(found: Mapping[str, Places], rows: RankedRows, *, resamples: int, seed: int) -> Json:
    """Return records, differences to the first run, and slices, as comparison.json has them."""
    first, parts = next(iter(found)), []
    for case, about, mask in rows.slices():
        records, differences = [], []
        users = len(np.unique(rows.user[mask]))
        if mask.any():
            bootstrap = measure_places(found, rows.user, mask, resamples=resamples, seed=seed)
            for run in found:
                for metric in PLACE_METRICS:
                    keys = {"run": run, "metric": metric, "unit": "1"}
                    records.append(keys | estimate_fields(bootstrap.estimate((run, metric))))
                    if run != first:
                        gain = estimate_fields(bootstrap.estimate((run, metric), against=(first, metric)))
                        verdict = verdict_of(gain, higher_is_better=True)
                        differences.append(keys | {"against": first, **gain, "verdict": verdict})
        counts = {"tasks": users, "rows": int(mask.sum())}
        parts.append({"case": case, "about": about, **counts, "records": records, "differences": differences})
    whole, *slices = parts
    return {
        "headline": {"metric": NEXT_ITEM_HEADLINE, "higher_is_better": True},
        **{key: whole[key] for key in ("tasks", "rows", "records", "differences")},
        "resamples": resamples,
        "slices": slices,
        "notes": rows.notes(),
    }
