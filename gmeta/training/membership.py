"""The trainer's side of straggler mitigation: joins a coordinator, divides batches as it says, reports its steps.

What batch k is never depends on any of this; see docs/elastic.md.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from gmeta.config.train import TrainConfig
from gmeta.core.batch import TaskBatch
from gmeta.data.loader import SplitSpec, TaskLoader
from gmeta.data.pack import TaskPack
from gmeta.elastic.agent import Agent, LeaseBook
from gmeta.elastic.ledger import JobSpec
from gmeta.elastic.monitor import StepTime
from gmeta.parallel.collectives import broadcast_from_rank_0, on_rank_0
from gmeta.parallel.launch import own_coordinator
from gmeta.parallel.mesh import Mesh
from gmeta.runs.directory import read_run_id

_FACTS_EVERY_S = 2.0
_LEASE_S = 7 * 86400.0
"""A trainer's windows are fenced by its generation. They need no deadline, and a group that was stopped loses none."""


@dataclass(frozen=True)
class Membership:
    """The membership of this rank in one generation of an elastic group."""

    agent: Agent
    generation: int

    def split(self, step: int) -> SplitSpec:
        """Return how the batch of `step` is split over the ranks. It waits until the coordinator has granted the
        step.
        """
        setting = self.agent.setting(step)
        # before the first decision the loader's own split, so that nothing differs from a run without a coordinator
        fractions = setting.tasks_per_rank if setting.number else None
        return SplitSpec(fractions, setting.micro_batches, setting.drop_after_s)

    def finished(self, batch: TaskBatch, step: int, seconds: Mapping[str, float], tasks: int, window: int) -> None:
        """Report a finished step, in which `tasks` of its batch took effect on all ranks together."""
        assert batch.batch_split is not None
        spent = StepTime(
            step,
            compute_s=seconds.get("compute", 0.0),
            input_s=seconds.get("input", 0.0),
            wait_s=seconds.get("exchange", 0.0),
            work=batch.batch_split.work,
        )
        self.agent.finished(spent, batch.epoch, window, tasks)


def job_of(config: TrainConfig, num_tasks: int) -> JobSpec:
    """Return the job of a training run. A work item is a window of the order, and windows come one after the
    other.
    """
    return JobSpec(
        num_samples=num_tasks,
        work_item_size=config.loader.tasks_per_batch * config.loader.window_batches,
        epochs=config.schedule.epochs,
        seed=config.seed,
        shuffle=False,
        mode="exactly_once",
        lease_s=_LEASE_S,
    )


def join(
    config: TrainConfig, pack: TaskPack, mesh: Mesh, loader: TaskLoader[Any], step: int, saved: Mapping[str, Any] | None
) -> Membership | None:
    """Begin a generation at `step`, with the ledger `saved` in the checkpoint of that step; collective.

    Returns None where elastic.enabled is off. From now on `loader` splits batches as the coordinator says.
    """
    elastic = config.elastic
    if not elastic.enabled:
        return None
    url, token_file = elastic.url, None if elastic.token_file is None else Path(elastic.token_file)
    if url is None and (own := own_coordinator()) is not None:
        url, token_file = own
    if url is None:
        raise ValueError("elastic.url is not set: name the coordinator, which `gmeta coordinate` starts")
    from gmeta.elastic.client import Client  # late: only elastic groups speak HTTP
    from gmeta.elastic.tokens import read_token

    token = None if token_file is None else read_token(token_file)
    client = Client(url, token, run=read_run_id(Path(config.run_dir)), patience_s=elastic.patience_s)
    spec = job_of(config, loader.num_tasks)

    def begin() -> int:
        client.open_job(pack.manifest["xxh3"], spec)
        answer = client.call(
            "begin",
            pack=pack.manifest["xxh3"],
            world_size=mesh.world_size,
            batch=config.loader.tasks_per_batch,
            first_step=step,
            ahead=config.loader.prefetch + 1,
            report_s=elastic.report_s,
            saved=saved or ledger_at(config, loader.state_dict()),
        )
        return int(answer["generation"])

    generation = int(broadcast_from_rank_0(on_rank_0(begin, mesh) or 0, mesh))
    agent = Agent(
        client,
        generation=generation,
        rank=mesh.rank,
        report_s=elastic.report_s,
        about={
            "role": "worker",
            "device": elastic.device_class or _device_name(mesh.device),
            "node": platform.node(),
            "max_slots": elastic.max_slots or None,
        },
        facts=NodeFacts(),
        lease_book=_lease_book(spec, loader) if mesh.rank == 0 else None,
    )
    membership = Membership(agent, generation)
    loader.split_by(membership.split)
    return membership


def ledger_at(config: TrainConfig, state: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the ledger of a run that kept none, from the position of its loader. It is None at the start."""
    epoch, index = int(state["epoch"]), int(state["index"])
    if (epoch, index) == (0, 0):
        return None
    if state.get("tail"):
        raise ValueError("the checkpoint has tasks to finish in the epoch's tail, but no ledger: it is damaged")
    window, batches = divmod(index, config.loader.window_batches)
    done = batches * config.loader.tasks_per_batch
    return {
        "epoch": epoch,
        "cursor": window + bool(done),
        "again": [(window, done)] if done else [],
        "num_done": window,
        "attempts": [],
    }


def _lease_book(spec: JobSpec, loader: TaskLoader[Any]) -> LeaseBook:
    return LeaseBook(spec.work_item_size, spec.num_samples, epochs_finished=loader.epochs_done)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


class NodeFacts:
    """The state of the node, in fractions of 1, measured every two seconds at most."""

    def __init__(self) -> None:
        self._measured = -_FACTS_EVERY_S
        self._times = psutil.cpu_times()
        self._facts: dict[str, float] = {}

    def __call__(self) -> dict[str, float]:
        """Return cpu_steal (since the last measurement), load (per core) and memory."""
        if time.monotonic() - self._measured >= _FACTS_EVERY_S:
            self._measured = time.monotonic()
            before, self._times = self._times, psutil.cpu_times()
            passed = sum(self._times) - sum(before)
            steal = getattr(self._times, "steal", 0.0) - getattr(before, "steal", 0.0)
            self._facts = {
                "cpu_steal": steal / passed if passed > 0 else 0.0,
                "load": psutil.getloadavg()[0] / (psutil.cpu_count() or 1),
                "memory": psutil.virtual_memory().percent / 100,
            }
        return self._facts
