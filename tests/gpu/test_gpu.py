"""On a machine with an NVIDIA GPU: the leaves, the pool, the clique, the rows of propagation.  Not yet run on one.

``launch/gpu_check.sh`` runs them on a bare machine.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from grace_ds.cli import doctor
from grace_ds.comm.local import LocalComm
from grace_ds.config.schema import GraphConfig
from grace_ds.graph import backends, gpu
from grace_ds.graph.backends.torch_backend import TorchBackend
from grace_ds.graph.build import knn
from grace_ds.graph.propagate import crowding, priority, propagate
from grace_ds.graph.ring import nearest
from grace_ds.graph.rows import Request
from grace_ds.recipes.weights import rank01, shared, soft_pass, uncrowded
from grace_ds.utils import arrays
from tests.unit.test_graph import clustered, rows_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
]
needs_cuvs, needs_cupy = (
    pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed: pip install grace_ds[gpu-cu12]")
    for name in ("cuvs", "cupy")
)
K = 15


def backend_of(recall: float = 0.99, half: bool = False):  # type: ignore[no-untyped-def]
    from grace_ds.graph.backends.cuvs_backend import CuvsBackend

    return CuvsBackend(recall, half)


def dense(x: np.ndarray, q: np.ndarray, k: int) -> np.ndarray:
    return -np.sort(-(q.astype(np.float64) @ x.T.astype(np.float64)), axis=1)[:, :k]


@needs_cuvs
def test_brute_force_gives_the_graph_of_the_cpu_bit_for_bit() -> None:
    x, ids = clustered(3000, 64), np.arange(3000) * 7
    backend = backend_of(1.0)
    with backends.opened(LocalComm(60.0), backend):
        found = nearest(LocalComm(60.0), Request.of(ids, x, K), backend)
    wanted = nearest(LocalComm(60.0), Request.of(ids, x, K), TorchBackend())
    assert found.ids.tobytes() == wanted.ids.tobytes()


@needs_cuvs
def test_ids_are_int64_and_padded() -> None:
    x, backend = rows_of("clustered", 10, 32), backend_of(1.0)
    with backends.opened(LocalComm(60.0), backend):
        ids, similarity = backend.search(backend.build(x, np.arange(10) + (1 << 35)), x, 20)
    assert ids.dtype == np.int64 and (ids[:, 10:] == -1).all() and ids[:, :10].min() >= 1 << 35
    assert np.isneginf(similarity[:, 10:]).all()


@needs_cuvs
@pytest.mark.parametrize("itself", [True, False])
def test_large_shards_reach_the_recall_by_descent_and_by_lists(
    itself: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from grace_ds.graph.backends import cuvs_backend

    monkeypatch.setattr(cuvs_backend, "BRUTE_ROWS", 1000)
    x = rows_of("clustered", 60_000, 64)
    queries, backend = (x, backend_of(0.98)) if itself else (x[::7].copy(), backend_of(0.98))
    with backends.opened(LocalComm(60.0), backend), caplog.at_level(logging.INFO, "grace_ds.graph.backends.cuvs_backend"):
        _, similarity = backend.search(backend.build(x, np.arange(len(x))), queries, K)
    assert ("nn_descent" if itself else "ivf_pq") in caplog.messages[-1]  # the last effort that was measured is the one taken
    sample = np.arange(0, len(queries), 97)
    assert np.mean(similarity[sample] >= dense(x, queries[sample], K)[:, -1:] - 1e-5) > 0.97


@needs_cuvs
def test_half_precision_rows_keep_the_recall() -> None:
    x, backend = rows_of("clustered", 20_000, 128), backend_of(0.99, half=True)
    with backends.opened(LocalComm(60.0), backend):
        found = nearest(LocalComm(60.0), Request.of(np.arange(len(x)), x, K), backend)
    sample = np.arange(0, len(x), 61)
    bar = dense(x, x[sample], K + 1)[:, -1:]
    assert np.mean(found.similarity[sample] >= bar - 1e-5) > 0.99


@needs_cuvs
def test_the_pool_is_capped_and_gone_afterwards() -> None:
    import cupy
    import rmm

    from grace_ds.graph.gpu.memory import gpu_memory

    before, free = rmm.mr.get_current_device_resource(), torch.cuda.mem_get_info()[0]
    with gpu_memory(0.1), pytest.raises(MemoryError):
        cupy.empty(int(0.2 * free), cupy.uint8)
    assert type(rmm.mr.get_current_device_resource()) is type(before)
    assert torch.cuda.mem_get_info()[0] > 0.98 * free


@needs_cuvs
def test_a_clique_of_one_comes_up_and_its_handle_runs_cuvs() -> None:
    import cupy
    from cuvs.neighbors import brute_force

    from grace_ds.graph.gpu.raft_comms import clique

    x = cupy.asarray(rows_of("clustered", 500, 32))
    with clique(LocalComm(60.0)) as found:
        assert found.ranks.tolist() == [0]
        index = brute_force.build(x, metric="inner_product", resources=found.resources)
        _, near = brute_force.search(index, x, 3, resources=found.resources)
        found.resources.sync()
    assert (cupy.asnumpy(cupy.asarray(near))[:, 0] == np.arange(500)).mean() > 0.99


@needs_cuvs
@pytest.mark.parametrize("tier", ["exact", "clustered"])
def test_the_graph_of_a_refresh_is_the_cpus(tier: str) -> None:
    x, ids = rows_of("clustered", 5000, 64), np.arange(5000)
    made = [
        knn(LocalComm(60.0), ids, x, ids, x, GraphConfig(tier=tier, backend=backend, k=K, recall=1.0))
        for backend in ("cuvs", "torch")
    ]
    assert made[0] is not None and made[1] is not None
    assert made[0].ids.tobytes() == made[1].ids.tobytes()


@needs_cuvs
@pytest.mark.parametrize("descends", [True, False])
def test_edges_are_those_of_an_exact_search(descends: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the default recall: NN-descent finds .99 of the edges, brute force all of them."""
    from grace_ds.graph.backends import cuvs_backend

    if descends:
        monkeypatch.setattr(cuvs_backend, "BRUTE_ROWS", 1000)
    x, ids = rows_of("clustered", 20_000, 64), np.arange(20_000)
    found, wanted = (
        knn(LocalComm(60.0), ids, x, ids, x, GraphConfig(tier="exact", backend=backend, k=K)) for backend in ("cuvs", "torch")
    )
    assert found is not None and wanted is not None
    same = np.mean([len(np.intersect1d(a, b)) for a, b in zip(found.ids, wanted.ids, strict=True)]) / K
    assert same >= (0.99 if descends else 1.0)
    assert not (found.ids == ids[:, None]).any()


