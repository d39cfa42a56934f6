"""A checkpoint of any number of ranks fills rows bit by bit, and only what is asked for is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import run_ranks
from packs import make_pack
from torch import Tensor

from gmeta.config.train import ModelConfig, TrainConfig
from gmeta.data.pack import open_pack
from gmeta.embedding.table import ShardedTables, TableSpec
from gmeta.models.inputs import InputSpec
from gmeta.parallel.mesh import Mesh
from gmeta.recommender.build import build_system
from gmeta.runs import checkpoint
from gmeta.sharding import checkpoint as sharded

SPECS = [
    TableSpec("user", 37, 4, {"user": None}),
    TableSpec("item", 11, 4, {"item": None}),
    TableSpec("tag", 5, 2, {"tag": "mean"}),
]


def tables(mesh: Mesh, *, training: bool, specs: list[TableSpec] = SPECS) -> ShardedTables:
    return ShardedTables(
        specs,
        mesh=mesh,
        seed=3,
        init_std=0.5 if training else None,
        dtype=torch.float32,
        optimizer="adam" if training else None,
    )


def save(mesh: Mesh, root: Path) -> None:
    """Save initial rows, which are the same for any number of ranks, and moments that are no numbers."""
    made = tables(mesh, training=True)
    for table in made.fused.values():
        for state in table.state.values():
            state.fill_(torch.nan if state.is_floating_point() else -1)
    checkpoint.save(root, 1, made.state_dict(), {}, mesh)


def load(mesh: Mesh, root: Path) -> tuple[dict[str, Any], set[str]]:
    """Fill tables without optimizer state; this rank's rows with their range, and the names that were read."""
    read: set[str] = set()
    read_data = sharded.StreamReader.read_data

    def spy(self: sharded.StreamReader, plan: Any, planner: Any) -> Any:
        read.update(item.storage_index.fqn for item in plan.items)
        return read_data(self, plan, planner)

    made = tables(mesh, training=False)
    sharded.StreamReader.read_data = spy  # type: ignore[method-assign]
    try:
        checkpoint.load_tensors(root / "step-00000001", made.state_dict(), mesh)
    finally:
        sharded.StreamReader.read_data = read_data  # type: ignore[method-assign]
    assert not any(table.state for table in made.fused.values())
    return {name: (t.local_range(mesh.rank), t.weight) for name, t in made.fused.items()}, read


@pytest.mark.parametrize("saving", [1, 2, 4])
def test_rows_are_those_that_were_saved_and_no_moment_is_read(tmp_path: Path, saving: int) -> None:
    run_ranks(saving, save, tmp_path)
    expected = {name: table.weight for name, table in tables(Mesh(), training=True).fused.items()}
    for loading in (1, 2):
        for found, read in run_ranks(loading, load, tmp_path):
            assert read == {"d2.weight", "d4.weight"}
            for name, (rows, weight) in found.items():
                assert torch.equal(weight, expected[name][rows.start : rows.stop])


class Drawn(torch.nn.Module):
    """A model with constants that no seed of gmeta reaches, of several types."""

    def __init__(self, inputs: InputSpec) -> None:
        super().__init__()
        drawn = np.random.default_rng().normal(size=(inputs.width, 4))
        self.register_buffer("directions", torch.from_numpy(drawn).float())
        self.register_buffer("scale", torch.tensor(np.random.default_rng().random()))
        self.register_buffer("chosen", torch.from_numpy(np.random.default_rng().random(4) < 0.5))
        self.register_buffer("unsaved", torch.ones(4), persistent=False)
        self.out = torch.nn.Linear(4, 1)

    def forward(self, dense: Tensor, embedded: dict[str, Tensor]) -> Tensor:
        projected = torch.cat([dense, *embedded.values()], -1) @ self.directions * self.scale
        return self.out(torch.cos(projected) * self.chosen * self.unsaved).squeeze(-1)


def draw_and_save(mesh: Mesh, pack: Path, root: Path, named: bool) -> dict[str, Tensor]:
    settings = TrainConfig(pack=str(pack), run_dir="unused", model=ModelConfig(name="own:Drawn"))
    system = build_system(settings, open_pack(pack).schema, mesh, factory=Drawn)
    tensors = system.tensors()
    checkpoint.save(root, 1, tensors if named else {n: t for n, t in tensors.items() if "buffers." not in n}, {}, mesh)
    return system.buffer_tensors()


