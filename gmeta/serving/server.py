"""`gmeta serve`: the command. It needs the packages of `gmeta[serve]`."""

from __future__ import annotations

import contextlib
import secrets
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from gmeta.config.serving import ServeConfig
from gmeta.runs.registry import open_registry

try:
    from gmeta.elastic.service import is_loopback, listen, run_app, url_of
    from gmeta.serving.access import read_tokens
    from gmeta.serving.routes import build_app
    from gmeta.serving.service import Service
    from gmeta.serving.versions import FolderSource, RegistrySource, Source
    from gmeta.serving.workers import ServerWorker, run_workers
except ImportError as error:
    raise ValueError(
        f"gmeta serve needs packages that are not here ({error}): pip install 'gmeta[serve]', or '.[serve]' in a clone"
    ) from error

_SWITCH_S = 0.00005
"""While a new version is loaded, by a thread of its own, each small operation of a pass may wait so long for Python's
lock; the default is 5 ms."""


def open_source(config: ServeConfig) -> Source:
    """Return where the config's versions come from."""
    if config.bundle is not None:
        return FolderSource(Path(config.bundle))
    assert config.registry is not None
    registry = open_registry(config.registry)
    return RegistrySource(registry, Path(config.cache_dir), config.pin)


def run_serve(config: ServeConfig) -> int:
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
        worker = ServerWorker(config, tokens, secrets.token_bytes(32), 0, "", bound)
        _work(worker, lambda version: print(f"serves {version} on {url_of(bound)}", flush=True))
    return 0


def _work(worker: ServerWorker, tell: Callable[[str], None]) -> None:
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
    run_app(build_app(service), worker.bound, graceful_s=max(1, round(config.timeout_s)))
