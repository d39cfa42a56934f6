"""What cells predict for the test query rows of one seed, in memory and on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Outcome:
    """Test query rows of one seed: the task and the label of each [N], and what every variant predicts.

    Ranking metrics sort by `ranking`: by logits, and by baselines before they are clipped.
    """

    task: NDArray[np.str_]
    label: Floats
    scores: dict[str, Floats]
    ranking: dict[str, Floats]

    @staticmethod
    def of(
        task: Sequence[Any], label: ArrayLike, scores: Mapping[str, ArrayLike], ranking: Mapping[str, ArrayLike]
    ) -> Outcome:
        """Make an outcome of columns, with the raw key of each row's task."""
        number = {name: np.asarray(values, np.float64) for name, values in scores.items()}
        order = {name: np.asarray(ranking[name], np.float64) for name in scores}
        return Outcome(np.array([str(key) for key in task]), np.asarray(label, np.float64), number, order)

    def joined(self, other: Outcome) -> Outcome:
        """Add the variants of another cell. Raises ValueError where that has other rows."""
        if not (np.array_equal(self.task, other.task) and np.array_equal(self.label, other.label)):
            raise ValueError(
                f"cells with {', '.join(self.scores)} and with {', '.join(other.scores)} have other query rows: "
                "delete both folders and run them again"
            )
        return Outcome(self.task, self.label, self.scores | other.scores, self.ranking | other.ranking)


def write_outcomes(file: Path, outcomes: Mapping[str, Outcome]) -> None:
    """Write the outcome of each view."""
    columns: dict[str, NDArray[Any]] = {}
    for view, outcome in outcomes.items():
        columns |= {f"{view}|task": outcome.task, f"{view}|label": outcome.label}
        columns |= {f"{view}|scores|{name}": values for name, values in outcome.scores.items()}
        columns |= {f"{view}|ranking|{name}": values for name, values in outcome.ranking.items()}
    np.savez_compressed(file, **columns)  # type: ignore[arg-type]


def read_outcomes(file: Path) -> dict[str, Outcome]:
    """Return the outcome of each view."""
    with np.load(file) as found:
        parts: dict[str, dict[str, dict[str, Any]]] = {}
        for key in found.files:
            view, kind, name = (*key.split("|"), "")[:3]
            parts.setdefault(view, {}).setdefault(kind, {})[name] = found[key]
    return {
        view: Outcome(part["task"][""], part["label"][""], part["scores"], part["ranking"])
        for view, part in parts.items()
    }
