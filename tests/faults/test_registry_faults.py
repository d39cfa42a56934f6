"""A registry under kills, full disks, other publishers, bad networks: readers see a whole version or the one before."""

from __future__ import annotations

import errno
import http.client
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from commands import gmeta
from versions import Growing, content

from gmeta.delivery.registry import publish
from gmeta.runs import store as stores
from gmeta.runs.registry import Registry, fetch_named, open_registry
from gmeta.runs.store import Bucket

obstore = pytest.importorskip("obstore")
pytestmark = pytest.mark.faults

CHILD = Path(__file__).with_name("registry_child.py")


@pytest.fixture(scope="module")
def days(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Day 0, day 1, and `other`, which goes on from day 0 too."""
    place, model = tmp_path_factory.mktemp("days"), Growing(items=1500)
    model.write(place / "0", training=False)
    model.next_day()
    model.write(place / "1", training=False, parent="run0/0")
    model.next_day()
    model.write(place / "other", training=False, parent="run0/0")
    return place


def memory() -> Registry:
    return Registry(Bucket("memory://", obstore.store.MemoryStore()))


def complaint(registry: Registry, bundle: Path, cache: Path) -> str:
    """What a publisher is told; nothing where he succeeds."""
    try:
        publish(registry, bundle, verdict=None, cache=cache)
    except ValueError as error:
        return str(error)
    return ""


def require_whole(registry: Registry, cache: Path) -> None:
    """What the pointer names is stored, and whatever is stored is whole."""
    pointer = registry.current()
    assert pointer is not None
    for record in registry.versions():
        registry.fetch(record.number, cache)
    assert registry.manifest(pointer.version)["xxh3"] == pointer.xxh3


# ---------------------------------------------------------------------------------------------- kills


def killed_publishers(url: str, days: Path, tmp_path: Path, first: int, step: int) -> dict[str, int]:
    for day in ("0", "1"):
        shutil.copytree(days / day, tmp_path / "place" / day)
    words = [sys.executable, CHILD, url, tmp_path / "place", first, step]
    ended = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return dict(json.loads(ended.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    ("first", "step"),
    [
        pytest.param(7, 29, marks=pytest.mark.slow),
        pytest.param(1, 1, marks=[pytest.mark.slow, pytest.mark.timeout(1200)]),
    ],
)
def test_a_publisher_is_killed_at_its_writes_to_a_folder(days: Path, tmp_path: Path, first: int, step: int) -> None:
    found = killed_publishers(str(tmp_path / "registries"), days, tmp_path, first, step)
    assert found["kills"] >= (2 if step > 1 else 60)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_publisher_is_killed_at_its_writes_to_a_bucket(
    days: Path, tmp_path: Path, moto: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in environment(moto).items():
        monkeypatch.setenv(key, value)
    assert killed_publishers("s3://models", days, tmp_path, 1, 1)["kills"] >= 40


# ---------------------------------------------------------------------------------------------- other publishers


class Interposed:
    """A store that runs `meanwhile` before its k-th operation."""

    def __init__(self, registry: Registry, k: int, meanwhile: Callable[[], None]) -> None:
        self.store, self.left, self.meanwhile = registry.store, k, meanwhile

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.store, name)
        if not callable(found):
            return found

        def call(*arguments: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                self.meanwhile()
            return found(*arguments)

        return call


@pytest.mark.parametrize("second", ["other", "1"])
@pytest.mark.parametrize(("first", "step"), [(2, 5), pytest.param(1, 1, marks=pytest.mark.slow)])
def test_two_publishers_however_their_operations_interleave(
    days: Path, tmp_path: Path, second: str, first: int, step: int
) -> None:
    """The second one publishes while the first is before its k-th operation: another version, or the same."""
    complaints: list[str] = []
    k = first
    while True:
        registry = memory()
        publish(registry, days / "0", verdict=None)
        told: list[str] = []

        def meanwhile(registry: Registry = registry, told: list[str] = told) -> None:
            told.append(complaint(registry, days / second, tmp_path / "cache"))

        interposed = Interposed(registry, k, meanwhile)
        told.append(complaint(Registry(interposed), days / "1", tmp_path / "cache"))  # type: ignore[arg-type]
        require_whole(registry, tmp_path / "cache")
        ids = [record.id for record in registry.versions()]
        assert len(ids) == len(set(ids)), "one version twice"
        pointer = registry.current()
        assert pointer is not None
        if interposed.left > 0:
            break
        assert set(ids) == {"run0/0", "run1/1", "run1/1" if second == "1" else "run2/2"}
        assert pointer.version > 1
        assert "" in told, "one of them succeeds"
        expected = ("delivered already", "stored as number", "took over")
        assert all(text == "" or any(part in text for part in expected) for text in told)
        complaints += [text for text in told if text]
        k += step
    assert k > 20
    assert complaints


# ---------------------------------------------------------------------------------------------- full disks


def test_a_disk_that_is_full_at_any_write(days: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The publisher is told; the version before stays, and publishing again completes it."""
    registry = open_registry(str(tmp_path / "registry"))
    publish(registry, days / "0", verdict=None, cache=tmp_path / "cache")
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    k, refused = 1, 0
    while True:
        left = k
        copy = shutil.copytree(tmp_path / "registry", tmp_path / f"registry{k}")
        full = open_registry(str(copy))

        def failing(original: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **named: Any) -> Any:
                nonlocal left
                left -= 1
                if left <= 0:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return original(*arguments, **named)

            return call

        with monkeypatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a delta that found no space
            for owner, name in ((shutil, "copyfile"), (Path, "write_bytes"), (Path, "mkdir"), (os, "link")):
                patch.setattr(owner, name, failing(getattr(owner, name)))
            told = complaint(full, days / "1", tmp_path / "cache")
        refused += bool(told)
        assert not told or "No space left on device" in told
        require_whole(full, tmp_path / "reader")
        pointer = full.current()
        assert pointer is not None
        if pointer.version == 1:
            publish(full, days / "1", verdict=None, cache=tmp_path / "cache")
        require_whole(full, tmp_path / "reader")
        assert [record.id for record in full.versions()] == ["run0/0", "run1/1"]
        shutil.rmtree(copy)
        if left > 0:
            break
        k += 5
    assert refused >= 5


def test_a_reader_whose_disk_is_full_has_nothing_half(
    days: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = open_registry(str(tmp_path / "registry"))
    publish(registry, days / "0", verdict=None)

    def full(source: Path, target: Path) -> None:
        Path(target).write_bytes(Path(source).read_bytes()[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full)
        with pytest.raises(ValueError, match="No space left on device"):
            registry.fetch(1, tmp_path / "cache")
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []
    assert content(registry.fetch(1, tmp_path / "cache")) == content(days / "0")


def test_readers_that_share_a_cache(days: Path, tmp_path: Path) -> None:
    registry = open_registry(str(tmp_path / "registry"))
    publish(registry, days / "0", verdict=None)
    publish(registry, days / "1", verdict=None)
    with ThreadPoolExecutor(6) as pool:  # each opens the locks anew, as a process of its own would
        found = list(pool.map(lambda k: registry.fetch(1 + k % 2, tmp_path / "cache"), range(12)))
    assert len(set(found)) == 2
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 2
    assert content(registry.fetch(2, tmp_path / "cache")) == content(days / "1")


# ---------------------------------------------------------------------------------------------- bad networks


@pytest.fixture(scope="module")
def moto() -> Iterator[int]:
    """The port of an S3 on loopback that has the bucket `models`."""
    pytest.importorskip("moto")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from moto.server import ThreadedMotoServer

        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
    _, port = server.get_host_and_port()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/models", method="PUT")
    with urllib.request.urlopen(request):
        pass
    yield port
    server.stop()


def environment(port: int) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
    }


class Network:
    """A proxy that loses, repeats or delays: `behaviour` is what happens to each request the first time it is made."""

    def __init__(self, port: int, behaviour: str) -> None:
        self.seen: dict[tuple[str, str], int] = {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
                upstream = http.client.HTTPConnection("127.0.0.1", port)
                upstream.request(self.command, self.path, body, dict(self.headers))
                answer = upstream.getresponse()
                found = answer.status, answer.getheaders(), answer.read()
                upstream.close()
                return found

            def do_PUT(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                request = self.command, self.path
                outer.seen[request] = outer.seen.get(request, 0) + 1
                status, headers, data = self.forward(body)
                first = outer.seen[request] % 2 == 1
                if behaviour == "twice" and self.command == "PUT":
                    status, headers, data = self.forward(body)
                elif behaviour == "late":
                    time.sleep(0.02)
                elif behaviour == "lost" and first:  # done, and nobody is told
                    self.close_connection = True
                    return
                elif behaviour == "error" and first:
                    status, headers, data = 500, [], b"try again"
                self.send_response(status)
                for key, value in headers:
                    lengths = key.lower() == "content-length" and self.command != "HEAD"
                    if not lengths and key.lower() not in ("transfer-encoding", "connection", "server", "date"):
                        self.send_header(key, value)
                if self.command != "HEAD":
                    self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            do_GET = do_DELETE = do_HEAD = do_POST = do_PUT

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def test_an_object_store_by_its_url(
    days: Path, tmp_path: Path, moto: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for key, value in environment(moto).items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(stores, "CHUNK_BYTES", 1000)
    to = ["--registry", "s3://models/by/url"]
    for day in ("0", "1"):
        gmeta("publish", *to, "--bundle", days / day, "--cache", tmp_path / "cache")
    gmeta("registry", "rollback", *to)
    assert capsys.readouterr().out.endswith("version 1 is current\n")
    gmeta("registry", "fetch", "2", "--out", tmp_path / "out", *to)
    assert content(tmp_path / "out") == content(days / "1")
    found = fetch_named("s3://models/by/url/current", tmp_path / "reader")
    assert found is not None
    assert content(found) == content(days / "0")


@pytest.mark.parametrize(
    "behaviour", ["twice", "lost", *(pytest.param(name, marks=pytest.mark.slow) for name in ("error", "late"))]
)
def test_a_bad_network(days: Path, tmp_path: Path, moto: int, behaviour: str) -> None:
    """Where the client's own retries do not help, the publisher is told, and publishes again."""
    network = Network(moto, behaviour)
    store = obstore.store.from_url(
        f"s3://models/{behaviour}",
        endpoint=f"http://127.0.0.1:{network.port}",
        access_key_id="x",
        secret_access_key="x",
        region="us-east-1",
        client_options={"allow_http": True},
        retry_config={"max_retries": 4, "backoff": {"init_backoff": timedelta(milliseconds=5)}},
    )
    registry = Registry(Bucket(f"s3://models/{behaviour}", store))
    tries = 0
    for day in ("0", "1"):
        while (pointer := registry.current()) is None or pointer.id != f"run{day}/{day}":
            tries += 1
            assert tries < 12
            told = complaint(registry, days / day, tmp_path / "cache")
            assert not told or "cannot write" in told
        require_whole(registry, tmp_path / "reader")
    assert [record.id for record in registry.versions()] == ["run0/0", "run1/1"]
    pointer = registry.current()
    assert pointer is not None
    assert [entry["id"] for entry in pointer.history] == ["run0/0", "run1/1"]
    network.close()


def test_a_store_that_is_not_there_is_told_of(tmp_path: Path) -> None:
    store = obstore.store.from_url(
        "s3://models/x",
        endpoint="http://127.0.0.1:9",
        access_key_id="x",
        secret_access_key="x",
        region="us-east-1",
        client_options={"allow_http": True},
        retry_config={"max_retries": 0},
    )
    with pytest.raises(ValueError, match=r"cannot read current.json of s3://models/x"):
        Registry(Bucket("s3://models/x", store)).current()
