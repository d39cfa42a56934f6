"""A training run on this rank: its state, where batches come from, where records go, and where it stands."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from gmeta.config.train import TrainConfig
from gmeta.data.loader import TaskLoader
from gmeta.data.pack import TaskPack
from gmeta.recommender.system import PreparedBatch
from gmeta.runs.log import RunLog
from gmeta.training.membership import Membership
from gmeta.training.state import TrainState
from gmeta.training.statistics import InFlightStep, Stopwatch


@dataclass
class Run:
    """Everything that one rank holds while training."""

    config: TrainConfig
    state: TrainState
    loader: TaskLoader[PreparedBatch]
    pack: TaskPack
    older: TaskPack | None  # whose tasks are replayed
    log: RunLog
    watch: Stopwatch  # of the batch at hand
    data_schema: dict[str, Any] | None = None  # that of schema.json, once there is a run directory
    membership: Membership | None = None  # in an elastic group
    ahead: deque[InFlightStep] = field(default_factory=deque)  # steps whose statistics were not read yet
    position: dict[str, Any] | None = None  # of the loader before a batch that no step was made of yet
    saved_step: int = 0  # of the last checkpoint
    exit_code: int = 0  # 0, 75 when stopped on request and saved, or 77 when to be started again with another worker

    @property
    def ended(self) -> bool:
        """Say whether every step was made."""
        schedule = self.config.schedule
        return self.loader.epochs_done >= schedule.epochs or 0 < schedule.max_steps <= self.state.progress.step

    @property
    def out_of_patience(self) -> bool:
        """Say whether validations without a better metric have used up the patience. This also holds for a run resumed
        after it.
        """
        patience = self.config.schedule.patience
        return bool(patience) and self.state.progress.bad_validations >= patience
