"""Models that read sequences value by value: bundles, the server, exported graphs, and the packs of later days."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from commands import gmeta
from histories import WIDE, history_pack, history_rows
from serving import Client, with_client

import gmeta as package
from gmeta.config.delivery import BundleConfig
from gmeta.core.batch import TaskBatch, mask_of
from gmeta.data.pack import open_pack
from gmeta.delivery.bundle import make_bundle
from gmeta.runs.directory import read_schema
from gmeta.runs.translation import translation_of
from gmeta.serving.export_graphs import Unadapted, require_exportable_model, trace


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack, a run on it and its bundle."""
    folder = tmp_path_factory.mktemp("served")
    pack = history_pack(folder, WIDE)
    config: dict[str, Any] = {"pack": str(pack), "run_dir": str(folder / "run"), "loader": {"tasks_per_batch": 20}}
    config |= {"schedule": {"epochs": 2}, "embedding": {"init_std": 0.5}, "model": {"name": "din"}}
    config |= {"meta": {"adapt": ["decision"], "inner_lr": 0.2}}
    make_bundle(BundleConfig(run_dir=str(package.train(config).path), out=str(folder / "bundle"), training=True))
    return folder


def support_and_query(num_users: int = 3) -> tuple[pa.Table, pa.Table]:
    rows = pa.table(history_rows(num_users, 12, seed=5, first_user=900))
    early = np.tile(np.arange(12) < 8, num_users)
    return rows.filter(pa.array(early)), rows.filter(pa.array(~early)).drop_columns(["click"])


def test_a_bundle_scores_as_its_run(folder: Path) -> None:
    support, query = support_and_query()
    expected = package.load(folder / "run").adapt(support).predict(query)
    for mapped in (False, True):
        found = package.load(folder / "bundle", mapped=mapped).adapt(support).predict(query)
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_state_is_restored(folder: Path) -> None:
    support, query = support_and_query()
    rec = package.load(folder / "bundle")
    users = rec.adapt(support)
    assert rec.restore(users.state()).predict(query).tolist() == users.predict(query).tolist()


def test_the_server_answers_as_predict_does(folder: Path) -> None:
    """Requests of several tasks, whose histories have other lengths than those beside them."""
    support, query = support_and_query()
    expected = package.load(folder / "bundle").adapt(support).predict(query)
    tasks = []
    for user in dict.fromkeys(support["user"].to_pylist()):
        own = [table.filter(pc.equal(table["user"], user)) for table in (support, query)]
        parts = [table.drop_columns(["user", "time"]).to_pydict() for table in own]
        tasks.append({"key": user, "support": parts[0], "candidates": parts[1]})

    async def work(client: Client) -> list[float]:
        found: list[float] = []
        together = await client.score(*tasks)
        assert together.status_code == 200, together.text
        for task, scored in zip(tasks, together.json()["tasks"], strict=True):
            alone = await client.score(task)
            assert alone.json()["tasks"][0]["scores"] == pytest.approx(scored["scores"], abs=1e-6)
            found += scored["scores"]
        odd = {**tasks[0], "candidates": {**tasks[0]["candidates"], "gaps": [[1.0] * 9] * 4}}
        refused = await client.score(odd)
        assert refused.status_code == 422
        assert "has not as many values as 'last'" in refused.text
        return found

    np.testing.assert_allclose(with_client(folder / "bundle", work), expected, atol=1e-6)


def test_numbers_of_other_means_are_counted_anew(folder: Path, tmp_path: Path) -> None:
    """A full version has means of its own; an older version reads its rows all the same."""
    rows = history_rows()
    other = history_pack(tmp_path, WIDE, gaps=[[2 * gap + 3 for gap in gaps] for gaps in rows["gaps"]])
    pack = open_pack(other)
    old, new = read_schema(folder / "run")[0].numeric_sequence[0], pack.schema.numeric_sequence[0]
    assert abs(old.mean - new.mean) > 0.1
    split = pack.split("train")
    support, query, task_id = split.examples(np.arange(3))
    batch = TaskBatch(support, query, task_id, 3, 0, 0)
    found = translation_of(folder / "run", pack)(batch).support.given
    mask = found[mask_of("gaps")]
    raw = batch.support.given["gaps"][mask] * new.std + new.mean
    torch.testing.assert_close(found["gaps"][mask], (raw - old.mean) / old.std, rtol=1e-4, atol=1e-5)
    assert not found["gaps"][~mask].any()


