"""What a step leaves for the host: its statistics and the time of its phases. Only reading them waits for the device.

On CUDA the host runs ahead of the device: it reads the statistics of a step after it has started the next one, so that
the device always has work. Until they are read, `still_finite` keeps a step with numbers that are not finite, and all
steps after it, from changing anything.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gmeta.core.batch import TaskBatch
from gmeta.embedding.exchange import RoutedRequest


def still_finite(ok: Tensor, loss: Tensor, norm: Tensor) -> Tensor:
    """Return bool []: whether all steps so far (`ok`) and this one have a finite loss [] and gradient norm []."""
    return ok & loss.isfinite() & norm.isfinite()


class Stopwatch:
    """The seconds that each phase of a step takes.

    On CUDA, laps are events on the stream. A phase lasts from the end of the kernels of the phase before to the end of
    its own. The phase `input` then holds only the time for which the device had to wait.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._laps = [("", self._now())]

    def _now(self) -> float | torch.cuda.Event:
        if self.device.type != "cuda":
            return time.perf_counter()
        return _event(timing=True)

    def lap(self, phase: str) -> None:
        """Count the time since the last lap as time of `phase`."""
        self._laps.append((phase, self._now()))

    @property
    def seconds(self) -> dict[str, float]:
        """Return phase -> seconds. It waits for the last lap."""
        if isinstance(last := self._laps[-1][1], torch.cuda.Event):
            last.synchronize()
        out: dict[str, float] = {}
        for (_, start), (phase, end) in zip(self._laps, self._laps[1:], strict=False):
            out[phase] = out.get(phase, 0.0) + _between(start, end)
        return out


def _event(timing: bool = False) -> torch.cuda.Event:
    """Return an event at the end of what the current stream has been given."""
    event = torch.cuda.Event(enable_timing=timing)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _between(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return float(start.elapsed_time(end)) / 1e3
    assert not isinstance(start, torch.cuda.Event)
    assert not isinstance(end, torch.cuda.Event)
    return end - start


class AsyncScalars:
    """Numbers that the device is still computing. Their copy into pinned memory starts at once; `read` waits for it."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self._names = tuple(values)
        found = torch.stack([value.double() for value in values.values()])
        self._copied: torch.cuda.Event | None = None
        self._values = found
        if found.device.type == "cuda":
            self._values = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
            self._values.copy_(found, non_blocking=True)
            self._copied = _event()

    def read(self) -> dict[str, float]:
        """Return the numbers by name, once they have arrived."""
        if self._copied is not None:
            self._copied.synchronize()
        return dict(zip(self._names, self._values.tolist(), strict=True))


@dataclass(frozen=True)
class InFlightStep:
    """A step that the device is computing, with what its log line, or an error message about it, needs."""

    step: int  # steps before this one
    batch: TaskBatch
    query_loss: Tensor  # [T] of this rank
    lr: float
    stats: AsyncScalars
    routed: RoutedRequest  # with what it sent
    watch: Stopwatch
