"""Every error message and warning of ours, read off the places that raise it, with the part that says what to do.

A message is to name its own cure.  Where it cannot, because the cure takes a paragraph or depends on what stands in the
log above it, ``docs/cures.yaml`` has it.  ``tests/docs/test_messages.py`` fails for a message that has neither.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
CURES = ROOT / "docs" / "cures.yaml"
# What a cure begins with; "must be" and "needs" say it as plainly.
_VERBS = (
    "add|ask for|build|call|check|choose|copy|correct|drop|end|exclude|free|give|collect some|install|keep|leave|let|list|load|"
    "lower|make|match|materialise|mend|move|name|pass|pip install|raise|repair|reshape|restart|restore|return|run|set|start|"
    "sudo|take|turn|use|write"
)
_CURE = re.compile(rf"(?:[;:.(]\s+|^(?=usage))((?:{_VERBS})\b.*|(?:it |each |ids )?must be .*|usage: .*)$", re.I)
_WARNS = ("log.warning", "log.error", "logger.warning", "logger.error")
_MUST = re.compile(r"\b(must be .*)$")
_SHELL = re.compile(r"""\bdie "((?:[^"\\]|\\.)*)\"""")


@dataclass(frozen=True)
class Message:
    """One message.

    Attributes:
        file: relative to the repository.
        line: where it is raised.
        kind: the exception's name; ``exit`` where the process ends with it.
        text: with ⟨names⟩ where values stand.
    """

    file: str
    line: int
    kind: str
    text: str

    def parts(self) -> tuple[str, str]:
        """(what is wrong, what to do about it); the second is empty where the message itself does not say it."""
        found = _CURE.search(self.text) or _MUST.search(self.text)
        return (self.text[: found.start(1)].rstrip(" ;:,.("), found[1]) if found else (self.text, "")


def messages() -> list[Message]:
    """All of them, by file and line."""
    kinds = _kinds()
    found: list[Message] = []
    for path in sorted([*(ROOT / "grace_ds").rglob("*.py"), *(ROOT / "examples" / "grace_ds_quickstart").glob("*.py")]):
        found += _of_module(path, kinds)
    for path in sorted((ROOT / "launch").rglob("*.s*")):
        found += _of_script(path)
    return found


def cures() -> Mapping[str, Any]:
    """The hand-written part: ``areas`` (how the page is divided) and ``cures`` (beginning of a message → what to do)."""
    loaded: dict[str, Any] = yaml.safe_load(CURES.read_text("utf-8"))
    return loaded


def cure_of(message: Message, written: Mapping[str, str]) -> str:
    """What to do about a message: what stands in ``cures.yaml``, else the message's own words; empty where nobody says it."""
    for start, cure in written.items():
        if message.text.startswith(start):
            return " ".join(cure.split())
    return message.parts()[1]


