"""Define the speeds of a rank for the work of a refresh, with the origin of each figure."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

ASSUMED, MEASURED, GIVEN = "assumed", "measured", "given"


@dataclass(frozen=True)
class Rates:
    """Figures of one rank; the defaults are of one core of a 2020s x86 server.

    Attributes:
        gflops: speed of products in the graph's shape, 10⁹ operations per second; 0: not known yet.
        narrow_gflops: speed of the collection's projections; 0: bound by memory, see ``plan_model.BYTES_AN_OPERATION``.
        token_seconds: CPU seconds of the content features, per token.
        item_seconds: wall seconds to read one sample from the dataset; depends on the job.
        sample_seconds: seconds of the root's work per sample of the window, without map and explanation.
        fixed_seconds: seconds of a refresh of very few samples, without features.
        fixed_feature_seconds: of the features in such a refresh: counting tables, and their sum over ``measured_ranks``.
        fixed_bytes: held at the peak of a refresh of very few samples: those tables, code and libraries.
        resting_bytes: part of ``fixed_bytes`` that stays.
        gbits: Gbit/s between two ranks.
        message_seconds: of a message without content, on the rank that sends it to many.
        graph: seconds of a graph relative to the estimate.
        busy: wall seconds over CPU seconds, given the other load of the machine.
        measured_ranks: number of ranks in the measurement of the fixed seconds.
        origin: field → assumed | measured | given.
    """

    gflops: float = 0.0
    narrow_gflops: float = 0.0
    token_seconds: float = 1 / 5e6  # 4.3 to 6.6 million per second and core (benchmarks greedy)
    item_seconds: float = 2e-5
    sample_seconds: float = 1.5e-6
    fixed_seconds: float = 0.02
    fixed_feature_seconds: float = 0.1
    fixed_bytes: float = 54 * 2.0**20
    resting_bytes: float = 20 * 2.0**20
    gbits: float = 10.0
    message_seconds: float = 2e-5  # TCP
    graph: float = 1.0
    busy: float = 1.0
    measured_ranks: int = 1
    origin: dict[str, str] = field(default_factory=dict)

    def having(self, origin: str, **values: Any) -> Rates:
        """Return a copy with other values, all of one origin."""
        return replace(self, **values, origin={**self.origin, **dict.fromkeys(values, origin)})

    def of(self, name: str) -> str:
        """Return the origin of a figure."""
        return self.origin.get(name, ASSUMED)
