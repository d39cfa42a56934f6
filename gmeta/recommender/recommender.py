"""`gmeta.load`: a trained run as an object that adapts to examples and scores candidates, in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from gmeta.core.batch import Bag, Examples, mask_of, text_ids_of, to_device
from gmeta.core.errors import require
from gmeta.data.loader import MAX_CELLS
from gmeta.data.order import cheapest_ends
from gmeta.data.prepare.encoder import EncodedTables, Encoder
from gmeta.data.schema import PackSchema, Role, data_schema_from_json
from gmeta.data.shards import PackSplit, TaskRows, split_in_memory
from gmeta.data.tables import TableLike, as_arrow, has_no_columns
from gmeta.meta.closed_form import require_posterior, sampled_weights
from gmeta.meta.fast_weights import FastWeights
from gmeta.meta.losses import predictions
from gmeta.meta.recorded import Programs, RecordedLearner
from gmeta.models.registry import ModelFactory
from gmeta.parallel.mesh import Mesh, local_mesh
from gmeta.recommender.build import load_system, version_of
from gmeta.recommender.mapped import MappedRows
from gmeta.recommender.model_texts import ModelTexts
from gmeta.runs import checkpoint as checkpoints
from gmeta.runs.bundle import is_bundle
from gmeta.runs.data import require_clicks, require_own_vocabularies, require_scores
from gmeta.runs.directory import read_schema, read_settings
from gmeta.runs.registry import CACHE, fetch_named

_TASKS_AT_A_TIME = 256
_Opened = TypeVar("_Opened")


def load(
    run: str | os.PathLike[str],
    *,
    checkpoint: str | int = "best",
    model: ModelFactory | None = None,
    trust_model: bool = False,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    cache: str | os.PathLike[str] = CACHE,
    mapped: bool = False,
) -> Recommender:
    """Load a trained run or a bundle: weights, tables and vocabularies, without optimizer state.

    `run` is a run directory, what `gmeta.train` returned, a bundle, or a version of a registry, `REGISTRY/current` or
    `REGISTRY/<n>`, which is fetched to the folder `cache`; `checkpoint` is best, last or a step number of a run.
    One whose model is not gmeta's own is opened with `model`, its class, or with `trust_model`, which imports what it
    names. With `mapped` a bundle's rows are read from its files when they are asked for, in memory that processes
    share; the states of it fit no other.

    Raises ValueError for what is missing, damaged, or not trusted.
    """
    mesh = local_mesh(device)

    def make(source: Path, which: str) -> Recommender:
        return Recommender(source, which, factory=model, trust_model=trust_model, mesh=mesh, mapped=mapped)

    return open_trained(make, run, str(checkpoint), cache=cache, mapped=mapped)


def open_trained(
    make: Callable[[Path, str], _Opened],
    run: str | os.PathLike[str],
    checkpoint: str,
    *,
    cache: str | os.PathLike[str] = CACHE,
    mapped: bool = False,
) -> _Opened:
    """Return what `make(source, checkpoint)` gives of a run, a bundle or a version of a registry; the checkpoint of a
    bundle is empty. Errors as `load`.
    """
    run = fetch_named(os.fspath(run), Path(cache).expanduser()) or run
    if is_bundle(Path(run)):
        require(checkpoint == "best", "checkpoint", checkpoint, "a bundle is one version: leave it out")
        return make(Path(run), "")
    require(not mapped, "mapped", mapped, "only a bundle can be: make one with `gmeta bundle`")
    read_settings(Path(run))  # a path that is no run is told of first
    attempts = 3
    while True:
        path = checkpoints.find_checkpoint(Path(run) / "checkpoints", checkpoint)
        try:
            return make(Path(run), str(checkpoints.step_of(path)))
        except (ValueError, OSError):
            attempts -= 1
            if path.exists() or not attempts:
                raise  # else a run that is training has put a newer one in its place


class Recommender:
    """A trained model, ready to adapt: `rec.adapt(support).predict(candidates)`. Values are raw, as in the logs."""

    def __init__(
        self,
        source: Path,
        which: str,
        *,
        factory: ModelFactory | None,
        trust_model: bool,
        mesh: Mesh,
        mapped: bool = False,
    ) -> None:
        require_scores(source)
        require_own_vocabularies(source)
        self.source = source
        self.system, self.config, step = load_system(
            source, which, mesh, factory=factory, trust_model=trust_model, mapped=mapped
        )
        self.system.learner.eval()
        self._recorded: tuple[MappedRows, RecordedLearner] | None = None
        schema, data_schema = read_schema(source)
        self.schema: PackSchema = schema
        self._data_schema = data_schema_from_json(data_schema)
        self._encoder = Encoder(data_schema, source / "vocab", schema)
        self._texts = ModelTexts(self.system.learner, schema)
        self.version = version_of(source, step)
        if mapped:
            self.version += " mapped"

    def adapt(self, support: TableLike) -> AdaptedTasks:
        """Adapt to every task of a table of labelled examples: a user's ratings, say.

        The table has the columns of the training logs: task, label, features, numeric columns. It may be a pandas or
        polars DataFrame, an Arrow table, or a dict of columns; other columns are ignored. A task's rows count in the
        order of the time column where the table has it, else in their own.

        Raises ValueError for columns that are missing, for values that cannot be used, with row and column, and for a
        task whose posterior is not finite.
        """
        encoded = self._encode(support, "support")
        if encoded is None:
            return AdaptedTasks(self, (), np.zeros(0, np.int64), ())
        require_clicks(encoded.arrays["label"], self.config.loss, "support")
        parts = []
        with self._rows(encoded) as (at, split):
            for tasks in _chunks(at.num_support, at.num_query, split.cells_per_row(at)):
                examples, _, _ = split.gather(at[tasks])
                parts.append(self._adapt(examples))
                require_finite(parts[-1], encoded.keys[tasks])
        return AdaptedTasks(self, tuple(encoded.keys), at.num_support, tuple(parts))

    def record(self, programs: Programs, note: Callable[[str], None]) -> None:
        """Adapt and score by recorded programs from now on (see `gmeta.meta.recorded`); `note` is told where not."""
        system = self.system
        if system.learner.texts:
            note(f"passes are not recorded of a model that reads texts ({', '.join(system.learner.texts)})")
            return
        if system.learner.routes:
            note(f"passes are not recorded of a model that routes by {min(system.learner.routes)!r}")
            return
        if not isinstance(system.exchange, MappedRows) or system.mesh.device.type != "cpu" or system.autocast:
            note("passes are recorded of mapped bundles only, on a CPU, in one precision")
            return
        tables = system.exchange.features(system.learner.features)
        try:
            self._recorded = system.exchange, RecordedLearner(system.learner, tables, programs, note)
        except ValueError as reason:
            note(str(reason))

    def restore(self, state: Mapping[str, Any]) -> AdaptedTasks:
        """Return what `AdaptedTasks.state` gave. ValueError where another model adapted it."""
        if not isinstance(state, Mapping):
            raise ValueError(f"the state is a {type(state).__name__}: give what AdaptedTasks.state() returned")
        if missing := {"version", "keys", "num_support", "fast_weights"} - state.keys():
            raise ValueError(f"the state has no {min(missing)!r}: give what AdaptedTasks.state() returned")
        if state["version"] != self.version:
            raise ValueError(
                f"the state was adapted by {state['version']!r}, this model is {self.version!r}: adapt again"
            )
        parts = tuple(
            to_device(FastWeights.from_state_dict(part), self.system.mesh.device) for part in state["fast_weights"]
        )
        return AdaptedTasks(self, tuple(state["keys"]), state["num_support"].numpy(), parts, state.get("seed"))

    @property
    def labels(self) -> tuple[str, ...]:
        """Return the names of what is predicted: one label, or several."""
        return self.schema.label_names

    @property
    def _outputs(self) -> tuple[int, ...]:
        return (len(self.labels),) if self.schema.labels else ()

    def _predictions(self, logits: Tensor) -> NDArray[np.float64]:
        """Return what logits [..., K] predict."""
        return predictions(self.schema.losses(self.config.loss))(logits).numpy()

    def _encode(self, table: TableLike, role: Literal["support", "candidates"]) -> EncodedTables | None:
        """Return a table's rows in the run's encoding, None without rows."""
        if has_no_columns(table):
            return None
        found = self._arrow(table, role)
        return self._encoder.table(found, role) if found.num_rows else None

    def _arrow(self, table: TableLike, role: Literal["support", "candidates"]) -> pa.Table:
        """Return the columns of a table that the encoding needs."""
        schema = self._data_schema
        roles: list[Role] = ["task", "item"] if schema.item_statistics else ["task"]
        support = role == "support"
        needed = schema.columns([*roles, "label"] if support else roles)
        of_support = [c for c in (schema.time, schema.weight) if support and c is not None]
        return as_arrow(table, role, needed, [*of_support, *schema.item_vectors()])

    @contextmanager
    def _rows(self, encoded: EncodedTables) -> Iterator[tuple[TaskRows, PackSplit]]:
        """Give where each task's rows lie, with as many support rows as the run keeps, in a split of them. The model
        knows their texts within the block.
        """
        with self._texts.known(encoded) as arrays:
            split = split_in_memory(arrays, self.schema)
            at = split.locate(np.arange(len(encoded.keys)))
            yield at.last_support(self.config.loader.max_support_rows), split

    def _adapt(self, support: Examples) -> FastWeights:
        """Return the fast weights of padded examples, whose pairs name rows by their position in the table."""
        system = self.system
        support = system.examples(support)
        if self._recorded is not None:
            exchange, learner = self._recorded
            return learner.adapt(exchange.look_up(support, learner.tables), _in_precision(support, system.dtype))
        request = system.exchange.request(support=support)
        rows = system.exchange.fetch(system.exchange.exchange_ids(request))
        index = system.learner.index_support(request.support, request.num_rows)
        with system.precision():
            fast = system.learner.adapt(
                rows, to_device(support, system.mesh.device, system.dtype), to_device(index, system.mesh.device)
            )
        return fast.with_row_ids(request.rows)

    def _without_support(self, num_tasks: int) -> FastWeights:
        """Return the fast weights of tasks of which nothing is known."""
        return self._adapt(_no_examples(self.schema, num_tasks))

    def _score(self, fast: FastWeights, query: Examples, deviation: bool = False) -> Tensor:
        """Return logits [T, Q], or their posterior standard deviation."""
        system = self.system
        query = system.examples(query)
        if self._recorded is not None and not deviation:
            exchange, learner = self._recorded
            return learner.score(fast, exchange.look_up(query, learner.tables), _in_precision(query, system.dtype))
        request = system.exchange.request(query=query)
        rows = system.exchange.fetch(system.exchange.exchange_ids(request))
        index = system.learner.index_query(request.query, request.num_rows, fast.pairs, request.rows)
        scored = system.learner.deviation if deviation else system.learner.score
        with system.precision(), torch.no_grad():
            return scored(
                fast, rows, to_device(query, system.mesh.device, system.dtype), to_device(index, system.mesh.device)
            )


@dataclass(frozen=True)
class AdaptedTasks:
    """What a model has learned about some tasks from their support: small, and of no use to another model."""

    recommender: Recommender
    keys: tuple[str, ...]  # of the task column, in the one form of an id: 7.0 is 7, True is true
    num_support: NDArray[np.int64]  # [tasks], support rows that each adapted to
    parts: tuple[FastWeights, ...]  # of consecutive tasks, which were adapted together
    seed: int | None = None  # of the weights that are drawn from the posteriors; None: none are

    def __len__(self) -> int:
        return len(self.keys)

    def predict(self, candidates: TableLike) -> NDArray[np.float64]:
        """Return the score of each row of `candidates`, [N]: a probability for clicks, a value otherwise; of several
        labels [N, K], in the order of `Recommender.labels`.

        The table is like the support's, without labels. Rows of tasks that were not adapted get the score of a task of
        which nothing is known.
        """
        logits = self._evaluated(candidates)
        return self.recommender._predictions(torch.from_numpy(logits))

    def uncertainty(self, candidates: TableLike) -> NDArray[np.float64]:
        """Return the posterior standard deviation of the logit of each row of `candidates`, [N], for exploration.

        An upper confidence bound is the logit plus so many of them. ValueError where the run solves for no last
        layer (`meta.adapt: [last_layer]`).
        """
        return self._evaluated(candidates, deviation=True)

    def sample(self, seed: int) -> AdaptedTasks:
        """Return the same tasks with weights drawn from their posteriors, for Thompson sampling: what `predict` then
        gives is a draw, one of a task's weights for all of its candidates, and its `uncertainty` is 0.

        A task's draw is a function of its key and the seed. Tasks that were not adapted are drawn from the prior. A
        draw stays the one that it is. ValueError as in `uncertainty`, and for a seed that is none.
        """
        whole = isinstance(seed, int | np.integer) and not isinstance(seed, bool)
        require(whole and 0 <= seed < 2**63, "seed", seed, "must be a whole number in [0, 2^63)")
        for part in self.parts or (self.recommender._without_support(1),):
            require_posterior(part)
        return replace(self, seed=int(seed)) if self.seed is None else self

    def _evaluated(self, candidates: TableLike, deviation: bool = False) -> NDArray[np.float64]:
        """Return the logit, or its deviation, of each row of `candidates`."""
        rec = self.recommender
        encoded = rec._encode(candidates, "candidates")
        if encoded is None:
            return np.zeros((0, *rec._outputs))
        known = {key: position for position, key in enumerate(self.keys)}
        position = np.array([known.get(key, len(known)) for key in encoded.keys])
        parts, num_support = self.parts, self.num_support
        if (position == len(known)).any():
            parts, num_support = (*parts, rec._without_support(1)), np.append(num_support, 0)
        logits = np.zeros((len(encoded.query_row), *rec._outputs))
        with rec._rows(encoded) as (at, split):
            for tasks in _chunks(num_support[position], at.num_query, split.cells_per_row(at)):
                _, query, _ = split.gather(at[tasks])
                fast = _chosen(parts, position[tasks])
                if self.seed is not None:
                    fast = sampled_weights(fast, _noise(self.seed, encoded.keys[tasks], require_posterior(fast).mean))
                found = rec._score(fast, query, deviation).cpu()
                logits[encoded.query_row[query.row[query.mask].numpy()]] = found[query.mask].double().numpy()
        return logits

    def state(self) -> dict[str, Any]:
        """Return keys, version and tensors, for `torch.save` or a store; `Recommender.restore` reads them."""
        parts = [{name: tensor.cpu() for name, tensor in part.state_dict().items()} for part in self.parts]
        num_support = torch.from_numpy(self.num_support)
        return {
            "version": self.recommender.version,
            "keys": list(self.keys),
            "num_support": num_support,
            "fast_weights": parts,
            "seed": self.seed,
        }


def require_finite(fast: FastWeights, keys: Sequence[str]) -> None:
    """Raise ValueError that names the first task whose posterior has a number that is not finite."""
    if fast.posterior is None:
        return
    finite = fast.posterior.mean.isfinite().all(1) & fast.posterior.spread.isfinite().flatten(1).all(1)
    if not finite.all():
        raise ValueError(
            f"task {keys[int((~finite).nonzero()[0])]!r} has no posterior: the model gives its support numbers that "
            "are not finite; look at its numeric columns"
        )


def _noise(seed: int, keys: Sequence[str], like: Tensor) -> Tensor:
    """Return standard normal numbers of the shape of `like` [T, D], each task's own, the same on every device."""
    streams = (np.random.default_rng((seed, xxhash.xxh3_64_intdigest(key.encode()))) for key in keys)
    return torch.from_numpy(np.stack([stream.standard_normal(like.shape[1]) for stream in streams]))