def area_of(message: Message, areas: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The part of the page that a message stands in: that with the longest path that its file begins with."""
    fitting = [
        (len(prefix), number) for number, a in enumerate(areas) for prefix in a["files"] if message.file.startswith(prefix)
    ]
    return areas[max(fitting)[1]] if fitting else None


def markdown() -> str:
    """The page's body."""
    written, every = cures(), messages()
    lines: list[str] = []
    for area in written["areas"]:
        here = [m for m in every if area_of(m, written["areas"]) is area]
        if not here:
            continue
        lines += [f"## {area['title']}", "", area["about"].strip(), ""]
        for message in sorted(here, key=lambda m: m.text.lower()):
            what, own = message.parts()
            cure = cure_of(message, written["cures"])
            said = what if cure == own else message.text
            where = f"<span class='where'>{message.kind}, {message.file}</span>"
            lines += [_code(said), f": {_sentence(cure)} {where}", ""]
    return "\n".join(lines)


def _kinds() -> set[str]:
    """Names of the exceptions in ``grace_ds.errors``, and those of the quickstart and the benchmarks that end a command."""
    tree = ast.parse((ROOT / "grace_ds" / "errors.py").read_text("utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)} | {"ArmFailed", "SystemExit"}


def _of_module(path: Path, kinds: set[str]) -> Iterator[Message]:
    tree = ast.parse(path.read_text("utf-8"))
    constants = _strings(tree.body)
    for function in [tree, *(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef))]:
        names = constants | (_strings(list(ast.walk(function))) if function is not tree else {})
        for node in _own(function):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
                argument = node.exc.args[0] if node.exc.args else None
                if node.exc.func.id in kinds and isinstance(argument, ast.Constant | ast.JoinedStr | ast.BinOp):
                    kind = "exit" if node.exc.func.id == "SystemExit" else node.exc.func.id
                    yield Message(_name(path), node.lineno, kind, _words(argument, names))
            if isinstance(node, ast.Call) and node.args:
                called = ast.unparse(node.func)
                if called == "super().__init__" and path.name == "errors.py":
                    yield Message(_name(path), node.lineno, "PeerFailed", _words(node.args[0], names))
                elif called in _WARNS or called == "self._warn_once":
                    text = _warning(node.args[called == "self._warn_once" :], names)
                    if text:
                        yield Message(_name(path), node.lineno, "warning in the log", text)


def _warning(arguments: list[ast.expr], names: Mapping[str, ast.expr]) -> str:
    """A log message whose %-places are filled with the names of its values; empty where the text is not written out."""
    head = names.get(arguments[0].id) if isinstance(arguments[0], ast.Name) else arguments[0]
    if not isinstance(head, ast.Constant | ast.JoinedStr):
        return ""
    values = iter(arguments[1:])
    return re.sub(r"%[-.\d]*[sdrgf]", lambda _: f"⟨{_noun(next(values))}⟩", _words(head, {}))


def _of_script(path: Path) -> Iterator[Message]:
    text = path.read_text("utf-8")
    usage = re.search(r'^usage="([^"]*)"', text, re.M)
    seen = set()
    for number, line in enumerate(text.splitlines(), 1):
        for match in _SHELL.finditer("" if line.startswith("die()") else line):
            said = usage[1] if usage and match[1] == "$usage" else _shell_words(match[1])
            if said != "⟨*⟩" and said not in seen:
                seen.add(said)
                yield Message(_name(path), number, "exit", said)


def _own(function: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a function, those of functions inside it left out."""
    for child in ast.iter_child_nodes(function):
        if not isinstance(child, ast.FunctionDef):
            yield child
            yield from _own(child)


def _strings(nodes: list[Any]) -> dict[str, ast.expr]:
    """Name → the text that it is given, where that is written out."""
    found: dict[str, ast.expr] = {}
    for node in nodes:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            value = node.value
            if isinstance(value, ast.JoinedStr) or isinstance(getattr(value, "value", None), str):
                found[node.targets[0].id] = value
    return found


def _words(node: ast.AST, names: Mapping[str, ast.expr]) -> str:
    """A message with ⟨names⟩ in the place of values."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_words(part, names) for part in node.values)
    if isinstance(node, ast.BinOp):
        return _words(node.left, names) + _words(node.right, names)
    if isinstance(node, ast.FormattedValue):
        if isinstance(node.value, ast.Name) and node.value.id in names:
            return _words(names[node.value.id], {})
        return f"⟨{_noun(node.value)}⟩"
    return f"⟨{_noun(node)}⟩"


def _noun(node: ast.AST) -> str:
    """A name for a value, from the expression that makes it."""
    if isinstance(node, ast.Name):
        return node.id.lstrip("_").lower() if node.id.isupper() else node.id.lstrip("_")
    if isinstance(node, ast.Attribute):
        return _noun(node.value) if node.attr == "__name__" else node.attr.lstrip("_")
    if isinstance(node, ast.Subscript):
        return (
            str(node.slice.value)
            if isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str)
            else _noun(node.value)
        )
    if isinstance(node, ast.Call):
        return _noun(node.args[0]) if node.args else _noun(node.func)
    if isinstance(node, ast.BinOp | ast.ListComp | ast.GeneratorExp | ast.IfExp | ast.BoolOp):
        inner = next((n for n in ast.walk(node) if isinstance(n, ast.Name)), None)
        return _noun(inner) if inner is not None else "…"
    return "…"


def _shell_words(text: str) -> str:
    text = text.replace('\\"', '"')
    return re.sub(r"\$(?:\{([A-Za-z_]+)[^}]*\}|([A-Za-z_]+|\*))", lambda m: f"⟨{(m[1] or m[2]).lower()}⟩", text)


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _code(text: str) -> str:
    fence = "``" if "`" in text else "`"
    return f"{fence}{text}{fence}"


def _sentence(text: str) -> str:
    """The cure as Markdown, with placeholders, stars and brackets as they are."""
    text = re.sub(r"([\[\]*_<>{}])", r"\\\1", text) if "`" not in text else text
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", ")", "…")) else ".")
