"""Fetch, return and update on 1, 2 and 4 workers: the same rows, whoever holds them and whoever asks."""

import sys
import warnings
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from harness import run_ranks
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor

from gmeta.core.batch import Bag, EmbeddedRows, Examples, Lookup, TaskBatch
from gmeta.embedding.exchange import Exchange, RowExchange
from gmeta.embedding.lookup import request_rows
from gmeta.embedding.table import STATE, ShardedTables, TableSpec
from gmeta.optim.dense import global_norm
from gmeta.optim.sparse import SparseOptimizer
from gmeta.parallel.mesh import Mesh
from gmeta.parallel.traffic import CommStats

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))  # scripts, no package

from study.exchange import IdsInStep, NaiveExchange

pytestmark = pytest.mark.dist

SPECS = [
    TableSpec("user", 23, 4, {"user": None}),
    TableSpec("item", 9, 4, {"item": None, "history": "mean"}),
    TableSpec("city", 2, 2, {"city": None}),  # fewer rows than workers: some own none
]
NUM_TASKS = 5
CUTS = {1: [5], 2: [5, 0], 4: [1, 3, 0, 1]}  # tasks a rank; one has none


def side(generator: torch.Generator, max_rows: int) -> Examples:
    """Ragged tasks: the third has no row at all. Ids repeat within and across tasks, padded ids are 0."""
    sizes = torch.randint(1, max_rows + 1, (NUM_TASKS,), generator=generator)
    sizes[2] = 0
    mask = torch.arange(max_rows) < sizes[:, None]

    def ids(n):
        return torch.randint(n, mask.shape, generator=generator) * mask

    lengths = torch.randint(4, mask.shape, generator=generator) * mask
    values = torch.randint(9, (int(lengths.sum()),), generator=generator)
    return Examples(
        ids={"user": ids(23), "item": ids(9), "city": ids(2)},
        bags={"history": Bag(values, lengths)},
        dense=torch.zeros(*mask.shape, 0),
        label=torch.zeros(mask.shape),
        mask=mask,
        row=torch.zeros(mask.shape, dtype=torch.int64),
        item_cold=torch.zeros_like(mask),
    )


def cut(examples: Examples, tasks: slice) -> Examples:
    """The examples of some tasks, padded to the longest of them as the loader would."""
    width = int(examples.mask[tasks].sum(1).max()) if examples.mask[tasks].numel() else 0
    bag = examples.bags["history"]
    per_task = bag.lengths.sum(1)
    start, end = int(per_task[: tasks.start].sum()), int(per_task[: tasks.stop].sum())
    return Examples(
        ids={name: ids[tasks, :width] for name, ids in examples.ids.items()},
        bags={"history": Bag(bag.values[start:end], bag.lengths[tasks, :width])},
        dense=examples.dense[tasks, :width],
        label=examples.label[tasks, :width],
        mask=examples.mask[tasks, :width],
        row=examples.row[tasks, :width],
        item_cold=examples.item_cold[tasks, :width],
    )


def batch_of(mesh: Mesh, step: int) -> TaskBatch:
    generator = torch.Generator().manual_seed(step)
    support, query = side(generator, 4), side(generator, 3)
    cuts = CUTS[mesh.world_size]
    tasks = slice(sum(cuts[: mesh.rank]), sum(cuts[: mesh.rank + 1]))
    return TaskBatch(
        support=cut(support, tasks),
        query=cut(query, tasks),
        task_id=torch.arange(NUM_TASKS)[tasks],
        num_tasks_global=NUM_TASKS,
        epoch=0,
        index=step,
    )


def look_up(weights: dict[str, torch.Tensor], lookup: Lookup) -> torch.Tensor:
    """[T, S, d]; the slow and plain way."""
    rows = weights[lookup.table][lookup.index]
    if lookup.lengths is None:
        return rows
    parts = rows.split(lookup.lengths.flatten().tolist())
    pooled = [p.mean(0) if len(p) else rows.new_zeros(rows.shape[1]) for p in parts]
    return torch.stack(pooled).view(*lookup.lengths.shape, -1) if pooled else rows.new_zeros(*lookup.lengths.shape, 4)


