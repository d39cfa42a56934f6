"""From a name to a model: the built-in ones by name, your own as `package.module:Class`.

A model is a callable `(inputs: InputSpec, **args) -> nn.Module`.
"""

from __future__ import annotations

import collections.abc
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import torch
import xxhash
from jsonargparse import ArgumentError, ArgumentParser
from torch import nn

from gmeta.core.errors import UserCodeError, nearest
from gmeta.models.dcn import DCN
from gmeta.models.deepfm import DeepFM
from gmeta.models.din import DIN
from gmeta.models.dlrm import DLRM
from gmeta.models.hamur import HAMUR
from gmeta.models.inputs import InputSpec
from gmeta.models.melu import MeLU
from gmeta.models.mmoe import MMoE
from gmeta.models.neural_linear import NeuralLinear
from gmeta.models.pepnet import PEPNet
from gmeta.models.ple import PLE
from gmeta.models.sasrec import SASRec
from gmeta.models.shared_bottom import SharedBottom
from gmeta.models.star import STAR
from gmeta.models.taste import Taste
from gmeta.models.transformer import Transformer

ModelFactory = Callable[..., nn.Module]
"""`(inputs: InputSpec, **args) -> nn.Module`."""

MODELS: dict[str, ModelFactory | str] = {
    "melu": MeLU,
    "dlrm": DLRM,
    "taste": Taste,
    "neural_linear": NeuralLinear,
    "din": DIN,
    "transformer": Transformer,
    "deepfm": DeepFM,
    "dcn": DCN,
    "shared_bottom": SharedBottom,
    "mmoe": MMoE,
    "ple": PLE,
    "star": STAR,
    "pepnet": PEPNet,
    "hamur": HAMUR,
    "sasrec": SASRec,
    "bahe": "gmeta.text.bahe:BAHE",
    "llmrec": "gmeta.text.llmrec:LLMRec",
    "with_texts": "gmeta.text.beside:WithTexts",
}
"""Add a model: one file beside this one, and its line here. One of a floor above is named, and found when asked for."""


def find_model(name: str, key: str = "model.name") -> ModelFactory:
    """Return the model that the setting `key` names. Raises ValueError where there is none, with the nearest.

    A module is looked for as Python does it, and in the current directory.
    """
    known = MODELS.get(name, name)
    if not isinstance(known, str):
        return known
    module_name, colon, attribute = known.partition(":")
    if not colon:
        raise ValueError(f"{key} is {name!r}: {nearest(name, MODELS)} (your own model is named package.module:Class)")
    module = _import(module_name, name)
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            public = [word for word in vars(found) if not word.startswith("_")]
            raise ValueError(f"{key} is {name!r}: {module_name} has no {part!r}, {nearest(part, public)}")
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(f"{key} is {name!r}: {attribute} is a {type(found).__name__}, not a class or function")
    return found  # type: ignore[no-any-return]


def _import(module: str, name: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)  # a console script, unlike `python -m`, does not look where it was started
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module == error.name or module.startswith(f"{error.name}.")):
            raise UserCodeError(f"model.name is {name!r}: importing {module} raised {error}") from error
        raise ValueError(
            f"model.name is {name!r}: there is no module {error.name!r} on the Python path or in {here}"
        ) from None
    except Exception as error:  # the user's own code runs here
        raise UserCodeError(
            f"model.name is {name!r}: importing {module} raised {type(error).__name__}: {error}"
        ) from error


def name_of(model: str | ModelFactory) -> str:
    """Return the name under which a run records a model, such as `my.towers:TwoTowers`."""
    if isinstance(model, str):
        return model
    for name, known in MODELS.items():
        if model is known:
            return name
    if isinstance(model, functools.partial):
        return name_of(model.func)  # what is bound is among the resolved arguments
    qualified = getattr(model, "__qualname__", type(model).__qualname__)
    module = getattr(model, "__module__", "__main__")
    if module == "__main__":  # the name under which others can import it
        main = sys.modules["__main__"]
        spec, script = getattr(main, "__spec__", None), getattr(main, "__file__", None)
        module = spec.name if spec is not None else Path(script).stem if script is not None else module
    found = f"{module}:{qualified}"
    return next((name for name, known in MODELS.items() if known == found), found)


def can_be_found(name: str) -> bool:
    """Whether a recorded name can be one of a module and its attribute: a lambda, or what was typed in, has none."""
    return "<" not in name and not name.startswith("__main__:")


def is_foreign(name: str) -> bool:
    """Say whether a name makes gmeta import code that is not its own."""
    return name not in MODELS


def source_hash(name: str) -> str:
    """Return a checksum of the file that a model's code is in."""
    file = inspect.getsourcefile(inspect.unwrap(find_model(name)))
    if file is None:
        raise ValueError(
            f"model {name} has no source file: write it into a module, so that a version can name its code"
        )
    return xxhash.xxh3_64(Path(file).read_bytes()).hexdigest()


