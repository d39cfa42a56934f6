"""Every strategy learns what DistributedDataParallel learns, and costs what the formulas say."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness import run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recompute

from gmeta.parallel.mesh import Mesh
from gmeta.runs import checkpoint
from gmeta.sharding.auto import AutoSharding
from gmeta.sharding.engine import Paro
from gmeta.sharding.hierarchy import CollectiveAlgorithm, node_mesh
from gmeta.sharding.paro import paro
from gmeta.sharding.strategy import STRATEGIES, ElementBytes, NodeLayout, ShardingStrategy, memory_bytes

STEPS = 5


class Tower(nn.Module):
    """Layers of odd sizes, a frozen one among them, norms, and a parameter of its own."""

    def __init__(self, width: int = 7) -> None:
        super().__init__()
        self.begin = nn.Linear(5, width)
        self.layers = nn.ModuleList(Layer(width, hidden) for hidden in (3, 11, 6))
        for param in self.layers[1].parameters():
            param.requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(1))
        self.end = nn.Linear(width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.begin(x)
        for layer in self.layers:
            x = layer(x)
        return self.end(x) * self.scale


class Layer(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


def tower(dtype: torch.dtype, seed: int = 1) -> Tower:
    torch.manual_seed(seed)
    return Tower().to(dtype)


def data(rank: int, accumulation: int, dtype: torch.dtype) -> Iterator[list[tuple[Tensor, Tensor]]]:
    draws = torch.Generator().manual_seed(100 + rank)
    for _ in range(STEPS):
        yield [
            (torch.randn(4, 5, generator=draws).to(dtype), torch.randn(4, 1, generator=draws).to(dtype))
            for _ in range(accumulation)
        ]


ADAMW = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)


def by_ddp(mesh: Mesh, accumulation: int, dtype: torch.dtype, clip_norm: float) -> dict[str, Any]:
    model = tower(dtype)
    wrapped = DistributedDataParallel(model, process_group=mesh.dense_group) if mesh.world_size > 1 else model
    optimizer = ADAMW([p for p in model.parameters() if p.requires_grad])
    norms = []
    for micro_batches in data(mesh.rank, accumulation, dtype):
        for k, (x, y) in enumerate(micro_batches):
            last = k == accumulation - 1
            with nullcontext() if last or mesh.world_size == 1 else wrapped.no_sync():
                (nn.functional.mse_loss(wrapped(x), y) / accumulation).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norms.append(float(nn.utils.get_total_norm(gradients)))
        for gradient in gradients:  # clip_grad_norm_ adds 1e-6 to the norm
            gradient.mul_(min(1.0, clip_norm / norms[-1]))
        optimizer.step()
        optimizer.zero_grad()
    return {"norms": norms, **{name: p.detach().clone() for name, p in model.named_parameters()}}


def open_engine(mesh: Mesh, group_size: int, strategy: Any, dtype: torch.dtype, **settings: Any) -> Paro:
    ranks = node_mesh(group_size) if mesh.world_size > 1 else None
    return paro(tower(dtype, seed=1 + mesh.rank), ADAMW, ranks, strategy, **settings)


def by_paro(engine: Paro, mesh: Mesh, accumulation: int, dtype: torch.dtype, clip_norm: float) -> dict[str, Any]:
    norms = []
    for micro_batches in data(mesh.rank, accumulation, dtype):
        for k, (x, y) in enumerate(micro_batches):
            engine.backward(nn.functional.mse_loss(engine(x), y) / accumulation, last=k == accumulation - 1)
        norms.append(engine.step(clip_norm=clip_norm).grad_norm)
    with engine.unsharded():
        found = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    return {"norms": norms, **found}


def compare(mesh: Mesh, group_size: int, strategies: list[Any], accumulation: int, dtype: torch.dtype, **settings: Any):
    clip_norm = 0.3
    expected = by_ddp(mesh, accumulation, dtype, clip_norm)
    assert min(expected["norms"]) > clip_norm / 2
    assert max(expected["norms"]) > clip_norm, "the premise: clipping does something"
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    for strategy in strategies:
        engine = open_engine(mesh, group_size, strategy, dtype, **settings)
        found = by_paro(engine, mesh, accumulation, dtype, clip_norm)
        engine.close()
        assert found["norms"] == pytest.approx(expected["norms"], rel=10 * tolerance)
        for name, value in expected.items():
            if name != "norms":
                torch.testing.assert_close(
                    found[name],
                    value,
                    rtol=tolerance,
                    atol=tolerance,
                    msg=lambda m, n=name, p=strategy: f"{p} {n}: {m}",
                )


@pytest.mark.parametrize(
    ("ranks", "group_size", "accumulation"),
    [(1, 1, 3), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 1, 1), (4, 2, 1), (4, 2, 3)))],
)
def test_all_placements_equal_ddp(ranks: int, group_size: int, accumulation: int) -> None:
    run_ranks(ranks, compare, group_size, list(STRATEGIES), accumulation, torch.float64)


def test_a_placement_equals_ddp_on_four_ranks() -> None:
    run_ranks(4, compare, 2, ["NII"], 2, torch.float64)


_FIVE = ["NNN", "NIG", "III", "IIG", "GGG"]


@pytest.mark.parametrize(
    ("group_size", "strategies"),
    [(2, ["NIG", "III"]), *(pytest.param(size, _FIVE, marks=pytest.mark.slow) for size in (1, 2))],
)
def test_one_group_and_groups_of_one(group_size: int, strategies: list[str]) -> None:
    run_ranks(2, compare, group_size, strategies, 2, torch.float64)


@pytest.mark.parametrize(
    ("collectives", "strategies"),
    [
        ("ho", ["IIG"]),
        *(pytest.param(name, ["NNN", "IIG", "GGG"], marks=pytest.mark.slow) for name in ("backend", "flat", "ho")),
    ],
)
def test_any_collectives(collectives: str, strategies: list[str]) -> None:
    run_ranks(4, compare_with, 2, strategies, 2, torch.float64, {"collectives": collectives})


@pytest.mark.slow
def test_single_precision() -> None:
    run_ranks(4, compare, 2, ["NII", "IIG", "GGG"], 1, torch.float32)


def test_a_placement_a_submodule() -> None:
    run_ranks(4, compare, 2, [{"": "NNN", "layers": "IIG", "layers.2.up": "GGG"}], 2, torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_all_placements_on_eight_ranks(dtype: torch.dtype, accumulation: int) -> None:
    run_ranks(8, compare, 2, list(STRATEGIES), accumulation, dtype, timeout_s=900)


def compare_with(
    mesh: Mesh, group_size: int, strategies: Any, accumulation: int, dtype: torch.dtype, more: Any
) -> None:
    compare(mesh, group_size, strategies, accumulation, dtype, **more)


@pytest.mark.parametrize("strategy", [pytest.param("III", marks=pytest.mark.slow), "GGG"])
def test_torch_backend_equals_ddp(strategy: str) -> None:
    run_ranks(4, compare_with, 2, [strategy], 2, torch.float64, {"backend": "torch"})


# bf16


def half_precision(mesh: Mesh, strategy: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> (how far the master weights of this rank have moved, their bf16 copies less where they began)."""
    model = tower(torch.float32)
    begun = {name: p.detach().clone() for name, p in model.named_parameters()}
    slow = partial(torch.optim.AdamW, lr=1e-5, weight_decay=0.0)
    engine = paro(model, slow, node_mesh(2), strategy, compute_dtype=torch.bfloat16)
    by_paro(engine, mesh, 2, torch.float32, 1.0)
    found = {}
    for partition in engine.partitions:
        start = begun[partition.name].flatten()[partition.start : partition.stop]
        assert partition.tensor.dtype == torch.float32
        found[partition.name] = (
            partition.tensor.detach() - start,
            partition.tensor.detach().bfloat16() - start.bfloat16(),
        )
    engine.close()
    return found


