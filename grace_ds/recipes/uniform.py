"""Weigh nothing: every sample is as likely as any other."""

from __future__ import annotations

from grace_ds.recipes.base import Factors, Recipe, register
from grace_ds.records import Signals


def factors(signals: Signals, parts: frozenset[str]) -> Factors:
    """Return no factors."""
    return {}


UNIFORM = register(Recipe("uniform", frozenset(), content=False, trusted=False, fallback=None, factors=factors))
