"""`gmeta doctor`: what this machine has, what is wrong with it, and what to do about it.

The collective self-test runs in processes of its own under a time limit, so that a broken backend is a line in the
table and not a hang.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import psutil
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gmeta.core.files import write_text
from gmeta.parallel.collectives import raise_together
from gmeta.parallel.mesh import close_mesh, open_mesh
from gmeta.sharding.hierarchy import HierarchicalCollectives, node_mesh
from gmeta.sharding.links import describe, measure_links, suspicion

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the diagnosis; `cure` is empty where there is nothing to do."""

    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    cure: str = ""


def diagnose(timeout_s: int) -> list[Check]:
    """Check this machine. The self-tests of collectives get `timeout_s` seconds each."""
    checks = [check_python(), *check_dependencies(), check_cpu(), check_threads(), check_gpus(), check_backends()]
    checks += [check_collectives("gloo", timeout_s), check_nccl(timeout_s)]
    checks.append(check_memory(psutil.virtual_memory().available))
    folders = {"disk here": Path.cwd(), "temporary disk": Path(tempfile.gettempdir()), "/dev/shm": Path("/dev/shm")}
    return checks + [check_space(name, folder) for name, folder in folders.items() if folder.is_dir()]


def write_network(path: str, node_size: int, timeout_s: int) -> None:
    """Measure the links between all processes and write them as JSON, which `gmeta plan --network` reads. Collective.

    ValueError where there is one process, where nodes do not divide the processes, or where the file cannot be written.
    """
    mesh = open_mesh("auto", timeout_s)
    try:
        if mesh.world_size == 1:
            raise ValueError(
                "one process has no links: start doctor --network with --nproc N, or torchrun on all machines"
            )
        out = Path(path)
        error: Exception | None = None
        if mesh.is_main and (out.is_dir() or not os.access(out.absolute().parent, os.W_OK)):
            error = ValueError(f"network {path} cannot be written: name another file")
        raise_together(error, mesh)
        ranks = node_mesh(node_size or mesh.local_world_size, mesh.device.type)
        hierarchy = HierarchicalCollectives.open(ranks, "backend", timeout_s, mesh.device)
        try:
            links = measure_links(hierarchy, mesh.device)
        finally:
            hierarchy.close()
        if mesh.is_main:
            try:
                write_text(out, json.dumps(asdict(links), indent=1) + "\n")
            except ValueError as problem:
                error = problem
        raise_together(error, mesh)
        if mesh.is_main:
            layout = hierarchy.layout
            print(f"{layout.num_nodes} nodes of {layout.node_size}\n{describe(links)}\nwritten to {path}")
            warning = suspicion(links)
            if warning is not None:
                print(f"warning: {warning}", file=sys.stderr)
    finally:
        close_mesh(mesh)


def print_checks(checks: list[Check]) -> int:
    """Print the diagnosis as a table, and return the exit code: 1 where a check failed."""
    console = Console()
    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    table = Table(title="gmeta doctor")
    for heading in ("check", "", "found", "what to do"):
        table.add_column(heading, overflow="fold")
    for check in checks:
        table.add_row(check.name, Text(check.status, colours[check.status]), Text(check.found), Text(check.cure))
    console.print(table)
    failed = sum(check.status == "fail" for check in checks)
    console.print(f"{failed} failed" if failed else "gmeta can run here")
    return 1 if failed else 0


def check_python() -> Check:
    """Name the interpreter. An interpreter that is too old cannot import gmeta, so nothing is left to check."""
    return Check("python", "ok", f"{sys.version.split()[0]} at {sys.executable}")


def check_dependencies() -> list[Check]:
    """Check gmeta's runtime dependencies, as its own metadata declares them."""
    requirements = importlib.metadata.requires("gmeta") or []
    return [check_dependency(line) for line in requirements if "extra ==" not in line]


def check_dependency(requirement: str) -> Check:
    """Check one requirement: a name, with or without a least version and an untested one, as in `torch<2.15,>=2.13`."""
    found = re.fullmatch(r"([\w.-]+?)((?:,?(?:>=|<)[\d.]+)*)", requirement.replace(" ", ""))
    assert found, f"requirement {requirement!r} is not NAME with bounds such as >=2.13 and <2.15"
    name, bounds = found[1], dict(re.findall(r"(>=|<)([\d.]+)", found[2]))
    least, untested = bounds.get(">="), bounds.get("<")
    cure = f"python -m pip install '{requirement}'"
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Check(name, "fail", "not installed", cure)
    if least and _release(version) < _release(least):
        return Check(name, "fail", f"{version}, older than {least}", cure)
    if untested and _release(version) >= _release(untested):
        return Check(name, "warn", f"{version}, newer than gmeta was tested with", cure)
    return Check(name, "ok", version)


