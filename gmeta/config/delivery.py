"""Settings of the commands that deliver models: `gmeta bundle` and `gmeta gate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gmeta.core.errors import require, require_numbers, require_seed


@dataclass(frozen=True, kw_only=True)
class BundleConfig:
    """Make one version of a model, in files that need nothing else: to serve, to deliver, to grow."""

    run_dir: str
    """Run directory made by `gmeta train`."""
    out: str
    """Folder to make."""
    checkpoint: str = "best"
    """Checkpoint to take: best, last, or a step number."""
    training: bool = True
    """Add the optimizer's moments and the position of the training, which a warm start goes on with. Serving needs
    neither, and never opens them."""
    rows: Literal["exact", "fp16", "int8"] = "exact"
    """How rows of embedding tables are stored: exact as trained, or rounded for serving alone, in half the bytes (fp16)
    or about a quarter (int8, with a scale for each row). They are turned back when they are read; needs training false.
    """
    trust_model: bool = False
    """Import the code of a model that is not gmeta's own, as the run names it; without it such a run is refused."""

    def __post_init__(self) -> None:
        exact = self.rows == "exact" or not self.training
        require(exact, "rows", self.rows, "a training goes on with exact rows alone: say --training false")


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """Judge whether a candidate may serve in place of the current version, on held-out tasks of the newest day."""

    candidate: str
    """Bundle or run directory that would serve."""
    current: str
    """Bundle or run directory that serves now."""
    pack: str
    """Task pack of the newest day. Its test tasks are scored, or its valid ones where it has no others."""
    out: str
    """Folder to write verdict.json and verdict.html into; made where it is missing."""
    rules: str | None = None
    """YAML file with the rules; those that this help ends with when unset."""
    previous_pack: str | None = None
    """Task pack of a day before, which was sound. What the current version scored there shows whether the newest day's
    data are. Unset: what its manifest, or its run directory, recorded."""
    resamples: int = 1000
    """Bootstrap resamples (over tasks) of the confidence intervals."""
    tasks_per_batch: int = 256
    """Tasks scored at a time, over all ranks."""
    seed: int = 0
    """Seed of the bootstrap."""
    trust_model: bool = False
    """Import the code of models that are not gmeta's own, as the versions name it; without it such are refused."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where there is one."""
    timeout_s: int = 300
    """Seconds after which ranks give up on one that does not answer."""

    def __post_init__(self) -> None:
        require_numbers(self)
        require(self.resamples >= 1, "resamples", self.resamples, "must be at least 1")
        require(self.tasks_per_batch >= 1, "tasks_per_batch", self.tasks_per_batch, "must be at least 1")
        require(self.timeout_s >= 1, "timeout_s", self.timeout_s, "must be at least 1")
        require_seed(self.seed)
