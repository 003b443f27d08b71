"""Arms that look at no content: random ones, the trusted upsampling, the oracle, and pruning by the losses met in training."""

from __future__ import annotations

from typing import Any

import numpy as np
from grace_ds_quickstart.pollute import Kind

from benchmarks.selection.arms.base import Arm, Batch, Laps, SubsetArm, View, job_sampler
from grace_ds.records import FloatArray, IntArray
from grace_ds.selection.objectives import select


class Uniform(Arm):
    """The job without any selection: its own sampler, epoch after epoch."""

    def begin(self, engine: Any) -> None:
        """The sampler, before its first epoch."""
        self._sampler = job_sampler(self.view)
        self._order, self._epoch = np.empty(0, np.int64), 0

    def take(self, step: int) -> Batch:
        """The sampler's next."""
        while len(self._order) < self.plan.batch:
            self._sampler.set_epoch(self._epoch)
            self._order, self._epoch = np.concatenate([self._order, list(self._sampler)]), self._epoch + 1
        ids, self._order = self._order[: self.plan.batch], self._order[self.plan.batch :]
        return Batch(ids)


class RepeatedRandom(SubsetArm):
    """RS2, repeated sampling of random subsets (arXiv 2305.18424): a fresh random part of the pool at each refresh.

    The variant without replacement: a part is only drawn again once the pool is used up.
    """

    def choose(self, version: int) -> IntArray | None:
        """The next part of a random order."""
        view = self.view
        return select("rs2", view.ids, np.zeros(view.n), view.k, seed=self.plan.seed, version=version).ids


class StaticRandom(SubsetArm):
    """One random subset, kept for the whole run: what a static coreset has to beat."""

    def choose(self, version: int) -> IntArray | None:
        """Drawn at the start only."""
        return None if version else self.rng.choice(self.view.n, self.view.k, replace=False)


class Oracle(SubsetArm):
    """Knows what each row is and draws from the unique ones alone, anew at each refresh: a bound on what filters can gain."""

    def choose(self, version: int) -> IntArray | None:
        """Uniform over the unique rows."""
        unique = np.flatnonzero(self.view.kinds == Kind.UNIQUE)
        return self.rng.choice(unique, min(self.view.k, len(unique)), replace=False)


class TrustedUpsample(Arm):
    """Uniform, with a tenth of the slots given to the trusted rows: the plainest use of a trusted set.

    Upsampling of high-quality sources, as in the data mixture of GPT-3 (arXiv 2005.14165); the share is not tuned.
    """

    SHARE = 0.1

    def __init__(self, view: View) -> None:
        super().__init__(view)
        self.trusted = Laps(view.n + np.arange(len(view.trusted), dtype=np.int64), self.rng)

    def take(self, step: int) -> Batch:
        """As many trusted rows as bring the share so far to a tenth."""
        per_step = self.SHARE * self.plan.batch
        count = round((step + 1) * per_step) - round(step * per_step)
        return Batch(np.concatenate([self.laps.take(self.plan.batch - count), self.trusted.take(count)]))


class InfoBatch(Arm):
    """InfoBatch (arXiv 2303.04947): each epoch drops half of the samples below the mean loss and doubles what is left of them.

    A sample's score is its loss when it was last trained on; what was never trained on is not pruned, so an epoch's expected
    gradient stays that of the whole pool. The last eighth of the run is on the whole pool with weights of 1. Simplified: the
    end of the run is given in steps, not in epochs. In a run shorter than an epoch there is nothing to prune yet: it is
    uniform then.
    """

    watches = True
    PRUNE, ANNEALED = 0.5, 0.125

    def __init__(self, view: View) -> None:
        super().__init__(view)
        self.scores = np.full(view.n, np.nan, np.float32)
        self._order = np.empty(0, np.int64)
        self._weights = np.ones(view.n, np.float32)
        self._whole = False

    def before(self, step: int) -> None:
        """A new epoch once the old one is used up, and at the start of the annealing."""
        annealed = step >= (1 - self.ANNEALED) * self.plan.steps
        if annealed and not self._whole:
            self._whole, self._order = True, np.empty(0, np.int64)
        while len(self._order) < self.plan.batch:
            kept, self._weights = self.epoch()
            self._order = np.concatenate([self._order, self.rng.permutation(kept)])

    def epoch(self) -> tuple[IntArray, FloatArray]:
        """The ids of a new epoch, and the weights (n,) of all samples in it."""
        weights = np.ones(self.view.n, np.float32)
        known = ~np.isnan(self.scores)
        if self._whole or not known.any():
            return self.view.ids, weights
        low = known & (np.where(known, self.scores, np.inf) < self.scores[known].mean())
        dropped = low & (self.rng.random(self.view.n) < self.PRUNE)
        weights[low] = 1 / (1 - self.PRUNE)
        return np.flatnonzero(~dropped), weights

    def take(self, step: int) -> Batch:
        """The next of the epoch's order, each with its weight."""
        ids, self._order = self._order[: self.plan.batch], self._order[self.plan.batch :]
        return Batch(ids, weights=self._weights[ids])

    def observe(self, step: int, ids: IntArray, losses: FloatArray) -> None:
        """Keeps the losses as scores."""
        self.scores[ids] = losses
