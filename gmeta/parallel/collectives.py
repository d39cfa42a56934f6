"""Every collective of gmeta: AlltoAll of rows, bucketed AllReduce, and small helpers.

All ranks must call the same functions in the same order. A rank without work calls them with empty tensors. Without a
process group (world size 1) each function is the identity. A peer that died or hangs raises `PeerLost`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar
from weakref import WeakMethod

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from gmeta.parallel.mesh import Mesh, PeerLost
from gmeta.parallel.traffic import Traffic, add_all_reduce

T = TypeVar("T")

_LOST = (
    "timed out",
    "timeout",
    "connection",
    "closed by peer",
    "reset by peer",
    "broken pipe",
    "remote process",
    "socket",
)


def tells_of_lost_peers(error: RuntimeError) -> bool:
    """Whether a backend's error says that a peer died or did not answer, not that it was called wrongly."""
    return any(word in str(error).lower() for word in _LOST)


@contextmanager
def naming_lost_peers(mesh: Mesh) -> Iterator[None]:
    """Turn the backend's error about a lost peer into `PeerLost`, which names the cure."""
    try:
        yield
    except RuntimeError as error:
        if not tells_of_lost_peers(error):
            raise
        raise PeerLost(
            f"rank {mesh.rank} lost its peers: one of the {mesh.world_size} workers died, or did not answer within "
            f"{mesh.timeout_s} s (timeout_s). See the other workers' messages, then resume from the last checkpoint. "
            f"[{str(error).strip().splitlines()[0][:200]}]"
        ) from error


# AlltoAll


@dataclass
class Pending:
    """A collective in flight; `wait` returns its result."""

    result: Tensor
    work: dist.Work | None
    mesh: Mesh

    def wait(self) -> Tensor:
        """Return the result, once it has arrived."""
        if self.work is not None:
            with naming_lost_peers(self.mesh):
                self.work.wait()
        return self.result


def all_to_all(
    rows: Tensor, send: Sequence[int], receive: Sequence[int], group: dist.ProcessGroup, mesh: Mesh
) -> Pending:
    """Start an AlltoAll of rows: rank i of `group` gets the next `send[i]` rows of `rows` [sum(send), ...].

    The result is [sum(receive), ...], in the order of the sending ranks. The sizes are known on the host, so that
    nothing waits for the device.
    """
    assert rows.shape[0] == sum(send), (rows.shape, send)
    out = rows.new_empty((sum(receive), *rows.shape[1:]))
    with naming_lost_peers(mesh):
        work = dist.all_to_all_single(out, rows.contiguous(), list(receive), list(send), group=group, async_op=True)
    return Pending(out, work, mesh)


def exchange_counts(counts: Tensor, group: dist.ProcessGroup, mesh: Mesh) -> list[list[int]]:
    """Tell every peer how many rows of each exchange to expect: int64 [exchanges, peers], over gloo.

    Returns how many rows each peer asks of this rank, [exchanges][peers].
    """
    ones = [1] * counts.shape[1]
    heard: list[list[int]] = all_to_all(counts.T, ones, ones, group, mesh).wait().T.tolist()
    return heard


# AllReduce