@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param("NNN", marks=pytest.mark.slow),
        "IIG",
        pytest.param("GGG", marks=pytest.mark.slow),
        pytest.param("NIG", marks=pytest.mark.slow),
    ],
)
def test_bf16_has_master_weights(strategy: str) -> None:
    """Steps of 1e-5 are lost in bf16, whose numbers near 0.3 lie 2e-3 apart, and add up in fp32."""
    moved = [pair for rank in run_ranks(4, half_precision, strategy) for pair in rank.values()]
    far = torch.cat([master.abs() for master, _ in moved])
    near = torch.cat([copy.abs() for _, copy in moved])
    assert 2e-5 < far.median() < far.max() < 1.1e-4
    assert (near == 0).float().mean() > 0.5


def in_bf16(mesh: Mesh, strategies: list[str]) -> list[dict[str, Tensor]]:
    found = []
    for strategy in strategies:
        engine = open_engine(mesh, 2, strategy, torch.float32, compute_dtype=torch.bfloat16, grad_dtype=torch.float32)
        by_paro(engine, mesh, 2, torch.float32, 1.0)
        with engine.unsharded():
            found.append({name: p.detach().float().clone() for name, p in engine.module.named_parameters()})
        engine.close()
    return found


@pytest.mark.parametrize("strategies", [["IIG"], pytest.param(["III", "GGG"], marks=pytest.mark.slow)])
def test_bf16_learns_the_same_under_every_placement(strategies: list[str]) -> None:
    first, *others = run_ranks(4, in_bf16, ["NNN", *strategies])[0]
    full = run_ranks(4, by_ddp, 2, torch.float32, 1.0)[0]
    for other in others:
        for name, value in first.items():
            torch.testing.assert_close(other[name], value, rtol=0.01, atol=0.002)
            torch.testing.assert_close(value, full[name], rtol=0.05, atol=0.03)


