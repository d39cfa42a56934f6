"""Which day a delivery compares the version that serves with, after days that were refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from versions import Growing, verdict

from gmeta.delivery.registry import publish
from gmeta.delivery.rule_files import RULES
from gmeta.delivery.sound_day import DATA_RULES, newest_sound_day
from gmeta.runs.registry import Registry, open_registry


def judged(bundle: Path, auc: float, **refusals: bool | None) -> dict[str, Any]:
    """A verdict by `difference` and two rules of the data; `refusals` name what each found, None: not judged."""
    found: dict[str, bool | None] = {"difference": False, "current_drop": True, "label_mean": True, **refusals}
    rules = [
        {"rule": rule, "passed": passed is not False, "judged": passed is not None} for rule, passed in found.items()
    ]
    return {
        **verdict(bundle, passed=False not in found.values(), current="first/1"),
        "rules": rules,
        "data": {"current_now": {"all": {"auc": auc}}},
        "metrics": {"all": {"auc": auc}},
    }


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """Version 1, which serves."""
    found = open_registry(str(tmp_path / "registry"))
    publish(found, Growing().write(tmp_path / "first", id="first/1"), verdict=None)
    return found


def add(registry: Registry, folder: Path, auc: float, *, parent: str | None = "first/1", **found: bool | None) -> int:
    """Publish the candidate of a day that was made of `parent` and judged against version 1."""
    bundle = Growing().write(folder / f"{auc:g}", parent=parent, id=f"day{auc:g}/1")
    return publish(registry, bundle, verdict=judged(bundle, auc, **found))


def test_the_newest_sound_day_counts(registry: Registry, tmp_path: Path) -> None:
    assert newest_sound_day(registry, 1) is None
    add(registry, tmp_path, 0.79)
    assert newest_sound_day(registry, 1) == ({"all": {"auc": 0.79}}, "as the verdict on version 2 says")
    number = add(registry, tmp_path, 0.78)
    assert newest_sound_day(registry, 1) == ({"all": {"auc": 0.78}}, f"as the verdict on version {number} says")


@pytest.mark.parametrize(
    "found",
    [
        {"current_drop": False},
        {"current_drop": None},  # nobody looked
        {"label_mean": False},
        {"parent": None},  # a full version, whose pack holds rows that the current one was trained on
        {"parent": "other/1"},
    ],
)
def test_other_days_do_not(registry: Registry, tmp_path: Path, found: dict[str, Any]) -> None:
    add(registry, tmp_path, 0.79)
    add(registry, tmp_path, 0.6, **found)
    sound = newest_sound_day(registry, 1)
    assert sound is not None
    assert sound[0] == {"all": {"auc": 0.79}}


def test_a_version_has_days_of_its_own(registry: Registry, tmp_path: Path) -> None:
    """What was judged against an older version says nothing of the one that serves now."""
    number = add(registry, tmp_path, 0.8, difference=True)
    current = registry.current()
    assert current is not None
    assert current.version == number
    assert newest_sound_day(registry, number) is None
    assert newest_sound_day(registry, 1) is not None


def test_a_damaged_version_says_nothing(registry: Registry, tmp_path: Path) -> None:
    add(registry, tmp_path, 0.79)
    number = add(registry, tmp_path, 0.78)
    (tmp_path / "registry" / "versions" / str(number) / "manifest.json").write_text("{}")
    sound = newest_sound_day(registry, 1)
    assert sound is not None
    assert sound[0] == {"all": {"auc": 0.79}}


def test_rules_of_the_data_are_rules() -> None:
    of_candidates = {"evidence", "finite", "difference", "calibration", "baselines"}
    assert set(DATA_RULES) == set(RULES) - of_candidates
