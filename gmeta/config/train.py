"""Settings of `gmeta train`, section by section."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from gmeta.config.argument import Argument
from gmeta.core.errors import require, require_numbers, require_seed

LossName = Literal["bce", "mse", "l1", "huber"]
RecipeName = Literal["", "auto", "cold_users", "cold_items", "scenarios", "next_item"]
NEXT_ITEM_METRICS = ("recall@10", "ndcg@10", "mrr@10")
"""Those of packs of next items."""
METRICS = ("auc", "gauc", "logloss", "mae", "rmse", "loss", *NEXT_ITEM_METRICS)
"""Metrics that early stopping may watch, all measured after adaptation."""
CLICK_METRICS = ("auc", "gauc", "logloss")
"""Those that need 0/1 labels and probabilities."""
USERS_KEYS = ("embedding.generator", "embedding.pretrained", "init_map")
"""Settings that are mappings whose keys are names of the user's, dots among them."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model and what it reads."""

    name: str = ""
    """Model to train: neural_linear, taste, melu, dlrm, deepfm, dcn, din, transformer, bahe; of several scenarios
    shared_bottom, mmoe, ple, star, pepnet or hamur; with_texts, any of these beside texts; of next items sasrec or
    llmrec; or your own as package.module:Class. Left out: a recipe chooses it, and all else that you leave out, by what
    is in the pack."""
    args: dict[str, Argument] = field(default_factory=dict)
    """Arguments of the model: melu takes hidden, layer_norm and dropout; dlrm also bottom; deepfm hidden and dropout;
    dcn also cross; shared_bottom takes hidden, tower and dropout; mmoe also experts; ple those of shared_bottom, own
    and shared; star hidden, auxiliary and dropout; pepnet hidden, gate, personal, bottom and dropout; hamur hidden,
    rank and dropout; with_texts takes model, args, encoder, layers, store, target, lists, pooling, template
    and max_tokens; taste takes hidden, bottom, dropout and task_features; neural_linear takes item, hidden,
    dropout, task_features, bias_std, noise, drift_std, label_range and label_scale; din takes target, history,
    attention, hidden and dropout; transformer takes target, history, blocks, heads, positions, causal, hidden and
    dropout; bahe takes encoder, layers, store, refresh, encode, target, histories, pooling, vectors, template,
    max_tokens, tune, rank, user, positions, direction, ids, taste, hidden, dropout and history_dropout; sasrec takes
    blocks, heads, positions, dropout, similarity and temperature; llmrec takes those and encoder, layers, reader,
    window, tune, rank, store, refresh, text, pooling, template, max_tokens, hidden, ids, fusion and id_dropout. Your
    own class takes its own."""
    features: list[str] = field(default_factory=list)
    """Features and sequences to use. Empty means all in the pack but the task's own key (the user's id, say), which is
    unknown of new tasks; name it to use it."""
    numeric: bool = True
    """Use the pack's numeric columns."""
    embedding_dim: int = 16
    """Width of every embedding row."""

    def __post_init__(self) -> None:
        require_numbers(self, "model.")
        require(isinstance(self.args, dict), "model.args", self.args, "must be a mapping; leave it out for none")
        require(self.embedding_dim > 0, "model.embedding_dim", self.embedding_dim, "must be at least 1")


@dataclass(frozen=True, kw_only=True)
class MetaConfig:
    """The inner loop. `adapt: []` is plain training on support and query together."""

    adapt: list[str] = field(default_factory=lambda: ["embeddings", "dense"])
    """What a task adapts: embeddings, dense, head, decision, or globs of parameter names
    (embeddings.item_id, layers.0.*), by SGD steps; last_layer, solved in closed form after them. Empty: plain
    training."""
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
    """Pseudo-examples: the inner loss is the sum of a task's support losses / (examples + inner_prior), so that
    small supports move less."""
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
    negotiation: float = 0.0
    """Domain negotiation (MAMDR): batches go scenario by scenario, and after each round of loader.window_batches, which
    an epoch's end ends too, weights and rows go this share of the way from where they were before it, for which a
    second copy of all is held; 1 keeps the order of batches alone, 0 is off. Tasks must be of one scenario each."""
    engine: Literal["auto", "factored", "reference"] = "auto"
    """auto takes the factored engine where it can and says so where it cannot."""

    def __post_init__(self) -> None:
        require_numbers(self, "meta.")
        require(self.inner_steps >= 1, "meta.inner_steps", self.inner_steps, "must be at least 1")
        require(self.inner_lr >= 0, "meta.inner_lr", self.inner_lr, "must not be negative")
        require(self.inner_prior >= 0, "meta.inner_prior", self.inner_prior, "must not be negative")
        require(
            not self.recompute or (self.engine != "reference" and self.order == "second"),
            "meta.recompute",
            self.recompute,
            "only the factored engine's second order keeps graphs of inner steps; leave it out",
        )
        require(0 <= self.negotiation <= 1, "meta.negotiation", self.negotiation, "must be in [0, 1]; 0 is off")
        require(self.modulation_dim >= 1, "meta.modulation_dim", self.modulation_dim, "must be at least 1")
        require(self.clusters >= 1, "meta.clusters", self.clusters, "must be at least 1")
        require(
            self.modulation == "none" or any(name != "last_layer" for name in self.adapt),
            "meta.modulation",
            self.modulation,
            f"it sets where SGD steps start, and meta.adapt {self.adapt} takes none; use none, or name what they adapt",
        )


