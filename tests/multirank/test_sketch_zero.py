"""The hooks inside real ZeRO jobs: the job's numbers stay what they were, and the rows are right."""

from __future__ import annotations

import json

import pytest

from tests.multirank.harness import run_module
from tests.multirank.launch import environment


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_zero_job_is_bit_identical_and_its_rows_match_the_oracle(stage, tmp_path):
    said = run_module("tests.multirank.sketch_job", [stage, tmp_path], 2, timeout=200, env=environment(tmp_path))
    for rank in range(2):
        results = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert {(r["recompute"], r["gas"]) for r in results} == {
            (kind, gas) for kind in ("none", "nonreentrant", "reentrant") for gas in (1, 4)
        }
        for result in results:
            assert result["identical"] and result["hooks_left"] == 0 and result["failures"] == 0, (result, said)
            assert result["cosine"] > 0.99 and 0.95 < result["length"][0] <= result["length"][1] < 1.05, (result, said)
            assert result["influence"], result
