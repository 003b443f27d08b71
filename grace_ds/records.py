"""Define the values that the stages exchange: frozen dataclasses of arrays, with ids instead of batch positions.

Shape legend: n = rows on this rank, d = sketch width, k = neighbours, L = slots of a schedule, N = dataset size.
A sample *is* its index in the job's dataset (int64).  Rows on a rank are sorted by id and unique unless stated otherwise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import IntEnum
from typing import Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
C = TypeVar("C", bound="Columns")


HIDDEN = 16  # numbers of a sample's pooled hidden state that are kept


class Role(IntEnum):
    """The reason why a sample is in a schedule: coreset, exploration, or uniformly drawn audit."""

    CORE = 0
    EXPLORE = 1
    AUDIT = 2


@dataclass(frozen=True)
class Columns:
    """Measurements of samples: arrays of n rows, side by side.  Before ``gather`` ids may repeat, after it they are sorted.

    Attributes:
        ids: (n,) int64, dataset ids.
        step: (n,) int64, optimizer step (``engine.global_steps``) whose micro-batch it was measured in.
    """

    name: ClassVar[str]
    ids: IntArray
    step: IntArray

    def __len__(self) -> int:
        return len(self.ids)

    def take(self: C, index: Array) -> C:
        """Return the rows at ``index`` (positions or a mask), in that order."""
        return type(self)(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    @classmethod
    def concat(cls: type[C], parts: Sequence[C]) -> C:
        """Return all rows of ``parts`` (at least one part), one after another."""
        return cls(**{f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)})

    def finite(self) -> npt.NDArray[np.bool_]:
        """Return which rows hold a usable measurement: (n,) bool."""
        raise NotImplementedError


@dataclass(frozen=True)
class SampleRecords(Columns):
    """Collected rows: what one training backward gave for each of its samples.

    Attributes:
        sketch: (n, d) float16, folded gradient sketch, scaled to unit norm (its length is in ``norm``).
        norm: (n,) float32, length of the unscaled sketch: the sampled layers' gradient norm of the sample's mean loss.
        loss: (n,) float32, nats per token minus the running mean at its step; NaN if the job's loss was not seen.
        influence: (n,) float32, cosine with the trusted gradient; NaN if there was no trusted basis.
        basis: (n,) int32, version of the trusted basis behind ``influence``; -1 without one.
        hidden: (n, HIDDEN) float16, hidden state of the last sketched block, mean over the sample's tokens, projected; 0 if it
            was not seen.
    """

    name: ClassVar[str] = "rows"
    sketch: npt.NDArray[np.float16]
    norm: FloatArray
    loss: FloatArray
    influence: FloatArray
    basis: npt.NDArray[np.int32]
    hidden: npt.NDArray[np.float16]

    @staticmethod
    def empty(dim: int) -> SampleRecords:
        """Return no rows, with sketches of width ``dim``."""
        return SampleRecords(
            ids=np.empty(0, np.int64),
            sketch=np.empty((0, dim), np.float16),
            norm=np.empty(0, np.float32),
            loss=np.empty(0, np.float32),
            influence=np.empty(0, np.float32),
            step=np.empty(0, np.int64),
            basis=np.empty(0, np.int32),
            hidden=np.empty((0, HIDDEN), np.float16),
        )

    @property
    def losses(self) -> Losses:
        """The losses of these rows alone."""
        return Losses(self.ids, self.step, self.loss)

    def finite(self) -> npt.NDArray[np.bool_]:
        """Return which rows have a finite gradient: (n,) bool; others come from an overflow of the loss scale."""
        is_finite: npt.NDArray[np.bool_] = np.isfinite(self.sketch).all(axis=1) & np.isfinite(self.norm)
        return is_finite


@dataclass(frozen=True)
class Losses(Columns):
    """Losses of the samples of any step, with or without collected gradients: the forward gives them.

    Attributes:
        loss: (n,) float32, as in :class:`SampleRecords`.
    """

    name: ClassVar[str] = "losses"
    loss: FloatArray

    @staticmethod
    def empty() -> Losses:
        """Return the losses of no sample."""
        return Losses(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))

    def finite(self) -> npt.NDArray[np.bool_]:
        """Return which losses were seen: (n,) bool."""
        return np.isfinite(self.loss)


@dataclass(frozen=True)
class Neighbours:
    """For each of this rank's n queries, its k nearest index rows, nearest first.

    Attributes:
        ids: (n, k) int64, dataset ids of the neighbours; -1 as padding if there were fewer than k candidates.
        similarity: (n, k) float32, cosine in the space of the graph; -inf at the padding.
    """

    ids: IntArray
    similarity: FloatArray


@dataclass(frozen=True)
class Signals:
    """The values by which selection judges the samples of the window that this rank owns, sorted by id.

    Attributes:
        ids: (n,) int64.
        loss: (n,) float32, nats per token above the running mean, its own or spread along the graph; NaN unknown.
        influence: (n,) float32, in robust deviations from the trusted samples'; NaN unknown.
        density: (n,) float32, near-duplicates of the sample in the window.
        quality: (n,) float32 in (0, 1], pass of the trusted filter; NaN without one.
        loss_pass: (n,) float32 in (0, 1], pass of the loss filter, fitted to trusted samples' losses; NaN without one.
        crowding: (n,) float32, density of the k-NN graph at the sample; NaN without a graph.
        staleness: (n,) float32, optimizer steps since the sample was trained on and measured; inf if it never was.
        disagreement: (n,) float32, spread of the losses around it; NaN without any.
        loss_rank: (n,) float64 in [0, 1], rank of the loss among those of the whole window; 0.5 for an unknown loss, NaN if no
            loss of the window is known.
        sparseness: (n,) float64 in (0, 1], (c / (c + crowding))² with c the crowding that a quarter of the window does not
            exceed; NaN without a graph.
    """

    ids: IntArray
    loss: FloatArray
    influence: FloatArray
    density: FloatArray
    quality: FloatArray
    loss_pass: FloatArray
    crowding: FloatArray
    staleness: FloatArray
    disagreement: FloatArray
    loss_rank: npt.NDArray[np.float64]
    sparseness: npt.NDArray[np.float64]


@dataclass(frozen=True)
class Coreset:
    """The result of a selection: the members that this rank owns.

    Attributes:
        ids: (m,) int64, sorted, unique.
        weights: (m,) float32, inverse-probability or cluster weights, mean 1 over the coreset of all ranks.
    """

    ids: IntArray
    weights: FloatArray


@dataclass(frozen=True)
class Schedule:
    """The result of a refresh: the ids to train on next, in their final order.

    Slot s of the schedule holds the sample of stream position ``start + s``.  Identical on every rank.

    Attributes:
        version: 0 for the first schedule of a run, then counting up.
        start: stream position (in samples, over all data-parallel ranks) of slot 0.
        ids: (L,) int64.
        roles: (L,) uint8, :class:`Role`.
        weights: (L,) float32.
        seed: of the reshuffles once the schedule is exhausted (laps).
        meta: JSON-able facts of the refresh that made it (objective, counts, next refresh step).
        run: name of the run that it belongs to, which a resumed run keeps; empty if it has no name.
    """

    version: int
    start: int
    ids: IntArray
    roles: npt.NDArray[np.uint8]
    weights: FloatArray
    seed: int
    meta: Mapping[str, Any] = field(default_factory=dict)
    run: str = ""

    def __len__(self) -> int:
        return len(self.ids)

    def digest(self) -> str:
        """Return 32 hex digits over version, start, seed, ids, roles and weights."""
        hasher = hashlib.blake2b(digest_size=16)
        hasher.update(np.array([self.version, self.start, self.seed, len(self)], "<i8").tobytes())
        hasher.update(np.ascontiguousarray(self.ids, "<i8").tobytes())
        hasher.update(np.ascontiguousarray(self.roles, "u1").tobytes())
        hasher.update(np.ascontiguousarray(self.weights, "<f4").tobytes())
        return hasher.hexdigest()
