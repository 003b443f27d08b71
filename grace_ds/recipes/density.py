"""Let copies share their chance: soft deduplication without a trusted set or gradients (as SoftDedup, arXiv 2407.06654)."""

from __future__ import annotations

from grace_ds.recipes.base import Factors, Recipe, register
from grace_ds.recipes.weights import shared
from grace_ds.records import Signals


def factors(signals: Signals, parts: frozenset[str]) -> Factors:
    """Return ``copies``: 1 / (1 + near-duplicates)."""
    return {"copies": shared(signals.density)}


DENSITY = register(Recipe("density", frozenset(), content=True, trusted=False, fallback="uniform", factors=factors))
