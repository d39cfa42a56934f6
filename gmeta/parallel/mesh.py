"""Ranks, process groups and the device of this worker, from the environment that a launcher sets.

torchrun, or `gmeta.parallel.launch`, sets RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE. Without them, or with a
world of one, there is no process group: the group fields are None and every collective is the identity, so that one
process runs the same code as many.
"""

from __future__ import annotations

import os
import time
import uuid
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

_START = "gmeta-start"


class PeerLost(RuntimeError):
    """Another worker died or did not answer in time. Nothing that was in flight can be trusted."""


@dataclass(frozen=True)
class ExchangeStage:
    """One stage of the AlltoAll of rows: the ranks that this rank exchanges with directly.

    To fetch a row of owner `o`, this rank asks the peer at position `o // stride % len(ranks)` of `ranks`. With one
    stage that peer is the owner. With two stages this rank first asks the rank of its own node that has the owner's
    position in its node. That rank then asks the owner.
    """

    ranks: tuple[int, ...]
    stride: int
    rows: dist.ProcessGroup  # rows and row gradients, on the device
    ids: dist.ProcessGroup  # gloo: counts and ids, which the loader's thread exchanges ahead; nobody else uses it


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """What this worker knows about the others: its rank, its device, and the process groups."""

    rank: int = 0
    world_size: int = 1
    local_world_size: int = 1  # workers on this machine
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    timeout_s: int = 300
    row_group: dist.ProcessGroup | None = None  # all ranks that hold rows
    stages: tuple[ExchangeStage, ...] = ()  # stages of the AlltoAll of rows; none in one process
    dense_group: dist.ProcessGroup | None = None  # AllReduce of dense gradients
    control_group: dist.ProcessGroup | None = None  # gloo: barriers, small objects, checkpoints
    row_mesh: DeviceMesh | None = None  # row_group as DTensor wants it

    @property
    def is_main(self) -> bool:
        """Return True on the one rank that writes logs and files that are not sharded."""
        return self.rank == 0


def open_mesh(device: Literal["auto", "cpu", "cuda"] = "auto", timeout_s: int = 300, node_size: int = 0) -> Mesh:
    """Join the other workers, if there are any, and return the mesh.

    The backend is gloo on CPU and NCCL on CUDA. AlltoAll and AllReduce get a process group each, because both are in
    flight during the backward pass. Ids travel over gloo on any device. With `node_size` > 1, the AlltoAll has two
    stages, and each node holds that many consecutive ranks.

    Raises ValueError when CUDA is asked for and there is none, when there are fewer devices than workers, or when
    `node_size` does not divide the number of workers. Raises `PeerLost` when the other workers do not come.
    """
    rank, world_size = _environment_int("RANK", 0), _environment_int("WORLD_SIZE", 1)
    local_rank, local_world_size = _environment_int("LOCAL_RANK", 0), _environment_int("LOCAL_WORLD_SIZE", 1)
    if node_size and world_size % node_size:
        raise ValueError(
            f"comm.node_size is {node_size}, world size is {world_size}: it must divide the number of workers; "
            "set it to the workers of one node, or to 0 for one stage"
        )
    own_device = _device(device, local_rank)
    if world_size == 1:
        return Mesh(device=own_device, timeout_s=timeout_s)
    begun = time.monotonic()
    try:
        return _join(rank, world_size, local_world_size, own_device, timeout_s, node_size)
    except RuntimeError as error:
        waited = time.monotonic() - begun
        raise PeerLost(
            f"rank {rank} of {world_size} could not join the others, {waited:.0f} s after it began: {error}"
        ) from error


def local_mesh(device: Literal["auto", "cpu", "cuda"] = "auto") -> Mesh:
    """Return a mesh of this process alone, also where a launcher started several. Raises the ValueErrors of
    `open_mesh`.
    """
    return Mesh(device=_device(device, 0))


