"""The models: shapes, what they declare, seeds, and errors of `make_model`."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

from gmeta.config.train import ModelConfig
from gmeta.data.schema import Feature, NumericColumn, PackSchema
from gmeta.models.dlrm import DLRM
from gmeta.models.inputs import InputSpec, usual_features
from gmeta.models.registry import resolved_args
from gmeta.recommender.build import make_model

FEATURES = tuple(Feature(name=n, kind="categorical", num_ids=9, table=n) for n in ("user_id", "item_id", "genre"))


def schema(num_numeric: int = 2, features: tuple[Feature, ...] = FEATURES) -> PackSchema:
    numeric = tuple(NumericColumn(name=f"x{i}") for i in range(num_numeric))
    return PackSchema(features=features, numeric=numeric, label="y", binary_label=True, task="user_id")


def inputs(*leading: int, num_numeric: int = 2, dim: int = 4) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    embedded = {f.name: torch.randn(*leading, dim, generator=generator) for f in FEATURES}
    return torch.randn(*leading, num_numeric, generator=generator), embedded


@pytest.mark.parametrize("name", ["melu", "dlrm"])
@pytest.mark.parametrize("extras", [{}, {"layer_norm": True, "dropout": 0.5}])
@pytest.mark.parametrize("numeric", [True, False])
def test_any_leading_dimensions(name: str, extras: dict, numeric: bool) -> None:
    config = ModelConfig(name=name, embedding_dim=4, numeric=numeric, args={"hidden": [8], **extras})
    model = make_model(config, schema()).eval()
    dense, embedded = inputs(2, 3)
    logits = model(dense, embedded)
    assert logits.shape == (2, 3)
    for t in range(2):
        for s in range(3):
            one = model(dense[t, s], {n: e[t, s] for n, e in embedded.items()})
            torch.testing.assert_close(one, logits[t, s])
    assert model(*inputs(0, 5)).shape == (0, 5)
    assert torch.equal(model(dense + 1, embedded), logits) is not numeric


@pytest.mark.parametrize("name", ["melu", "dlrm"])
def test_declared_layers_exist(name: str) -> None:
    model = make_model(ModelConfig(name=name, embedding_dim=4), schema())
    assert model.features == ("user_id", "item_id", "genre")
    for layer in (model.head, *model.decision_layers):
        assert list(model.get_submodule(layer).parameters()) or layer == "norms"
    assert model.get_submodule(model.head).out_features == 1


def test_the_key_of_the_task_is_usual_only_where_nothing_else_is_there() -> None:
    assert usual_features(schema()) == ["item_id", "genre"]
    assert usual_features(schema(features=FEATURES[:1])) == ["user_id"]


@pytest.mark.parametrize("name", ["melu", "dlrm"])
def test_initialisation_is_seeded_and_leaves_global_state_alone(name: str) -> None:
    state = torch.random.get_rng_state()
    one, same, other = (make_model(ModelConfig(name=name), schema(), seed=s).state_dict() for s in (1, 1, 2))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert not all(torch.equal(one[k], other[k]) for k in one)


def test_dlrm_multiplies_every_pair_once() -> None:
    model = DLRM(InputSpec(dict.fromkeys("abc", 2), (), 0.0), bottom=[], hidden=[])
    vectors = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 5.0]), "c": torch.tensor([-1.0, 4.0])}
    with torch.no_grad():
        model.output.weight.copy_(torch.tensor([[1.0, 100.0, 10000.0]]))
        model.output.bias.zero_()
    assert model(torch.zeros(0), vectors).item() == 13 + 100 * 7 + 10000 * 17


def test_a_subset_of_features() -> None:
    model = make_model(ModelConfig(name="melu", features=["genre"], embedding_dim=4), schema())
    assert model.features == ("genre",)


def test_errors() -> None:
    with pytest.raises(ValueError, match="'item', which is not in the pack: did you mean 'item_id'"):
        make_model(ModelConfig(name="melu", features=["user_id", "item"]), schema())
    with pytest.raises(ValueError, match="'genre' twice"):
        make_model(ModelConfig(name="melu", features=["genre", "genre"]), schema())
    with pytest.raises(ValueError, match=r"model\.name is 'mellu': did you mean 'melu'"):
        make_model(ModelConfig(name="mellu"), schema())
    with pytest.raises(ValueError, match="no categorical feature"):
        make_model(ModelConfig(name="melu"), schema(features=()))
    with pytest.raises(ValueError, match="has 1 vectors to multiply"):
        make_model(ModelConfig(name="dlrm", features=["genre"], numeric=False), schema())


def test_words_that_an_argument_may_be_are_listed() -> None:
    def model(inputs: InputSpec, how: Literal["mean", "last"] = "mean") -> None: ...

    with pytest.raises(ValueError, match=r"model.args.how is 'max': must be one of mean, last"):
        resolved_args(model, {"how": "max"}, "one")
