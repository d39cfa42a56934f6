import itertools

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gmeta.embedding.permutation import RowPermutation, normal_rows, table_key
from gmeta.embedding.table import STATE, ShardedTables, TableSpec, human_bytes
from gmeta.optim.sparse import UPDATES
from gmeta.parallel.mesh import Mesh


def make(specs, world=1, rank=0, **settings):
    settings = {"seed": 3, "init_std": 0.05, "dtype": torch.float64, "optimizer": "adam", **settings}
    return ShardedTables(specs, mesh=Mesh(rank=rank, world_size=world), **settings)


def initial(ids, dim, table, seed):
    key = np.full(len(ids), table_key(seed, table), dtype=np.uint64).view(np.int64)
    return normal_rows(ids, torch.from_numpy(key), dim)


SPECS = [
    TableSpec("user", 37, 4, {"user": None}),
    TableSpec("item", 11, 4, {"item": None, "history": "mean"}),
    TableSpec("city", 3, 2, {"city": None}),
]


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**40))
@settings(deadline=None, max_examples=60)
def test_permutation_is_a_bijection_and_inverts(size, seed):
    permutation = RowPermutation(size, seed)
    keys = torch.arange(size)
    rows = permutation.forward(keys)
    assert torch.equal(rows.sort().values, keys)
    assert torch.equal(permutation.inverse(rows), keys)


@given(size=st.integers(2**31, 2**61), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=20)
def test_permutation_inverts_on_huge_tables(size, seed):
    permutation = RowPermutation(size, seed)
    keys = torch.randint(size, (50,), generator=torch.Generator().manual_seed(seed))
    rows = permutation.forward(keys)
    assert ((rows >= 0) & (rows < size)).all()
    assert torch.equal(permutation.inverse(rows), keys)


def test_permutation_depends_on_the_seed_and_refuses_nothing_to_permute():
    keys = torch.arange(1000)
    assert not torch.equal(RowPermutation(1000, 0).forward(keys), RowPermutation(1000, 1).forward(keys))
    with pytest.raises(ValueError, match="0 rows"):
        RowPermutation(0, 0)


