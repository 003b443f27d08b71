"""Methods of one instance replaced, and put back as if nothing had been."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_MARK = "_grace_ds_layer"


class _Layer:
    """One replacement: what it lies over, and whether it still does anything of its own."""

    def __init__(self, owner: Any, name: str, ours: Callable[..., Any]) -> None:
        self.original = getattr(owner, name)
        self.had = name in vars(owner)  # else the class's own is to be seen again
        self.ours: Callable[..., Any] | None = ours

        @functools.wraps(self.original)
        def method(*args: Any, **kwargs: Any) -> Any:
            return self.original(*args, **kwargs) if self.ours is None else self.ours(self.original, *args, **kwargs)

        setattr(method, _MARK, self)
        self.method = method

    def below(self) -> _Layer | None:
        """The replacement that this one lies over directly; None: something else is there."""
        found = getattr(self.original, _MARK, None)
        return found if isinstance(found, _Layer) and found.method is self.original else None


def replace_method(owner: Any, name: str, ours: Callable[..., Any]) -> Callable[[], None]:
    """Lets ``owner.name(*args, **kwargs)`` call ``ours(original, *args, **kwargs)``; returns what undoes that.

    Replacements of one method may be undone in any order: one that another lies over does nothing from then on, and is gone
    once that one is undone too.
    """
    layer = _Layer(owner, name, ours)
    setattr(owner, name, layer.method)

    def undo() -> None:
        layer.ours = None
        if vars(owner).get(name) is layer.method:
            _uncover(owner, name, layer)

    return undo


def _uncover(owner: Any, name: str, layer: _Layer) -> None:
    """Puts back what the layer lies over, without those below that are undone already."""
    while (below := layer.below()) is not None and below.ours is None:
        layer = below
    if layer.had:
        setattr(owner, name, layer.original)
    else:
        delattr(owner, name)
