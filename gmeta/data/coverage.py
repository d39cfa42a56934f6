"""Find columns that a run's vocabularies do not know: their values are new, or written otherwise than in training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from gmeta.data.schema import OOV

NEARLY_ALL = 0.95
"""From this fraction of unknown values on, a column is worth a warning."""
FEW_VALUES = 10
"""Columns of fewer values say nothing: a few new items are no fault."""


def unknown_fraction(ids: npt.NDArray[np.integer]) -> float:
    """Return the fraction of a feature's ids that are out of vocabulary; 0 where there are no ids."""
    return float(np.mean(ids == OOV)) if ids.size else 0.0


def unknown_counts(ids: Mapping[str, npt.NDArray[np.integer]]) -> npt.NDArray[np.int64]:
    """Return of each feature how many ids are out of vocabulary, and how many there are: int64 [features, 2]."""
    return np.array([(int((column == OOV).sum()), column.size) for column in ids.values()]).reshape(-1, 2)


def unknown_columns(ids: Mapping[str, npt.NDArray[np.integer]], task: str) -> dict[str, float]:
    """Return what `nearly_unknown` does of ids: feature -> int array of any shape; of a many-valued feature, all its
    values.
    """
    return nearly_unknown(ids, unknown_counts(ids), task)


def nearly_unknown(names: Iterable[str], counts: npt.NDArray[np.int64], task: str) -> dict[str, float]:
    """Return the fraction of ids out of vocabulary of each feature where that is at least NEARLY_ALL.

    Columns of fewer than FEW_VALUES values are left out, and so is the task column: new tasks are what a run adapts to.

    Args:
        names: the features.
        counts: what `unknown_counts` found of them, or the sum of that over parts.
        task: name of the task column.
    """
    fractions = {
        name: unknown / total
        for name, (unknown, total) in zip(names, counts.tolist(), strict=True)
        if name != task and total >= FEW_VALUES
    }
    return {name: fraction for name, fraction in fractions.items() if fraction >= NEARLY_ALL}


def unknown_warning(fractions: Mapping[str, float], where: str) -> str | None:
    """Return one line that names the columns of `unknown_columns`, or None where there are none.

    `where` says whose rows they are, such as `query.csv` or `the split test of packs/a`.
    """
    if not fractions:
        return None
    shown = ", ".join(f"{name!r} ({fraction:.0%})" for name, fraction in fractions.items())
    return (
        f"warning: the run does not know the values of {where} in column {shown}: they all read the row of unknown "
        "values. They are new, missing, or written in another way than in training (7 and 7.0, true and True)"
    )
