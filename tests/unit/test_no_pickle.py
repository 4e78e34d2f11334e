"""Nothing is ever unpickled: whoever can write to Redis or to a topic must not be able to run code here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import stream_app

#: Modules whose readers build any object that the bytes ask for, or code.
UNSAFE = frozenset(
    {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "jsonpickle", "marshal", "shelve"}
)
#: Readers that do so unless told not to, by the end of a call's name.
UNSAFE_CALLS = frozenset({"yaml.load", "yaml.full_load", "yaml.unsafe_load", "yaml.load_all"})
UNSAFE_METHODS = frozenset({"read_pickle", "to_pickle", "load_pickle"})


def unsafe(text: str) -> Iterator[str]:
    """Say where a module could read such bytes."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Call):
            found = _called(node)
        else:
            continue
        for name in found:
            parts = name.split(".")
            if parts[0] in UNSAFE or parts[-1] in UNSAFE_METHODS or name in UNSAFE_CALLS:
                yield f"line {node.lineno}: {name}"


def _called(call: ast.Call) -> list[str]:
    """Name what a call calls, with what it imports by name or allows by its arguments."""
    name = ast.unparse(call.func)
    if name == "yaml.load" and any("SafeLoader" in ast.unparse(keyword.value) for keyword in call.keywords):
        return []
    if name.split(".")[-1] in {"import_module", "__import__"}:
        return [str(arg.value) for arg in call.args if isinstance(arg, ast.Constant)]
    if any(k.arg == "allow_pickle" and ast.unparse(k.value) != "False" for k in call.keywords):
        return ["pickle"]
    return [name]


def test_no_module_of_the_service_can_read_pickled_bytes() -> None:
    folder = Path(stream_app.__file__).parent
    modules = sorted(folder.rglob("*.py"))
    assert folder / "adapters" / "learning.py" in modules
    found = [
        f"{path.relative_to(folder.parent)}, {place}"
        for path in modules
        for place in unsafe(path.read_text(encoding="utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "import os, dill as d",
        "from pickle import loads",
        "def f():\n    import joblib",
        "from joblib.numpy_pickle import load",
        "import marshal",
        "import importlib\nimportlib.import_module('pickle')",
        "__import__('cloudpickle')",
        "import yaml\nyaml.load(text)",
        "import yaml\nyaml.load(text, Loader=yaml.Loader)",
        "from yaml import unsafe_load",
        "import numpy\nnumpy.load(path, allow_pickle=True)",
        "import pandas\npandas.read_pickle(path)",
    ],
)
def test_a_module_that_could_would_be_found(text: str) -> None:
    assert list(unsafe(text))


@pytest.mark.parametrize(
    "text",
    [
        "import json, zlib, msgpack",
        "# never pickle",
        "import yaml\nyaml.load(text, Loader=yaml.SafeLoader)",
        "import yaml\nyaml.safe_load(text)",
        "import numpy\nnumpy.load(path, allow_pickle=False)",
    ],
)
def test_a_module_that_could_not_is_let_be(text: str) -> None:
    assert not list(unsafe(text))
