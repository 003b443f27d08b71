"""Do something to a module right after it is imported, without importing it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Change = Callable[[ModuleType], None]
_changes: dict[str, Change] = {}


def after_import(name: str, change: Change) -> None:
    """Call ``change(module)`` right after the module ``name`` is imported; now, if it is imported already.

    A second call for the same name replaces a change that has not happened yet.
    """
    module = sys.modules.get(name)
    if module is not None:
        change(module)
        return
    _changes[name] = change
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)


class _Finder(MetaPathFinder):
    """Finds the modules to be changed by the other finders, and has their loader call the change."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return the spec of a module to be changed; None for every other."""
        if name not in _changes:
            return None
        finders = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        others = (finder.find_spec(name, path, target) for finder in finders)
        spec = next((found for found in others if found is not None), None)
        loader: Any = spec.loader if spec is not None else None
        if loader is None:
            return spec
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            change = _changes.pop(module.__name__, None)  # of an archive, all modules have one loader
            if change is not None:
                change(module)

        loader.exec_module = exec_module
        return spec


_FINDER = _Finder()
