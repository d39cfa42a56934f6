"""The learning curve of an evaluation: every metric on the same query rows, by the support rows that tasks may see.

The points of a curve are measured one after the other, so that memory holds the baselines' scores of one. Their
bootstraps draw the same tasks, which pairs all points. docs/evaluation.md shows the layout of what is written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from gmeta.evaluation.metrics import Bootstrap, Resampled, make_rows
from gmeta.evaluation.predictions import Variants
from gmeta.evaluation.slices import (
    cells_of,
    estimate_fields,
    metrics_for,
    print_table,
    unit_of,
    verdict_of,
)

SUPPORT_FREE = ("before", "plain", "global-mean", "item-mean", "prior", "oracle")
"""Variants that see no support: their curves are flat, and they are measured once."""


@dataclass
class SupportCurve:
    """Measures the points of a curve, by rising size."""

    variants: Sequence[str]
    reference: str  # the variant whose differences to all others are measured
    label: NDArray[Any]  # [N], query rows
    task: NDArray[Any]  # int [N]
    binary: bool
    resamples: int
    seed: int
    relevant_label: float | None = None
    weight: NDArray[Any] | None = None
    notes: list[str] = field(default_factory=list)
    _points: dict[int, dict[tuple[str, str], Resampled]] = field(default_factory=dict)

    @cached_property
    def metrics(self) -> tuple[str, ...]:
        """Return the metrics that these labels have."""
        return metrics_for(self.label, self.task, self.binary, self.relevant_label)[0]

    def add(self, size: int, found: Variants) -> None:
        """Measure what the variants predict when they see at most `size` support rows; a size larger than the last."""
        first = next(iter(self._points.values()), {})
        known = {key: value for key, value in first.items() if key[0] in SUPPORT_FREE}
        names = [name for name in self.variants if (name, self.metrics[0]) not in known]
        self._points[size] = known | self._measured(size, names, found)

    def document(self, support: NDArray[Any]) -> dict[str, Any]:
        """Return `support_curve` of evaluation.json; `support` [tasks] counts the support rows that each task has."""
        records: list[dict[str, Any]] = []
        differences: list[dict[str, Any]] = []
        gains: list[dict[str, Any]] = []
        earlier: tuple[int, dict[tuple[str, str], Resampled]] | None = None
        for size, point in self._points.items():
            for variant, name in ((variant, name) for variant in self.variants for name in self.metrics):
                found, unit = point[variant, name], {"unit": unit_of(name)}
                keys = {"size": size, "variant": variant, "metric": name}
                records.append(keys | estimate_fields(found.estimate()) | unit)
                if variant != self.reference:
                    estimate = point[self.reference, name].estimate(found)
                    keys = {"size": size, "variant": self.reference, "against": variant, "metric": name}
                    differences.append(keys | estimate_fields(estimate) | unit)
                if earlier is not None and variant not in SUPPORT_FREE:
                    estimate = found.estimate(earlier[1][variant, name])
                    keys = {"size": size, "from_size": earlier[0], "variant": variant, "metric": name}
                    gains.append(keys | estimate_fields(estimate) | unit)
            earlier = size, point
        return {
            "tasks": len(support),
            "sizes": [{"size": size, "short_tasks": int((support < size).sum())} for size in self._points],
            "records": records,
            "differences": differences,
            "gains": gains,
        }

    def _measured(self, size: int, variants: Sequence[str], found: Variants) -> dict[tuple[str, str], Resampled]:
        """Resample every metric of some variants; undefined where one predicted what is no number."""
        bootstrap = Bootstrap(len(np.unique(self.task)), resamples=self.resamples, seed=self.seed)
        undefined = Resampled(np.full(1 + self.resamples, math.nan), 0, has_interval=False)
        point: dict[tuple[str, str], Resampled] = {}
        for variant in variants:
            score = found.predictions[variant]
            ranking = found.ranking.get(variant, score)
            if np.isfinite(score).all() and np.isfinite(ranking).all():
                rows = make_rows(
                    score,
                    self.label,
                    self.task,
                    logit=ranking,
                    relevant_label=self.relevant_label,
                    weight=self.weight,
                )
                for name in self.metrics:
                    bootstrap.add((variant, name), name, rows)
            else:
                self.notes.append(f"{variant} diverges with {size} support rows: its curve has no point there")
                point |= {(variant, name): undefined for name in self.metrics}
        bootstrap.run()
        keys = [(variant, name) for variant in variants for name in self.metrics]
        return point | {key: bootstrap.resampled(key) for key in keys if key not in point}


def curve_records(evaluation: dict[str, Any], kind: str = "records") -> dict[tuple[int, str], dict[str, Any]]:
    """Return the headline metric of a curve by (size, variant); of "differences" by the variant compared with."""
    metric, name = evaluation["headline"]["metric"], "against" if kind == "differences" else "variant"
    found = evaluation["support_curve"][kind]
    return {(record["size"], record[name]): record for record in found if record["metric"] == metric}


def print_curve(evaluation: dict[str, Any], file: TextIO | None = None) -> None:
    """Print the curve of the reference and of `before`, with paired differences, and then that of every variant."""
    metric, reference = evaluation["headline"]["metric"], evaluation["reference"]
    curve, records = evaluation["support_curve"], curve_records(evaluation)
    differences = curve_records(evaluation, "differences")
    sizes = [point["size"] for point in curve["sizes"]]
    if reference == "after":
        print_table(_reference_table(evaluation, curve, records, differences), file)
    table = Table(title=f"{metric} by support rows: at most so many of each task, the last ones")
    table.add_column("variant", no_wrap=True)
    for size in sizes:
        table.add_column(str(size), justify="right", no_wrap=True)
    for variant in evaluation["variants"]:
        values = [cells_of(records[size, variant], "")[0] for size in sizes]
        table.add_row(variant, *values, style="bold" if variant == reference else "")
    table.add_row("tasks with fewer", *(f"{point['short_tasks']:,}" for point in curve["sizes"]))
    print_table(table, file)


def _reference_table(
    evaluation: dict[str, Any],
    curve: dict[str, Any],
    records: dict[tuple[int, str], dict[str, Any]],
    differences: dict[tuple[int, str], dict[str, Any]],
) -> Table:
    """Make a table of the sizes: the adapted model, its interval, and what it gains over the model before."""
    metric = evaluation["headline"]["metric"]
    table = Table(title=f"{metric} after adapting to at most so many support rows, on the same query rows")
    for name in ("support rows", metric, "95 %", "after - before", "95 %", "after is"):
        table.add_column(name, justify="left" if name == "after is" else "right", no_wrap=True)
    for size in (point["size"] for point in curve["sizes"]):
        difference = differences[size, "before"]
        verdict = verdict_of(difference, evaluation["headline"]["higher_is_better"])
        table.add_row(str(size), *cells_of(records[size, "after"], ""), *cells_of(difference, "+"), verdict)
    return table