@pytest.mark.parametrize("world", [2, 4, 8])
def test_rows_and_zipf_load_are_balanced(world):
    size = 100_003
    chunk = -(-size // world)
    generator = torch.Generator().manual_seed(0)
    popularity = 1.0 / torch.arange(1, size + 1, dtype=torch.float64)
    for seed in range(3):
        batches = [torch.multinomial(popularity, 20_000, True, generator=generator).unique() for _ in range(4)]
        rows = RowPermutation(size, seed).forward(torch.cat(batches))
        load = torch.bincount(rows // chunk, minlength=world).double()
        assert (load / load.mean() - 1).abs().max() < 0.1, load
    # contiguous ids without the bijection would not be: the first worker gets most
    assert torch.bincount(batches[0] // chunk).max() > 1.5 * batches[0].numel() / world


def test_initial_rows_are_normal_and_a_function_of_seed_table_and_id():
    ids = torch.arange(20_000)
    rows = initial(ids, 8, "item", 1)
    assert rows.mean().abs() < 0.01
    assert (rows.std(0) - 1).abs().max() < 0.02
    assert (torch.corrcoef(rows.T) - torch.eye(8)).abs().max() < 0.03
    assert (rows[:-1] * rows[1:]).mean().abs() < 0.01
    assert (rows.abs() > 3).double().mean() < 0.005
    assert rows.unique(dim=0).shape[0] == 20_000
    some = torch.tensor([19_999, 5, 77])
    assert torch.equal(initial(some, 8, "item", 1), rows[some])
    assert not torch.equal(initial(some, 8, "user", 1), rows[some])
    assert not torch.equal(initial(some, 8, "item", 2), rows[some])


@pytest.mark.parametrize("world", [1, 2, 3, 4, 60])
def test_shards_of_any_world_size_join_to_the_same_tables(world):
    parts = [make(SPECS, world, rank) for rank in range(world)]
    whole = make(SPECS)
    for name, table in whole.fused.items():
        joined = torch.cat([part.fused[name].weight for part in parts])
        assert torch.equal(joined, table.weight)
        expected = [c.shape[0] for c in torch.chunk(table.weight, world)]
        sizes = [part.fused[name].weight.shape[0] for part in parts]
        assert sizes == expected + [0] * (world - len(expected))  # the rule of Shard(0)


def test_every_id_finds_its_initial_row():
    tables = make(SPECS)
    for table in tables.fused.values():
        for feature, spec in table.features.items():
            ids = torch.arange(spec.num_ids)
            rows = table.permutation.forward(ids + table.offset(feature))
            assert torch.equal(table.weight[rows], initial(ids, spec.dim, spec.name, 3) * 0.05), feature


def test_tables_of_one_width_are_fused():
    tables = make(SPECS)
    assert {name: table.num_rows for name, table in tables.fused.items()} == {"d2": 3, "d4": 48}
    assert {spec.name: spec.num_ids for spec in tables.fused["d4"].specs} == {"user": 37, "item": 11}
    assert tables.fused["d4"].pooling("history") == "mean"


def test_memory_is_reported_before_it_is_allocated():
    tables = make([TableSpec("a", 1_000, 16, {"a": None})], world=4, dtype=torch.float32)
    report = tables.memory_report()
    assert not vars(tables.fused["d16"]).keys() & {"weight", "state"}
    assert (
        "1,000 rows (a 1,000), weights 62.5 KiB, adam state 128.9 KiB" in report
    )  # 16 * 4; 2 * 16 * 4 + 4 bytes a row
    assert "191.4 KiB, 47.9 KiB on each worker" in report


def test_tables_that_do_not_fit_say_how_many_bytes_and_workers(monkeypatch):
    free = 10 * 2**30
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": free}))
    spec = TableSpec("user", 10**9, 16, {"user": None})
    with pytest.raises(ValueError, match=r"need 68,000,000,000 bytes \(63\.3 GiB\)") as caught:
        make([spec], optimizer="rowwise_adagrad", dtype=torch.float32)
    message = str(caught.value)
    assert "9.0 GiB to give" in message
    assert "use at least 8 workers on 8 such machines" in message
    # that many do fit
    make([spec], world=8, optimizer="rowwise_adagrad", dtype=torch.float32)
    with pytest.raises(ValueError, match="8 workers"):
        make([spec], world=7, optimizer="rowwise_adagrad", dtype=torch.float32)


@pytest.mark.parametrize(
    ("specs", "words"),
    [
        ([TableSpec("a", 3, 4, {"x": None}), TableSpec("a", 3, 4, {"y": None})], "given twice"),
        ([TableSpec("a", 3, 4, {"x": None}), TableSpec("b", 3, 2, {"x": None})], "'x' is in the embedding tables"),
        ([TableSpec("a", 0, 4, {"x": None})], "0 x 4"),
    ],
)
def test_specs_that_contradict_are_refused(specs, words):
    with pytest.raises(ValueError, match=words):
        make(specs)


def test_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match="'rmsprop': must be one of sgd"):
        make(SPECS, optimizer="rmsprop")


def test_state_dict_round_trips_and_refuses_another_model():
    ours, theirs = make(SPECS), make(SPECS, seed=4)
    state = {key: value.clone() for key, value in theirs.state_dict().items()}
    assert list(state) == [f"{g}.{k}" for g, k in itertools.product(("d2", "d4"), ("weight", *STATE["adam"]))]
    ours.load_state_dict(state)
    assert torch.equal(ours.fused["d4"].weight, theirs.fused["d4"].weight)
    with pytest.raises(ValueError, match=r"'d4.weight' is of shape \[48, 4\], expected \[37, 4\]"):
        make(SPECS[:1]).load_state_dict(state)
    with pytest.raises(ValueError, match=r"'d4.steps' is missing"):
        ours.load_state_dict({k: v for k, v in state.items() if k != "d4.steps"})


def test_without_an_optimizer_there_is_no_state():
    tables = make(SPECS, optimizer=None)
    assert list(tables.state_dict()) == ["d2.weight", "d4.weight"]
    assert torch.equal(tables.fused["d4"].weight, make(SPECS).fused["d4"].weight)
    assert "state" not in tables.memory_report()


def test_state_is_laid_out_for_every_optimizer():
    assert STATE.keys() == UPDATES.keys()


def test_human_bytes():
    assert [human_bytes(n) for n in (3, 1536, 3 * 2**40)] == ["3 bytes", "1.5 KiB", "3.0 TiB"]
