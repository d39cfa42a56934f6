"""The size budget: files of at most 500 code lines, functions of at most 60, nine in ten of at most 40."""

import ast

import pytest
from package import sources


def code_lines(lines: list[str]) -> int:
    """Lines that are neither blank nor comment."""
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in lines)


def function_sizes(source: str) -> dict[str, int]:
    """Code lines of each function, a nested one counted in its parent too; keyed by name and line."""
    lines = source.splitlines()
    return {
        f"{node.name}:{node.lineno}": code_lines(lines[node.lineno - 1 : node.end_lineno])
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def test_files_are_small():
    sizes = {name: code_lines(source.splitlines()) for name, source in sources().items()}
    assert len(sizes) > 10
    assert {name: size for name, size in sizes.items() if size > 500} == {}


def test_functions_are_small():
    sizes = {f"{name}:{f}": size for name, source in sources().items() for f, size in function_sizes(source).items()}
    assert {name: size for name, size in sizes.items() if size > 60} == {}
    assert sorted(sizes.values())[int(0.9 * len(sizes))] <= 40


def test_lines_are_counted():
    source = "def f():\n    '''Doc.'''\n\n    # why\n    def g():\n        return 1\n    return g\n"
    assert function_sizes(source) == {"f:1": 5, "g:5": 2}


def test_every_test_folder_is_collected(pytestconfig: pytest.Config) -> None:
    """pytest passes over folders called dist unless told otherwise, and says nothing."""
    assert "dist" not in pytestconfig.getini("norecursedirs")
