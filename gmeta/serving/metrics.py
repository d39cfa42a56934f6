"""What a server counts, for Prometheus. Labels are of fixed sets: nothing that a client sends becomes one."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest

Family = tuple[str, str, str, list[tuple[str, dict[str, str], float]]]
Stage = Literal["read", "parse", "queue", "encode", "adapt", "score", "write"]
_SECONDS = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.0, 2.5, 5.0, 10.0)
_DRIFT = (1e-6, 1e-5, 1e-4, 1e-3, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


@dataclass
class Counted:
    """What the metrics and the log tell of a request."""

    tasks: int = 0
    rows: int = 0
    size: int = 0
    version: str = ""


class Metrics:
    """The counters of one worker, and its log."""

    def __init__(self, worker: int = 0, *, log: bool = True) -> None:
        self.registry = CollectorRegistry()
        own, self._log, self._worker = self.registry, log, worker
        self._requests = Counter("gmeta_requests", "Requests by route and status.", ["route", "status"], registry=own)
        self._latency = Histogram(
            "gmeta_request_seconds", "Seconds a request took.", ["route"], buckets=_SECONDS, registry=own
        )
        self._stages = Histogram("gmeta_stage_seconds", "Seconds by stage.", ["stage"], buckets=_SECONDS, registry=own)
        self._stage = {stage: self._stages.labels(stage) for stage in get_args(Stage)}  # a look-up takes 5 us
        self._tasks = Counter("gmeta_tasks", "Tasks of requests.", registry=own)
        self._rows = Counter("gmeta_rows", "Support and candidate rows of requests.", registry=own)
        self._states = Counter(
            "gmeta_states", "Support of tasks, by whether its state was remembered.", ["found"], registry=own
        )
        self._ids = Counter("gmeta_candidate_ids", "Ids of candidates.", registry=own)
        self._unknown = Counter("gmeta_unknown_candidate_ids", "Ids of candidates in no vocabulary.", registry=own)
        self._events = Counter("gmeta_events", "Events of histories.", registry=own)
        self._unknown_events = Counter("gmeta_unknown_events", "Events of items in no vocabulary.", registry=own)
        self._drift = Histogram(
            "gmeta_shadow_difference", "How far the shadow's scores are off.", buckets=_DRIFT, registry=own
        )
        self._reloads = Counter("gmeta_reloads", "New versions, by what became of them.", ["outcome"], registry=own)
        self._loaded = Gauge(
            "gmeta_version_loaded_timestamp_seconds", "When the version that serves was loaded.", registry=own
        )
        self._trained = Gauge(
            "gmeta_version_data_timestamp_seconds", "Time of the last row that it was trained on.", registry=own
        )

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Add a gauge that asks for its value."""
        Gauge(name, text, registry=self.registry).set_function(value)

    def observe(self, stage: Stage, seconds: float) -> None:
        """Count the seconds of a stage."""
        self._stage[stage].observe(seconds)

    @contextmanager
    def timed(self, stage: Stage) -> Iterator[None]:
        """Count the seconds of what runs meanwhile as those of a stage."""
        start = time.perf_counter()
        yield
        self.observe(stage, time.perf_counter() - start)

    def count_states(self, found: int, adapted: int) -> None:
        """Count states that were remembered, and those that were not."""
        self._states.labels("yes").inc(found)
        self._states.labels("no").inc(adapted)

    def count_ids(self, ids: int, unknown: int) -> None:
        """Count ids, and those of them that are unknown."""
        self._ids.inc(ids)
        self._unknown.inc(unknown)

    def count_events(self, events: int, unknown: int) -> None:
        """Count events of histories, and those of them whose item is unknown."""
        self._events.inc(events)
        self._unknown_events.inc(unknown)

    def count_drift(self, differences: NDArray[np.float64]) -> None:
        """Count how far the shadow's scores are off."""
        for difference in differences.tolist():
            self._drift.observe(difference)

    def count_reload(self, outcome: Literal["served", "refused"], *, trained_until: float | None = None) -> None:
        """Count a version that was taken up, or refused."""
        self._reloads.labels(outcome).inc()
        if outcome == "served":
            self._loaded.set(time.time())
            if trained_until is not None:
                self._trained.set(trained_until)

    def finish(self, route: str, status: int, seconds: float, counted: Counted) -> None:
        """Count a request, and log it: no task, no address, no value."""
        self._requests.labels(route, str(status)).inc()
        self._latency.labels(route).observe(seconds)
        self._tasks.inc(counted.tasks)
        self._rows.inc(counted.rows)
        if self._log:
            entry = {"time": round(time.time(), 3), "route": route, "status": status, "ms": round(seconds * 1e3, 2)}
            entry |= {"tasks": counted.tasks, "rows": counted.rows, "bytes": counted.size}
            entry |= {"version": counted.version, "worker": self._worker}
            print(json.dumps(entry), file=sys.stderr, flush=True)

    def note(self, sentence: str) -> None:
        """Write a line for whoever runs the server."""
        print(f"gmeta serve: {sentence}", file=sys.stderr, flush=True)

    def families(self) -> list[Family]:
        """Return all that is counted, as plain values: name, help, type, samples (name, labels, value)."""
        return [
            (
                family.name,
                family.documentation,
                family.type,
                [(s.name, dict(s.labels), s.value) for s in family.samples],
            )
            for family in self.registry.collect()
        ]


class _Workers:
    """What several workers count, each with its number as a label."""

    def __init__(self, families: Mapping[str, list[Family]]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        found: dict[str, Metric] = {}
        for worker, families in self._families.items():
            for name, text, kind, samples in families:
                metric = found.setdefault(name, Metric(name, text, kind))
                for sample, labels, value in samples:
                    metric.add_sample(sample, {**labels, "worker": worker}, value)
        yield from found.values()


def metrics_page(families: Mapping[str, list[Family]]) -> bytes:
    """Return the page of `/metrics`, of what each worker counts."""
    registry = CollectorRegistry()
    registry.register(_Workers(families))
    return generate_latest(registry)
