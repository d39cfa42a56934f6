"""What a rank holds while it trains: the model's system, the optimizers, and how far they are."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from gmeta.optim.dense import Dense, lr_scale
from gmeta.optim.sparse import SparseOptimizer
from gmeta.parallel.mesh import Mesh
from gmeta.recommender.system import System
from gmeta.training.negotiation import Negotiation


@dataclass
class Progress:
    """What advances besides weights, optimizers and loader. Every checkpoint saves it."""

    step: int = 0
    best: float | None = None
    best_step: int | None = None
    bad_validations: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class LearningRates:
    """The schedule of all learning rates: a function of the batch's position in the order, not of the step's number.

    Where late tasks are put back, an epoch has more steps than batches. The extra steps get the rate of its last batch.
    """

    peak: float  # of dense layers
    warmup_steps: int
    decay: str
    total_steps: int
    batches_per_epoch: int

    def scale(self, epoch: int, index: int) -> float:
        """Return the factor of every peak rate for batch `index` of `epoch`."""
        position = epoch * self.batches_per_epoch + min(index, self.batches_per_epoch - 1)
        return lr_scale(position, self.warmup_steps, self.total_steps, self.decay)


@dataclass
class TrainState:
    """Everything that a training step reads and changes on this rank."""

    system: System
    dense: Dense
    sparse: SparseOptimizer
    rates: LearningRates
    loss_scale: float  # gradients are those of so many times the loss, so that labels' units change no step
    clip_norm: float  # of the whole gradient, over all ranks; 0: gradients are not clipped
    run_dir: Path  # where a step that is not finite leaves its tasks
    stop: threading.Event  # set when this rank was asked to stop
    ok: Tensor  # bool []: every step so far was finite; once False no step changes anything
    read_late: bool  # a step's statistics are read after the next one has started
    negotiation: Negotiation | None = None  # rounds over scenarios
    progress: Progress = field(default_factory=Progress)

    @property
    def mesh(self) -> Mesh:
        """Return this rank's mesh."""
        return self.system.mesh
