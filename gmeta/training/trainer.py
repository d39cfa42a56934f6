"""A training run on this rank: everything it holds, how that is built, saved and restored."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gmeta.config.train import TrainConfig
from gmeta.core.batch import TaskBatch
from gmeta.data.loader import TaskLoader
from gmeta.data.pack import TaskPack, open_pack
from gmeta.optim.sharded import Dense, open_dense
from gmeta.optim.sparse import SparseOptimizer
from gmeta.parallel.collectives import raise_together
from gmeta.parallel.mesh import Mesh
from gmeta.recommender.system import Loaded, System, Work, build_system
from gmeta.runs import checkpoint
from gmeta.runs.log import RunLog
from gmeta.training.membership import Membership


@dataclass
class Progress:
    """What advances besides weights, optimizers and loader; saved in every checkpoint."""

    step: int = 0
    best: float | None = None
    best_step: int | None = None
    bad_validations: int = 0
    seconds: float = 0.0


Emulate = Callable[[int, float, bool, float], None]
"""(step, slots of work, whether it is the step's first micro-batch, seconds it took) -> makes it take what an emulated
device would: for the laboratory (`gmeta lab`)."""


@dataclass
class Run:
    """Everything one rank holds while training."""

    config: TrainConfig
    system: System
    dense: Dense
    sparse: SparseOptimizer
    loader: TaskLoader[Work]
    pack: TaskPack
    log: RunLog
    total_steps: int
    stop: threading.Event
    ok: Tensor  # bool []: every step so far was finite; once False no step changes anything
    read_late: bool  # a step's statistics are read after the next one has started
    membership: Membership | None = None  # in an elastic group
    emulate: Emulate | None = None
    progress: Progress = field(default_factory=Progress)

    @property
    def mesh(self) -> Mesh:
        """This rank's mesh."""
        return self.system.mesh

    @property
    def checkpoints(self) -> Path:
        """Directory of the run's checkpoints."""
        return Path(self.config.run_dir) / "checkpoints"


def build_run(config: TrainConfig, mesh: Mesh, stop: threading.Event) -> Run:
    """Build everything a rank needs; raises ValueError for what does not fit, before anything is written."""
    pack = open_pack(config.pack)
    split = pack.split("train")
    system = build_system(config, pack.schema, mesh)
    ahead: dict[str, Callable[[TaskBatch], Work]] = {"none": Loaded, "index": system.index, "ids": system.prepare}
    loader: TaskLoader[Work] = TaskLoader(
        split,
        tasks_per_batch=config.loader.tasks_per_batch,
        seed=config.seed,
        rank=mesh.rank,
        world_size=mesh.world_size,
        window_batches=config.loader.window_batches,
        sequential=config.loader.sequential,
        size_buckets=config.loader.size_buckets,
        prefetch=config.loader.prefetch,
        resample=config.loader.resample,
        transform=ahead[config.loader.ahead],
    )
    total = config.schedule.epochs * loader.batches_per_epoch
    if config.schedule.max_steps:
        total = min(total, config.schedule.max_steps)
    return Run(
        config=config,
        system=system,
        dense=open_dense(
            system.learner,
            mesh,
            lr=config.dense.lr,
            inner_lr_lr=config.dense.inner_lr_lr,
            weight_decay=config.dense.weight_decay,
            sharding=config.dense.sharding,
            node_size=config.dense.node_size,
            memory_bytes=None if config.dense.memory_gb is None else 1e9 * config.dense.memory_gb,
            how=config.comm.dense,
            overlap=config.comm.overlap,
        ),
        sparse=SparseOptimizer(
            config.embedding.optimizer, lr=config.embedding.lr, weight_decay=config.embedding.weight_decay
        ),
        loader=loader,
        pack=pack,
        log=RunLog(Path(config.run_dir), rank=mesh.rank, total_steps=total),
        total_steps=total,
        stop=stop,
        ok=torch.ones((), dtype=torch.bool, device=mesh.device),
        read_late=mesh.device.type == "cuda",
    )


def checkpoint_tensors(run: Run) -> dict[str, Tensor]:
    """Weights, tables and the dense optimizer's moments, by name; of what is sharded, this rank's parts."""
    return {**run.system.table_tensors(), **run.dense.tensors()}


def save_checkpoint(run: Run) -> None:
    """Save and prune; collective. In an elastic group the ledger of this very step goes with it."""
    ledger, error = None, None
    if run.membership is not None:
        try:
            ledger = run.membership.agent.saved() if run.mesh.is_main else None
        except (ValueError, OSError) as problem:
            error = problem
        raise_together(error, run.mesh)
    state = {
        "progress": asdict(run.progress),
        "best_step": run.progress.best_step,
        "loader": run.loader.state_dict(),
        "torch_rng": torch.get_rng_state().numpy().tobytes().hex(),
        "config": asdict(run.config),
        "schema": run.pack.schema.to_json(),
        "ledger": ledger,
    }
    checkpoint.save(run.checkpoints, run.progress.step, checkpoint_tensors(run), state, run.mesh)
    if run.mesh.rank == 0:
        checkpoint.prune(run.checkpoints, run.config.schedule.keep_last, run.progress.best_step)


def load_checkpoint(run: Run, path: Path) -> dict[str, Any] | None:
    """Restore everything from `path`; returns its ledger, where there is one. Collective."""
    state = checkpoint.read_state(path)
    checkpoint.load_tensors(path, checkpoint_tensors(run), run.mesh)
    run.dense.loaded()
    run.progress = Progress(**state["progress"])
    run.loader.load_state_dict(state["loader"])
    torch.set_rng_state(torch.frombuffer(bytearray.fromhex(state["torch_rng"]), dtype=torch.uint8))
    run.log.cut_back(run.progress.step)
    ledger: dict[str, Any] | None = state.get("ledger")
    return ledger
