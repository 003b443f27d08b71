"""A thousand damaged checkpoints: each is refused by every rank, by an error of ours, and leaves GRACE as it was."""

from __future__ import annotations

import pytest

from tests.multirank.fuzz_job import LATER, Case, work
from tests.multirank.harness import run_ranks

pytestmark = [pytest.mark.multirank, pytest.mark.slow, pytest.mark.timeout(400)]

CASES = 1000


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[list[Case], str, str]]:
    return run_ranks(work, 2, str(tmp_path_factory.mktemp("fuzz")), CASES, 1, timeout=380)


def test_no_damaged_checkpoint_loads_or_escapes_as_another_error(ranks: list[tuple[list[Case], str, str]]) -> None:
    for cases, _, _ in ranks:
        assert len(cases) == CASES
        loaded = [c.what for c in cases if not c.error]
        assert loaded == []
        assert [c for c in cases if not c.ours] == []


def test_every_error_names_a_file_or_the_folder_and_a_cure(ranks: list[tuple[list[Case], str, str]]) -> None:
    for cases, _, _ in ranks:
        for case in cases:
            assert f"global_step{LATER}/grace_ds" in case.error, case
            assert any(word in case.error for word in ("use ", "load ", "restore ", "install ", "start without")), case


def test_a_refusal_leaves_the_state_as_it_was_and_the_mended_checkpoint_loads(ranks: list[tuple[list[Case], str, str]]) -> None:
    for cases, whole, again in ranks:
        assert [c for c in cases if not c.same] == []
        assert again == whole
