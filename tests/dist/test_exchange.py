"""Fetch, return and update on 1, 2 and 4 workers: the same rows, whoever holds them and whoever asks."""

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from harness import run_ranks
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor

from gmeta.batch import Bag, EmbeddedRows, Examples, Lookup, TaskBatch
from gmeta.embedding.exchange import fetch, plan_lookup, return_gradients
from gmeta.embedding.table import STATE, ShardedTables, TableSpec
from gmeta.optim.dense import global_norm
from gmeta.optim.sparse import SparseOptimizer
from gmeta.parallel.collectives import CommStats
from gmeta.parallel.mesh import Mesh

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
    rows = weights[lookup.group][lookup.index]
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


def train(mesh: Mesh, optimizer: str, steps: int) -> tuple[dict[str, torch.Tensor], list[float], list[float]]:
    """Tables of all workers after `steps`, losses of this rank's tasks, and gradient norms."""
    tables = make(mesh, optimizer)
    sparse = SparseOptimizer(optimizer, lr=0.3, weight_decay=0.1)
    losses, norms = [], []
    for step in range(steps):
        batch = batch_of(mesh, step)
        rows, stop = fetch(tables, plan := plan_lookup(tables, batch), mesh)
        assert not stop
        loss = loss_of(rows, batch)
        loss.backward()
        gradients = return_gradients(tables, plan, rows, mesh)
        norms.append(global_norm([], gradients, mesh).item())
        sparse.step(tables, gradients)
        losses.append(loss.item())
    state = tables.state_dict()
    whole = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()}
    return whole, losses, norms


def sgd_reference(steps: int) -> dict[str, torch.Tensor]:
    """Plain autograd and SGD on one whole tensor a table."""
    tables = make(Mesh(), "sgd")
    weights = {}
    for spec in SPECS:
        slot = next(s for s in tables.features.values() if s.table == spec.name)
        where = tables.layouts[slot.group].permutation.forward(torch.arange(spec.num_ids) + slot.offset)
        weights[spec.name] = tables.groups[slot.group].weight[where]
    for step in range(steps):
        batch = batch_of(Mesh(), step)
        leaves = {name: w.clone().requires_grad_() for name, w in weights.items()}
        lookups = {}
        touched: dict[str, set[int]] = {name: set() for name in weights}
        for which, examples in (("support", batch.support), ("query", batch.query)):
            lookups[which] = {}
            for feature, slot in tables.features.items():
                if slot.pooling is None:
                    ids = examples.ids[feature]
                    lookups[which][feature] = Lookup(slot.table, ids)
                    touched[slot.table] |= set(ids[examples.mask].tolist())
                else:
                    bag = examples.bags[feature]
                    lookups[which][feature] = Lookup(slot.table, bag.values, bag.lengths, slot.pooling)
                    touched[slot.table] |= set(bag.values.tolist())
        loss_of(EmbeddedRows(leaves, lookups["support"], lookups["query"]), batch).backward()
        for name, leaf in leaves.items():
            rows = sorted(touched[name])
            weights[name][rows] = weights[name][rows] * (1 - 0.3 * 0.1) - 0.3 * leaf.grad[rows]
    return weights


