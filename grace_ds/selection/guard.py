"""Guard a run: stop a selection that does not help.

It answers three questions.

Is there anything to leave out?  The effective share (Σp)² / (N Σp²) of the window answers this, once under content alone and
once under the losses.  A window is clean if both leave nearly all of it, since the model may know a text by heart that reads
like the trusted samples.

Do core samples, which were chosen, lower the trusted loss more than audit samples, which were not?  The bootstrap interval of
the difference of their mean influence answers this; the trusted half that gives it its unit chooses nothing.

Do influences predict the next ones?  Those measured since the last schedule are compared by rank with the predictions of
older ones for the same samples.  If no such correlation can be shown, influences are noise, and gradients are not collected
until the next look.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from grace_ds import recipes
from grace_ds.comm.base import Comm
from grace_ds.comm.statistics import exact_sum, highest, total
from grace_ds.recipes.weights import rank01
from grace_ds.records import Array
from grace_ds.selection.gumbel import ALONE

RESAMPLES = 1000
LEAST = 8  # minimum uniformly drawn samples to conclude anything
ENOUGH = 1000  # minimum predicted influences to judge them
MEMORY = 0.75  # decay of findings, from one refresh to the next
LOOK = 40  # number of losses with as large a sampling error as the limits fitted to the trusted losses
ONE_SIDED = 1.645  # standard errors of a correlation that chance exceeds once in twenty
BLIND = frozenset({"gradients", "sketches"})  # parts switched off while influences predict nothing
DOWN = frozenset(recipes.PARTS)  # parts switched off after a step down
CLEAN = frozenset(recipes.PARTS) - {"loss"}  # parts switched off while the window is clean: losses are still read


@dataclass(frozen=True)
class Contrast:
    """Mean influence of core samples minus that of audit samples, with its bootstrap interval.

    Attributes:
        difference, low, high: in units of the trusted median; NaN if there are too few samples.
        core, audit: numbers of samples.
    """

    difference: float
    low: float
    high: float
    core: int
    audit: int


@dataclass(frozen=True)
class Remembered:
    """A mean over refreshes, with less weight for earlier ones.

    Attributes:
        value: the mean; 0 without findings.
        weight: weight of the findings in the mean.
    """

    value: float = 0.0
    weight: float = 0.0

    def after(self, earlier: Remembered) -> Remembered:
        """Return the mean combined with that of ``earlier`` refreshes."""
        weight = self.weight + MEMORY * earlier.weight
        total = self.weight * self.value + MEMORY * earlier.weight * earlier.value
        return Remembered(total / weight if weight else 0.0, weight)


@dataclass(frozen=True)
class Blindness:
    """State of the test whether influences predict anything, on which the use of gradients depends.

    Attributes:
        on: gradients are neither collected nor used.
        misses: consecutive looks that could not show that influences predict anything; each doubles the time to the next.
        look: version of the schedule from which on gradients are collected again.
        prediction_skill: rank correlation of influences with their predictions from older ones, since the last look; weighted
            by samples.
    """

    on: bool = False
    misses: int = 0
    look: int = 0
    prediction_skill: Remembered = field(default_factory=Remembered)

    def at(self, version: int, found: Remembered) -> Blindness:
        """Return the state for schedule ``version``, given what was ``found`` at its refresh."""
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
    """Decision on what a schedule may use.

    Attributes:
        level: name of the recipe that it is made by.
        reason: in words, with the numbers.
        misses: consecutive looks that found no help; each doubles the time to the next look.
        look: version of the schedule at which the configured level is tried again after a step down.
        numbers: that the decision is based on.
        off: parts of the recipe that are switched off.
        blind: state of the test of influences.
        losses: effective share of the window under the losses, weighted by looks.
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
        """Return the parts that the refresh for schedule ``version`` does without.

        Parts that are tried again at this version are not among them.
        """
        blind = BLIND if self.blind.on and version < self.blind.look else frozenset()
        return blind if self.off <= BLIND or version >= self.look > 0 else self.off

    def meta(self) -> dict[str, object]:
        """Return a JSON-able form, stored in the schedule and read back by :func:`from_meta`."""
        plain = {"level": self.level, "reason": self.reason, "misses": self.misses, "look": self.look, **self.numbers}
        blind = {"blind": asdict(self.blind)} if self.blind != Blindness() else {}
        losses = {"losses": asdict(self.losses)} if self.losses.weight else {}
        return {**plain, "off": sorted(self.off), **blind, **losses}


