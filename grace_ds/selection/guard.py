"""The guard: what stops a selection that does not help.

Three questions, answered before the money is spent twice.  Is there anything to leave out?  The effective share
(Σp)² / (N Σp²) of the window says so, once under content alone and once under what losses pass: a window is clean where both
leave nearly all of it, since text that reads like the trusted samples may still be known to the model by heart.  Do core
samples, which were chosen, lower the trusted loss more than audit samples, which were not?  The bootstrap interval of the
difference of their mean influence says so; the trusted half that gives it its unit chooses nothing.  And do influences
predict the next ones?  Those measured since the last schedule are compared by rank with what older ones predicted of the
same samples: where no such correlation can be shown, influences are noise, and gradients are not collected until the next
look.
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
LEAST = 8  # samples drawn uniformly below which nothing is concluded
ENOUGH = 1000  # predicted influences from which on they are judged
MEMORY = 0.75  # of what was found, from one refresh to the next
LOOK = 40  # losses whose own sampling error is as large as that of the limits fitted to the trusted ones
ONE_SIDED = 1.645  # standard errors of a correlation that chance exceeds once in twenty
BLIND = frozenset({"gradients", "sketches"})  # parts that are not paid for while influences predict nothing
DOWN = frozenset(recipes.PARTS)  # parts that are not paid for after a step down
CLEAN = frozenset(recipes.PARTS) - {"loss"}  # parts that are not paid for while the window is clean: losses go on being read


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
class Remembered:
    """A mean of what refreshes found, of which earlier ones count less.

    Attributes:
        value: the mean, 0 where nothing was found.
        weight: what it was taken over, by which it counts.
    """

    value: float = 0.0
    weight: float = 0.0

    def after(self, earlier: Remembered) -> Remembered:
        """With what ``earlier`` refreshes found."""
        weight = self.weight + MEMORY * earlier.weight
        total = self.weight * self.value + MEMORY * earlier.weight * earlier.value
        return Remembered(total / weight if weight else 0.0, weight)


@dataclass(frozen=True)
class Blindness:
    """How it stands with the gradients.

    Attributes:
        on: they are neither collected nor used.
        misses: looks in a row that could not show that influences predict anything; each doubles the time to the next.
        look: version of the schedule from which on they are collected again.
        predicted: rank correlation of influences with those that older ones predicted, since the last look; by samples.
    """

    on: bool = False
    misses: int = 0
    look: int = 0
    prediction_skill: Remembered = field(default_factory=Remembered)

    def at(self, version: int, found: Remembered) -> Blindness:
        """How it stands for schedule ``version``, by what was ``found`` at its refresh."""
        if self.on:
            return replace(self, on=version < self.look)
        known = found.after(self.prediction_skill)
        if known.weight < ENOUGH:
            return replace(self, prediction_skill=known)
        if known.value * np.sqrt(known.weight) >= ONE_SIDED:
            return Blindness(prediction_skill=known)
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
        off: parts of the recipe that are not paid for.
        blind: whether it does without gradients.
        losses: effective share of the window under what losses pass, by looks.
    """

    level: str
    reason: str
    misses: int = 0
    look: int = 0
    numbers: Mapping[str, float] = field(default_factory=dict)
    off: frozenset[str] = frozenset()
    blind: Blindness = field(default_factory=Blindness)
    losses: Remembered = field(default_factory=Remembered)

    def unpaid(self, version: int) -> frozenset[str]:
        """Parts that the refresh which makes schedule ``version`` does without: none of those that are looked at again."""
        blind = BLIND if self.blind.on and version < self.blind.look else frozenset()
        return blind if self.off <= BLIND or version >= self.look > 0 else self.off

    def meta(self) -> dict[str, object]:
        """JSON-able; kept in the schedule, read back by :func:`from_meta`."""
        plain = {"level": self.level, "reason": self.reason, "misses": self.misses, "look": self.look, **self.numbers}
        blind = {"blind": asdict(self.blind)} if self.blind != Blindness() else {}
        losses = {"losses": asdict(self.losses)} if self.losses.weight else {}
        return {**plain, "off": sorted(self.off), **blind, **losses}


def from_meta(meta: Mapping[str, Any] | None) -> Decision | None:
    """The decision that a schedule was made under; None for a schedule without one."""
    if not meta or "level" not in meta:
        return None
    blind = dict(meta.get("blind") or {})
    if blind:
        blind["prediction_skill"] = Remembered(**blind["prediction_skill"])
    return Decision(
        str(meta["level"]),
        str(meta["reason"]),
        int(meta["misses"]),
        int(meta["look"]),
        off=frozenset(meta.get("off") or ()),
        blind=Blindness(**blind),
        losses=Remembered(**(meta.get("losses") or {})),
    )


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


