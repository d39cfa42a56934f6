"""What the docs say of the code is true: the tour names files and functions that exist, and stays short.

The pins of constraints.txt lie inside the bounds of pyproject.toml, so that both name versions that the tests ran on.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

import gmeta
from gmeta.cli import COMMANDS, command_parser, run
from gmeta.config.parse import keys_of
from gmeta.data.raw_columns import RawFeature, RawNumeric, RawNumericSequence
from gmeta.data.schema import DataSchema, Vector, parse_data_schema
from gmeta.elastic.scenario import parse_scenario
from gmeta.models.registry import MODELS, find_model

PACKAGE = Path(gmeta.__file__).parent
ROOT = Path(os.environ.get("GMETA_SOURCE_TREE", Path(__file__).resolve().parents[2]))
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")

MAX_WORDS = 25
"""Words of the glossary."""
MAX_LINES = 10
"""Steps of each of the two ways."""


def section(title: str, page: str = ARCHITECTURE) -> str:
    """The text under a heading of the second level."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE)
    assert found, f"there is no section {title!r}"
    return found[1]


def rows(table: str) -> list[list[str]]:
    """The cells of a table's rows, without its head."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def codes(text: str) -> list[str]:
    """What stands between back quotes."""
    return re.findall(r"`([^`]+)`", text)


def defined_names() -> set[str]:
    """Every class, function, method and constant of the package: `Class`, `function`, `Class.method`."""
    names = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                names |= {node.name} | {f"{node.name}.{part.name}" for part in node.body if hasattr(part, "name")}
            elif isinstance(node, ast.FunctionDef):
                names.add(node.name)
    return names


NAMES = defined_names()


def exists(code: str) -> bool:
    """Whether a path below the package, or a (dotted) name, is there; a name may be preceded by its module's."""
    if "/" in code or code.endswith(".py"):
        return (PACKAGE / code).exists() or (ROOT / code).exists()
    name = code.removesuffix("()")
    parts = name.split(".")
    if name in NAMES or ((PACKAGE / parts[0]).is_dir() and len(parts) == 1):
        return True
    if len(parts) > 1 and parts[-1] in NAMES:
        module = "/".join(parts[:-1])
        found = [path for path in PACKAGE.rglob("*.py") if path.with_suffix("").as_posix().endswith(f"/{module}")]
        own = {node for path in found for node in re.findall(r"^(?:def|class) (\w+)", path.read_text(), re.MULTILINE)}
        return parts[-1] in own or (parts[0] == "gmeta" and parts[-1] in gmeta.__all__)
    return False


@pytest.mark.parametrize("title", ["The way of a batch", "The way of a config"])
def test_a_way_names_what_exists(title: str) -> None:
    steps = [line for line in section(title).splitlines() if line.strip()]
    assert 3 <= sum(line[0].isdigit() for line in steps) == len(steps) <= MAX_LINES
    named = codes(section(title))
    assert len(named) >= 5
    assert [code for code in named if not exists(code)] == []


def test_where_do_i_change_names_files_that_exist() -> None:
    table = rows(section("Where do I change …?"))
    assert len(table) >= 12
    for what, where in table:
        named = [code for code in codes(where) if not code.startswith("--") and code != "build_*"]
        assert named, what
        assert [code for code in named if not exists(code)] == [], what


def test_the_glossary_is_short_and_names_where_a_word_is_defined() -> None:
    table = rows(section("Words"))
    assert 1 <= len(table) <= MAX_WORDS
    assert len({word for word, *_ in table}) == len(table)
    for word, meaning, where in table:
        path, *names = codes(where)
        assert meaning, word
        assert (PACKAGE / path).is_file(), word
        own = re.findall(r"^class (\w+)|^def (\w+)", (PACKAGE / path).read_text(encoding="utf-8"), re.MULTILINE)
        assert [name for name in names if name not in {a or b for a, b in own}] == [], word


def test_the_picture_has_every_room() -> None:
    picture = re.search(r"```\n(.*?)```", ARCHITECTURE, re.DOTALL)
    assert picture
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    assert {room for room in rooms if not re.search(rf"\b{room}\b", picture[1])} == set()


def test_a_name_that_does_not_exist_is_found() -> None:
    assert exists("Exchange.fetch")
    assert exists("data/order.py")
    assert not exists("data/nothing.py")
    assert not exists("Exchange.nothing")
    assert not exists("loader.Exchange")


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_settings_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    paths = {code for code in codes(text) if re.fullmatch(r"(?:gmeta|tests|examples|benchmarks)/[\w./-]+\.\w+", code)}
    assert sorted(path for path in paths if not (ROOT / path).exists() and not (PACKAGE.parent / path).exists()) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_in_the_docs_use_flags_that_exist(command: str) -> None:
    keys = {*keys_of(command_parser(command)), "config", "print_config", "help", "nproc"}
    wrong = []
    for page in PAGES:
        for line in page.read_text(encoding="utf-8").splitlines():
            for call in re.findall(rf"gmeta {command}( [^`#|]*)", line):
                flags = re.findall(r"--([\w.]+)", call)
                wrong += [
                    f"{page.name}: {flag}" for flag in flags if flag not in keys and not flag.startswith("model.args")
                ]
    assert wrong == []