def loss_of(rows: EmbeddedRows, batch: TaskBatch) -> torch.Tensor:
    total = sum(w.sum() * 0 for w in rows.weights.values())
    for scale, examples, lookups in ((1.0, batch.support, rows.support), (0.7, batch.query, rows.query)):
        for name, lookup in lookups.items():
            value = look_up(rows.weights, lookup)
            # weights near 1: large ones would make the steps chaotic, and rounding grow
            weight = (1 + torch.arange(value.shape[-1], dtype=value.dtype) / 8) * scale * len(name) / 5
            total = total + ((value * weight).sin().sum(-1) * examples.mask).sum()
    return total / batch.num_tasks_global


def make(mesh: Mesh, optimizer: str, dtype: torch.dtype = torch.float64) -> ShardedTables:
    return ShardedTables(SPECS, mesh=mesh, seed=5, init_std=0.5, dtype=dtype, optimizer=optimizer)


# ways to exchange rows: the product's, and those of the study
EXCHANGES = {
    "product": RowExchange,
    "ids in the step": lambda *given: IdsInStep(RowExchange(*given)),
    "separate": partial(NaiveExchange, separate=True),
    "copies": partial(NaiveExchange, dedup=False),
    "separate copies": partial(NaiveExchange, separate=True, dedup=False),
}


def exchange_of(tables: ShardedTables, mesh: Mesh, wire: torch.dtype | None = None, how: str = "product") -> Exchange:
    return EXCHANGES[how](tables.fused, mesh, wire)


def routed_of(exchange: Exchange, batch: TaskBatch):
    return exchange.exchange_ids(exchange.request(batch.support, batch.query))


def train(
    mesh: Mesh, optimizer: str, steps: int, how: str = "product"
) -> tuple[dict[str, torch.Tensor], list[float], list[float]]:
    """Tables of all workers after `steps`, losses of this rank's tasks, and gradient norms."""
    tables = make(mesh, optimizer)
    sparse = SparseOptimizer(optimizer, lr=0.3, weight_decay=0.1)
    exchange, losses, norms = exchange_of(tables, mesh, how=how), [], []
    for step in range(steps):
        batch = batch_of(mesh, step)
        routed = routed_of(exchange, batch)
        rows = exchange.fetch(routed)
        loss = loss_of(rows, batch)
        loss.backward()
        gradients = exchange.return_gradients(routed, rows)
        norms.append(global_norm(torch.zeros((), dtype=torch.float64), gradients, mesh).item())
        sparse.step(tables.fused, gradients)
        losses.append(loss.item())
    state = tables.state_dict()
    whole = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()}
    return whole, losses, norms


def sgd_reference(steps: int) -> dict[str, torch.Tensor]:
    """Plain autograd and SGD on one whole tensor a table."""
    tables = make(Mesh(), "sgd")
    weights = {}
    for table in tables.fused.values():
        for spec in table.specs:
            where = table.permutation.forward(torch.arange(spec.num_ids) + table.offsets[spec.name])
            weights[spec.name] = table.weight[where]
    for step in range(steps):
        batch = batch_of(Mesh(), step)
        leaves = {name: w.clone().requires_grad_() for name, w in weights.items()}
        lookups = {}
        touched: dict[str, set[int]] = {name: set() for name in weights}
        for which, examples in (("support", batch.support), ("query", batch.query)):
            lookups[which] = {}
            for spec, (feature, pooling) in ((s, f) for s in SPECS for f in s.features.items()):
                if pooling is None:
                    ids = examples.ids[feature]
                    lookups[which][feature] = Lookup(spec.name, ids)
                    touched[spec.name] |= set(ids[examples.mask].tolist())
                else:
                    bag = examples.bags[feature]
                    lookups[which][feature] = Lookup(spec.name, bag.values, bag.lengths, pooling)
                    touched[spec.name] |= set(bag.values.tolist())
        loss_of(EmbeddedRows(leaves, lookups["support"], lookups["query"]), batch).backward()
        for name, leaf in leaves.items():
            rows = sorted(touched[name])
            weights[name][rows] = weights[name][rows] * (1 - 0.3 * 0.1) - 0.3 * leaf.grad[rows]
    return weights


