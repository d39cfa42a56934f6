"""The configuration of every command: frozen dataclasses that check themselves.

Values come from YAML (`--config`) and dotted overrides (`--meta.inner_lr 0.05`). A value out of range
is a ValueError of one form: `section.key is VALUE: what it must be`.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import Literal

LossName = Literal["bce", "mse", "l1", "huber"]
METRICS = ("auc", "gauc", "logloss", "mae", "rmse", "loss")
"""Metrics that early stopping may watch, all measured after adaptation."""
CLICK_METRICS = ("auc", "gauc", "logloss")
"""Those that need 0/1 labels and probabilities."""


def require(ok: bool, key: str, value: object, rule: str) -> None:
    """ValueError unless `ok`: what was found, and what it must be."""
    if not ok:
        raise ValueError(f"{key} is {value!r}: {rule}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model: which file of gmeta/models, and its sizes."""

    name: str = "melu"
    """Model to train: melu, dlrm or taste (one file each under gmeta/models)."""
    features: list[str] = field(default_factory=list)
    """Categorical features to use; empty means all in the pack."""
    task_features: list[str] = field(default_factory=list)
    """Those of them that describe the task (such as a user's age), for taste; all others describe the item."""
    numeric: bool = True
    """Use the pack's numeric columns."""
    embedding_dim: int = 16
    """Width of every embedding row."""
    hidden: list[int] = field(default_factory=lambda: [64, 64])
    """Widths of the hidden layers on top of the embeddings."""
    bottom: list[int] = field(default_factory=lambda: [64])
    """Widths of dlrm's network over numeric columns, or of taste's over items; the embedding dimension is appended."""
    layer_norm: bool = False
    """Layer norm after each hidden layer (melu, dlrm)."""
    dropout: float = 0.0
    """Dropout after each hidden layer (taste: on the item's embeddings), seeded per (seed, step, task)."""

    def __post_init__(self) -> None:
        require(self.embedding_dim > 0, "model.embedding_dim", self.embedding_dim, "must be at least 1")
        require(all(w > 0 for w in self.hidden), "model.hidden", self.hidden, "widths must be at least 1")
        require(all(w > 0 for w in self.bottom), "model.bottom", self.bottom, "widths must be at least 1")
        require(0 <= self.dropout < 1, "model.dropout", self.dropout, "must be in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class MetaConfig:
    """The inner loop. `adapt: []` is plain training on support and query together."""

    adapt: list[str] = field(default_factory=lambda: ["embeddings", "dense"])
    """What a task adapts: embeddings, dense, head, decision, or globs of parameter names
    (embeddings.item_id, layers.0.*). Empty: plain training."""
    order: Literal["first", "second"] = "second"
    """second differentiates through the inner loop (exact MAML); first does not."""
    inner_steps: int = 1
    """SGD steps on the support."""
    inner_lr: float = 0.1
    """Inner learning rate (its start, when learned)."""
    learn_inner_lr: bool = False
    """Learn one inner rate per adapted layer and step."""
    inner_loss: LossName | None = None
    """Loss of the inner loop; the training loss when unset."""
    inner_prior: float = 0.0
    """Pseudo-rows: the inner loss is the sum of a task's support losses / (rows + inner_prior), so that small
    supports move less."""
    recompute: bool = False
    """Build each inner step's graph again in the backward pass: slower, and less memory a step where the model has
    layer norm, dropout or feature interactions (factored engine, second order; same numbers)."""
    modulation: Literal["none", "cluster", "film"] = "none"
    """Let the support decide where the inner loop starts: cluster gates every unit of the linear layers (CBML),
    film scales and shifts them (MMAML)."""
    modulation_dim: int = 16
    """Width of the vector that modulation makes of a support set."""
    clusters: int = 8
    """Learned clusters of tasks, for modulation cluster."""
    engine: Literal["auto", "factored", "reference"] = "auto"
    """auto takes the factored engine where it can and says so where it cannot."""

    def __post_init__(self) -> None:
        require(self.inner_steps >= 1, "meta.inner_steps", self.inner_steps, "must be at least 1")
        require(self.inner_lr >= 0, "meta.inner_lr", self.inner_lr, "must not be negative")
        require(self.inner_prior >= 0, "meta.inner_prior", self.inner_prior, "must not be negative")
        require(
            not self.recompute or (self.engine != "reference" and self.order == "second"),
            "meta.recompute",
            self.recompute,
            "only the factored engine's second order keeps graphs of inner steps; leave it out",
        )
        require(self.modulation_dim >= 1, "meta.modulation_dim", self.modulation_dim, "must be at least 1")
        require(self.clusters >= 1, "meta.clusters", self.clusters, "must be at least 1")
        require(
            self.modulation == "none" or bool(self.adapt),
            "meta.modulation",
            self.modulation,
            "it sets where the inner loop starts, and meta.adapt [] has none; use none, or name what tasks adapt",
        )


@dataclass(frozen=True, kw_only=True)
class EmbeddingConfig:
    """Sharded embedding tables and their row-wise optimizer."""

    optimizer: Literal["sgd", "rowwise_adagrad", "adam"] = "rowwise_adagrad"
    """Row optimizer; only rows that took part in a step change."""
    lr: float = 0.05
    """Learning rate of embedding rows."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the rows that took part in a step."""
    init_std: float = 0.05
    """Standard deviation of the initial rows."""

    def __post_init__(self) -> None:
        require(self.lr >= 0, "embedding.lr", self.lr, "must not be negative")
        require(self.weight_decay >= 0, "embedding.weight_decay", self.weight_decay, "must not be negative")
        require(self.init_std >= 0, "embedding.init_std", self.init_std, "must not be negative")


@dataclass(frozen=True, kw_only=True)
class DenseConfig:
    """AdamW for dense layers and learned inner rates, and the schedule of all learning rates."""

    lr: float = 1e-3
    """Peak learning rate of dense layers."""
    inner_lr_lr: float = 1e-3
    """Learning rate of learned inner rates."""
    weight_decay: float = 0.0
    """AdamW weight decay (not applied to biases, norms and inner rates)."""
    clip_norm: float = 0.0
    """Clip gradients to this global norm, over all ranks, dense and rows together; 0 is off."""
    warmup_steps: int = 0
    """Linear warm-up of every learning rate (dense and embedding)."""
    decay: Literal["none", "linear", "cosine"] = "none"
    """Decay of every learning rate to zero at the last step."""
    placement: str = "NNN"
    """How parameters, gradients and optimizer state lie (PaRO): each N, on every rank, I, sharded inside groups, or G,
    sharded over all; or auto. NNN is fastest where it fits; `gmeta plan` tells what else costs."""
    group_size: int = 0
    """Ranks of a group; 0: those of one machine."""
    memory_gb: float | None = None
    """With placement auto: GB a rank between steps for dense parameters, gradients and optimizer state (in a step
    parameters are whole). Without it: on CUDA half of what is free, on CPU all that it takes."""

    def __post_init__(self) -> None:
        require(self.lr >= 0, "dense.lr", self.lr, "must not be negative")
        require(self.inner_lr_lr >= 0, "dense.inner_lr_lr", self.inner_lr_lr, "must not be negative")
        require(self.weight_decay >= 0, "dense.weight_decay", self.weight_decay, "must not be negative")
        require(self.clip_norm >= 0, "dense.clip_norm", self.clip_norm, "must not be negative")
        require(self.warmup_steps >= 0, "dense.warmup_steps", self.warmup_steps, "must not be negative")
        require(self.group_size >= 0, "dense.group_size", self.group_size, "must not be negative")
        require(self.memory_gb is None or self.memory_gb > 0, "dense.memory_gb", self.memory_gb, "must be more than 0")


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How tasks are ordered and batched. The order is a function of the seed, never of the world size."""

    tasks_per_batch: int = 64
    """Tasks of one global batch, over all ranks (G)."""
    window_batches: int = 64
    """Batches per shuffle window: larger mixes better, smaller reads closer to sequentially."""
    sequential: bool = True
    """Fill windows with blocks of consecutive tasks. Off, for comparison: with tasks from anywhere in the pack."""
    size_buckets: bool = True
    """Put tasks of similar size into one batch. Off, for comparison: any of the window, so padding grows."""
    prefetch: int = 2
    """Batches prepared ahead in a background thread; 0 is off."""
    ahead: Literal["none", "index", "ids"] = "ids"
    """What the background thread does with a batch besides reading it: nothing, the uniques and other index work,
    or the exchange of ids between workers as well. What it does not do ahead, the step does."""
    resample: bool = False
    """Redraw each training task's support/query cut every epoch, at random with the stored sizes."""

    def __post_init__(self) -> None:
        require(self.tasks_per_batch >= 1, "loader.tasks_per_batch", self.tasks_per_batch, "must be at least 1")
        require(self.window_batches >= 1, "loader.window_batches", self.window_batches, "must be at least 1")
        require(self.prefetch >= 0, "loader.prefetch", self.prefetch, "must not be negative")


@dataclass(frozen=True, kw_only=True)
class CommConfig:
    """How rows and gradients travel between workers. The defaults are the fast ones; the others are for the study."""

    fetch: Literal["fused", "separate"] = "fused"
    """Support and query rows in one AlltoAll, or in one each; the gradients likewise."""
    dedup: bool = True
    """Ask for each row once, or once for every lookup."""
    dense: Literal["all_reduce", "gather"] = "all_reduce"
    """Dense gradients: AllReduce, or gather to rank 0, sum there and broadcast (the central outer rule)."""
    overlap: bool = True
    """Run the AllReduce of dense gradients during backward and under the AlltoAll of row gradients; off: after each
    other."""
    wire: Literal["float32", "bf16", "fp16"] = "float32"
    """Type of rows and row gradients on the way; float32 leaves them as the table holds them. Gradients are summed
    in the table's own type."""
    node_size: int = 0
    """Workers of one node, for a two-level AlltoAll (inside nodes, then between them); 0 is one level."""

    def __post_init__(self) -> None:
        require(self.node_size >= 0, "comm.node_size", self.node_size, "must not be negative")


@dataclass(frozen=True, kw_only=True)
class ElasticConfig:
    """Straggler mitigation and restarts: who computes how much of a batch follows measured speeds, never what a batch
    is; and a worker that dies costs the steps since the last checkpoint (docs/elastic.md)."""

    enabled: bool = False
    """Report to a coordinator and follow it."""
    url: str | None = None
    """The coordinator (`gmeta coordinate`), such as http://host:8470; unset: `--nproc` starts one of its own."""
    token_file: str | None = None
    """File that holds the coordinator's token."""
    policy: str = "nd"
    """Policy of the coordinator that `--nproc` starts: nd, dd, lb_bsp, backup, static, or your own, module:function."""
    report_s: float = 0.1
    """Seconds between two reports of a worker."""
    patience_s: float = 120.0
    """Seconds that training waits for a coordinator which is away."""
    max_restarts: int = 3
    """Restarts of the group (`--nproc`) without a new checkpoint in between, after which the run ends."""
    trace: bool = False
    """Have the coordinator that `--nproc` starts record all reports and decisions in coordinator.jsonl (large)."""
    device_class: str = ""
    """Class of this worker's device, for policy dd; unset: the device's name."""
    max_slots: int = 0
    """Tasks of one micro-batch that fit this worker's memory, for policy dd; 0: any number."""

    def __post_init__(self) -> None:
        require(self.report_s > 0, "elastic.report_s", self.report_s, "must be more than 0 seconds")
        require(self.patience_s > 0, "elastic.patience_s", self.patience_s, "must be more than 0 seconds")
        require(self.max_restarts >= 0, "elastic.max_restarts", self.max_restarts, "must not be negative")
        require(self.max_slots >= 0, "elastic.max_slots", self.max_slots, "must not be negative")
        url = self.url
        require(
            url is None or url.startswith(("http://", "https://")),
            "elastic.url",
            url,
            "must begin with http:// or https://",
        )


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """When training validates, saves and ends."""

    epochs: int = 10
    """Passes over the training tasks."""
    max_steps: int = 0
    """Stop after this many steps; 0 means epochs decide."""
    eval_every: int = 0
    """Validate every n steps; 0 means once an epoch."""
    metric: str = "loss"
    """Validation metric of early stopping and of the best checkpoint: auc, gauc, logloss, mae, rmse, loss."""
    patience: int = 0
    """Stop after this many validations without a better metric; 0 is off."""
    checkpoint_every: int = 0
    """Save every n steps; 0 means at each validation."""
    keep_last: int = 2
    """Checkpoints kept besides the best."""

    def __post_init__(self) -> None:
        for key in ("max_steps", "eval_every", "patience", "checkpoint_every"):
            require(getattr(self, key) >= 0, f"schedule.{key}", getattr(self, key), "must not be negative")
        require(self.epochs >= 1, "schedule.epochs", self.epochs, "must be at least 1")
        require(self.keep_last >= 1, "schedule.keep_last", self.keep_last, "must be at least 1")
        require(self.metric in METRICS, "schedule.metric", self.metric, f"must be one of {', '.join(METRICS)}")


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Turn raw ratings or click logs into a task pack. Settings left unset take the named data set's own value."""

    out: str
    """Task pack directory to create."""
    input: list[str] | str = field(default_factory=list)
    """Parquet or CSV file, glob or directory, or a list of them: [a.csv, logs/]."""
    schema: str | None = None
    """YAML file that says what the columns of `input` mean (docs/data.md)."""
    dataset: str | None = None
    """Named data set, in place of `input` and `schema`: ml-100k, ml-1m or ml-1m-melu."""
    root: str | None = None
    """Directory that holds the named data set's files."""
    label_threshold: float | None = None
    """Labels of at least this become 1, others 0; unset: the schema's, or labels as they are."""
    split_query: Literal["last", "random"] | None = None
    """Query rows of a task: its last by time, or random ones. Unset: last where the schema names a time."""
    query_size: int | None = None
    """Query rows of a task (10 when unset); tasks without a row left for the support are left out and counted."""
    query_ratio: float | None = None
    """Share of a task's rows that are query, in place of query_size."""
    min_task_rows: int | None = None
    """Smaller tasks are left out and counted (2 when unset)."""
    max_task_rows: int | None = None
    """Larger tasks are left out and counted; unset: no limit."""
    task_split: Literal["user", "time", "column"] | None = None
    """Who is train, valid and test: random tasks, tasks by their first time, or the schema's partition column.
    Unset: column where the schema names a partition, else user."""
    partitions: dict[str, str] = field(default_factory=dict)
    """Partition value to split, for task_split column; other values are left out and counted.
    Unset: train, valid and test are called so."""
    valid_fraction: float | None = None
    """Share of the tasks (with task_split column: of the training users) held out as valid; 0.1 when unset
    and no partition is called valid."""
    test_fraction: float | None = None
    """Share of the tasks held out as test; 0.1 when unset. Not for task_split column."""
    on_bad_rows: Literal["fail", "quarantine"] = "fail"
    """Rows that cannot be used stop the command, or go to rejects.parquet in the pack with their reason."""
    memory_limit: str = "2GB"
    """Memory that DuckDB may use before it spills to disk beside `out`."""
    threads: int = 0
    """DuckDB threads; 0 is one a core. The pack does not depend on it."""
    shard_mb: int = 128
    """Size of a shard in megabytes; one is encoded while the one before is saved."""
    seed: int = 0
    """Seed of random splits and of the stored order."""

    @property
    def inputs(self) -> list[str]:
        """`input` as a list."""
        return [self.input] if isinstance(self.input, str) else self.input

    def __post_init__(self) -> None:
        require(self.query_size is None or self.query_size >= 1, "query_size", self.query_size, "must be at least 1")
        ratio, valid, test = self.query_ratio, self.valid_fraction, self.test_fraction
        require(ratio is None or 0 < ratio < 1, "query_ratio", ratio, "must be above 0 and below 1")
        require(ratio is None or self.query_size is None, "query_ratio", ratio, "unset query_size to use it")
        require(valid is None or 0 <= valid < 1, "valid_fraction", valid, "must be in [0, 1)")
        require(test is None or 0 <= test < 1, "test_fraction", test, "must be in [0, 1)")
        require((valid or 0) + (test or 0) < 1, "test_fraction", test, "must leave tasks to train on")
        low, high = self.min_task_rows, self.max_task_rows
        require(low is None or low >= 2, "min_task_rows", low, "must be at least 2 (one support and one query row)")
        require(high is None or high >= (low or 2), "max_task_rows", high, f"must be at least {low or 2}")
        for value in self.partitions.values():
            require(value in ("train", "valid", "test"), "partitions", value, "splits are train, valid and test")
        require(
            re.fullmatch(r"\d+(\.\d+)? ?([KMGT]i?)?B", self.memory_limit, re.IGNORECASE) is not None,
            "memory_limit",
            self.memory_limit,
            "must be a size such as 500MB or 2GB",
        )
        most = 4 * max(4, os.cpu_count() or 1)
        require(0 <= self.threads <= most, "threads", self.threads, f"must be 0 (one a core) to {most}")
        require(1 <= self.shard_mb <= 4096, "shard_mb", self.shard_mb, "must be in [1, 4096]")
        require(self.seed >= 0, "seed", self.seed, "must not be negative")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a model on a task pack; writes a run directory with checkpoints, metrics and config."""

    pack: str
    """Task pack directory, made by `gmeta prepare`."""
    run_dir: str
    """Run directory to create (or to resume)."""
    loss: LossName = "bce"
    """Outer loss, on the query."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model."""
    meta: MetaConfig = field(default_factory=MetaConfig)
    """The inner loop."""
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    """Embedding tables."""
    dense: DenseConfig = field(default_factory=DenseConfig)
    """Dense layers' optimizer."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    """Batches."""
    comm: CommConfig = field(default_factory=CommConfig)
    """Communication between workers."""
    elastic: ElasticConfig = field(default_factory=ElasticConfig)
    """Straggler mitigation and restarts."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """When to validate, save and end."""
    seed: int = 0
    """Seed of initialisation, order and dropout."""
    precision: Literal["float32", "tf32", "bf16", "float64"] = "float32"
    """tf32: float32, but CUDA rounds the factors of matrix products to 10 bits (without CUDA the same as float32);
    bf16 is autocast; float64 is for parity tests."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where there is one."""
    timeout_s: int = 300
    """Seconds after which ranks give up on one that does not answer."""
    resume: bool = False
    """Continue the run in run_dir from its last checkpoint."""

    def __post_init__(self) -> None:
        require(self.timeout_s >= 1, "timeout_s", self.timeout_s, "must be at least 1")
        require(self.seed >= 0, "seed", self.seed, "must not be negative")
        metric = self.schedule.metric
        require(self.loss == "bce" or metric not in CLICK_METRICS, "schedule.metric", metric, "needs loss bce (clicks)")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measure a run before and after adaptation, by slice, beside baselines that need no network."""

    run_dir: str
    """Run directory made by `gmeta train`."""
    split: Literal["train", "valid", "test"] = "test"
    """Split of the pack to measure."""
    pack: str | None = None
    """Another task pack with the same schema; the run's own when unset."""
    checkpoint: str = "best"
    """Checkpoint to load: best, last, or a step number."""
    steps: int | None = None
    """Inner steps; as trained when unset (the last step's rates are repeated beyond)."""
    inner_lr: float | None = None
    """Inner learning rate; as trained when unset."""
    plain_run: str | None = None
    """A run of the same model trained with `meta.adapt: []`: adds the variants plain and plain-finetuned,
    the latter with steps and rate tuned on the valid split."""
    truth: str | None = None
    """Directory made by `gmeta synth`: adds what its prior, posterior and oracle score, the frame of any model."""
    baselines: bool = True
    """Measure the baselines too."""
    resamples: int = 1000
    """Bootstrap resamples (over tasks) of the confidence intervals."""
    tasks_per_batch: int = 256
    """Tasks scored at a time, over all ranks."""
    seed: int = 0
    """Seed of the bootstrap."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where there is one."""
    timeout_s: int = 300
    """Seconds after which ranks give up on one that does not answer."""

    def __post_init__(self) -> None:
        require(self.steps is None or self.steps >= 1, "steps", self.steps, "must be at least 1")
        require(self.inner_lr is None or self.inner_lr >= 0, "inner_lr", self.inner_lr, "must not be negative")
        require(self.resamples >= 1, "resamples", self.resamples, "must be at least 1")
        require(self.tasks_per_batch >= 1, "tasks_per_batch", self.tasks_per_batch, "must be at least 1")


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
    checkpoint: str = "best"
    """Checkpoint to load: best, last, or a step number."""
    tasks_per_batch: int = 256
    """Tasks scored at a time."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where there is one."""

    def __post_init__(self) -> None:
        require(self.tasks_per_batch >= 1, "tasks_per_batch", self.tasks_per_batch, "must be at least 1")
        require(self.out.endswith((".parquet", ".csv")), "out", self.out, "must end in .parquet or .csv")


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write report.html, one self-contained page, from a run directory."""

    run_dir: str
    """Run directory made by `gmeta train`."""


@dataclass(frozen=True, kw_only=True)
class SynthConfig:
    """Generate a click log whose truth is known, with a schema for `gmeta prepare` and reference AUCs."""

    out: str
    """Directory to create: the log's Parquet files, schema.yaml, summary.json and _truth/."""
    users: int = 20_000
    """Users, each of them a task."""
    items: int = 500
    """Items, drawn by Zipf popularity."""
    rows_per_user: int = 24
    """Mean rows of a user; each user's number is uniform between half and one and a half of it."""
    latent_dim: int = 2
    """Dimensions of the taste and of the item latents, 1 to 3: the exact posterior is a grid in as many."""
    taste_std: float = 2.2
    """Standard deviation of the logit's part that only a user's own rows reveal."""
    side_std: float = 1.5
    """Standard deviation of the logit's part that user features and items explain together."""
    item_std: float = 0.7
    """Standard deviation of the logit's part that the item alone explains."""
    item_side_share: float = 0.3
    """Share of the item latents' variance that category and brand tell; the rest only clicks do."""
    bias: float = -0.5
    """Logit of the average row: sets the click rate."""
    zipf: float = 0.8
    """Exponent of item popularity: probability is proportional to rank ** -zipf; 0 is uniform."""
    num_query: int = 10
    """Last rows of a user, by time, that count as the query where the summary's AUCs are measured."""
    seed: int = 0
    """Seed; the same seed and sizes give the same files."""

    def __post_init__(self) -> None:
        require(self.users >= 1, "users", self.users, "must be at least 1")
        require(self.items >= 1, "items", self.items, "must be at least 1")
        require(self.rows_per_user >= 2, "rows_per_user", self.rows_per_user, "must be at least 2")
        require(1 <= self.latent_dim <= 3, "latent_dim", self.latent_dim, "must be in [1, 3]")
        for key in ("taste_std", "side_std", "item_std", "zipf"):
            require(getattr(self, key) >= 0, key, getattr(self, key), "must not be negative")
        require(0 <= self.item_side_share <= 1, "item_side_share", self.item_side_share, "must be in [0, 1]")
        require(self.num_query >= 1, "num_query", self.num_query, "must be at least 1")
        require(self.seed >= 0, "seed", self.seed, "must not be negative")


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Check this machine: versions, devices, a two-process collective self-test, memory and disk."""

    timeout_s: int = 60
    """Seconds given to the self-test."""
    network: str | None = None
    """Instead: measure the links between processes, started with --nproc or torchrun, and write them to this file
    (JSON), for `gmeta plan`."""
    group_size: int = 0
    """Ranks with fast links between them; 0: those of one machine."""

    def __post_init__(self) -> None:
        require(self.timeout_s >= 1, "timeout_s", self.timeout_s, "must be at least 1")
        require(self.group_size >= 0, "group_size", self.group_size, "must not be negative")


@dataclass(frozen=True, kw_only=True)
class CoordinateConfig:
    """Serve one job's shards, and balance its workers; restarted on the same journal it goes on where it was."""

    journal: str
    """File of all that was given out and done (SQLite), one a job; created where there is none."""
    host: str = "127.0.0.1"
    """Address to listen on; others than this machine's own need a token."""
    port: int = 0
    """Port to listen on; 0 takes a free one. Printed as `listening on http://...`."""
    token_file: str | None = None
    """File with the secret that every request must name; created where there is none."""
    policy: str = "nd"
    """Who decides on stragglers: a policy by name, or one's own as module:function."""
    durable: bool = False
    """Wait for the disk at each write: survives the loss of power too, at a fraction of the speed."""
    trace: str | None = None
    """File to append reports and decisions to, one JSON object a line."""
    max_restarts: int = 2
    """Slow workers that may be restarted in a run."""
    cooldown_s: float = 300.0
    """Seconds between two such restarts."""

    def __post_init__(self) -> None:
        require(0 <= self.port <= 65535, "port", self.port, "must be in [0, 65535]")
        require(self.max_restarts >= 0, "max_restarts", self.max_restarts, "must not be negative")
        require(self.cooldown_s >= 0, "cooldown_s", self.cooldown_s, "must not be negative")