def resolved_args(
    factory: ModelFactory, args: Mapping[str, Any], name: str, setting: str = "model.args"
) -> dict[str, Any]:
    """Return `args`, which stand under a `setting`, with the factory's own defaults, checked by its annotations.

    Raises ValueError for an argument that is unknown (with the nearest), missing, or of the wrong type.
    """
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):
        raise ValueError(f"model {name} has no signature that could be read: name a class or a function") from None
    parameters = list(signature.parameters.values())
    if not parameters or parameters[0].kind not in (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
    ):
        raise ValueError(f"model {name} takes no inputs: its first argument must be the InputSpec")
    taken = {p.name: p for p in parameters[1:]}
    anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken.values())
    named = {k: p for k, p in taken.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    for key in args:
        if key not in named and not anything:
            hint = nearest(key, named) if named else "it takes none"
            raise ValueError(f"{setting}.{key}: {name} has no argument {key!r}, {hint}")
    for key, parameter in named.items():
        if key not in args and parameter.default is parameter.empty:
            raise ValueError(f"{setting}.{key} is missing: {name} needs it")
    checked = _checked(factory, {key: args[key] for key in args if key in named}, name, setting)
    defaults = {key: _plain(p.default) for key, p in named.items() if p.default is not p.empty}
    found = {**defaults, **args, **checked}
    for key, value in found.items():
        if not _can_be_saved(value):
            raise ValueError(
                f"{setting}.{key} of {name} is {value!r}, which a run cannot save: use a number, a text, a list or a "
                "mapping, and let the model make of it what it needs"
            )
    return found


def with_younger_args(name: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """Return the saved arguments of a model with the defaults of those that it did not have then; of a model of
    somebody's own, whose code is not run for this, the saved ones.
    """
    return resolved_args(find_model(name), args, name) if name in MODELS else dict(args)


def _can_be_saved(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _can_be_saved(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(_can_be_saved, value))
    return value is None or isinstance(value, bool | int | float | str)


def _checked(factory: ModelFactory, args: dict[str, Any], name: str, setting: str) -> dict[str, Any]:
    """Return the arguments in the types that the factory's annotations name."""
    hints, found = _hints(factory), {}
    parameters = inspect.signature(factory).parameters
    for key, value in args.items():
        default = parameters[key].default
        saved = type(value) is type(default) and value == default  # by a run, whatever the annotation says of it
        if saved or hints.get(key, Any) is Any:  # to the parser a text of any type is YAML
            found[key] = _plain(value)
            continue
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--value", type=hints[key])
        kind = getattr(hints[key], "__name__", str(hints[key])).replace("typing.", "")
        wrong = value is None and type(None) not in get_args(hints[key])  # the parser takes it for "not given"
        wrong = wrong or (hints[key] is bool and not isinstance(value, bool))  # and a text "yes" for true
        try:
            if wrong:
                raise ArgumentError(None, "of another type")
            found[key] = _plain(parser.parse_object({"value": value})["value"])
        except ArgumentError:
            if get_origin(hints[key]) is Literal:
                raise ValueError(
                    f"{setting}.{key} is {value!r}: must be one of {', '.join(map(str, get_args(hints[key])))}"
                ) from None
            kind = f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"
            if get_origin(hints[key]) is collections.abc.Sequence:
                kind = "a list, such as [64]" if get_args(hints[key]) == (int,) else "a list, such as [a, b]"
            raise ValueError(f"{setting}.{key} is {value!r}: {name} takes {kind}") from None
    return found


def _hints(factory: ModelFactory) -> dict[str, Any]:
    import typing

    try:
        return typing.get_type_hints(factory.__init__ if inspect.isclass(factory) else factory)
    except Exception:  # names that only exist while type checking
        return {}


def _plain(value: Any) -> Any:
    """Return a value as YAML and JSON hold it, so that a saved run compares equal."""
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def build_model(
    factory: ModelFactory, inputs: InputSpec, args: Mapping[str, Any], *, name: str, seed: int
) -> nn.Module:
    """Return the model, initialised from `seed`; the global random state is left as it was.

    Raises ValueError for what the model itself refuses, and UserCodeError for what else it raises or returns.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = factory(inputs, **args)
        except ValueError as error:
            if is_foreign(name):
                raise UserCodeError(f"model {name} could not be made: {error}") from error
            raise
        except Exception as error:  # the user's own code runs here
            raise UserCodeError(f"model {name} could not be made: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"model {name} returned a {type(model).__name__}: it must return an nn.Module")
    return model


def features_of(model: nn.Module, inputs: InputSpec) -> tuple[str, ...]:
    """Return the features and sequences that a model reads: its attribute `features`, or all. ValueError for an unknown
    one.
    """
    names = getattr(model, "features", None)
    if names is None:
        return tuple(inputs.widths)
    for name in names:
        if name not in inputs.widths:
            raise ValueError(
                f"{type(model).__name__}.features names {name!r}, which is not among the model's inputs: "
                f"{nearest(str(name), inputs.widths)} (the task's own key is one only if model.features names it)"
            )
    return tuple(names)
