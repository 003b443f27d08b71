"""Methods of one instance replaced, and put back as if nothing had been."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def replace_method(owner: Any, name: str, ours: Callable[..., Any]) -> Callable[[], None]:
    """Lets ``owner.name(*args, **kwargs)`` call ``ours(original, *args, **kwargs)``; returns what undoes that."""
    original = getattr(owner, name)
    had = name in vars(owner)  # else the class's own is to be seen again

    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        return ours(original, *args, **kwargs)

    setattr(owner, name, method)
    return lambda: setattr(owner, name, original) if had else delattr(owner, name)
