"""What a sharded engine accepts, keeps and gives back: optimizers, checkpoints, dtypes, models as they are made."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from harness import run_ranks
from torch import Tensor, nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from gmeta.parallel.mesh import Mesh
from gmeta.runs import checkpoint
from gmeta.sharding.checkpoint import PartitionWriter, create_optimizer_state
from gmeta.sharding.engine import Paro
from gmeta.sharding.hierarchy import node_mesh
from gmeta.sharding.paro import paro
from gmeta.sharding.torch_engine import TorchEngine

ADAMW = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
Named = Iterable[tuple[str, nn.Parameter]]


class Stack(nn.Module):
    """Layers of one size between two others."""

    def __init__(self, depth: int = 2, width: int = 6) -> None:
        super().__init__()
        self.begin = nn.Linear(5, width)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth))
        self.end = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.begin(x)
        for layer in self.layers:
            x = layer(x)
        return self.end(x)


def stack(dtype: torch.dtype = torch.float64, kind: type[nn.Module] = Stack) -> nn.Module:
    torch.manual_seed(1)
    return kind().to(dtype)


def rows(rank: int, step: int, dtype: torch.dtype = torch.float64) -> Tensor:
    draws = torch.Generator().manual_seed(100 * rank + step)
    return torch.randn(4, 5, generator=draws, dtype=dtype)


def nodes(mesh: Mesh) -> DeviceMesh | None:
    return node_mesh(max(1, mesh.world_size // 2)) if mesh.world_size > 1 else None


def weights(engine: Paro | TorchEngine) -> dict[str, Tensor]:
    with engine.unsharded():
        return {name: p.detach().clone() for name, p in engine.module.named_parameters()}


def alone(
    model: nn.Module, make: Callable[..., torch.optim.Optimizer], world_size: int, steps: int
) -> dict[str, Tensor]:
    """Train by hand on all ranks' rows."""
    optimizer = make([(name, p) for name, p in model.named_parameters() if p.requires_grad])
    for step in range(steps):
        for rank in range(world_size):
            (model(rows(rank, step)).square().mean() / world_size).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


# Optimizers


class Lamb(torch.optim.Optimizer):
    """LAMB without its second moment: the size of an update is that of the parameter."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad * (group["lr"] * p.norm() / (p.grad.norm() + 1e-12)))


class DecaysMatrices(torch.optim.SGD):
    """Looks at the number of dimensions when it steps, which is too late."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim >= 2:
                    p.mul_(1 - group["lr"] * 1e-3)
        super().step(closure)


@pytest.mark.parametrize("lr", [0.0, 1e-7, 2e-5, 1e-2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [Lamb, torch.optim.Adafactor, DecaysMatrices])
def test_no_rate_and_no_dtype_hides_what_an_optimizer_does(kind: Any, dtype: torch.dtype, lr: float) -> None:
    with pytest.raises(ValueError, match=r"otherwise than the whole .* must be element-wise"):
        paro(stack(dtype), partial(kind, lr=lr), None, "NNN")


@pytest.mark.parametrize("lr", [0.0, 1e-7, 1e-2])
@pytest.mark.parametrize(
    "kind", [torch.optim.AdamW, partial(torch.optim.SGD, momentum=0.9), torch.optim.RMSprop, torch.optim.Adagrad]
)
def test_small_rates_are_accepted(kind: Any, lr: float) -> None:
    paro(stack(torch.bfloat16), partial(kind, lr=lr), None, "IIG").close()


def by_shape(named: Named, lr: float = 1e-3) -> torch.optim.Optimizer:
    """Decay matrices only, and a smaller rate for wide ones, by all the ways to ask for a shape."""
    found = list(named)
    wide = [p for _, p in found if p.dim() >= 2 and p.shape[1] == 6 and p.numel() == 36]
    rest = [p for _, p in found if p.ndim >= 2 and not any(p is other for other in wide)]
    assert all(p.size(0) in (1, 6) and len(p.size()) == 2 for p in rest)
    flat = [p for _, p in found if p.ndim < 2]
    return torch.optim.AdamW(
        [
            {"params": wide, "lr": lr / 6, "weight_decay": 0.1},
            {"params": rest, "weight_decay": 0.1},
            {"params": flat, "weight_decay": 0.0},
        ],
        lr=lr,
    )


def trained_by_shape(mesh: Mesh, strategy: str) -> tuple[dict[str, Tensor], int]:
    engine = paro(stack(), by_shape_if_whole, nodes(mesh), strategy)
    for step in range(3):
        engine.backward(engine(rows(mesh.rank, step)).square().mean())
        engine.step()
    found = weights(engine), len(engine.optimizer.param_groups)
    engine.close()
    return found


def by_shape_if_whole(named: Named) -> torch.optim.Optimizer:
    found = list(named)
    return by_shape(found) if len(found) > 1 else torch.optim.AdamW(found, lr=1e-3, weight_decay=0.1)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow), 4])
