"""What a step leaves for the host: its statistics on their way, and the time of its phases. Only reading waits.

On CUDA the host runs ahead of the device: it reads the statistics of a step after it has started the next one, so
that the device always has work. Until they are read, `still_finite` keeps a step that went wrong, and all after it,
from changing anything.
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
    """Bool []: whether all steps so far (`ok`) and this one have a finite loss [] and gradient norm []."""
    return ok & loss.isfinite() & norm.isfinite()


class Stopwatch:
    """Seconds spent per phase of a step.

    On CUDA laps are events on the stream: a phase has the time from the end of the last one's kernels to the end of its
    own, and input only what the device had to wait for.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._laps = [("", self._now())]

    def _now(self) -> float | torch.cuda.Event:
        if self.device.type != "cuda":
            return time.perf_counter()
        return _event(timing=True)

    def lap(self, phase: str) -> None:
        """Book the time since the last lap on `phase`."""
        self._laps.append((phase, self._now()))

    @property
    def seconds(self) -> dict[str, float]:
        """Phase -> seconds; waits for the last lap."""
        if isinstance(last := self._laps[-1][1], torch.cuda.Event):
            last.synchronize()
        out: dict[str, float] = {}
        for (_, start), (phase, end) in zip(self._laps, self._laps[1:], strict=False):
            out[phase] = out.get(phase, 0.0) + _between(start, end)
        return out


def _event(timing: bool = False) -> torch.cuda.Event:
    """An event at the end of what the current stream has been given."""
    event = torch.cuda.Event(enable_timing=timing)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _between(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return float(start.elapsed_time(end)) / 1e3
    assert not isinstance(start, torch.cuda.Event)
    assert not isinstance(end, torch.cuda.Event)
    return end - start


class OnItsWay:
    """Numbers that the device will have; `read` waits for them. The copy starts now, into pinned memory."""

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
        """The numbers by name, once they are there."""
        if self._copied is not None:
            self._copied.synchronize()
        return dict(zip(self._names, self._values.tolist(), strict=True))


@dataclass(frozen=True)
class Started:
    """A step whose work is given to the device, and what is needed to log it, or to say what was wrong with it."""

    step: int  # steps before it
    batch: TaskBatch
    query_loss: Tensor  # [T] of this rank
    lr: float
    stats: OnItsWay
    routed: RoutedRequest  # with what the step sent
    watch: Stopwatch