class GradientBuckets:
    """Sums dense gradients over ranks while backward still runs.

    Gradients are packed into flat buckets in the reverse order of the parameters, which is roughly the order in which
    backward makes them. A bucket's AllReduce starts when the bucket and all before it are complete, so that every rank
    starts the same buckets in the same order, whatever its own graph looks like. A parameter without a gradient counts
    as zeros.

        buckets.begin(several=False)
        loss.backward()       # hooks start the buckets that fill up
        buckets.flush()       # starts the rest; before any other collective
        ...
        buckets.finish()      # waits; every p.grad now holds the sum over ranks
    """

    def __init__(self, params: Iterable[torch.nn.Parameter], mesh: Mesh, bucket_mb: float = 4.0) -> None:
        self._mesh = mesh
        self._several = False
        self._buckets = _split_into_buckets(list(params)[::-1], int(bucket_mb * 2**20))
        self._flat = [bucket[0].new_zeros(sum(p.numel() for p in bucket)) for bucket in self._buckets]
        self._missing = [len(bucket) for bucket in self._buckets]
        self._pending: list[Pending] = []
        ready = WeakMethod(self._ready)  # parameters keep their hooks: a strong one would keep the process groups too
        self._hooks = [_hook(p, partial(_call, ready, i)) for i, bucket in enumerate(self._buckets) for p in bucket]

    def begin(self, several: bool) -> None:
        """Begin a step. With `several` backward passes the gradients add up, and nothing starts before `flush`."""
        self._several = several

    def _ready(self, index: int) -> None:
        if self._several:  # a gradient is complete only after the last backward pass
            return
        assert self._missing[index] > 0, "one backward a step: finish() was not called"
        self._missing[index] -= 1
        while len(self._pending) < len(self._buckets) and self._missing[len(self._pending)] == 0:
            self._start()

    def _start(self) -> None:
        index = len(self._pending)
        flat = self._flat[index]
        for param, part in _parts(self._buckets[index], flat):
            if param.grad is None:
                part.zero_()
            else:
                part.copy_(param.grad)
        self._missing[index] = 0
        self._pending.append(_start_sum(flat, self._mesh))

    def flush(self) -> None:
        """Start the buckets that backward did not complete."""
        while len(self._pending) < len(self._buckets):
            self._start()

    def finish(self, traffic: Traffic | None = None) -> None:
        """Wait for all buckets and put the sums into `p.grad`, on every rank for every parameter."""
        self.flush()
        for bucket, pending in zip(self._buckets, self._pending, strict=True):
            total = pending.wait()
            if traffic is not None:
                add_all_reduce(traffic, total.nbytes, self._mesh.world_size)
            for param, part in _parts(bucket, total):
                if param.grad is None:
                    param.grad = part.clone()
                else:
                    param.grad.copy_(part)
        self._pending.clear()
        self._missing = [len(bucket) for bucket in self._buckets]

    def add_expected(self, traffic: Traffic) -> None:
        """Add to `traffic` what a step sends by the formula: one ring AllReduce for each bucket."""
        for flat in self._flat:
            add_all_reduce(traffic, flat.nbytes, self._mesh.world_size)

    def close(self) -> None:
        """Take the hooks off the parameters."""
        for hook in self._hooks:
            hook.remove()


def _call(ready: Callable[[], Callable[[int], None] | None], index: int, _param: Tensor) -> None:
    method = ready()
    if method is not None:
        method(index)


def _hook(param: torch.nn.Parameter, hook: Callable[[Tensor], None]) -> RemovableHandle:
    handle = param.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    assert isinstance(handle, RemovableHandle)
    return handle


def _split_into_buckets(params: Sequence[torch.nn.Parameter], bucket_bytes: int) -> list[list[torch.nn.Parameter]]:
    """Return runs of consecutive parameters of one dtype, split where a bucket would outgrow `bucket_bytes`."""
    buckets: list[list[torch.nn.Parameter]] = []
    size = 0
    for param in params:
        new = param.numel() * param.element_size()
        if not buckets or buckets[-1][0].dtype != param.dtype or size + new > bucket_bytes:
            buckets.append([])
            size = 0
        buckets[-1].append(param)
        size += new
    return buckets


def _parts(bucket: Sequence[torch.nn.Parameter], flat: Tensor) -> Iterator[tuple[torch.nn.Parameter, Tensor]]:
    for param, part in zip(bucket, torch.split(flat, [p.numel() for p in bucket]), strict=True):
        yield param, part.view_as(param)


def _start_sum(tensor: Tensor, mesh: Mesh) -> Pending:
    """Start an AllReduce in place."""
    if mesh.dense_group is None:
        return Pending(tensor, None, mesh)
    with naming_lost_peers(mesh):
        return Pending(tensor, dist.all_reduce(tensor, group=mesh.dense_group, async_op=True), mesh)


def all_reduce_sum(tensor: Tensor, mesh: Mesh, traffic: Traffic | None = None) -> Tensor:
    """Return the sum of `tensor` over ranks, with the same bits on all of them. What is sent is counted in
    `traffic`.
    """
    if traffic is not None:
        add_all_reduce(traffic, tensor.nbytes, mesh.world_size)
    return _start_sum(tensor.clone(), mesh).wait()


# values, arrays, errors