@needs_cuvs
def test_auto_is_cuvs_here_and_a_cpu_leaf_for_a_cpu_engine() -> None:
    assert gpu.obstacle("cuda") == ""
    for device in ("cuda", f"cuda:{torch.cuda.current_device()}"):
        assert backends.choose("auto", 5000, device=device).name == backends.exact("auto", device=device).name == "cuvs"
    assert backends.choose("auto", 5000, device="cpu").name != "cuvs"


@needs_cuvs
@needs_cupy
def test_the_doctor_says_what_would_compute() -> None:
    found = {f.what: f for f in doctor.gpu({})}
    assert found["device"].message == "cuda"
    assert found["graph.backend auto"].message.startswith("cuvs") and found["propagation rows"].message.startswith("cupy")
    assert {found[name].status for name in ("graph.backend auto", "propagation rows", *doctor._RAPIDS)} == {doctor.OK}


def inputs(n: int = 5000) -> dict[str, Any]:
    """Own values, ages, neighbours and cosines, with what is unknown and padded among them."""
    draw = np.random.default_rng(0)
    own = draw.normal(size=(n, 2)).astype(np.float32)
    own[draw.random(n) < 0.5] = np.nan
    similarity = draw.uniform(-0.2, 1, (n, K)).astype(np.float32)
    similarity[:, -1] = similarity[:3] = -np.inf
    ages = np.where(np.isnan(own), np.inf, draw.integers(0, 4, own.shape))
    return {"own": own, "ages": ages, "place": draw.integers(0, n, (n, K)), "similarity": similarity}


