"""What ranks decide in the job's store: the same answer on all of them, also where one is late or the store is gone."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from grace_ds.comm import agreement as module
from grace_ds.comm.agreement import Agreement

RANKS = 3


@pytest.fixture
def agreements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Agreement]:
    """One for each rank of a job, over a store of their own connections."""
    made = []
    for _ in range(RANKS):
        monkeypatch.setattr(module, "_instances", iter([0]))  # the ranks' processes count for themselves
        made.append(Agreement(dist.FileStore(str(tmp_path / "store"), RANKS), RANKS, 5.0))
    return made


def at_once(calls: list[Any]) -> list[Any]:
    """The results of calls that are made on all ranks together."""
    out: list[Any] = [None] * len(calls)

    def work(i: int) -> None:
        out[i] = calls[i]()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return out


@pytest.mark.parametrize("votes", [[True] * RANKS, [True, False, True], [False] * RANKS])
def test_all_agree_where_all_do(agreements: list[Agreement], votes: list[bool]) -> None:
    for asked in (votes, [True] * RANKS, votes):  # no answer is another question's
        started = time.monotonic()
        assert at_once([lambda a=a, v=v: a.all_agree(v) for a, v in zip(agreements, asked, strict=True)]) == [all(asked)] * RANKS
        assert time.monotonic() - started < agreements[0]._limit  # nobody waits for longer than the others take


def test_a_rank_that_does_not_come_means_no_and_it_is_told_so_later(agreements: list[Agreement]) -> None:
    for one in agreements:
        one._limit = 1.0
    started = time.monotonic()
    assert at_once([lambda a=a: a.all_agree(True) for a in agreements[:-1]]) == [False] * (RANKS - 1)
    assert time.monotonic() - started < 10
    assert agreements[-1].all_agree(True) is False


def test_who_has_frozen_is_known_to_all_by_its_reason(agreements: list[Agreement]) -> None:
    assert [a.frozen_by_any() for a in agreements] == [""] * RANKS
    agreements[1].freeze("the link was cut")
    agreements[2].freeze("another reason")
    assert agreements[0].frozen_by_any() == agreements[0].frozen == "the link was cut"
    agreements[2].freeze("a third one")
    assert agreements[2].frozen == agreements[2].frozen_by_any() == "another reason"  # its own, and first, stays


def test_each_engine_of_a_job_has_decisions_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engines = []
    for _ in range(RANKS):
        monkeypatch.setattr(module, "_instances", iter([0, 1]))
        store = dist.FileStore(str(tmp_path / "store"), RANKS)
        engines.append([Agreement(store, RANKS, 5.0) for _ in range(2)])
    first, second = zip(*engines, strict=True)
    first[0].freeze("the link was cut")
    assert not first[0].abort(1)
    assert second[1].frozen_by_any() == "" and second[1].commit(1)
    for agreements in (first, second):
        assert at_once([lambda a=a: a.all_agree(True) for a in agreements]) == [True] * RANKS


@pytest.mark.parametrize("first", ["commit", "abort"])
def test_the_first_to_decide_on_a_refresh_decides_for_all(agreements: list[Agreement], first: str) -> None:
    assert getattr(agreements[2], first)(1) is (first == "commit")
    for one in agreements:
        assert one.commit(1) is one.abort(1) is (first == "commit")
    assert agreements[0].commit(2) is True


def test_a_store_that_never_answers_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Cut:
        """As a store on a host that is cut off."""

        def __getattr__(self, name: str) -> Any:
            asked.append(name)
            return lambda *_: time.sleep(20)

    monkeypatch.setattr(module, "_ANSWER_SECONDS", 0.5)
    cut, started = Agreement(Cut(), RANKS, 5.0), time.monotonic()
    cut.freeze("the host is cut off")
    assert cut.frozen_by_any() == "the host is cut off" and cut.all_agree(False) is False and cut.all_agree(True) is False
    assert time.monotonic() - started < 5 and len(asked) == 1


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_store_that_has_ended_says_no_and_its_error_goes_nowhere() -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", server.port, is_master=False)
    left = Agreement(client, RANKS, 5.0)
    assert left.frozen_by_any() == ""
    del server
    assert left.all_agree(True) is False and left.frozen_by_any() == ""
    left.freeze("the link was cut")
    assert left.frozen_by_any() == "the link was cut"


def test_one_rank_needs_no_store() -> None:
    alone = Agreement(None)
    assert alone.commit(1) and not alone.abort(1) and alone.all_agree(True) and not alone.all_agree(False)
    alone.freeze("x")
    assert alone.frozen_by_any() == "x"
