"""`gmeta coordinate`: the coordinator as an HTTP service. All requests run on one event loop, so nothing needs a lock.

It needs the packages of `gmeta[serve]`, which are imported here alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import math
import secrets
import signal
import socket
import sys
from collections.abc import AsyncIterator
from functools import lru_cache
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

from gmeta.elastic.connections import BACKLOG, Guard, most_connections, speak_seldom
from gmeta.elastic.controller import Limits
from gmeta.elastic.coordinator import MESSAGES, Conflict, Coordinator
from gmeta.elastic.journal import Journal, Unwritable
from gmeta.elastic.messages import BadMessage
from gmeta.elastic.policies import load_policy
from gmeta.elastic.tokens import make_token
from gmeta.elastic.trace import Trace
from gmeta.elastic.view import state

try:
    import uvicorn
    from fastapi import FastAPI, Request, Response
    from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
    from starlette.requests import ClientDisconnect

    from gmeta.elastic.exposition import Exposition
except ImportError as error:
    raise ValueError(
        f"gmeta coordinate needs packages that are not here ({error}): "
        "pip install 'gmeta[serve]', or '.[serve]' in a clone"
    ) from error

MOST_BYTES = 16 * 2**20
"""The largest message. The longest is a trainer's `begin`, with the ledger of its checkpoint."""
_TICK_S = 0.05


def create_app(coordinator: Coordinator, token: str | None) -> FastAPI:
    """Return the service over a coordinator. With a token, every request but the page's needs it.

    Without one only this machine can connect, but any web page that is open on it can have its browser do so. Then
    requests must name this machine, and come from no other page.
    """
    metrics = Exposition(coordinator)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        ticking = asyncio.create_task(_tick(coordinator))
        yield
        ticking.cancel()
        coordinator.close()

    app = FastAPI(title="gmeta coordinator", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    def barred(request: Request) -> Response | None:
        if token is None and not is_local(request):
            metrics.errors[403] += 1
            return _error(403, "without a token, Host and Origin must be of this machine: use http://127.0.0.1:PORT")
        if token is None or _authorized(request, token):
            return None
        metrics.errors[401] += 1
        return _error(401, "the token is missing or wrong: use the token file that the coordinator was started with")

    @app.post("/v1/{name}")
    async def post(name: str, request: Request) -> Response:
        if (refusal := barred(request)) is not None:
            return refusal
        response = await _answer(coordinator, name, request)
        metrics.count(name if name in MESSAGES else "unknown", response.status_code)
        return response

    @app.get("/v1/state")
    async def get_state(request: Request) -> Response:
        return barred(request) or _reply(state(coordinator))

    @app.get("/v1/journal")
    async def get_journal(request: Request, after: int = 0, limit: int = 1000) -> Response:
        rows = max(0, min(limit, 10_000))
        return barred(request) or JSONResponse({"records": coordinator.journal.rows(max(0, min(after, 2**62)), rows)})

    @app.get("/metrics")
    async def get_metrics(request: Request) -> Response:
        return barred(request) or PlainTextResponse(metrics.text(), media_type=metrics.media_type)

    @app.get("/")
    async def page() -> HTMLResponse:
        return HTMLResponse(files("gmeta.elastic").joinpath("page.html").read_text(encoding="utf-8"))

    return app


async def _tick(coordinator: Coordinator) -> None:
    while True:
        try:
            coordinator.tick()
        except Exception as error:  # shown on the page; without ticks leases would never run out
            coordinator.note(f"a fault of the coordinator's own: {error!r}")
        await asyncio.sleep(_TICK_S)


def is_local(request: Request) -> bool:
    """Whether a request names this machine by itself, not by a name that anyone can point to it, and is from no page of
    another origin.
    """
    host, origin = request.headers.get("host", ""), request.headers.get("origin")
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    return is_loopback(name) and (origin is None or origin == f"http://{host}")


def _reply(content: Any) -> Response:
    """Return JSON. What is not finite, such as a speed after absurd reports, becomes null."""
    try:
        return JSONResponse(content)
    except ValueError:
        return JSONResponse(_finite(content))


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _authorized(request: Request, token: str) -> bool:
    given = request.headers.get("authorization", "")
    return secrets.compare_digest(given.encode(), f"Bearer {token}".encode())


async def _answer(coordinator: Coordinator, name: str, request: Request) -> Response:
    if name not in MESSAGES:
        return _error(404, f"there is no message {name!r}: it is one of {', '.join(MESSAGES)}")
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # which no page of another origin can send without asking first
        return _error(415, f"the content type is {kind!r}: must be application/json")
    try:
        body = await _body(request)
    except ClientDisconnect:  # a worker that was killed amid its message
        return _error(400, "the message was cut off")
    if body is None:
        return _error(413, f"the message is larger than {MOST_BYTES} bytes: send fewer work items or steps at a time")
    try:
        message = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        return _error(400, f"the message is no JSON ({error})")
    try:
        return JSONResponse(coordinator.handle(name, message))
    except BadMessage as error:
        return _error(400, str(error))
    except Conflict as error:
        return _error(409, str(error), error.stale, error.lost)
    except Unwritable as error:
        return _error(503, str(error))


async def _body(request: Request) -> bytes | None:
    """Return the request's body; None where it is too large. It is read to its end all the same, or the sender would
    see no answer.
    """
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > 8 * MOST_BYTES:
            return None
        if size <= MOST_BYTES:
            parts.append(part)
    return b"".join(parts) if size <= MOST_BYTES else None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _error(status: int, text: str, stale: bool = False, lost: list[list[int]] | None = None) -> JSONResponse:
    return JSONResponse({"error": text, "stale": stale, "lost": lost or []}, status)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that accepts connections; port 0 takes any free one. ValueError says that the address cannot be
    had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(1024)
    except OSError as error:
        raise ValueError(f"cannot listen on {host}:{port} ({error.strerror}): name another --host or --port") from error
    return bound


@lru_cache(maxsize=256)
def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to a host name."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def coordinate(
    *,
    journal: str,
    host: str,
    port: int,
    token_file: str | None,
    policy: str,
    durable: bool,
    trace: str | None,
    max_restarts: int,
    cooldown_s: float,
) -> None:
    """Run the command. ValueError says why it cannot begin."""
    if token_file is None and not is_loopback(host):
        raise ValueError(f"host is {host!r}, which others can reach: name a --token_file (created where there is none)")
    decide = load_policy(policy)
    token = make_token(token_file) if token_file is not None else None
    bound = listen(host, port)
    with contextlib.closing(bound):
        limits = Limits(max_restarts=max_restarts, cooldown_s=cooldown_s)
        kept = Trace(trace, _log) if trace is not None else None
        serve(Coordinator(Journal(journal, durable), decide, limits=limits, trace=kept, log=_log), bound, token)


