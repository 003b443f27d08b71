"""Replace methods of one instance, and restore them exactly."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_MARK = "_grace_ds_layer"


class _Layer:
    """One replacement of a method: the method it replaces, and whether it is still active."""

    def __init__(self, owner: Any, name: str, replacement: Callable[..., Any]) -> None:
        self.original = getattr(owner, name)
        self.had = name in vars(owner)  # if not, undoing must delete the attribute, so that the class's method shows again
        self.replacement: Callable[..., Any] | None = replacement

        @functools.wraps(self.original)
        def method(*args: Any, **kwargs: Any) -> Any:
            return (
                self.original(*args, **kwargs) if self.replacement is None else self.replacement(self.original, *args, **kwargs)
            )

        setattr(method, _MARK, self)
        self.method = method

    def below(self) -> _Layer | None:
        """Return the replacement that this one directly replaces; None if that is another method."""
        found = getattr(self.original, _MARK, None)
        return found if isinstance(found, _Layer) and found.method is self.original else None


def replace_method(owner: Any, name: str, replacement: Callable[..., Any]) -> Callable[[], None]:
    """Make ``owner.name(*args, **kwargs)`` call ``replacement(original, *args, **kwargs)``; return a function that undoes this.

    Replacements of one method may be undone in any order.  One that is covered by a later replacement becomes inactive, and is
    removed when the later one is undone.
    """
    layer = _Layer(owner, name, replacement)
    setattr(owner, name, layer.method)

    def undo() -> None:
        layer.replacement = None
        if vars(owner).get(name) is layer.method:
            _uncover(owner, name, layer)

    return undo


def _uncover(owner: Any, name: str, layer: _Layer) -> None:
    """Restore the method below the layer, skipping layers that are undone already."""
    while (below := layer.below()) is not None and below.replacement is None:
        layer = below
    if layer.had:
        setattr(owner, name, layer.original)
    else:
        delattr(owner, name)