def test_groups_by_shape_see_the_whole_shape(ranks: int) -> None:
    expected = alone(stack(), by_shape, ranks, 3)
    for found, groups in run_ranks(ranks, trained_by_shape, "GGG"):
        assert_near(found, expected)
        assert groups == 3


# Checkpoints


class Normed(nn.Module):
    """Statistics that differ between ranks, a buffer in another order of memory, and one that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6))])
        self.end = nn.Linear(6, 1)
        self.register_buffer("table", torch.zeros(3, 2).t())
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.layers[0](x)) + self.table.sum()


COSINE = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=20)


def kept(mesh: Mesh, folder: Path, strategy: str, save: bool, how: str) -> dict[str, Any]:
    """Three steps, a checkpoint and three more, or only what follows the checkpoint; what counts at the end."""
    backend: dict[str, Any] = {"backend": "torch"} if how == "torch" else {}
    engine: Any = paro(stack(kind=Normed), ADAMW, nodes(mesh), strategy, **backend)
    schedule = COSINE(engine.optimizer)

    def steps(some: range) -> None:
        for step in some:
            engine.backward(engine(rows(0, step)).square().mean())
            engine.step()
            schedule.step()

    if save:
        with torch.no_grad():
            engine.module.table += torch.arange(6.0, dtype=torch.float64).view(2, 3) + 100 * mesh.rank
            engine.module.layers[0][1].running_mean += mesh.rank
        steps(range(3))
        before = weights(engine)
        writer = PartitionWriter(str(folder))
        if how.startswith("async"):
            stager = (
                {"async_stager": DefaultStager(StagingOptions(False, False, False, False))}
                if how == "async_default"
                else {}
            )
            started: Any = dcp.async_save(engine.state(), storage_writer=writer, **stager)
            steps(range(90, 92))  # what is saved is what was there before
            started.result()
        else:
            dcp.save(engine.state(), storage_writer=writer)
        if mesh.world_size > 1:
            dist.barrier()
    checkpoint.load_tensors(folder, engine.state(), mesh)
    engine.loaded()
    if save:
        assert how == "torch" or all(torch.equal(value, before[name]) for name, value in weights(engine).items())
    schedule = COSINE(engine.optimizer)
    schedule.load_state_dict({**schedule.state_dict(), "base_lrs": [1e-2], "last_epoch": 3, "_step_count": 4})
    at_load = engine.optimizer.param_groups[0]["lr"]
    table = engine.module.table.clone()
    with torch.no_grad():
        engine.module.table.zero_()
    steps(range(3, 6))
    statistics = {name: value.clone() for name, value in engine.module.layers[0][1].named_buffers()}
    found = {"weights": weights(engine), "table": table, "statistics": statistics}
    found["rates"] = [at_load, engine.optimizer.param_groups[0]["lr"]]
    engine.close()
    return found


@pytest.mark.parametrize(
    ("saved", "how"),
    [
        ("IIG", "save"),
        ("IIG", "async"),
        pytest.param("GGG", "async_default", marks=pytest.mark.slow),
        pytest.param("GGG", "torch", marks=pytest.mark.slow),
    ],
)
def test_buffers_and_schedules_go_on(saved: str, how: str, tmp_path: Path) -> None:
    """All ranks go on with the first one's buffers, and at the schedule's rate."""
    (first, *_) = run_ranks(4, kept, tmp_path, saved, True, how)
    assert torch.equal(first["table"], torch.arange(6.0, dtype=torch.float64).view(2, 3))
    assert not first["statistics"]["running_mean"].eq(0).any()
    plain = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-2)
    schedule, expected = COSINE(plain), []
    for _ in range(6):
        plain.step()
        schedule.step()
        expected.append(schedule.get_last_lr()[0])
    for ranks, strategy, backend in ((4, "NIG", "save"), (2, "GGG", "save"), (2, "GGG", "torch"), (1, "NNN", "save")):
        for found in run_ranks(ranks, kept, tmp_path, strategy, False, backend):
            assert found["rates"] == pytest.approx([expected[2], expected[5]], rel=1e-12)
            assert torch.equal(found["table"], first["table"])
            if backend == "save":
                assert_near(found["weights"], first["weights"])
                assert_near(found["statistics"], first["statistics"])


def test_state_that_is_made_in_the_middle_of_a_step_moves_nothing() -> None:
    """One parameter has its state already, the other has none yet; both have gradients."""
    old, new = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = torch.optim.AdamW([old, new])
    old.grad = torch.ones(2)
    optimizer.step()
    weights = old.detach().clone()
    old.grad, new.grad = torch.full((2,), 3.0), torch.full((2,), 4.0)
    assert [made is new for made in create_optimizer_state(optimizer)] == [True]
    assert torch.equal(old, weights)
    assert float(optimizer.state[old]["step"]) == 1
    assert torch.equal(old.grad, torch.full((2,), 3.0))
    assert torch.equal(new.grad, torch.full((2,), 4.0))
    assert not any(value.any() for value in optimizer.state[new].values())


# Dtypes


class HalfFrozen(Stack):
    """A frozen layer, whose numbers bf16 does not have."""

    def __init__(self) -> None:
        super().__init__()
        for param in self.layers[0].parameters():
            param.requires_grad_(False)


BF16: dict[str, Any] = {"compute_dtype": torch.bfloat16}


def rounded_nowhere(mesh: Mesh, folder: Path, strategy: str) -> None:
    model = stack(torch.float32, HalfFrozen)
    begun = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert not torch.equal(begun["layers.0.0.weight"], begun["layers.0.0.weight"].bfloat16().float())
    engine = paro(model, partial(torch.optim.SGD, lr=1e-5), nodes(mesh), strategy, **BF16)
    assert all(torch.equal(value, begun[name]) for name, value in weights(engine).items())
    for step in range(2):
        engine.backward(engine(rows(mesh.rank, step, torch.float32)).float().square().mean())
        engine.step()
        with pytest.raises(RuntimeError, match=r"this rank holds a (rounded copy|part) of .* only"):
            model.state_dict()
    moved = weights(engine)
    for partition in engine.partitions:
        inside = moved[partition.name].flatten()[partition.start : partition.stop]
        assert torch.equal(inside, partition.tensor.detach())
    assert not torch.equal(moved["end.weight"], begun["end.weight"])
    held = engine.memory_bytes()["frozen"]
    assert held == pytest.approx(42 * 4 / mesh.world_size, abs=4 * mesh.world_size)

    checkpoint.save(folder, 1, engine.state(), {}, mesh)
    changed = {name: value + 2**-12 for name, value in moved.items()}  # too little for bf16
    with engine.unsharded(write_back=True):
        model.load_state_dict(changed)
    assert all(torch.equal(value, changed[name]) for name, value in weights(engine).items())
    checkpoint.load_tensors(folder / "step-00000001", engine.state(), mesh)
    engine.loaded()
    with engine.unsharded():
        before = engine(rows(mesh.rank, 3, torch.float32))
        engine.backward(before.square().mean())
    engine.step()
    last = weights(engine)
    assert torch.equal(last["layers.0.0.weight"], begun["layers.0.0.weight"])
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    engine.close()
    assert all(p.dtype == torch.float32 and torch.equal(p, last[name]) for name, p in model.named_parameters())
    assert set(model.state_dict()) == set(begun)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("strategy", ["NNN", pytest.param("NIG", marks=pytest.mark.slow), "IIG"])
def test_no_digit_is_lost_to_the_dtype_of_computing(ranks: int, strategy: str, tmp_path: Path) -> None:
    run_ranks(ranks, rounded_nowhere, tmp_path, strategy)


class Quantised(nn.Module):
    """Weights as codes: bytes, truth values, and floats of 8 bits where asked."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.randint(0, 255, (6, 5), dtype=torch.uint8), requires_grad=False)
        self.mask = nn.Parameter(torch.rand(6) > 0.3, requires_grad=False)
        self.eighth = nn.Parameter(torch.randn(7).to(torch.float8_e4m3fn), requires_grad=False)
        self.end = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        decoded = (self.codes ^ 0x55).to(x.dtype) / 255 * self.mask[:, None]
        return self.end(x @ decoded.t()) * self.eighth.to(x.dtype).sum()


