import shutil
from collections import namedtuple

import psutil
import pytest
import torch

from gmeta import doctor
from gmeta.cli import run
from gmeta.doctor import GIB, Check, check_collectives, check_dependency, check_memory, check_space, check_threads


def test_this_machine_can_run_gmeta(capsys):
    assert run(["doctor"]) == 0
    printed = capsys.readouterr().out
    for name in ("python", "duckdb", "gpu", "backends", "AllReduce and AlltoAll", "disk here", "gmeta can run here"):
        assert name in printed
    assert torch.__version__ in printed


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
        check_memory(GIB),
        check_collectives("gloo", 60, program="raise SystemExit('no route')"),
    ]
    assert [check.status for check in checks] == ["fail", "fail", "warn", "fail"]
    assert all(check.cure for check in checks)


def test_versions_compare_as_numbers():
    assert check_dependency("numpy>=1.9").status == "ok"
    assert check_dependency("numpy").status == "ok"
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


def test_a_driver_without_a_cuda_build_is_noticed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    assert doctor.check_gpus().status == "warn"
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert doctor.check_gpus().status == "ok"
