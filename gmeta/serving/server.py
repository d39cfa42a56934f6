"""`gmeta serve`: the HTTP service. It needs the packages of `gmeta[serve]`."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from gmeta.config.serving import ServeConfig

try:
    from fastapi import FastAPI, Request, Response
    from pydantic_core import to_json
    from starlette.requests import ClientDisconnect

    from gmeta.elastic.service import is_loopback, listen, run_app, url_of
    from gmeta.serving.access import Access, read_tokens
    from gmeta.serving.batcher import Batcher
    from gmeta.serving.engine import Engine, Job
    from gmeta.serving.infer import answer, metadata, query_of_infer
    from gmeta.serving.metrics import Metrics, page
    from gmeta.serving.peers import Peers
    from gmeta.serving.refusal import Refusal
    from gmeta.serving.states import Kept, States
    from gmeta.serving.versions import FolderSource, RegistrySource, Source, Versions
    from gmeta.serving.wire import Limits, Query, parse_json, query_of_arrow, query_of_json
    from gmeta.serving.workers import Worker, run_workers
except ImportError as error:
    raise ValueError(
        f"gmeta serve needs packages that are not here ({error}): pip install 'gmeta[serve]', or '.[serve]' in a clone"
    ) from error

JSON = "application/json"
ARROW = "application/vnd.apache.arrow.stream"
_ROWS_OF_TASK = 200
"""A request of few tasks with very many rows counts as more tasks: a pass takes only so many."""
_SWITCH_S = 0.0005
"""Python's default lets the event loop keep the lock for 5 ms, in which the computing thread waits."""


@dataclass
class Counted:
    """What the metrics and the log tell of a request."""

    tasks: int = 0
    rows: int = 0
    size: int = 0
    version: str = ""


Handler = Callable[[Request, str, Counted], Awaitable[Response]]