def build_and_load(mesh: Mesh, pack: Path, root: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    settings = TrainConfig(pack=str(pack), run_dir="unused", model=ModelConfig(name="own:Drawn"))
    system = build_system(settings, open_pack(pack).schema, mesh, factory=Drawn, training=False)
    before = {name: buffer.clone() for name, buffer in system.buffer_tensors().items()}
    checkpoint.load_tensors(root / "step-00000001", system.tensors(), mesh)
    return before, system.buffer_tensors()


@pytest.mark.parametrize(("saving", "loading"), [(1, 2), (2, 1)])
def test_buffers_are_those_that_were_saved(tmp_path: Path, saving: int, loading: int) -> None:
    pack = make_pack(tmp_path / "pack")
    saved, *others = run_ranks(saving, draw_and_save, pack, tmp_path, True)
    assert all(torch.equal(saved[name], buffer) for other in others for name, buffer in other.items())
    assert saved.keys() == {"buffers.model.directions", "buffers.model.scale", "buffers.model.chosen"}
    for before, found in run_ranks(loading, build_and_load, pack, tmp_path):
        assert all(torch.equal(found[name], buffer) for name, buffer in saved.items())
        assert not torch.equal(before["buffers.model.directions"], found["buffers.model.directions"])


def test_a_checkpoint_without_buffers_leaves_them(tmp_path: Path) -> None:
    pack = make_pack(tmp_path / "pack")
    draw_and_save(Mesh(), pack, tmp_path, False)
    before, found = build_and_load(Mesh(), pack, tmp_path)
    assert all(torch.equal(before[name], buffer) for name, buffer in found.items())


def test_another_model_is_refused_by_name(tmp_path: Path) -> None:
    save(Mesh(), tmp_path)
    other = tables(Mesh(), training=False, specs=[SPECS[0], TableSpec("tag", 5, 3, {"tag": "mean"})])
    with pytest.raises(ValueError, match=r"another model: d3.weight is missing; d4.weight is \[48, 4\], expected \[37"):
        checkpoint.load_tensors(tmp_path / "step-00000001", other.state_dict(), Mesh())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
@pytest.mark.parametrize("piece_bytes", [1, 24, 1 << 23])
def test_any_box_is_read_as_it_is_sliced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, piece_bytes: int
) -> None:
    monkeypatch.setattr(sharded, "_PIECE_BYTES", piece_bytes)
    stored = torch.arange(3 * 4 * 5 * 2).to(dtype).view(3, 4, 5, 2)
    before = 13
    (tmp_path / "file").write_bytes(bytes(before) + stored.view(torch.uint8).numpy().tobytes())
    boxes = [((0, 0, 0, 0), (3, 4, 5, 2)), ((1, 0, 0, 0), (2, 4, 5, 2)), ((2, 1, 0, 0), (1, 3, 5, 2))]
    boxes += [((0, 1, 2, 1), (3, 2, 3, 1)), ((0, 0, 1, 0), (2, 4, 4, 2)), ((0, 0, 0, 0), (0, 4, 5, 2))]
    with (tmp_path / "file").open("rb", buffering=0) as file:
        for offsets, sizes in boxes:
            expected = stored[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]
            for target in _targets(sizes, dtype):
                sharded._read_box(file, before, tuple(stored.shape), dtype, (offsets, sizes), target)
                assert torch.equal(target, expected.to(target.dtype))
        scalar = torch.zeros((), dtype=dtype)
        sharded._read_box(file, before + dtype.itemsize * 7, (), dtype, ((), ()), scalar)
        assert scalar == 7
        with pytest.raises(OSError, match=r"ends .* bytes too early"):
            sharded._read_box(file, before, (1000,), dtype, ((0,), (1000,)), torch.zeros(1000, dtype=dtype))


def _targets(sizes: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """A tensor of these sizes, one of another type, and one whose elements do not lie in order."""
    return [
        torch.zeros(sizes, dtype=dtype),
        torch.zeros(sizes, dtype=torch.float64),
        torch.zeros(sizes[::-1], dtype=dtype).permute(3, 2, 1, 0),
    ]
