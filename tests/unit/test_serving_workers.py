"""Several workers of `gmeta serve`: a state that one has is everybody's, and so is its end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest
from serving import Client, make_version, metrics_of, one_task

from gmeta.config.serving import ServeConfig
from gmeta.serving.server import open_source
from gmeta.serving.service import Service


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_version(tmp_path_factory.mktemp("workers"), "v1")


TASK = one_task("a")
JSON = {"content-type": "application/json"}


def test_workers_ask_each_other(bundle: Path, tmp_path: Path) -> None:
    config = ServeConfig(bundle=str(bundle), workers=2, access_log=False, device="cpu")

    async def work() -> None:
        async with contextlib.AsyncExitStack() as stack:
            clients = []
            for number in range(2):
                service = Service(
                    config, open_source(config), tokens=[], secret=b"s", worker=number, sockets=str(tmp_path)
                )
                clients.append(Client(service, None))
                await stack.enter_async_context(service.running(None))  # type: ignore[arg-type]
                await stack.enter_async_context(clients[-1].http)
            first, second = clients
            state = (await first.adapt({"key": "a", "support": TASK["support"]})).json()["tasks"][0]["state"]
            kept = {"key": "a", "state": state, "candidates": TASK["candidates"]}
            expected = (await first.score(TASK)).json()
            assert (await second.score(kept)).json() == expected
            assert (await second.score(kept)).json() == expected
            page = await metrics_of(second)
            assert 'gmeta_states_total{found="no",worker="0"} 1.0' in page
            assert 'gmeta_states_total{found="no",worker="1"} 1.0' in page  # adapted once, then remembered
            assert page.count("# TYPE gmeta_states_total counter") == 1
            assert (await second.http.delete(f"/v1/states/{state}")).status_code == 204
            assert [client.service.states.nbytes for client in clients] == [0, 0]
            for client in clients:
                assert (await client.score(kept)).status_code == 410
            state = (await first.adapt({"key": "a", "support": TASK["support"]})).json()["tasks"][0]["state"]
            (tmp_path / "worker-0.sock").unlink()
            gone = await second.score({**kept, "state": state})
            assert (gone.status_code, gone.json()["error"]["code"]) == (503, "worker_gone")
            assert 'worker="1"' in await metrics_of(second)

    asyncio.run(work())


def ask(url: str, path: str, document: Any) -> tuple[int, Any]:
    """Send a request on a connection of its own, which any worker may get."""
    request = urllib.request.Request(f"{url}{path}", json.dumps(document).encode(), JSON)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def workers(server: int) -> list[int]:
    """The processes of a server's workers."""
    children = [c for c in psutil.Process(server).children() if c.status() != psutil.STATUS_ZOMBIE]
    return [child.pid for child in children if "resource_tracker" not in " ".join(child.cmdline())]


@pytest.mark.slow
def test_processes_share_a_port(bundle: Path) -> None:
    words = ["serve", "--bundle", bundle, "--port", 0, "--workers", 2]
    process = subprocess.Popen(
        [sys.executable, "-m", "gmeta", *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[3]
        _, adapted = ask(url, "/v1/adapt", {"tasks": [{"key": "a", "support": TASK["support"]}]})
        named = {"tasks": [{"key": "a", "state": adapted["tasks"][0]["state"], "candidates": TASK["candidates"]}]}
        answers = [ask(url, "/v1/score", named) for _ in range(30)]
        assert all(answer == answers[0] for answer in answers)
        assert answers[0][0] == 200
        with urllib.request.urlopen(f"{url}/metrics") as page:
            assert b'worker="1"' in page.read()
        victim = workers(process.pid)[0]
        os.kill(victim, signal.SIGKILL)
        end = time.monotonic() + 60
        while victim in workers(process.pid) or len(workers(process.pid)) < 2:
            assert time.monotonic() < end
            time.sleep(0.1)
        for _ in range(5):
            status, answer = ask(url, "/v1/score", {"tasks": [TASK]})
            assert status == 200, answer
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0, said
        assert "Traceback" not in said
        assert "died (-9) and is started anew" in said
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_workers_that_cannot_begin_end_the_server(bundle: Path, tmp_path: Path) -> None:
    words = ["serve", "--bundle", str(tmp_path), "--workers", "2", "--port", "0"]
    argv = [sys.executable, "-m", "gmeta", *words]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert "is no bundle" in done.stderr
    assert "Traceback" not in done.stderr
