"""Settings of the commands that deliver models: `gmeta bundle`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gmeta.core.errors import require


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