def broadcast_from_rank_0(value: float, mesh: Mesh) -> float:
    """Return rank 0's number, exactly, on every rank."""
    if mesh.control_group is None:
        return value
    tensor = torch.tensor([value], dtype=torch.float64)
    with naming_lost_peers(mesh):
        dist.broadcast(tensor, src=0, group=mesh.control_group)
    return tensor.item()


def fill_from_rank_0(tensors: Iterable[Tensor], mesh: Mesh) -> None:
    """Overwrite tensors, of any type and on any device, by rank 0's of the same shape; as plain bytes over gloo."""
    if mesh.control_group is None:
        return
    for tensor in tensors:
        values = tensor.detach().cpu().contiguous().view(-1)
        with naming_lost_peers(mesh):
            dist.broadcast(values.view(torch.uint8), src=0, group=mesh.control_group)
        with torch.no_grad():
            tensor.copy_(values.view(tensor.shape))


def gather_to_rank_0(array: NDArray[Any], mesh: Mesh) -> NDArray[Any]:
    """Join the ranks' arrays along the first axis, in rank order, on rank 0. Other ranks get an empty array.

    Lengths may differ, and a rank may have none. The other axes and the dtype must agree. Raises ValueError for a dtype
    other than numbers and booleans. The arrays are sent as plain bytes.
    """
    if array.dtype.kind not in "biuf":
        raise ValueError(f"cannot gather an array of dtype {array.dtype}: only numbers and booleans are sent")
    payload = torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8).copy())
    parts = _gather_bytes(payload, mesh)
    tail = array.shape[1:]
    arrays = [part.numpy().view(array.dtype).reshape(-1, *tail) if part.numel() else array[:0] for part in parts]
    return np.concatenate([array[:0], *arrays])


def _gather_bytes(payload: Tensor, mesh: Mesh) -> list[Tensor]:
    """Return every rank's uint8 [n] on rank 0, and an empty list on the other ranks."""
    if mesh.control_group is None:
        return [payload]
    parts = []
    with naming_lost_peers(mesh):
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(mesh.world_size)]
        dist.all_gather(sizes, torch.tensor([payload.numel()]), group=mesh.control_group)
        if mesh.rank != 0:
            if payload.numel():
                dist.send(payload, dst=0, group=mesh.control_group)
            return []
        for rank, size in enumerate(sizes):
            part = payload if rank == 0 else torch.empty(int(size), dtype=torch.uint8)
            if rank != 0 and part.numel():
                dist.recv(part, src=rank, group=mesh.control_group)
            parts.append(part)
    return parts


_ERRORS: tuple[type[Exception], ...] = (ValueError, OSError, RuntimeError)
_MAX_ERROR_BYTES = 4096


def on_rank_0(action: Callable[[], T], mesh: Mesh) -> T | None:
    """Do something on rank 0 alone, and raise its ValueError or OSError on every rank; collective.

    Returns the result on rank 0, and None on the others.
    """
    found, error = None, None
    if mesh.rank == 0:
        try:
            found = action()
        except (ValueError, OSError) as problem:
            error = problem
    raise_together(error, mesh)
    return found


def raise_together(error: Exception | None, mesh: Mesh) -> None:
    """Raise on every rank if any rank has an error; collective.

    A rank with an error raises its own. The other ranks raise one of the same kind (ValueError, OSError, else
    RuntimeError), with the text of the lowest rank that has an error.
    """
    if mesh.control_group is not None:
        kind = next((i for i, cls in enumerate(_ERRORS) if isinstance(error, cls)), len(_ERRORS) - 1)
        text = b"" if error is None else str(error).encode()[:_MAX_ERROR_BYTES]
        mine = torch.zeros(2 + _MAX_ERROR_BYTES, dtype=torch.uint8)
        if error is not None:
            mine[: 2 + len(text)] = torch.tensor([1, kind, *text], dtype=torch.uint8)
        heard = [torch.empty_like(mine) for _ in range(mesh.world_size)]
        with naming_lost_peers(mesh):
            dist.all_gather(heard, mine, group=mesh.control_group)
        if error is None:
            for failed, kind, *rest in (message.tolist() for message in heard):
                if failed:
                    raise _ERRORS[kind](bytes(rest).rstrip(b"\0").decode(errors="replace"))
    if error is not None:
        raise error
