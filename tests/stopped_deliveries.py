"""Deliveries that are stopped between their stages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from gmeta.delivery import deliver as stages


@contextmanager
def stopped_after(stage: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stop deliveries when a stage has done its work, before delivery.json says that it ended."""
    done = stages.STAGES[stage]

    def killed(delivery: stages.Delivery) -> None:
        done(delivery)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(stages.STAGES, stage, killed)
        yield