def _join(
    rank: int, world_size: int, local_world_size: int, device: torch.device, timeout_s: int, node_size: int
) -> Mesh:
    timeout = timedelta(seconds=timeout_s)
    store = _agent_store(rank, world_size, timeout)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
    backend = "nccl" if device.type == "cuda" else "gloo"
    row_group = dist.new_group(backend=backend, timeout=timeout)
    return Mesh(
        rank=rank,
        world_size=world_size,
        local_world_size=local_world_size,
        device=device,
        timeout_s=timeout_s,
        row_group=row_group,
        stages=_stages(rank, world_size, node_size, backend, timeout, row_group),
        dense_group=dist.new_group(backend=backend, timeout=timeout),
        control_group=dist.group.WORLD,
        row_mesh=DeviceMesh.from_group(row_group, device.type),
    )


def _agent_store(rank: int, world_size: int, timeout: timedelta) -> dist.Store | None:
    """Return the launcher's store, if it lends one, with a prefix for this start of the workers. None: rank 0 makes
    one.

    The store of torchrun outlives workers that failed. New workers would find the addresses of dead ones in it (torch
    2.13).
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"], _environment_int("MASTER_PORT", 0), is_master=False, timeout=timeout
    )
    return dist.PrefixStore(agree_on_start(store, rank, world_size, timeout), store)


def agree_on_start(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """Return a name for this start of the workers, the same on all ranks, that no earlier start on `store` had.

    Rank 0 makes it, and says whom it has heard: a worker that finds the name of an earlier start is not among them, and
    waits for the next. TORCHELASTIC_RESTART_COUNT would not do, because every agent of torchrun has its own, and that
    of a node that joins begins at 0. Raises RuntimeError where the others do not come within `timeout`.
    """
    mine = uuid.uuid4().hex
    if rank == 0:
        store.set(_START, mine)
        heard = [store.get(f"{mine}/{peer}").decode() for peer in range(1, world_size)]
        store.set(f"{mine}/heard", ",".join(heard))
        return mine
    name, end, pause_s = "", time.monotonic() + timeout.total_seconds(), 0.01
    while time.monotonic() < end:
        found = store.get(_START).decode()
        if found != name:
            name = found
            store.set(f"{name}/{rank}", mine)
        if store.check([f"{name}/heard"]) and mine in store.get(f"{name}/heard").decode().split(","):
            return name
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.25)
    raise RuntimeError("rank 0 did not come")


def _stages(
    rank: int, world_size: int, node_size: int, backend: str, timeout: timedelta, row_group: dist.ProcessGroup
) -> tuple[ExchangeStage, ...]:
    everyone = tuple(range(world_size))
    if node_size in (0, 1, world_size):
        return (ExchangeStage(everyone, 1, row_group, dist.new_group(backend="gloo", timeout=timeout)),)
    nodes = [everyone[start : start + node_size] for start in range(0, world_size, node_size)]
    stages = []
    for stride, parts in ((1, nodes), (node_size, list(zip(*nodes, strict=True)))):
        for ranks in parts:  # every rank makes every group, also those it is not in
            rows = dist.new_group(list(ranks), backend=backend, timeout=timeout)
            ids = dist.new_group(list(ranks), backend="gloo", timeout=timeout)
            if rank in ranks:
                stages.append(ExchangeStage(ranks, stride, rows, ids))
    return tuple(stages)


def close_mesh(mesh: Mesh) -> None:
    """Leave the process groups. Call it only after a clean end: a worker that gives up on its peers just exits."""
    if mesh.control_group is not None:
        dist.destroy_process_group()


def barrier(mesh: Mesh, timeout_s: int | None = None) -> None:
    """Wait for all ranks. `PeerLost` names those that did not come within `timeout_s`, which is the mesh's by
    default.
    """
    if mesh.control_group is None:
        return
    wait = timedelta(seconds=timeout_s or mesh.timeout_s)
    try:
        dist.monitored_barrier(mesh.control_group, timeout=wait, wait_all_ranks=True)
    except RuntimeError as error:
        raise PeerLost(f"rank {mesh.rank} waited {wait.seconds} s in a barrier: {error}") from error


def _environment_int(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise ValueError(f"environment variable {name} is {text!r}: it must be a number, as torchrun sets it")
    return int(text)


def _device(device: str, local_rank: int) -> torch.device:
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if local_rank >= count:
        raise ValueError(
            f"device is {device!r} and this machine has {count} CUDA devices, too few for local rank {local_rank}: "
            "start fewer workers, or set device to cpu"
        )
    found = torch.device("cuda", local_rank)
    torch.cuda.set_device(found)
    return found