@dataclass(frozen=True, kw_only=True)
class EmbeddingConfig:
    """Sharded embedding tables and their row-wise optimizer."""

    optimizer: Literal["sgd", "rowwise_adagrad", "adagrad", "adam"] = "rowwise_adagrad"
    """Row optimizer; only rows that took part in a step change."""
    lr: float = 0.05
    """Learning rate of embedding rows."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the rows that took part in a step."""
    init_std: float = 0.05
    """Standard deviation of the initial rows."""
    start: Literal["random", "factors"] = "random"
    """Where the item's rows start: factors has the solution of factor analysis on the training rows in them, for
    model neural_linear; step 0 is then validated and saved too."""
    new_rows: Literal["generated", "oov", "random"] = "generated"
    """Where rows of new ids begin in a warm start: as the row of unknown ids, with what embedding.generator makes of
    the id's other columns where it has one; as that row alone; or at random, as in a new run."""
    id_dropout: float | None = None
    """Share of a table's ids in training that is masked at random, rare ids more often: they read the row of unknown
    ids, so that cold ids find it trained. Unset: 0.02 where valid or test tasks have cold ids, else 0."""
    generator: dict[str, Any] = field(default_factory=dict)
    """Features whose unknown ids get a vector made of other columns (Meta-Embedding), such as {item_id: [genre]}; it
    learns from the ids that id_dropout masks."""
    pretrained: dict[str, str] = field(default_factory=dict)
    """Parquet files with first rows of tables, such as {item_id: vectors.parquet}: column value has the raw id, vector
    as many numbers as embedding_dim. Other ids start as usual, and all rows are trained. In a warm start only new ids
    read them."""

    def __post_init__(self) -> None:
        require_numbers(self, "embedding.")
        share = self.id_dropout
        require(share is None or 0 <= share < 1, "embedding.id_dropout", share, "must be in [0, 1); 0 is off")
        _check_generator(self.generator)
        factors = bool(self.pretrained) and self.start == "factors"
        rule = "embedding.pretrained sets first rows too; leave one of the two out"
        require(not factors, "embedding.start", self.start, rule)
        off = bool(self.generator) and share == 0
        require(not off, "embedding.id_dropout", share, "embedding.generator learns from masked ids; leave one out")
        require(self.lr >= 0, "embedding.lr", self.lr, "must not be negative")
        require(self.weight_decay >= 0, "embedding.weight_decay", self.weight_decay, "must not be negative")
        require(self.init_std >= 0, "embedding.init_std", self.init_std, "must not be negative")


