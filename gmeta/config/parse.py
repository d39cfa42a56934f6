"""From YAML, mappings and command-line words to a config dataclass, by jsonargparse; mistakes are told in one form."""

from __future__ import annotations

import json
import re
import shlex
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cache, partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from gmeta.config.argument import with_whole_texts
from gmeta.config.deprecated import model_of, upgrade, upgrade_words
from gmeta.config.train import USERS_KEYS, TrainConfig
from gmeta.core.errors import closest
from gmeta.core.files import read_mapping
from gmeta.core.nested import flat, nested

_T = TypeVar("_T")
_SETTINGS = "settings"
_TRAIN = "train"
"""Field of a command's config that holds a TrainConfig. Its keys are keys of the command, not of a section."""


def parser_of(config: type, prog: str) -> ArgumentParser:
    """Return the parser of a config dataclass; its help comes from the fields' docstrings."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=prog,
        exit_on_error=False,
        allow_abbrev=False,
        description=config.__doc__,
        usage=f"{prog} [--config FILE] [--key VALUE] [--section.key VALUE] ...",
    )
    parser.add_argument("--config", action="config", help="YAML file; later options override it.")
    parser.add_class_arguments(config, skip={_TRAIN})
    if _TRAIN in config.__dataclass_fields__:  # type: ignore[attr-defined]
        parser.add_class_arguments(TrainConfig, skip={"run_dir"})
        parser.add_argument(
            "--run_dir", type=str, default="", help="Run directory that best.yaml names; unset: best, under out."
        )
    for group in parser._action_groups:  # jsonargparse repeats the summary as the title of the group
        if group.title and (config.__doc__ or "").startswith(group.title.rstrip(":")):
            group.title = _SETTINGS
    return parser


def keys_of(parser: ArgumentParser) -> list[str]:
    """Return the dotted keys that a parser knows."""
    return [action.dest for action in parser._actions if action.dest not in ("help", "config", "print_config")]


def parse_words(parser: ArgumentParser, config: type[_T], words: Sequence[str]) -> tuple[_T, dict[str, Any]]:
    """Return the config that command-line words describe, and what the parser knows besides its fields.

    Raises ValueError in one form: `key is VALUE: what it must be`, or with the nearest known key.
    """
    check_config_files(words, keys_of(parser))
    try:
        values = parser.parse_args(with_whole_texts(words))
        values.pop("config", None)
        fields = set(config.__dataclass_fields__)  # type: ignore[attr-defined]
        shared = set(TrainConfig.__dataclass_fields__) if _TRAIN in fields else set()
        known = fields | shared
        others = {key: values.pop(key) for key in list(values.keys()) if key.partition(".")[0] not in known}
        made = parser.instantiate(values)
        arguments = {name: made[name] for name in fields - {_TRAIN}}
        if shared:
            arguments[_TRAIN] = TrainConfig(**{name: made[name] for name in shared})
        return config(**arguments), others
    except ArgumentError as error:
        raise ValueError(explain(str(error), parser)) from None
    except TypeError as error:
        raise ValueError(str(error)) from None


def given_values(parser: ArgumentParser, words: Sequence[str]) -> dict[str, Any]:
    """Return what command-line words and their config files say, without any default. `parse_words` tells what is wrong
    with them, before.
    """
    values = parser.parse_args(with_whole_texts(words), defaults=False)
    values.pop("config", None)
    found: dict[str, Any] = values.as_dict()
    return found


def name_bare_words(words: Sequence[str], key: str) -> list[str]:
    """Return the words with those that belong to no flag gathered as the list `--key`; a flag takes one value."""
    bare: list[str] = []
    named: list[str] = []
    value_follows = False
    for word in words:
        is_flag = word.startswith("--") and not value_follows
        (named if is_flag or value_follows else bare).append(word)
        value_follows = is_flag and "=" not in word and word != "--print_config"
    return [*named, f"--{key}={json.dumps(bare)}"] if bare else named


_mapping_parser: Callable[[type], ArgumentParser] = cache(partial(parser_of, prog="gmeta"))
"""Parsers that nobody adds to: making one takes 0.1 s, and a command reads the config of a run several times."""


def known_keys(config: type) -> list[str]:
    """Return the dotted keys of a config dataclass."""
    return keys_of(_mapping_parser(config))


def parse_mapping(config: type[_T], values: Mapping[str, Any], source: str) -> _T:
    """Return the config that a mapping describes. Raises ValueError that names `source` and the key."""
    parser = _mapping_parser(config)
    try:
        _require_sections(values, keys_of(parser))
        for key in _unknown_keys(values, keys_of(parser)):
            raise ValueError(_unknown(key, parser))
        made = parser.instantiate(parser.parse_object(dict(values)))
        return config(**{name: made[name] for name in config.__dataclass_fields__})  # type: ignore[attr-defined]
    except ArgumentError as error:
        raise ValueError(f"{source}: {explain(str(error), parser)}") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from None


def train_config(
    source: TrainConfig | Mapping[str, Any] | str | Path,
    complete: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda values: values,
) -> TrainConfig:
    """Return the training config that a YAML file, a mapping or a dataclass holds.

    `complete` adds what is left out; of a dataclass without a model, fields that have their defaults count as left out.
    Old keys are renamed with a FutureWarning. Raises ValueError for what is unknown or out of range.
    """
    if isinstance(source, TrainConfig) and source.model.name:
        source = asdict(source)
    elif isinstance(source, TrainConfig):
        usual, given = (flat(asdict(c), whole=USERS_KEYS) for c in (TrainConfig(pack="", run_dir=""), source))
        source = nested({key: value for key, value in given.items() if usual.get(key, ...) != value})
    if isinstance(source, Mapping):
        values, name = _without_paths(source), "config"
    elif not isinstance(source, str | Path):
        raise ValueError(f"config is {source!r}: give the path of a YAML file, a mapping or a TrainConfig")
    else:
        values, name = read_mapping(Path(source), "name a YAML file with the settings of `gmeta train`"), str(source)
    upgraded, told = upgrade(values)
    for sentence in told:
        warnings.warn(f"{name}: {sentence}", FutureWarning, stacklevel=3)
    parse_mapping(TrainConfig, upgraded, name)  # mistakes come before what is left out
    return parse_mapping(TrainConfig, complete(upgraded), name)


def _without_paths(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mapping with paths as text, as YAML has them."""
    return {
        key: _without_paths(value) if isinstance(value, Mapping) else str(value) if isinstance(value, Path) else value
        for key, value in values.items()
    }


