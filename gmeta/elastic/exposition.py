"""The coordinator's numbers for Prometheus."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from gmeta.elastic.coordinator import Coordinator
from gmeta.elastic.view import table, work_item_counts, worker_group


class Exposition:
    """Counts requests and errors, and gathers the rest when it is asked for."""

    media_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        self.requests: Counter[str] = Counter()
        self.errors: Counter[int] = Counter()

    def count(self, message: str, status: int) -> None:
        """Count a request that was answered."""
        self.requests[message] += 1
        if status >= 400:
            self.errors[status] += 1

    def text(self) -> bytes:
        """Return what /metrics answers."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics, for prometheus_client."""
        requests = CounterMetricFamily("gmeta_requests", "Requests by message", labels=["message"])
        for message, count in sorted(self.requests.items()):
            requests.add_metric([message], count)
        errors = CounterMetricFamily("gmeta_request_errors", "Requests that failed, by status", labels=["status"])
        for status, count in sorted(self.errors.items()):
            errors.add_metric([str(status)], count)
        actions = CounterMetricFamily("gmeta_actions", "Actions that were decided on", labels=["action"])
        for action, count in sorted(self._coordinator.counts.items()):
            actions.add_metric([action], count)
        problems = sum(self._coordinator.problems.values())
        yield from (requests, errors, actions, CounterMetricFamily("gmeta_problems", "Problems", value=problems))
        if self._coordinator.job is not None:
            yield from self._job()
        yield from self._workers()

    def _job(self) -> Iterator[Metric]:
        ledger = self._coordinator.ledger
        found = GaugeMetricFamily("gmeta_shards", "Work items of the epoch by state", labels=["state"])
        for name, count in work_item_counts(ledger).items():
            found.add_metric([name], count)
        yield found
        yield GaugeMetricFamily("gmeta_epoch", "Epochs that are done", value=ledger.epoch)
        yield GaugeMetricFamily("gmeta_generation", "Times that a worker group began", value=ledger.generation)
        trained = worker_group(self._coordinator)
        if trained is not None:
            yield GaugeMetricFamily("gmeta_step", "Steps that every rank has finished", value=trained["step"])
            if trained["step_s"] is not None:
                yield GaugeMetricFamily("gmeta_step_seconds", "Median of the last steps", value=trained["step_s"])

    def _workers(self) -> Iterator[Metric]:
        named = {
            "throughput": ("gmeta_worker_samples_per_second", "Samples or tasks a second"),
            "batch_s": ("gmeta_worker_batch_seconds", "Computing a step, or a work item"),
            "slots": ("gmeta_worker_slots", "Tasks of the batch"),
            "holding": ("gmeta_worker_leases", "Work items in hand"),
            "silent_s": ("gmeta_worker_silent_seconds", "Since it was last heard of"),
        }
        rows = table(self._coordinator, self._coordinator.now())
        for key, (name, help_text) in named.items():
            metric = GaugeMetricFamily(name, help_text, labels=["worker"])
            for row in rows:
                if row.get(key) is not None:
                    metric.add_metric([row["name"]], row[key])
            yield metric