def test_a_later_day_brings_the_histories_of_its_tasks(folder: Path, tmp_path: Path) -> None:
    """The support of a known task begins with its older rows, sequences and all."""
    rows = history_rows(3, 12, seed=9)  # users of the first pack
    rows["time"] = [time + 20_000 for time in rows["time"]]
    pq.write_table(pa.table(rows), tmp_path / "day.parquet")
    words = ["--input", tmp_path / "day.parquet", "--base", folder / "pack", "--out", tmp_path / "pack"]
    gmeta("prepare", *words, "--history_rows", 5)
    before, after = open_pack(folder / "pack"), open_pack(tmp_path / "pack")
    assert after.schema.numeric_sequence == before.schema.numeric_sequence
    keys = {}
    for pack in (before, after):
        listed = pq.read_table(pack.tasks_file()).to_pydict()
        keys[pack] = dict(zip(listed["key"], listed["task_id"], strict=True))
    compared = 0
    for name in after.splits:
        split = after.split(name)
        for position, task in enumerate(split.task_id.tolist()):
            key = next(k for k, v in keys[after].items() if v == task)
            old = before.split(name)
            (where,) = np.flatnonzero(old.task_id == keys[before][key])
            first, _, _ = old.examples(np.array([where]))
            _, old_query, _ = old.examples(np.array([where]))
            now, _, _ = split.examples(np.array([position]))
            for column in ("last", "kinds"):  # the last five rows of the first pack are a query of four, and one more
                bag, source = now.bags[column], old_query.bags[column]
                start = int(bag.lengths[0, :1].sum())
                assert bag.values[start : start + len(source.values)].equal(source.values)
            assert now.given["gaps"][0, 1:5][now.given["gaps.mask"][0, 1:5]].equal(
                old_query.given["gaps"][0][old_query.given["gaps.mask"][0]]
            )
            assert first.mask.any()
            compared += 1
    assert compared == 3


def test_an_exported_graph_of_sequences(folder: Path, tmp_path: Path) -> None:
    """`last` and `kinds` share a length; numbers that examples carry have no input yet, and are refused by name."""
    with pytest.raises(ValueError, match="the model reads 'gaps'"):
        require_exportable_model(package.load(folder / "bundle"))
    config: dict[str, Any] = {"pack": str(folder / "pack"), "run_dir": str(tmp_path / "run")}
    config |= {"loader": {"tasks_per_batch": 20}, "schedule": {"epochs": 1}, "meta": {"adapt": ["head"]}}
    config |= {"model": {"name": "din", "features": ["item", "place", "last", "kinds"]}}
    rec = package.load(package.train(config).path)
    graph = Unadapted(rec)
    names = [one.name for one in graph.inputs]
    program = trace(graph, "din").module()
    _, query, _ = open_pack(folder / "pack").split("valid").examples(np.arange(2))
    query = rec.system.examples(query)
    expected = rec._score(rec._without_support(2), query)
    given: dict[str, torch.Tensor] = {"dense": query.dense.flatten(0, 1)}
    for name, ids in query.ids.items():
        given[f"ids_{name}"] = ids.flatten()
    for name, bag in query.bags.items():
        lengths = bag.lengths.flatten()
        padded = torch.zeros(len(lengths), int(lengths.max()), dtype=torch.int64)
        padded[torch.arange(padded.shape[1]) < lengths[:, None]] = bag.values
        given |= {f"ids_{name}": padded, f"lengths_{name}": lengths}
    logit, _ = program(*(given[name] for name in names))
    torch.testing.assert_close(logit.view(query.mask.shape)[query.mask], expected[query.mask], atol=1e-5, rtol=1e-5)