# Checkpoints


def save_and_load(mesh: Mesh, folder: Path, strategy: str, save: bool) -> dict[str, Any]:
    """Half of the steps, a checkpoint, the other half; or only what follows the checkpoint."""
    engine = open_engine(mesh, 2 if mesh.world_size > 2 else 1, strategy, torch.float64)
    batches = list(data(0, 1, torch.float64))  # the same on all ranks, so that their number does not matter

    def steps(some: list[list[tuple[Tensor, Tensor]]]) -> None:
        for ((x, y),) in some:
            engine.backward(nn.functional.mse_loss(engine(x), y))
            engine.step(clip_norm=1.0)

    if save:
        steps(batches[:3])
        checkpoint.save(folder, 3, engine.state(), {}, mesh)
    else:
        checkpoint.load_tensors(folder / "step-00000003", engine.state(), mesh)
        engine.loaded()
    steps(batches[3:])
    with engine.unsharded():
        found = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    engine.close()
    return found


@pytest.mark.parametrize(
    "saved", [pytest.param("NNN", marks=pytest.mark.slow), "IIG", pytest.param("GGG", marks=pytest.mark.slow)]
)
def test_saved_under_one_loaded_under_others(saved: str, tmp_path: Path) -> None:
    expected = run_ranks(4, save_and_load, tmp_path, saved, True)[0]
    for ranks, strategy in ((4, "NIG"), (4, "GGG"), (4, "NNN"), (2, "GNG"), (1, "III")):
        for found in run_ranks(ranks, save_and_load, tmp_path, strategy, False):
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)


def save_under_each(mesh: Mesh, folder: Path) -> dict[str, Any]:
    return {strategy: save_and_load(mesh, folder / strategy, strategy, True) for strategy in STRATEGIES}


def load_each_under_each(mesh: Mesh, folder: Path, expected: dict[str, Any]) -> None:
    for saved in STRATEGIES:
        for loaded in STRATEGIES:
            found = save_and_load(mesh, folder / saved, loaded, False)
            for name, value in expected[saved].items():
                torch.testing.assert_close(
                    found[name],
                    value,
                    rtol=1e-12,
                    atol=1e-12,
                    msg=lambda m, s=saved, p=loaded, n=name: f"{s} under {p}, {n}: {m}",
                )


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_saved_under_each_loaded_under_each(ranks: int, tmp_path: Path) -> None:
    expected = run_ranks(4, save_under_each, tmp_path, timeout_s=600)[0]
    run_ranks(ranks, load_each_under_each, tmp_path, expected, timeout_s=1800)


