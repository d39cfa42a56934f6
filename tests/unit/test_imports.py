"""Imports flow one way, by the source of the installed package (docs/architecture.md)."""

import ast
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from package import PACKAGE, sources

LAYERS = (
    {"core"},
    {"config"},
    {"data", "parallel", "models", "elastic"},
    {"text"},
    {"embedding", "sharding", "recipes"},
    {"optim", "meta", "runs"},
    {"recommender"},
    {"evaluation"},
    {"training"},
    {"delivery", "serving", "tuning"},
    {"lab", "benchmark"},
    {"cli", "doctor", "__main__"},
)
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
SHARED = {"gmeta.data.schema", "gmeta.doctor", "gmeta.cli"}
"""Modules that a neighbour of the same layer may import."""
NO_RANKS = {"data", "models", "meta"}
"""Rooms that know nothing of ranks."""
DISTRIBUTED = {
    "runs": "torch.distributed.checkpoint",
    "embedding": "torch.distributed.tensor",
    "doctor": "torch.distributed",
    "parallel": "torch.distributed",
    "sharding": "torch.distributed",
}
"""The part of torch.distributed that each room may import; the others none."""
ONLY_IN = {"transformers": "text", "tokenizers": "text"}
"""Packages that one room alone imports."""
STANDS_ALONE = {"elastic"}
"""Rooms that import no torch and nothing of ours: they serve any training loop."""
READS_ENVIRONMENT = {"parallel", "doctor"}


def imports(tree: ast.AST) -> Iterator[str]:
    """Every imported module, late imports too; `from gmeta.data import pack` gives gmeta.data.pack."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            assert node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def violations(room: str, source: str) -> list[str]:
    """What in a source file of `room` breaks the rules of the architecture."""
    tree = ast.parse(source)
    found = []
    for name in imports(tree):
        parts = name.split(".")
        if parts[0] == "gmeta" and len(parts) > 1 and parts[1] != room:
            target = parts[1]
            if LEVEL[target] > LEVEL[room]:
                found.append(f"{room} imports {name}, which comes after it")
            elif LEVEL[target] == LEVEL[room] and not any(within(name, shared) for shared in SHARED):
                found.append(f"{room} imports {name}, its neighbour")
            elif target == "parallel" and room in NO_RANKS:
                found.append(f"{room} imports {name}, but knows no ranks")
        if (home := ONLY_IN.get(parts[0], room)) != room:
            found.append(f"{room} imports {name}, which {home} alone may")
        if room in STANDS_ALONE and (parts[0] == "torch" or (parts[0] == "gmeta" and parts[1:2] != [room])):
            found.append(f"{room} imports {name}, but stands alone")
        allowed = DISTRIBUTED.get(room, "nothing")
        if within(name, "torch.distributed") and not within(name, allowed):
            found.append(f"{room} imports {name}, of torch.distributed it may import {allowed}")
    if room not in READS_ENVIRONMENT:
        found += [f"{room} reads the environment in line {line}" for line in environment_reads(tree)]
    return found


def within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def environment_reads(tree: ast.AST) -> list[int]:
    names = {"environ", "environb", "getenv"}
    return [
        node.lineno
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and node.attr in names)
        or (isinstance(node, ast.ImportFrom) and node.module == "os" and names & {alias.name for alias in node.names})
    ]


def test_every_room_has_a_layer():
    rooms = {Path(name).parts[0].removesuffix(".py") for name in sources()} - {"__init__"}
    assert rooms <= set(LEVEL), "give the new room a place in LAYERS and in docs/architecture.md"


def test_imports_flow_one_way():
    found = {
        name: broken
        for name, source in sources().items()
        if name != "__init__.py" and (broken := violations(Path(name).parts[0].removesuffix(".py"), source))
    }
    assert not found


@pytest.mark.parametrize(
    ("room", "source", "complaint"),
    [
        ("data", "def f():\n    from gmeta.meta.learner import MetaLearner", "after it"),
        ("models", "from gmeta.data import pack", "neighbour"),
        ("models", "from gmeta.parallel.mesh import Mesh", "neighbour"),
        ("meta", "import gmeta.parallel.mesh", "knows no ranks"),
        ("meta", "from torch import distributed", "torch.distributed"),
        ("embedding", "import torch.distributed as dist", "torch.distributed"),
        ("elastic", "import torch", "stands alone"),
        ("elastic", "from gmeta.core.batch import TaskBatch", "stands alone"),
        ("training", "def f():\n    from transformers import AutoModel", "text alone may"),
        ("training", "import os\nos.environ['RANK']", "environment in line 2"),
        ("training", "from os import getenv", "environment in line 1"),
    ],
)
def test_a_breach_is_found(room, source, complaint):
    assert any(complaint in line for line in violations(room, source))


def test_the_sound_is_left_alone():
    assert not violations("models", "from gmeta.data.schema import PackSchema\nfrom torch import nn")
    assert not violations(
        "embedding", "from gmeta.parallel.mesh import Mesh\nfrom torch.distributed.tensor import DTensor"
    )
    assert not violations("parallel", "import os\nimport torch.distributed as dist\nos.environ['RANK']")


def test_the_wheel_is_what_is_tested():
    """`make test` names the source tree; nothing of it may be importable from where the tests run."""
    tree = os.environ.get("GMETA_SOURCE_TREE")
    if tree is None:
        pytest.skip("make test names the source tree in GMETA_SOURCE_TREE")
    assert "site-packages" in PACKAGE.parts
    assert Path(tree).resolve() / "gmeta" != PACKAGE
    assert not Path(__file__).resolve().is_relative_to(Path(tree).resolve())
    spec = importlib.util.find_spec("gmeta")
    assert spec is not None
    assert [Path(place) for place in spec.submodule_search_locations or []] == [PACKAGE]
    assert (PACKAGE / "py.typed").is_file()
