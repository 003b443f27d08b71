"""What a recipe is: which parts a selection is made of, and how they join to the importance of a sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from grace_ds import registry
from grace_ds.records import Array, Signals

Factors = Mapping[str, Array]

PARTS = ("gradients", "loss", "graph", "sketches")  # what ``ablate`` can switch off, one at a time


@dataclass(frozen=True)
class Recipe:
    """How a sample is weighed.

    Attributes:
        name: as in the configuration.
        uses: the parts of :data:`PARTS` that it can use.
        content: whether it reads the tokens of the samples.
        trusted: whether it judges them by a trusted set.
        fallback: the recipe that stands in where gradients cannot be read, or where the guard finds that they do not help;
            None: there is none below.
        factors: (signals, parts in force) → name → (n,) float64 factor above 0; importance is their product, none: all alike.
    """

    name: str
    uses: frozenset[str]
    content: bool
    trusted: bool
    fallback: str | None
    factors: Callable[[Signals, frozenset[str]], Factors]


def register(recipe: Recipe) -> Recipe:
    """Makes ``recipe`` available under its name."""
    registry.recipes.register(recipe.name)(recipe)
    return recipe
