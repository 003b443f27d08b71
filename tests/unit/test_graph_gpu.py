"""What can be said of the GPU code without RAPIDS and without a GPU."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from grace_ds.comm.local import LocalComm
from grace_ds.errors import ConfigError, DataError
from grace_ds.graph import backends, gpu
from grace_ds.graph.backends.cuvs_backend import with_own
from grace_ds.graph.backends.torch_backend import TorchBackend
from grace_ds.graph.gpu.memory import LEAST, pool_bytes
from tests.multirank.harness import run_command

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch tells of a GPU with CUDA 13 and 8 GiB free."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (8 << 30, 16 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)
    gpu.broken.cache_clear()
    yield
    gpu.broken.cache_clear()


@pytest.fixture
def rapids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with packages of the right names, each an empty module."""
    for name in gpu.PACKAGES:
        (tmp_path / f"{name}.py").write_text("")
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in gpu.PACKAGES:  # the real ones, if any, come back with monkeypatch
        sys.modules.pop(name, None)


def test_a_leaf_whose_libraries_are_missing_names_them_and_the_cure() -> None:
    if importlib.util.find_spec("cuvs") is not None:
        pytest.skip("cuvs is installed")
    with pytest.raises(ConfigError, match=r"cuvs is not installed: pip install grace_ds\[gpu-cu12\]"):
        backends.choose("cuvs", 1000)


@pytest.mark.usefixtures("rapids")
def test_auto_is_a_cpu_leaf_on_a_cpu_whatever_is_installed(card: None, caplog: pytest.LogCaptureFixture) -> None:
    for device in ("cpu", "xpu:0"):
        with caplog.at_level(logging.INFO, "grace_ds.graph.backends"):
            caplog.clear()
            assert backends.choose("auto", 1000, device=device).name in ("faiss", "torch")
        assert len(caplog.records) == 1
        assert "1000 index rows in the largest shard" in caplog.text and "cuvs" not in caplog.text
        assert backends.exact("auto", device=device).name == "torch"
    assert backends.choose("auto", 1000).name == backends.choose("auto", 1000, device="cpu").name


@pytest.mark.usefixtures("rapids")
@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_auto_is_cuvs_on_a_gpu_with_the_packages(card: None, device: str, caplog: pytest.LogCaptureFixture) -> None:
    assert gpu.obstacle(device) == ""
    with caplog.at_level(logging.INFO, "grace_ds.graph.backends"):
        assert backends.choose("auto", 1000, device=device).name == "cuvs"
        exact = backends.exact("auto", device=device)
    assert [r.message for r in caplog.records] == [f"graph.backend auto: cuvs (the device is {device})"] * 2
    assert exact.name == "cuvs" and exact.is_exact(10**9)
    assert backends.choose("torch", 1000, device=device).name == "torch"
    assert backends.exact("torch", device=device).name == "torch"


@pytest.mark.usefixtures("rapids")
def test_without_a_gpu_auto_says_so_and_takes_a_cpu_leaf() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    name, why = backends.automatic("cuda:0", 1000)
    assert name in ("faiss", "torch") and why.endswith(f"not cuvs: torch {torch.__version__} sees no NVIDIA GPU")
    with pytest.raises(ConfigError, match="sees no GPU on this rank"):
        backends.choose("cuvs", 1000)


def test_what_auto_misses_it_names_with_the_pip_line(card: None, rapids: Path) -> None:
    (rapids / "rmm.py").unlink()
    if importlib.util.find_spec("rmm") is not None:
        pytest.skip("rmm is installed")
    reason = "rmm is not installed (pip install grace_ds[gpu-cu13])"
    assert gpu.obstacle("cuda") == reason
    assert backends.automatic("cuda", 40_000)[1].endswith(f"not cuvs: {reason}")
    assert backends.exact("auto", device="cuda").name == "torch"


def test_packages_that_cannot_be_imported_are_a_reason_for_auto_and_an_error_for_cuvs(card: None, rapids: Path) -> None:
    (rapids / "cuvs.py").write_text("raise OSError('libcublas.so.12: cannot open shared object file')")
    reason = "cuvs cannot be imported: libcublas.so.12: cannot open shared object file"
    assert gpu.obstacle("cuda") == reason
    assert backends.choose("auto", 100, device="cuda").name != "cuvs"
    with pytest.raises(ConfigError, match=rf"{reason}; install the extra .*gpu-cu13.*, or set graph.backend to faiss or torch"):
        backends.choose("cuvs", 100)


@pytest.mark.usefixtures("rapids")
def test_a_card_that_is_full_is_left_alone(card: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (100 << 20, 16 << 30))
    assert gpu.obstacle("cuda") == "only 100 MiB are free on the GPU"
    assert backends.automatic("cuda", 100)[0] != "cuvs"
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 4 << 30)  # torch's cache can be emptied
    assert gpu.obstacle("cuda") == ""


class Ranks(LocalComm):
    """A rank among others, of which it is known who can use cuVS."""

    def __init__(self, *others: bool) -> None:
        super().__init__(5.0)
        self.others, self.asked = others, 0

    def allgather(self, array: Any) -> list[Any]:
        self.asked += 1
        return [array, *(np.array([other], array.dtype) for other in self.others)]


