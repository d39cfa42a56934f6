"""`gmeta bundle`: a version in files that need nothing else, read by one process or by many."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from commands import fails, gmeta, train_words
from harness import run_ranks
from packs import make_pack
from packs import user_rows as rows
from safetensors.torch import load_file

import gmeta as api
from gmeta.data.pack import manifest_checksum
from gmeta.parallel.mesh import Mesh
from gmeta.recommender.build import load_system
from gmeta.runs import bundle as bundles
from gmeta.runs.bundle import is_bundle, open_bundle, part_name


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("bundle")
    words = train_words(make_pack(place / "pack"), place / "run", "--model.embedding_dim", 8, "--precision", "float64")
    gmeta(*words, "--embedding.optimizer", "adam", "--meta.learn_inner_lr", "true")
    return place / "run"


@pytest.fixture(scope="module")
def bundle(run_dir: Path) -> Path:
    """A bundle away from its run, and in parts of a few rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundles, "PART_BYTES", 600)
        gmeta("bundle", "--run_dir", run_dir, "--out", run_dir.parent / "version")
    return run_dir.parent / "version"


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    shutil.copytree(bundle, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_bundle_answers_as_its_run_does(run_dir: Path, bundle: Path, tmp_path: Path) -> None:
    support, candidates = rows(5, 4, 1, label=True), rows(7, 3, 2, label=False)
    ours, theirs = api.load(run_dir), api.load(bundle)
    users = ours.adapt(support)
    expected = users.predict(candidates)
    np.testing.assert_array_equal(theirs.adapt(support).predict(candidates), expected)
    np.testing.assert_array_equal(theirs.restore(users.state()).predict(candidates), expected)
    pq.write_table(support, tmp_path / "support.parquet")
    pq.write_table(candidates, tmp_path / "query.parquet")
    words = ["--support", tmp_path / "support.parquet", "--query", tmp_path / "query.parquet"]
    for source in (run_dir, bundle):
        gmeta("predict", "--run_dir", source, *words, "--out", tmp_path / f"{source.name}.parquet")
    ran, bundled = (pq.read_table(tmp_path / f"{source.name}.parquet") for source in (run_dir, bundle))
    assert ran.equals(bundled)


def test_a_registry_answers_as_its_versions_do(run_dir: Path, bundle: Path, tmp_path: Path) -> None:
    registry, support, candidates = tmp_path / "registry", rows(5, 4, 1, label=True), rows(7, 3, 2, label=False)
    gmeta("publish", "--registry", registry, "--bundle", bundle, "--cache", tmp_path / "cache")
    expected = api.load(run_dir).adapt(support).predict(candidates)
    for name in ("current", "1"):
        found = api.load(f"{registry}/{name}", cache=tmp_path / "cache")
        np.testing.assert_array_equal(found.adapt(support).predict(candidates), expected)
        assert not (found.source / "training").exists()
    with pytest.raises(ValueError, match="has no version 7"):
        api.load(f"{registry}/7", cache=tmp_path / "cache")


def loaded(mesh: Mesh, source: Path) -> dict[str, torch.Tensor]:
    system, _, _ = load_system(source, "best", mesh)
    return {name: tensor.full_tensor() if mesh.row_mesh else tensor for name, tensor in system.table_tensors().items()}


@pytest.mark.parametrize("nproc", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_any_number_of_workers_reads_it(run_dir: Path, bundle: Path, nproc: int) -> None:
    expected = loaded(Mesh(), run_dir)
    for found in run_ranks(nproc, loaded, bundle):
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name


def test_rows_lie_in_the_order_of_ids(run_dir: Path, bundle: Path) -> None:
    system, _, _ = load_system(run_dir, "best", Mesh())
    fused = system.tables.fused["d8"]
    opened = open_bundle(bundle, training=True)
    assert len(list((bundle / "tables").glob("item-*"))) > 1
    for spec in fused.specs:
        ids = torch.arange(spec.num_ids)
        at = fused.permutation.forward(ids + fused.offsets[spec.name])
        assert torch.equal(opened.rows(spec.name, ids.flip(0)), fused.weight[at].flip(0))
        assert opened.rows(spec.name, ids, "exp_avg").shape == (spec.num_ids, 8)
        assert opened.rows(spec.name, ids, "steps").max() > 0
    assert load_file(bundle / "training" / "dense.safetensors").keys() >= {"optimizer.inner_lr.exp_avg"}
    assert json.loads((bundle / "training" / "state.json").read_text())["progress"]["step"] == opened.step


def test_the_same_checkpoint_gives_the_same_bytes(run_dir: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        gmeta("bundle", "--run_dir", run_dir, "--out", tmp_path / name, "--training", "false")
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert not any("training" in str(file) for file in files)
    assert all((tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes() for file in files)
    with pytest.raises(ValueError, match="has no training/ part"):
        open_bundle(tmp_path / "one", training=True)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
@pytest.mark.parametrize("name", ["dense.safetensors", part_name("item", 1), "config.yaml", "vocab/item.parquet"])
def test_damage_is_named(copy: Path, name: str, damage: Callable[[Path], None]) -> None:
    damage(copy / name)
    with pytest.raises(ValueError, match=str(copy / name)):
        open_bundle(copy)


def test_a_file_that_was_not_made_with_it_is_refused(copy: Path) -> None:
    shutil.copy(copy / "dense.safetensors", copy / "more.safetensors")
    with pytest.raises(ValueError, match=r"was not made with more.safetensors: remove that file"):
        open_bundle(copy)


@pytest.mark.parametrize(("kind", "steps"), [("fp16", 2**11), ("int8", 2 * 127)])
def test_rows_may_be_stored_in_fewer_bytes(run_dir: Path, bundle: Path, tmp_path: Path, kind: str, steps: int) -> None:
    out = tmp_path / kind
    gmeta("bundle", "--run_dir", run_dir, "--out", out, "--rows", kind, "--training", "false")
    exact, small = open_bundle(bundle), open_bundle(out)
    ids = torch.arange(39, -1, -1)
    rows_, rounded = exact.rows("item", ids), small.rows("item", ids)
    error = (rows_ - rounded).abs() / rows_.abs().amax(1, keepdim=True)
    assert 0 < error.max() <= 1.01 / steps
    stored = load_file(out / part_name("item", 0))
    assert sum(tensor.nbytes for tensor in stored.values()) == (40 * 8 * 2 if kind == "fp16" else 40 * (8 + 4))
    support, candidates = rows(5, 4, 1, label=True), rows(7, 3, 2, label=False)
    ours, theirs = api.load(bundle), api.load(out)
    assert theirs.version == f"{ours.version}.{kind}"
    users = ours.adapt(support)
    np.testing.assert_allclose(theirs.adapt(support).predict(candidates), users.predict(candidates), atol=0.02)
    with pytest.raises(ValueError, match="adapt again"):
        theirs.restore(users.state())


def test_serving_does_not_open_training(copy: Path) -> None:
    for file in (copy / "training").rglob("*.safetensors"):
        flip(file)
    open_bundle(copy)
    with pytest.raises(ValueError, match="training"):
        open_bundle(copy, training=True)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"version": 3}, "upgrade"),
        ({"format": "other"}, "is of format 'other'"),
        ({"id": "another"}, "is damaged"),
    ],
)
def test_manifests_are_checked(copy: Path, change: dict[str, object], told: str) -> None:
    file = copy / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=told):
        open_bundle(copy)


