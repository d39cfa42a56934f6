"""One pass over the jobs of several requests: encode, adapt what is not remembered, score."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from gmeta.data.prepare.direct import text_of
from gmeta.data.prepare.encoder import EncodedTables
from gmeta.data.schema import OOV
from gmeta.data.tables import TableLike
from gmeta.recommender.tasks import TaskState, adapt_tasks, encode, score_tasks, task_digests
from gmeta.serving.metrics import Metrics
from gmeta.serving.refusal import Refusal
from gmeta.serving.states import Kept, States
from gmeta.serving.versions import Version, Versions
from gmeta.serving.wire import Query


@dataclass(eq=False)
class Job:
    """What a request asks for, and the answer. `kept` are the rows of the states that it names, by task."""

    owner: str
    query: Query
    kept: dict[str, Kept] = field(default_factory=dict)
    keep: bool = False  # keep the support rows, and give ids of states
    error: Refusal | None = None
    version: str = ""
    scores: NDArray[np.float64] | None = None  # of the candidates' rows
    states: dict[str, str] = field(default_factory=dict)  # task -> id
    num_support: dict[str, int] = field(default_factory=dict)


@dataclass(eq=False)
class _Work:
    """A job in one version's encoding."""

    job: Job
    support: EncodedTables | None = None
    candidates: EncodedTables | None = None
    states: dict[str, TaskState] = field(default_factory=dict)


