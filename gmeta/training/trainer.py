"""`gmeta.train`, and `gmeta.Trainer` for a loop of your own.

    with gmeta.Trainer("train.yaml", model=TwoTowers) as trainer:
        for batch in trainer:
            loss, output = trainer.forward(batch)
            trainer.backward(loss)
            trainer.step()

Batches are prepared ahead. Logging, validation, checkpoints, early stopping, stop signals and elastic groups work
between the steps, and a run resumes exactly. The learned weights are those of `gmeta train`, bit for bit.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from gmeta.config.parse import train_config
from gmeta.config.train import ElasticConfig, TrainConfig
from gmeta.core.errors import require
from gmeta.data.pack import open_pack
from gmeta.meta.learner import LearnerOutput
from gmeta.models.registry import ModelFactory, can_be_found, name_of
from gmeta.parallel.launch import EXIT_RESTART
from gmeta.recommender.build import resolve_model
from gmeta.recommender.system import MicroBatch, PreparedBatch
from gmeta.training.build import Parts
from gmeta.training.defaults import with_defaults
from gmeta.training.loop import batches, between_steps, finish_steps, training_loop
from gmeta.training.run import Run
from gmeta.training.saving import save_checkpoint
from gmeta.training.session import farewell, open_run
from gmeta.training.step import OpenStep, backward, begin_step, end_step, forward, next_part


@dataclass(frozen=True)
class TrainedRun:
    """Where a run stands after training. `gmeta.load` takes it."""

    path: Path
    step: int
    best: float | None  # validation metric, `schedule.metric`
    best_step: int | None
    exit_code: int  # 0, 75 when stopped on request and saved, or 77 when to be started again with another worker

    def __fspath__(self) -> str:
        return str(self.path)


def train(config: TrainConfig | Mapping[str, Any] | str | Path, *, model: ModelFactory | None = None) -> TrainedRun:
    """Do all that `gmeta train` does, on this rank; see `Trainer` for the arguments and errors."""
    with Trainer(config, model=model) as trainer:
        training_loop(trainer.run)
    return trainer.result


class Trainer:
    """A training run on this rank, as a context manager.

    `config` is the path of a YAML file, a mapping or a `TrainConfig`. `model` is a callable `(inputs: InputSpec,
    **args) -> nn.Module`; it replaces the model that `model.name` names. `parts` are for studies that replace how rows
    travel or how gradients are summed. With several processes, start it with `torchrun`: every rank runs the same loop.
    After the loop, `sys.exit(trainer.result.exit_code)` tells a launcher whether to start the group again.

    Raises ValueError for a setting, a pack or a model that does not fit, when it is made or entered.
    """

    def __init__(
        self,
        config: TrainConfig | Mapping[str, Any] | str | Path,
        *,
        model: ModelFactory | None = None,
        parts: Parts | None = None,
    ) -> None:
        config = train_config(config, with_defaults if model is None else dict)
        _require_used(config.elastic)
        if model is not None and config.recipe:
            raise ValueError(
                f"recipe is {config.recipe!r}, which chooses the model, and a model is given: leave one of the two out"
            )
        if model is not None:
            config = replace(config, model=replace(config.model, name=name_of(model)))
        open_pack(config.pack)  # before anything is created
        self.config = resolve_model(config, model)
        if model is not None and not can_be_found(config.model.name):
            warnings.warn(
                f"the model {config.model.name} has no name by which it could be imported: commands will not find it "
                "again, gmeta.load(…, model=…) will",
                stacklevel=2,
            )
        self._model, self._parts = model, parts
        self._stack = ExitStack()
        self._run: Run | None = None
        self._batches: Iterator[PreparedBatch] | None = None
        self._open: _OpenBatch | None = None

    def __enter__(self) -> Trainer:
        self._run = self._stack.enter_context(open_run(self.config, self._model, self._parts))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            if error is None and self.run.exit_code != EXIT_RESTART:
                if self._open is None and self.run.position is not None:  # the loop was left after trainer.step()
                    between_steps(self.run)
                finish_steps(self.run, leave=0)
                if self.run.state.progress.step > self.run.saved_step:
                    save_checkpoint(self.run)
                self.run.log.say(farewell(self.run))

    @property
    def run(self) -> Run:
        """Return the run on this rank: model, tables, optimizers, loader, log and progress."""
        if self._run is None:
            raise RuntimeError("the trainer is not open: use it as `with gmeta.Trainer(…) as trainer`")
        return self._run

    @property
    def result(self) -> TrainedRun:
        """Return where the run stands."""
        progress = self.run.state.progress
        return TrainedRun(
            Path(self.config.run_dir), progress.step, progress.best, progress.best_step, self.run.exit_code
        )

    def __iter__(self) -> Iterator[MicroBatch]:
        """Yield what this rank computes, until training ends.

        A batch that is computed in parts comes part by part. A loop that was left goes on where it was: a batch without
        `step` comes again, here or in a run that resumes.
        """
        self._batches = self._batches or batches(self.run)
        while True:
            if self._open is None:
                prepared = next(self._batches, None)
                if prepared is None:
                    return
                step = begin_step(self.run.state, prepared, self.run.watch)
                self._open = _OpenBatch(step, prepared.parts[0])
            at = self._open
            if at.computed:
                raise RuntimeError("the last loop was left before trainer.step(): leave the trainer too, and resume")
            yield at.part
            if self._open is at:
                raise RuntimeError("the loop went on without trainer.step(): call it after trainer.backward(loss)")

    def forward(self, batch: MicroBatch) -> tuple[Tensor, LearnerOutput]:
        """Return this rank's part of the loss, and the logits and losses of the adapted model.

        The loss is the sum over the batch's tasks of each task's mean query loss, divided by the number of tasks of the
        full batch on all ranks (`batch.tasks.num_tasks_global`). Divide terms that you add by the same number. A rank
        without tasks gets a loss of 0 and empty logits, and makes the same calls.
        """
        at = self._opened("forward")
        if at.part is not batch:
            raise RuntimeError("trainer.forward takes the batch that the loop is at")
        loss, at.output = forward(self.run.state, at.step, at.part)
        return loss, at.output

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of `loss`. Their sums over ranks start meanwhile."""
        at = self._opened("backward")
        if at.output is None:
            raise RuntimeError("trainer.backward needs trainer.forward(batch) before it")
        if at.computed:
            raise RuntimeError("trainer.backward was called twice: add the losses up and call it once")
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            raise ValueError(
                f"trainer.backward got {loss!r}, which has no gradient: give it the loss of trainer.forward, with "
                "terms of your own added"
            )
        backward(self.run.state, at.step, at.part, loss, at.output)

    def step(self) -> None:
        """Update the model, once all parts of the batch are computed; collective."""
        at = self._opened("step")
        if not at.computed:
            raise RuntimeError("trainer.step needs trainer.backward(loss) before it")
        part = next_part(at.step)
        self._open = None if part is None else _OpenBatch(at.step, part)
        if part is None:
            self.run.ahead.append(end_step(self.run.state, at.step))

    def _opened(self, call: str) -> _OpenBatch:
        if self._open is None:
            raise RuntimeError(f"trainer.{call} belongs inside `for batch in trainer`, once for each batch")
        return self._open


@dataclass
class _OpenBatch:
    """The batch that a loop is at, or the part of it."""

    step: OpenStep
    part: MicroBatch
    output: LearnerOutput | None = None  # of the forward pass, once it was made

    @property
    def computed(self) -> bool:
        """Whether the part's gradients are there."""
        return len(self.step.query_loss) > self.part.number


def _require_used(elastic: ElasticConfig) -> None:
    """Raise ValueError where a coordinator is named and not followed."""
    for key in ("url", "token_file"):
        value = getattr(elastic, key)
        unused = not elastic.enabled and value is not None
        require(not unused, f"elastic.{key}", value, "has no effect without --elastic.enabled true")
