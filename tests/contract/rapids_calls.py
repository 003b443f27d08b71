"""Every call that our modules make into RAPIDS and CuPy, read off their sources, with the object that is called.

Two kinds of modules: those that import one of the libraries, and those on the array API, whose ``xp`` is CuPy on a GPU.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grace_ds

LIBRARIES = ("cupy", "cuvs", "pylibraft", "raft_dask", "rmm")
_IMPORTS = re.compile(rf"^ +(?:import|from) (?:{'|'.join(LIBRARIES)})\b", re.M)  # inside of functions only


@dataclass(frozen=True)
class Called:
    """One call: where, what, with how many positional arguments and which keywords."""

    where: str
    name: str
    target: Any
    positional: int
    keywords: tuple[str, ...]


def sources() -> list[Path]:
    """Modules that import one of the libraries."""
    return [path for path in sorted(Path(grace_ds.__file__).parent.rglob("*.py")) if _IMPORTS.search(path.read_text())]


def array_sources() -> list[Path]:
    """Modules that compute with whatever array library their arguments are of."""
    every = sorted(Path(grace_ds.__file__).parent.rglob("*.py"))
    return [path for path in every if "xp = array_namespace(" in path.read_text()]


def calls() -> Iterator[Called]:
    for path in sorted({*sources(), *array_sources()}):
        tree = ast.parse(path.read_text())
        names = dict(_imported(tree))
        if path in array_sources():
            names["xp"] = importlib.import_module("array_api_compat.cupy")
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            dotted = _dotted(node.func)
            if dotted and dotted[0] in names:
                target = names[dotted[0]]
                for part in dotted[1:]:
                    target = getattr(target, part)
                keywords = tuple(k.arg for k in node.keywords if k.arg)
                yield Called(f"{path.name}:{node.lineno}", ".".join(dotted), target, len(node.args), keywords)


def _imported(tree: ast.AST) -> Iterator[tuple[str, Any]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in LIBRARIES:
                    yield (alias.asname or alias.name.split(".")[0]), importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in LIBRARIES:
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                found = getattr(module, alias.name, None)
                yield (alias.asname or alias.name), found or importlib.import_module(f"{node.module}.{alias.name}")


def _dotted(node: ast.expr) -> list[str]:
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute) and (rest := _dotted(node.value)):
        return [*rest, node.attr]
    return []


def signature(target: Any) -> inspect.Signature | None:
    """The real signature; for compiled classes that hide it, the one in the first line of their documentation."""
    hidden = [p.VAR_POSITIONAL for p in (inspect.Parameter,)]
    try:
        found = inspect.signature(target)
        if not any(p.kind in hidden for p in found.parameters.values()):
            return found
    except (TypeError, ValueError):
        pass
    line = (target.__doc__ or "").strip().split("\n")[0].replace("\\*", "*")
    match = re.fullmatch(r"[\w.]+\((.*)\)(?:\s*->.*)?", line)
    if not match:
        return None
    scope: dict[str, Any] = {"np": importlib.import_module("numpy")}
    arguments = re.sub(r"(?<=[(,])\s*(?:[\w.]+ )(?=\w+\s*[,=)])", " ", f"({match[1]})")[1:-1]  # Cython's types
    exec(f"def real({arguments}): pass", scope)
    return inspect.signature(scope["real"])
