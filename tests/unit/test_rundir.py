"""What a checkpoint refuses to be continued with."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
from packs import SCHEMA

from gmeta.config.train import LoaderConfig, ModelConfig, TrainConfig
from gmeta.runs.directory import _require_same

CONFIG = TrainConfig(pack="pack", run_dir="run")


@pytest.mark.parametrize(
    ("key", "value", "usual"), [("resample", True, False), ("max_support_rows", 5, 0), ("episode_rows", 5, 0)]
)
def test_a_setting_younger_than_the_checkpoint_had_its_default(key: str, value: int, usual: int) -> None:
    state = {"config": asdict(CONFIG), "schema": SCHEMA.to_json()}
    del state["config"]["loader"][key]
    _require_same(state, CONFIG)
    changed = replace(CONFIG, loader=LoaderConfig(**{key: value}))
    with pytest.raises(ValueError, match=f"loader.{key} is {value}, but the run to resume has {usual}"):
        _require_same(state, changed)


def test_an_argument_younger_than_the_checkpoint_had_its_default() -> None:
    usual, other = (replace(CONFIG, model=ModelConfig(name="melu", args={"dropout": rate})) for rate in (0.0, 0.5))
    state = {"config": asdict(CONFIG), "schema": SCHEMA.to_json()}
    state["config"]["model"] |= {"name": "melu", "args": {}}
    _require_same(state, usual)
    with pytest.raises(ValueError, match=r"model.args.dropout is 0.5, but the run to resume has 0.0"):
        _require_same(state, other)


@pytest.mark.parametrize("key", ["sequential", "size_buckets"])
def test_an_order_that_is_gone_is_not_resumed(key: str) -> None:
    state = {"config": asdict(CONFIG), "schema": SCHEMA.to_json()}
    state["config"]["loader"][key] = True  # as every run of the release before
    _require_same(state, CONFIG)
    state["config"]["loader"][key] = False
    with pytest.raises(ValueError, match=rf"loader.{key} off"):
        _require_same(state, CONFIG)
