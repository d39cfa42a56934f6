"""Models of several scenarios, and those beside them, against plain versions that go example by example."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gmeta.config.train import ModelConfig
from gmeta.data.schema import Feature, NumericColumn, PackSchema
from gmeta.models.inputs import InputSpec
from gmeta.models.layers import shares_of
from gmeta.recommender.build import make_model

SCENES, D, NUMBERS = 3, 4, 5
"""Scenarios, the width of embeddings, and numeric columns."""
NAMES = ("item", "scene", "user")
FEATURES = tuple(
    Feature(name=name, kind="categorical", num_ids=SCENES + 1 if name == "scene" else 9, table=name) for name in NAMES
)
PACK = PackSchema(
    features=FEATURES,
    numeric=tuple(NumericColumn(name=f"x{i}") for i in range(NUMBERS)),
    label="y",
    binary_label=True,
    task="user",
    item="item",
    scenario="scene",
)
Vector = list[float]
Plain = Callable[[Any, dict[str, Tensor], Tensor, int], Tensor]


def model_of(name: str, **args: Any) -> Any:
    """A model in double precision whose parameters are all drawn: zeros and ones would hide mistakes."""
    model = name.partition(",")[0]
    found: Any = make_model(ModelConfig(name=model, embedding_dim=D, args=args), PACK).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2)
    return found.eval()


def inputs(*leading: int) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    embedded = {name: torch.randn(*leading, D, generator=generator, dtype=torch.float64) for name in NAMES}
    embedded["scene.id"] = torch.randint(SCENES + 1, (*leading, 1), generator=generator)
    return torch.randn(*leading, NUMBERS, generator=generator, dtype=torch.float64), embedded


def relu_network(layers: nn.Module, x: Tensor) -> Tensor:
    """What a network of linear layers and ReLU makes of one vector."""
    for layer in layers.children():
        if isinstance(layer, nn.Linear):
            x = (layer.weight @ x + layer.bias).clamp(min=0)
    return x


def all_of(one: dict[str, Tensor], dense: Tensor) -> Tensor:
    return torch.cat([*(one[name] for name in NAMES), dense])


def over_scenes(logit: Callable[[int], Tensor], scene: int) -> Tensor:
    """The logit of a scenario from 1, or the mean over all of an unknown one."""
    return (
        logit(scene - 1)
        if scene
        else sum((logit(s) for s in range(SCENES)), torch.zeros(1, dtype=torch.float64)) / SCENES
    )


def shared_bottom(model: Any, one: dict[str, Tensor], dense: Tensor, scene: int) -> Tensor:
    h = relu_network(model.bottom, all_of(one, dense))
    return over_scenes(lambda s: model.outputs[s](relu_network(model.towers[s], h)), scene)


def mixture(gate: nn.Module, x: Tensor, experts: list[Tensor]) -> Tensor:
    weights = torch.exp(gate.weight @ x)
    return sum(
        (w * expert for w, expert in zip(weights / weights.sum(), experts, strict=True)),
        torch.zeros(1, dtype=torch.float64),
    )


def mmoe(model: Any, one: dict[str, Tensor], dense: Tensor, scene: int) -> Tensor:
    x = all_of(one, dense)
    experts = [relu_network(expert, x) for expert in model.experts]
    return over_scenes(
        lambda s: model.outputs[s](relu_network(model.towers[s], mixture(model.gates[s], x, experts))), scene
    )


def ple(model: Any, one: dict[str, Tensor], dense: Tensor, scene: int) -> Tensor:
    x = all_of(one, dense)
    of_scene = [x] * SCENES
    for level in model.levels:
        shared = [relu_network(expert, x) for expert in level.shared]
        own = [[relu_network(e, h) for e in experts] for h, experts in zip(of_scene, level.own, strict=True)]
        above = [mixture(level.gates[s], of_scene[s], [*own[s], *shared]) for s in range(SCENES)]
        if level.shared_gate is not None:
            x = mixture(level.shared_gate, x, [expert for mine in own for expert in mine] + shared)
        of_scene = above
    return over_scenes(lambda s: model.outputs[s](relu_network(model.towers[s], of_scene[s])), scene)


def star(model: Any, one: dict[str, Tensor], dense: Tensor, scene: int) -> Tensor:
    x = all_of(one, dense)
    normed = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()
    normed = normed * model.norm.weight + model.norm.bias

    def logit(s: int) -> Tensor:
        h = normed * model.norm_scale[s] + model.norm_shift[s]
        for place, layer in enumerate(model.shared):
            h = (layer.weight * model.scale[place][s]) @ h + layer.bias + model.shift[place][s]
            h = h.clamp(min=0) if place < len(model.shared) - 1 else h
        return h

    return over_scenes(logit, scene) + model.output(relu_network(model.auxiliary, x))


def gated(gate: nn.Sequential, *about: Tensor) -> Tensor:
    first, _, second = gate
    hidden = (first.weight @ torch.cat(about) + first.bias).clamp(min=0)
    return 2 / (1 + torch.exp(-(second.weight @ hidden + second.bias)))


def pepnet(model: Any, one: dict[str, Tensor], dense: Tensor, scene: int) -> Tensor:
    x = torch.cat([one["item"], one["user"], dense])
    x = gated(model.embedding_gate, one["scene"], x) * x
    h = x
    if model.bottom is not None:
        item, user, numbers = x.split([D, D, NUMBERS])
        vectors = [relu_network(model.bottom, numbers), one["scene"], item, user]
        h = torch.cat([vectors[0], torch.stack([a @ b for a, b in combinations(vectors, 2)])])
    for gate, layer in zip(model.gates, model.layers, strict=False):
        h = (layer.weight @ (gated(gate, one["item"], x) * h) + layer.bias).clamp(min=0)
    return model.output(gated(model.gates[-1], one["item"], x) * h)


def hamur(model: Any, one: dict[str, Tensor], dense: Tensor, scene: int) -> Tensor:
    h = all_of(one, dense)
    for layer, adapter in zip(model.layers, model.adapters, strict=True):
        h = (layer.weight @ h + layer.bias).clamp(min=0)
        matrix = adapter.hyper(one["scene"]).view(adapter.rank, adapter.rank)
        h = h + adapter.up((matrix @ adapter.down(adapter.norm(h))).clamp(min=0))
    return model.output(h)


def dcn(model: Any, one: dict[str, Tensor], dense: Tensor, scene: int) -> Tensor:
    first = x = all_of(one, dense)
    for layer in model.cross:
        x = first * (layer.weight @ x + layer.bias) + x
    return model.output(torch.cat([x, relu_network(model.deep, first)]))


def deepfm(model: Any, one: dict[str, Tensor], dense: Tensor, scene: int) -> Tensor:
    x = all_of(one, dense)
    pairs = sum((one[a] @ one[b] for a, b in combinations(NAMES, 2)), torch.zeros(1, dtype=torch.float64))
    return model.first_order.weight @ x + pairs + model.output(relu_network(model.deep, x))


MODELS: dict[str, tuple[Plain, dict[str, Any]]] = {
    "shared_bottom": (shared_bottom, {"hidden": [6], "tower": [5]}),
    "mmoe": (mmoe, {"experts": 3, "hidden": [6, 5], "tower": [4]}),
    "ple": (ple, {"own": 2, "shared": 3, "hidden": [6, 5, 7], "tower": [4]}),
    "star": (star, {"hidden": [6, 5], "auxiliary": [4]}),
    "pepnet": (pepnet, {"hidden": [6, 5], "gate": 3}),
    "pepnet, products": (pepnet, {"hidden": [6, 5], "gate": 3, "bottom": [7]}),
    "pepnet, weighed products": (pepnet, {"hidden": [], "gate": 3, "bottom": [7]}),
    "hamur": (hamur, {"hidden": [6, 5], "rank": 2}),
    "dcn": (dcn, {"cross": 2, "hidden": [6]}),
    "deepfm": (deepfm, {"hidden": [6]}),
}
ROUTED = ("shared_bottom", "mmoe", "ple", "star")


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_what_its_equations_say(name: str) -> None:
    plain, args = MODELS[name]
    model = model_of(name, **args)
    dense, embedded = inputs(2, 7)
    found = model(dense, embedded)
    assert found.shape == (2, 7)
    for t in range(2):
        for s in range(7):
            one = {key: value[t, s] for key, value in embedded.items()}
            expected = plain(model, one, dense[t, s], int(one["scene.id"]))
            torch.testing.assert_close(found[t, s], expected.squeeze(0))


@pytest.mark.parametrize("name", MODELS)
def test_examples_do_not_change_each_other(name: str) -> None:
    model = model_of(name, **MODELS[name][1])
    dense, embedded = inputs(3, 5)
    for t in range(3):
        one = model(dense[t], {key: value[t] for key, value in embedded.items()})
        torch.testing.assert_close(one, model(dense, embedded)[t])
    empty = model(dense[:0], {key: value[:0] for key, value in embedded.items()})
    assert empty.shape == (0, 5)


@pytest.mark.parametrize("name", ROUTED)
def test_only_the_own_part_of_a_scenario_learns(name: str) -> None:
    model = model_of(name, **MODELS[name][1])
    dense, embedded = inputs(6)
    embedded["scene.id"] = torch.full((6, 1), 2)
    model(dense, embedded).sum().backward()
    parts = model.scale if name == "star" else model.towers
    for part in parts if name == "star" else [parts]:
        of_scene = part.grad.flatten(1) if name == "star" else [tower[0].weight.grad for tower in part]
        assert [bool(gradient.abs().sum() > 0) for gradient in of_scene] == [False, True, False]


def test_an_unknown_scenario_takes_the_same_of_all() -> None:
    shares = shares_of({"scene.id": torch.tensor([[2], [0]])}, "scene", SCENES + 1, torch.float64)
    torch.testing.assert_close(shares, torch.tensor([[0, 1, 0], [1 / 3, 1 / 3, 1 / 3]], dtype=torch.float64))


@pytest.mark.parametrize("name", [*ROUTED, "pepnet", "hamur"])
def test_a_model_of_scenarios_needs_one(name: str) -> None:
    without = replace(PACK, scenario=None)
    with pytest.raises(ValueError, match=f"{name} has a part for each scenario, and reads none: .*model.features"):
        make_model(ModelConfig(name=name), without)


def test_pepnet_without_numbers_has_no_bottom_network() -> None:
    found: Any = make_model(
        ModelConfig(name="pepnet", embedding_dim=D, args={"hidden": [6], "bottom": [7]}), replace(PACK, numeric=())
    ).double()
    assert found.bottom is None
    dense, embedded = inputs(4)
    item, scene, user = (embedded[name] for name in NAMES)
    x = torch.cat([item, user], -1)
    gate = 2 * torch.sigmoid(found.embedding_gate(torch.cat([scene, x], -1)))
    item, user = (gate * x).split(D, -1)
    pairs = [(a * b).sum(-1) for a, b in combinations([scene, item, user], 2)]
    about = torch.cat([embedded["item"], item, user], -1)
    h = 2 * torch.sigmoid(found.gates[0](about)) * torch.stack(pairs, -1)
    h = 2 * torch.sigmoid(found.gates[1](about)) * torch.relu(found.layers[0](h))
    torch.testing.assert_close(found(dense[..., :0], embedded), found.output(h).squeeze(-1))


def test_routes_are_of_the_scenario_alone() -> None:
    class Model(nn.Module):
        routes = ("item",)

    spec = InputSpec(dict.fromkeys(NAMES, D), (), 0.0, "item", "scene", num_scenarios=4)
    with pytest.raises(
        ValueError, match="routes names 'item', which is not the scenario of the schema: that is 'scene'"
    ):
        spec.routes_of(Model())
