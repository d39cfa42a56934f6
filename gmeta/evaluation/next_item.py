"""Measure where targets were ranked: metrics, slices, paired intervals over users. docs/next-item.md defines each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from gmeta.core.numbers import shown
from gmeta.evaluation.metrics import HIGHER_IS_BETTER, Bootstrap, row_mean
from gmeta.evaluation.ranking import PLACE_METRICS, SAMPLED
from gmeta.evaluation.score import Floats, Ints
from gmeta.evaluation.slices import SCENARIO, Scenarios, estimate_fields, print_table, verdict_of

NEXT_ITEM = "next_item"
"""The objective of a next-item run, in its config and in what is written of it."""
RANKED_AMONG = ("candidates", "exclude_history", "sample_seed")
"""What is written of the candidates: only ranks among equal ones can be compared."""
MODEL = "model"
"""Name of the variant that is the run's own model."""
NEXT_ITEM_HEADLINE = "ndcg@10"
POPULARITY_CLASSES = ("unseen", "tail", "middle", "head")
"""Classes of items by their training events; docs/next-item.md says where they are cut."""
HISTORY_LENGTHS = ((0, 0), (1, 4), (5, 9), (10, 19), (20, None))
"""Inclusive ranges of the number of events in a history, one slice each."""


def _length_name(low: int, high: int | None) -> str:
    return f"history_{low}+" if high is None else f"history_{low}" if low == high else f"history_{low}-{high}"


NEXT_ITEM_SLICES = (
    "one_domain",
    "several_domains",
    *(f"target_{name}" for name in POPULARITY_CLASSES),
    *(_length_name(low, high) for low, high in HISTORY_LENGTHS),
)
"""Names of slices of targets, but for all of them and those by domain."""
_TABLE_METRICS = {
    "recall@1": "R@1",
    "recall@5": "R@5",
    "recall@10": "R@10",
    "recall@50": "R@50",
    "ndcg@10": "N@10",
    "mrr": "MRR",
}
_WIDEST_K = 50


@dataclass(frozen=True)
class Places:
    """Where a variant ranked each target, from 1."""

    rank: Ints  # [N], among all candidates
    sampled_rank: Ints  # [N], among a sample

    def values(self, metric: str) -> Floats:
        """Return a metric of each target alone, [N]."""
        rank = self.sampled_rank if metric.startswith(SAMPLED) else self.rank
        kind, _, k = metric.removeprefix(SAMPLED).partition("@")
        gain = {"recall": np.ones(len(rank)), "ndcg": 1 / np.log2(rank + 1), "mrr": 1 / rank}[kind]
        return np.where(rank <= (int(k) if k else math.inf), gain, 0.0)


@dataclass(frozen=True)
class RankedRows:
    """What slices and intervals need of the targets, [N] each."""

    user: Ints  # number of the user; a user may have a target in each domain
    popularity: Ints  # position of the target's class in `POPULARITY_CLASSES`
    history: Ints  # events in the history
    domains: Ints  # distinct domains in it
    candidates: Ints  # how many items were ranked
    domain: Scenarios | None  # of the target; None where items have no domains

    def slices(self) -> list[tuple[str, str, NDArray[np.bool_]]]:
        """Return (case, description, rows) of every slice."""
        found = [("all", "every target", np.ones(len(self.user), dtype=np.bool_))]
        if self.domain is not None:
            found += self.domain.slices()
            found += [
                ("one_domain", "histories of at most one domain", self.domains <= 1),
                ("several_domains", "histories of several domains", self.domains > 1),
            ]
        abouts = ("no training row has the item", "rare items", "neither rare nor popular items", "popular items")
        for number, (name, about) in enumerate(zip(POPULARITY_CLASSES, abouts, strict=True)):
            found.append((f"target_{name}", f"targets: {about}", self.popularity == number))
        for low, high in HISTORY_LENGTHS:
            name = _length_name(low, high)
            mask = (self.history >= low) & (self.history <= (math.inf if high is None else high))
            found.append((name, f"histories of {name.removeprefix('history_')} events", mask))
        return found

    def notes(self) -> list[str]:
        """Say what a reader of the numbers must know."""
        users, few = len(np.unique(self.user)), int((self.candidates <= _WIDEST_K).sum())
        notes = []
        if users < len(self.user):
            notes.append(f"Intervals resample {users:,} users, whose {len(self.user):,} targets stay together")
        if few:
            notes.append(
                f"{few:,} of {len(self.user):,} targets have at most {_WIDEST_K} candidates: recall@{_WIDEST_K} of "
                "those is 1 whatever ranks them"
            )
        return notes


