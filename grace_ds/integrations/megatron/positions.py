"""Pass the id of the sample at each position to the data workers, through shared memory.

The segment is anonymous: torch unlinks it as soon as the processes hold it, so that nothing is left behind, however the job
ends.  Every entry carries its position, so that a reader can distinguish a valid entry from one that is not published yet or
has been overwritten.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from grace_ds.errors import DataError
from grace_ds.records import IntArray

_CURE = (
    "the data workers run further ahead than lag allows: pass a larger lag to grace_ds.megatron.wrap, or lower num_workers or "
    "prefetch_factor"
)
_PATIENCE = 1800.0  # seconds that a data worker waits for the run's first schedule


class Ring:
    """A ring buffer with the ids of the positions around the cursor.

    Args:
        capacity: positions that it holds at once; 16 bytes each.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.end = 0  # in the process that writes: first position that is not published
        self._ids = torch.zeros(capacity, dtype=torch.int64)
        self._positions = torch.full((capacity,), -1, dtype=torch.int64)
        self._begun = torch.zeros(1, dtype=torch.bool)
        for tensor in (self._ids, self._positions, self._begun):
            tensor.share_memory_()  # type: ignore[no-untyped-call]

    def write(self, start: int, ids: IntArray) -> None:
        """Publish the ids (n,) of the positions from ``start`` on, over those of the positions ``capacity`` before."""
        positions = torch.from_numpy(np.arange(start, start + len(ids), dtype=np.int64))
        slots = positions % self.capacity
        self._positions[slots] = -1  # a reader must not accept a half-written entry
        self._ids[slots] = torch.from_numpy(np.ascontiguousarray(ids))
        self._positions[slots] = positions
        self._begun[0] = True
        self.end = start + len(ids)

    def read(self, position: int) -> int:
        """Return the id at ``position``; in any process.  Waits for the first :meth:`write`.

        Raises:
            DataError: it is not published, or has been overwritten.
        """
        self._await_first()
        slot = position % self.capacity
        before = int(self._positions[slot])
        sample = int(self._ids[slot])
        if before == position == int(self._positions[slot]):
            return sample
        if before < position:
            raise DataError(
                f"sample {position} of the run is asked for, and the schedule is not published that far (found {before}): either "
                f"grace_ds.megatron.attach(model) was not called, or {_CURE}"
            )
        raise DataError(f"sample {position} of the run is asked for, long after it was to be read (found {before}); {_CURE}")

    def _await_first(self) -> None:
        """Wait until something is published: in an interleaved pipeline, data workers start before the first schedule."""
        end = time.monotonic() + _PATIENCE
        while not self._begun[0]:
            if time.monotonic() > end:
                raise DataError(
                    f"no schedule was made within {_PATIENCE:g} s: call grace_ds.megatron.wrap once for each virtual pipeline "
                    "stage, on every rank, and see the other ranks' messages"
                )
            time.sleep(0.02)


class Scheduled(Dataset[Any]):
    """The job's training dataset with the schedule's samples: position p of the run → ``corpus[ring[p]]``.

    It is as long as the job's own dataset, and it is sent to data workers together with a handle on the shared ring.

    Args:
        position: index that the job's sampler asks for → position of the run; None: they are the same.
    """

    def __init__(self, corpus: Any, ring: Ring, length: int, position: Callable[[int], int] | None = None) -> None:
        self.corpus, self.ring, self.length, self.position = corpus, ring, length, position

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int | None) -> Any:
        if index is None:  # Megatron's padding of an incomplete batch
            return self.corpus[None]
        return self.corpus[self.ring.read(int(index) if self.position is None else self.position(int(index)))]
