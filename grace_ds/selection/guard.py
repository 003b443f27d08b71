"""The guard: what stops a selection that does not help.

Three questions, answered before the money is spent twice.  Does content alone find anything to leave out?  The effective
share (Σp)² / (N Σp²) of the window says so: on clean text nearly all of it is kept.  Do core samples, which were chosen,
lower the trusted loss more than audit samples, which were not?  The bootstrap interval of the difference of their mean
influence says so; the trusted half that gives it its unit chooses nothing.  And do influences foretell the next ones?  Those
measured since the last schedule are compared by rank with what older ones predicted of the same samples: where no such
correlation can be shown, influences are noise, and gradients are not collected until the next look.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from grace_ds import recipes
from grace_ds.recipes.weights import rank01
from grace_ds.records import Array

RESAMPLES = 1000
LEAST = 8  # audit samples below which nothing is said
ENOUGH = 1000  # foretold influences from which on they are judged
MEMORY = 0.75  # of how well they were foretold, from one refresh to the next
ONE_SIDED = 1.645  # standard errors of a correlation that chance exceeds once in twenty
BLIND = ("gradients", "sketches")  # parts that are not paid for while influences foretell nothing


@dataclass(frozen=True)
class Contrast:
    """Mean influence of core samples minus that of audit samples, with its bootstrap interval.

    Attributes:
        difference, low, high: in units of the trusted median; NaN where there are too few samples.
        core, audit: how many samples there were.
    """

    difference: float
    low: float
    high: float
    core: int
    audit: int


@dataclass(frozen=True)
class Foretold:
    """How well influences foretold those measured after them.

    Attributes:
        correlation: of the ranks, in [-1, 1].
        samples: that it was taken over; earlier refreshes count less.
    """

    correlation: float = 0.0
    samples: float = 0.0

    def after(self, earlier: Foretold) -> Foretold:
        """With what ``earlier`` refreshes found."""
        samples = self.samples + MEMORY * earlier.samples
        total = self.samples * self.correlation + MEMORY * earlier.samples * earlier.correlation
        return Foretold(total / samples if samples else 0.0, samples)


@dataclass(frozen=True)
class Blindness:
    """How it stands with the gradients.

    Attributes:
        on: they are neither collected nor used.
        misses: looks in a row that could not show that influences foretell anything; each doubles the time to the next.
        look: version of the schedule from which on they are collected again.
        foretold: what is known of them since the last look.
    """

    on: bool = False
    misses: int = 0
    look: int = 0
    foretold: Foretold = field(default_factory=Foretold)

    def at(self, version: int, found: Foretold) -> Blindness:
        """How it stands for schedule ``version``, by what was ``found`` at its refresh."""
        if self.on:
            return replace(self, on=version < self.look)
        known = found.after(self.foretold)
        if known.samples < ENOUGH:
            return replace(self, foretold=known)
        if known.correlation * np.sqrt(known.samples) >= ONE_SIDED:
            return Blindness(foretold=known)
        return Blindness(True, self.misses + 1, version + 2 ** (self.misses + 1))


@dataclass(frozen=True)
class Decision:
    """What a schedule may use.

    Attributes:
        level: name of the recipe that it is made by.
        reason: in words, with the numbers.
        misses: looks in a row that found no help; each doubles the time to the next look.
        look: version of the schedule at which a level that was stepped down is tried again.
        numbers: what it was decided by.
        blind: whether it does without gradients.
    """

    level: str
    reason: str
    misses: int = 0
    look: int = 0
    numbers: Mapping[str, float] = field(default_factory=dict)
    blind: Blindness = field(default_factory=Blindness)

    @property
    def off(self) -> frozenset[str]:
        """Parts of the recipe that are not paid for."""
        return frozenset(BLIND) if self.blind.on else frozenset()

    def meta(self) -> dict[str, object]:
        """JSON-able; kept in the schedule, read back by :func:`from_meta`."""
        plain = {"level": self.level, "reason": self.reason, "misses": self.misses, "look": self.look, **self.numbers}
        return {**plain, "blind": asdict(self.blind)} if self.blind != Blindness() else plain


def from_meta(meta: Mapping[str, Any] | None) -> Decision | None:
    """The decision that a schedule was made under; None for a schedule without one."""
    if not meta or "level" not in meta:
        return None
    blind = dict(meta.get("blind") or {})
    if blind:
        blind["foretold"] = Foretold(**blind["foretold"])
    return Decision(str(meta["level"]), str(meta["reason"]), int(meta["misses"]), int(meta["look"]), blind=Blindness(**blind))


def effective_share(log_p: Array) -> float:
    """(Σp)²/(N Σp²): 1 where every sample is equally likely, small where few carry all the probability."""
    p = np.exp(log_p - log_p.max())
    return float(p.sum() ** 2 / (len(p) * (p**2).sum()))


def contrast(core: Array, audit: Array, confidence: float, seed: int) -> Contrast:
    """Compares finite influences of core (n,) and audit (m,) samples by the percentile bootstrap."""
    core, audit = (np.asarray(v, np.float64)[np.isfinite(v)] for v in (core, audit))
    if min(len(core), len(audit)) < LEAST:
        return Contrast(float("nan"), float("nan"), float("nan"), len(core), len(audit))
    rng = np.random.Generator(np.random.Philox(key=[seed, 0x60A2D]))
    drawn = [v[rng.integers(0, len(v), (RESAMPLES, min(len(v), 1000)))].mean(1) for v in (core, audit)]
    # A resample of fewer than all would spread more than the mean does.
    spread = [(d - v.mean()) * np.sqrt(min(len(v), 1000) / len(v)) for d, v in zip(drawn, (core, audit), strict=True)]
    difference = float(core.mean() - audit.mean())
    low, high = np.quantile(difference + spread[0] - spread[1], [(1 - confidence) / 2, (1 + confidence) / 2])
    return Contrast(difference, float(low), float(high), len(core), len(audit))


def foretold(predicted: Array, measured: Array) -> Foretold:
    """Spearman's correlation of influences (n,) that were predicted and then measured; those that are not finite left out."""
    both = np.isfinite(predicted) & np.isfinite(measured)
    if both.sum() < LEAST:
        return Foretold()
    a, b = (rank01(np.asarray(v, np.float64)[both]) - 0.5 for v in (predicted, measured))
    spread = np.sqrt((a @ a) * (b @ b))
    return Foretold(float(a @ b / spread) if spread > 0 else 0.0, float(both.sum()))


