"""What every command of ours has in common: help that a newcomer can read, errors of one line, ``--debug`` for the rest.

A command that fails says why in one line on stderr and ends with a status other than 0: 1 for what we raise on purpose and for
what the system refuses, 2 for a wrong command line, 70 for a bug, 130 after Ctrl-C.  ``--debug`` shows Python's traceback.
"""

from __future__ import annotations

import argparse
import difflib
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from grace_ds.errors import GraceError

DEBUG = "GRACE_DS_DEBUG"  # set by --debug, so that the processes that a command starts know of it too
WRONG, INTERRUPTED, BUG, PIPE = 2, 130, 70, 141
_WIDTH = 110  # of help, at most


class Help(argparse.HelpFormatter):
    """Paragraphs are filled, indented lines stay as they are, and defaults are named."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=min(_WIDTH, shutil.get_terminal_size().columns - 2))

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        parts = [part.strip("\n") for part in textwrap.dedent(text).strip().split("\n\n")]
        kept = ["\n".join(indent + line for line in part.splitlines()) if "\n  " in "\n" + part else None for part in parts]
        filled = [textwrap.fill(" ".join(part.split()), width, initial_indent=indent, subsequent_indent=indent) for part in parts]
        return "\n\n".join(k or f for k, f in zip(kept, filled, strict=True))

    def _get_help_string(self, action: argparse.Action) -> str:
        said, default = action.help or "", action.default
        unsaid = default is None or default is False or default in ("", argparse.SUPPRESS) or default == []
        if unsaid or "default" in said or not action.option_strings:
            return said
        words = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else str(default)
        return f"{said} (default: {words.replace('%', '%%')})"


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line with the nearest name, and which knows ``--debug`` everywhere.

    Args:
        example: a command or several, shown at the end of the help.
        options: as for ``argparse.ArgumentParser``.
    """

    def __init__(self, *, example: str = "", **options: Any) -> None:
        super().__init__(**{"formatter_class": Help, **options})
        self.epilog = "examples:\n" + textwrap.indent(textwrap.dedent(example).strip(), "  ") if example else self.epilog
        self.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show the full traceback of an error")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, but an unknown option is an error of the command that it was given to, before anything else is."""
        words = list(sys.argv[1:] if args is None else args)
        known = list(self._option_string_actions)
        branches = any(isinstance(action, argparse._SubParsersAction) for action in self._actions)
        for word in words:
            if word == "--" or (branches and not word.startswith("-")):
                break
            name = word.partition("=")[0]
            if name.startswith("--") and not any(option.startswith(name) for option in known):
                self.error(f"there is no option {name}{nearest(name, known)}")
        found, rest = super().parse_known_args(words, namespace)
        if rest:
            self.error(f"{rest[0]!r} is one word too many")
        return found, rest

    def error(self, message: str) -> NoReturn:
        """One line, and status 2."""
        bad, choices = _choice(message)
        hint = nearest(bad, choices) if bad else ""
        self.exit(WRONG, f"{self.prog}: {message}{hint}; {self.prog} --help tells more\n")


def nearest(word: str, known: Sequence[str]) -> str:
    """``; did you mean …?`` where a known word is near, else nothing."""
    near = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {near[0]}?" if near else ""


def wants_debug(words: Sequence[str]) -> bool:
    """Whether ``--debug`` stands among the words, or was given to the command that has started this one."""
    return "--debug" in words or os.environ.get(DEBUG, "") not in ("", "0")


def in_one_line(program: str, work: Callable[[], int | None], debug: bool, ours_only: bool = False) -> int:
    """Does ``work`` and returns its exit status; what it raises becomes one line on stderr, unless ``debug``.

    Args:
        program: named at the line's beginning.
        work: None counts as 0.
        debug: let everything through.
        ours_only: let through what is not ours: for scripts of the user's, whose tracebacks are theirs to see.
    """
    if debug:
        os.environ[DEBUG] = "1"
        return work() or 0
    try:
        return work() or 0
    except GraceError as error:
        return _say(program, str(error), 1)
    except BaseException as error:
        if ours_only or isinstance(error, SystemExit):
            raise
        return _foreign(program, error)


def _foreign(program: str, error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return _say(program, "interrupted", INTERRUPTED)
    if isinstance(error, BrokenPipeError):  # `… | head`: nobody reads on; what is still buffered must not fail at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename is not None else ""
        return _say(program, f"{place}{error.strerror}", 1)
    if isinstance(error, ModuleNotFoundError):
        return _say(
            program, f"{error.name} is not installed; pip install {error.name}, or the extra of grace_ds that holds it", 1
        )
    said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return _say(program, f"{said}; this was not foreseen: --debug shows where it comes from", BUG)


def _say(program: str, message: str, status: int) -> int:
    sys.stderr.write(f"{program}: {' '.join(message.split())}\n")
    return status


def _choice(message: str) -> tuple[str, list[str]]:
    """The word and what it might have been, of argparse's message about a choice."""
    tail = message.partition("invalid choice: ")[2]
    word, _, known = tail.partition(" (choose from ")
    return (word.strip("'"), [k.strip(" ')") for k in known.split(",")]) if tail else ("", [])


def count(word: str) -> int:
    """A whole number of 0 or more, also as 1e8."""
    try:
        value = float(word)
        if value >= 0 and value == int(value):
            return int(value)
    except (ValueError, OverflowError):
        pass
    raise argparse.ArgumentTypeError(f"{word!r} is not a whole number of 0 or more, such as 500 or 1e8")


def positive(word: str) -> int:
    """A whole number of 1 or more."""
    value = count(word)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{word!r} must be 1 or more")
    return value


def amount(word: str) -> float:
    """A finite number above 0."""
    try:
        value = float(word)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{word!r} is not a number above 0, such as 0.2 or 1.3e9")
    return value