def spread(x: dict[str, Any]) -> list[Any]:
    found = propagate(x["own"], x["ages"], x["place"], x["similarity"], lambda facts: facts, hops=2, shrink=0.5, decay=0.7)
    return [found.values, found.reached, found.disagreement, priority(10 * x["ages"][:, 0], found.disagreement)]


def importance(x: dict[str, Any]) -> list[Any]:
    around = crowding(x["similarity"])
    factors = [soft_pass(x["own"][:, 1], 0.1, 0.3), 0.3 + rank01(x["own"][:, 0]), shared(around), uncrowded(around)]
    return [*factors, factors[0] * factors[1] * factors[2] * factors[3]]


@pytest.mark.parametrize("compute", [spread, importance])
@pytest.mark.parametrize("library", [pytest.param("cupy", marks=needs_cupy), "torch"])
def test_rows_on_the_device_give_what_numpy_gives(
    library: str, compute: Callable[[dict[str, Any]], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrays, "library_for", lambda device: (library, "asked for by the test"))
    wanted = compute(inputs())
    with arrays.device_memory("cuda"):
        found = compute({name: arrays.to_device(value, "cuda") for name, value in inputs().items()})
        back = [arrays.to_host(value) for value in found]
    for a, b, there in zip(wanted, back, found, strict=True):
        assert type(there).__module__.split(".")[0] == library
        assert b.dtype == a.dtype
        np.testing.assert_allclose(b, a, rtol=1e-6, atol=1e-6)


@needs_cupy
def test_the_library_of_a_gpu_is_cupy_and_arrays_come_back_as_they_went() -> None:
    import cupy

    assert arrays.library_for("cuda")[0] == "cupy"
    draw = np.random.default_rng(0)
    for dtype in (np.float16, np.float32, np.float64, np.int32, np.int64, np.bool_):
        for x in ((draw.random((5, 4)) * 9).astype(dtype), np.empty((0, 3), dtype)):
            there = arrays.to_device(x[:, ::-1], "cuda")
            assert isinstance(there, cupy.ndarray)
            back = arrays.to_host(there)
            assert back.dtype == x.dtype and np.array_equal(back, x[:, ::-1])
    tensor = torch.arange(6.0, device="cuda")
    shared_with = arrays.to_device(tensor, "cuda")
    assert shared_with.data.ptr == tensor.data_ptr() and arrays.to_host(shared_with).tolist() == list(range(6))
    assert arrays.to_host(tensor.bfloat16()).tolist() == list(range(6))


@needs_cupy
def test_cupy_gives_its_memory_back() -> None:
    import cupy

    torch.cuda.synchronize()
    with arrays.device_memory("cuda"):
        x = arrays.to_device(np.zeros(1 << 24), "cuda")
        del x
        assert cupy.get_default_memory_pool().total_bytes() >= 1 << 27
    assert cupy.get_default_memory_pool().total_bytes() < 1 << 27


def test_the_progress_reads_a_loss_without_waiting_for_the_device() -> None:
    import time

    import torch

    from grace_ds.monitor.progress import LossReader

    reader, busy = LossReader(), torch.randn(8192, 8192, device="cuda")
    warm = LossReader()
    warm.offer((busy @ busy).sum())
    warm.read()  # cuBLAS and pinned memory are there from here on
    torch.cuda.synchronize()
    for _ in range(200):
        busy = busy @ busy * 1e-4
    reader.offer(busy.sum() * 0 + 2.5)
    started = time.perf_counter()
    assert reader.read() is None and time.perf_counter() - started < 0.5
    torch.cuda.synchronize()
    reader.offer(busy.sum() * 0 + 3.5)
    assert reader.read() == 2.5
