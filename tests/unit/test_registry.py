"""Models by name and as package.module:Class, and what is wrong with them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gmeta.core.errors import UserCodeError
from gmeta.models.inputs import InputSpec
from gmeta.models.melu import MeLU
from gmeta.models.registry import build_model, can_be_found, features_of, find_model, is_foreign, name_of, resolved_args

INPUTS = InputSpec({"a": 4, "b": 4}, ("x",), 0.0)


class Towers(nn.Module):
    def __init__(
        self, inputs: InputSpec, *, hidden: int = 3, widths: Sequence[int] = (2, 2), mode: str = "dot"
    ) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs.width, hidden)

    def forward(self, dense: Tensor, embedded: dict[str, Tensor]) -> Tensor:
        return self.layer(torch.cat([dense, *embedded.values()], -1)).sum(-1)


class Picky(Towers):
    features = ("b",)


def raises(inputs: InputSpec) -> nn.Module:
    raise KeyError("user")


def not_a_module(inputs: InputSpec) -> int:
    return 3


@pytest.fixture
def own_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of the user's in the current directory, which is not on the Python path."""
    package = tmp_path / "my_models"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "towers.py").write_text("class TwoTowers: ...\nTEXT = 'x'\n")
    (package / "broken.py").write_text("import torch\n1 / 0\n")
    (package / "lacking.py").write_text("import module_that_nobody_has\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    yield package
    for name in [name for name in sys.modules if name.startswith("my_models")]:
        del sys.modules[name]


def test_names() -> None:
    assert find_model("melu") is MeLU
    assert (name_of(MeLU), name_of("melu"), name_of(Towers)) == ("melu", "melu", f"{__name__}:Towers")
    assert find_model(name_of(Towers)) is Towers
    assert (is_foreign("melu"), is_foreign("a:B")) == (False, True)


def test_names_that_can_be_found_again() -> None:
    assert name_of(functools.partial(Towers, hidden=5)) == name_of(Towers)
    assert resolved_args(functools.partial(Towers, hidden=5), {}, "t")["hidden"] == 5
    assert can_be_found(name_of(Towers))
    assert not can_be_found(name_of(lambda inputs: Towers(inputs)))


def test_arguments_that_a_run_cannot_save_are_named() -> None:
    def factory(inputs: InputSpec, *, act: type = nn.ReLU) -> nn.Module: ...

    with pytest.raises(ValueError, match=r"model.args.act of t is <class .*ReLU.*which a run cannot save"):
        resolved_args(factory, {}, "t")


def test_a_class_in_the_current_directory_is_found(own_package: Path) -> None:
    assert find_model("my_models.towers:TwoTowers").__name__ == "TwoTowers"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("melo", "did you mean 'melu'"),
        ("my_model.towers:TwoTowers", "there is no module 'my_model'"),
        ("my_models.tower:TwoTowers", "there is no module 'my_models.tower'"),
        ("my_models.towers:TwoTower", "has no 'TwoTower', did you mean 'TwoTowers'"),
        ("my_models.towers:TEXT", "TEXT is a str, not a class or function"),
    ],
)
def test_what_does_not_exist_is_named(own_package: Path, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"model.name is") as caught:
        find_model(name)
    assert message in str(caught.value)


@pytest.mark.parametrize(("module", "kind"), [("broken", ZeroDivisionError), ("lacking", ModuleNotFoundError)])
def test_a_module_that_fails_keeps_its_own_traceback(own_package: Path, module: str, kind: type) -> None:
    with pytest.raises(UserCodeError, match=f"importing my_models.{module} raised") as caught:
        find_model(f"my_models.{module}:Model")
    assert isinstance(caught.value.__cause__, kind)


def test_arguments_get_their_defaults_and_are_plain() -> None:
    assert resolved_args(Towers, {"hidden": 5}, "t") == {"hidden": 5, "widths": [2, 2], "mode": "dot"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"hiden": 3}, "model.args.hiden: t has no argument 'hiden', did you mean 'hidden'"),
        ({"hidden": "wide"}, "model.args.hidden is 'wide': t takes an int"),
        ({"hidden": None}, "model.args.hidden is None: t takes an int"),
        ({"widths": 3}, "model.args.widths is 3: t takes a"),
        ({"mode": [1]}, "model.args.mode is [1]: t takes a str"),
    ],
)
def test_wrong_arguments_are_named(args: dict, message: str) -> None:
    with pytest.raises(ValueError, match=r"model\.args") as caught:
        resolved_args(Towers, args, "t")
    assert message in str(caught.value)


def test_a_flag_is_true_or_false_and_no_word() -> None:
    def flagged(inputs: InputSpec, *, on: bool = False, off: int | None = 3, flag: bool = 0) -> None: ...

    given = {"on": True, "off": None, "flag": 0}
    assert resolved_args(flagged, given, "t") == given  # as a run saves them
    with pytest.raises(ValueError, match=r"model\.args\.on is 'yes': t takes a bool"):
        resolved_args(flagged, {"on": "yes"}, "t")


def test_factories_that_cannot_be_called() -> None:
    with pytest.raises(ValueError, match=r"model.args.width is missing: t needs it"):
        resolved_args(lambda inputs, width: None, {}, "t")
    with pytest.raises(ValueError, match=r"its first argument must be the InputSpec"):
        resolved_args(lambda: None, {}, "t")


def test_building() -> None:
    state = torch.random.get_rng_state()
    one, same, other = (build_model(Towers, INPUTS, {}, name="t", seed=s).state_dict() for s in (1, 1, 2))
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(one["layer.weight"], same["layer.weight"])
    assert not torch.equal(one["layer.weight"], other["layer.weight"])
    with pytest.raises(UserCodeError, match=r"could not be made: KeyError: 'user'") as caught:
        build_model(raises, INPUTS, {}, name="m:raises", seed=0)
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(ValueError, match=r"returned a int: it must return an nn.Module"):
        build_model(not_a_module, INPUTS, {}, name="m:f", seed=0)


def test_features_that_a_model_reads() -> None:
    assert features_of(Towers(INPUTS), INPUTS) == ("a", "b")
    assert features_of(Picky(INPUTS), INPUTS) == ("b",)
    with pytest.raises(ValueError, match=r"Picky.features names 'b', which is not among"):
        features_of(Picky(INPUTS), InputSpec({"a": 4}, ("x",), 0.0))