def _release(version: str) -> tuple[int, ...]:
    leading = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in leading[0].split(".")) if leading else ()


def check_cpu() -> Check:
    """Count the processors, and those of them that this process may use."""
    return Check(
        "cpu", "ok", f"{_usable_cpus()} usable of {os.cpu_count()}; torch uses {torch.get_num_threads()} threads"
    )


def _usable_cpus() -> int:
    """Count the processors that this process may use."""
    return len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else os.cpu_count() or 1


def check_threads() -> Check:
    """Check OMP_NUM_THREADS, which every process of `--nproc N` inherits."""
    threads = os.environ.get("OMP_NUM_THREADS", "")
    cpus = _usable_cpus()
    if threads.isdigit() and int(threads) > cpus:
        cure = f"set OMP_NUM_THREADS to at most {cpus} divided by the processes of this machine"
        return Check("OMP_NUM_THREADS", "warn", f"{threads}, more than the {cpus} usable processors", cure)
    return Check("OMP_NUM_THREADS", "ok", threads or "not set")


def check_gpus() -> Check:
    """Check that torch can compute on the CUDA devices."""
    count = torch.cuda.device_count()
    if count == 0:
        if shutil.which("nvidia-smi"):
            cure = "install a CUDA build of torch that the driver supports, or train on the CPU with --device cpu"
            return Check("gpu", "warn", f"a driver, but torch {torch.__version__} sees no device", cure)
        return Check("gpu", "ok", "none; gmeta runs on the CPU")
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(count))
    try:
        for index in range(count):
            torch.ones(1, device=f"cuda:{index}").add_(1).item()
    except RuntimeError as error:
        cure = "check the driver with nvidia-smi, or train on the CPU with --device cpu"
        return Check("gpu", "fail", f"{names}: {_last_line(str(error))}", cure)
    return Check("gpu", "ok", names)


def check_backends() -> Check:
    """Name the backends of torch.distributed that this build has."""
    if not dist.is_available() or not dist.is_gloo_available():
        return Check("backends", "fail", "no gloo", "install a build of torch with torch.distributed")
    names = ["gloo"] + ["nccl"] * dist.is_nccl_available() + ["mpi"] * dist.is_mpi_available()
    if torch.cuda.is_available() and not dist.is_nccl_available():
        return Check("backends", "warn", ", ".join(names), "install a build of torch with NCCL to train on GPUs")
    return Check("backends", "ok", ", ".join(names))


_SELF_TEST = """
import datetime, sys
import torch
import torch.distributed as dist
backend, rank, store, timeout_s = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
if backend == "nccl":
    torch.cuda.set_device(device)
dist.init_process_group(backend, init_method="file://" + store, rank=rank, world_size=2,
                        timeout=datetime.timedelta(seconds=timeout_s))
total = torch.full((3,), float(rank + 1), device=device)
dist.all_reduce(total)
assert total.tolist() == [3.0] * 3, f"AllReduce of 1 and 2 gave {total.tolist()}"
sent = torch.arange(3, device=device) + 10 * rank
sizes = [1, 2]
got = torch.empty(2 * sizes[rank], dtype=torch.int64, device=device)
dist.all_to_all_single(got, sent, [sizes[rank]] * 2, sizes)
want = [0, 10] if rank == 0 else [1, 2, 11, 12]
assert got.tolist() == want, f"AlltoAll gave {got.tolist()} instead of {want}"
dist.destroy_process_group()
"""


def check_nccl(timeout_s: int) -> Check:
    """Name NCCL's version, and what it moved the self-test's bytes over between the first two GPUs."""
    count = torch.cuda.device_count()
    if count == 0 or not dist.is_nccl_available():
        return Check("nccl", "ok", "not used: " + ("no CUDA device" if count == 0 else "not in this build of torch"))
    version = "NCCL " + ".".join(str(part) for part in torch.cuda.nccl.version())  # type: ignore[no-untyped-call]
    if count == 1:
        return Check("nccl", "ok", f"{version}; one GPU, and a transport takes two")
    check = check_collectives("nccl", timeout_s)
    return replace(check, found=f"{version}; {check.found}")


_P2P_PATHS = {"NVL": "NVLink", "NVB": "NVLink", "C2C": "NVLink-C2C", "SYS": "PCIe between sockets"}
"""How NCCL's search for rings names the path between GPUs; the others (PIX, PXB, PHB, …) are PCIe."""


