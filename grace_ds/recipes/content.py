"""Weigh samples by their text alone: whether it reads like the trusted samples, and how many near-duplicates it has."""

from __future__ import annotations

from grace_ds.recipes.base import Factors, Recipe, register
from grace_ds.recipes.density import factors as copies
from grace_ds.recipes.weights import any_known
from grace_ds.records import Signals


def factors(signals: Signals, parts: frozenset[str]) -> Factors:
    """Return ``quality``, the pass of the trusted filter if there is one, and ``copies``."""
    filtered = {"quality": signals.quality} if any_known(signals.quality) else {}
    return {**filtered, **copies(signals, parts)}


CONTENT = register(Recipe("content", frozenset(), content=True, trusted=True, fallback="density", factors=factors))
