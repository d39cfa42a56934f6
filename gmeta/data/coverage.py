"""Find columns that a run's vocabularies do not know: their values are new, or written otherwise than in training."""

from __future__ import annotations

from collections.abc import Mapping

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


def unknown_columns(ids: Mapping[str, npt.NDArray[np.integer]], task: str) -> dict[str, float]:
    """Return the fraction of ids out of vocabulary of each feature where that is at least NEARLY_ALL.

    Columns of fewer than FEW_VALUES values are left out, and so is the task column: new tasks are what a run adapts to.

    Args:
        ids: feature -> int array of any shape; of a many-valued feature, all its values.
        task: name of the task column.
    """
    fractions = {
        name: unknown_fraction(column) for name, column in ids.items() if name != task and column.size >= FEW_VALUES
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
        "values. They are new, or written in another way than in training (7 and 7.0, true and True)"
    )
