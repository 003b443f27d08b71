"""How fast a rank does what a refresh asks of it, and where each of these figures comes from."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

ASSUMED, MEASURED, GIVEN = "assumed", "measured", "given"


@dataclass(frozen=True)
class Rates:
    """Figures of one rank; the defaults are of one core of a 2020s x86 server.

    Attributes:
        gflops: products of the graph's shape, 10⁹ operations a second; 0: not known yet.
        narrow_gflops: reached by the collection's projections; 0: bound by memory, see ``plan_model.BYTES_AN_OPERATION``.
        token_seconds: of the content features, a token.
        item_seconds: of the dataset to hand out one sample, wall; what it does is the job's own affair.
        sample_seconds: of everything that root does for each sample of the window, map and account left out.
        fixed_seconds: of a refresh of hardly any sample, features left out.
        fixed_feature_seconds: of the features' part of it: counting tables, and their sum over ``measured_ranks``.
        fixed_bytes: held at the peak of a refresh of hardly any sample: those tables, our code and libraries.
        resting_bytes: of that, what stays.
        gbits: a second between two ranks.
        graph: seconds of a graph over those counted for it.
        busy: wall seconds over CPU seconds, as busy as the machine is with other work.
        measured_ranks: that the fixed seconds were measured with.
        origin: field → assumed | measured | given.
    """

    gflops: float = 0.0
    narrow_gflops: float = 0.0
    token_seconds: float = 1 / 5e6  # 4.3 to 6.6 million a second and core (benchmarks greedy)
    item_seconds: float = 2e-5
    sample_seconds: float = 1.5e-6
    fixed_seconds: float = 0.02
    fixed_feature_seconds: float = 0.1
    fixed_bytes: float = 54 * 2.0**20
    resting_bytes: float = 20 * 2.0**20
    gbits: float = 10.0
    graph: float = 1.0
    busy: float = 1.0
    measured_ranks: int = 1
    origin: dict[str, str] = field(default_factory=dict)

    def having(self, origin: str, **values: Any) -> Rates:
        """With other values, all of one origin."""
        return replace(self, **values, origin={**self.origin, **dict.fromkeys(values, origin)})

    def of(self, name: str) -> str:
        """Where a figure comes from."""
        return self.origin.get(name, ASSUMED)