def quantised(mesh: Mesh, strategy: str) -> None:
    torch.manual_seed(1 + mesh.rank)
    model = nn.Sequential(Quantised())
    torch.manual_seed(1)
    expected = Quantised()
    engine = paro(model, ADAMW, nodes(mesh), strategy, **BF16)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert list(dtypes.values())[:3] == [torch.uint8, torch.bool, torch.float8_e4m3fn]
    x = rows(0, 0, torch.float32)
    torch.testing.assert_close(engine(x).float(), expected(x), rtol=0.02, atol=0.02)
    engine.backward(engine(x).mean())
    assert engine.step().grad_norm > 0
    found = weights(engine)
    for name in ("codes", "mask", "eighth"):
        value = getattr(expected, name)
        assert torch.equal(found[f"0.{name}"].view(torch.uint8), value.view(torch.uint8)), name
        assert engine.state().get(f"0.{name}", value).dtype == value.dtype
    engine.close()


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow), 4])
def test_quantised_parameters_are_left_alone(ranks: int) -> None:
    for strategy in ("NNN", "IIG", "GGG"):
        run_ranks(ranks, quantised, strategy)


# Several engines


class Generator(Stack):
    """Makes rows of what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.end = nn.Linear(6, 5)


def played(mesh: Mesh, strategies: tuple[str, str]) -> list[dict[str, Tensor]]:
    """A generator and its judge, then two towers of one loss, in two micro-batches a step."""
    made = [paro(stack(kind=k), ADAMW, nodes(mesh), s) for k, s in zip((Generator, Stack), strategies, strict=True)]
    maker, judge = made
    for step in range(3):
        for_maker = judge(maker(rows(mesh.rank, step))).square().mean()
        maker.backward(for_maker, others=[judge])
        maker.step(clip_norm=1.0)
        judge.forget_gradients()
        with torch.no_grad():
            fake = maker(rows(mesh.rank, step))
        judge.backward((judge(rows(mesh.rank, 9)) - judge(fake)).square().mean())
        judge.step()
    for step in range(2):
        for last in (False, True):
            x = rows(mesh.rank, step + 50 * last)
            judge.backward((judge(x) * maker(x)).sum(), last, others=[maker])
        maker.step()
        judge.step()
    found = [weights(engine) for engine in made]
    for engine in made:
        engine.close()
    return found


@pytest.mark.parametrize("strategies", [("IIG", "GGG"), pytest.param(("NNN", "III"), marks=pytest.mark.slow)])
def test_a_loss_through_two_engines(strategies: tuple[str, str]) -> None:
    """4 ranks learn what one process learns from all of their rows."""
    maker, judge = stack(kind=Generator), stack()
    optimizers = [ADAMW(model.parameters()) for model in (maker, judge)]

    def update(*updated: torch.optim.Optimizer) -> None:
        for optimizer in updated:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()

    for step in range(3):
        for rank in range(4):
            (judge(maker(rows(rank, step))).square().mean() / 4).backward()
        norm = float(nn.utils.get_total_norm([p.grad for p in maker.parameters() if p.grad is not None]))
        for p in maker.parameters():
            p.grad = p.grad * min(1.0, 1.0 / norm) if p.grad is not None else None
        update(optimizers[0])
        for rank in range(4):
            fake = maker(rows(rank, step)).detach()
            ((judge(rows(rank, 9)) - judge(fake)).square().mean() / 4).backward()
        update(optimizers[1])
    for step in range(2):
        for rank in range(4):
            for last in (False, True):
                x = rows(rank, step + 50 * last)
                ((judge(x) * maker(x)).sum() / 4).backward()
        update(*optimizers)
    for found in run_ranks(4, played, strategies):
        for model, values in zip((maker, judge), found, strict=True):
            assert_near(values, {name: p.detach() for name, p in model.named_parameters()}, 1e-11)


def test_an_engine_that_a_loss_forgets() -> None:
    maker, judge = paro(stack(kind=Generator), ADAMW, None, "III"), paro(stack(), ADAMW, None, "III")
    with pytest.raises(RuntimeError, match=r"or by another engine alone: .* engine.backward\(loss, others=\[...\]\)"):
        maker.backward(judge(maker(rows(0, 0))).mean())
    maker.backward(judge(maker(rows(0, 0))).mean(), others=[judge])
    assert maker.step().finite
    assert judge.step().finite


# Compiled layers


def compiled(mesh: Mesh, strategy: str, how: str) -> tuple[dict[str, Tensor], int]:
    """Weights after two steps, and how many graphs were compiled."""
    from torch._dynamo.backends.debugging import aot_eager

    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    model: Any = stack()
    if how == "wrapped":
        for number, layer in enumerate(model.layers):
            model.layers[number] = torch.compile(layer, backend=backend)
    if how == "before":
        for layer in model.layers:
            layer.compile(backend=backend, fullgraph=True)
    engine = paro(model, ADAMW, nodes(mesh), strategy)
    if how == "after":
        for layer in model.layers:
            layer.compile(backend=backend)
    if how == "whole":
        model.compile(backend=backend)
    for step in range(2):
        engine.backward(engine(rows(mesh.rank, step)).square().mean())
        engine.step()
    found = {name.replace("_orig_mod.", ""): value for name, value in weights(engine).items()}
    engine.close()
    return found, len(graphs)


@pytest.mark.parametrize(
    ("ranks", "strategy"),
    [
        (1, "III"),
        pytest.param(2, "GGG", marks=pytest.mark.slow),
        pytest.param(4, "IIG", marks=pytest.mark.slow),
        pytest.param(4, "NNN", marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo's own
def test_compiled_layers(ranks: int, strategy: str) -> None:
    expected = alone(stack(), ADAMW, ranks, 2)
    for how in ("wrapped", "before", "after", "whole"):
        for found, graphs in run_ranks(ranks, compiled, strategy, how, timeout_s=300):
            assert_near(found, expected)
            assert graphs >= 1, how


# Models as they are made


class Deep(nn.Module):
    """Everything that is made: nested modules, statistics, a tied weight, a module with a rule of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.begin = nn.Linear(5, 6)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), Scaled(6)) for _ in range(3))
        self.tied = nn.Linear(5, 6, bias=False)
        self.tied.weight = self.begin.weight
        self.end = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.begin(x) + self.tied(x)
        for layer in self.layers:
            h = layer(h)
        return self.end(h)


