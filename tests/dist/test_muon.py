"""Muon learns with partitions what it learns with whole matrices, and what torch's own learns."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from harness import run_ranks
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader

from gmeta.parallel.mesh import Mesh
from gmeta.sharding.auto import AutoSharding
from gmeta.sharding.checkpoint import PartitionWriter
from gmeta.sharding.hierarchy import node_mesh
from gmeta.sharding.muon import Muon, orthogonalise
from gmeta.sharding.optimizers import state_bytes_of_element
from gmeta.sharding.paro import paro
from gmeta.sharding.schedule import Links

Named = list[tuple[str, nn.Parameter]]


class Experts(nn.Module):
    """Layers with matrices of many shapes, a vector each, and heads of which a rank uses one."""

    def __init__(self) -> None:
        super().__init__()
        self.begin = nn.Linear(5, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, n), nn.Tanh(), nn.Linear(n, 8)) for n in (3, 16, 7))
        self.heads = nn.ModuleList(nn.Linear(8, 1) for _ in range(3))

    def forward(self, x: Tensor, head: int) -> Tensor:
        x = self.begin(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.heads[head](x)


def muon(named: Named, **options: Any) -> Muon:
    """Orthogonalise the layers' matrices, as one does, and leave the rest to AdamW."""
    hidden = [p for name, p in named if p.ndim == 2 and "begin" not in name]
    rest = [p for name, p in named if p.ndim != 2 or "begin" in name]
    options = {"ns_dtype": torch.float64, "momentum": 0.9, **options}
    return Muon([{"params": hidden, "use_muon": True, "lr": 0.02, **options}, {"params": rest}], lr=3e-3)


def model() -> Experts:
    torch.manual_seed(1)
    return Experts().double()


def rows(rank: int, step: int) -> Tensor:
    return torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(100 * step + rank))


def head_of(step: int) -> int:
    return (0, 1, 1, 0, 1)[step]  # nobody uses the third


def unsharded(ranks: int, steps: int) -> dict[str, Tensor]:
    """Train on all ranks' rows in one process."""
    module = model()
    optimizer = muon(list(module.named_parameters()))
    for step in range(steps):
        sum(module(rows(rank, step), head_of(step)).square().mean() / ranks for rank in range(ranks)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in module.named_parameters()}


def trained(
    mesh: Mesh, strategies: list[Any], steps: int, folder: Path | None
) -> list[tuple[dict[str, Tensor], float]]:
    """Train with each strategy; with `folder`, save half-way and go on from there in another engine under the next."""
    found = []
    nodes = node_mesh(mesh.world_size // 2 or 1) if mesh.world_size > 1 else None
    for number, strategy in enumerate(strategies):
        engine = paro(model(), muon, nodes, strategy)
        for step in range(steps):
            if folder is not None and step == steps // 2:
                path = str(folder / str(number))
                dcp.save(engine.state(), storage_writer=PartitionWriter(path))
                engine.close()
                engine = paro(model(), muon, nodes, strategies[number - 1])
                dcp.load(engine.state(), storage_reader=HuggingFaceStorageReader(path))
                engine.loaded()
            engine.backward(engine(rows(mesh.rank, step), head_of(step)).square().mean())
            engine.step()
        with engine.unsharded():
            weights = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
        sent = engine.sent
        found.append((weights, sent.intra + sent.inter))
        engine.close()
    return found


@pytest.mark.parametrize("ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_partitions_learn_what_whole_matrices_learn(ranks: int) -> None:
    strategies = ["NNN", "NNI", "NIG", "III", "IIG", "GGG", {"": "NNG", "layers": "GIG", "layers.1": "NNN"}]
    expected = unsharded(ranks, 5)
    for every in run_ranks(ranks, trained, strategies, 5, None):
        for strategy, (weights, _) in zip(strategies, every, strict=True):
            for name, value in expected.items():
                torch.testing.assert_close(
                    weights[name], value, rtol=1e-11, atol=1e-12, msg=lambda m, n=name, s=strategy: f"{s} {n}: {m}"
                )


def test_momentum_is_saved_under_one_strategy_and_loaded_under_another(tmp_path: Path) -> None:
    expected = unsharded(4, 4)
    for every in run_ranks(4, trained, ["IIG", "GGG"], 4, tmp_path):
        for weights, _ in every:
            for name, value in expected.items():
                torch.testing.assert_close(weights[name], value, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("strategy", "groups"),  # of ranks that bring matrices together
    [("NNI", 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("NNN", 0), ("NNG", 1)))],
)
def test_what_matrices_cost_on_the_wire(strategy: str, groups: int) -> None:
    """Every element goes to its matrix's owner and back, unless it is there: at most twice its bytes a step."""
    matrices = 8 * sum(p.numel() for name, p in model().named_parameters() if p.ndim == 2 and "begin" not in name)
    used = matrices - 8 * 8 * 2  # all but two heads
    several, few = (sum(every[0][1] for every in run_ranks(4, trained, [strategy], n, None)) for n in (3, 2))
    extra = several - few - sum(run_ranks(4, sent_by_adamw, strategy))
    assert extra <= 2 * groups * used
    assert (extra > 0) == (groups > 0)


def sent_by_adamw(mesh: Mesh, strategy: str) -> float:
    engine = paro(model(), lambda named: torch.optim.AdamW([p for _, p in named]), node_mesh(2), strategy)
    sent = [0.0]
    for step in range(3):
        engine.backward(engine(rows(mesh.rank, step), head_of(step)).square().mean())
        engine.step()
        sent.append(engine.sent.intra + engine.sent.inter)
    engine.close()
    return sent[3] - sent[2]


# One process


@pytest.mark.parametrize("options", [{}, {"nesterov": False}, {"adjust_lr_fn": "match_rms_adamw"}, {"ns_steps": 3}])
def test_updates_are_those_of_torch(options: dict[str, Any]) -> None:
    """Its own always computes in bf16, so ours does too here."""
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in ((6, 4), (4, 6), (5, 5), (1, 7))]
    theirs = copy.deepcopy(ours)
    mine = Muon([{"params": ours, "use_muon": True}], lr=0.02, weight_decay=0.1, **{})
    mine.param_groups[0].update(options)
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, **options)
    for _ in range(4):
        for own, other in zip(ours, theirs, strict=True):
            own.grad = torch.randn_like(own)
            other.grad = own.grad.clone()
        mine.step()
        reference.step()
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


