"""AUC of each scene and their mean, with intervals over units, and what a scene's base rate corrects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gmeta.benchmark.scored import Scored
from gmeta.evaluation.metrics import Bootstrap, gauc, logloss, make_rows

_SEED = 0
Floats = NDArray[np.float64]


@dataclass
class OfScenes:
    """What a variant measures: of each scene, their mean, and the resampled AUCs that intervals are made of."""

    seeds: int
    scenes: dict[int, dict[str, float]] = field(default_factory=dict)
    auc: dict[int, Floats] = field(default_factory=dict)  # of each scene, [1 + resamples], the mean over seeds
    spread: float | None = None  # standard deviation of the macro AUC over seeds

    @property
    def auc_macro(self) -> Floats:
        """Return the mean AUC over scenes of the rows themselves and of each resample, [1 + resamples]."""
        found: Floats = np.mean(list(self.auc.values()), 0)
        return found

    @property
    def macro(self) -> dict[str, float]:
        """Return the mean of each metric over scenes."""
        every = list(self.scenes.values())
        names = [name for name in every[0] if all(name in of for of in every)]
        return {name: float(np.mean([of[name] for of in every])) for name in names}


def measure_scenes(
    variants: Mapping[str, Sequence[Scored]], valid: Mapping[str, Sequence[Scored]], resamples: int
) -> dict[str, OfScenes]:
    """Measure variants, each of several seeds, on the same rows. `valid` has the variants' valid rows, where they have
    some: of these the base rate of a scene is known.
    """
    first = next(iter(variants.values()))[0]
    units, code = np.unique(first.unit, return_inverse=True)
    found = {name: OfScenes(len(seeds)) for name, seeds in variants.items()}
    by_seed: dict[str, list[Floats]] = {name: [] for name in variants}
    for scene in np.unique(first.scene).tolist():
        at = first.scene == scene
        bootstrap = Bootstrap(len(units), resamples=resamples, seed=_SEED)
        for name, seeds in variants.items():
            for number, scored in enumerate(seeds):
                mine = scored.where(at)
                rows = make_rows(mine.score, mine.label, code[at], logit=mine.logit)
                # every scene has all units, so that a resample draws the same ones in each
                bootstrap.add((name, number), "auc", replace(rows, task=code[at], num_tasks=len(units)))
        bootstrap.run()
        for name, seeds in variants.items():
            values = np.array([bootstrap.resampled((name, number)).values for number in range(len(seeds))])
            by_seed[name].append(values[:, 0])
            found[name].auc[scene] = values.mean(0)
            of_valid: Sequence[Scored | None] = valid.get(name) or [None] * len(seeds)
            each = [_of_scene(s.where(at), v, scene) for s, v in zip(seeds, of_valid, strict=True)]
            means = {metric: float(np.mean([one[metric] for one in each])) for metric in each[0]}
            found[name].scenes[scene] = {"auc": float(values[:, 0].mean()), **means}
    for name, aucs in by_seed.items():
        macro = np.mean(aucs, 0)
        found[name].spread = float(np.std(macro, ddof=1)) if len(macro) > 1 else None
    return found


def _of_scene(scored: Scored, valid: Scored | None, scene: int) -> dict[str, float]:
    """Return the metrics of one scene's rows beside AUC; those after correction where valid rows say its base rate."""
    found = {
        "gauc": gauc(scored.score, scored.label, np.unique(scored.unit, return_inverse=True)[1]),
        "logloss": logloss(scored.score, scored.label),
        "calibration": float(scored.score.mean() / max(scored.label.mean(), 1e-12)),
    }
    if valid is not None and (valid.scene == scene).any():
        mine = valid.where(valid.scene == scene)
        right = scored.shifted({scene: base_rate_shift(mine.logit, float(mine.label.mean()))})
        found["logloss_corrected"] = logloss(right.score, right.label)
        found["calibration_corrected"] = float(right.score.mean() / max(right.label.mean(), 1e-12))
    return found


def base_rate_shift(logit: Floats, rate: float) -> float:
    """Return what is added to logits so that their mean probability is `rate`, within 20 on either side."""
    low, high = -20.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        below = float((1 / (1 + np.exp(-(logit + middle)))).mean()) < rate
        low, high = (middle, high) if below else (low, middle)
    return (low + high) / 2


def gain_of(ours: Floats, theirs: Floats) -> dict[str, float]:
    """Return a difference with its interval, from resampled values [1 + resamples] that are paired."""
    values = ours - theirs
    resampled = values[1:][np.isfinite(values[1:])]
    if not len(resampled):
        return {"value": float(values[0]), "low": float("nan"), "high": float("nan")}
    low, high = np.quantile(resampled, [0.025, 0.975])
    return {"value": float(values[0]), "low": float(low), "high": float(high)}


def told(of: Mapping[str, Any]) -> str:
    """Return a difference in words."""
    return f"{of['value']:+.4f} ({of['low']:+.4f} - {of['high']:+.4f})"
