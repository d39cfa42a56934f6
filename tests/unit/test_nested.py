"""Sections of settings as dotted keys, and back."""

from __future__ import annotations

from gmeta.core.nested import flat, nested


def test_empty_sections_vanish_and_an_empty_argument_of_the_model_stays() -> None:
    settings = {"meta": {}, "model": {"name": "own", "args": {"inner": {}, "wide": {"a": 1}}}}
    found = flat(settings)
    assert found == {"model.name": "own", "model.args.inner": {}, "model.args.wide.a": 1}
    assert nested(found) == {"model": settings["model"]}
    assert flat({"model": {"args": {}}}) == {}