def test_singular_values_come_near_one_and_vectors_stay() -> None:
    torch.manual_seed(0)
    for shape in ((20, 6), (6, 20), (9, 9)):
        matrix = torch.randn(shape, dtype=torch.float64)
        found = orthogonalise(matrix, dtype=torch.float64)
        u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
        values = u.T @ found @ vh.T
        torch.testing.assert_close(values, torch.diag(values.diagonal()), atol=1e-9, rtol=0)
        assert float(values.diagonal().min()) > 0.5
        assert float(values.diagonal().max()) < 1.5


def test_parameters_come_in_the_module_s_order() -> None:
    """So that a factory may go by the place of a layer. The root's come last in the engine's own buffers."""
    seen: list[list[str]] = []

    def by_place(named: Named) -> Muon:
        named = list(named)
        seen.append([name for name, _ in named])
        matrices = [p for _, p in named if p.ndim == 2]
        return Muon([{"params": matrices[1:-3], "use_muon": True}, {"params": [p for _, p in named if p.ndim == 1]}])

    engine = paro(model(), by_place, None, "GGG")
    assert seen[-1] == [name for name, _ in engine.module.named_parameters()]
    engine.close()


def test_a_factory_may_sort_by_size_and_name() -> None:
    """The trial makes optimizers of all parameters, as they are."""
    seen = []

    def by_size(named: Named) -> Muon:
        named = list(named)
        hidden = [p for name, p in named if p.ndim == 2 and p.numel() < 100 and "begin" not in name]
        rest = [p for name, p in named if not (p.ndim == 2 and p.numel() < 100 and "begin" not in name)]
        seen.append((len(hidden), len(rest)))
        return Muon([{"params": hidden, "use_muon": True}, {"params": rest}])

    paro(model(), by_size, None, "NNN").close()
    assert set(seen) == {(7, 13)}  # two matrices of 16 x 8 are the others'


def test_the_state_of_an_element() -> None:
    """The planner counts one number for an element of a matrix, and two for others."""
    module, device = model(), torch.device("cpu")
    sizes = {name: p.numel() for name, p in module.named_parameters()}
    matrices = sum(n for name, n in sizes.items() if name.endswith("weight") and "begin" not in name)
    total = sum(sizes.values())
    found = state_bytes_of_element(module, muon, device)
    assert found == pytest.approx(8 * (matrices + 2 * (total - matrices)) / total)
    assert state_bytes_of_element(module, lambda named: torch.optim.AdamW([p for _, p in named]), device) == 16
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    assert state_bytes_of_element(module, muon, device) == 0


def chosen(mesh: Mesh) -> set[str]:
    def by_name(named: Named) -> Muon:
        named = list(named)
        hidden = [p for name, p in named if name.endswith("weight")]
        return Muon([{"params": hidden, "use_muon": True}, {"params": [p for n, p in named if n.endswith("bias")]}])

    links = Links(1e9, 1e10)
    auto = AutoSharding(memory_bytes=1e9, links=links)
    engine = paro(model(), by_name, node_mesh(1), "auto", auto=auto)
    strategies = set(engine.strategies.values())
    engine.close()
    return strategies