def test_no_text_of_the_package_sends_readers_to_a_page_that_the_wheel_lacks() -> None:
    """Help and messages answer themselves; docstrings that only developers read may name a page."""
    for command in COMMANDS:
        assert "docs/" not in command_parser(command).format_help() + (COMMANDS[command].epilog or ""), command
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for raised in (node for node in ast.walk(tree) if isinstance(node, ast.Raise)):
            told = [n.value for n in ast.walk(raised) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
            assert not any("docs/" in text for text in told), f"{path.name}, line {raised.lineno}"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_prints_its_summary_once(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([command, "--help"]) == 0
    summary = (COMMANDS[command].config.__doc__ or "").split()
    assert " ".join(capsys.readouterr().out.split()).count(" ".join(summary[:8])) == 1


_OF_ONE_LABEL = ("label", "label_threshold", "item_statistics")


def test_the_schema_in_the_help_of_prepare_is_one_and_has_every_key() -> None:
    text = (COMMANDS["prepare"].epilog or "").partition("\n\n")[2]
    values = yaml.safe_load(text)
    found = parse_data_schema(values)
    assert found.tables()["item_id"]
    keys = {field.name for field in fields(DataSchema)} - {"features", "labels"} | {"categorical", "multi", "sequence"}
    assert set(values) == keys
    several = {
        key: value
        for line in text.splitlines()
        if "#   label" in line
        for key, value in yaml.safe_load(line.partition("#")[2]).items()
    }
    of_several = parse_data_schema({key: value for key, value in values.items() if key not in _OF_ONE_LABEL} | several)
    assert [label.weight for label in of_several.labels] == [1.0, 0.5]
    kinds = ("categorical", "multi", "sequence", "numeric", "numeric_sequence")
    listed = [entry for kind in kinds for entry in values[kind]]
    inside = {key for entry in listed if isinstance(entry, dict) for key in entry}
    raw = (RawFeature, RawNumeric, RawNumericSequence)
    assert inside == {field.name for kind in raw for field in fields(kind)} - {"kind"}
    assert {key for entry in values["vector"] for key in entry} == {field.name for field in fields(Vector)}


def test_the_scenario_in_the_help_of_the_laboratory_is_one() -> None:
    for command in ("lab", "simulate"):
        lines = (COMMANDS[command].epilog or "").splitlines()
        text = "\n".join(line[4:] for line in lines if line.startswith("    "))
        assert len(parse_scenario(text, "help").events) == 7


def test_every_model_is_in_the_table_and_every_argument_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    listed = {codes(row[0])[0] for row in rows(section("Models", (ROOT / "docs/training.md").read_text()))}
    assert run(["train", "--help"]) == 0
    printed = capsys.readouterr().out
    help_of_args = " ".join(printed[printed.index("Arguments of the model") :].split()).partition("Your own class")[0]
    for name in MODELS:
        assert name in listed
        arguments = [word for word in inspect.signature(find_model(name)).parameters if word != "inputs"]
        assert not [word for word in arguments if word not in help_of_args], name


def bounds() -> dict[str, str]:
    """Package -> the version below which pyproject.toml keeps it, of those that some command needs."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    blocks = re.findall(
        r"^(?:dependencies|serve|registry|export|faiss|text) = \[(.*?)\]", text, re.DOTALL | re.MULTILINE
    )
    return dict(re.findall(r'"([\w-]+)(?:>=[\d.]+,)?<([\d.]+)(?:; [^"]*)?"', "".join(blocks)))


def test_every_dependency_is_bounded_just_above_its_pin() -> None:
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    needed = re.findall(
        r'"',
        "".join(
            re.findall(
                r"^(?:dependencies|serve|registry|export|faiss|text) = \[(.*?)\]", text, re.DOTALL | re.MULTILINE
            )
        ),
    )
    upper = bounds()
    assert len(needed) == 2 * len(upper), "a dependency has no upper bound"
    pins: dict[str, list[tuple[int, ...]]] = {}
    for name, version in re.findall(r"^([\w.-]+)==(\d+(?:\.\d+)*)", constraints, re.MULTILINE):
        pins.setdefault(name.lower().replace("_", "-"), []).append(tuple(int(x) for x in version.split(".")))
    for name, bound in upper.items():
        limit = tuple(int(x) for x in bound.split("."))
        newest = max(pins[name.lower()])
        assert newest < limit, name
        slack = 2 if name == "torch" else 1  # of torch one release more was tested
        assert limit[-1] - newest[len(limit) - 1] <= slack, f"{name} {bound} is far above {newest}, which was tested"
