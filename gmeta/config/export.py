"""Settings of the commands that hand a model on: `gmeta export` and `gmeta export-states`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gmeta.core.errors import require, require_size


@dataclass(frozen=True, kw_only=True)
class ExportStatesConfig:
    """Adapt to the tasks of a support file, and write what each task has learned as a row of a Parquet file."""

    run_dir: str
    """Run directory made by `gmeta train`, or a bundle."""
    support: str
    """Labelled examples of the tasks, in raw ids, Parquet or CSV."""
    out: str
    """Parquet file to write: a row for each task."""
    format: Literal["vectors", "states"] = "states"
    """states: all that adaptation changed, which `gmeta.load(…).restore` reads back. vectors: the posterior mean of the
    task's last layer alone, one list of numbers, of models that solve for it (meta.adapt [last_layer])."""
    checkpoint: str = "best"
    """Checkpoint to load: best, last, or a step number."""
    memory_limit: str = "2GB"
    """Memory that DuckDB may use before it spills to disk beside `out`."""
    trust_model: bool = False
    """Import the code of a model that is not gmeta's own, as the run names it; without it such a run is refused."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where there is one."""

    def __post_init__(self) -> None:
        require(self.out.endswith(".parquet"), "out", self.out, "must end in .parquet")
        require_size("memory_limit", self.memory_limit)


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a model in a format that runs without gmeta: torch.export or ONNX."""

    run_dir: str
    """Run directory made by `gmeta train`, or a bundle."""
    out: str
    """Folder to make."""
    format: Literal["torch", "onnx"] = "torch"
    """torch: files .pt2 of torch.export. onnx: for onnxruntime and others; needs `pip install 'gmeta[export]'`."""
    score: bool = True
    """Write score-given-state too, which scores examples of tasks from what `gmeta export-states` wrote. Runs that
    adapt nothing, or by the reference engine, have only the unadapted model."""
    checkpoint: str = "best"
    """Checkpoint to take: best, last, or a step number."""
    trust_model: bool = False
    """Import the code of a model that is not gmeta's own, as the run names it; without it such a run is refused."""