def popularity_classes(count: Ints) -> Ints:
    """Return the class of each item [num_ids] by its training events `count` [num_ids].

    Where events are sorted by how many their item has, head items have as many as the one at the upper quartile, or
    more, and tail items as many as the one at the lower quartile, or fewer. Items of equal count are of one class, and
    where the quartiles are equal, their items are of the middle.
    """
    rising = np.sort(count)
    share = np.cumsum(rising)
    low, high = rising[np.searchsorted(share, share[-1] * np.array([0.25, 0.75]))]
    return np.select([count == 0, (count <= low) & (low < high), (count >= high) & (low < high)], [0, 1, 3], 2).astype(
        np.int64
    )


def measure_places(
    found: Mapping[str, Places], user: Ints, mask: NDArray[np.bool_], *, resamples: int, seed: int
) -> Bootstrap:
    """Return a bootstrap over the users of some targets, which has (name, metric) of everything in `found`."""
    users, index = np.unique(user[mask], return_inverse=True)
    bootstrap = Bootstrap(len(users), resamples=resamples, seed=seed)
    for name, places in found.items():
        for metric in PLACE_METRICS:
            bootstrap.add_sums((name, metric), row_mean(places.values(metric)[mask], index, len(users)))
    bootstrap.run()
    return bootstrap


def next_item_records(
    found: Mapping[str, Places], rows: RankedRows, *, baselines: Sequence[str], resamples: int, seed: int
) -> dict[str, Any]:
    """Return the content of evaluation.json, but for its settings. Differences are those of the first variant to each
    other.

    Raises ValueError where there is no target.
    """
    if len(rows.user) == 0:
        raise ValueError("there are no targets to measure: choose a split that has tasks")
    reference = next(iter(found))
    cases, records, differences = [], [], []
    for case, about, mask in rows.slices():
        users = len(np.unique(rows.user[mask]))
        cases.append({"case": case, "about": about, "tasks": users, "rows": int(mask.sum()), "label_mean": None})
        if not mask.any():
            continue
        bootstrap = measure_places(found, rows.user, mask, resamples=resamples, seed=seed)
        for variant in found:
            for metric in PLACE_METRICS:
                estimate = estimate_fields(bootstrap.estimate((variant, metric)))
                records.append({"case": case, "variant": variant, "metric": metric, **estimate, "unit": "1"})
                if variant != reference:
                    gain = estimate_fields(bootstrap.estimate((reference, metric), against=(variant, metric)))
                    keys = {"case": case, "variant": reference, "against": variant, "metric": metric}
                    differences.append({**keys, **gain, "unit": "1"})
    return {
        "headline": {"metric": NEXT_ITEM_HEADLINE, "higher_is_better": NEXT_ITEM_HEADLINE in HIGHER_IS_BETTER},
        "reference": reference,
        "variants": list(found),
        "baselines": list(baselines),
        "resamples": resamples,
        "cases": cases,
        "records": records,
        "differences": differences,
        "curves": {},
        "notes": rows.notes(),
    }


def print_next_item(evaluation: dict[str, Any], file: TextIO | None = None) -> None:
    """Print the usual metrics of every variant with their intervals, over all targets and by domain."""
    found = {(r["case"], r["variant"], r["metric"]): r for r in evaluation["records"]}
    metric, reference = evaluation["headline"]["metric"], evaluation["reference"]
    gains = {(d["case"], d["against"]): d for d in evaluation["differences"] if d["metric"] == metric}
    table = Table(title="where targets were ranked, and 95 % intervals over users", show_lines=True)
    for name in ("targets", "variant", *_TABLE_METRICS.values(), f"{reference} by {_TABLE_METRICS[metric]}"):
        table.add_column(name, justify="left" if name in ("targets", "variant") else "right", no_wrap=True)
    for case in evaluation["cases"]:
        if not case["rows"] or not (case["case"] == "all" or case["case"].startswith(SCENARIO)):
            continue
        for variant in evaluation["variants"]:
            title = f"{case['case'].removeprefix(SCENARIO)}\n{case['rows']:,}" if variant == reference else ""
            cells = [_cell(found[case["case"], variant, name]) for name in _TABLE_METRICS]
            gain = gains.get((case["case"], variant))
            told = "" if gain is None else _cell(gain, "+", verdict_of(gain, higher_is_better=True))
            table.add_row(title, variant, *cells, told, style="bold" if variant == reference else "")
    print_table(table, file, (*evaluation.get("left_out", ()), *evaluation["notes"]))


def _cell(record: dict[str, Any], sign: str = "", word: str = "") -> str:
    interval = "" if record["low"] is None else f"\n{shown(record['low'], sign)}…{shown(record['high'], sign)}"
    return f"{shown(record['value'], sign)} {word}".rstrip() + interval
