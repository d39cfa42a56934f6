"""One pass over the jobs of several requests: encode, adapt what is not remembered, score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from gmeta.data.layout import one_valued
from gmeta.data.prepare.encoder import EncodedTables
from gmeta.data.schema import OOV, PackSchema
from gmeta.data.tables import TableLike
from gmeta.recommender.tasks import (
    TaskState,
    adapt_tasks,
    encode_rows,
    encode_together,
    num_new_texts,
    score_tasks,
    task_digests,
)
from gmeta.serving.apart import encode_request, split_tasks
from gmeta.serving.metrics import Metrics
from gmeta.serving.passes import compute_or_refuse, run_by_version
from gmeta.serving.refusal import Declined
from gmeta.serving.states import Kept, States
from gmeta.serving.versions import Version, Versions
from gmeta.serving.wire import Query


@dataclass(eq=False)
class ScoringJob:
    """What a request asks for, and the answer. `kept` are the rows of the states that it names, by task."""

    owner: str
    query: Query
    kept: dict[str, Kept] = field(default_factory=dict)
    keep: bool = False  # keep the support rows, and give ids of states
    error: Declined | None = None
    version: str = ""
    scores: NDArray[np.float64] | None = None  # of the candidates' rows
    states: dict[str, str] = field(default_factory=dict)  # task -> id
    num_support: dict[str, int] = field(default_factory=dict)
    digests: dict[str, bytes] = field(default_factory=dict)  # task -> checksum of its support in the version's encoding


@dataclass(eq=False)
class _Part:
    """The support or the candidates of some jobs in one version's encoding: each job has a run of tasks and of rows."""

    table: EncodedTables
    jobs: list[ScoringJob]
    tasks: list[slice]
    rows: list[slice]


class _NewTexts:
    """What is left of the new texts that a pass may bring: encoding them holds up everyone else."""

    def __init__(self, most: int) -> None:
        self._most = self._left = most

    def fit(self, number: int) -> bool:
        """Take so many, if they fit."""
        fit = number <= self._left
        self._left -= number if fit else 0
        return fit

    def refusal(self, number: int) -> Declined:
        """Return why a request with so many is not computed."""
        if number <= self._most:
            reason = "other requests of the moment bring many new texts too: try again"
            return Declined(503, "busy_with_texts", reason, retry_after_s=1)
        reason = f"{number:,} texts are new to the model, more than {self._most:,}: send them in parts"
        return Declined(413, "too_many_new_texts", reason)