class Scaled(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(width))
        self.register_buffer("shift", torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.scale, 0.5, 1.5)
        nn.init.normal_(self.shift)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


def normal(module: nn.Module) -> None:
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        nn.init.normal_(tensor, 1.0, 0.1) if tensor.is_floating_point() else tensor.zero_()


def materialised(mesh: Mesh, strategy: str, own: bool) -> tuple[dict[str, Tensor], dict[str, Tensor], int, int]:
    """Weights when made and after two steps, all elements, and the most that were allocated at a time."""
    with torch.device("meta"):
        model = Deep().double()
    tied, most = model.tied.weight, 0

    def fill(module: nn.Module) -> None:
        nonlocal most
        there = {p.untyped_storage().data_ptr(): p.numel() for p in model.parameters() if not p.is_meta and p.numel()}
        most = max(most, sum(there.values()))
        module.reset_parameters() if own else normal(module)  # type: ignore[operator]

    torch.manual_seed(5 + mesh.rank)
    engine = paro(model, ADAMW, nodes(mesh), strategy, init=fill)
    assert model.tied.weight is tied is model.begin.weight
    begun = {**weights(engine), **{name: value.clone() for name, value in model.named_buffers()}}
    for step in range(2):
        engine.backward(engine(rows(0, step)).square().mean())
        engine.step()
    found = weights(engine)
    engine.close()
    return begun, found, sum(value.numel() for value in found.values()), most


