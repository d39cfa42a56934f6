"""Settings of the commands that use runs: `gmeta evaluate`, `gmeta compare`, `gmeta predict` and `gmeta report`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from gmeta.core.errors import require, require_numbers, require_seed, require_size


@dataclass(frozen=True, kw_only=True)
class FactorConfig:
    """Settings of the baseline factor-analysis."""

    num_factors: int = 12
    """Numbers in a task's vector."""
    num_iterations: int = 30
    """Iterations of EM."""
    loading_ridge: float = 40.0
    """Pseudo-rows that pull an item's loadings to the average item's."""
    mean_ridge: float = 1.0
    """Pseudo-rows that pull an item's mean to the average item's."""

    def __post_init__(self) -> None:
        require_numbers(self)
        require(self.num_factors >= 1, "num_factors", self.num_factors, "must be at least 1")
        require(self.num_iterations >= 1, "num_iterations", self.num_iterations, "must be at least 1")
        require(self.loading_ridge > 0, "loading_ridge", self.loading_ridge, "must be more than 0")
        require(self.mean_ridge > 0, "mean_ridge", self.mean_ridge, "must be more than 0")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Settings of the variant plain-finetuned."""

    steps: int
    """Steps of fine-tuning on the support."""
    inner_lr: float
    """Rate of fine-tuning."""
    adapt: list[str]
    """What a task adapts, as in meta.adapt."""
    inner_prior: float = 0.0
    """Pseudo-examples, as in meta.inner_prior."""

    def __post_init__(self) -> None:
        require_numbers(self)
        require(self.steps >= 1, "steps", self.steps, "must be at least 1")
        require(self.inner_lr >= 0, "inner_lr", self.inner_lr, "must not be negative")
        require(bool(self.adapt), "adapt", self.adapt, "must name what a task adapts")
        require(self.inner_prior >= 0, "inner_prior", self.inner_prior, "must not be negative")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measure a run before and after adaptation, by slice, beside baselines that need no network."""

    run_dir: str
    """Run directory made by `gmeta train`."""
    split: Literal["train", "valid", "test"] = "test"
    """Split of the pack to measure."""
    pack: str | None = None
    """Another task pack that was encoded as the run's own: a copy, or the same training rows with another query. The
    run's own when unset. Its evaluation is written beside the run's own, under the pack's name."""
    checkpoint: str = "best"
    """Checkpoint to load: best, last, or a step number."""
    steps: int | None = None
    """Inner steps; as trained when unset (the last step's rates are repeated beyond)."""
    inner_lr: float | None = None
    """Inner learning rate; as trained when unset."""
    support_sizes: list[int] | int | str | None = None
    """Numbers of support rows, such as 0,1,2,5,10,20: adds a learning curve, which measures every variant on the same
    query rows while it sees no more than the last so many support rows of each task. A size replaces
    loader.max_support_rows of the run."""
    out: str | None = None
    """Folder to write evaluation.json, predictions.parquet and report.html into; made where it is missing. The run
    directory when unset."""
    plain_run: str | None = None
    """A run of the same model trained on the same pack with `meta.adapt: []`: adds the variants plain and
    plain-finetuned, the latter with steps and rate tuned on the valid split."""
    truth: str | None = None
    """Directory made by `gmeta synth`: adds what its prior, posterior and oracle score, the frame of any model."""
    baselines: bool = True
    """Measure the baselines too."""
    relevant_label: float | None = None
    """Ratings of at least this are relevant, which precision, recall, hit rate, MAP and MRR at k need to know. Clicks
    need no such label."""
    candidates: Literal["domain", "all"] | None = None
    """The items that a target of a next-item run is ranked among: those of its domain or all; domain when unset."""
    exclude_history: bool | None = None
    """Leave the items of the history out of the ranking of a next-item run; true when unset."""
    baseline_settings: str | None = None
    """File baselines.json, made by `gmeta tune --baselines true` on this pack: the settings of factor-analysis, and of
    plain-finetuned where it was tuned."""
    resamples: int = 1000
    """Bootstrap resamples (over tasks) of the confidence intervals."""
    tasks_per_batch: int = 256
    """Tasks scored at a time, over all ranks."""
    seed: int = 0
    """Seed of the bootstrap, and of a next-item run's sampled candidates."""
    trust_model: bool = False
    """Import the code of a model that is not gmeta's own, as the run names it; without it such a run is refused."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where there is one."""
    timeout_s: int = 300
    """Seconds after which ranks give up on one that does not answer."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Return `support_sizes` as rising numbers, each once; ValueError where it is something else."""
        given = self.support_sizes
        rule = "must be numbers of rows, such as 0,1,2,5,10,20"
        words: Sequence[object] = [] if given is None else given.split(",") if isinstance(given, str) else [given]
        if isinstance(given, list):
            require(bool(given), "support_sizes", given, rule)
            words = given
        for word in words:
            require(str(word).strip().isdecimal(), "support_sizes", given, rule)
        return tuple(sorted({int(str(word)) for word in words}))

    def __post_init__(self) -> None:
        require_numbers(self)
        _ = self.sizes
        require(self.steps is None or self.steps >= 1, "steps", self.steps, "must be at least 1")
        require(self.inner_lr is None or self.inner_lr >= 0, "inner_lr", self.inner_lr, "must not be negative")
        unused = self.baseline_settings is not None and not self.baselines and self.plain_run is None
        require(not unused, "baseline_settings", self.baseline_settings, "has no effect without baselines or plain_run")
        require(self.resamples >= 1, "resamples", self.resamples, "must be at least 1")
        require(self.tasks_per_batch >= 1, "tasks_per_batch", self.tasks_per_batch, "must be at least 1")
        require(self.timeout_s >= 1, "timeout_s", self.timeout_s, "must be at least 1")
        require_seed(self.seed)


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Compare the stored predictions of runs on the same query rows, each with the first, paired over tasks."""

    runs: list[str] = field(default_factory=list)
    """Run directories that `gmeta evaluate` has measured, folders of its --out, or prediction files; named without a
    flag, the first is what the others are compared with. Of each the adapted model counts; of a run that adapts nothing
    the model."""
    out: str | None = None
    """Folder to write comparison.json and comparison.html into; made where it is missing. Nothing is written when
    unset."""
    relevant_label: float | None = None
    """Ratings of at least this are relevant, as in `gmeta evaluate`."""
    resamples: int = 1000
    """Bootstrap resamples (over tasks) of the confidence intervals."""
    seed: int = 0
    """Seed of the bootstrap."""

    def __post_init__(self) -> None:
        require_numbers(self)
        require(len(self.runs) >= 2, "runs", self.runs, "name at least two, such as `gmeta compare runs/a runs/b`")
        require(self.resamples >= 1, "resamples", self.resamples, "must be at least 1")
        require_seed(self.seed)


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Adapt to the tasks of a support file, score the rows of a query file (raw ids, Parquet or CSV)."""

    run_dir: str
    """Run directory made by `gmeta train`."""
    support: str
    """Labelled examples of the tasks; a task may have none."""
    query: str
    """Rows to score; needs no label column."""
    out: str
    """Parquet or CSV file to write: the query's rows with `score` and `score_before`."""
    before: bool = True
    """Score before adaptation too, as `score_before`; without it the command takes about half the time."""
    checkpoint: str = "best"
    """Checkpoint to load: best, last, or a step number."""
    tasks_per_batch: int = 256
    """Tasks scored at a time."""
    memory_limit: str = "2GB"
    """Memory that DuckDB may use before it spills to disk beside `out`."""
    trust_model: bool = False
    """Import the code of a model that is not gmeta's own, as the run names it; without it such a run is refused."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where there is one."""

    def __post_init__(self) -> None:
        require_numbers(self)
        require(self.tasks_per_batch >= 1, "tasks_per_batch", self.tasks_per_batch, "must be at least 1")
        require(self.out.endswith((".parquet", ".csv")), "out", self.out, "must end in .parquet or .csv")
        require_size("memory_limit", self.memory_limit)


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write report.html, one self-contained page, from a run directory."""

    run_dir: str
    """Run directory made by `gmeta train`."""
