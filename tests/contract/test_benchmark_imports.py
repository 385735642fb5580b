"""Benchmarks run seldom: that what they import is still there is told here."""

import ast
import importlib
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).resolve().parents[1] / "benchmarks").glob("*.py"))
OURS = ("app", "networks", "transforms", "tests")


@pytest.mark.parametrize("path", FILES, ids=[path.name for path in FILES])
def test_what_a_benchmark_imports_of_ours_is_there(path):
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    for node in nodes:
        if node.module.split(".")[0] in OURS and not node.module.startswith("networks.kernels"):
            module = importlib.import_module(node.module)
            for name in (alias.name for alias in node.names):
                there = hasattr(module, name) or importlib.util.find_spec(f"{node.module}.{name}")
                assert there, f"{path.name} imports {name} of {node.module}"
