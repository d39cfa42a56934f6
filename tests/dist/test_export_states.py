"""`gmeta export-states`: adapted tasks as rows of a file, which a loaded model restores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from commands import fails, gmeta
from harness import run_ranks
from packs import make_pack
from packs import user_rows as rows

import gmeta as api
from gmeta.config.export import ExportStatesConfig
from gmeta.data.prepare import parts
from gmeta.parallel.mesh import Mesh
from gmeta.serving.export_states import export_states_on, read_states

SETTINGS: dict[str, dict[str, Any]] = {
    "melu": {"meta": {"inner_steps": 2, "inner_lr": 0.5}},
    "taste": {"model": {"name": "taste", "args": {"task_features": ["group"]}}, "meta": {"inner_lr": 0.5}},
    "embeddings": {"meta": {"adapt": ["embeddings"], "inner_lr": 2.0, "order": "first"}},
    "modulated": {"meta": {"adapt": ["head"], "modulation": "film", "inner_lr": 0.5}},
    "reference": {"meta": {"engine": "reference", "inner_lr": 0.5}},
    "solved": {"model": {"name": "neural_linear"}, "meta": {"adapt": ["last_layer"]}},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each of `SETTINGS`."""
    place = tmp_path_factory.mktemp("states")
    pack, trained = make_pack(place / "pack"), {}
    for name, values in SETTINGS.items():
        config = {"pack": str(pack), "run_dir": str(place / name), "loader": {"tasks_per_batch": 20}, **values}
        config |= {"schedule": {"epochs": 1}, "embedding": {"init_std": 0.5}}
        trained[name] = api.train({"model": {"name": "melu"}, **config}).path
    return trained


def ragged_support() -> pa.Table:
    """Users with 1 to 5 rows."""
    table = rows(30, 5, 1, label=True)
    return table.filter(pa.array(np.random.default_rng(0).random(table.num_rows) < 0.7))


@pytest.fixture
def support(tmp_path: Path) -> Path:
    pq.write_table(ragged_support(), tmp_path / "support.parquet")
    return tmp_path / "support.parquet"


def exported(mesh: Mesh, config: ExportStatesConfig) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "PART_ROWS", 30)
        export_states_on(config, mesh)


@pytest.mark.parametrize("name", SETTINGS)
def test_restored_states_score_as_the_adapted_tasks_do(runs: dict[str, Path], support: Path, name: str) -> None:
    out = support.with_name("states.parquet")
    exported(Mesh(), ExportStatesConfig(run_dir=str(runs[name]), support=str(support), out=str(out)))
    rec, candidates = api.load(runs[name]), rows(35, 3, 2, label=False)
    users = rec.adapt(pq.read_table(support))
    restored = rec.restore(read_states(out))
    assert sorted(restored.keys) == sorted(users.keys)
    counts = dict(zip(users.keys, users.num_support.tolist(), strict=True))
    assert dict(zip(restored.keys, restored.num_support.tolist(), strict=True)) == counts
    np.testing.assert_allclose(restored.predict(candidates), users.predict(candidates), atol=1e-6)
    some = rec.restore(read_states(out, ["new3", "new4", "nobody"]))
    assert sorted(some.keys) == ["new3", "new4"]
    theirs = candidates.filter(pa.array(np.isin(candidates["user"].to_pylist(), some.keys)))
    np.testing.assert_allclose(some.predict(theirs), users.predict(theirs), atol=1e-6)
    assert np.abs(users.predict(theirs) - rec.adapt({}).predict(theirs)).max() > 1e-5


def test_padding_is_not_stored(runs: dict[str, Path], support: Path) -> None:
    out = support.with_name("states.parquet")
    exported(Mesh(), ExportStatesConfig(run_dir=str(runs["melu"]), support=str(support), out=str(out)))
    table = pq.read_table(out)
    known = json.loads(table.schema.metadata[b"gmeta"])
    assert {"user", "num_support", "version", *known["tensors"]} == set(table.column_names)
    (column,) = [name for name in known["tensors"] if name.startswith('["inputs", 0, "output.weight"')]
    lengths = [len(values) // 64 for values in table[column].to_pylist()]
    assert lengths == table["num_support"].to_pylist()
    assert len(set(lengths)) > 2


@pytest.mark.dist
def test_any_number_of_ranks_writes_the_same_bytes(runs: dict[str, Path], support: Path) -> None:
    for nproc in (1, 2):
        config = ExportStatesConfig(
            run_dir=str(runs["melu"]), support=str(support), out=str(support.with_name(f"{nproc}.parquet"))
        )
        run_ranks(nproc, exported, config)
    assert support.with_name("1.parquet").read_bytes() == support.with_name("2.parquet").read_bytes()
    assert len(list(support.parent.iterdir())) == 3


def test_vectors_are_the_posterior_means(runs: dict[str, Path], support: Path) -> None:
    out = support.with_name("vectors.parquet")
    gmeta("export-states", "--run_dir", runs["solved"], "--support", support, "--out", out, "--format", "vectors")
    table, rec = pq.read_table(out), api.load(runs["solved"])
    users = rec.adapt(pq.read_table(support))
    mean = torch.cat([part.posterior.mean for part in users.parts])  # type: ignore[union-attr]
    order = [users.keys.index(key) for key in table["user"].to_pylist()]
    assert table.schema.field("mean").type == pa.list_(pa.float32(), mean.shape[1])
    np.testing.assert_allclose(np.stack(table["mean"].to_numpy()), mean[order], atol=1e-6)
    assert set(table["version"].to_pylist()) == {rec.version}
    with pytest.raises(ValueError, match="without their spread: export --format states"):
        read_states(out)


def test_mistakes(runs: dict[str, Path], support: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = support.parent
    words = ["export-states", "--run_dir", runs["melu"], "--support", support, "--out"]
    fails([*words, folder / "v.parquet", "--format", "vectors"], capsys, "solves for no last layer", "--format states")
    fails([*words, support], capsys, f"would overwrite support {support}")
    fails([*words, folder / "states.csv"], capsys, "must end in .parquet")
    fails([*words, support / "states.parquet"], capsys, "cannot write")
    pq.write_table(ragged_support()[:0], folder / "empty.parquet")
    words[4] = folder / "empty.parquet"
    fails([*words, folder / "s.parquet"], capsys, "empty.parquet has no rows: there is nothing to adapt to")
    with pytest.raises(ValueError, match=r"expected gmeta-states up to 1: export the states again"):
        read_states(support)
    assert sorted(path.name for path in folder.iterdir()) == ["empty.parquet", "support.parquet"]


def test_states_of_another_version_are_refused(runs: dict[str, Path], support: Path) -> None:
    out = support.with_name("states.parquet")
    exported(Mesh(), ExportStatesConfig(run_dir=str(runs["melu"]), support=str(support), out=str(out)))
    with pytest.raises(ValueError, match="adapt again"):
        api.load(runs["taste"]).restore(read_states(out))