class Service:
    """Everything that one worker has: the versions, the queue, the states."""

    def __init__(
        self,
        config: ServeConfig,
        source: Source,
        *,
        tokens: list[str],
        secret: bytes,
        worker: int = 0,
        sockets: str = "",
    ) -> None:
        self.config = config
        self.metrics = Metrics(worker, log=config.access_log)
        self.versions = Versions(
            source,
            self.metrics,
            trust_model=config.trust_model,
            device=config.device,
            shadow=None if config.shadow is None else Path(config.shadow),
        )
        self.access = Access(tokens)
        self.limits = Limits(config.max_body_mb * 2**20, config.max_rows, config.max_tasks, config.max_list)
        self.states = States(worker=worker, secret=secret, most_bytes=config.state_mb * 2**20, ttl_s=config.state_ttl_s)
        self.engine = Engine(self.versions, self.states, self.metrics)
        self.peers = Peers(worker, config.workers, Path(sockets), self.states, self.metrics)
        self.batcher: Batcher[Job] | None = None
        self.stopping = False
        self.metrics.watch("gmeta_waiting_requests", "Requests in the queue.", lambda: len(self.batcher or ()))
        self.metrics.watch("gmeta_state_bytes", "Bytes of states and kept rows.", lambda: self.states.nbytes)

    @contextlib.asynccontextmanager
    async def running(self, _: FastAPI) -> AsyncIterator[None]:
        """Compute, and follow new versions, while the app runs."""
        config = self.config
        self.batcher = Batcher(
            self.engine.run,
            self.engine.shadow if self.versions.shadow is not None else None,
            most_tasks=config.batch_tasks,
            most_waiting=config.max_queue,
            wait_s=config.batch_wait_ms / 1e3,
            observe=lambda seconds: self.metrics.observe("queue", seconds),
        )
        self.batcher.start()
        following = asyncio.create_task(self._follow())
        async with self.peers.listening():
            yield
        self.stopping = True
        following.cancel()
        await self.batcher.close()

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self.config.poll_s)
            try:
                await asyncio.to_thread(self.versions.refresh)
            except Exception as error:  # the version that serves goes on
                self.metrics.note(f"a fault while looking for a new version: {error!r}")

    async def compute(self, job: Job, counted: Counted) -> Job:
        """Have a job computed. Raises its `Refusal`."""
        assert self.batcher is not None
        counted.tasks, counted.rows = job.query.num_tasks, job.query.num_rows
        job.kept = {key: await self.find(job.owner, key, state_id) for key, state_id in job.query.states.items()}
        size = max(job.query.num_tasks, job.query.num_rows // _ROWS_OF_TASK)
        await self.batcher.submit(job, size, self.config.timeout_s)
        if job.error is not None:
            raise job.error
        counted.version = job.version
        return job

    async def find(self, owner: str, key: str, state_id: str) -> Kept:
        """Return the kept rows of a state. Raises `Refusal` for one of another task, too."""
        kept = await self.peers.find(owner, state_id)
        if kept.key != key:
            raise Refusal(422, "state_of_another_task", "the state is of another task than the one that names it")
        return kept

    def answered(self, route: str, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        """Return an endpoint that checks the token, counts the request, and turns errors into answers."""

        async def endpoint(request: Request) -> Response:
            start, counted = time.perf_counter(), Counted()
            try:
                response = await handler(request, self.access.owner(request), counted)
            except Refusal as refusal:
                response = _json(refusal.body, refusal.status, refusal.headers)
            except ClientDisconnect:
                response = _json(Refusal(400, "cut_off", "the request was cut off").body, 400)
            except Exception as error:
                self.metrics.note(f"a fault at {route}: {error!r}")
                response = _json(Refusal(500, "internal", "the server failed at this request: see its log").body, 500)
            seconds = time.perf_counter() - start
            self.metrics.finish(
                route,
                response.status_code,
                seconds,
                tasks=counted.tasks,
                rows=counted.rows,
                size=counted.size,
                version=counted.version,
            )
            return response

        return endpoint


def create_app(service: Service) -> FastAPI:
    """Return the service as an ASGI app."""
    app = FastAPI(
        title="gmeta",
        description="Adapts to a task's support rows and scores its candidates, with the encoding of the training.",
        lifespan=service.running,
    )
    name = service.config.name

    async def score(request: Request, owner: str, counted: Counted) -> Response:
        query, in_arrow = await _query(service, request, counted, scoring=True)
        job = await service.compute(Job(owner, query), counted)
        assert job.scores is not None
        if in_arrow:
            return _arrow({"score": job.scores}, job.version)
        scores, tasks, start = job.scores.tolist(), [], 0
        for key, rows in query.tasks:
            tasks.append({"key": key, "scores": scores[start : start + rows]})
            start += rows
        return _json({"version": job.version, "tasks": tasks})

    async def adapt(request: Request, owner: str, counted: Counted) -> Response:
        query, in_arrow = await _query(service, request, counted, scoring=False)
        job = await service.compute(Job(owner, query, keep=True), counted)
        keys = list(job.states)
        states, num_support = [job.states[key] for key in keys], [job.num_support[key] for key in keys]
        if in_arrow:
            return _arrow({"key": keys, "state": states, "num_support": num_support}, job.version)
        given = [key for key, _ in query.tasks]  # the tasks are in this order
        found = zip(given, states, num_support, strict=True)
        tasks = [{"key": key, "state": state, "num_support": count} for key, state, count in found]
        return _json({"version": job.version, "tasks": tasks})

    async def delete(request: Request, owner: str, _: Counted) -> Response:
        await service.peers.erase(owner, request.path_params["state_id"])
        return Response(status_code=204)

    async def model(_: Request, __: str, counted: Counted) -> Response:
        counted.version = service.versions.current.id
        return _json(_described(service))

    async def infer(request: Request, owner: str, counted: Counted) -> Response:
        _require_model(request, name)
        document = parse_json(await _body(service, request, counted, (JSON,)))
        query = query_of_infer(document, service.versions.current.columns, service.limits)
        job = await service.compute(Job(owner, query), counted)
        return _json(answer(name, job.version, document.get("id"), job.scores))

    async def describe(request: Request, _: str, counted: Counted) -> Response:
        _require_model(request, name)
        counted.version = service.versions.current.id
        return _json(metadata(name, service.versions.current))

    async def metrics(_: Request, __: str, ___: Counted) -> Response:
        return Response(page(await service.peers.families()), media_type="text/plain; version=0.0.4")

    async def live() -> Response:
        return _json({"live": True})

    async def ready() -> Response:
        return _json({"ready": not service.stopping}, 503 if service.stopping else 200)

    for method, path, handler, says in (
        (
            "POST",
            "/v1/score",
            score,
            "Score candidates of tasks, adapted to their support rows or by the ids of states.",
        ),
        ("POST", "/v1/adapt", adapt, "Adapt to support rows and keep them; returns ids of states."),
        ("DELETE", "/v1/states/{state_id}", delete, "Erase a state and its support rows."),
        ("GET", "/v1/model", model, "The version that serves, and the columns that it needs."),
        ("POST", "/v2/models/{model}/infer", infer, "Score, by the Open Inference Protocol."),
        ("GET", "/v2/models/{model}", describe, "Metadata, by the Open Inference Protocol."),
        ("GET", "/metrics", metrics, "Counters, for Prometheus."),
    ):
        endpoint = service.answered(f"{method} {path}", handler)
        app.add_api_route(
            path, endpoint, methods=[method], description=says, name=handler.__name__, response_model=None
        )
    app.add_api_route("/v2/health/live", live, methods=["GET"], response_model=None)
    app.add_api_route("/v2/health/ready", ready, methods=["GET"], response_model=None)
    return app


async def _query(service: Service, request: Request, counted: Counted, *, scoring: bool) -> tuple[Query, bool]:
    """Return what a request asks for, and whether it is in Arrow."""
    start = time.perf_counter()
    body = await _body(service, request, counted, (JSON, ARROW))
    middle = time.perf_counter()
    columns, in_arrow = service.versions.current.columns, _content_type(request) == ARROW
    if in_arrow:
        query = query_of_arrow(body, columns, service.limits, scoring=scoring)
    else:
        query = query_of_json(parse_json(body), columns, service.limits, scoring=scoring)
    service.metrics.observe("read", middle - start)
    service.metrics.observe("parse", time.perf_counter() - middle)
    return query, in_arrow


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def _body(service: Service, request: Request, counted: Counted, types: tuple[str, ...]) -> bytes:
    """Return a request's body. Raises `Refusal`: 415 for another type, 413 for one that is too large."""
    kind, most = _content_type(request), service.limits.body_bytes
    if kind not in types:  # which no page of another origin can send without asking first
        raise Refusal(415, "unsupported_type", f"the content type is {kind!r}: it must be {' or '.join(types)}")
    too_large = Refusal(413, "body_too_large", f"the body is larger than {most:,} bytes: send it in parts")
    declared = request.headers.get("content-length", "0")
    if not declared.isdecimal() or int(declared) > most:
        raise too_large
    parts: list[bytes] = []
    async for part in request.stream():
        counted.size += len(part)
        if counted.size > most:
            raise too_large
        parts.append(part)
    return b"".join(parts)


def _json(content: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(to_json(content), status, dict(headers or {}), JSON)


def _arrow(columns: Mapping[str, Any], version: str) -> Response:
    table = pa.table(dict(columns)).replace_schema_metadata({"version": version})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return Response(sink.getvalue().to_pybytes(), media_type=ARROW)


def _require_model(request: Request, name: str) -> None:
    if request.path_params["model"] != name:
        raise Refusal(404, "unknown_model", f"there is one model here: {name}")


def _described(service: Service) -> dict[str, Any]:
    version, limits = service.versions.current, service.limits
    manifest, columns = version.manifest, version.columns
    return {
        "version": version.id,
        "versions": service.versions.names,
        "parent": manifest.get("parent"),
        "step": manifest.get("step"),
        "day": manifest.get("day"),
        "interval": manifest.get("interval"),
        "model": manifest["model"]["name"],
        "task": columns.task,
        "support": list(columns.support),
        "candidates": list(columns.candidates),
        "time": columns.time,
        "limits": {
            "body_bytes": limits.body_bytes,
            "rows": limits.rows,
            "tasks": limits.tasks,
            "values": limits.values,
        },
    }


def open_source(config: ServeConfig) -> Source:
    """Return where the config's versions come from."""
    if config.bundle is not None:
        return FolderSource(Path(config.bundle))
    assert config.registry is not None
    return RegistrySource(config.registry, Path(config.cache_dir), config.pin)


def serve(config: ServeConfig) -> int:
    """Run `gmeta serve` until SIGTERM or Ctrl-C; requests that are being answered then are finished.

    ValueError says why it cannot begin.
    """
    if config.token_file is None and not is_loopback(config.host):
        raise ValueError(
            f"host is {config.host!r}, which others can reach: name a --token_file (made where there is none)"
        )
    tokens = [] if config.token_file is None else read_tokens(config.token_file)
    with contextlib.closing(listen(config.host, config.port)) as bound:
        if config.workers > 1:
            return run_workers(config, tokens, bound, _work)
        worker = Worker(config, tokens, secrets.token_bytes(32), 0, "", bound)
        _work(worker, lambda version: print(f"serves {version} on {url_of(bound)}", flush=True))
    return 0


def _work(worker: Worker, tell: Callable[[str], None]) -> None:
    """Serve as one of the workers."""
    torch.set_num_threads(1)  # a pass is many small products, which threads slow down
    sys.setswitchinterval(_SWITCH_S)
    config = worker.config
    service = Service(
        config,
        open_source(config),
        tokens=worker.tokens,
        secret=worker.secret,
        worker=worker.number,
        sockets=worker.folder,
    )
    tell(service.versions.current.id)
    run_app(create_app(service), worker.bound, graceful_s=max(1, round(config.timeout_s)))