def _chosen(parts: Sequence[FastWeights], positions: NDArray[np.int64]) -> FastWeights:
    """Return the fast weights of tasks, counted over all parts, in the order of `positions`."""
    starts = np.cumsum([0, *(part.num_tasks for part in parts)])
    part_of = np.searchsorted(starts, positions, side="right") - 1
    order = np.argsort(part_of, kind="stable")
    needed = [
        parts[number].of_tasks((positions[part_of == number] - starts[number]).tolist())
        for number in np.unique(part_of).tolist()
    ]
    joined = needed[0] if len(needed) == 1 else FastWeights.join(needed)
    return joined if (order[1:] > order[:-1]).all() else joined.of_tasks(np.argsort(order).tolist())


def _chunks(
    num_support: NDArray[np.int64], num_query: NDArray[np.int64], cells_per_row: NDArray[np.int64]
) -> Iterator[slice]:
    """Cut tasks into parts of which none is padded beyond what memory holds."""
    for start in range(0, len(num_support), _TASKS_AT_A_TIME):
        part = slice(start, start + _TASKS_AT_A_TIME)
        begin = start
        for end in cheapest_ends(num_support[part], num_query[part], cells_per_row[part], MAX_CELLS):
            yield slice(begin, start + end)
            begin = start + end


def _in_precision(examples: Examples, dtype: torch.dtype) -> Examples:
    weight = None if examples.weight is None else examples.weight.to(dtype)
    return replace(examples, dense=examples.dense.to(dtype), label=examples.label.to(dtype), weight=weight)


def _no_examples(schema: PackSchema, num_tasks: int) -> Examples:
    """Return the support of tasks that have none, [T, 0]."""
    none = torch.zeros(num_tasks, 0, dtype=torch.int64)
    flags, numbers = none.bool(), torch.zeros(num_tasks, 0)
    return Examples(
        ids={feature.name: none for feature in schema.features if feature.kind == "categorical"},
        bags={f.name: Bag(none.reshape(0), none) for f in schema.features if f.kind != "categorical"},
        dense=torch.zeros(num_tasks, 0, len(schema.numeric)),
        label=torch.zeros(num_tasks, 0, len(schema.labels)) if schema.labels else numbers,
        mask=flags,
        row=none,
        item_cold=flags,
        weight=None if schema.weight is None else numbers,
        given={vector.name: numbers.new_zeros(num_tasks, 0, vector.dim) for vector in schema.vector}
        | {text_ids_of(f.name): none.unsqueeze(-1) for f in schema.features if f.num_texts is not None}
        | {
            name: value
            for column in schema.numeric_sequence
            for name, value in (
                (column.name, numbers.view(num_tasks, 0, 1, 1)),
                (mask_of(column.name), flags.view(num_tasks, 0, 1)),
            )
        },
    )
