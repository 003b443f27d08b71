"""Handle config texts of the form ``${...}``: use the resolved value, but write and show the text as it was given.

The value of an interpolation may be a secret (``${oc.env:TOKEN}``), which must appear neither in a file nor in a message.

A reference to another key (``${run_dir}/cache``) is always resolved.  A call (``${oc.env:TOKEN}``) runs code of OmegaConf or of
the job: it may read the environment, or do whatever a resolver does that the job has registered.  It is resolved only if the
block lists its name under ``resolvers``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from grace_ds.errors import ConfigError

_VARIABLE = re.compile(r"\$\{\s*oc\.env\s*:\s*([A-Za-z_]\w*)")
LONGEST = 4096  # characters of a text: a path has no more
MOST = 20  # interpolations in a block: where each stands for several others, what they expand to grows exponentially
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


def check_interpolations(given: Any, resolvers: Sequence[str], path: str) -> None:
    """Check a block before any of its interpolations is resolved.

    Args:
        given: the keys and values as they were given, in all layers together.
        resolvers: names of the resolvers that may be called.
        path: of the block, for messages.

    Raises:
        ConfigError: a call of another resolver, or more or longer texts than :data:`MOST` and :data:`LONGEST`.
    """
    count = 0
    for key, text in _texts(given, path):
        if len(text) > LONGEST:
            raise ConfigError(f"{key} = {text[:40]!r}… has {len(text)} characters; it must be at most {LONGEST} long")
        count += text.count("${")
        for name in called(text):
            if name not in resolvers:
                raise ConfigError(
                    f"{key} = {text!r} calls the resolver {name!r}, which is not asked for: add it to {path}.resolvers, or write "
                    "the value itself"
                )
    if count > MOST:
        raise ConfigError(f"{path} holds {count} interpolations; it must be at most {MOST}: write the values themselves")


def called(text: str) -> list[str]:
    """Return the names of the resolvers that ``text`` calls, in order, wherever they stand in it.

    A name that is itself put together from interpolations is returned as it is written.
    """
    names = []
    for start in (match.end() for match in re.finditer(r"\$\{", text)):
        depth = 0
        for at in range(start, len(text)):
            if text[at] == "{":
                depth += 1
            elif text[at] == "}":
                depth -= 1
            if depth < 0:
                break  # a reference to a key
            if text[at] == ":" and not depth:
                names.append(text[start:at].strip())
                break
    return names


def _texts(node: Any, path: str) -> Iterator[tuple[str, str]]:
    """Yield every text of a block, keys included, with its place."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _texts(key, path)
            yield from _texts(value, f"{path}.{str(key)[:60]}")
    elif isinstance(node, list):
        for value in node:
            yield from _texts(value, path)
    elif isinstance(node, str):
        yield path, node
