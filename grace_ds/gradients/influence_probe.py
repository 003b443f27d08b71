"""Probe the trusted set at a refresh: one half fits the trusted basis, the other calibrates influences along it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

from grace_ds.comm.base import Comm
from grace_ds.errors import DataError
from grace_ds.features.quality import robust_location
from grace_ds.gradients.basis import TrustedBasis
from grace_ds.gradients.hooks import Sketcher
from grace_ds.gradients.kfac import whiten
from grace_ds.gradients.passes import Passes, ProbeBatch
from grace_ds.records import FloatArray, IntArray

log = logging.getLogger("grace_ds")

_MOST, _LEAST = 768, 16  # maximum samples probed by a refresh in total; minimum in each of its three probes
_MEMORY = 0.8  # decay of the trusted gradient, from one basis to the next
FORWARDS = 64  # trusted samples whose losses a refresh reads, over all ranks: one forward pass each


@dataclass(frozen=True)
class Probes:
    """Numbers of samples of a refresh's three probes, summed over all ranks.

    Attributes:
        pool: pool samples, for the second moments that the trusted gradient is divided by.
        fit: samples of the fitting half of the trusted set, for the gradient.
        judge: samples of the other half.
    """

    pool: int
    fit: int
    judge: int

    @staticmethod
    def of(share: float, interval_steps: int, batch: int) -> Probes:
        """Return the sizes for ``share`` of the samples trained on in an interval.

        Most of them go to the gradient, because a mean over few samples is mostly noise.
        """
        total = min(_MOST, round(share * interval_steps * batch))
        pool, judge = max(_LEAST, round(total / 9)), max(_LEAST, round(total / 3))
        return Probes(pool, max(_LEAST, total - pool - judge), judge)


@dataclass(frozen=True)
class Fitted:
    """Result of a refresh's probes; equal on all ranks.

    Attributes:
        basis: to measure influences by.
        unit: of influences along the basis; 0 if they cannot be used.
        gradient: the trusted gradient behind the basis, earlier ones included with decay; the next fit continues from it.
    """

    basis: TrustedBasis
    unit: float
    gradient: TrustedBasis


def unit_of(influence: FloatArray) -> tuple[float, float]:
    """Return (unit, standard error) of trusted influences (n,).

    The unit is their median if it exceeds two of its standard errors, else 0.  Below that the two halves of the trusted set
    do not even agree on the sign, and influences cannot be used.
    """
    median, deviation = robust_location(influence)
    error = 1.2533 * deviation / np.sqrt(len(influence))  # of a median: sqrt(pi / 2) times a mean's
    return (median if median > 2 * error else 0.0), float(error)


class InfluenceProbe:
    """Fit the trusted basis on one half of the trusted set, and check its influences on the other half, which chooses nothing.

    A refresh probes few samples, different ones each time, and remembers the gradients of earlier ones.

    Args:
        passes: run the model.
        sketcher: attached to it.
        dataset: trusted samples, items like those of the job's dataset.
        halves: two disjoint sets of positions in ``dataset``.
        pool: the job's own dataset; the trusted gradient is divided by its second moments.
        comm: between all ranks that probe.
        seed: of the run.
        count: sizes of the probes.
        replicas: (this rank's data-parallel rank, number of them); default: every rank of ``comm`` has a model of its own.
            Ranks that hold one model together probe the same samples, and the first of them reports what is found.
        reports: whether this rank is that first one.
    """

    def __init__(
        self,
        passes: Passes,
        sketcher: Sketcher,
        dataset: Any,
        halves: tuple[IntArray, IntArray],
        pool: Any,
        comm: Comm,
        seed: int,
        count: Probes,
        replicas: tuple[int, int] | None = None,
        reports: bool = True,
    ) -> None:
        self.passes, self.sketcher, self.dataset, self.halves, self.pool = passes, sketcher, dataset, halves, pool
        self.comm, self.seed, self.count, self.reports = comm, seed, count, reports
        self.replica, self.replicas = replicas or (comm.rank, comm.size)
        self.gradient: TrustedBasis | None = None  # behind the basis in force, earlier ones included

    @property
    def ready(self) -> bool:
        """Whether probes can be made; equal on all ranks."""
        return self.passes.ready

    @property
    def probed(self) -> int:
        """Samples that this rank has run through the model in probes."""
        return self.passes.probed

    def settle(self) -> str:
        """Agree over all ranks on whether probes can be made; return the reason why not, empty if they can.  Collective."""
        # A gradient that exists already comes from a checkpoint: an earlier process of the run has made probes.
        return self.passes.settle(proven=self.gradient is not None)

    def fit(self, version: int, window: IntArray) -> Fitted:
        """Fit basis number ``version`` to the model as it is now; change no state yet.  Collective.

        Args:
            version: number of the fit within the run.
            window: (n,) int64, the pool samples that the next schedules choose from.

        Raises:
            DataError: no trusted sample has a finite gradient, or the probed pool samples have none.
        """
        fitting, judging = self.halves
        moments = self.sketcher.moments()
        self.passes.gradients(self.passes.read(self.pool, self._draw(window, version, 1, self.count.pool), "pool"), moments)
        second = moments.fit(self.comm.allreduce(self.passes.sums(moments.pack())))
        target = self.sketcher.accumulator(self.sketcher.rank)
        self.passes.gradients(self._trusted(self._draw(fitting, version, 2, self.count.fit)), target)
        gradient = target.fit(self.comm.allreduce(self.passes.sums(target.pack())), version)
        if self.gradient is not None:
            gradient = gradient.plus(self.gradient, _MEMORY ** (version - self.gradient.version))
        scale = dict(zip(self.sketcher.names, self.sketcher.scale.sigma.tolist(), strict=True))
        basis = whiten(gradient, second, scale)
        return Fitted(basis, self._unit(basis, self._draw(judging, version, 3, self.count.judge)), gradient)

    def losses(self, version: int) -> FloatArray:
        """Return the losses of some trusted samples under the current model, (n,) float32, nats per token.  Collective.

        Equal on all ranks; each ``version`` takes other samples.  They come from the fitting half, because the other half chooses
        nothing.
        """
        ids = self._draw(self.halves[0], version, 0, FORWARDS)
        return self._of_all(self.passes.losses(self._trusted(ids)))

    def _unit(self, basis: TrustedBasis, ids: IntArray) -> float:
        before = self.sketcher.basis
        self.sketcher.set_basis(basis)
        try:
            collected = self.passes.rows(self._trusted(ids))
        finally:
            self.sketcher.set_basis(before)
        local = np.concatenate([rows.influence * rows.norm for rows in collected]) if collected else np.empty(0, np.float32)
        influences = self._of_all(local.astype(np.float32))
        if not len(influences):
            raise DataError("no trusted sample has a finite gradient; check the trusted set, or set recipe: content")
        unit, error = unit_of(influences)
        if self.comm.rank == 0:
            use = "used" if unit else "left out: the trusted halves do not agree"
            message = "basis %d: median influence of the other trusted half %.3g, standard error %.2g: %s"
            log.info(message, basis.version, float(np.median(influences)), error, use)
        return unit

    def _of_all(self, local: FloatArray) -> FloatArray:
        """Return the finite values of all models, each counted once.  Collective."""
        found: FloatArray = np.concatenate(self.comm.allgather(local if self.reports else local[:0]))
        return found[np.isfinite(found)]

    def _trusted(self, ids: IntArray) -> list[ProbeBatch]:
        return self.passes.read(self.dataset, ids, "trusted")

    def _draw(self, ids: IntArray, version: int, purpose: int, count: int) -> IntArray:
        """Return this model's ids of a probe, equally many for every model (ZeRO-3 gathers weights in step).

        They are whole micro-batches where the job's own call takes nothing else.
        """
        rng = np.random.Generator(np.random.Philox(key=[self.seed, 4 * version + purpose]))
        chosen = rng.permutation(ids)[:count] if len(ids) < 4 * count else rng.choice(ids, count)
        multiple = self.passes.multiple
        each = max(1, len(chosen) // (self.replicas * multiple)) * multiple
        at = (self.replica * each + np.arange(each)) % len(chosen)
        return np.asarray(chosen[at], np.int64)