def prediction_skill(predicted: Array, measured: Array) -> Remembered:
    """Spearman's correlation of influences (n,) that were predicted and then measured; those that are not finite left out."""
    both = np.isfinite(predicted) & np.isfinite(measured)
    if both.sum() < LEAST:
        return Remembered()
    a, b = (rank01(np.asarray(v, np.float64)[both]) - 0.5 for v in (predicted, measured))
    spread = np.sqrt((a @ a) * (b @ b))
    return Remembered(float(a @ b / spread) if spread > 0 else 0.0, float(both.sum()))


def heard(loss_pass: Array) -> Remembered:
    """One look at what losses pass, (n,), of samples that were drawn uniformly; nothing of too few."""
    known = loss_pass[np.isfinite(loss_pass)]
    n = len(known)
    return Remembered(effective_share(np.log(known)), n / (n + LOOK)) if n >= LEAST else Remembered()


@dataclass(frozen=True)
class Window:
    """What the first question is answered by.

    Attributes:
        share: effective share of the window under content alone.
        losses: effective share under what losses pass, as :func:`heard` since the last schedule.
        clean: from which on a share says that there is nothing worth leaving out.
        awaited: no loss is held against trusted ones yet, but will be.
    """

    share: float
    clean: float
    losses: Remembered = field(default_factory=Remembered)
    awaited: bool = False


def _below(name: str) -> str:
    return recipes.recipe(name).fallback or name


def decide(
    recipe: str,
    version: int,
    window: Window,
    found: Contrast | None,
    previous: Decision | None,
    seen: Remembered | None = None,
) -> Decision:
    """The level of schedule ``version``.

    Args:
        recipe: the most that may be used.
        window: what it is made from.
        found: core against audit of the samples collected since the last schedule; None where nothing was.
        previous: decision of the schedule before; None for the first.
        seen: :func:`prediction_skill` of the influences measured since; None where nothing was.
    """
    before = previous if previous is not None else Decision(recipe, "")
    losses = window.losses.after(before.losses) if window.losses.weight else before.losses  # no look, nothing forgotten
    blind = before.blind.at(version, seen or Remembered())
    level = _clean(recipe, window, losses) or _level(recipe, version, window, losses, found, before)
    numbers = {**level.numbers, "effective_share": window.share}
    if losses.weight:
        numbers["loss_share"] = losses.value
    level = replace(level, numbers=numbers, blind=blind, losses=losses)
    if level.level != recipe or blind == Blindness():
        return level
    if blind.on:
        reason = f"{level.reason}; influences predict nothing: no gradients until schedule {blind.look}"
        return replace(level, reason=reason, off=BLIND)
    known = blind.prediction_skill
    return replace(level, numbers={**numbers, "prediction_skill": known.value, "prediction_skill_samples": known.weight})


def _clean(recipe: str, window: Window, losses: Remembered) -> Decision | None:
    """That nothing is worth leaving out of the window; None: something is, or it is not known yet."""
    if window.share < window.clean or window.awaited or (losses.weight and losses.value < window.clean):
        return None
    shares = f"effective share {window.share:.2f}" + (f" ({losses.value:.2f} under what losses pass)" if losses.weight else "")
    return Decision(
        "uniform", f"{shares} is at least {window.clean:g}: the window is clean, nothing is worth leaving out", off=CLEAN
    )


def _level(recipe: str, version: int, window: Window, losses: Remembered, found: Contrast | None, previous: Decision) -> Decision:
    """The recipe that the schedule is made by, where something is worth leaving out."""
    if found is not None and np.isfinite(found.difference):
        numbers = {"core_minus_audit": found.difference, "low": found.low, "high": found.high}
        reason = f"core minus audit influence {found.difference:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
        if found.high < 0 and recipes.recipe(recipe).fallback is not None:
            lower, misses = _below(recipe), previous.misses + 1
            return Decision(lower, f"{reason} is below 0: {recipe} does harm", misses, version + 2**misses, numbers, DOWN)
        return Decision(recipe, reason, 0, 0, numbers)
    misses, look = previous.misses, previous.look
    if misses and version < look:
        return Decision(_below(recipe), f"next look at schedule {look}", misses, look, off=DOWN)
    reason = f"effective share {window.share:.2f}"
    if window.share >= window.clean and window.awaited:
        reason += "; losses are yet to be heard"
    elif window.share >= window.clean:
        reason += f", but {losses.value:.2f} under what losses pass is below {window.clean:g}"
    return Decision(recipe, reason, misses, look)
