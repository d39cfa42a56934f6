"""The type of an argument of a model: any value, and a text stays the text that it is.

To the parser of a value of any type a text is YAML, so that a template such as `Title: {text}` would be a mapping.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import yaml
from jsonargparse import ArgumentParser
from jsonargparse.typing import register_type

_FLAG = "--model.args."
_TEXT = "text that is no YAML"

if TYPE_CHECKING:
    Argument: TypeAlias = Any
else:

    class Argument:
        """Stands for a value of any type."""


def _read(value: Any) -> Any:
    """Return a number, a boolean or null that a text holds; all else as it is."""
    if isinstance(value, dict) and list(value) == [_TEXT]:
        return value[_TEXT]
    if not isinstance(value, str):
        return value
    parser = ArgumentParser(exit_on_error=False)  # it knows 1e-3, which YAML itself takes for text
    parser.add_argument("--value", type=Any)
    found = parser.parse_object({"value": value})["value"]
    return value if isinstance(found, dict | list) else found


def with_whole_texts(words: Sequence[str]) -> list[str]:
    """Return the words of a command in which an argument of a model that YAML would take for a mapping or a list, and
    that has no brackets, is marked as the text that it is.
    """
    out = list(words)
    for position, word in enumerate(words):
        key, equals, value = word.partition("=")
        if not word.startswith(_FLAG):
            continue
        if equals:
            out[position] = f"{key}={_marked(value)}"
        elif position + 1 < len(words):
            out[position + 1] = _marked(words[position + 1])
    return out


def _marked(word: str) -> str:
    try:
        found = yaml.safe_load(word)
    except yaml.YAMLError:
        return word
    of_text = isinstance(found, dict | list) and not word.lstrip().startswith(("{", "["))
    return json.dumps({_TEXT: word}) if of_text else word


register_type(Argument, lambda value: value, _read, type_check=lambda value, _: not isinstance(value, str | dict))