# Costs


def costs(
    mesh: Mesh, collectives: CollectiveAlgorithm, compute_dtype: torch.dtype | None, strategies: Sequence[str]
) -> list[tuple[Any, ...]]:
    """(strategy, bytes sent in the second step, prediction, bytes held, prediction)."""
    found = []
    layout, accumulation = NodeLayout(2, 2), 3
    sizes = ElementBytes(param=4, grad=4, state=8) if compute_dtype is None else ElementBytes()
    for strategy in strategies:
        torch.manual_seed(1)
        model = Tower(64)
        engine = paro(model, ADAMW, node_mesh(2), strategy, collectives=collectives, compute_dtype=compute_dtype)
        params = sum(flat.spans[-1].stop for flat in engine._flat_parameters)
        trained = sum(flat.spans[-1].stop for flat in engine._flat_parameters if flat.trained)
        before = engine.sent
        for micro_batches in list(data(mesh.rank, accumulation, torch.float32))[:2]:
            before = engine.sent
            for k, (x, y) in enumerate(micro_batches):
                engine.backward(nn.functional.mse_loss(engine(x).float(), y), last=k == accumulation - 1)
            engine.step()
        after = engine.sent
        sent = after.intra - before.intra, after.inter - before.inter
        expected = memory_bytes(ShardingStrategy.parse(strategy), layout, params, trained, sizes)
        found.append((strategy, sent, engine.predicted_sent(accumulation), engine.memory_bytes(), expected))
        engine.close()
    return found


@pytest.mark.parametrize(
    ("collectives", "compute_dtype", "strategies"),
    [
        ("two_phase", torch.bfloat16, ("NNN", "NIG", "III", "IIG", "GGG")),
        pytest.param("two_phase", torch.bfloat16, STRATEGIES, marks=pytest.mark.slow),
        pytest.param("flat", None, STRATEGIES, marks=pytest.mark.slow),
        pytest.param("backend", None, STRATEGIES, marks=pytest.mark.slow),
        pytest.param("ho", None, STRATEGIES, marks=pytest.mark.slow),
    ],
)
def test_bytes_are_what_the_formulas_say(
    collectives: CollectiveAlgorithm, compute_dtype: torch.dtype | None, strategies: Sequence[str]
) -> None:
    ranks = run_ranks(4, costs, collectives, compute_dtype, strategies)
    for found in zip(*ranks, strict=True):  # a strategy, on every rank
        strategy, _, predicted, *_ = found[0]
        for group in (found[:2], found[2:]):
            assert sum(rank[1][0] for rank in group) == pytest.approx(predicted.intra, abs=1), strategy
            assert sum(rank[1][1] for rank in group) == pytest.approx(predicted.inter, abs=1), strategy
        for _, _, _, held, expected in found:
            for kind, nbytes in expected.items():
                assert held[kind] == pytest.approx(nbytes, rel=0.05), (strategy, kind)


# Other ways to compute


class Checkpointed(Tower):
    """Layers are computed again in the backward pass."""

    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.begin(x)
        for layer in self.layers:
            x = recompute(layer, x, use_reentrant=self.reentrant)
        return self.end(x) * self.scale


class CheckpointedReentrantly(Checkpointed):
    reentrant = True


