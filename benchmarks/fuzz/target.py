"""What a target of the fuzzer is, and how one case is judged."""

from __future__ import annotations

import logging
import random
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis.strategies import SearchStrategy

from grace_ds.errors import GraceError

HANG_SECONDS = 5.0  # of computing; of the clock, for what waits, CLOCK times as long, as others compute too
CLOCK = 12
# SAME: accepted, with the original's meaning.  TAKEN: accepted for what it says now, where that can be decided without a
# checksum.  SILENT: accepted with a meaning that neither the original nor the changed input has.
SAME, TAKEN, REFUSED, SILENT, HANG, FOREIGN = "same", "taken", "refused", "silent", "hang", "foreign"
KINDS = (SAME, TAKEN, REFUSED, SILENT, HANG, FOREIGN)
LEAST_WORDS = 20  # characters of a message


class Hung(BaseException):
    """A case took longer than :data:`HANG_SECONDS` of this process, or :data:`CLOCK` times as long on the clock."""


@dataclass(frozen=True)
class Target:
    """One kind of input.

    Attributes:
        name: of the target.
        share: of all cases.
        changed: makes one changed input by the byte mutator.
        judge: reads an input, and returns SAME, TAKEN, REFUSED or SILENT; what it raises is judged by the caller.
        built: strategy of inputs that are built, not mutated; None: there are none.
        built_share: share of the target's cases that are built.
    """

    name: str
    share: float
    changed: Callable[[random.Random], Any]
    judge: Callable[[Any], str]
    built: SearchStrategy[Any] | None = None
    built_share: float = 0.3


@dataclass
class Tally:
    """What became of a target's cases.

    Attributes:
        found: the first few cases that are silent, hang or raise what is not the project's.
        seconds, slowest: of computing, over all cases and of the slowest.
        slow: the first few that took more than a second of it.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    slowest: float = 0.0
    found: list[str] = field(default_factory=list)
    slow: list[str] = field(default_factory=list)

    @property
    def cases(self) -> int:
        return sum(self.kinds.values())


def fuzz(target: Target, cases: int, seed: int) -> Tally:
    """Judge so many cases of a target, in this process; a pure function of its arguments, but for the times."""
    tally, rng = Tally(), random.Random(f"{target.name} {seed}")
    built = round(cases * target.built_share) if target.built is not None else 0
    for number in range(cases - built):
        given_input = target.changed(random.Random(rng.getrandbits(64)))
        _count(tally, target, given_input, f"{target.name}, seed {seed}, case {number}")
    if target.built is not None and built:

        def case(value: Any) -> None:
            _count(tally, target, value, f"{target.name}, built")

        checks = list(HealthCheck)
        options = settings(
            max_examples=built, deadline=None, database=None, suppress_health_check=checks, phases=[Phase.generate]
        )
        seeded(seed)(options(given(target.built)(case)))()
    return tally


def _count(tally: Tally, target: Target, value: Any, name: str) -> None:
    start = time.process_time()
    kind, told = judged(target, value)
    took = time.process_time() - start
    tally.kinds[kind] += 1
    tally.seconds, tally.slowest = tally.seconds + took, max(tally.slowest, took)
    if took > 1 and len(tally.slow) < 5:
        tally.slow.append(f"{name}: {took:.1f} s: {repr(value)[:300]}")
    if kind in (SILENT, HANG, FOREIGN) and len(tally.found) < 5:
        tally.found.append(f"{name}: {kind}: {told}: {repr(value)[:1500]}")


def judged(target: Target, value: Any) -> tuple[str, str]:
    """What became of one case, and what was said."""
    late: list[int] = []
    kind, told = _judged(target, value, late)
    return (HANG, told) if late else (kind, told)


def _judged(target: Target, value: Any, late: list[int]) -> tuple[str, str]:
    try:
        with _limited(late):
            return target.judge(value), ""
    except GraceError as error:
        return (REFUSED, str(error)) if len(str(error)) >= LEAST_WORDS else (FOREIGN, f"a message of few words: {error}")
    except Hung:
        return HANG, ""
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of a library in Rust is no Exception
        last = traceback.extract_tb(error.__traceback__)[-1]
        ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "grace_ds" in frame.filename]
        where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else f"{Path(last.filename).name}:{last.lineno}"
        return FOREIGN, f"{type(error).__name__}: {str(error)[:120]} at {where}"


@contextmanager
def _limited(late: list[int]) -> Iterator[None]:
    """Interrupt the block once it has taken too long, again and again, and note it in ``late``."""

    def interrupt(number: int, frame: Any) -> None:
        late.append(number)
        raise Hung

    signals = {signal.SIGVTALRM: signal.ITIMER_VIRTUAL, signal.SIGALRM: signal.ITIMER_REAL}
    before = {number: signal.signal(number, interrupt) for number in signals}
    signal.setitimer(signal.ITIMER_VIRTUAL, HANG_SECONDS, 1.0)
    signal.setitimer(signal.ITIMER_REAL, CLOCK * HANG_SECONDS, 1.0)
    try:
        yield
    finally:
        for number, timer in signals.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings that thousands of damaged files cause; what a target wants to hear, it listens to itself."""
    before = logging.root.manager.disable
    logger = logging.getLogger("grace_ds")
    kept, logger.propagate = logger.propagate, False
    null = logging.NullHandler()
    logger.addHandler(null)
    try:
        yield
    finally:
        logger.removeHandler(null)
        logger.propagate = kept
        logging.disable(before)
