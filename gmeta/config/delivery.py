"""Settings of the commands that deliver models: `gmeta bundle`."""

from __future__ import annotations

from dataclasses import dataclass


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
    trust_model: bool = False
    """Import the code of a model that is not gmeta's own, as the run names it; without it such a run is refused."""