class Twice(Tower):
    """Layers are used twice; there is a parameter without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        x = self.begin(x)
        for _ in range(2):
            for layer in self.layers:
                x = layer(x) + self.shift
        return self.end(x) * self.scale


def trained_as(mesh: Mesh, kind: type[Tower], strategy: str, whole: bool) -> dict[str, Tensor]:
    torch.manual_seed(1)
    engine = paro(kind().double(), ADAMW, node_mesh(2) if mesh.world_size > 1 else None, strategy)
    for ((x, y),) in data(0, 1, torch.float64):
        with engine.unsharded() if whole else nullcontext():
            engine.backward(nn.functional.mse_loss(engine(x), y))
        engine.step(clip_norm=1.0)
        with torch.no_grad():
            engine(x)
    with engine.unsharded():
        found = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    engine.close()
    return found


_USUAL = [(Checkpointed, "IIG", False), (CheckpointedReentrantly, "GGG", False), (Twice, "GGG", True)]
_RECOMPUTED = itertools.product((Checkpointed, CheckpointedReentrantly, Twice), ("IIG", "GGG"), (False, True))
_OTHERS = [case for case in _RECOMPUTED if case not in _USUAL and case[1:] != ("IIG", True)]


@pytest.mark.parametrize(
    ("kind", "strategy", "whole"), [*_USUAL, *(pytest.param(*case, marks=pytest.mark.slow) for case in _OTHERS)]
)
def test_recomputed_and_reused_layers(kind: type[Tower], strategy: str, whole: bool) -> None:
    plain = Twice if kind is Twice else Tower
    (expected,) = run_ranks(1, trained_as, plain, "NNN", False)
    for found in run_ranks(4, trained_as, kind, strategy, whole):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-11, atol=1e-11)


class Meta(nn.Module):
    """One inner step of MAML on a tower, differentiated through: weights are used as plain tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = Tower()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        params = {name: p for name, p in self.tower.named_parameters() if p.requires_grad}
        loss = nn.functional.mse_loss(torch.func.functional_call(self.tower, params, (x[:2],)), y[:2])
        gradients = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        adapted = {name: p - 0.1 * g for (name, p), g in zip(params.items(), gradients, strict=True)}
        return nn.functional.mse_loss(torch.func.functional_call(self.tower, adapted, (x[2:],)), y[2:])


def meta_trained(mesh: Mesh, strategy: str) -> dict[str, Tensor]:
    torch.manual_seed(1)
    engine = paro(Meta().double(), ADAMW, node_mesh(2) if mesh.world_size > 1 else None, strategy)
    for ((x, y),) in data(0, 1, torch.float64):
        with engine.unsharded():
            engine.backward(engine(x, y))
        engine.step(clip_norm=1.0)
    with engine.unsharded():
        found = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    engine.close()
    return found


def test_second_order_with_sharded_parameters() -> None:
    (expected,) = run_ranks(1, meta_trained, "NNN")
    for strategy in ("IIG", "GGG"):
        for found in run_ranks(4, meta_trained, strategy):
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, rtol=1e-11, atol=1e-11)


# Bad input


def not_finite(mesh: Mesh, strategy: str) -> tuple[bool, bool, bool]:
    """A gradient that overflows on one rank stops the update on all, and only that one."""
    engine = open_engine(mesh, 2, strategy, torch.float64)
    ((x, y),) = next(data(0, 1, torch.float64))
    with engine.unsharded():
        before = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    engine.backward(nn.functional.mse_loss(engine(x * (torch.inf if mesh.rank == 3 else 1)), y))
    stepped = engine.step(clip_norm=1.0)
    with engine.unsharded():
        same = all(torch.equal(p, before[name]) for name, p in engine.module.named_parameters())
    engine.backward(nn.functional.mse_loss(engine(x), y))
    again = engine.step(clip_norm=1.0)
    engine.close()
    return stepped.finite, same, again.finite


@pytest.mark.parametrize("strategy", ["NNN", *(pytest.param(s, marks=pytest.mark.slow) for s in ("III", "IIG")), "GGG"])
def test_overflow_on_one_rank_stops_all(strategy: str) -> None:
    assert run_ranks(4, not_finite, strategy) == [(False, True, True)] * 4