def _below(name: str) -> str:
    return recipes.recipe(name).fallback or name


def decide(
    recipe: str,
    version: int,
    share: float,
    clean_share: float,
    found: Contrast | None,
    previous: Decision | None,
    seen: Foretold | None = None,
) -> Decision:
    """The level of schedule ``version``.

    Args:
        recipe: the most that may be used.
        share: effective share of the window under content alone.
        clean_share: from which on content finds nothing worth leaving out.
        found: core against audit of the samples harvested since the last schedule; None where nothing was.
        previous: decision of the schedule before; None for the first.
        seen: how well influences foretold those measured since; None where nothing was.
    """
    blind = (previous.blind if previous is not None else Blindness()).at(version, seen or Foretold())
    level = _level(recipe, version, share, clean_share, found, previous)
    if level.level != recipe or blind == Blindness():
        return replace(level, blind=blind)
    known = blind.foretold
    numbers = {**level.numbers, "foretold": known.correlation, "foretold_samples": known.samples}
    if blind.on:
        reason = f"{level.reason}; influences foretell nothing: no gradients until schedule {blind.look}"
        return replace(level, reason=reason, blind=blind)
    return replace(level, numbers=numbers, blind=blind)


def _level(
    recipe: str, version: int, share: float, clean_share: float, found: Contrast | None, previous: Decision | None
) -> Decision:
    """The recipe that the schedule is made by."""
    numbers = {"effective_share": share}
    if share >= clean_share:
        reason = f"effective share {share:.2f} is at least {clean_share:g}: the window is clean, nothing is worth leaving out"
        return Decision("uniform", reason, numbers=numbers)
    misses, look = (previous.misses, previous.look) if previous is not None else (0, 0)
    if found is not None and np.isfinite(found.difference):
        numbers |= {"core_minus_audit": found.difference, "low": found.low, "high": found.high}
        said = f"core minus audit influence {found.difference:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
        if found.high < 0 and recipes.recipe(recipe).fallback is not None:
            lower = _below(recipe)
            return Decision(lower, f"{said} is below 0: {recipe} does harm", misses + 1, version + 2 ** (misses + 1), numbers)
        return Decision(recipe, said, 0, 0, numbers)
    if misses and version < look:
        return Decision(_below(recipe), f"next look at schedule {look}", misses, look, numbers)
    return Decision(recipe, f"effective share {share:.2f}", misses, look, numbers)
