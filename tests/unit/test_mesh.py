import json

import pytest
import torch

from gmeta.parallel.launch import launch, report_error, worker_environment
from gmeta.parallel.mesh import Mesh, PeerLost, barrier, close_mesh, open_mesh

VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "OMP_NUM_THREADS",
    "TORCHELASTIC_ERROR_FILE",
    "GMETA_LAUNCHED",
)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("launcher", [{}, {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}])
def test_one_process_needs_no_group(monkeypatch, launcher):
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    mesh = open_mesh("cpu", timeout_s=5)
    assert mesh == Mesh(timeout_s=5)
    assert mesh.is_main
    assert not torch.distributed.is_initialized()
    barrier(mesh)
    close_mesh(mesh)


def test_a_damaged_environment_is_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ValueError, match="WORLD_SIZE is 'two'"):
        open_mesh("cpu")


@pytest.mark.parametrize(("workers", "node_size"), [("1", 2), ("4", 3), ("2", 4)])
def test_nodes_must_divide_the_workers(monkeypatch, workers, node_size):
    monkeypatch.setenv("WORLD_SIZE", workers)
    with pytest.raises(ValueError, match=f"comm.node_size is {node_size}, world size is {workers}: it must divide"):
        open_mesh("cpu", node_size=node_size)


def test_too_few_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match="1 CUDA devices, too few for local rank 1"):
        open_mesh("auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device is 'cuda' and this machine has 0 CUDA devices"):
        open_mesh("cuda")
    assert open_mesh("auto").device.type == "cpu"


def test_peers_that_never_come(monkeypatch):
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in worker_environment(0, 2, store.port).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(PeerLost, match="rank 0 of 2 could not join the others, 1 s after it began"):
        open_mesh("cpu", timeout_s=1)


def test_workers_share_the_cores_unless_told(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert worker_environment(1, 2, 99)["OMP_NUM_THREADS"] == "4"
    assert worker_environment(1, 16, 99)["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert "OMP_NUM_THREADS" not in worker_environment(1, 2, 99)


def test_errors_go_to_the_launcher_or_the_console(monkeypatch, tmp_path, capsys):
    report_error("alone")
    assert capsys.readouterr().err == "alone\n"
    # under torchrun: rank 0 prints, all leave a message
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setenv("RANK", "1")
    report_error("torchrun")
    assert capsys.readouterr().err == ""
    assert json.loads((tmp_path / "error.json").read_text())["message"] == "torchrun"
    monkeypatch.setenv("RANK", "0")
    report_error("torchrun")
    assert capsys.readouterr().err == "torchrun\n"
    # under our launcher: it prints
    monkeypatch.setenv("GMETA_LAUNCHED", "1")
    report_error("launched")
    assert capsys.readouterr().err == ""
    assert json.loads((tmp_path / "error.json").read_text())["message"] == "launched"


def test_launching_nothing_is_refused():
    with pytest.raises(ValueError, match="nproc is 0"):
        launch(0, [])