@pytest.mark.parametrize(
    ("strategy", "complaint"),
    [
        ("GGN", r"at least as finely .* nearest are GGG"),
        ("GNI", r"nearest are .*GNG"),
        ("IIX", "must be three of the letters N, I and G"),
        ("ZeRO", "one of NNN, NNI"),
        ({"": "NNN", "lyers": "IIG"}, "'lyers': no parameter has a name that begins with it"),
    ],
)
def test_invalid_strategies(strategy: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        paro(Tower(), ADAMW, None, strategy)


def test_the_former_name_of_sharding_works_and_says_the_new_one() -> None:
    with pytest.warns(FutureWarning, match="the argument placement is called sharding now"):
        engine = paro(Tower(), ADAMW, placement="NIG")
    assert set(engine.strategies.values()) == {"NIG"}
    engine.close()
    with pytest.raises(ValueError, match="give sharding alone"):
        paro(Tower(), ADAMW, sharding="III", placement="NIG")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(3))
        self.layers[2].weight = self.layers[0].weight


def test_a_parameter_in_two_units() -> None:
    with pytest.raises(ValueError, match=r"layers.0.weight and layers.2.weight are one parameter in two units"):
        paro(Tied(), ADAMW, None, "III")
    paro(Tied(), ADAMW, None, "III", units=[]).close()
    with pytest.raises(ValueError, match="is no part of the module"):
        paro(Tied(), ADAMW, None, "III", units=[nn.Linear(1, 1)])


@pytest.mark.parametrize(
    "factory",
    [partial(torch.optim.Adafactor, lr=1e-2), partial(torch.optim.Muon, lr=1e-2), torch.optim.LBFGS],
)
def test_optimizers_that_are_not_element_wise(factory: Any) -> None:
    with pytest.raises(ValueError, match="must be element-wise"):
        paro(Tower(), factory, None, "NNN")


@pytest.mark.parametrize(
    "factory",
    [
        partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
        partial(torch.optim.Adagrad, lr=0.1),
        partial(torch.optim.RMSprop, lr=0.1),
        partial(torch.optim.AdamW, lr=0.1, fused=True),
    ],
)
def test_optimizers_that_are(factory: Any) -> None:
    paro(Tower(), factory, None, "GGG").close()


def test_settings_that_are_none() -> None:
    with pytest.raises(ValueError, match="collectives is 'hoo': must be one of backend, flat, two_phase, ho"):
        paro(Tower(), ADAMW, None, "NNN", collectives="hoo")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="backend is 'Torch': must be gmeta or torch"):
        paro(Tower(), ADAMW, None, "NNN", backend="Torch")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="sharding is None: it must be three of the letters"):
        paro(Tower(), ADAMW, None, None)  # type: ignore[call-overload]
    model = Tower()
    with pytest.raises(ValueError, match="give what makes one from named parameters"):
        paro(model, torch.optim.AdamW(model.parameters()), None, "NNN")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="memory_bytes is -5"):
        paro(model, ADAMW, None, "auto", auto=AutoSharding(memory_bytes=-5))


def test_parameters_changed_outside() -> None:
    engine = paro(Tower(), ADAMW, None, "NNG")
    with torch.no_grad():
        engine.module.end.weight.zero_()
    with pytest.raises(RuntimeError, match=r"parameter end.weight was changed outside .*unsharded\(write_back=True\)"):
        engine(torch.randn(2, 5))


def changed_inside(mesh: Mesh) -> list[float]:
    engine = open_engine(mesh, 2, "IIG", torch.float64)
    with pytest.raises(RuntimeError, match=r"holds a part of scale only: call state_dict\(\)"):
        engine.module.state_dict()
    other = {name: value + 1 for name, value in tower(torch.float64).state_dict().items()}
    with engine.unsharded(write_back=True):
        engine.module.load_state_dict(other)
    with engine.unsharded():
        assert all(torch.equal(value, other[name]) for name, value in engine.module.state_dict().items())
        with engine.unsharded():
            pass
        assert all(torch.equal(value, other[name]) for name, value in engine.module.state_dict().items())
    with pytest.raises(RuntimeError, match=r"begin.weight was replaced"), engine.unsharded(write_back=True):
        engine.module.begin.weight = nn.Parameter(other["begin.weight"])
    engine.module.begin.weight = next(
        m.param for f in engine._flat_parameters for m in f.spans if m.name == "begin.weight"
    )
    with (
        pytest.raises(RuntimeError, match=r"parameter end\.weight was changed outside"),
        engine.unsharded(),
        torch.no_grad(),
    ):
        engine.module.end.weight.zero_()
    x = torch.ones(1, 5, dtype=torch.float64)
    expected = tower(torch.float64)
    expected.load_state_dict(other)
    assert torch.equal(engine(x), expected(x))
    engine.close()
    assert torch.equal(engine.module(x), expected(x))
    return [float(engine.module(x).detach())]


