import os
import shutil
from collections import namedtuple
from types import SimpleNamespace

import psutil
import pytest
import torch

from gmeta import doctor
from gmeta.cli import run
from gmeta.doctor import (
    GIB,
    Check,
    check_collectives,
    check_dependency,
    check_memory,
    check_nccl,
    check_space,
    check_threads,
    nccl_transports,
)


def test_this_machine_can_run_gmeta(capsys):
    assert run(["doctor"]) == 0
    printed = capsys.readouterr().out
    for name in ("python", "duckdb", "gpu", "backends", "AllReduce and AlltoAll", "disk here", "gmeta can run here"):
        assert name in printed
    assert torch.__version__.partition("+")[0] in printed  # PyPI's wheel of 2.14.1 keeps +cu130 out of its metadata


def test_a_failure_is_printed_with_its_cure(capsys):
    checks = [Check("disk here", "fail", "0.0 GiB free", "free some [space]"), Check("gpu", "warn", "none", "a driver")]
    assert doctor.print_checks(checks) == 1
    printed = capsys.readouterr().out
    assert "free some [space]" in printed, "no markup is read into what was found"
    assert "1 failed" in printed
    assert doctor.print_checks(checks[1:]) == 0


def test_a_warning_or_failure_says_what_to_do():
    checks = [
        check_dependency("surely-not-installed>=1"),
        check_dependency("numpy>=99"),
        check_dependency("numpy<1.9,>=1.8"),
        check_memory(GIB),
        check_collectives("gloo", 60, program="raise SystemExit('no route')"),
    ]
    assert [check.status for check in checks] == ["fail", "fail", "warn", "warn", "fail"]
    assert all(check.cure for check in checks)


def test_versions_compare_as_numbers():
    assert check_dependency("numpy>=1.9").status == "ok"
    assert check_dependency("numpy").status == "ok"
    assert check_dependency("numpy<99,>=1.9").status == "ok"
    assert doctor._release("2.13.0+cpu") == (2, 13, 0)
    assert doctor._release("2.13.0rc1") > doctor._release("2.9")


def test_collectives_name_the_rank_that_failed():
    program = "import sys\nif sys.argv[2] == '1':\n    raise SystemExit('no route to host')"
    check = check_collectives("gloo", 60, program)
    assert check.status == "fail"
    assert check.found == "rank 1 exited with 1: no route to host"


def test_collectives_end_at_the_time_limit():
    before = psutil.Process().children()  # pools of other tests
    check = check_collectives("gloo", 1, program="import time\ntime.sleep(3600)")
    assert (check.status, check.found) == ("fail", "no answer in 1 s")
    assert set(psutil.Process().children()) <= set(before)


def test_a_wrong_sum_is_a_failure():
    program = doctor._SELF_TEST.replace("float(rank + 1)", "2.0")
    check = check_collectives("gloo", 60, program)
    assert check.status == "fail"
    assert "AllReduce of 1 and 2 gave [4.0, 4.0, 4.0]" in check.found


START = """host:10:10 [0] NCCL INFO Bootstrap : Using eth0:10.0.0.1<0>
host:10:10 [0] NCCL INFO NCCL version 2.27.5+cuda12.9
host:10:31 [0] NCCL INFO Channel 00/02 : 0 1
"""
NVLINK = "host:10:31 [0] NCCL INFO Pattern 4, crossNic 0, nChannels 24, bw 20.0/20.0, type NVL/PIX, sameChannels 1\n"
PCIE = "host:10:31 [0] NCCL INFO Pattern 4, crossNic 0, nChannels 2, bw 12.0/12.0, type PHB/PIX, sameChannels 1\n"
SOCKETS = "host:10:31 [0] NCCL INFO Using network Socket\n"
ROCE = """host:10:31 [0] NCCL INFO NET/IB : Using [0]mlx5_0:1/RoCE [1]mlx5_1:1/RoCE [RO]; OOB eth0:10.0.0.1<0>
host:10:31 [0] NCCL INFO Using network IB
"""
INFINIBAND = ROCE.replace("RoCE", "IB")


def channel(via: str) -> str:
    return f"host:10:31 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] {via}\n"


@pytest.mark.parametrize(
    ("log", "found"),
    [
        (NVLINK + channel("via P2P/CUMEM") + channel("via P2P/CUMEM"), "P2P (NVLink)"),
        (ROCE + NVLINK + channel("via P2P/IPC/read"), "P2P (NVLink); between machines NET/IB (RoCE)"),
        (SOCKETS + PCIE + channel("via P2P/direct pointer"), "P2P (PCIe); between machines NET/Socket"),
        (SOCKETS + PCIE + channel("via SHM/direct/direct"), "SHM; between machines NET/Socket"),
        (SOCKETS + channel("[send] via NET/Socket/0") + channel("[receive] via NET/Socket/0"), "NET/Socket"),
        (ROCE + channel("[send] via NET/IB/0/GDRDMA"), "NET/IB (RoCE)"),
        (INFINIBAND + channel("[send] via NET/IB/0(1)/GDRDMA"), "NET/IB"),
        (NVLINK + channel("via P2P/CUMEM") + INFINIBAND + channel("[send] via NET/IB/0"), "P2P (NVLink); NET/IB"),
        (channel("[receive] via NET/AWS Libfabric/0/GDRDMA"), "NET/AWS Libfabric"),
        (channel("via P2P/CUMEM"), "P2P"),
        (SOCKETS + NVLINK, ""),
    ],
)
def test_transports_are_read_from_nccls_log(log, found):
    assert nccl_transports(START + log) == found


def test_without_cuda_nccl_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert check_nccl(60) == Check("nccl", "ok", "not used: no CUDA device")


def test_nccls_log_comes_from_the_self_tests_processes():
    line = channel("via SHM/direct/direct")
    program = "import os\nopen(os.environ['NCCL_DEBUG_FILE'], 'w').write(" + repr(line) + ")"
    assert check_collectives("nccl", 60, program).found == "AllReduce and AlltoAll between 2 processes over SHM"


@pytest.mark.parametrize(
    ("name", "free", "status"),
    [
        ("disk here", 50 * GIB, "ok"),
        ("disk here", GIB // 2, "warn"),
        ("disk here", 0, "fail"),
        ("/dev/shm", GIB // 32, "warn"),
        ("/dev/shm", GIB // 2, "ok"),
    ],
)
def test_space(name, free, status, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100 * GIB, 0, free))
    check = check_space(name, tmp_path)
    assert check.status == status
    assert bool(check.cure) == (status != "ok")


def test_too_many_threads_are_a_warning(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4096")
    assert check_threads().status == "warn"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert check_threads().status == "ok"
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(psutil.Process, "cpu_affinity", lambda _: [0, 1], raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert "more than the 2 usable processors" in check_threads().found


def test_a_driver_without_a_cuda_build_is_noticed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    assert doctor.check_gpus().status == "warn"
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert doctor.check_gpus().status == "ok"


def test_a_file_that_cannot_be_written_is_refused_before_the_links_are_measured(tmp_path, monkeypatch):
    def raise_alone(error, mesh):
        if error is not None:
            raise error

    monkeypatch.setattr(doctor, "open_mesh", lambda *_: SimpleNamespace(world_size=2, is_main=True))
    monkeypatch.setattr(doctor, "close_mesh", lambda _: None)
    monkeypatch.setattr(doctor, "raise_together", raise_alone)
    for path in (tmp_path / "nowhere" / "n.json", tmp_path):
        with pytest.raises(ValueError, match="cannot be written: name another file"):
            doctor.write_network(str(path), 1, 5)
