"""Check that every value of a block has the type that the schema gives it, before OmegaConf converts values.

OmegaConf would convert ``true`` to 1, 5 to "5" and "1_0" to 10, which is hardly ever intended.  Here a value is accepted
unchanged or refused, with its path and the type that is expected.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Mapping
from typing import Any

from grace_ds.errors import ConfigError

_LARGEST = 2**53  # whole numbers below it are exact in every JSON reader
_WORDS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text", list: "a list of texts"}


def check_types(given: Mapping[Any, Any], section: Any, path: str) -> None:
    """Compare a block with a section of the schema, including its subsections.

    Args:
        given: keys and values as read.  Texts with an interpolation (``${...}``) pass, as their values are not known yet.
        section: an instance of the section's dataclass.
        path: of the section, for messages.

    Raises:
        ConfigError: an unknown key, or a value of another type.
    """
    hints = typing.get_type_hints(type(section))
    for key, value in given.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), list(hints), 1)
            cure = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(hints)}"
            raise ConfigError(f"{path}.{key} = {value!r} is no key of grace_ds; {cure}")
        inner = getattr(section, key)
        if dataclasses.is_dataclass(inner):
            if not isinstance(value, Mapping):
                known = ", ".join(f.name for f in dataclasses.fields(inner))
                raise ConfigError(f"{path}.{key} = {value!r} must be an object with keys among: {known}")
            check_types(value, inner, f"{path}.{key}")
        elif not (isinstance(value, str) and "${" in value):
            _check_value(value, hints[key], f"{path}.{key}")


def _check_value(value: Any, hint: Any, path: str) -> None:
    kinds = typing.get_args(hint) if typing.get_origin(hint) is not list else ()
    if type(None) in kinds and value is None:
        return
    kind = next((member for member in kinds if member is not type(None)), typing.get_origin(hint) or hint)
    if not _is(value, kind):
        also = " or null" if type(None) in kinds else ""
        raise ConfigError(f"{path} = {value!r} has the wrong type: it must be {_WORDS[kind]}{also}")


def _is(value: Any, kind: type) -> bool:
    if kind is list:
        return isinstance(value, list) and all(_is(item, str) for item in value)
    if kind is str:
        return isinstance(value, str) and value != "???"  # OmegaConf's marker of a missing value
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    if not isinstance(value, int | float) or (kind is int and not isinstance(value, int)):
        return False
    return math.isfinite(value) and (kind is float or abs(value) < _LARGEST)
