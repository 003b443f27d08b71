"""Whether the ranks together have trained on what the schedule says, on real processes."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from grace_ds.data.in_flight import IssuedBatch
from grace_ds.data.sampler import Geometry
from grace_ds.data.schedule import ScheduleBook
from grace_ds.integrations.step_watch import StepWatch
from grace_ds.records import Role, Schedule
from tests.multirank.harness import World, run_ranks

pytestmark = pytest.mark.multirank

ROWS, BATCHES = 3, 4
CASES = (
    "as the schedule says",
    "another sample on one rank",
    "another rank's batches",
    "a rank left behind",
    "ranks in other places",
)
OTHER_PLACES = "the ranks stand at different samples"
OTHER_SAMPLES = "have not trained on what the schedule says"


def compared(world: World, copies: int) -> dict[str, tuple[int, str]]:
    """By case the mismatches that this rank has counted, and what it has said; ``copies`` ranks work on the same samples."""
    from grace_ds.comm.torch_dist import TorchComm

    comm = TorchComm([list(range(world.size))], 20.0)
    g = Geometry(world.size // copies, world.rank // copies, ROWS, 1)
    ids = np.random.default_rng(1).permutation(1000)[: 2 * BATCHES * g.micro].astype(np.int64)
    book = ScheduleBook([Schedule(0, 0, ids, np.full(len(ids), Role.CORE, np.uint8), np.ones(len(ids), np.float32), 0)])
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("grace_ds").addHandler(handler)
    last, found = world.rank == world.size - 1, {}
    for case in CASES:
        lines.clear()
        watch = StepWatch()
        watch.restart(0)
        behind = last and case == "a rank left behind"
        place = (g.rank + 1) % g.ranks if case == "ranks in other places" else 0 if case == "another rank's batches" else g.rank
        for q in range(BATCHES - behind):
            slots = book.slots(q * g.micro + place * g.rows, g.rows).ids
            if last and q == 1 and case == "another sample on one rank":
                slots[2] += 1
            watch.trained(IssuedBatch(slots, q + 1, []), g)
        watch.compare(comm, book, g, (BATCHES - behind) * g.micro)
        found[case] = (watch.mismatches, " ".join(lines))
    return found


@pytest.mark.parametrize(("ranks", "copies"), [(2, 1), (4, 2)])
def test_every_rank_notices_what_one_of_them_has_not_trained_on(ranks: int, copies: int) -> None:
    for told in run_ranks(compared, ranks, copies, timeout=60):
        assert told.pop("as the schedule says") == (0, "")
        count, said = told.pop("a rank left behind")
        assert count == 1 and OTHER_PLACES in said
        for count, said in told.values():
            assert count == 1 and OTHER_SAMPLES in said
