"""What a run costs: CPU seconds of this process and FLOPs, training apart from selection."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass


@dataclass
class VisitCounts:
    """The account of one run.

    Attributes:
        cpu_total: CPU seconds of everything that is counted.
        cpu_selection: the part of it that choosing samples took; what is left is training.
        flops_train, flops_selection: by count; features, graphs and greedy search have CPU seconds only.
    """

    cpu_total: float = 0.0
    cpu_selection: float = 0.0
    flops_train: float = 0.0
    flops_selection: float = 0.0

    def counted(self) -> AbstractContextManager[None]:
        """Counts the CPU seconds of the block as part of the run."""
        return self._clock("cpu_total")

    def selecting(self) -> AbstractContextManager[None]:
        """Counts the CPU seconds of the block as selection; to be used inside of :meth:`counted`."""
        return self._clock("cpu_selection")

    @contextmanager
    def _clock(self, account: str) -> Iterator[None]:
        began = time.process_time()
        try:
            yield
        finally:
            setattr(self, account, getattr(self, account) + time.process_time() - began)

    def as_dict(self) -> dict[str, float]:
        """JSON-able."""
        return {
            "cpu_train": self.cpu_total - self.cpu_selection,
            "cpu_selection": self.cpu_selection,
            "cpu_total": self.cpu_total,
            "flops_train": self.flops_train,
            "flops_selection": self.flops_selection,
            "flops_total": self.flops_train + self.flops_selection,
        }
