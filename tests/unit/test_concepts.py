"""How many concepts a reader meets: types around the step, names in the loop, files, public names, one meaning each.

All of it is counted in the source, so that aliases count too.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator

from package import PACKAGE, sources

import gmeta

MAX_TYPES = 45
"""Own types and aliases that the signatures of the step reach."""
MAX_NAMES = 20
"""Own names that the file of the training loop imports."""
MAX_FILES = 4
"""Files of the package's root, besides folders and py.typed."""
LOOP = "training/loop.py"

SAME_MEANING = {
    "main": {"__main__.py", "lab/__main__.py"},  # entry points of two programs
    "adapt": {"meta/factored.py", "meta/reference.py"},  # the two engines, called alike
    "score": {"meta/factored.py", "meta/reference.py"},
    "id_value": {"data/prepare/encoding_v1.py", "data/prepare/values.py"},  # two versions of the encoding, called alike
    "number_value": {"data/prepare/encoding_v1.py", "data/prepare/values.py"},
    "label_value": {"data/prepare/encoding_v1.py", "data/prepare/values.py"},
}
"""Public names that may be defined in several files, and in which."""


class Source:
    """The modules of a package: what each defines and what it imports from the others.

    `files` maps a path below the package to its text; a test hands in files of its own.
    """

    def __init__(self, files: dict[str, str]) -> None:
        self.trees = {module_name(path): ast.parse(text) for path, text in files.items()}
        self.defined = {module: dict(definitions(tree)) for module, tree in self.trees.items()}
        self.imported = {module: dict(own_imports(tree)) for module, tree in self.trees.items()}

    def resolve(self, module: str, name: str) -> tuple[str, str] | None:
        """The module and name where `name` is defined, as seen in `module`; None when it is not ours."""
        seen = set()
        while (module, name) not in seen:
            seen.add((module, name))
            if name in self.defined.get(module, {}):
                return module, name
            module, name = self.imported.get(module, {}).get(name, (module, name))
        return None

    def named(self, module: str, expression: ast.AST) -> Iterator[tuple[str, str]]:
        """Own definitions that an annotation or a call names, as `Name` or as `module.Name`."""
        for node in ast.walk(expression):
            found = None
            if isinstance(node, ast.Name):
                found = self.resolve(module, node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                found = self.resolve(".".join(self.imported[module].get(node.value.id, ())), node.attr)
            if found is not None:
                yield found

    def step_types(self) -> set[tuple[str, str]]:
        """Own types and aliases reachable from the signatures of the step.

        The signatures are those of `train_step` and of every own function that its body calls by name; of a method
        that it calls by name, the signatures in all classes that are reached and define it. From a signature, every
        class and alias of ours in its annotations is reached. From a class, those in the annotations of what a value of
        it is made of: its public fields and the parameters of its constructor. From an alias, those that it stands for.
        Type variables do not count.
        """
        (home,) = [module for module, defined in self.defined.items() if "train_step" in defined]
        step = self.defined[home]["train_step"]
        calls = [node.func for node in ast.walk(step) if isinstance(node, ast.Call)]
        methods = {call.attr for call in calls if isinstance(call, ast.Attribute)}
        functions = {(home, "train_step"), *(found for call in calls for found in self.named(home, call))}
        waiting = []
        for module, name in functions:
            node = self.defined[module][name]
            if isinstance(node, ast.FunctionDef):
                waiting += [found for a in signature(node) for found in self.named(module, a)]
        reached: set[tuple[str, str]] = set()
        while waiting:
            module, name = waiting.pop()
            node = self.defined[module][name]
            if (module, name) in reached or isinstance(node, ast.FunctionDef) or is_type_variable(node):
                continue
            reached.add((module, name))
            for part in made_of(node, methods):
                waiting += self.named(module, part)
        return reached


def module_name(path: str) -> str:
    return ".".join(("gmeta", *(part for part in path.removesuffix(".py").split("/") if part != "__init__")))


def definitions(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """Classes, functions and assigned names of a module, private ones too."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.name, node
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            yield node.targets[0].id, node
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            yield node.target.id, node


def own_imports(tree: ast.Module) -> Iterator[tuple[str, tuple[str, str]]]:
    """Local name -> (module, name), of everything imported from gmeta anywhere in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "gmeta":
            yield from ((alias.asname or alias.name, (node.module, alias.name)) for alias in node.names)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                assert alias.name.split(".")[0] != "gmeta", f"line {node.lineno}: write `from gmeta… import …`"


def signature(function: ast.FunctionDef) -> Iterator[ast.expr]:
    """The annotations of parameters and result."""
    a = function.args
    for parameter in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg):
        if parameter is not None and parameter.annotation is not None:
            yield parameter.annotation
    if function.returns is not None:
        yield function.returns


def made_of(node: ast.AST, methods: set[str]) -> Iterator[ast.expr]:
    """The annotations that a class or alias leads to; of a class also the signatures of those `methods`."""
    if isinstance(node, ast.Assign | ast.AnnAssign):
        assert node.value is not None
        yield node.value
    for part in node.body if isinstance(node, ast.ClassDef) else ():
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name) and part.target.id[0] != "_":
            yield part.annotation
        elif isinstance(part, ast.FunctionDef) and part.name in {"__init__", *methods}:
            yield from signature(part)