@pytest.mark.parametrize(
    ("ranks", "strategy", "own"),
    [(1, "IIG", True), (4, "GGG", True), (2, "III", False), pytest.param(4, "NNN", False, marks=pytest.mark.slow)],
)
def test_a_model_on_the_meta_device(ranks: int, strategy: str, own: bool) -> None:
    """It is what the same initialisation makes of a whole model, and a rank never holds more than root and one unit."""
    expected = Deep().double()
    torch.manual_seed(5)
    for module in expected.modules():
        if own and hasattr(module, "reset_parameters"):
            module.reset_parameters()
        elif not own:
            normal(module)
    begun = {name: value.clone() for name, value in (*expected.named_parameters(), *expected.named_buffers())}
    trained = alone(expected, ADAMW, 1, 2)
    for at_start, found, size, most in run_ranks(ranks, materialised, strategy, own):
        assert_near(at_start, {name: value.detach() for name, value in begun.items()}, 0.0)
        assert_near(found, trained)
        unit = 36 + 6 + 2 * 6 + 6
        if strategy != "NNN" and ranks > 1:
            assert most <= size - 3 * unit + unit


class Forgets(nn.Linear):
    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.weight.zero_()


def test_models_on_the_meta_device_that_nobody_fills() -> None:
    with torch.device("meta"):
        attention, forgets, half = nn.MultiheadAttention(4, 2), Forgets(2, 2), nn.Linear(2, 2)
    with pytest.raises(
        ValueError, match=r"the module itself \(MultiheadAttention\) .* has no reset_parameters\(\): give"
    ):
        paro(attention, ADAMW, None, "III")
    with pytest.raises(ValueError, match=r"bias of the module itself is not filled by its reset_parameters\(\)"):
        paro(forgets, ADAMW, None, "III")
    half.bias = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="has weight on the meta device and others not"):
        paro(half, ADAMW, None, "III")


