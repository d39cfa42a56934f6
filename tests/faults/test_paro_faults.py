"""Ranks that die or hang inside a collective, and links that are measured."""

from __future__ import annotations

import json
import os
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from gmeta.cli import run
from gmeta.parallel.mesh import Mesh, PeerLost
from gmeta.sharding.hierarchy import node_mesh
from gmeta.sharding.paro import paro

sys.path.append(str(Path(__file__).resolve().parents[1] / "dist"))
from harness import Pool


def lose_a_rank(mesh: Mesh, how: str, strategy: str, collectives: str) -> str:
    """Rank 2 leaves, or hangs, between two steps; what do the others end with?"""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
    engine = paro(
        model,
        partial(torch.optim.SGD, lr=0.1),
        node_mesh(2),
        strategy,
        collectives=collectives,  # type: ignore[arg-type]
        timeout_s=5,
    )
    for step in range(3):
        if mesh.rank == 2 and step == 1:
            if how == "dies":
                os._exit(9)
            time.sleep(60)
        try:
            engine.backward(engine(torch.ones(4, 8)).sum())
            engine.step()
        except PeerLost as error:
            return str(error)
    return "nothing was noticed"


@pytest.mark.parametrize(
    ("how", "strategy", "collectives"),
    [
        ("dies", "IIG", "two_phase"),
        pytest.param("dies", "NNN", "backend", marks=pytest.mark.slow),
        pytest.param("dies", "GGG", "ho", marks=pytest.mark.slow),
        pytest.param("hangs", "GGG", "two_phase", marks=pytest.mark.slow),
    ],
)
def test_the_lost_rank_is_named(how: str, strategy: str, collectives: str) -> None:
    pool = Pool(4, 60, 0)
    started = time.monotonic()
    try:
        with pytest.raises(AssertionError):
            pool.run(lose_a_rank, (how, strategy, collectives), 40 if how == "dies" else 30)
        said = list(pool.results.values())
    finally:
        pool.close()
    assert said, "nobody came back"
    assert all("could not exchange" in text for text in said)
    assert all("rank 2" in text for text in said), said
    assert time.monotonic() - started < 60


def test_doctor_measures_links(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    network = tmp_path / "network.json"
    code = run(["doctor", "--nproc", "2", "--network", str(network), "--node_size", "1"])
    said = capfd.readouterr()
    assert code == 0, said.err
    assert "2 nodes of 1" in said.out
    links = json.loads(network.read_text())
    assert links["inter_bits_s"] > 1e6
    assert links["intra_latency_s"] > 0
    assert run(["plan", "--params", "1e9", "--nodes", "2", "--network", str(network)]) == 0
    assert "take " in capfd.readouterr().out


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--network", "n.json"], "one process has no links"),
        (["--network", "n.json", "--nproc", "2", "--node_size", "3"], "nodes of 3 ranks do not divide a world of 2"),
        pytest.param(["--network", "nowhere/n.json", "--nproc", "2"], "cannot be written", marks=pytest.mark.slow),
        (["--nproc", "2"], "nproc is for --network"),
    ],
)
def test_links_that_cannot_be_measured(
    words: list[str], complaint: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["doctor", *words]) == 2
    said = capfd.readouterr().err
    assert complaint in said
    assert "Traceback" not in said
