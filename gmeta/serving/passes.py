"""Jobs that waited together: those of one version are one pass, and where that fails, each is one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from gmeta.serving.metrics import Metrics
from gmeta.serving.refusal import Declined
from gmeta.serving.versions import Version, Versions


class ServedJob(Protocol):
    """What a request asks for. It has its answer or its error when it was computed."""

    error: Declined | None


_Job = TypeVar("_Job", bound=ServedJob)


def run_by_version(
    jobs: Sequence[_Job],
    versions: Versions,
    wanted: Callable[[_Job], str | None],
    compute: Callable[[Version, Sequence[_Job]], None],
) -> None:
    """Call `compute` with the jobs of each version that is `wanted` (None: the current one). The others are refused."""
    current = versions.current
    of: dict[str, list[_Job]] = {}
    for job in jobs:
        of.setdefault(wanted(job) or current.id, []).append(job)
    for name, some in of.items():
        version = current if name == current.id else versions.find(name)
        if version is not None:
            compute(version, some)
            continue
        for job in some:
            there = ", ".join(versions.names)
            job.error = Declined(404, "unknown_version", f"version {name!r} is not served; there is: {there}")


def compute_or_refuse(jobs: Sequence[_Job], compute: Callable[[Sequence[_Job]], None], metrics: Metrics) -> None:
    """Compute jobs together; where one fails, each alone, so that only that one does. Raises nothing."""
    try:
        compute(jobs)
    except Declined as refusal:
        for job in jobs:
            job.error = job.error or refusal
    except Exception as error:
        if len(jobs) > 1:
            for job in jobs:
                if job.error is None:
                    compute_or_refuse([job], compute, metrics)
        elif isinstance(error, ValueError):
            jobs[0].error = Declined(422, "bad_value", str(error))
        else:
            metrics.note(f"a request failed: {error!r}")
            jobs[0].error = Declined(500, "internal", "the server failed at this request: see its log")
