"""What a run costs: CPU seconds of this process and FLOPs, training apart from selection."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Ledger:
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

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Counts the CPU seconds of the block as part of the run."""
        began = time.process_time()
        try:
            yield
        finally:
            self.cpu_total += time.process_time() - began

    @contextmanager
    def selecting(self) -> Iterator[None]:
        """Counts the CPU seconds of the block as selection; to be used inside of :meth:`counted`."""
        began = time.process_time()
        try:
            yield
        finally:
            self.cpu_selection += time.process_time() - began

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
