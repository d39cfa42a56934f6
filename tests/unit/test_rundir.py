"""What a checkpoint refuses to be continued with."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
from packs import SCHEMA

from gmeta.config.train import LoaderConfig, TrainConfig
from gmeta.runs.directory import _require_same


def test_a_setting_younger_than_the_checkpoint_had_its_default() -> None:
    config = TrainConfig(pack="pack", run_dir="run")
    state = {"config": asdict(config), "schema": SCHEMA.to_json()}
    del state["config"]["loader"]["size_buckets"]
    _require_same(state, config)
    changed = replace(config, loader=LoaderConfig(size_buckets=False))
    with pytest.raises(ValueError, match=r"loader.size_buckets is False, but the run to resume has True"):
        _require_same(state, changed)
