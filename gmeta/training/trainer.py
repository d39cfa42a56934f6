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

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from gmeta.config.parse import train_config
from gmeta.config.train import TrainConfig
from gmeta.data.pack import open_pack
from gmeta.meta.learner import LearnerOutput
from gmeta.models.registry import ModelFactory, name_of
from gmeta.parallel.launch import EXIT_RESTART, was_restarted
from gmeta.recommender.build import resolve_model
from gmeta.recommender.system import MicroBatch
from gmeta.training.build import Parts
from gmeta.training.loop import batches, finish_steps, training_loop
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
        config = train_config(config)
        if model is not None:
            config = replace(config, model=replace(config.model, name=name_of(model)))
        open_pack(config.pack)  # before anything is created
        if config.elastic.enabled and was_restarted():
            config = replace(config, resume=True)
        self.config = resolve_model(config, model)
        self._model, self._parts = model, parts
        self._stack = ExitStack()
        self._run: Run | None = None
        self._open: tuple[OpenStep, MicroBatch, LearnerOutput | None] | None = None
        self._next_part: MicroBatch | None = None

    def __enter__(self) -> Trainer:
        self._run = self._stack.enter_context(open_run(self.config, self._model, self._parts))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            if error is None and self.run.exit_code != EXIT_RESTART:
                finish_steps(self.run, leave=0)
                if self.run.state.progress.step > self.run.saved_step:  # the loop was left early
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
        """Yield the micro-batches to compute, until training ends. A batch that a rank computes in parts comes part by
        part.
        """
        for prepared in batches(self.run):
            step = begin_step(self.run.state, prepared, self.run.watch)
            part = next_part(step)
            while part is not None:
                self._open = step, part, None
                yield part
                if self._open is not None:
                    raise RuntimeError("the loop went on without trainer.step(): call it after trainer.backward(loss)")
                part = self._next_part
        self._next_part = None

    def forward(self, batch: MicroBatch) -> tuple[Tensor, LearnerOutput]:
        """Return this rank's part of the loss, and the logits and losses of the adapted model.

        The loss is the sum over the batch's tasks of each task's mean query loss, divided by the number of tasks of the
        full batch on all ranks (`batch.tasks.num_tasks_global`). Divide terms that you add by the same number. A rank
        without tasks gets a loss of 0 and empty logits, and makes the same calls.
        """
        step, part, _ = self._opened("forward")
        if part is not batch:
            raise RuntimeError("trainer.forward takes the batch that the loop is at")
        loss, output = forward(self.run.state, step, part)
        self._open = step, part, output
        return loss, output

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of `loss`. Their sums over ranks start meanwhile."""
        step, part, output = self._opened("backward")
        if output is None:
            raise RuntimeError("trainer.backward needs trainer.forward(batch) before it")
        if len(step.query_loss) > part.number:
            raise RuntimeError("trainer.backward was called twice: add the losses up and call it once")
        backward(self.run.state, step, part, loss, output)

    def step(self) -> None:
        """Update the model, once all parts of the batch are computed; collective."""
        step, part, _ = self._opened("step")
        if len(step.query_loss) <= part.number:
            raise RuntimeError("trainer.step needs trainer.backward(loss) before it")
        self._open = None
        self._next_part = next_part(step)
        if self._next_part is None:
            self.run.ahead.append(end_step(self.run.state, step))

    def _opened(self, call: str) -> tuple[OpenStep, MicroBatch, LearnerOutput | None]:
        if self._open is None:
            raise RuntimeError(f"trainer.{call} belongs inside `for batch in trainer`, once for each batch")
        return self._open
