"""Every key of the configuration with its default and its meaning, read off the schema's own source.

The meaning is the comment behind the field: there is no second place that could say something else.
"""

from __future__ import annotations

import dataclasses
import inspect
import io
import json
import tokenize
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from grace_ds.config import schema


@dataclass(frozen=True)
class Key:
    """One key.

    Attributes:
        path: as written in a dotlist, ``refresh.interval_steps``.
        kind: its type, in words.
        default: as JSON.
        meaning: one line; empty where the schema says none.
    """

    path: str
    kind: str
    default: str
    meaning: str


def keys(cls: type = schema.GraceConfig, prefix: str = "") -> Iterator[Key]:
    """All keys, in the schema's order; those of a section after one another."""
    said, hints = _comments(cls), typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        kind = hints[f.name]
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            yield from keys(kind, f"{prefix}{f.name}.")
            continue
        value = f.default if f.default is not dataclasses.MISSING else _made(f)
        yield Key(prefix + f.name, _words(kind), json.dumps(value), said.get(f.name, ""))


def sections() -> dict[str, str]:
    """Section → what it is for; the top level under the empty name."""
    found = {"": _summary(schema.GraceConfig)}
    for f in dataclasses.fields(schema.GraceConfig):
        kind = typing.get_type_hints(schema.GraceConfig)[f.name]
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            found[f.name] = _summary(kind)
    return found


def markdown() -> str:
    """The reference as a page."""
    lines = [
        "# Configuration",
        "",
        "Written by `grace-ds config --markdown` from `grace_ds/config/schema.py`. The block stands in the DeepSpeed config",
        "under `data_efficiency.data_sampling.grace` (or at the top under `grace_ds`); an unknown key is an error that tells",
        "the nearest name.",
    ]
    every = list(keys())
    for section, summary in sections().items():
        lines += [
            "",
            f"## `{section}`" if section else "## At the top",
            "",
            summary,
            "",
            "| key | type | default | meaning |",
            "| --- | --- | --- | --- |",
        ]
        for key in every:
            head, _, name = key.path.rpartition(".")
            if head == section:
                cells = (f"`{name}`", key.kind, f"`{key.default}`", key.meaning)
                lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def listed() -> str:
    """The reference as lines for a terminal."""
    every = list(keys())
    wide, value = max(len(k.path) for k in every), max(len(k.default) for k in every)
    return "".join(f"{k.path:<{wide}}  {k.default:<{value}}  {k.meaning}\n".rstrip() + "\n" for k in every)


def _comments(cls: type) -> dict[str, str]:
    """Field → the comment at the end of its line."""
    found: dict[str, str] = {}
    name = ""
    source = io.StringIO(inspect.getsource(cls))
    for token in tokenize.generate_tokens(source.readline):
        if token.type == tokenize.COMMENT and name:
            found[name] = token.string.lstrip("# ").strip()
        elif token.type == tokenize.NAME and not name and token.start[1] == 4:
            name = token.string
        elif token.type in (tokenize.NEWLINE, tokenize.NL):
            name = ""
    return found


def _summary(cls: type) -> str:
    return (inspect.getdoc(cls) or "").split("\n\n")[0].replace("``", "`")


def _made(f: dataclasses.Field[Any]) -> Any:
    assert f.default_factory is not dataclasses.MISSING
    return f.default_factory()


def _words(kind: Any) -> str:
    args = [a for a in typing.get_args(kind) if a is not type(None)]
    if typing.get_origin(kind) is list:
        return f"list of {args[0].__name__}"
    if args:
        return " or ".join([*(a.__name__ for a in args), "null"])
    return str(getattr(kind, "__name__", kind))
