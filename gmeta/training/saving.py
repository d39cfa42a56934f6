"""Checkpoints of a training run: what is in them, and how it is restored."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gmeta.parallel.collectives import on_rank_0
from gmeta.runs import checkpoint
from gmeta.training.run import Run
from gmeta.training.state import Progress, TrainState


def checkpoint_tensors(state: TrainState) -> dict[str, Tensor]:
    """Return weights, buffers, tables and the dense optimizer's moments, by name. Sharded tensors are this rank's
    partitions.
    """
    before = {} if state.negotiation is None else state.negotiation.tensors()
    return {**before, **state.system.table_tensors(), **state.system.buffer_tensors(), **state.dense.tensors()}


def save_checkpoint(run: Run) -> None:
    """Save a checkpoint and remove old ones; collective. In an elastic group the ledger of this very step is saved with
    it.
    """
    state, mesh, membership = run.state, run.state.mesh, run.membership
    ledger = None if membership is None else on_rank_0(membership.agent.saved, mesh)
    values = {
        "progress": asdict(state.progress),
        "best_step": state.progress.best_step,
        "loader": run.position or run.loader.state_dict(),
        "torch_rng": torch.get_rng_state().numpy().tobytes().hex(),
        "config": asdict(run.config),
        "schema": run.pack.schema.to_json(),
        "data_schema": run.data_schema,
        "ledger": ledger,
    }
    root = state.run_dir / "checkpoints"
    checkpoint.save(root, state.progress.step, checkpoint_tensors(state), values, mesh)
    if mesh.rank == 0:
        checkpoint.prune(root, run.config.schedule.keep_last, state.progress.best_step)
    run.saved_step = state.progress.step


def load_checkpoint(run: Run, path: Path) -> dict[str, Any] | None:
    """Restore everything from `path`, and return its ledger, where there is one; collective."""
    state = run.state
    values = checkpoint.read_state(path)
    checkpoint.load_tensors(path, checkpoint_tensors(state), state.mesh)
    state.dense.loaded()
    state.system.check_loaded()
    state.progress = Progress(**values["progress"])
    run.loader.load_state_dict(values["loader"])
    if values["format_version"] < 3 and not run.loader.between_epochs and run.loader.has_short_batch:
        run.log.say(
            f"checkpoint {path} is of an earlier release, which drew epochs in another order: some tasks of this epoch "
            "may come twice and others not at all; the next epochs are whole"
        )
    torch.set_rng_state(torch.frombuffer(bytearray.fromhex(values["torch_rng"]), dtype=torch.uint8))
    run.log.cut_back(state.progress.step)
    run.saved_step = state.progress.step
    ledger: dict[str, Any] | None = values.get("ledger")
    return ledger
