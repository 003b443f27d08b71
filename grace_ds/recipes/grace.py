"""Weigh samples by GRACE: content, the influence and the loss of each sample, and the density of the k-NN graph around it.

    importance = quality · copies · influence · loss · crowding

Influence and loss are measured for the samples that the job has trained on, and propagated to the others along the graph.  A
loss passes if trusted samples have such losses too: far below them the model knows the text already, far above it is noise.
"""

from __future__ import annotations

from grace_ds.recipes.base import Factors, Recipe, register
from grace_ds.recipes.content import factors as content
from grace_ds.recipes.weights import any_known, soft_pass
from grace_ds.records import Signals

INFLUENCE_CUT, INFLUENCE_SOFTNESS = -1.5, 0.2  # filter by influence, in deviations of the trusted samples
LOSS_BASE = 0.3  # without trusted losses, the sample with the lowest loss keeps 0.3 / 1.3 of the chance of the highest


def factors(signals: Signals, parts: frozenset[str]) -> Factors:
    """Return the factors of ``content``, and ``influence``, ``loss`` and ``crowding`` if they are in force and known."""
    found = dict(content(signals, parts))
    if "gradients" in parts and any_known(signals.influence):
        found["influence"] = soft_pass(signals.influence, INFLUENCE_CUT, INFLUENCE_SOFTNESS)
    if "loss" in parts and any_known(signals.loss_pass):
        found["loss"] = signals.loss_pass
    elif "loss" in parts and any_known(signals.loss_rank):
        found["loss"] = LOSS_BASE + signals.loss_rank
    if "graph" in parts and any_known(signals.sparseness):
        found["crowding"] = signals.sparseness
    return found


GRACE = register(
    Recipe(
        "grace",
        frozenset({"gradients", "loss", "graph", "sketches"}),
        content=True,
        trusted=True,
        fallback="content",
        factors=factors,
    )
)
