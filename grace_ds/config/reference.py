"""List every key of the configuration with its default and its meaning, read from the schema's own source.

The meaning is the comment behind the field, so that it is written in one place only.
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
        meaning: one line; empty if the schema gives none.
    """

    path: str
    kind: str
    default: str
    meaning: str


def keys(cls: type = schema.GraceConfig, prefix: str = "") -> Iterator[Key]:
    """Yield all keys, in the schema's order; those of a section after one another."""
    comments, hints = _comments(cls), typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            yield from keys(kind, f"{prefix}{field.name}.")
            continue
        value = field.default if field.default is not dataclasses.MISSING else _default_of(field)
        yield Key(prefix + field.name, _type_name(kind), json.dumps(value), comments.get(field.name, ""))


def sections() -> dict[str, str]:
    """Return section → what it is for; the top level under the empty name."""
    summaries = {"": _summary(schema.GraceConfig)}
    for field in dataclasses.fields(schema.GraceConfig):
        kind = typing.get_type_hints(schema.GraceConfig)[field.name]
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            summaries[field.name] = _summary(kind)
    return summaries


def markdown() -> str:
    """Return the reference as a Markdown page."""
    lines = [
        "# Configuration",
        "",
        "Written by `grace-ds config --markdown` from `grace_ds/config/schema.py`. The block stands in the DeepSpeed config",
        "under `data_efficiency.data_sampling.grace` (or at the top under `grace_ds`); an unknown key is an error that tells",
        "the nearest name.",
    ]
    all_keys = list(keys())
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
        for key in all_keys:
            head, _, name = key.path.rpartition(".")
            if head == section:
                cells = (f"`{name}`", key.kind, f"`{key.default}`", key.meaning)
                lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def listed() -> str:
    """Return the reference as lines for a terminal."""
    all_keys = list(keys())
    wide, value = max(len(key.path) for key in all_keys), max(len(key.default) for key in all_keys)
    return "".join(f"{key.path:<{wide}}  {key.default:<{value}}  {key.meaning}\n".rstrip() + "\n" for key in all_keys)


def _comments(cls: type) -> dict[str, str]:
    """Return field → the comment at the end of its line."""
    comments: dict[str, str] = {}
    name = ""
    source = io.StringIO(inspect.getsource(cls))
    for token in tokenize.generate_tokens(source.readline):
        if token.type == tokenize.COMMENT and name:
            comments[name] = token.string.lstrip("# ").strip()
        elif token.type == tokenize.NAME and not name and token.start[1] == 4:
            name = token.string
        elif token.type in (tokenize.NEWLINE, tokenize.NL):
            name = ""
    return comments


def _summary(cls: type) -> str:
    return (inspect.getdoc(cls) or "").split("\n\n")[0].replace("``", "`")


def _default_of(field: dataclasses.Field[Any]) -> Any:
    assert field.default_factory is not dataclasses.MISSING
    return field.default_factory()


def _type_name(kind: Any) -> str:
    args = [arg for arg in typing.get_args(kind) if arg is not type(None)]
    if typing.get_origin(kind) is list:
        return f"list of {args[0].__name__}"
    if args:
        return " or ".join([*(arg.__name__ for arg in args), "null"])
    return str(getattr(kind, "__name__", kind))
