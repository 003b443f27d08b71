"""Provide the recipes, which define the importance of samples for a coreset.

A recipe is one file that calls :func:`~grace_ds.recipes.base.register`: in this package and imported below, or in a plugin.
No other module refers to a recipe by its name.
"""

from __future__ import annotations

from typing import Any

from array_api_compat import array_namespace

from grace_ds import registry
from grace_ds.recipes import content, density, grace, uniform  # noqa: F401 - each registers itself
from grace_ds.recipes.base import PARTS, Factors, Recipe, register
from grace_ds.records import Array, Signals

__all__ = ["AUTO", "DEFAULT", "PARTS", "Factors", "Recipe", "depth", "log_importance", "names", "recipe", "register"]

AUTO = "auto"  # in the configuration: the default if gradients can be read, else its fallback
DEFAULT = grace.GRACE.name


def names() -> tuple[str, ...]:
    """Return the names of all recipes, the richest first."""
    return tuple(sorted(registry.recipes.names(), key=depth, reverse=True))


def recipe(name: str) -> Recipe:
    """Return the recipe called ``name``, or the default one for :data:`AUTO`."""
    found: Recipe = registry.recipes.get(DEFAULT if name == AUTO else name)
    return found


def depth(name: str) -> int:
    """Return the number of recipes that ``name`` can fall back to in turn: 0 for the uniform order."""
    below = recipe(name).fallback
    return 0 if below is None else 1 + depth(below)


def log_importance(of: Recipe, signals: Signals, parts: frozenset[str]) -> Array:
    """Return the logarithm of each sample's unnormalised chance, (n,) float64: the sum over the recipe's factors.

    Args:
        of: the recipe.
        signals: of n samples, NumPy, torch or CuPy arrays.
        parts: in force; those that the recipe does not use are ignored.
    """
    xp: Any = array_namespace(signals.density)
    total = xp.zeros_like(xp.astype(signals.density, xp.float64))
    for factor in of.factors(signals, parts & of.uses).values():
        total = total + xp.log(factor)
    result: Array = total
    return result
