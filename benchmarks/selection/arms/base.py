"""What an arm is: it says which samples the next step trains on, and may look, score and spend before it does.

An arm sees the pool, never what kind a row is (``oracle`` alone does), and pays for all that it does: its time in ``before``
and ``observe`` is entered in the visit counts by the training loop, its FLOPs by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from grace_ds_quickstart.model import GPT
from torch import Tensor
from torch.utils.data import DistributedSampler

from benchmarks.selection.scoring import Scorer
from benchmarks.selection.visits import VisitCounts
from grace_ds.records import Array, FloatArray, IntArray


@dataclass(frozen=True)
class Plan:
    """The settings that every arm of a comparison shares.

    Attributes:
        steps: optimizer steps of the run.
        batch: samples of a step.
        budget: share of the pool that a subset holds.
        interval: steps between two refreshes.
        lr: peak learning rate.
        seed: of the order of the samples.
    """

    steps: int
    batch: int
    budget: float
    interval: int
    lr: float
    seed: int


@dataclass
class View:
    """What an arm can reach.

    Attributes:
        rows: (n, T + 1) int32, the pool.
        trusted: (m, T + 1) int32.
        kinds: (n,) uint8, what each row is; for ``oracle`` and the bookkeeping only.
        folder: of the pool.
        vocab: number of token ids.
        scorer: passes of the model in training.
        new_model: a fresh model of the same shape.
        decode: rows to their texts.
    """

    rows: Array
    trusted: Array
    kinds: Array
    folder: Path
    vocab: int
    plan: Plan
    visits: VisitCounts
    scorer: Scorer
    new_model: Callable[[], GPT]
    decode: Callable[[Array], list[str]]

    @property
    def n(self) -> int:
        """Rows of the pool."""
        return len(self.rows)

    @property
    def k(self) -> int:
        """Rows of a subset within the budget."""
        return max(1, round(self.plan.budget * self.n))

    @cached_property
    def ids(self) -> IntArray:
        """(n,) int64, every id of the pool."""
        return np.arange(self.n, dtype=np.int64)


@dataclass(frozen=True)
class Batch:
    """One step's samples.

    Attributes:
        ids: (b,) int64; ids from n on are trusted rows, counted from n.
        rows: (b, T + 1) int64 where the arm has loaded them itself; else None.
        weights: (b,) float32, factor of each sample's loss; None for 1.
    """

    ids: IntArray
    rows: Tensor | None = None
    weights: FloatArray | None = None


class Laps:
    """Ids without end: one random order of all of them after another."""

    def __init__(self, ids: IntArray, rng: np.random.Generator) -> None:
        assert len(ids)
        self.ids, self._rng = ids, rng
        self._left = np.empty(0, np.int64)

    def take(self, count: int) -> IntArray:
        """The next ``count``."""
        while len(self._left) < count:
            self._left = np.concatenate([self._left, self._rng.permutation(self.ids)])
        out, self._left = self._left[:count], self._left[count:]
        return out


def job_sampler(view: View) -> DistributedSampler[Any]:
    """The sampler that the job has without any selection; the plan's seed is its own."""
    return DistributedSampler(view.ids, num_replicas=1, rank=0, seed=view.plan.seed)  # type: ignore[arg-type]


class Arm:
    """Uniform over the pool, epoch by epoch; the others override what they do otherwise.

    Attributes:
        watches: whether :meth:`observe` wants the losses of the samples trained on.
    """

    watches = False

    def __init__(self, view: View) -> None:
        self.view, self.plan = view, view.plan
        self.rng = np.random.default_rng([view.plan.seed, 1])
        self.laps = Laps(view.ids, self.rng)

    def begin(self, engine: Any) -> None:
        """Called once, with the DeepSpeed engine, before the first step; counted as selection."""

    def before(self, step: int) -> None:
        """Called before each step (from 0); counted as selection."""

    def take(self, step: int) -> Batch:
        """The samples of the step; counted as training, so nothing is decided here."""
        return Batch(self.laps.take(self.plan.batch))

    def observe(self, step: int, ids: IntArray, losses: FloatArray) -> None:
        """The losses of the samples just trained on, where the arm watches; counted as selection."""

    def end(self) -> dict[str, Any]:
        """Facts for the result, after the last step; costs that are only known now are entered here."""
        return {}


class SubsetArm(Arm):
    """Trains on a subset, lap by lap, until it chooses another."""

    def before(self, step: int) -> None:
        """A refresh every ``interval`` steps."""
        if step % self.plan.interval == 0:
            chosen = self.choose(step // self.plan.interval)
            if chosen is not None:
                self.laps = Laps(np.asarray(chosen, np.int64), self.rng)

    def choose(self, version: int) -> IntArray | None:
        """The subset of refresh ``version`` (from 0); None to go on as before."""
        raise NotImplementedError
