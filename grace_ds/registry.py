"""Register extensions by name: recipes, objectives, graph back ends and transports.

Each kind has one :class:`Registry`, which other packages can use too.  A module listed under ``plugins`` in the configuration
is imported on every rank before the configuration is checked, so that the names that it registers work like built-in ones.
Layer rules are looked up by class and not by name: :func:`grace_ds.gradients.layers.register_rule` keeps a table of its own,
which plugins can extend in the same way.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from grace_ds.errors import ConfigError

T = TypeVar("T")


class Registry(Generic[T]):
    """The names of one kind, and the value registered under each.

    Args:
        key: of the configuration, for messages.
        home: module that registers the built-in values.  It is imported when a name is first looked up, because it may itself
            import the module that looks it up, as objectives import the configuration that names them.
    """

    def __init__(self, key: str, home: str) -> None:
        self.key, self._home = key, home
        self._entries: dict[str, T] = {}
        self._loaded = False

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers a value under ``name``; the last one registered under a name counts."""

        def add(value: T) -> T:
            self._entries[name] = value
            return value

        return add

    def get(self, name: str) -> T:
        """Return the value registered under ``name``.

        Raises:
            ConfigError: there is none.
        """
        self._load()
        if name not in self._entries:
            known = ", ".join(self._entries)
            raise ConfigError(f"{self.key} = {name!r}; known: {known}. List the module that registers it under plugins")
        return self._entries[name]

    def names(self) -> tuple[str, ...]:
        """Return all names, in the order in which they were registered."""
        self._load()
        return tuple(self._entries)

    def _load(self) -> None:
        if not self._loaded:
            self._loaded = True  # set first, because the home module may look names up while it is imported
            importlib.import_module(self._home)


recipes: Registry[Any] = Registry("recipe", "grace_ds.recipes")
objectives: Registry[Any] = Registry("selection.objective", "grace_ds.selection.objectives")
backends: Registry[Any] = Registry("graph.backend", "grace_ds.graph.backends")
transports: Registry[Any] = Registry("comm", "grace_ds.comm.choose")


def load_plugins(modules: Sequence[str], path: str) -> None:
    """Import ``modules``, which register their extensions.

    Args:
        path: of the block in the configuration, for messages.

    Raises:
        ConfigError: a module cannot be imported.
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # user code runs here
            raise ConfigError(
                f"{path}.plugins: {module!r} cannot be imported ({type(error).__name__}: {error}); install it on every host, or "
                "put its folder on PYTHONPATH"
            ) from error
