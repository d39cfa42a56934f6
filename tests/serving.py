"""A server in the test's own process, and requests for it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
from packs import make_pack, user_rows

import gmeta
from gmeta.config.delivery import BundleConfig
from gmeta.config.serving import ServeConfig
from gmeta.delivery.bundle import make_bundle
from gmeta.serving.routes import build_app
from gmeta.serving.server import open_source
from gmeta.serving.service import Service

ARROW = "application/vnd.apache.arrow.stream"


def make_version(folder: Path, name: str, **values: Any) -> Path:
    """Train a run on the pack of `folder`, which is made where it is missing, and return its bundle."""
    pack = folder / "pack"
    if not pack.exists():
        make_pack(pack)
    config = {"pack": str(pack), "run_dir": str(folder / f"{name}-run"), "loader": {"tasks_per_batch": 20}}
    config |= {"schedule": {"epochs": 1}, "embedding": {"init_std": 0.5}, "model": {"name": "melu"}}
    config |= {"meta": {"adapt": ["decision"], "inner_steps": 2, "inner_lr": 0.5}, **values}
    run = gmeta.train(config)
    return make_bundle(BundleConfig(run_dir=str(run.path), out=str(folder / name))).path


class Client:
    """Requests to an app that runs on this event loop."""

    def __init__(self, service: Service, token: str | None) -> None:
        self.service = service
        headers = {} if token is None else {"authorization": f"Bearer {token}"}
        transport = httpx.ASGITransport(build_app(service))
        self.http = httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=headers)

    async def post(self, path: str, content: Any, *, kind: str = "application/json", **headers: str) -> httpx.Response:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        return await self.http.post(path, content=body, headers={"content-type": kind, **headers})

    async def score(self, *tasks: Any, **more: Any) -> httpx.Response:
        return await self.post("/v1/score", {"tasks": list(tasks), **more})

    async def adapt(self, *tasks: Any) -> httpx.Response:
        return await self.post("/v1/adapt", {"tasks": list(tasks)})


@contextlib.asynccontextmanager
async def client(bundle: Path, *, tokens: tuple[str, ...] = (), **values: Any) -> AsyncIterator[Client]:
    config = ServeConfig(bundle=str(bundle), **{"access_log": False, "poll_s": 0.02, "device": "cpu", **values})
    service = Service(config, open_source(config), tokens=list(tokens), secret=b"secret")
    found = Client(service, tokens[0] if tokens else None)
    async with service.running(None), found.http:  # type: ignore[arg-type]
        yield found


def with_client(bundle: Path, work: Callable[[Client], Awaitable[Any]], **values: Any) -> Any:
    """Return what `work` returns of a server for a bundle."""

    async def run() -> Any:
        async with client(bundle, **values) as found:
            return await work(found)

    return asyncio.run(run())


async def metrics_of(client: Client) -> str:
    """The page of /metrics."""
    return (await client.http.get("/metrics")).text


def columns(rows: pa.Table) -> dict[str, list[Any]]:
    """The columns of one task's rows, without its key."""
    return {name: values for name, values in rows.to_pydict().items() if name != "user"}


def tasks_of(support: pa.Table, candidates: pa.Table) -> list[dict[str, Any]]:
    """The rows of a table as tasks of a JSON body, in the order in which candidates name them."""
    tasks = []
    for key in dict.fromkeys(candidates["user"].to_pylist()):
        own = {
            part: columns(rows.filter(pa.compute.equal(rows["user"], key)))
            for part, rows in (("support", support), ("candidates", candidates))
        }
        tasks.append({"key": key, **{part: rows for part, rows in own.items() if rows["item"]}})
    return tasks


def one_task(key: str = "new0", *, support: int = 6, candidates: int = 4, seed: int = 1) -> dict[str, Any]:
    """A task with its support and candidates."""
    return {
        "key": key,
        "support": columns(user_rows(1, support, seed, label=True)),
        "candidates": columns(user_rows(1, candidates, seed + 100, label=False)),
    }


def arrow_body(**parts: pa.Table) -> bytes:
    """The streams of some parts, behind each other."""
    sink = pa.BufferOutputStream()
    for part, table in parts.items():
        named = table.replace_schema_metadata({**(table.schema.metadata or {}), b"part": part.encode()})
        with pa.ipc.new_stream(sink, named.schema) as stream:
            stream.write_table(named)
    return sink.getvalue().to_pybytes()
