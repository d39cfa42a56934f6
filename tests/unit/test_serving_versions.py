"""`gmeta serve` follows new versions: without a failed request, and never to one that cannot be trusted."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from packs import SCHEMA, make_pack, user_rows
from serving import Client, columns, make_version, metrics_of, one_task, with_client

import gmeta
from gmeta.data.schema import NumericColumn, parse_data_schema
from gmeta.recommender import smoke
from gmeta.serving.metrics import Metrics
from gmeta.serving.versions import RegistrySource, Versions


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("versions")
    make_version(found, "v1")
    make_version(found, "v2", seed=3)
    make_version(found, "other", model={"name": "taste"})
    return found


def point(link: Path, target: Path) -> None:
    """Let a link lead to another bundle, at once."""
    fresh = link.with_name("fresh")
    fresh.symlink_to(target)
    os.replace(fresh, link)


async def served(client: Client, name: str, timeout_s: float = 20) -> None:
    """Wait until a version serves."""
    end = time.monotonic() + timeout_s
    while client.service.versions.current.id != name:
        assert time.monotonic() < end, f"{name} was not taken up"
        await asyncio.sleep(0.01)


def test_a_new_version_takes_over_under_load(folder: Path, tmp_path: Path) -> None:
    link = tmp_path / "current"
    point(link, folder / "v1")
    recs = {rec.version: rec for rec in (gmeta.load(folder / "v1"), gmeta.load(folder / "v2"))}
    first, second = recs
    support, candidates = user_rows(1, 6, 1, label=True), user_rows(1, 4, 2, label=False)
    expected = {name: rec.adapt(support).predict(candidates) for name, rec in recs.items()}
    assert np.abs(expected[first] - expected[second]).max() > 1e-3
    task = {"key": "new0", "support": columns(support), "candidates": columns(candidates)}

    async def work(client: Client) -> None:
        answer = (await client.adapt({"key": "new0", "support": task["support"]})).json()
        assert answer["version"] == first
        kept = {"key": "new0", "state": answer["tasks"][0]["state"], "candidates": task["candidates"]}
        answers: list[Any] = []
        stop = asyncio.Event()

        async def ask() -> None:
            while not stop.is_set():
                answers.extend([await client.score(task), await client.score(kept)])

        asking = [asyncio.create_task(ask()) for _ in range(3)]
        await asyncio.sleep(0.1)
        point(link, folder / "v2")
        await served(client, second)
        await asyncio.sleep(0.2)
        stop.set()
        await asyncio.gather(*asking)
        for answer in answers:
            assert answer.status_code == 200, answer.text
            body = answer.json()
            np.testing.assert_allclose(body["tasks"][0]["scores"], expected[body["version"]], atol=1e-6)
        assert [a.json()["version"] for a in (answers[0], answers[-1])] == [first, second]
        # back again
        point(link, folder / "v1")
        await served(client, first)
        assert (await client.score(kept)).json()["version"] == first

    with_client(link, work)


@pytest.mark.parametrize(
    ("damage", "message"),
    [("cut", "dense.safetensors"), ("smoke", "scores its smoke sample otherwise"), ("model", "has the model taste")],
)
def test_a_version_that_cannot_serve_is_refused(
    folder: Path,
    tmp_path: Path,
    damage: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    link, bad = tmp_path / "current", tmp_path / "bad"
    point(link, folder / "v1")
    shutil.copytree(folder / ("other" if damage == "model" else "v2"), bad)
    if damage == "cut":
        file = bad / "dense.safetensors"
        file.write_bytes(file.read_bytes()[:-1])

    async def work(client: Client) -> None:
        first = client.service.versions.current.id
        if damage == "smoke":
            monkeypatch.setattr(smoke, "TOLERANCE", -1.0)
        point(link, bad)
        while 'gmeta_reloads_total{outcome="refused",worker="0"} 1.0' not in await metrics_of(client):
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        assert (await client.score(one_task())).json()["version"] == first
        assert 'gmeta_reloads_total{outcome="refused",worker="0"} 1.0' in await metrics_of(client)
        monkeypatch.undo()
        point(link, folder / "v2")  # the next one is taken up
        await served(client, gmeta.load(folder / "v2").version)

    with_client(link, work)
    assert capsys.readouterr().err.count(message) == 1


def test_a_bundle_carries_a_sample_that_it_scores(folder: Path) -> None:
    rec = gmeta.load(folder / "v1")
    assert (folder / "v1" / smoke.SMOKE).exists()
    assert smoke.check_smoke(rec)
    assert smoke.check_smoke(gmeta.load(folder / "v1", mapped=True))
    next(iter(rec.system.learner.model.parameters())).data += 0.1
    with pytest.raises(ValueError, match="scores its smoke sample otherwise than where it was made"):
        smoke.check_smoke(rec)


def test_a_state_that_no_longer_fits_has_expired(folder: Path, tmp_path: Path) -> None:
    """The next version needs a column that the kept rows do not have."""
    schema = parse_data_schema(
        {
            "task": "user",
            "label": "click",
            "item": "item",
            "categorical": ["group", "item"],
            "multi": ["tags"],
            "numeric": ["age", "cost"],
        }
    )
    numeric = (NumericColumn(name="age"), NumericColumn(name="cost"))
    make_pack(tmp_path / "pack", schema=replace(SCHEMA, numeric=numeric), data_schema=schema)
    changed, link = make_version(tmp_path, "changed"), tmp_path / "current"
    point(link, folder / "v1")

    async def work(client: Client) -> None:
        task = one_task()
        state = (await client.adapt({"key": "new0", "support": task["support"]})).json()["tasks"][0]["state"]
        point(link, changed)
        await served(client, gmeta.load(changed).version)
        columns_now = {("cost" if name == "price" else name): values for name, values in task["candidates"].items()}
        answer = await client.score({"key": "new0", "state": state, "candidates": columns_now})
        assert (answer.status_code, answer.json()["error"]["code"]) == (410, "state_expired")

    with_client(link, work)


class FakeRegistry:
    """Version n is the n-th bundle."""

    def __init__(self, *bundles: Path) -> None:
        self.bundles, self.pointer, self.fetched = bundles, 0, list[int]()

    def current(self) -> Any:
        return SimpleNamespace(version=self.pointer) if self.pointer else None

    def fetch(self, version: int, cache: Path, *, training: bool) -> Path:
        assert not training
        self.fetched.append(version)
        return self.bundles[version - 1]


def test_a_registry_is_followed_back_and_forth(folder: Path, tmp_path: Path) -> None:
    registry = FakeRegistry(folder / "v1", folder / "v2")
    ids = [gmeta.load(folder / name).version for name in ("v1", "v2")]
    source = RegistrySource(registry, tmp_path, None)
    with pytest.raises(ValueError, match="there is no version to serve yet"):
        Versions(source, Metrics(), trust_model=False, device="cpu")
    registry.pointer = 1
    versions = Versions(source, Metrics(), trust_model=False, device="cpu")
    assert not versions.refresh()
    for number in (2, 1, 2):
        registry.pointer = number
        assert versions.refresh()
        assert not versions.refresh()
        assert versions.current.id == ids[number - 1]
    assert registry.fetched == [1, 2, 1, 2]  # once each time, however often it is looked
    pinned = Versions(RegistrySource(registry, tmp_path, 1), Metrics(), trust_model=False, device="cpu")
    assert pinned.current.id == ids[0]
    assert not pinned.refresh()


def test_a_shadow_scores_what_was_answered(folder: Path) -> None:
    first, second = gmeta.load(folder / "v1"), gmeta.load(folder / "v2")
    support, candidates = user_rows(1, 6, 1, label=True), user_rows(1, 4, 2, label=False)
    task = {"key": "new0", "support": columns(support), "candidates": columns(candidates)}

    async def work(client: Client) -> None:
        assert (await client.score(task)).json()["version"] == first.version
        while 'gmeta_shadow_difference_count{worker="0"} 4.0' not in await metrics_of(client):
            await asyncio.sleep(0.01)
        answer = (await client.score(task, version=second.version)).json()
        assert answer["version"] == second.version
        np.testing.assert_allclose(answer["tasks"][0]["scores"], second.adapt(support).predict(candidates), atol=1e-6)

    with_client(folder / "v1", work, shadow=str(folder / "v2"))


@pytest.mark.slow
def test_a_server_ends_in_good_order(folder: Path) -> None:
    """A process of its own: it answers over a socket, and finishes what it has begun when it is told to stop."""
    words = ["serve", "--bundle", folder / "v1", "--port", 0, "--batch_wait_ms", 100]
    process = subprocess.Popen(
        [sys.executable, "-m", "gmeta", *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        body = json.dumps({"tasks": [one_task()]}).encode()
        request = urllib.request.Request(f"{url}/v1/score", body, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert len(json.load(answer)["tasks"][0]["scores"]) == 4
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            head = f"POST /v1/score HTTP/1.1\r\nhost: {host}:{port}\r\ncontent-type: application/json\r\n"
            connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            time.sleep(0.05)  # the request waits for others now
            process.send_signal(signal.SIGTERM)
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
        _, said = process.communicate(timeout=30)
        assert process.returncode == 0, said
        assert "Traceback" not in said
    finally:
        process.kill()
        process.wait()