def test_parameters_changed_inside() -> None:
    run_ranks(4, changed_inside)


def test_leaves_as_inputs() -> None:
    """Layers without anything before their weights, whose inputs are leaves: nothing may be freed too early."""
    run_ranks(4, leaves_as_inputs)


def leaves_as_inputs(mesh: Mesh) -> None:
    torch.manual_seed(1)
    plain = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 1)).double()
    x = torch.ones(3, 5, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(plain(x).square().sum(), x)
    for strategy in ("III", "GGG"):
        engine = paro(copy.deepcopy(plain), ADAMW, node_mesh(2), strategy)
        x.grad = None
        engine.backward(engine(x).square().sum())
        assert x.grad is not None
        torch.testing.assert_close(x.grad, expected)
        assert engine.step().grad_norm > 0
        with torch.inference_mode():
            engine(x)
            engine(x)
        engine.backward(engine(x).sum())
        engine.step()
        engine.close()


def test_steps_without_gradients_and_gradients_without_steps() -> None:
    engine, x = paro(Tower(), ADAMW, None, "IIG"), torch.ones(2, 5)
    with pytest.raises(RuntimeError, match="there is no gradient"):
        engine.step()
    engine.backward(engine(x).sum(), last=False)
    with pytest.raises(RuntimeError, match="there is no gradient"):
        engine.step()
    engine.backward(engine(x).sum())
    with pytest.raises(RuntimeError, match="summed over ranks already: call step"):
        engine.backward(engine(x).sum())
    with engine.unsharded(), pytest.raises(RuntimeError, match="call it after"):
        engine.step()
    engine.step()
    with pytest.raises(RuntimeError, match="there is no gradient"):
        engine.step()


class Hidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Boxed()])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x).value


class Boxed(nn.Linear):
    def __init__(self) -> None:
        super().__init__(5, 1)

    def forward(self, x: Tensor) -> Any:
        return SimpleNamespace(value=super().forward(x))


def test_outputs_that_hide_their_tensors() -> None:
    with pytest.raises(TypeError, match=r"unit 'layers.0' returns a SimpleNamespace in which no tensor is found"):
        paro(Hidden(), ADAMW, None, "III")(torch.ones(2, 5))


class ReentrantTwice(CheckpointedReentrantly):
    def forward(self, x: Tensor) -> Tensor:
        x = self.begin(x)
        for _ in range(2):
            x = recompute(self.layers[0], x, use_reentrant=True)
        return self.end(x)


def test_a_reentrant_checkpoint_of_a_layer_used_twice() -> None:
    engine = paro(ReentrantTwice(), ADAMW, None, "III")
    with pytest.raises(RuntimeError, match=r"take checkpoint\(..., use_reentrant=False\)"):
        engine.backward(engine(torch.ones(2, 5)).sum())


def test_backward_of_the_loss_itself() -> None:
    engine = paro(Tower(), ADAMW, None, "III")
    with pytest.raises(RuntimeError, match=r"call engine.backward\(loss\)"):
        engine(torch.randn(2, 5)).sum().backward()


def test_groups_that_do_not_divide() -> None:
    run_ranks(4, wrong_groups)


def wrong_groups(mesh: Mesh) -> None:
    with pytest.raises(ValueError, match=r"nodes of 3 ranks do not divide a world of 4: .* one of \[1, 2, 4\]"):
        node_mesh(3)