def _log(line: str) -> None:
    print(f"gmeta coordinate: {line}", file=sys.stderr, flush=True)


def _guard(config: uvicorn.Config, guard: Guard) -> None:
    """Ask `guard` before uvicorn makes a connection."""
    config.load()
    made: Any = config.http_protocol_class

    def admitted(**values: Any) -> asyncio.Protocol:
        guard.admit()
        protocol: asyncio.Protocol = made(**values)
        return protocol

    config.http_protocol_class = admitted  # type: ignore[assignment]


def serve(coordinator: Coordinator, bound: socket.socket, token: str | None) -> None:
    """Serve until SIGTERM or Ctrl-C."""
    print(f"listening on {url_of(bound)}", flush=True)
    run_app(create_app(coordinator, token), bound)


def url_of(bound: socket.socket) -> str:
    """Return where a listening socket is reached."""
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def run_app(app: FastAPI, bound: socket.socket, *, graceful_s: int = 5) -> None:
    """Serve an app until SIGTERM or Ctrl-C, within the descriptors that there are.

    Requests that are being answered then have `graceful_s` seconds.
    """
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,  # a client spends most of its time on parsing headers
        date_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=graceful_s,
        backlog=BACKLOG,
        timeout_notify=1,
        callback_notify=lambda: sweep(),
    )
    server = uvicorn.Server(config)
    guard = Guard(server.server_state.connections, most_connections())

    async def sweep() -> None:
        guard.sweep()

    _guard(config, guard)
    speak_seldom()
    # uvicorn ends in good order at a signal, and then raises it again, for whoever had it before.
    previous = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run(sockets=[bound])
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