def from_meta(meta: Mapping[str, Any] | None) -> Decision | None:
    """Return the decision that a schedule was made under; None for a schedule without one."""
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


def effective_share(log_p: Array, comm: Comm = ALONE) -> float:
    """Return (Σp)²/(N Σp²) over all ranks: 1 if every sample is equally likely, small if few have all the probability.

    Collective.

    Args:
        log_p: (n,) float, of this rank's samples; at least one on some rank.
    """
    p = np.exp(log_p - highest(comm, log_p))
    once, squared = exact_sum(comm, p), exact_sum(comm, np.square(p, out=p))
    return once**2 / (total(comm, len(p))[0] * squared)


def contrast(core: Array, audit: Array, confidence: float, seed: int) -> Contrast:
    """Compare finite influences of core (n,) and audit (m,) samples by the percentile bootstrap."""
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
    """Return Spearman's correlation of influences (n,) predicted and then measured; values that are not finite are left out."""
    both = np.isfinite(predicted) & np.isfinite(measured)
    if both.sum() < LEAST:
        return Remembered()
    a, b = (rank01(np.asarray(v, np.float64)[both]) - 0.5 for v in (predicted, measured))
    spread = np.sqrt((a @ a) * (b @ b))
    return Remembered(float(a @ b / spread) if spread > 0 else 0.0, float(both.sum()))


def loss_share(loss_pass: Array, comm: Comm = ALONE) -> Remembered:
    """Return the effective share under the losses' pass (n,) of uniformly drawn samples; empty for too few over all ranks.

    Collective.
    """
    known = loss_pass[np.isfinite(loss_pass)]
    (n,) = total(comm, len(known))
    return Remembered(effective_share(np.log(known), comm), n / (n + LOOK)) if n >= LEAST else Remembered()


@dataclass(frozen=True)
class Window:
    """Facts about the window, to decide whether it is clean.

    Attributes:
        share: effective share of the window under content alone.
        losses: effective share under the losses, from :func:`loss_share` since the last schedule.
        clean: minimum share of a window in which nothing is worth leaving out.
        awaited: no loss has been compared with trusted ones yet, but one will be.
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
    """Decide on the level of schedule ``version``.

    Args:
        recipe: the highest level that may be used.
        version: of the schedule.
        window: that the schedule is made from.
        found: core against audit, of the samples collected since the last schedule; None if there were none.
        previous: decision of the schedule before; None for the first.
        seen: :func:`prediction_skill` of the influences measured since; None if there were none.
    """
    before = previous if previous is not None else Decision(recipe, "")
    losses = (
        window.losses.after(before.losses) if window.losses.weight else before.losses
    )  # without a new look the old value does not decay
    blind = before.blind.at(version, seen or Remembered())
    level = _clean(window, losses) or _level(recipe, version, window, losses, found, before)
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


def _clean(window: Window, losses: Remembered) -> Decision | None:
    """Return the decision for a clean window; None if something is worth leaving out, or this is not known yet."""
    if window.share < window.clean or window.awaited or (losses.weight and losses.value < window.clean):
        return None
    shares = f"effective share {window.share:.2f}" + (f" ({losses.value:.2f} under what losses pass)" if losses.weight else "")
    return Decision(
        "uniform", f"{shares} is at least {window.clean:g}: the window is clean, nothing is worth leaving out", off=CLEAN
    )


def _level(recipe: str, version: int, window: Window, losses: Remembered, found: Contrast | None, previous: Decision) -> Decision:
    """Return the decision on the recipe of the schedule, if something is worth leaving out."""
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
        reason += "; losses are yet to be compared"
    elif window.share >= window.clean:
        reason += f", but {losses.value:.2f} under what losses pass is below {window.clean:g}"
    return Decision(recipe, reason, misses, look)