def modern_words(words: Sequence[str], command: str = "train") -> tuple[list[str], list[str]]:
    """Return the words of a command without old names, in flags and in config files, and what to warn of.

    A file with old names is handed on as YAML text in place of its path, and so is one whose `model.args` are to be
    added to those of an earlier file for the same model.
    """
    cure = "correct it, it must hold `key: value` lines"
    files = {path: read_mapping(path, cure) for _, path in _config_files(words)}
    named = [word for flag, word in _flags(words) if flag == "model.name"]
    named = named or [name for values in files.values() if (name := model_of(values)) is not None]
    model = named[-1] if named else None
    renamed, told = upgrade_words(words, command, model)
    earlier: dict[str, Any] = {}  # section `model` of the files before
    for position, path in _config_files(renamed):
        values, found = upgrade(files[path], command=command, model=model)
        merged = _with_earlier_args(values, earlier)
        told += [f"{path}: {sentence}" for sentence in found]
        if found or merged is not values:
            text = yaml.safe_dump(merged, sort_keys=False)
            renamed[position] = f"--config={text}" if renamed[position].startswith("--config=") else text
        if isinstance(merged.get("model"), dict):
            earlier |= merged["model"]
    return renamed, told


def _with_earlier_args(values: dict[str, Any], earlier: Mapping[str, Any]) -> dict[str, Any]:
    """Return a file's settings with the arguments that earlier files give to the same model: the parser would take
    `model.args` for one value.
    """
    section = values.get("model")
    before = earlier.get("args")
    if not isinstance(section, dict) or not before or not isinstance(before, dict):
        return values
    if earlier.get("name") not in (None, section.get("name", earlier.get("name"))):
        return {**values, "model": {"args": {}, **section}}
    if not isinstance(section.get("args"), dict):
        return values
    return {**values, "model": {**section, "args": {**before, **section["args"]}}}


