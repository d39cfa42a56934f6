"""Settings of `gmeta serve`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gmeta.core.errors import require, require_numbers


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Answer over HTTP: adapt to a task's support rows, score its candidates, and follow new versions of the model."""

    bundle: str | None = None
    """Bundle to serve, a folder or a link to one; a new one in its place is taken up. Either this or `registry`."""
    registry: str | None = None
    """Registry to follow: a folder or an object store's prefix. Its current version is served."""
    pin: int | None = None
    """Version of the registry to serve whatever is current."""
    shadow: str | None = None
    """Bundle that scores the same requests after they are answered; how far its scores are off is a metric."""
    cache_dir: str = "serve-cache"
    """Folder for versions that a registry gives."""
    name: str = "gmeta"
    """The model's name in /v2/models/NAME."""
    host: str = "127.0.0.1"
    """Address to listen on. Any but this machine's own needs `token_file`."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    workers: int = 1
    """Processes. They share the port, and the memory of the tables."""
    token_file: str | None = None
    """File of mode 600 with one token a line, of which a request names one (Authorization: Bearer TOKEN). A file that
    is missing is made, with a token."""
    trust_model: bool = False
    """Import the code of a model that is not gmeta's own, as the bundle names it. Later versions must name the very
    same code."""
    poll_s: float = 2.0
    """Seconds between looks for a new version."""
    batch_wait_ms: float = 0.0
    """Milliseconds that a request waits for others to share its pass. While one pass runs, requests gather anyway."""
    batch_tasks: int = 64
    """Tasks in one pass."""
    max_queue: int = 1024
    """Requests that may wait; beyond, the answer is 503."""
    timeout_s: float = 10.0
    """Seconds after which a request that was not computed is answered with 504."""
    state_mb: int = 256
    """Memory of a worker for adapted states and kept support rows, in MiB."""
    state_ttl_s: float = 3600.0
    """Seconds after which a state is forgotten."""
    max_body_mb: int = 16
    """Largest body of a request, and largest content of an Arrow body when it is decompressed, in MiB."""
    max_rows: int = 20_000
    """Most support and candidate rows of a request."""
    max_tasks: int = 256
    """Most tasks of a request."""
    max_list: int = 1000
    """Most values of a many-valued feature in one row."""
    max_new_texts: int = 1024
    """Most texts of a pass that the version was made without, and encodes then; a request with more is answered 413."""
    access_log: bool = True
    """Write one JSON line a request to standard error. It holds no task, no address and no value."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where there is one."""

    def __post_init__(self) -> None:
        require_numbers(self)
        if (self.bundle is None) == (self.registry is None):
            raise ValueError("serve needs --bundle FOLDER or --registry URL: give one of them")
        require(
            self.pin is None or self.registry is not None, "pin", self.pin, "is a version of a --registry: give one"
        )
        require(0 <= self.port < 2**16, "port", self.port, "must be in [0, 65535]")
        for key in (
            "workers",
            "batch_tasks",
            "max_queue",
            "state_mb",
            "max_body_mb",
            "max_rows",
            "max_tasks",
            "max_list",
            "max_new_texts",
        ):
            require(getattr(self, key) >= 1, key, getattr(self, key), "must be at least 1")
        require(self.workers <= 255, "workers", self.workers, "must be at most 255")
        for key in ("poll_s", "timeout_s", "state_ttl_s"):
            require(getattr(self, key) > 0, key, getattr(self, key), "must be more than 0")
        require(0 <= self.batch_wait_ms <= 100, "batch_wait_ms", self.batch_wait_ms, "must be in [0, 100]")