def nccl_transports(log: str) -> str:
    """Say what NCCL connected its channels over, from a log of NCCL_DEBUG=INFO with the subsystems INIT, GRAPH and NET.

    The result is such as `P2P (NVLink); between machines NET/IB (RoCE)`, where the second part is what NCCL would take
    there. It is empty where the log names no channel. The lines are those of NCCL 2.12 and later.
    """
    via = re.findall(r"Channel \S+ : \w+\[\w+\] -> \w+\[\w+\](?: \[\w+\])? via (P2P|SHM|NET/[^/\n]+)", log)
    used = [_describe_transport(name, log) for name in dict.fromkeys(via)]
    network = re.search(r"Using network (\S.*)", log)
    if network and used and not any(name.startswith("NET/") for name in used):
        used.append(f"between machines {_describe_transport('NET/' + network[1].strip(), log)}")
    return "; ".join(used)


def _describe_transport(name: str, log: str) -> str:
    """Describe a transport, with what lies under it where the log tells."""
    if name == "P2P" and (path := re.search(r"Pattern \d+, .* type (\w+)/", log)):
        return f"P2P ({_P2P_PATHS.get(path[1], 'PCIe')})"
    if name.startswith("NET/IB"):  # plugins call themselves IBext_v8 and the like
        links = sorted(set(re.findall(r":\d+/(RoCE|IB)\b", log)))
        return f"{name} ({', '.join(links)})" if "RoCE" in links else name
    return name


def check_collectives(backend: Literal["gloo", "nccl"], timeout_s: int, program: str = _SELF_TEST) -> Check:
    """Try AllReduce and AlltoAll between two processes of this machine; both are killed at the time limit."""
    name = f"{backend} self-test"
    cure = {
        "gloo": "see that the host name resolves and no firewall blocks local ports; "
        "GLOO_SOCKET_IFNAME=lo uses the loopback interface",
        "nccl": "NCCL_DEBUG=INFO shows where it stops; NCCL_P2P_DISABLE=1 avoids direct GPU to GPU copies",
    }[backend]
    with tempfile.TemporaryDirectory() as folder:
        errors, logs = ([Path(folder) / f"rank{rank}.{kind}" for rank in range(2)] for kind in ("txt", "log"))
        processes = []
        for rank, path in enumerate(errors):
            command = [sys.executable, "-c", program, backend, str(rank), f"{folder}/store", str(timeout_s)]
            nccl = {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,GRAPH,NET", "NCCL_DEBUG_FILE": str(logs[rank])}
            with path.open("wb") as stderr:
                processes.append(
                    subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr, env=os.environ | nccl)
                )
        codes = _wait(processes, timeout_s)
        for rank, code in enumerate(codes):
            if code:
                message = _last_line(errors[rank].read_text(errors="replace"))
                return Check(name, "fail", f"rank {rank} exited with {code}: {message}", cure)
        if None in codes:
            return Check(name, "fail", f"no answer in {timeout_s} s", cure)
        transports = nccl_transports("".join(path.read_text(errors="replace") for path in logs if path.exists()))
    return Check(
        name, "ok", "AllReduce and AlltoAll between 2 processes" + (f" over {transports}" if transports else "")
    )


def _wait(processes: list[subprocess.Popen[bytes]], timeout_s: int) -> list[int | None]:
    """Wait until all processes have ended, one has failed, or time is up. Return the exit codes; None means that one
    was running.

    Processes that still run are then killed.
    """
    deadline = time.monotonic() + timeout_s
    codes = [process.poll() for process in processes]
    while None in codes and not any(codes) and time.monotonic() < deadline:
        time.sleep(0.02)
        codes = [process.poll() for process in processes]
    for process in processes:
        process.kill()
        process.wait()
    return codes


def _last_line(text: str) -> str:
    """Return the line that names the exception in a worker's last words, or else the last line. The backend's threads
    may complain after the exception.
    """
    lines = [line.strip() for line in text.strip().splitlines()]
    return next((line for line in reversed(lines) if "Error: " in line), lines[-1] if lines else "no message")


def check_memory(available: int) -> Check:
    """Check the free memory, in bytes."""
    found = f"{available / GIB:.1f} GiB free"
    if available < 2 * GIB:
        return Check("memory", "warn", found, "close other programs; prepare takes --memory_limit")
    return Check("memory", "ok", found)


def check_space(name: str, folder: Path) -> Check:
    """Check the free space of the file system that holds `folder`."""
    free = shutil.disk_usage(folder).free
    found = f"{free / GIB:.1f} GiB free at {folder}"
    if name == "/dev/shm":
        if free < GIB // 16:
            return Check(name, "warn", found, "give it 64 MiB or more (docker run --shm-size=1g): NCCL needs it")
        return Check(name, "ok", found)
    if free < GIB:
        return Check(name, "fail" if free < GIB // 16 else "warn", found, "free some space, or work on another disk")
    return Check(name, "ok", found)