def _flags(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the flags among the words, without dashes, with their values."""
    for word, following in zip_longest(words, words[1:], fillvalue=""):
        key, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("--"):
            yield key, value if equals else following


def require_named_code(words: Sequence[str]) -> None:
    """Raise ValueError where code that is not gmeta's would run because a run directory names it.

    A run may come from anyone, so that its config.yaml alone must not choose what is imported; the command line may.
    """
    said = {flag for flag, _ in _flags(words)}
    for _, path in _config_files(words):
        if path.name != "config.yaml" or not (path.parent / "run_id").exists():
            continue
        values = read_mapping(path, "correct it, it must hold `key: value` lines")
        for key in ("model.name", "elastic.policy"):
            section, _, name = key.partition(".")
            inside = values.get(section)
            found = inside.get(name) if isinstance(inside, dict) else None
            if isinstance(found, str) and ":" in found and key not in said:
                raise ValueError(
                    f"{path} names code of its own, {key} {found}: training with it runs that code. "
                    f"Where you trust it, name it yourself: --{key} {shlex.quote(found)}"
                )


def explain(message: str, parser: ArgumentParser) -> str:
    """Return jsonargparse's complaint as `key is VALUE: what it must be`, or with the nearest known key."""
    named = re.match(r'Parser key "([^"]+)":', message)
    value = re.search(r"(?:Got|Given) value: (.*)", message)
    if named and value:
        choices = re.search(r"typing\.Literal\[(.*?)\]", message)
        kinds = re.search(r"(?:Expected an? |Subtypes: \[)(.+?)(?:\. Got value|\]\n|\n)", message)
        kind = re.sub(r"<class '(\w+)'>", r"\1", kinds[1]) if kinds else "another type"
        if choices:
            rule = f"one of {choices[1]}"
        elif value[1].strip("'\" +-").lower() in ("nan", "inf", "infinity"):  # YAML takes these for text
            rule = "a finite number"
        elif kind == "str":  # YAML took it for something else
            rule = "text: write it in quotes"
        elif kind.startswith("dict"):
            rule = "a mapping, such as {name: value}, with a space after the colon"
        else:
            rule = f"of type {kind.replace(', ', ' or ').replace('NoneType', 'null')}"
        return f"{named[1]} is {value[1]!r}: must be {rule}"
    if named and (inside := _inside(named[1], keys_of(parser))):
        value = re.search(r"Unable to load config '(.*)'", message)
        if value:
            return f"{named[1]} is {value[1]!r}: it is a section, such as --{inside[0]} VALUE"
    if missing := re.search(r'key "config": File does not exist: (.*)', message):
        return f"config is {missing[1]}: there is no such file; name a YAML file of `key: value` lines"
    found_key = re.search(r"(?:unrecognized arguments: --|[Oo]ption '|[Kk]ey '|nexpected key[s]? )([\w.]+)", message)
    if found_key and found_key[1] not in keys_of(parser):
        return _unknown(found_key[1], parser)
    return message


def _unknown_keys(values: Mapping[str, Any], known: Sequence[str], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        key = f"{prefix}{name}"
        if any(other.startswith(f"{key}.") for other in known) and isinstance(value, Mapping):
            yield from _unknown_keys(value, known, f"{key}.")
        elif key not in known:
            yield key


def _unknown(key: str, parser: ArgumentParser) -> str:
    known = keys_of(parser)
    near = closest(key, [name for name in known if not _inside(name, known)])
    hint = f"did you mean {near}?" if near else f"`{parser.prog} --help` lists the keys"
    return f"unknown key {key}: {hint}"


def check_config_files(words: Sequence[str], keys: Sequence[str]) -> None:
    """Raise ValueError for a --config file that is no YAML mapping, or whose section holds no keys of its own."""
    for _, path in _config_files(words):
        found = read_mapping(path, "correct it, it must hold `key: value` lines")
        _require_sections(found, keys, where=f" in {path}")


def _require_sections(values: Mapping[str, Any], keys: Sequence[str], where: str = "") -> None:
    for section, found in values.items():
        inside = _inside(section, keys)
        if inside and not isinstance(found, Mapping):
            example = inside[0].partition(".")[2]
            raise ValueError(f"{section} is {found!r}{where}: it is a section, such as {section}: {{{example}: …}}")


def _inside(section: str, keys: Sequence[str]) -> list[str]:
    """Return the keys of a section; the list is empty where `section` is none."""
    return [key for key in keys if key.startswith(f"{section}.")]


def _config_files(words: Sequence[str]) -> list[tuple[int, Path]]:
    """Return where config files that exist are named among the words."""
    found = []
    for position, (flag, value) in enumerate(zip_longest(words, words[1:], fillvalue="")):
        if flag.startswith("--config="):
            found.append((position, flag.partition("=")[2]))
        elif flag == "--config":
            found.append((position + 1, value))
    # A text of several lines is YAML itself; of a file that does not exist the parser tells.
    return [(position, Path(text)) for position, text in found if "\n" not in text and Path(text).is_file()]
