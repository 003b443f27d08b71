"""Provide what every command has in common: help for newcomers, one-line errors, and ``--debug``.

A command that fails gives the reason in one line on stderr and ends with a status other than 0: 1 for errors that are raised
on purpose or by the system, 2 for a wrong command line, 70 for a bug, 130 after Ctrl-C.  ``--debug`` shows Python's traceback.
"""

from __future__ import annotations

import argparse
import codecs
import difflib
import os
import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any, NoReturn, TextIO

from grace_ds.errors import GraceError
from grace_ds.utils.screen import plain

DEBUG = "GRACE_DS_DEBUG"  # set by --debug, so that it also applies to processes that a command starts
WRONG, INTERRUPTED, BUG, PIPE = 2, 130, 70, 141
_SPELT = "grace_ds.spelt"  # name of the error handler of :func:`spell_out`
_WIDTH = 110  # maximum width of help and tables
_SCALES = {"k": 3, "m": 6, "b": 9, "g": 9, "t": 12}  # last letter of a number → power of ten
_LOOKALIKES = {  # what a terminal without Unicode shows instead; characters that decompose need no entry
    **dict.fromkeys("–—−‐─━┄╌", "-"),
    **dict.fromkeys("│┃", "|"),
    **dict.fromkeys("┌┐└┘├┤┬┴┼┏┓┗┛┣┫┳┻╋┡┩╇╞╡╪╷╵", "+"),
    **{"×": "x", "÷": "/", "→": "->", "←": "<-", "·": "*", "≤": "<=", "≥": ">=", "Σ": "sum ", "µ": "u", "μ": "u", "±": "+-"},
    **{"⟨": "<", "⟩": ">", "…": "...", "’": "'", "‘": "'", "“": '"', "”": '"', "█": "#", "✓": "ok", "•": "*"},
}


def screen_width(limit: int | None = _WIDTH) -> int:
    """Return the columns of the terminal, ``limit`` at most.

    Where the output is no terminal and COLUMNS is not set, that is ``limit``, or with None a number that no line reaches: lines
    that are read by a program stay whole.
    """
    columns = shutil.get_terminal_size((limit or 10_000, 24)).columns
    return columns if limit is None else min(limit, columns)


class Help(argparse.HelpFormatter):
    """Help formatter that fills paragraphs, keeps indented lines, and names defaults."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=max(screen_width() - 2, 24))

    def add_usage(self, usage: str | None, *rest: Any, **options: Any) -> None:
        """Wrap a usage that is given in words, which argparse would print on one line."""
        wrapped = textwrap.fill(usage, self._width - 7, subsequent_indent=" " * 7, break_on_hyphens=False) if usage else usage
        super().add_usage(wrapped, *rest, **options)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        parts = [part.strip("\n") for part in textwrap.dedent(text).strip().split("\n\n")]
        kept = ["\n".join(indent + line for line in part.splitlines()) if "\n  " in "\n" + part else None for part in parts]
        filled = [textwrap.fill(" ".join(part.split()), width, initial_indent=indent, subsequent_indent=indent) for part in parts]
        return "\n\n".join(kept_part or filled_part for kept_part, filled_part in zip(kept, filled, strict=True))

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        no_default = default is None or default is False or default in ("", argparse.SUPPRESS) or default == []
        if no_default or "default" in text or not action.option_strings:
            return text
        words = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else str(default)
        return f"{text} (default: {words.replace('%', '%%')})"


class Parser(argparse.ArgumentParser):
    """Parser whose errors are one line with the nearest name, and which accepts ``--debug`` everywhere.

    Args:
        example: a command or several, shown at the end of the help.
        options: as for ``argparse.ArgumentParser``.
    """

    def __init__(self, *, example: str = "", **options: Any) -> None:
        super().__init__(**{"formatter_class": Help, **options})
        self.epilog = "examples:\n" + textwrap.indent(textwrap.dedent(example).strip(), "  ") if example else self.epilog
        self.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show the full traceback of an error")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, but report an unknown option first, as an error of the command that it was given to."""
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
        """Print one line and exit with status 2."""
        word, choices = _choice(message)
        hint = nearest(word, choices) if word else ""
        self.exit(WRONG, f"{self.prog}: {message}{hint}; {self.prog} --help tells more\n")


def nearest(word: str, known: Sequence[str]) -> str:
    """Return ``; did you mean …?`` if a known word is near, else nothing."""
    near = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {near[0]}?" if near else ""


