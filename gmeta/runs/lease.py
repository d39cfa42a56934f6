"""A lease: one holder at a time, on whatever machine, of something that a registry's store has one of.

The holder renews it while it lives. That of a killed holder runs out after `LEASE_S`, on its own machine at once.
Clocks of machines that share a registry must agree to a fraction of that.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil

from gmeta.runs.store import Held, Store

LEASE_S = 60.0


@contextmanager
def hold_lease(store: Store, key: str, what: str, seconds: float = LEASE_S) -> Iterator[None]:
    """Hold the lease `key` of a store while the block runs. ValueError that names the holder where there is one."""
    token = secrets.token_hex(8)
    _take(store, key, what, token, seconds)
    ended = threading.Event()
    renewing = threading.Thread(
        target=_renew, args=(store, key, token, seconds, ended), name="gmeta-lease", daemon=True
    )
    renewing.start()
    try:
        yield
    finally:
        ended.set()
        renewing.join()
        if _terms_of(store.read(key)).get("token") == token:
            store.delete(key)


def _take(store: Store, key: str, what: str, token: str, seconds: float) -> None:
    data = _terms(token, seconds)
    if store.create(key, data):
        return
    held = store.read(key)
    holder = _terms_of(held)
    left = float(holder.get("until", 0.0)) - time.time()
    dead = holder.get("host") == socket.gethostname() and not psutil.pid_exists(int(holder.get("process", 0)))
    if (left <= 0 or dead) and (store.replace(key, data, held.tag) if held is not None else store.create(key, data)):
        return
    raise ValueError(
        f"{what} is running (process {holder.get('process')} on {holder.get('host')}): wait for it; if it was killed, "
        f"try again in {max(1, round(left))} s"
    )


def _renew(store: Store, key: str, token: str, seconds: float, ended: threading.Event) -> None:
    while not ended.wait(seconds / 3):
        try:
            held = store.read(key)
            if held is None or _terms_of(held).get("token") != token:
                return  # it ran out, and another took it: publishing compares the pointer
            store.replace(key, _terms(token, seconds), held.tag)
        except ValueError:
            continue  # the store may answer again before the lease runs out


def _terms_of(held: Held | None) -> dict[str, Any]:
    """Return what a lease says; nothing of one that is not there, or damaged."""
    try:
        found = {} if held is None else json.loads(held.data)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _terms(token: str, seconds: float) -> bytes:
    terms = {"token": token, "process": os.getpid(), "host": socket.gethostname(), "until": time.time() + seconds}
    return json.dumps(terms).encode()