def is_type_variable(node: ast.AST) -> bool:
    value = getattr(node, "value", None)
    return isinstance(value, ast.Call) and ast.unparse(value.func).split(".")[-1] in ("TypeVar", "ParamSpec")


def repeated_names(files: dict[str, str]) -> dict[str, list[str]]:
    """Public classes, functions and aliases of types that several files define, without those of `SAME_MEANING`.

    An alias that stands for the same type everywhere (`npt.NDArray[Any]`, `NDArray[Any]`) has one meaning: left out.
    """
    homes = defaultdict[str, dict[str, str]](dict)
    for path, text in files.items():
        for name, node in definitions(ast.parse(text)):
            value = getattr(node, "value", None)
            is_alias = name[0].isupper() and not name.isupper() and isinstance(value, ast.Subscript | ast.BinOp)
            if name[0] != "_" and (is_alias or value is None):
                homes[name][path] = re.sub(r"\b\w+\.(?=[A-Z])", "", ast.unparse(value)) if is_alias else path
    return {
        name: list(places)
        for name, places in homes.items()
        if len(set(places.values())) > 1 and not set(places) <= SAME_MEANING.get(name, set())
    }


def riddles(text: str) -> list[int]:
    """Lines of docstrings that begin with "Of"; of modules, classes, functions, fields and constants."""
    found = []
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        for part in body if isinstance(body, list) else ():
            if (
                isinstance(part, ast.Expr)
                and isinstance(part.value, ast.Constant)
                and isinstance(part.value.value, str)
            ):
                found += [part.lineno] * (part.value.value.split()[:1] == ["Of"])
    return sorted(found)


def test_a_step_reaches_few_types():
    reached = sorted(Source(sources()).step_types())
    assert len(reached) <= MAX_TYPES, "\n".join(f"{module}.{name}" for module, name in reached)


def test_the_loop_imports_few_names():
    names = sorted(name for name, _ in own_imports(ast.parse(sources()[LOOP])))
    assert len(names) <= MAX_NAMES, names


def test_the_root_holds_few_files():
    files = [path.name for path in PACKAGE.iterdir() if path.is_file() and path.name != "py.typed"]
    assert len(files) <= MAX_FILES, sorted(files)


def test_few_names_are_public():
    assert len(set(gmeta.__all__)) == len(gmeta.__all__) <= 25


def test_docstrings_are_sentences():
    assert {name: lines for name, text in sources().items() if (lines := riddles(text))} == {}


def test_a_public_name_has_one_meaning():
    assert repeated_names(sources()) == {}


STEP = {
    "core/batch.py": (
        "from typing import Literal, TypeVar\nT = TypeVar('T')\n"
        "Kind = Literal['Unseen']\nArray = list[T]\nUnseen = dict\n"
        "class Batch:\n    kind: Kind\n    data: Array[int]\n    _cache: 'Unseen'\n"
        "    def rest(self) -> Unseen: ...\n"
    ),
    "run.py": (
        "from gmeta.core.batch import Batch\nclass Part: ...\nclass Log: ...\nclass Made: ...\nclass Later: ...\n"
        "class Run:\n    def __init__(self, part: Part) -> None: ...\n    def log(self, line: str) -> Log: ...\n"
        "    def later(self) -> Later: ...\n"
        "def make() -> Made: ...\n"
    ),
    "step.py": (
        "from gmeta import run as runs\nfrom gmeta.core.batch import Batch\nfrom gmeta.run import Run\n"
        "def train_step(run: Run, batch: Batch) -> None:\n    run.log('x')\n    runs.make()\n    _help()\n"
        "class Helped: ...\ndef _help() -> Helped: ...\ndef unused() -> runs.Later: ...\n"
    ),
}


def test_types_are_counted():
    names = {name for _, name in Source(STEP).step_types()}
    assert names == {"Run", "Part", "Log", "Made", "Helped", "Batch", "Kind", "Array"}


def test_repeated_names_are_found():
    files = {
        "a.py": "Rows = dict[str, int]\nIds = t.List[int]\nclass Plan: ...\ndef _help(): ...\nN = 1\ndef main(): ...\n",
        "b.py": "Rows = list[int]\nIds = List[int]\ndef Plan(): ...\ndef _help(): ...\nN = 2\ndef main(): ...\n",
    }
    assert repeated_names(files) == {"Rows": ["a.py", "b.py"], "Plan": ["a.py", "b.py"], "main": ["a.py", "b.py"]}
    assert repeated_names({"__main__.py": "def main(): ...", "lab/__main__.py": "def main(): ..."}) == {}


def test_riddles_are_found():
    source = '"""Offers."""\nclass A:\n  """Of rows."""\n  x: int\n  """Of a row."""\n  def f(self):\n    "A row."\n'
    assert riddles(source) == [3, 5]