def test_one_worker_matches_plain_autograd():
    whole, _, _ = train(Mesh(), "sgd", 4)
    tables = make(Mesh(), "sgd")
    for name, weight in sgd_reference(4).items():
        slot = next(s for s in tables.features.values() if s.table == name)
        where = tables.layouts[slot.group].permutation.forward(torch.arange(len(weight)) + slot.offset)
        torch.testing.assert_close(whole[f"{slot.group}.weight"][where], weight, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("optimizer", list(STATE))
@pytest.mark.parametrize("world", [2, 4])
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


def exchange_nothing(mesh: Mesh) -> None:
    tables = make(mesh, "adam")
    before = {name: group.weight.clone() for name, group in tables.groups.items()}
    batch = batch_of(mesh, 0)
    nothing = slice(0, 0)
    batch = replace(batch, support=cut(batch.support, nothing), query=cut(batch.query, nothing), task_id=torch.zeros(0))
    plan = plan_lookup(tables, batch)
    rows, _ = fetch(tables, plan, mesh)
    assert {name: tuple(w.shape) for name, w in rows.weights.items()} == {"d2": (1, 2), "d4": (1, 4)}
    loss_of(rows, batch).backward()
    gradients = return_gradients(tables, plan, rows, mesh)
    assert all(g.rows.numel() == 0 and g.grad.shape[0] == 0 for g in gradients.values())
    SparseOptimizer("adam", lr=1.0, weight_decay=1.0).step(tables, gradients)
    assert all(torch.equal(group.weight, before[name]) for name, group in tables.groups.items())


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_batch_without_rows_changes_nothing(world):
    run_ranks(world, exchange_nothing)


def ask_to_stop(mesh: Mesh, who: int | None) -> bool:
    tables = make(mesh, "sgd")
    return fetch(tables, plan_lookup(tables, batch_of(mesh, 0)), mesh, stop=mesh.rank == who)[1]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_stop_flag_reaches_every_rank(world):
    assert run_ranks(world, ask_to_stop, None) == [False] * world
    assert run_ranks(world, ask_to_stop, world - 1) == [True] * world


def traffic(mesh: Mesh) -> tuple[dict[str, int], CommStats]:
    tables = make(mesh, "sgd", torch.float32)
    plan = plan_lookup(tables, batch_of(mesh, 0))
    stats = CommStats()
    rows, _ = fetch(tables, plan, mesh, stats=stats)
    return_gradients(tables, plan, rows, mesh, stats=stats)
    rows_remote = sum(sum(g.counts) - g.counts[mesh.rank] for g in plan.groups.values())
    assert stats.ids.remote_bytes == 8 * rows_remote
    return {name: g.rows.numel() for name, g in plan.groups.items()}, stats


@pytest.mark.parametrize("world", [1, 2, 4])
def test_counted_bytes_are_the_formula(world):
    for unique, stats in run_ranks(world, traffic):
        assert stats.ids.bytes == sum(8 * u for u in unique.values())
        assert stats.rows.bytes == stats.gradients.bytes == 4 * (2 * unique["d2"] + 4 * unique["d4"])
        assert (stats.counts.calls, stats.ids.calls, stats.rows.calls, stats.gradients.calls) == (1, 2, 2, 2)
        assert stats.counts.bytes == world * 8 * 3
        if world == 1:
            assert stats.rows.remote_bytes == stats.counts.remote_bytes == 0


# plans


def test_each_row_is_asked_once_and_padding_asks_for_nothing():
    tables = make(Mesh(world_size=4), "sgd")
    batch = batch_of(Mesh(), 1)
    plan = plan_lookup(tables, batch)
    needed = {
        (slot.group, int(key))
        for examples in (batch.support, batch.query)
        for feature, slot in tables.features.items()
        for key in slot.offset
        + (examples.ids[feature][examples.mask] if slot.pooling is None else examples.bags[feature].values)
    }
    for name, group in plan.groups.items():
        layout = tables.layouts[name]
        keys = layout.permutation.inverse(group.rows).tolist()
        assert sorted(keys) == sorted(key for where, key in needed if where == name)
        owners = torch.bincount(group.rows // layout.chunk, minlength=4).tolist()
        assert group.counts == owners
        assert torch.equal(group.rows, group.rows.sort().values)


@pytest.mark.parametrize("bad", [-1, 9])
@pytest.mark.parametrize("feature", ["item", "history"])
def test_an_id_outside_its_table_is_named(feature, bad):
    batch = batch_of(Mesh(), 0)
    if feature == "item":
        batch.query.ids["item"][0, 0] = bad
    else:
        batch.query.bags["history"].values[0] = bad
    with pytest.raises(ValueError, match=rf"'{feature}' has the id {bad}, but its table 'item' has the ids 0 to 8"):
        plan_lookup(make(Mesh(), "sgd"), batch)


@pytest.mark.parametrize("feature", ["item", "history"])
def test_a_feature_missing_from_the_batch_is_named(feature):
    batch = batch_of(Mesh(), 0)
    (batch.support.ids if feature == "item" else batch.support.bags).pop(feature)
    with pytest.raises(ValueError, match=f"no .*-valued feature '{feature}'"):
        plan_lookup(make(Mesh(), "sgd"), batch)


# checkpoints of sharded tables


def save(mesh: Mesh, path: str) -> None:
    tables = make(mesh, "adam")
    for name, group in tables.groups.items():
        group.state["steps"].copy_(torch.tensor(tables.layouts[name].local_range(mesh.rank)))
    dcp.save(
        tables.state_dict(),
        storage_writer=HuggingFaceStorageWriter(path, save_distributed=True),
        process_group=mesh.control_group,
        no_dist=mesh.control_group is None,
    )


def load(mesh: Mesh, path: str) -> None:
    expected = make(Mesh(), "adam").groups
    tables = make(mesh, "adam")
    for group in tables.groups.values():
        group.weight.zero_()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is", category=UserWarning)
        dcp.load(
            tables.state_dict(),
            storage_reader=HuggingFaceStorageReader(path),
            process_group=mesh.control_group,
            no_dist=mesh.control_group is None,
        )
    for name, group in tables.groups.items():
        mine = tables.layouts[name].local_range(mesh.rank)
        assert torch.equal(group.weight, expected[name].weight[mine.start : mine.stop])
        assert group.state["steps"].tolist() == list(mine)


def test_tables_saved_on_two_workers_load_on_any_number(tmp_path: Path):
    run_ranks(2, save, str(tmp_path))
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    for world in (1, 2, 4):
        run_ranks(world, load, str(tmp_path))