def test_one_worker_matches_plain_autograd():
    whole, _, _ = train(Mesh(), "sgd", 4)
    tables = make(Mesh(), "sgd")
    for name, weight in sgd_reference(4).items():
        table = next(t for t in tables.fused.values() if name in t.offsets)
        where = table.permutation.forward(torch.arange(len(weight)) + table.offsets[name])
        torch.testing.assert_close(whole[f"{table.name}.weight"][where], weight, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("optimizer", list(STATE))
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_workers_agree_with_one(world, optimizer):
    ((expected, expected_losses, expected_norms),) = run_ranks(1, train, optimizer, 5)
    results = run_ranks(world, train, optimizer, 5)
    assert [sum(losses) for losses in zip(*(r[1] for r in results), strict=True)] == pytest.approx(
        expected_losses, rel=1e-12
    )
    for whole, _, norms in results:
        assert norms == pytest.approx(expected_norms, rel=1e-12)
        for name, value in expected.items():
            torch.testing.assert_close(whole[name], value, rtol=1e-12, atol=1e-12)


def test_two_runs_are_bitwise_equal():
    first, second = run_ranks(4, train, "adam", 3), run_ranks(4, train, "adam", 3)
    for (one, losses, _), (two, again, _) in zip(first, second, strict=True):
        assert losses == again
        assert all(torch.equal(one[name], two[name]) for name in one)


def exchange_nothing(mesh: Mesh, how: str) -> None:
    tables = make(mesh, "adam")
    before = {name: table.weight.clone() for name, table in tables.fused.items()}
    batch = batch_of(mesh, 0)
    nothing = slice(0, 0)
    batch = replace(batch, support=cut(batch.support, nothing), query=cut(batch.query, nothing), task_id=torch.zeros(0))
    exchange = exchange_of(tables, mesh, how=how)
    routed = routed_of(exchange, batch)
    rows = exchange.fetch(routed)
    assert {name: tuple(w.shape) for name, w in rows.weights.items()} == {"d2": (1, 2), "d4": (1, 4)}
    loss_of(rows, batch).backward()
    gradients = exchange.return_gradients(routed, rows)
    assert all(g.rows.numel() == 0 and g.grad.shape[0] == 0 for g in gradients.values())
    SparseOptimizer("adam", lr=1.0, weight_decay=1.0).step(tables.fused, gradients)
    assert all(torch.equal(table.weight, before[name]) for name, table in tables.fused.items())


@pytest.mark.parametrize("how", EXCHANGES)
@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_batch_without_rows_changes_nothing(world, how):
    run_ranks(world, exchange_nothing, how)


def test_naive_ways_refuse_to_drop_late_tasks():
    """They return all rows, and must not pass over a mark of those that were used."""
    tables, batch = make(Mesh(), "sgd"), batch_of(Mesh(), 0)
    exchange = exchange_of(tables, Mesh(), how="separate")
    routed = routed_of(exchange, batch)
    rows = exchange.fetch(routed)
    used = {name: torch.ones(len(weight), dtype=torch.bool) for name, weight in rows.weights.items()}
    with pytest.raises(ValueError, match="late tasks cannot be dropped"):
        exchange.return_gradients(routed, rows, used)


NODES = [(2, 0), (4, 2), pytest.param(4, 0, marks=pytest.mark.slow)]  # workers, workers of a node


def train_in(mesh: Mesh, how: str) -> dict[str, torch.Tensor]:
    return train(mesh, "adam", 4, how)[0]


@pytest.mark.parametrize("how", EXCHANGES)
@pytest.mark.parametrize(("world", "node_size"), [(1, 0), *NODES])
def test_every_way_to_exchange_trains_the_same_rows(world, node_size, how):
    (expected,) = run_ranks(1, train_in, "product")
    for whole in run_ranks(world, train_in, how, node_size=node_size):
        for name, value in expected.items():
            torch.testing.assert_close(whole[name], value, rtol=1e-12, atol=1e-12)


def exchanged(mesh: Mesh, wire: torch.dtype | None) -> dict[str, torch.Tensor]:
    """Rows as support and query read them, then every worker's summed gradients."""
    tables = make(mesh, "sgd")
    batch = batch_of(mesh, 0)
    exchange = exchange_of(tables, mesh, wire)
    routed = routed_of(exchange, batch)
    rows = exchange.fetch(routed)
    read = {f"{name}.rows": rows.weights[name].detach() for name in rows.weights}
    ids = {
        f"{lookup.table}.{which}.{name}": lookup.index
        for which, lookups in (("support", rows.support), ("query", rows.query))
        for name, lookup in lookups.items()
    }
    values = {name: read[f"{name.split('.')[0]}.rows"][index] for name, index in ids.items()}
    loss_of(rows, batch).backward()
    home = exchange.return_gradients(routed, rows)
    start = {name: tables.fused[name].local_range(mesh.rank).start for name in home}
    return values | {f"home.{n}": torch.cat([(g.rows + start[n])[:, None], g.grad], 1) for n, g in home.items()}


def test_two_levels_fetch_the_same_bits_and_return_the_same_sums():
    one, two = run_ranks(4, exchanged, None), run_ranks(4, exchanged, None, node_size=2)
    for ours, theirs in zip(two, one, strict=True):
        for name, value in theirs.items():
            if name.startswith("home."):
                torch.testing.assert_close(ours[name], value, rtol=1e-12, atol=1e-12)
            else:
                assert torch.equal(ours[name], value), name


@pytest.mark.parametrize(("wire", "tolerance"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
@pytest.mark.parametrize(("world", "node_size"), [(1, 0), *NODES])
def test_a_short_wire_type_rounds_rows_and_gradients_once_a_hop(world, node_size, wire, tolerance):
    """Rows: the table's, rounded, whoever owns them. Gradients: within half a unit of the type, per worker and hop."""
    exact, rounded = (run_ranks(world, exchanged, w, node_size=node_size) for w in (None, wire))
    off = 0.0
    for ours, theirs in zip(rounded, exact, strict=True):
        for name, value in theirs.items():
            if not name.startswith("home."):
                assert torch.equal(ours[name], value.to(wire).to(value.dtype)), name
                continue
            assert torch.equal(ours[name][:, 0], value[:, 0])
            error = (ours[name] - value)[:, 1:].abs()
            off = max(off, float(error.max())) if error.numel() else off
            # rounded rows change the gradients too: the loss bends by less than 1
            assert (error <= 8 * tolerance * (0.1 + value[:, 1:].abs().amax(1, keepdim=True))).all()
    assert off > 0


@pytest.mark.parametrize("scale", [1e-30, 1e-7, 1.0, 1e30])
def test_fp16_gradients_neither_vanish_nor_overflow(scale):
    tables = make(Mesh(), "sgd", torch.float32)
    batch = batch_of(Mesh(), 0)
    exchange = exchange_of(tables, Mesh(), torch.float16)
    routed = routed_of(exchange, batch)
    rows = exchange.fetch(routed)
    for weight in rows.weights.values():
        weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * scale
    home = exchange.return_gradients(routed, rows)
    for name, weight in rows.weights.items():
        largest = weight.grad.abs().amax(1, keepdim=True)
        assert ((home[name].grad - weight.grad).abs() <= 2**-11 * largest).all()
    weight.grad[0, 0], weight.grad[1, 0] = float("inf"), float("nan")
    home = exchange.return_gradients(routed, rows)[name].grad
    assert home[0, 0].isinf()
    assert home[1, 0].isnan()


def traffic(mesh: Mesh, how: str, wire: torch.dtype | None = None) -> tuple[CommStats, CommStats, dict[str, int]]:
    """Counted and predicted of one exchange, and the rows that this rank needs of each fused table."""
    tables = make(mesh, "sgd", torch.float32)
    batch = batch_of(mesh, 0)
    exchange = exchange_of(tables, mesh, wire, how)
    routed = routed_of(exchange, batch)
    exchange.return_gradients(routed, exchange.fetch(routed))
    return routed.traffic, exchange.expected_traffic(routed), wanted(tables, batch, how)


def wanted(tables: ShardedTables, batch: TaskBatch, how: str) -> dict[str, int]:
    """Rows to ask for of each fused table, counted the plain way."""
    out = {}
    for name, table in tables.fused.items():
        sides: list[list[int]] = []
        for examples in (batch.support, batch.query):
            keys: list[int] = []
            for feature in table.features:
                one = table.pooling(feature) is None
                ids = examples.ids[feature][examples.mask] if one else examples.bags[feature].values
                keys += (ids + table.offset(feature)).tolist()
            sides.append(keys)
        sides = sides if "separate" in how else [sides[0] + sides[1]]
        out[name] = sum(len(keys if "copies" in how else set(keys)) for keys in sides)
    return out


@pytest.mark.parametrize(
    ("how", "wire"), [*product(EXCHANGES, [None]), ("product", torch.bfloat16), ("product", torch.float16)]
)
@pytest.mark.parametrize(("world", "node_size"), [(1, 0), *NODES])
def test_counted_bytes_are_the_formula(world, node_size, how, wire):
    for counted, predicted, asked in run_ranks(world, traffic, how, wire, node_size=node_size):
        assert counted.record() == predicted.record()
        if world == 1:
            assert not any(kind["calls"] for kind in counted.record().values())
        if world == 1 or node_size:  # the second level's rows are those of the node
            continue
        size, extra = (4, 0) if wire is None else (2, 2 * (wire == torch.float16))
        assert counted.ids.bytes == 8 * sum(asked.values())
        assert counted.rows.bytes == size * (2 * asked["d2"] + 4 * asked["d4"])
        assert counted.gradients.bytes == counted.rows.bytes + extra * sum(asked.values())
        exchanges = 4 if "separate" in how else 2
        assert counted.counts.calls == 1
        assert counted.counts.bytes == world * 8 * exchanges
        assert (counted.ids.calls, counted.rows.calls, counted.gradients.calls) == (exchanges,) * 3


def between_nodes(mesh: Mesh) -> dict[str, float]:
    counted = traffic(mesh, "product")[0]
    node = mesh.rank // 2
    return {
        kind: sum(size for rank, size in getattr(counted, kind).by_rank.items() if rank // 2 != node)
        for kind in ("ids", "rows", "gradients")
    }


def test_two_levels_carry_shared_rows_between_nodes_once():
    one, two = run_ranks(4, between_nodes), run_ranks(4, between_nodes, node_size=2)
    for kind in ("ids", "rows", "gradients"):
        assert 0 < sum(rank[kind] for rank in two) < sum(rank[kind] for rank in one)


# requests


@pytest.mark.parametrize("asked", [("support", "query"), ("support",), ("query",)])
def test_each_row_is_asked_once_and_padding_asks_for_nothing(asked):
    """The request of both sides, and that of one alone."""
    tables = make(Mesh(world_size=4), "sgd")
    batch = batch_of(Mesh(), 1)
    sides = {name: getattr(batch, name) for name in asked}
    request = request_rows(tables.fused, **sides)
    for name, table in tables.fused.items():
        needed = {
            int(key)
            for examples in sides.values()
            for feature in table.features
            for key in table.offset(feature)
            + (
                examples.ids[feature][examples.mask]
                if table.pooling(feature) is None
                else examples.bags[feature].values
            )
        }
        rows = request.rows[name]
        assert sorted(table.permutation.inverse(rows).tolist()) == sorted(needed)
        assert torch.equal(rows, rows.sort().values)
        assert request.num_rows[name] == len(needed)
    for side in ("support", "query"):
        assert set(getattr(request, side)) == ({"user", "item", "history", "city"} if side in asked else set())


@pytest.mark.parametrize("side", ["support", "query"])
def test_positions_name_the_physical_rows(side):
    """A position of a lookup is that of the row in the request, and in what is fetched."""
    tables, batch = make(Mesh(), "sgd"), batch_of(Mesh(), 1)
    exchange = exchange_of(tables, Mesh())
    request = exchange.request(**{side: getattr(batch, side)})
    rows = exchange.fetch(exchange.exchange_ids(request))
    examples, table = getattr(batch, side), tables.fused["d4"]
    for feature in ("user", "item"):
        keys = examples.ids[feature][examples.mask] + table.offset(feature)
        position = getattr(request, side)[feature].index[examples.mask]
        assert torch.equal(request.rows["d4"][position], table.permutation.forward(keys))
        assert torch.equal(rows.weights["d4"][position], table.weight[table.permutation.forward(keys)])


@pytest.mark.parametrize("bad", [-1, 9])
@pytest.mark.parametrize("feature", ["item", "history"])
def test_an_id_outside_its_table_is_named(feature, bad):
    batch = batch_of(Mesh(), 0)
    if feature == "item":
        batch.query.ids["item"][0, 0] = bad
    else:
        batch.query.bags["history"].values[0] = bad
    with pytest.raises(ValueError, match=rf"'{feature}' has the id {bad}, but its table 'item' has the ids 0 to 8"):
        request_rows(make(Mesh(), "sgd").fused, batch.support, batch.query)


@pytest.mark.parametrize("feature", ["item", "history"])
def test_a_feature_missing_from_the_batch_is_named(feature):
    batch = batch_of(Mesh(), 0)
    (batch.support.ids if feature == "item" else batch.support.bags).pop(feature)
    with pytest.raises(ValueError, match=f"no .*-valued feature '{feature}'"):
        request_rows(make(Mesh(), "sgd").fused, batch.support, batch.query)


# checkpoints of sharded tables


def save(mesh: Mesh, path: str) -> None:
    tables = make(mesh, "adam")
    for table in tables.fused.values():
        table.state["steps"].copy_(torch.tensor(table.local_range(mesh.rank)))
    dcp.save(
        tables.state_dict(),
        storage_writer=HuggingFaceStorageWriter(path, save_distributed=True),
        process_group=mesh.control_group,
        no_dist=mesh.control_group is None,
    )


def load(mesh: Mesh, path: str) -> None:
    expected = make(Mesh(), "adam").fused
    tables = make(mesh, "adam")
    for table in tables.fused.values():
        table.weight.zero_()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is", category=UserWarning)
        dcp.load(
            tables.state_dict(),
            storage_reader=HuggingFaceStorageReader(path),
            process_group=mesh.control_group,
            no_dist=mesh.control_group is None,
        )
    for name, table in tables.fused.items():
        mine = table.local_range(mesh.rank)
        assert torch.equal(table.weight, expected[name].weight[mine.start : mine.stop])
        assert table.state["steps"].tolist() == list(mine)


def test_tables_saved_on_two_workers_load_on_any_number(tmp_path: Path):
    run_ranks(2, save, str(tmp_path))
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    for world in (1, 2, 4):
        run_ranks(world, load, str(tmp_path))