@pytest.mark.usefixtures("rapids")
def test_ranks_take_cuvs_together_or_not_at_all(
    card: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert backends.agreed(LocalComm(5.0), "auto", "cuda:1") == backends.agreed(Ranks(True, True), "auto", "cuda:1") == "cuvs"
    with caplog.at_level(logging.INFO, "grace_ds.graph.backends"):
        assert backends.agreed(Ranks(True, False), "auto", "cuda") == "auto"
        assert caplog.messages == ["graph.backend auto: not cuvs, which rank(s) 2 cannot use"]
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (100 << 20, 16 << 30))
        assert backends.agreed(Ranks(True, False), "auto", "cuda") == "auto"
    assert caplog.messages[1].endswith("rank(s) 0, 2 cannot use; here: only 100 MiB are free on the GPU")
    for name, device in (("auto", "cpu"), ("torch", "cuda"), ("cuvs", "cuda")):
        comm = Ranks(False)
        assert backends.agreed(comm, name, device) == name and not comm.asked


@pytest.mark.parametrize("listed", [False, True])
def test_a_row_is_put_at_the_head_of_its_own_list(listed: bool) -> None:
    """Against an exact search, which finds each row itself first; NN-descent does not list it."""
    draw, k, degree = np.random.default_rng(0), 6, 9
    x = draw.normal(size=(50, 8)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    backend = TorchBackend()
    ids, near = backend.search(backend.build(x, np.arange(50)), x, degree + 1)
    first = 0 if listed else 1
    found, similarity = with_own(ids[:, first : first + degree].astype(np.uint32), near[:, first : first + degree], x, k)
    assert found.dtype == np.int64 and similarity.dtype == np.float32
    assert np.array_equal(found, ids[:, :k])
    np.testing.assert_allclose(similarity, near[:, :k], atol=1e-6)


def test_the_gpu_check_says_in_one_line_that_there_is_no_gpu(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    env = {**os.environ, "OUT": str(tmp_path / "out"), "GRACE_VENV": str(tmp_path / "venv")}
    script = ["bash", str(ROOT / "launch" / "gpu_check.sh")]
    done = subprocess.run(script, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1 and "no NVIDIA GPU here" in done.stderr and not done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_timing_of_the_gpu_check_runs_on_a_cpu(tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    options = ["--rows", "2000", "--device", "cpu", "--json", target]
    run_command([sys.executable, "-m", "benchmarks", "gpu_check", *options], timeout=100)
    found = json.loads(target.read_text())
    stages = {row["stage"]: row for row in found["rows"]["stages"]}
    assert list(stages) == ["rows", "backend", "propagation", "refresh", "tiers"]
    assert not any(row["failed"] for row in stages.values()), stages
    claims = {claim["name"]: claim for claim in found["claims"]}
    assert all(claim["met"] is not False for claim in claims.values()), claims
    assert claims["leaf_recall"]["value"] == claims["refresh_recall"]["value"] == 1.0  # exact backends at this size
    assert found["rows"]["machine"][0]["device"] == "cpu" and found["rows"]["tiers"][0]["rows"] == 400


@pytest.mark.slow
def test_the_timing_of_the_gpu_check_wants_a_gpu_and_keeps_what_a_failed_stage_says(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    command = [sys.executable, "-m", "benchmarks", "gpu_check"]
    done = subprocess.run([*command, "--rows", "100"], capture_output=True, text=True, timeout=60)
    assert done.returncode and "give --device cpu" in done.stderr and done.stderr.count("\n") == 1
    target = tmp_path / "out.json"
    options = ["--rows", "200", "--device", "cpu", "--seconds", "0", "--json", target]
    run_command([*command, *options], timeout=100)
    failed = [row["failed"] for row in json.loads(target.read_text())["rows"]["stages"]]
    assert failed == ["not started: 0 s were over"] * 5


def test_the_pool_leaves_a_share_and_refuses_a_full_device() -> None:
    assert pool_bytes(80 << 30) <= 0.8 * (80 << 30)
    assert pool_bytes((80 << 30) + 77) % 256 == 0
    with pytest.raises(DataError, match="100 MiB are free"):
        pool_bytes(100 << 20)
    assert pool_bytes(2 * LEAST) >= LEAST


def test_what_a_leaf_holds_is_given_back() -> None:
    class Held:
        name, open_, resources = "held", 0, None

        def build(self, X, ids):  # type: ignore[no-untyped-def]
            return ids

        def is_exact(self, rows: int) -> bool:
            return True

        def search(self, index, Q, k):  # type: ignore[no-untyped-def]
            raise MemoryError

        def bind(self, resources):  # type: ignore[no-untyped-def]
            self.resources = resources

        def open(self, comm):  # type: ignore[no-untyped-def]
            import contextlib

            @contextlib.contextmanager
            def held():  # type: ignore[no-untyped-def]
                self.open_ += 1
                try:
                    yield
                finally:
                    self.open_ -= 1

            return held()

    backend = Held()
    with pytest.raises(MemoryError), backends.opened(None, backend):
        assert backend.open_ == 1
        backend.search(None, None, 1)
    assert backend.open_ == 0