def _check_generator(generator: Any) -> None:
    """Raise ValueError unless it maps names to lists of names, none of which is empty."""
    rule = "must map features to lists of columns, such as {item_id: [genre, price]}"
    require(isinstance(generator, dict), "embedding.generator", generator, rule)
    for name, of in generator.items():
        listed = isinstance(of, list) and of and all(isinstance(column, str) for column in of)
        require(bool(listed), f"embedding.generator.{name}", of, "must be a list of columns, such as [genre, price]")


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
    """Clip gradients to this norm over all ranks, dense layers and rows together; 0 is off."""
    warmup_steps: int = 0
    """Linear warm-up of every learning rate (dense and embedding)."""
    decay: Literal["none", "linear", "cosine"] = "none"
    """Decay of every learning rate to zero at the last step."""
    sharding: str = "NNN"
    """How parameters, gradients and optimizer state are sharded (PaRO), one letter each: N, a copy on every rank; I,
    sharded inside each node; G, sharded over all ranks. Or auto. NNN is fastest where it fits; `gmeta plan` tells what
    the others cost."""
    node_size: int = 0
    """Ranks of a node, for sharding; 0: those of one machine."""
    memory_gb: float | None = None
    """With sharding auto: GB a rank between steps for dense parameters, gradients and optimizer state (in a step
    parameters are unsharded). Without it: on CUDA half of what is free, on CPU all that it takes."""

    def __post_init__(self) -> None:
        require_numbers(self, "dense.")
        require(self.lr >= 0, "dense.lr", self.lr, "must not be negative")
        require(self.inner_lr_lr >= 0, "dense.inner_lr_lr", self.inner_lr_lr, "must not be negative")
        require(self.weight_decay >= 0, "dense.weight_decay", self.weight_decay, "must not be negative")
        require(self.clip_norm >= 0, "dense.clip_norm", self.clip_norm, "must not be negative")
        require(self.warmup_steps >= 0, "dense.warmup_steps", self.warmup_steps, "must not be negative")
        require(self.node_size >= 0, "dense.node_size", self.node_size, "must not be negative")
        require(self.memory_gb is None or self.memory_gb > 0, "dense.memory_gb", self.memory_gb, "must be more than 0")


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How tasks are ordered and batched. The order is a function of the seed, never of the world size."""

    tasks_per_batch: int = 64
    """Tasks of one global batch, over all ranks (G)."""
    window_batches: int = 64
    """Batches per shuffle window: larger mixes better, smaller reads closer to sequentially."""
    prefetch: int = 2
    """Batches prepared ahead in a background thread; 0 is off."""
    resample: bool = False
    """Draw each training task's support anew every epoch, at random, with the stored sizes."""
    max_support_rows: int = 0
    """Keep only the last n support examples of every task, in training and in evaluation and predictions of the run;
    0 keeps all."""
    episode_rows: int = 0
    """Train on a task of more rows as several tasks an epoch, of at most so many consecutive rows each: a long history
    teaches more than one adaptation. 0 is off; at least 4."""

    def __post_init__(self) -> None:
        require_numbers(self, "loader.")
        episode = self.episode_rows
        require(episode == 0 or episode >= 4, "loader.episode_rows", episode, "must be 0 (off) or at least 4")
        require(self.tasks_per_batch >= 1, "loader.tasks_per_batch", self.tasks_per_batch, "must be at least 1")
        require(self.window_batches >= 1, "loader.window_batches", self.window_batches, "must be at least 1")
        rows = self.max_support_rows
        require(rows >= 0, "loader.max_support_rows", rows, "must be 0 (all) or a number of rows")
        require(self.prefetch >= 0, "loader.prefetch", self.prefetch, "must not be negative")


@dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    """Tasks of an older pack that are trained on beside the new ones, so that what they taught is not forgotten."""

    pack: str = ""
    """Older pack, whose ids those of `pack` go on from. Empty: no replay."""
    fraction: float | None = None
    """Share of an epoch's tasks that are drawn from the older pack, other ones in each epoch. Unset: 0.2."""

    def __post_init__(self) -> None:
        require_numbers(self, "replay.")
        share, key = self.fraction, "replay.fraction"
        require(share is None or 0 < share < 1, key, share, "must be in (0, 1); leave replay.pack out")
        rule = "says how much of replay.pack to replay; name that pack too"
        require(share is None or bool(self.pack), key, share, rule)

    @property
    def share(self) -> float:
        """Return the fraction, or what it is where it is unset."""
        return 0.2 if self.fraction is None else self.fraction


@dataclass(frozen=True, kw_only=True)
class NextItemConfig:
    """Training on packs of next items, which `gmeta prepare` makes of events."""

    candidates: int = 512
    """Items of each domain that a batch's targets are compared with, of those that training rows have, drawn anew for
    every batch; 0: all of these."""
    draw: Literal["uniform", "popularity"] = "uniform"
    """How candidates are drawn; what popularity draws more often counts so much less."""
    in_batch: int = 0
    """Events of the batch, over all processes, whose items are candidates too; popular items come more often this way,
    and count so much less."""
    each: int = 0
    """Candidates of its own domain that a target is compared with, other ones for every target; 0: all candidates."""
    own_items: Literal["compared", "left_out"] = "compared"
    """Whether a target is compared with candidates that its user has among its own events, before or after it."""
    targets: Literal["every", "last"] = "every"
    """every: each event of a training task but its first is a target; last: the query alone."""

    def __post_init__(self) -> None:
        require_numbers(self, "next_item.")
        require(self.candidates >= 0, "next_item.candidates", self.candidates, "must be 0 (all) or more")
        require(self.in_batch >= 0, "next_item.in_batch", self.in_batch, "must be 0 (none) or a number of events")
        rule = "next_item.candidates is 0, so that all items are candidates already; leave in_batch out"
        require(not self.in_batch or self.candidates > 0, "next_item.in_batch", self.in_batch, rule)
        drawn = self.candidates > 0 or self.draw == "uniform"
        require(drawn, "next_item.draw", self.draw, "next_item.candidates is 0, so that none is drawn; leave it out")
        require(self.each >= 0, "next_item.each", self.each, "must be 0 (all candidates) or a number of them")
        rule = f"next_item.candidates draws {self.candidates} items of a domain; raise that, or lower this"
        require(self.each <= self.candidates or not self.candidates, "next_item.each", self.each, rule)