def test_the_planner_tries_matrices() -> None:
    for strategies in run_ranks(2, chosen):
        assert len(strategies) == 1


class Empty(nn.Module):
    """A matrix without elements, and one with some."""

    def __init__(self) -> None:
        super().__init__()
        self.none = nn.Parameter(torch.zeros(0, 3))
        self.some = nn.Parameter(torch.ones(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.none, self.some]) @ x


def test_a_matrix_without_elements() -> None:
    engine = paro(Empty(), lambda named: Muon([{"params": [p for _, p in named], "use_muon": True}]), None, "NNN")
    engine.backward(engine(torch.ones(3)).sum())
    engine.step()
    assert not torch.equal(engine.module.some, torch.ones(2, 3))  # type: ignore[arg-type]
    engine.close()


def test_it_can_climb() -> None:
    up, down = (nn.Parameter(torch.eye(3)) for _ in range(2))
    for parameter, maximize in ((up, True), (down, False)):
        optimizer = Muon([{"params": [parameter], "use_muon": True}], maximize=maximize, weight_decay=0.0)
        parameter.grad = torch.eye(3)
        optimizer.step()
    torch.testing.assert_close(up - torch.eye(3), torch.eye(3) - down)
    assert float(up.detach()[0, 0]) > 1


def test_its_state_is_loaded() -> None:
    torch.manual_seed(0)
    modules = [model(), model()]
    optimizers = [muon(list(module.named_parameters())) for module in modules]

    def train(step: int, *places: int) -> None:
        for place in places:
            modules[place](rows(0, step), 0).square().mean().backward()
            optimizers[place].step()
            optimizers[place].zero_grad()

    train(0, 0)
    modules[1].load_state_dict(modules[0].state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    train(1, 0, 1)
    for one, other in zip(modules[0].parameters(), modules[1].parameters(), strict=True):
        assert torch.equal(one, other)

    hidden, rest = (group["params"] for group in optimizers[0].param_groups)
    with pytest.raises(ValueError, match="use_muon differs for 9 parameters"):
        optimizers[0].load_state_dict(torch.optim.AdamW([{"params": hidden}, {"params": rest}]).state_dict())


def test_a_copy_learns_on_by_itself() -> None:
    module = model()
    optimizer = muon(list(module.named_parameters()))

    def train(step: int, *pairs: tuple[nn.Module, Muon]) -> None:
        for one, own in pairs:
            one(rows(0, step), 0).square().mean().backward()
            own.step()
            own.zero_grad()

    train(0, (module, optimizer))
    other, copied = copy.deepcopy((module, optimizer))
    restored = pickle.loads(pickle.dumps(optimizer))
    assert [p.shape for p in restored.shapes] == [p.shape for p in optimizer.shapes]
    train(1, (module, optimizer), (other, copied))
    for ours, theirs in zip(module.parameters(), other.parameters(), strict=True):
        assert ours is not theirs
        assert torch.equal(ours, theirs)


def copied_while_sharded(mesh: Mesh) -> None:
    engine = paro(model(), muon, node_mesh(1), "IIG")
    engine.backward(engine(rows(mesh.rank, 0), 0).square().mean())
    engine.step()
    optimizer = engine.optimizer
    assert isinstance(optimizer, Muon)
    copied = copy.deepcopy(optimizer)
    assert copied._exchange is optimizer._exchange is not None
    assert list(copied._names.values()) == list(optimizer._names.values())
    for ours, theirs in zip(optimizer.shapes, copied.shapes, strict=True):
        assert ours is not theirs
        assert optimizer.state[ours].keys() == copied.state[theirs].keys()
        assert all(torch.equal(value, copied.state[theirs][name]) for name, value in optimizer.state[ours].items())
    engine.close()


def test_a_sharded_one_is_copied() -> None:
    run_ranks(2, copied_while_sharded)


def test_hooks_run_once_a_step() -> None:
    weight = nn.Parameter(torch.zeros(2))
    torch.optim.AdamW([weight]).step()  # from now on AdamW's own step calls hooks
    optimizer, calls = Muon([weight]), list[int]()
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    weight.grad = torch.ones(2)
    optimizer.step()
    assert calls == [1]
    assert float(weight.detach()[0]) != 0


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \[3\] is in a group with use_muon"):
        Muon([{"params": [nn.Parameter(torch.zeros(3))], "use_muon": True}])
    with pytest.raises(ValueError, match="adjust_lr_fn is 'other'"):
        Muon([{"params": [nn.Parameter(torch.zeros(3, 3))], "use_muon": True, "adjust_lr_fn": "other"}])
    with pytest.raises(ValueError, match=r"shape \[8\] is in a group with use_muon"):
        paro(model(), lambda named: Muon([{"params": [p for _, p in named], "use_muon": True}]), None, "NNN")
