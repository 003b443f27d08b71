"""Show the package's lines on the screen of rank 0, whatever logging the job has set up, and show each of them once."""

from __future__ import annotations

import logging
import sys

log = logging.getLogger("grace_ds")


class ScreenHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes a record to standard output, unless a handler of the job's own brings it to the screen."""

    def __init__(self) -> None:
        super().__init__(sys.stdout)

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record if nobody else shows it; the job may change its logging at any time."""
        if not any(_shows(handler, record) for handler in _others(self)):
            self.stream = sys.stdout
            super().emit(record)


def log_to_screen(rank: int, formatter: logging.Formatter | None = None) -> None:
    """Give the package's logger a level and a handler of its own: messages from INFO on rank 0, warnings on the others.

    A level that the job has set on the logger itself stays.

    Args:
        formatter: of the lines; None: the message with the package's name.
    """
    log.disabled = False  # logging.config disables every logger that it is not told of
    if log.level == logging.NOTSET:
        log.setLevel(logging.WARNING if rank else logging.INFO)
    if any(isinstance(handler, ScreenHandler) for handler in log.handlers):
        return
    handler = ScreenHandler()
    handler.setFormatter(formatter or logging.Formatter("grace_ds: %(message)s"))
    log.addHandler(handler)


def _others(own: logging.Handler) -> list[logging.Handler]:
    """Return the other handlers that a record of the package reaches."""
    found: list[logging.Handler] = []
    logger: logging.Logger | None = log
    while logger is not None:
        found += [handler for handler in logger.handlers if handler is not own]
        logger = logger.parent if logger.propagate else None
    return found


def _shows(handler: logging.Handler, record: logging.LogRecord) -> bool:
    """Return whether a handler brings a record to the screen: it writes to a standard stream, or is rich's."""
    if record.levelno < handler.level:
        return False
    if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
        return handler.stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
    return type(handler).__name__ == "RichHandler"


def plain(text: str) -> str:
    """Return a text on one line, without the characters that control a terminal: it may come from another person's files."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
