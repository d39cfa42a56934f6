"""The routes of `gmeta serve`: what is read of a request, and what its answer holds."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import pyarrow as pa
from fastapi import FastAPI, Request, Response
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Route

from gmeta.recommender.next_items import NextItems
from gmeta.serving.engine import ScoringJob
from gmeta.serving.infer import answer, metadata, named_scores, query_of_infer
from gmeta.serving.metrics import Counted, metrics_page
from gmeta.serving.recommend_requests import job_of_json
from gmeta.serving.refusal import Declined
from gmeta.serving.service import Service
from gmeta.serving.wire import Query, parse_json, query_of_arrow, query_of_json

JSON = "application/json"
ARROW = "application/vnd.apache.arrow.stream"

RouteHandler = Callable[[Request, str, Counted], Awaitable[Response]]
"""Answers a request of an owner, and tells what to count."""


def build_app(service: Service) -> FastAPI:
    """Return the service as an ASGI app."""
    app = FastAPI(
        title="gmeta",
        description="Adapts to a task's support rows and scores its candidates, with the encoding of the training.",
        lifespan=service.running,
    )
    routes = Routes(service)
    for method, path, handler, says in (
        ("POST", "/v1/score", routes.score, "Score candidates, adapted to support rows or by the ids of states."),
        ("POST", "/v1/adapt", routes.adapt, "Adapt to support rows and keep them; returns ids of states."),
        ("POST", "/v1/recommend", routes.recommend, "Find the items that come next in users' histories."),
        ("DELETE", "/v1/states/{state_id}", routes.delete, "Erase a state and its support rows."),
        ("GET", "/v1/model", routes.model, "The version that serves, and the columns that it needs."),
        ("POST", "/v2/models/{model}/infer", routes.infer, "Score, by the Open Inference Protocol."),
        ("GET", "/v2/models/{model}", routes.describe, "Metadata, by the Open Inference Protocol."),
        ("GET", "/metrics", routes.metrics, "Counters, for Prometheus."),
    ):
        endpoint = _answered(service, f"{method} {path}", handler)
        name = handler.__name__
        app.add_api_route(path, endpoint, methods=[method], description=says, name=name, response_model=None)
        # Requests go by plain routes, which come first; those of FastAPI tell its OpenAPI page of them. To look for
        # parameters in a request, which these handlers have none of, takes a fifth of the time of a cached score.
        app.router.routes.insert(0, Route(path, endpoint, methods=[method]))
    app.add_exception_handler(HTTPException, _no_route)
    app.add_api_route("/v2/health/live", routes.live, methods=["GET"], response_model=None)
    app.add_api_route("/v2/health/ready", routes.ready, methods=["GET"], response_model=None)
    return app


async def _no_route(request: Request, error: Exception) -> Response:
    """Answer a request that no route takes."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    if error.status_code == 405:
        refusal = Declined(405, "method_not_allowed", f"{path} takes no {request.method}: see /docs")
    elif error.status_code == 404:
        refusal = Declined(404, "not_found", f"there is nothing at {path}: see /docs")
    else:
        refusal = Declined(error.status_code, "bad_request", str(error.detail))
    return _json(refusal.body, refusal.status, error.headers)


def _answered(service: Service, route: str, handler: RouteHandler) -> Callable[[Request], Awaitable[Response]]:
    """Return an endpoint that checks the token, counts the request, and turns errors into answers."""

    async def endpoint(request: Request) -> Response:
        start, counted = time.perf_counter(), Counted()
        try:
            response = await handler(request, service.access.owner(request), counted)
        except Declined as refusal:
            response = _json(refusal.body, refusal.status, refusal.headers)
        except ClientDisconnect:
            response = _json(Declined(400, "cut_off", "the request was cut off").body, 400)
        except Exception as error:
            service.metrics.note(f"a fault at {route}: {error!r}")
            response = _json(Declined(500, "internal", "the server failed at this request: see its log").body, 500)
        service.metrics.finish(route, response.status_code, time.perf_counter() - start, counted)
        return response

    return endpoint