def wants_debug(words: Sequence[str]) -> bool:
    """Return whether ``--debug`` is among the words, or was given to the command that has started this one."""
    return "--debug" in words or os.environ.get(DEBUG, "") not in ("", "0")


def in_one_line(program: str, work: Callable[[], int | None], debug: bool, ours_only: bool = False) -> int:
    """Do ``work`` and return its exit status; an exception becomes one line on stderr, unless ``debug``.

    Args:
        program: name at the beginning of the line.
        work: a result of None counts as 0.
        debug: let every exception through.
        ours_only: let exceptions other than :class:`GraceError` through: for the user's own scripts, whose tracebacks matter.
    """
    for stream in (sys.stdout, sys.stderr):
        spell_out(stream)
    if debug:
        os.environ[DEBUG] = "1"
        return work() or 0
    try:
        return work() or 0
    except GraceError as error:
        return _print_error(program, str(error), 1)
    except BaseException as error:
        if ours_only or isinstance(error, SystemExit):
            raise
        return _report_foreign(program, error)


def spell_out(stream: TextIO) -> None:
    """Have a stream whose encoding lacks a character write similar ASCII characters (× as x, → as ->) instead of failing."""
    if getattr(stream, "errors", "") in ("strict", "backslashreplace") and hasattr(stream, "reconfigure"):
        codecs.register_error(_SPELT, _spelt)
        stream.reconfigure(errors=_SPELT)


def _spelt(error: UnicodeError) -> tuple[str, int]:
    """Replace what cannot be encoded: by its look-alike, by what it decomposes to (é → e, ² → 2), or by a question mark."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    words = (
        _LOOKALIKES.get(c) or "".join(part for part in unicodedata.normalize("NFKD", c) if part.isascii()) or "?"
        for c in error.object[error.start : error.end]
    )
    return "".join(words), error.end


def print_grace_error(program: str, error: BaseException) -> bool:
    """Print an error of GRACE as one line; return False, and print nothing, for any other."""
    if isinstance(error, GraceError):
        _print_error(program, str(error), 1)
    return isinstance(error, GraceError)


def _report_foreign(program: str, error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return _print_error(program, "interrupted", INTERRUPTED)
    if isinstance(error, BrokenPipeError):  # `… | head` has stopped reading: buffered output must not fail at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename is not None else ""
        return _print_error(program, f"{place}{error.strerror}", 1)
    if isinstance(error, ModuleNotFoundError):
        return _print_error(
            program, f"{error.name} is not installed; pip install {error.name}, or the extra of grace_ds that holds it", 1
        )
    message = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return _print_error(program, f"{message}; this was not foreseen: --debug shows where it comes from", BUG)


def _print_error(program: str, message: str, status: int) -> int:
    sys.stderr.write(f"{program}: {plain(message)}\n")
    return status


def _choice(message: str) -> tuple[str, list[str]]:
    """Return the wrong word and the possible ones from argparse's message about a choice."""
    tail = message.partition("invalid choice: ")[2]
    word, _, known = tail.partition(" (choose from ")
    return (word.strip("'"), [k.strip(" ')") for k in known.split(",")]) if tail else ("", [])


def _number(word: str) -> float:
    """Parse a number, also with a scale: 7B, 100M, 1.5k.

    Raises:
        ValueError: it is none.
    """
    power = _SCALES.get(word[-1:].lower(), 0)
    try:
        return float(Decimal(word[:-1] if power else word).scaleb(power))
    except InvalidOperation as error:
        raise ValueError(word) from error


def count(word: str) -> int:
    """Parse a whole number of 0 or more, also in the forms 1e8 and 100M."""
    try:
        value = _number(word)
        if value >= 0 and value == int(value):
            return int(value)
    except (ValueError, OverflowError):
        pass
    raise argparse.ArgumentTypeError(f"{word!r} is not a whole number of 0 or more, such as 500, 1e8 or 100M")


def positive(word: str) -> int:
    """Parse a whole number of 1 or more."""
    value = count(word)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{word!r} must be 1 or more")
    return value


def amount(word: str) -> float:
    """Parse a finite number above 0, also in the forms 1.3e9 and 7B."""
    try:
        value = _number(word)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{word!r} is not a number above 0, such as 0.2, 1.3e9 or 7B")
    return value
