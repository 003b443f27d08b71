"""``{generated} NAME``: a part of a page that is made from the code when the documentation is built."""

from __future__ import annotations

import argparse
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_type_hints

import messages
from docutils import nodes
from sphinx.util.docutils import SphinxDirective

from grace_ds.cli.main import parser


def commands() -> str:
    """``--help`` of every command, as it is printed."""
    os.environ["COLUMNS"] = "96"  # argparse asks the terminal, and a page is none
    top = parser()
    lines = ["## `grace-ds`", "", "```text", top.format_help().rstrip(), "```", ""]
    for name, command in subcommands(top):
        lines += [f"## `grace-ds {name}`", "", "```text", command.format_help().rstrip(), "```", ""]
    return "\n".join(lines)


def subcommands(top: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Name and parser of each, in their order."""
    for action in top._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.items()


def forms() -> str:
    """The forms of jobs that a test runs, and what comes of each."""
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from tests.multirank.forms import markdown

    return markdown()


PARTS: dict[str, Callable[[], str]] = {"commands": commands, "forms": forms, "messages": messages.markdown}


class Generated(SphinxDirective):
    """The named part, parsed as Markdown."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """The nodes of it."""
        text = PARTS[self.arguments[0]]()
        return self.parse_text_to_nodes(text, allow_section_headings=True)


def options_of_watch(app: Any, what: str, name: str, documented: Any, options: Any, lines: list[str]) -> None:
    """Put the options of ``watch_preemption`` on the page: they are written down at the class that it returns."""
    if name == "grace_ds.watch_preemption":
        lines += ["", *inspect.getdoc(get_type_hints(documented)["return"]).splitlines()[1:]]


def setup(app: Any) -> dict[str, Any]:
    """Makes the directive known."""
    app.add_directive("generated", Generated)
    app.connect("autodoc-process-docstring", options_of_watch, priority=400)  # before napoleon reads the sections
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