def resealed(copy: Path, **changes: object) -> None:
    """Change the manifest as somebody does who can compute its checksum."""
    file = copy / "manifest.json"
    manifest = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({**manifest, "xxh3": manifest_checksum(manifest)}))


def test_a_manifest_names_no_file_outside(copy: Path) -> None:
    files = json.loads((copy / "manifest.json").read_text())["files"]
    resealed(copy, files=[*files, {"file": "../run/config.yaml", "bytes": 1, "xxh3": "0"}])
    with pytest.raises(ValueError, match="which is no plain name"):
        open_bundle(copy)


def test_a_table_of_another_size_is_refused(copy: Path) -> None:
    tables = json.loads((copy / "manifest.json").read_text())["tables"]
    resealed(copy, tables={**tables, "item": {**tables["item"], "ids": 39}})
    with pytest.raises(ValueError, match=r"table item is \[39, 8\], expected \[40, 8\]"):
        api.load(copy)


def test_mistakes(run_dir: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fails(["bundle", "--run_dir", run_dir, "--out", bundle], capsys, "exists")
    fails(["bundle", "--run_dir", tmp_path / "none", "--out", tmp_path / "b"], capsys, "none")
    fails(["bundle", "--run_dir", run_dir, "--out", tmp_path / "b", "--checkpoint", "7"], capsys, "checkpoint is '7'")
    fails(["bundle", "--run_dir", run_dir, "--out", tmp_path / "b", "--rows", "int8"], capsys, "say --training false")
    assert not list(tmp_path.iterdir())
    assert not is_bundle(run_dir)
    with pytest.raises(ValueError, match="checkpoint is 'last': a bundle is one version"):
        api.load(bundle, checkpoint="last")


def test_files_are_plain_safetensors(bundle: Path) -> None:
    assert load_file(bundle / part_name("item", 0)).keys() == {"rows"}
    assert load_file(bundle / part_name("item", 0, "steps")).keys() == {"exp_avg", "exp_avg_sq", "steps"}
