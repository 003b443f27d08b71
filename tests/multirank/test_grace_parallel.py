"""``recipe: grace`` under Ulysses, AutoTP and PipelineEngine, alone and over two replicas, against the same job on one rank."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.multirank.harness import run_command
from tests.multirank.launch import environment, free_port

JOBS = {"one": 1, "ulysses": 2, "tensor": 2, "pipeline": 2, "ulysses-4": 4, "tensor-4": 4, "pipeline-4": 4}
SPREAD = [name for name in JOBS if name != "one"]
ALONE = 0.1  # relative error of what a rank knows alone: far above rounding
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
Found = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("grace-parallel")
    for name, ranks in JOBS.items():
        (out / name).mkdir()
        launcher = [
            Path(sys.executable).with_name("deepspeed"),
            "--num_accelerators",
            str(ranks),
            "--master_port",
            str(free_port()),
        ]
        job = ["--module", "tests.multirank.grace_parallel_job", name.split("-")[0], out / name]
        run_command([*launcher, *job], timeout=240, env=environment(out))
    return out


@pytest.fixture(scope="module")
def records(folder) -> dict[str, list[dict[str, Any]]]:
    return {name: [json.loads((folder / name / f"{r}.json").read_text()) for r in range(n)] for name, n in JOBS.items()}


def arrays(folder: Path, name: str, what: str) -> list[Found]:
    return [dict(np.load(folder / name / f"{what}-{rank}.npz")) for rank in range(JOBS[name])]


def direction(found: Found) -> np.ndarray:
    """All layers of the trusted direction as one vector."""
    return np.concatenate([found[key].ravel() for key in sorted(found) if key.startswith("basis ")])


def off(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("name", SPREAD)
def test_basis_and_influences_are_those_of_one_rank(folder, name):
    (one,) = arrays(folder, "one", "right")
    for found in arrays(folder, name, "right"):
        assert off(direction(found), direction(one)) <= 1e-4
        for key in ("influence", "loss", "losses", "unit"):
            assert off(found[key], one[key]) <= 1e-4


@pytest.mark.parametrize("name", SPREAD)
def test_a_rank_alone_knows_neither(folder, name):
    (one,) = arrays(folder, "one", "right")
    for found, unsummed in zip(arrays(folder, name, "right"), arrays(folder, name, "alone"), strict=True):
        assert off(direction(unsummed), direction(one)) > ALONE
        assert off(found["rows alone"], one["influence"]) > ALONE


@pytest.mark.parametrize("name", ["tensor", "tensor-4"])
def test_blocks_of_a_side_need_the_whole_projections(folder, name):
    (one,) = arrays(folder, "one", "right")
    for found in arrays(folder, name, "parts"):
        assert off(direction(found), direction(one)) > ALONE
        assert off(found["influence"], one["influence"]) > ALONE


@pytest.mark.parametrize("name", SPREAD)
def test_schedules_are_those_of_one_rank(records, name):
    (one,) = records["one"]
    for rank in records[name]:
        assert rank["schedules"] == one["schedules"]
        for mine, theirs in zip(rank["weights"], one["weights"], strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-3)


@pytest.mark.parametrize("name", list(JOBS))
def test_gradients_are_live(records, name):
    for rank in records[name]:
        meta = rank["meta"]
        assert len(meta) == 6 and {m["drawn_by"] for m in meta} == {"grace"}
        assert all("gradients" in m["parts"] for m in meta) and meta[-1]["known_influence"] > 0
        assert len(rank["reference"]) >= 4 and min(rank["reference"].values()) > 0
        metrics = rank["metrics"]
        assert [metrics[key] for key in ("refresh_failures", "empty_steps", "position_slips", "order_mismatches")] == [0] * 4
    assert sum(rank["rows_kept"] for rank in records[name]) == records["one"][0]["rows_kept"] > 100


@pytest.mark.parametrize("name", list(JOBS))
def test_probes_change_nothing(records, name):
    for rank in records[name]:
        assert rank["untouched"]
        assert rank["shadow"] == rank["plain"] and rank["shadow basis"] >= 1  # losses and states, with dropout


@pytest.mark.parametrize("name", SPREAD)
def test_what_is_sent_for_rows_does_not_grow_with_the_model(records, name):
    """A row is 147 numbers, whatever the layers; the first collected step sends their unfolded sketches once."""
    ranks = records[name]
    rows = sum(rank["rows_kept"] for rank in ranks)
    for rank in ranks:
        assert 0 < rank["summed"] <= 4 * rows * 147 * 1.5 + 4 * 8 * 60 * (8 * 64 + 150)
        assert rank["bytes"]["rows"] < rank["bytes"]["job"]
