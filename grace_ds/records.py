"""The values that travel between the stages: frozen, array-valued, with ids instead of batch positions.

Shape legend: n = rows on this rank, d = sketch width, k = neighbours, L = slots of a schedule, N = dataset size.
A sample *is* its index in the job's dataset (int64).  Rows on a rank are sorted by id and unique unless said otherwise.
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
    """Why a sample stands in a schedule."""

    CORE = 0
    EXPLORE = 1
    AUDIT = 2


@dataclass(frozen=True)
class Columns:
    """What was measured of samples: arrays of n rows, side by side.  Before ``gather`` ids may repeat, after it they are sorted.

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
        """The rows at ``index`` (positions or a mask), in that order."""
        return type(self)(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    @classmethod
    def concat(cls: type[C], parts: Sequence[C]) -> C:
        """All rows of ``parts`` (at least one part), one after another."""
        return cls(**{f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(cls)})

    def finite(self) -> npt.NDArray[np.bool_]:
        """(n,) bool, rows that tell something."""
        raise NotImplementedError


@dataclass(frozen=True)
class SampleRecords(Columns):
    """Collected rows: what one training backward gave for each of its samples.

    Attributes:
        sketch: (n, d) float16, folded gradient sketch, scaled to unit norm (its length is in ``norm``).
        norm: (n,) float32, length of the unscaled sketch: the sampled layers' gradient norm of the sample's mean loss.
        loss: (n,) float32, nats per token minus the running mean at its step; NaN where the job's loss was not seen.
        align: (n,) float32, cosine with the trusted gradient; NaN where there was no trusted basis.
        basis: (n,) int32, version of the trusted basis behind ``influence``; -1 without one.
        hidden: (n, HIDDEN) float16, hidden state of the last sketched block, mean over the sample's tokens, projected; 0 where
            it was not seen.
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
        """No rows, with sketches ``dim`` wide."""
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
        """Their losses alone."""
        return Losses(self.ids, self.step, self.loss)

    def finite(self) -> npt.NDArray[np.bool_]:
        """(n,) bool, rows of a finite gradient: others come of an overflow of the loss scale."""
        sound: npt.NDArray[np.bool_] = np.isfinite(self.sketch).all(axis=1) & np.isfinite(self.norm)
        return sound


@dataclass(frozen=True)
class Losses(Columns):
    """Losses of the samples of any step, collected or not: they come with the forward.

    Attributes:
        loss: (n,) float32, as in :class:`SampleRecords`.
    """

    name: ClassVar[str] = "losses"
    loss: FloatArray

    @staticmethod
    def empty() -> Losses:
        """Of no sample."""
        return Losses(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))

    def finite(self) -> npt.NDArray[np.bool_]:
        """(n,) bool, losses that were seen."""
        return np.isfinite(self.loss)


@dataclass(frozen=True)
class Neighbours:
    """For each of this rank's n queries, its k nearest index rows, nearest first.

    Attributes:
        ids: (n, k) int64, dataset ids of the neighbours; -1 where there were fewer than k candidates.
        similarity: (n, k) float32, cosine in the space of the graph; -inf at the padding.
    """

    ids: IntArray
    similarity: FloatArray


@dataclass(frozen=True)
class Signals:
    """What selection knows of the window's samples, sorted by id; on root: of all of them.

    Attributes:
        ids: (n,) int64.
        loss: (n,) float32, nats per token above the running mean, its own or spread along the graph; NaN unknown.
        align: (n,) float32, influence in robust deviations from the trusted samples'; NaN unknown.
        density: (n,) float32, near-duplicates of the sample in the window.
        keep: (n,) float32 in (0, 1], pass of the trusted filter; NaN without one.
        loss_pass: (n,) float32 in (0, 1], pass of the loss filter, fitted to trusted samples' losses; NaN without one.
        crowding: (n,) float32, density of the k-NN graph at the sample; NaN without a graph.
        staleness: (n,) float32, optimizer steps since the sample was trained on and looked at; inf where it never was.
        disagreement: (n,) float32, spread of the losses around it; NaN without any.
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


@dataclass(frozen=True)
class Coreset:
    """What a selection decided, on the root rank.

    Attributes:
        ids: (m,) int64, sorted, unique.
        weights: (m,) float32, inverse-probability or cluster weights, mean 1 over the coreset.
    """

    ids: IntArray
    weights: FloatArray


@dataclass(frozen=True)
class Schedule:
    """The one artefact of a refresh: the ids to train on next, in their final order.

    Slot s of the schedule holds the sample of stream position ``start + s``.  Identical on every rank.

    Attributes:
        version: 0 for the first schedule of a run, then counting up.
        start: stream position (in samples, over all data-parallel ranks) of slot 0.
        ids: (L,) int64.
        roles: (L,) uint8, :class:`Role`.
        weights: (L,) float32.
        seed: of the reshuffles once the schedule is exhausted (laps).
        meta: JSON-able facts of the refresh that decided it (objective, counts, next refresh step).
        run: name of the run that it belongs to, interruptions left out; empty where nobody has named it.
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
        """32 hex digits over version, start, seed, ids, roles and weights."""
        h = hashlib.blake2b(digest_size=16)
        h.update(np.array([self.version, self.start, self.seed, len(self)], "<i8").tobytes())
        h.update(np.ascontiguousarray(self.ids, "<i8").tobytes())
        h.update(np.ascontiguousarray(self.roles, "u1").tobytes())
        h.update(np.ascontiguousarray(self.weights, "<f4").tobytes())
        return h.hexdigest()