@dataclass(frozen=True, kw_only=True)
class CommConfig:
    """How rows and gradients travel between workers."""

    wire: Literal["float32", "bf16", "fp16"] = "float32"
    """Type of rows and row gradients on the way; float32 leaves them as the table holds them. Gradients are summed
    in the table's own type."""
    node_size: int = 0
    """Workers of one node, for an AlltoAll of two stages (inside nodes, then between them); 0 is one stage."""

    def __post_init__(self) -> None:
        require_numbers(self, "comm.")
        require(self.node_size >= 0, "comm.node_size", self.node_size, "must not be negative")


@dataclass(frozen=True, kw_only=True)
class ElasticConfig:
    """Straggler mitigation and restarts.

    Measured speeds decide who computes how much of a batch, never what a batch is. A worker that dies costs the steps
    since the last checkpoint.
    """

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
        require_numbers(self, "elastic.")
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
    """Validation metric of early stopping and of the best checkpoint: auc, gauc, logloss, mae, rmse, loss; of next
    items recall@10, ndcg@10, mrr@10."""
    patience: int = 0
    """Stop after this many validations without a better metric; 0 is off."""
    checkpoint_every: int = 0
    """Save every n steps; 0 means at each validation."""
    keep_last: int = 2
    """Checkpoints kept besides the best."""
    position: Literal["new", "continue"] = "new"
    """Where a warm start begins in the schedule: at its beginning, or where the bundle's training was, for the same
    tasks: then it is the same, bit for bit, as to resume that run."""

    def __post_init__(self) -> None:
        require_numbers(self, "schedule.")
        for key in ("max_steps", "eval_every", "patience", "checkpoint_every"):
            require(getattr(self, key) >= 0, f"schedule.{key}", getattr(self, key), "must not be negative")
        require(self.epochs >= 1, "schedule.epochs", self.epochs, "must be at least 1")
        require(self.keep_last >= 1, "schedule.keep_last", self.keep_last, "must be at least 1")
        require(self.metric in METRICS, "schedule.metric", self.metric, f"must be one of {', '.join(METRICS)}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a model on a task pack; writes a run directory with checkpoints, metrics and config."""

    pack: str
    """Task pack directory, made by `gmeta prepare`."""
    run_dir: str
    """Run directory to create (or to resume)."""
    recipe: RecipeName = ""
    """Settings for what you leave out, by what is in the pack, printed with the reasons: cold_users, cold_items,
    scenarios, next_item, or auto, which is usual where no model is named."""
    warm_start: str = ""
    """Bundle to go on from: a new run begins with its weights, rows and moments, aligned by the raw values of ids. What
    you leave out is as it was set there."""
    init_from: str = ""
    """Bundle of another model, parts of which a new training begins with: those that init_map names."""
    init_map: dict[str, str] = field(default_factory=dict)
    """What to take of init_from: a part of this model and the bundle's part for it, such as {tables.item: tables.item,
    model.layers.0: model.bottom.0}; a name stands for all that begin with it. Empty: the tables and layers that both
    have in one size."""
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
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    """Older tasks among the new ones."""
    next_item: NextItemConfig = field(default_factory=NextItemConfig)
    """Next items, where the pack is one of them."""
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
        require_numbers(self)
        for item in fields(self):
            if isinstance(item.default_factory, type):
                section, value = item.default_factory, getattr(self, item.name)
                require(isinstance(value, section), item.name, value, f"must be a {section.__name__}")
        require(self.timeout_s >= 1, "timeout_s", self.timeout_s, "must be at least 1")
        require_seed(self.seed)
        goes_on = self.schedule.position == "continue"
        require(not goes_on or bool(self.warm_start), "schedule.position", "continue", "only a warm_start has one")
        both = bool(self.init_from and self.warm_start)
        require(
            not both, "init_from", self.init_from, "warm_start goes on with a whole model; leave one of the two out"
        )
        unused = bool(self.init_map) and not self.init_from
        require(not unused, "init_map", self.init_map, "says what to take of init_from; name that bundle too")
        factors = bool(self.init_from) and self.embedding.start == "factors"
        require(not factors, "embedding.start", "factors", "init_from sets first rows too; leave one of the two out")
        alone = self.next_item.in_batch > 0 and self.loader.tasks_per_batch == 1
        rule = "loader.tasks_per_batch is 1: a batch of one user has no event of another; leave one of the two out"
        require(not alone, "next_item.in_batch", self.next_item.in_batch, rule)
        metric = self.schedule.metric
        require(self.loss == "bce" or metric not in CLICK_METRICS, "schedule.metric", metric, "needs loss bce (clicks)")
