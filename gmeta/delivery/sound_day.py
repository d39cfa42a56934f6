"""What the version that serves scored on the newest sound day, where later candidates than itself were refused.

Its own manifest says what it scored when it was new. It has aged since, so that `current_drop` would take its age for
damage, a little more each day. The verdicts on candidates that were made of it say what it scored on their days: as
much as `--previous_pack` would measure there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gmeta.delivery.gate import Earlier
from gmeta.runs.registry import Registry

DATA_RULES = ("label_mean", "numeric_drift", "unknown_ids", "current_chance", "current_drop", "current_calibration")
"""Rules that look at the day and not at the candidate: where they all pass, the day is sound."""


def newest_sound_day(registry: Registry, serving: int) -> Earlier | None:
    """Return what version `serving` scored on the newest sound day after its own, by slice, and where that is from;
    None where no verdict says so.

    A day counts where `current_drop` found it as good as the day before, and no other rule of the data refused it. The
    verdict on a full version does not count: the version that serves was trained on tasks of such a pack.
    """
    own = registry.manifest(serving)["id"]
    for number in sorted((n for n in list(registry.keys()) if n > serving), reverse=True):
        try:
            manifest = registry.manifest(number)
        except ValueError:  # damaged, or its publisher died: it says nothing
            continue
        verdict = manifest.get("gate")
        if manifest.get("parent") == own and verdict is not None and verdict["current"] == own and _is_sound(verdict):
            return verdict["data"]["current_now"], f"as the verdict on version {number} says"
    return None


def _is_sound(verdict: Mapping[str, Any]) -> bool:
    found = [rule for rule in verdict["rules"] if rule["rule"] in DATA_RULES]
    compared = any(rule["rule"] == "current_drop" and rule["judged"] for rule in found)
    return compared and all(rule["passed"] for rule in found)
