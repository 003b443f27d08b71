"""Simulated ranks: a transport like the others, counts of rings and trees that are walked, the schedule of one rank."""

from __future__ import annotations

import json
import threading
import time

import numpy as np
import pytest

from grace_ds.cli.main import main
from grace_ds.cli.simulate import Counted, Job, simulated_config, two_refreshes
from grace_ds.cli.simulate_lines import _fit
from grace_ds.comm.base import Comm
from grace_ds.comm.local import LocalComm
from grace_ds.comm.simulated import simulate
from grace_ds.comm.traffic import Traffic
from grace_ds.config.load import load_config
from grace_ds.errors import PeerFailed, TransportError, TransportTimeout
from tests.multirank.conformance import check_all


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_simulated_ranks_conform(size: int) -> None:
    first, *others = simulate(size, check_all, 10.0).results
    assert all(other == first for other in others)


@pytest.mark.parametrize("items", [0, 1, 3, 8, 1000])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_a_sum_is_counted_as_the_ring_that_passes_its_chunks(size: int, items: int) -> None:
    cuts = [items * p // size for p in range(size + 1)]
    sent = [[0, 0] for _ in range(size)]
    held = [{p: {(r, p) for p in range(size)} for p in range(size)} for r in range(size)]  # chunk → summands, by rank
    for turn in range(2 * (size - 1)):
        passed = [(r, (r - turn) % size) for r in range(size)]
        for rank, chunk in passed:
            length = cuts[chunk + 1] - cuts[chunk]
            sent[rank][0] += length > 0
            sent[rank][1] += 8 * length
        for rank, chunk, summands in [(r, c, set(held[r][c])) for r, c in passed]:
            here = held[(rank + 1) % size]
            here[chunk] = here[chunk] | summands if turn < size - 1 else summands
    everyone = {(rank, chunk) for rank in range(size) for chunk in range(size)}
    assert all(set().union(*chunks.values()) == everyone for chunks in held)  # the walk is a sum
    for rank in range(size):
        counted = Traffic()
        counted.ring(rank, size, items, 8)
        assert [counted.messages, counted.bytes] == sent[rank] and counted.calls == 1


@pytest.mark.parametrize("size", range(1, 18))
def test_a_broadcast_reaches_every_rank_once(size: int) -> None:
    for root in {0, size - 1, size // 2}:
        counted = [Traffic() for _ in range(size)]
        for rank, traffic in enumerate(counted):
            traffic.tree(rank, size, root, 5)
        assert sum(traffic.messages for traffic in counted) == size - 1
        assert sum(traffic.bytes for traffic in counted) == 5 * (size - 1)
        assert max(traffic.messages for traffic in counted) == counted[root].messages == (size - 1).bit_length()


def counts_of_each_kind(comm: Comm) -> list[tuple[int, int]]:
    """(messages, bytes) of this rank in some collectives of 4 ranks, less their headers."""
    found = []
    arrays = [np.zeros(comm.rank + p, np.int32) for p in range(4)]
    calls = (
        lambda: comm.exchange(arrays),
        lambda: comm.allgather(np.zeros(3)),
        lambda: comm.gather(np.zeros(3)),
        lambda: comm.shift(np.zeros(3)),
        lambda: comm.agree(),
        lambda: comm.allreduce(np.zeros(8)),
    )
    for call in calls:
        before = comm.traffic.copy()
        call()
        sent = comm.traffic.since(before)
        found.append((sent.messages - 3, sent.bytes - 3 * 120))
    return found


def test_pieces_for_oneself_and_empty_ones_are_no_messages() -> None:
    found = simulate(4, counts_of_each_kind).results
    assert found[0] == [(3, 24), (3, 72), (0, 0), (1, 24), (0, 0), (6, 96)]
    assert found[2] == [(3, 4 * (2 + 3 + 5)), (3, 72), (1, 24), (1, 24), (0, 0), (6, 96)]


@pytest.mark.parametrize("recipe", ["grace", "content", "density", "uniform"])
def test_any_number_of_ranks_makes_the_schedule_of_one(recipe: str) -> None:
    config = simulated_config(load_config({}, dotlist=[f"recipe={recipe}", "features.dim=16", "collect.dim=16"]), 10**6, 4)

    def made(comm: Comm) -> Counted:
        return two_refreshes(comm, Job(comm.size, 3000, 16, 8), config)

    alone = made(LocalComm()).schedule
    assert alone.meta["objective"] == ("uniform" if recipe == "uniform" else "sample")
    for size in (1, 3, 16):
        for found in simulate(size, made).results:
            assert found.schedule.digest() == alone.digest()
            np.testing.assert_array_equal(found.schedule.ids, alone.ids)


def test_memory_is_told_apart_by_rank() -> None:
    def work(comm: Comm) -> int:
        kept = np.ones((comm.rank + 1) << 20, np.uint8)
        comm.agree()
        wide = np.ones((4 - comm.rank) << 22, np.uint8)
        del wide
        comm.agree()
        return len(kept)

    found = simulate(4, work, traced=True)
    for rank, turns in enumerate(found.peaks):
        assert len(turns) == 5
        kept, wide = (rank + 1) << 20, (4 - rank) << 22
        assert kept <= turns[0] < kept + (1 << 18)
        assert kept + wide <= max(turns) == turns[2] < kept + wide + (1 << 18)
    assert simulate(2, lambda comm: comm.agree()).peaks == [[], []]


def test_a_rank_that_fails_ends_all_and_is_named() -> None:
    before = threading.active_count()

    def raises(comm: Comm) -> None:
        comm.agree()
        if comm.rank == 1:
            raise KeyError("of this rank alone")
        comm.agree()

    with pytest.raises(KeyError, match="of this rank alone"):
        simulate(3, raises)

    def leaves(comm: Comm) -> None:
        if comm.rank != 2:
            comm.agree()

    with pytest.raises(TransportError, match="rank 2 has ended while rank 0 waits in agree"):
        simulate(3, leaves)

    def aborts(comm: Comm) -> None:
        if comm.rank == 1:
            comm.abort()
        else:
            with pytest.raises(PeerFailed):
                comm.allgather(np.zeros(3))
        comm.agree()

    simulate(3, aborts)

    def is_late(comm: Comm) -> None:
        if comm.rank == 0:
            time.sleep(1.0)
        comm.agree()

    with pytest.raises(TransportTimeout, match=r"not finished within 0.2 s on rank"):
        simulate(2, is_late, timeout=0.2)
    assert threading.active_count() == before


def test_the_weights_that_made_the_figures_are_found_and_none_is_negative() -> None:
    rng = np.random.default_rng(0)
    terms = np.abs(rng.standard_normal((8, 4))) * [1, 1e3, 1e6, 0]
    weights = np.array([5.0, 0.0, 2e-3, 0.0])
    np.testing.assert_allclose(_fit(terms.tolist(), (terms @ weights).tolist()), weights, rtol=1e-6, atol=1e-9)
    assert (_fit([[1, 1], [1, 2], [1, 3]], [3, 2, 1]) >= 0).all()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ranks", "1025"], "--simulate runs at most 1024 ranks, not 1025: give fewer by --ranks"),
        (["--ranks", "8", "--set", "graph.executor=dask"], "set graph.executor=ring"),
        (["--ranks", "8", "--set", "selection.include=some.txt"], "selection.include, exclude or sources"),
        (["--ranks", "8", "--budget", "3"], "budget = 3.0; it must be in (0, 1]"),
    ],
)
def test_what_cannot_be_simulated_is_refused_in_words(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--samples", "1e6", "--gflops", "50", "--simulate", *words]) == 1
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == 1
    with pytest.raises(SystemExit):
        main(["plan", "--samples", "1e6", "--ranks", "0", "--simulate"])
    assert "'0' must be 1 or more" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_command_simulates_and_tests_its_own_lines(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "plan",
        "--samples",
        "1e7",
        "--ranks",
        "12",
        "--gflops",
        "50",
        "--simulate",
        "--set",
        "recipe=content",
        "window=10000000",
    ]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["narrow"]["ranks"] == 12
    assert found["errors"]["bytes"] < 0.02 and found["errors"]["messages"] < 0.02 and found["errors"]["memory"] < 0.25
    narrow, full = found["narrow_costs"], found["costs"]
    assert narrow["bytes"]["first"]["select"] > 0 and full["others"]["first"]["select"] > 8 * 10**7 / 12
    assert full["messages"]["first"]["broadcast"] > 0 and found["seconds"]["first"] > found["seconds"]["later"] > 0
    assert found["visit_bytes"] == 16 * 10**7
