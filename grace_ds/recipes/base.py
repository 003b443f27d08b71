"""Define what a recipe is: the parts that a selection uses, and how they combine to the importance of a sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from grace_ds import registry
from grace_ds.records import Array, Signals

Factors = Mapping[str, Array]

PARTS = ("gradients", "loss", "graph", "sketches")  # parts that ``ablate`` can switch off, one at a time


@dataclass(frozen=True)
class Recipe:
    """Rule for the importance of a sample.

    Attributes:
        name: as in the configuration.
        uses: the parts of :data:`PARTS` that it can use.
        content: whether it reads the tokens of the samples.
        trusted: whether it compares them with a trusted set.
        fallback: the recipe used instead if gradients cannot be read, or if the guard finds that they do not help; None if
            there is none.
        factors: (signals, parts in force) → name → (n,) float64 factor above 0; importance is their product, or equal for
            all samples without factors.  Called on every rank with the samples of that rank, so a sample's factor may depend on
            its own signals only; those that are relative to the window (``loss_rank``, ``sparseness``) are signals themselves.
            A factor that is left out is 1.
    """

    name: str
    uses: frozenset[str]
    content: bool
    trusted: bool
    fallback: str | None
    factors: Callable[[Signals, frozenset[str]], Factors]


def register(recipe: Recipe) -> Recipe:
    """Register ``recipe`` under its name."""
    registry.recipes.register(recipe.name)(recipe)
    return recipe
