"""Define the order of the corpus while nothing is chosen: which sample is at each position of the run.

A job has its own order, its sampler's.  As long as GRACE chooses nothing (the warm-up, a guard that found the pool clean,
before ``start_step``, after ``stop_step``) that order continues, so that such a job trains on the same samples as without it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DistributedSampler, RandomSampler, SequentialSampler

from grace_ds.records import Array, IntArray

log = logging.getLogger("grace_ds")

ROUNDS = 6
MOST = 2**25  # maximum samples to shuffle as a whole: 256 MiB on root; a DistributedSampler takes more on every rank
_GOLDEN = 0x9E3779B97F4A7C15


class Order(Protocol):
    """Endless ids of the corpus, epoch after epoch; a pure function of the position, equal on all ranks."""

    def __call__(self, positions: IntArray) -> IntArray:
        """Return the ids at ``positions`` (m,), (m,) int64.

        Positions ascend, and count samples over all ranks from the start of the run.
        """
        ...


class Permutation:
    """A seeded random order of [0, n), in constant memory: a Feistel network, applied again until the result is below n.

    Args:
        n: number of ids.
        seed: of the order.
    """

    def __init__(self, n: int, seed: int) -> None:
        self.n = n
        self._half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))  # bits of each half; 4^half >= n
        self._mask = np.uint64((1 << int(self._half)) - 1)
        self._keys = [np.uint64((seed * 0xD1342543DE82EF95 + (r + 1) * _GOLDEN) % 2**64) for r in range(ROUNDS)]

    def __call__(self, positions: Array) -> IntArray:
        """Return the ids at ``positions`` (m,), (m,) int64, each in [0, n)."""
        ids = np.asarray(positions, np.int64).astype(np.uint64)
        outside = np.arange(len(ids))
        while len(outside):  # at most 4 rounds on average, as the domain is less than 4 n
            ids[outside] = self._once(ids[outside])
            outside = outside[ids[outside] >= np.uint64(self.n)]
        return ids.astype(np.int64)

    def _once(self, x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left, right = x >> self._half, x & self._mask
        for key in self._keys:
            mixed = (right + key) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            mixed ^= mixed >> np.uint64(31)
            left, right = right, left ^ (mixed & self._mask)
        joined: npt.NDArray[np.uint64] = (left << self._half) | right
        return joined


class SeededOrder:
    """A random order, different in each epoch, in constant memory.

    Args:
        n: samples of the corpus.
        seed: of the first epoch.
    """

    def __init__(self, n: int, seed: int) -> None:
        self.n, self.seed = n, seed

    def __call__(self, positions: IntArray) -> IntArray:
        """See :class:`Order`."""
        return _by_epoch(positions, self.n, lambda epoch, within: Permutation(self.n, self.seed + epoch)(within))


class SamplerOrder:
    """The order of torch's ``DistributedSampler``, over all its ranks, and of accelerate's seeded random sampler.

    Both draw an epoch by ``torch.randperm`` from a generator seeded with ``seed + epoch``.

    Args:
        n: samples of the corpus.
        seed: the sampler's.
        shuffle: False: the corpus in its own order.
    """

    def __init__(self, n: int, seed: int = 0, shuffle: bool = True) -> None:
        self.n, self.seed, self.shuffle = n, seed, shuffle

    def __call__(self, positions: IntArray) -> IntArray:
        """See :class:`Order`."""
        return _by_epoch(positions, self.n, self._epoch) if self.shuffle else positions % self.n

    def _epoch(self, epoch: int, within: IntArray) -> IntArray:
        generator = torch.Generator()
        generator.manual_seed(self.seed + epoch)
        order: IntArray = torch.randperm(self.n, generator=generator).numpy()
        return order[within]


def order_of(sampler: Any, n: int, seed: int) -> Order | None:
    """Return the order that the job's own ``sampler`` gives a corpus of ``n`` samples.

    None if that order is not a function of the position.

    Args:
        sampler: a ``DistributedSampler`` or ``SequentialSampler`` of torch's, or accelerate's seeded random sampler.
        n: samples of the corpus.
        seed: of :func:`shuffled`'s substitute.
    """
    if isinstance(sampler, SequentialSampler) or (isinstance(sampler, DistributedSampler) and not sampler.shuffle):
        return SamplerOrder(n, shuffle=False)
    if isinstance(sampler, DistributedSampler):
        return shuffled(n, sampler.seed, seed)
    if isinstance(sampler, RandomSampler) and hasattr(sampler, "initial_seed"):  # accelerate's
        return shuffled(n, int(sampler.initial_seed), seed)
    return None


def shuffled(n: int, sampler_seed: int, seed: int) -> Order:
    """Return the order of a ``DistributedSampler``, or above ``MOST`` samples a :class:`SeededOrder` with ``seed``."""
    if n <= MOST:
        return SamplerOrder(n, sampler_seed)
    log.info("the corpus has %d samples: where nothing is chosen they come in an order of GRACE's own, not the sampler's", n)
    return SeededOrder(n, seed)


def _by_epoch(positions: IntArray, n: int, ids_of: Callable[[int, IntArray], IntArray]) -> IntArray:
    ids = np.empty(len(positions), np.int64)
    for epoch in np.unique(positions // n).tolist():
        in_epoch = positions // n == epoch
        ids[in_epoch] = ids_of(epoch, positions[in_epoch] % n)
    return ids