class Engine:
    """Computes jobs, one pass at a time; one pass encodes at most `most_new_texts`."""

    def __init__(self, versions: Versions, states: States, metrics: Metrics, most_new_texts: int) -> None:
        self._versions, self._states, self._metrics = versions, states, metrics
        self._most_new_texts = most_new_texts

    def run(self, jobs: Sequence[ScoringJob]) -> None:
        """Compute jobs; each has its answer or its error then."""
        run_by_version(jobs, self._versions, lambda job: job.query.version, self._compute)

    def _compute(self, version: Version, jobs: Sequence[ScoringJob]) -> None:
        compute_or_refuse(jobs, lambda some: self._pass(version, some), self._metrics)

    def _pass(self, version: Version, jobs: Sequence[ScoringJob]) -> None:
        texts = _NewTexts(self._most_new_texts)
        with self._metrics.timed("encode"):
            supports = self._encoded(version, jobs, "support", texts)
            candidates = self._encoded(version, [job for job in jobs if job.error is None], "candidates", texts)
        with self._metrics.timed("adapt"):
            states = self._adapt(version, supports, [job for job in jobs if job.error is None])
        with self._metrics.timed("score"):
            self._score(version, candidates, states)
        for part in supports:
            for job, tasks in zip(part.jobs, part.tasks, strict=True):
                if job.keep and job.error is None:
                    self._keep(version, job, part.table.keys[tasks], states)
        for job in jobs:
            job.version = version.id

    def _encoded(
        self, version: Version, jobs: Sequence[ScoringJob], role: Literal["support", "candidates"], texts: _NewTexts
    ) -> list[_Part]:
        """Encode the rows of jobs, those that look alike together; a job whose rows cannot be used gets its error."""
        alike: dict[object, list[tuple[ScoringJob, TableLike]]] = {}
        for job in jobs:
            table = job.query.support if role == "support" else job.query.candidates
            if table is not None:
                alike.setdefault(_looks(table), []).append((job, table))
        parts = []
        for pairs in alike.values():
            found = encode_together(version.rec, [table for _, table in pairs], role) if len(pairs) > 1 else None
            if found is not None and texts.fit(num_new_texts(version.rec, found[0])):
                sizes = [len(table[self._versions.task]) for _, table in pairs]
                parts.append(_Part(found[0], [job for job, _ in pairs], _runs(found[1]), _runs(sizes)))
                continue
            for job, table in pairs:
                try:
                    encoded = encode_request(version.rec, job.query, table, role)
                except ValueError as error:
                    job.error = Declined(422, "bad_value", str(error))
                    continue
                if encoded is None:
                    continue
                if texts.fit(number := num_new_texts(version.rec, encoded)):
                    parts.append(
                        _Part(encoded, [job], [slice(0, len(encoded.keys))], [slice(0, len(encoded.query_row))])
                    )
                else:
                    job.error = texts.refusal(number)
        return parts

    def _adapt(
        self, version: Version, parts: Sequence[_Part], jobs: Sequence[ScoringJob]
    ) -> dict[tuple[ScoringJob, str], TaskState]:
        """Return the states of the jobs' tasks, of which those that are not remembered are adapted together."""
        states: dict[tuple[ScoringJob, str], TaskState] = {}
        wanted: list[tuple[int, ScoringJob, str, bytes]] = []
        tables, start = [], 0
        for part in [*parts, *self._kept(version, jobs, states)]:
            digests = task_digests(part.table, version.rec.schema)
            for job, tasks in zip(part.jobs, part.tasks, strict=True):
                for place in range(tasks.start, tasks.stop):
                    key, digest = part.table.keys[place], digests[place]
                    job.digests[key] = digest
                    if (kept := job.kept.get(key)) is not None:
                        kept.digests[version.id] = digest
                    state = self._states.state(job.owner, key, version.id, digest)
                    if state is None:
                        wanted.append((start + place, job, key, digest))
                    else:
                        states[job, key] = state
            tables.append(part.table)
            start += len(part.table.keys)
        self._metrics.count_states(len(states), len(wanted))
        adapted = adapt_tasks(version.rec, tables, [place for place, *_ in wanted])
        for (_, job, key, digest), state in zip(wanted, adapted, strict=True):
            states[job, key] = state
            self._states.put(job.owner, key, version.id, digest, state, job.query.states.get(key, ""))
        return states

    def _kept(
        self, version: Version, jobs: Sequence[ScoringJob], states: dict[tuple[ScoringJob, str], TaskState]
    ) -> list[_Part]:
        """Find the states of kept rows that are remembered; return the others' rows in this version's encoding."""
        parts = []
        for job in jobs:
            for key, kept in job.kept.items():
                digest = kept.digests.get(version.id)
                state = None if digest is None else self._states.state(job.owner, key, version.id, digest)
                if state is not None:
                    states[job, key] = state
                    continue
                try:
                    table = encode_rows(version.rec, kept.support, "support")
                    assert table is not None
                    parts.append(_Part(table, [job], [slice(0, 1)], [slice(0, len(table.query_row))]))
                except ValueError:
                    reason = "the state's rows do not fit the version that serves now: send them again"
                    job.error = Declined(410, "state_expired", reason)
        return parts

    def _score(
        self, version: Version, parts: Sequence[_Part], states: Mapping[tuple[ScoringJob, str], TaskState]
    ) -> None:
        of_tables = []
        for part in parts:
            of_tables.append([version.nothing] * len(part.table.keys))
            for job, tasks in zip(part.jobs, part.tasks, strict=True):
                keys = part.table.keys[tasks]
                of_tables[-1][tasks] = [states.get((job, key), version.nothing) for key in keys]
                if strange := job.kept.keys() - set(keys):
                    reason = f"{len(strange)} states are of tasks without candidates"
                    job.error = job.error or Declined(422, "state_without_candidates", reason)
        tables = [part.table for part in parts]
        for part, scores in zip(parts, score_tasks(version.rec, tables, of_tables), strict=True):
            for job, rows in zip(part.jobs, part.rows, strict=True):
                job.scores = scores[rows]
        self._metrics.count_ids(*_unknown(tables, version.rec.schema))

    def _keep(
        self, version: Version, job: ScoringJob, keys: Sequence[str], states: Mapping[tuple[ScoringJob, str], TaskState]
    ) -> None:
        assert job.query.support is not None
        try:
            for key, rows in split_tasks(job.query.support, keys, self._versions.task).items():
                job.states[key] = self._states.new_id(job.owner)
                self._states.keep(job.owner, job.states[key], Kept(key, rows, {version.id: job.digests[key]}))
                job.num_support[key] = states[job, key].num_support
        except Declined as refusal:
            job.error = refusal

    def shadow(self, jobs: Sequence[ScoringJob]) -> None:
        """Score answered jobs with the shadow version, and tell how far its scores are off."""
        version = self._versions.shadow
        answered = [job for job in jobs if job.scores is not None]
        if version is None or not answered:
            return
        again = [ScoringJob(job.owner, job.query, job.kept) for job in answered]
        self._compute(version, again)
        for job, other in zip(answered, again, strict=True):
            if other.scores is not None and job.scores is not None:
                self._metrics.count_drift(np.abs(other.scores - job.scores))


def _unknown(tables: Sequence[EncodedTables], schema: PackSchema) -> tuple[int, int]:
    """Return how many ids the candidates have, and how many of them are unknown: texts without a row among them."""
    ids = [table.arrays["ids"] for table in tables]
    limits = np.array([schema.feature(name).num_ids for name in one_valued(schema)])
    return sum(part.size for part in ids), sum(int(((part == OOV) | (part >= limits)).sum()) for part in ids)


def _runs(sizes: Sequence[int]) -> list[slice]:
    """Return where parts of these sizes lie behind each other."""
    ends = list(accumulate(sizes))
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def _looks(table: TableLike) -> object:
    """Return what tables share that can be encoded as one: columns and types, of lists those of their first values."""
    if isinstance(table, pa.Table):
        return tuple(zip(table.column_names, map(str, table.schema.types), strict=True))
    return tuple((name, type(values[0])) for name, values in table.items())