class Engine:
    """Computes jobs, in the computing thread alone."""

    def __init__(self, versions: Versions, states: States, metrics: Metrics) -> None:
        self._versions, self._states, self._metrics = versions, states, metrics

    def run(self, jobs: Sequence[Job]) -> None:
        """Compute jobs; each has its answer or its error then."""
        current = self._versions.current
        by_version: dict[str, list[Job]] = {}
        for job in jobs:
            by_version.setdefault(job.query.version or current.id, []).append(job)
        for name, of_version in by_version.items():
            version = current if name == current.id else self._versions.find(name)
            if version is None:
                for job in of_version:
                    job.error = _unknown_version(name, self._versions.names)
            else:
                self._guarded(version, of_version)

    def _guarded(self, version: Version, jobs: Sequence[Job]) -> None:
        """Compute jobs together; where one fails, each alone, so that only that one does."""
        try:
            self._pass(version, jobs)
        except Exception as error:
            if len(jobs) > 1:
                for job in jobs:
                    if job.error is None:
                        self._guarded(version, [job])
            elif isinstance(error, ValueError):
                jobs[0].error = Refusal(422, "bad_value", str(error))
            else:
                self._metrics.note(f"a request failed: {error!r}")
                jobs[0].error = Refusal(500, "internal", "the server failed at this request: see its log")

    def _pass(self, version: Version, jobs: Sequence[Job]) -> None:
        with self._timed("encode"):
            work = [found for job in jobs if (found := self._encoded(version, job)) is not None]
        with self._timed("adapt"):
            self._adapt(version, work)
        scored = [part for part in work if part.candidates is not None and part.job.error is None]
        tables = [part.candidates for part in scored if part.candidates is not None]
        of_tables = [
            [part.states.get(key, version.nothing) for key in table.keys]
            for part, table in zip(scored, tables, strict=True)
        ]
        with self._timed("score"):
            found = score_tasks(version.rec, tables, of_tables)
        for part, scores in zip(scored, found, strict=True):
            part.job.scores = scores
        for part in work:
            if part.job.error is None:
                part.job.version = version.id
                if part.job.keep:
                    self._keep(part)
        self._metrics.count_ids(*_unknown(tables))

    def _encoded(self, version: Version, job: Job) -> _Work | None:
        work, role = _Work(job), "support"
        try:
            if job.query.support is not None:
                work.support = encode(version.rec, job.query.support, "support")
            role = "candidates"
            if job.query.candidates is not None:
                work.candidates = encode(version.rec, job.query.candidates, "candidates")
        except ValueError as error:
            job.error = Refusal(422, "bad_value", _without_files(str(error), role))
            return None
        if work.candidates is not None and (strange := job.kept.keys() - set(work.candidates.keys)):
            job.error = Refusal(
                422, "state_without_candidates", f"{len(strange)} states are of tasks without candidates"
            )
            return None
        return work

    def _adapt(self, version: Version, work: Sequence[_Work]) -> None:
        """Give every job the states of its tasks, of which those that are not remembered are adapted together."""
        tables: list[EncodedTables] = []
        wanted: list[tuple[int, _Work, str, bytes]] = []
        start = hits = 0
        for part in work:
            for table in self._supports(version, part):
                for place, (key, digest) in enumerate(zip(table.keys, task_digests(table), strict=True)):
                    state = self._states.state(part.job.owner, key, version.id, digest)
                    if state is None:
                        wanted.append((start + place, part, key, digest))
                    else:
                        part.states[key], hits = state, hits + 1
                tables.append(table)
                start += len(table.keys)
        self._metrics.count_states(hits, len(wanted))
        adapted = adapt_tasks(version.rec, tables, [place for place, *_ in wanted])
        for (_, part, key, digest), state in zip(wanted, adapted, strict=True):
            part.states[key] = state
            self._states.put(part.job.owner, key, version.id, digest, state)

    def _supports(self, version: Version, part: _Work) -> list[EncodedTables]:
        """Return the support rows of a job: its own, and those that were kept, in this version's encoding."""
        tables = [] if part.support is None else [part.support]
        for kept in part.job.kept.values():
            try:
                table = encode(version.rec, kept.support, "support")
            except ValueError:
                table = None
            if table is None:
                part.job.error = Refusal(
                    410, "state_expired", "the state's rows do not fit the version that serves now: send them again"
                )
                return []
            tables.append(table)
        return tables

    def _keep(self, part: _Work) -> None:
        job = part.job
        assert part.support is not None
        try:
            for key, rows in _rows_by_task(job.query.support, part.support.keys, self._versions.task).items():
                job.states[key] = self._states.new_id(job.owner)
                self._states.keep(job.owner, job.states[key], Kept(key, rows))
                job.num_support[key] = part.states[key].num_support
        except Refusal as refusal:
            job.error = refusal

    def shadow(self, jobs: Sequence[Job]) -> None:
        """Score answered jobs with the shadow version, and tell how far its scores are off."""
        version = self._versions.shadow
        answered = [job for job in jobs if job.scores is not None]
        if version is None or not answered:
            return
        again = [Job(job.owner, job.query, job.kept) for job in answered]
        self._guarded(version, again)
        for job, other in zip(answered, again, strict=True):
            if other.scores is not None and job.scores is not None:
                self._metrics.count_drift(np.abs(other.scores - job.scores))

    @contextmanager
    def _timed(self, stage: Literal["encode", "adapt", "score"]):  # type: ignore[no-untyped-def]
        start = time.perf_counter()
        yield
        self._metrics.observe(stage, time.perf_counter() - start)


def _rows_by_task(support: TableLike, keys: Sequence[str], task: str) -> dict[str, pa.Table]:
    """Return the support rows of each task as a table of its own, which shares no memory with others."""
    table = support if isinstance(support, pa.Table) else pa.table(support)
    if len(keys) == 1:
        return {keys[0]: table}
    of_task: dict[Any, list[int]] = {}
    for row, value in enumerate(table[task].to_pylist()):
        of_task.setdefault(text_of(value), []).append(row)
    return {key: table.take(of_task[key]) for key in keys}


def _unknown(tables: Sequence[EncodedTables]) -> tuple[int, int]:
    """Return how many ids the candidates have, and how many of them are unknown."""
    ids = [table.arrays["ids"] for table in tables]
    return sum(part.size for part in ids), sum(int((part == OOV).sum()) for part in ids)


def _without_files(message: str, role: str) -> str:
    return message if message.startswith(role) else f"{role}: {message}"


def _unknown_version(name: str, names: Sequence[str]) -> Refusal:
    return Refusal(404, "unknown_version", f"version {name!r} is not served; there is: {', '.join(names)}")


Run = Callable[[Sequence[Job]], None]