class Routes:
    """The handlers, on one service."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def score(self, request: Request, owner: str, counted: Counted) -> Response:
        """Score candidates."""
        query, in_arrow = await self._query(request, counted, scoring=True)
        job = await self._service.compute(ScoringJob(owner, query), counted)
        assert job.scores is not None
        labels = self._service.versions.current.columns.labels
        if in_arrow:
            return _arrow(named_scores(job.scores, labels), job.version)
        columns, tasks, start = [column.tolist() for column in named_scores(job.scores, labels).values()], [], 0
        for key, _, rows in query.tasks:
            found = [column[start : start + rows] for column in columns]
            tasks.append({"key": key, "scores": dict(zip(labels, found, strict=True)) if labels else found[0]})
            start += rows
        return _json({"version": job.version, "tasks": tasks})

    async def adapt(self, request: Request, owner: str, counted: Counted) -> Response:
        """Adapt to support rows, and keep them."""
        query, in_arrow = await self._query(request, counted, scoring=False)
        job = await self._service.compute(ScoringJob(owner, query, keep=True), counted)
        keys = list(job.states)
        states, num_support = [job.states[key] for key in keys], [job.num_support[key] for key in keys]
        if in_arrow:
            return _arrow({"key": keys, "state": states, "num_support": num_support}, job.version)
        given = [task.key for task in query.tasks]  # the tasks are in this order
        found = zip(given, states, num_support, strict=True)
        tasks = [{"key": key, "state": state, "num_support": count} for key, state, count in found]
        return _json({"version": job.version, "tasks": tasks})

    async def recommend(self, request: Request, _: str, counted: Counted) -> Response:
        """Recommend items to users by their events."""
        service = self._service
        model = service.versions.current.next_items
        document = parse_json(await self._body(request, counted, (JSON,)))
        job = await service.recommend(job_of_json(document, model, service.limits), counted)
        return _json({"version": job.version, "users": job.found})

    async def delete(self, request: Request, owner: str, _: Counted) -> Response:
        """Erase a state."""
        await self._service.peers.erase(owner, request.path_params["state_id"])
        return Response(status_code=204)

    async def model(self, _: Request, __: str, counted: Counted) -> Response:
        """Tell of the version that serves."""
        counted.version = self._service.versions.current.id
        return _json(_described(self._service))

    async def infer(self, request: Request, owner: str, counted: Counted) -> Response:
        """Score, by the Open Inference Protocol."""
        service = self._service
        self._require_model(request)
        document = parse_json(await self._body(request, counted, (JSON,)))
        query = query_of_infer(document, service.versions.current.columns, service.limits)
        job = await service.compute(ScoringJob(owner, query), counted)
        assert job.scores is not None
        scores = named_scores(job.scores, service.versions.current.columns.labels)
        return _json(answer(service.config.name, job.version, document.get("id"), scores))

    async def describe(self, request: Request, _: str, counted: Counted) -> Response:
        """Tell the model's metadata, by the Open Inference Protocol."""
        self._require_model(request)
        counted.version = self._service.versions.current.id
        return _json(metadata(self._service.config.name, self._service.versions.current))

    async def metrics(self, _: Request, __: str, ___: Counted) -> Response:
        """Tell what is counted."""
        return Response(metrics_page(await self._service.peers.families()), media_type="text/plain; version=0.0.4")

    async def live(self) -> Response:
        """Tell that the process lives."""
        return _json({"live": True})

    async def ready(self) -> Response:
        """Tell whether it takes requests."""
        stopping = self._service.stopping
        return _json({"ready": not stopping}, 503 if stopping else 200)

    def _require_model(self, request: Request) -> None:
        name = self._service.config.name
        if request.path_params["model"] != name:
            raise Declined(404, "unknown_model", f"there is one model here: {name}")

    async def _query(self, request: Request, counted: Counted, *, scoring: bool) -> tuple[Query, bool]:
        """Return what a request asks for, and whether it is in Arrow."""
        service, start = self._service, time.perf_counter()
        body = await self._body(request, counted, (JSON, ARROW))
        middle = time.perf_counter()
        columns, in_arrow = service.versions.current.columns, _content_type(request) == ARROW
        if in_arrow:
            query = query_of_arrow(body, columns, service.limits, scoring=scoring)
        else:
            query = query_of_json(parse_json(body), columns, service.limits, scoring=scoring)
        service.metrics.observe("read", middle - start)
        service.metrics.observe("parse", time.perf_counter() - middle)
        return query, in_arrow

    async def _body(self, request: Request, counted: Counted, types: tuple[str, ...]) -> bytes:
        """Return a request's body. Raises `Declined`: 415 for another type, 413 for one that is too large."""
        kind, most = _content_type(request), self._service.limits.body_bytes
        if kind not in types:  # which no page of another origin can send without asking first
            raise Declined(415, "unsupported_type", f"the content type is {kind!r}: it must be {' or '.join(types)}")
        if (coding := request.headers.get("content-encoding", "identity").lower()) != "identity":
            raise Declined(
                415, "unsupported_encoding", f"the body's content encoding is {coding!r}: send it uncompressed"
            )
        too_large = Declined(413, "body_too_large", f"the body is larger than {most:,} bytes: send it in parts")
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


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _json(content: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(to_json(content), status, dict(headers or {}), JSON)


def _arrow(columns: Mapping[str, Any], version: str) -> Response:
    table = pa.table(dict(columns)).replace_schema_metadata({"version": version})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return Response(sink.getvalue().to_pybytes(), media_type=ARROW)


def _described(service: Service) -> dict[str, Any]:
    version, limits = service.versions.current, service.limits
    manifest = version.manifest
    found = {
        "version": version.id,
        "versions": service.versions.names,
        "parent": manifest.get("parent"),
        "step": manifest.get("step"),
        "day": manifest.get("day"),
        "interval": manifest.get("interval"),
        "model": manifest["model"]["name"],
    }
    if isinstance(version.model, NextItems):
        sizes = {"body_bytes": limits.body_bytes, "users": limits.tasks, "events": limits.rows, "k": limits.values}
        return {
            **found,
            "items": version.model.num_items,
            "domains": version.model.domains,
            "event": ["item", "domain", *(["time"] if version.model.columns.time is not None else [])],
            "limits": sizes,
        }
    columns = version.columns
    return {
        **found,
        "task": columns.task,
        "support": list(columns.support),
        "candidates": list(columns.candidates),
        "time": columns.time,
        **({} if columns.weight is None else {"weight": columns.weight}),
        **({"labels": list(columns.labels)} if columns.labels else {}),
        "limits": {
            "body_bytes": limits.body_bytes,
            "rows": limits.rows,
            "tasks": limits.tasks,
            "values": limits.values,
        },
    }
