"""Handle config texts of the form ``${...}``: use the resolved value, but write and show the text as it was given.

The value of an interpolation may be a secret (``${oc.env:TOKEN}``), which must appear neither in a file nor in a message.
"""

from __future__ import annotations

import os
import re
from typing import Any

_VARIABLE = re.compile(r"\$\{\s*oc\.env\s*:\s*([A-Za-z_]\w*)")
_SHORTEST = 4  # least length of a value that is hidden: a shorter one is no secret, and is part of many words


class Interpolated(str):
    """A resolved text with the interpolation that it came from; ``repr`` shows the interpolation.

    Attributes:
        source: the text as it was given.
        whole: whether ``source`` stands for the whole list that this text is in.
    """

    source: str
    whole: bool

    def __new__(cls, value: str, source: str = "", whole: bool = False) -> Interpolated:
        """Make the text ``value`` that came from the interpolation ``source``."""
        text = super().__new__(cls, value)
        text.source, text.whole = source, whole
        return text

    def __repr__(self) -> str:
        return repr(self.source)


def marked(resolved: Any, raw: Any) -> Any:
    """Return ``resolved`` (dicts, lists and values) with the texts that are interpolations in ``raw`` marked.

    Args:
        raw: of the same form as ``resolved``, before interpolations are resolved.
    """
    if isinstance(resolved, dict) and isinstance(raw, dict):
        return {key: marked(value, raw.get(key)) for key, value in resolved.items()}
    if isinstance(resolved, list) and isinstance(raw, list) and len(raw) == len(resolved):
        return [marked(value, given) for value, given in zip(resolved, raw, strict=True)]
    if isinstance(resolved, str) and isinstance(raw, str) and "${" in raw:
        return Interpolated(resolved, raw)
    if isinstance(resolved, list) and isinstance(raw, str):  # a whole list from elsewhere in the config
        return [Interpolated(value, raw, whole=True) for value in resolved]
    return resolved


def unresolved(tree: Any) -> Any:
    """Return ``tree`` as it was given: with the interpolations instead of their values."""
    if isinstance(tree, dict):
        return {key: unresolved(value) for key, value in tree.items()}
    if isinstance(tree, list):
        first = tree[0] if tree else None
        return first.source if isinstance(first, Interpolated) and first.whole else [unresolved(value) for value in tree]
    return tree.source if isinstance(tree, Interpolated) else tree


def hidden(message: str, given: Any) -> str:
    """Return ``message`` without the values of the environment variables that the config ``given`` names."""
    for name in sorted(set(_VARIABLE.findall(str(given)))):
        value = os.environ.get(name, "")
        if len(value) >= _SHORTEST:
            for written in (value, repr(value)[1:-1]):
                message = message.replace(written, f"${{oc.env:{name}}}")
    return message
