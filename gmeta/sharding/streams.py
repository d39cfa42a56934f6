"""Work that runs beside computing, in order: on a thread on CPU, on a stream on CUDA.

Collectives of several phases are written as plain blocking code and are made asynchronous here. All ranks must submit
the same jobs to a stream in the same order, as they must call collectives in the same order.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue

import torch
from torch import Tensor

MAX_IN_FLIGHT = 1
"""How many staging buffers may be on their way while another one is filled, as in FSDP2."""


class Handle:
    """A submitted job. `wait` returns when the job is done, or raises what it raised.

    On CUDA the current stream of the job's device waits, not the host.
    """

    def __init__(
        self,
        future: Future[None] | None = None,
        event: torch.cuda.Event | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._future, self._event, self._device = future, event, device

    @property
    def done(self) -> bool:
        """Whether the job has ended."""
        return (self._future is None or self._future.done()) and (self._event is None or self._event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Wait for the job. Waiting again costs nothing."""
        if self._future is not None:
            self._future.result()
        if self._event is not None:
            torch.cuda.current_stream(self._device).wait_event(self._event)


class CommStream:
    """Runs jobs one after the other. After a job has failed all others fail likewise, for nothing in flight is
    trusted."""

    def __init__(self, device: torch.device, name: str) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._error: BaseException | None = None
        self._closed = False
        self._jobs: SimpleQueue[tuple[Callable[[], None], Future[None]] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        if self._stream is None:
            # A daemon: a job that waits for a dead peer must not keep the process from ending.
            self._thread = threading.Thread(target=self._work, name=f"gmeta-{name}", daemon=True)
            self._thread.start()

    def submit(self, job: Callable[[], None]) -> Handle:
        """Run `job` after all that were submitted before. RuntimeError says that the stream is closed."""
        if self._closed:
            raise RuntimeError("the engine is closed: make another with paro()")
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                job()
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record(self._stream)
            return Handle(event=event, device=self.device)
        future: Future[None] = Future()
        self._jobs.put((job, future))
        return Handle(future)

    def _work(self) -> None:
        torch.set_num_threads(1)  # a team of OpenMP threads of its own would take the cores from the computing
        while (item := self._jobs.get()) is not None:
            job, future = item
            try:
                if self._error is not None:
                    raise self._error
                job()
            except BaseException as error:
                self._error = error
            del item, job  # tensors that the job holds are free before anybody hears that it has ended
            if self._error is not None:
                future.set_exception(self._error)
            else:
                future.set_result(None)
            del future

    def close(self) -> None:
        """End the thread once its jobs are done; this does not wait for it."""
        self._closed = True
        self._jobs.put(None)


class StagingBuffers:
    """The staging buffers that jobs still read. They hold computing back, so that links that are slower than computing
    do not fill the memory."""

    def __init__(self) -> None:
        self.bounded = True  # False where waiting could keep another rank from what this one waits for
        self._in_flight: deque[tuple[Handle, Tensor | None]] = deque()

    def add(self, handle: Handle, buffer: Tensor) -> None:
        """Note that the job of `handle` reads `buffer`.

        On CUDA the buffer is kept until the computing stream has waited for the job, and may be used again at once.
        """
        self._in_flight.append((handle, buffer if buffer.is_cuda else None))

    def make_room(self) -> None:
        """Wait until no more than `MAX_IN_FLIGHT` are on their way."""
        while self._in_flight and (self._in_flight[0][0].done or self._too_many):
            self._in_flight.popleft()[0].wait()

    @property
    def _too_many(self) -> bool:
        return self.bounded and len(self._in_flight) > MAX_IN_FLIGHT

    def clear(self) -> None:
        """Wait until none is on its way."""
        while self._in_flight:
            self._in_flight.popleft()[0].wait()