def test_parameters_that_cannot_be_sharded() -> None:
    lazy, overlapping, sparse = nn.LazyLinear(3), nn.Linear(3, 3), nn.Linear(3, 3)
    overlapping.weight = nn.Parameter(torch.ones(1, 3).expand(3, 3))
    sparse.weight = nn.Parameter(torch.eye(3).to_sparse())
    for module, complaint in (
        (lazy, "weight has no shape yet: call the module once"),
        (overlapping, "weight has elements that share memory"),
        (sparse, "weight has the layout torch.sparse_coo: make it dense"),
    ):
        with pytest.raises(ValueError, match=complaint):
            paro(nn.Sequential(nn.Linear(3, 3), module), ADAMW, None, "III")


def sharded_by_others(mesh: Mesh) -> None:
    model = stack()
    parallelize_module(model, init_device_mesh("cpu", (mesh.world_size,)), {"begin": ColwiseParallel()})
    with pytest.raises(ValueError, match=r"begin.weight is a DTensor, which others have sharded or encoded"):
        paro(model, ADAMW, nodes(mesh), "IIG")

    def fail(_: nn.Module) -> None:
        raise RuntimeError("a fault of the caller's")

    with torch.device("meta"):
        model = Stack()
    with pytest.raises(RuntimeError, match=r"^a fault of the caller's$"):
        paro(model, ADAMW, nodes(mesh), "IIG", init=fail)


def test_faults_of_the_caller_are_no_lost_peers() -> None:
    run_ranks(2, sharded_by_others)


class Strided(nn.Module):
    """Parameters and buffers in other orders of memory."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv1d(1, 6, 2), nn.Linear(24, 3)])
        self.layers[0].weight = nn.Parameter(
            self.layers[0].weight.detach().permute(2, 1, 0).contiguous().permute(2, 1, 0)
        )
        self.layers[1].weight = nn.Parameter(torch.randn(24, 3).t())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](self.layers[0](x[:, None]).flatten(1))


def strided(mesh: Mesh, strategy: str) -> dict[str, Tensor]:
    model = stack(kind=Strided)
    assert not any(layer.weight.is_contiguous() for layer in model.layers)
    engine = paro(model, ADAMW, nodes(mesh), strategy)
    for step in range(2):
        engine.backward(engine(rows(mesh.rank, step)).square().mean())
        engine.step()
    found = weights(engine)
    engine.close()
    return found


@pytest.mark.parametrize("ranks", [1, 4])
def test_parameters_in_other_orders_of_memory(ranks: int) -> None:
    for strategy in ("NNN", "GGG"):
        for found in run_ranks(ranks, strided, strategy):
            assert_near(found, alone(stack(kind=Strided), ADAMW, ranks, 2))
