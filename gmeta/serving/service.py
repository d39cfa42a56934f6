"""What one worker of `gmeta serve` has: the versions, the queue, the states."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from fastapi import FastAPI

from gmeta.config.serving import ServeConfig
from gmeta.serving.access import Access
from gmeta.serving.batcher import Batcher
from gmeta.serving.engine import Engine, ScoringJob
from gmeta.serving.metrics import Counted, Metrics
from gmeta.serving.peers import Peers
from gmeta.serving.recommend_requests import Recommending, RecommendJob
from gmeta.serving.refusal import Declined
from gmeta.serving.states import Kept, States
from gmeta.serving.versions import Source, Versions
from gmeta.serving.wire import RequestLimits

_ROWS_OF_TASK = 200
"""A request of few tasks with very many rows counts as more tasks: a pass takes only so many."""


class Service:
    """Everything that one worker has: the versions, the queue, the states."""

    def __init__(
        self,
        config: ServeConfig,
        source: Source,
        *,
        tokens: list[str],
        secret: bytes,
        worker: int = 0,
        sockets: str = "",
    ) -> None:
        self.config = config
        self.metrics = Metrics(worker, log=config.access_log)
        self.versions = Versions(
            source,
            self.metrics,
            trust_model=config.trust_model,
            device=config.device,
            shadow=None if config.shadow is None else Path(config.shadow),
        )
        self.access = Access(tokens)
        self.limits = RequestLimits(config.max_body_mb * 2**20, config.max_rows, config.max_tasks, config.max_list)
        self.states = States(worker=worker, secret=secret, most_bytes=config.state_mb * 2**20, ttl_s=config.state_ttl_s)
        self.engine = Engine(self.versions, self.states, self.metrics, config.max_new_texts)
        self.peers = Peers(worker, config.workers, Path(sockets), self.states, self.metrics)
        self.recommending = Recommending(self.versions, self.metrics)
        self.batcher: Batcher[ScoringJob | RecommendJob] | None = None
        self.stopping = False
        self.metrics.watch("gmeta_waiting_requests", "Requests in the queue.", lambda: len(self.batcher or ()))
        self.metrics.watch("gmeta_state_bytes", "Bytes of states and kept rows.", lambda: self.states.nbytes)

    @contextlib.asynccontextmanager
    async def running(self, _: FastAPI) -> AsyncIterator[None]:
        """Compute, and follow new versions, while the app runs."""
        config = self.config
        self.batcher = Batcher(
            self._run,
            self._shadow if self.versions.shadow is not None else None,
            most_tasks=config.batch_tasks,
            most_waiting=config.max_queue,
            wait_s=config.batch_wait_ms / 1e3,
            observe=lambda seconds: self.metrics.observe("queue", seconds),
        )
        self.batcher.start()
        following = asyncio.create_task(self._follow())
        async with self.peers.listening():
            yield
        self.stopping = True
        following.cancel()
        await self.batcher.close()

    def _run(self, jobs: Sequence[ScoringJob | RecommendJob]) -> None:
        """Compute jobs; those that score are one pass, those that recommend another."""
        if scoring := [job for job in jobs if isinstance(job, ScoringJob)]:
            self.engine.run(scoring)
        if recommending := [job for job in jobs if isinstance(job, RecommendJob)]:
            self.recommending.run(recommending)

    def _shadow(self, jobs: Sequence[ScoringJob | RecommendJob]) -> None:
        self.engine.shadow([job for job in jobs if isinstance(job, ScoringJob)])

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self.config.poll_s)
            try:
                await asyncio.to_thread(self.versions.refresh)
            except Exception as error:  # the version that serves goes on
                self.metrics.note(f"a fault while looking for a new version: {error!r}")

    async def compute(self, job: ScoringJob, counted: Counted) -> ScoringJob:
        """Have a job computed. Raises its `Declined`."""
        assert self.batcher is not None
        counted.tasks, counted.rows = job.query.num_tasks, job.query.num_rows
        job.kept = {key: await self.find(job.owner, key, state_id) for key, state_id in job.query.states.items()}
        size = max(job.query.num_tasks, job.query.num_rows // _ROWS_OF_TASK)
        await self.batcher.submit(job, size, self.config.timeout_s)
        if job.error is not None:
            raise job.error
        counted.version = job.version
        return job

    async def recommend(self, job: RecommendJob, counted: Counted) -> RecommendJob:
        """Have a job of next items computed. Raises its `Declined`."""
        assert self.batcher is not None
        counted.tasks, counted.rows = len(job.users), len(job.events.item)
        await self.batcher.submit(job, max(counted.tasks, counted.rows // _ROWS_OF_TASK), self.config.timeout_s)
        if job.error is not None:
            raise job.error
        counted.version = job.version
        return job

    async def find(self, owner: str, key: str, state_id: str) -> Kept:
        """Return the kept rows of a state. Raises `Declined` for one of another task, too."""
        kept = await self.peers.find(owner, state_id)
        if kept.key != key:
            raise Declined(422, "state_of_another_task", "the state is of another task than the one that names it")
        return kept
