"""On a machine with an NVIDIA GPU: the leaves, the pool, the clique.  Complete, and not yet run on one."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from grace_ds.comm.local import LocalComm
from grace_ds.config.schema import GraphConfig
from grace_ds.graph import leaves
from grace_ds.graph.build import knn
from grace_ds.graph.leaves.torch_leaf import TorchLeaf
from grace_ds.graph.ring import nearest
from grace_ds.graph.rows import Request
from tests.unit.test_graph import clustered, rows_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
    pytest.mark.skipif(importlib.util.find_spec("cuvs") is None, reason="cuvs is not installed: pip install grace_ds[gpu-cu12]"),
]
K = 15


def leaf_of(recall: float = 0.99, half: bool = False):  # type: ignore[no-untyped-def]
    from grace_ds.graph.leaves.cuvs_leaf import CuvsLeaf

    return CuvsLeaf(recall, half)


def dense(x: np.ndarray, q: np.ndarray, k: int) -> np.ndarray:
    return -np.sort(-(q.astype(np.float64) @ x.T.astype(np.float64)), axis=1)[:, :k]


def test_brute_force_gives_the_graph_of_the_cpu_bit_for_bit() -> None:
    x, ids = clustered(3000, 64), np.arange(3000) * 7
    leaf = leaf_of(1.0)
    with leaves.opened(LocalComm(60.0), leaf):
        found = nearest(LocalComm(60.0), Request.of(ids, x, K), leaf)
    wanted = nearest(LocalComm(60.0), Request.of(ids, x, K), TorchLeaf())
    assert found.ids.tobytes() == wanted.ids.tobytes()


def test_ids_are_int64_and_padded() -> None:
    x, leaf = rows_of("clustered", 10, 32), leaf_of(1.0)
    with leaves.opened(LocalComm(60.0), leaf):
        ids, similarity = leaf.search(leaf.build(x, np.arange(10) + (1 << 35)), x, 20)
    assert ids.dtype == np.int64 and (ids[:, 10:] == -1).all() and ids[:, :10].min() >= 1 << 35
    assert np.isneginf(similarity[:, 10:]).all()


@pytest.mark.parametrize("itself", [True, False])
def test_large_shards_reach_the_recall_by_descent_and_by_lists(itself: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from grace_ds.graph.leaves import cuvs_leaf

    monkeypatch.setattr(cuvs_leaf, "BRUTE_ROWS", 1000)
    x = rows_of("clustered", 60_000, 64)
    queries, leaf = (x, leaf_of(0.98)) if itself else (x[::7].copy(), leaf_of(0.98))
    with leaves.opened(LocalComm(60.0), leaf):
        _, similarity = leaf.search(leaf.build(x, np.arange(len(x))), queries, K)
    sample = np.arange(0, len(queries), 97)
    assert np.mean(similarity[sample] >= dense(x, queries[sample], K)[:, -1:] - 1e-5) > 0.97


def test_half_precision_rows_keep_the_recall() -> None:
    x, leaf = rows_of("clustered", 20_000, 128), leaf_of(0.99, half=True)
    with leaves.opened(LocalComm(60.0), leaf):
        found = nearest(LocalComm(60.0), Request.of(np.arange(len(x)), x, K), leaf)
    sample = np.arange(0, len(x), 61)
    bar = dense(x, x[sample], K + 1)[:, -1:]
    assert np.mean(found.similarity[sample] >= bar - 1e-5) > 0.99


def test_the_pool_is_capped_and_gone_afterwards() -> None:
    import cupy
    import rmm

    from grace_ds.graph.gpu.memory import gpu_memory

    before, free = rmm.mr.get_current_device_resource(), torch.cuda.mem_get_info()[0]
    with gpu_memory(0.1), pytest.raises(MemoryError):
        cupy.empty(int(0.2 * free), cupy.uint8)
    assert type(rmm.mr.get_current_device_resource()) is type(before)
    assert torch.cuda.mem_get_info()[0] > 0.98 * free


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


@pytest.mark.parametrize("tier", ["exact", "clustered"])
def test_the_graph_of_a_refresh_is_the_cpus(tier: str) -> None:
    x, ids = rows_of("clustered", 5000, 64), np.arange(5000)
    made = [
        knn(LocalComm(60.0), ids, x, ids, x, GraphConfig(tier=tier, leaf=leaf, k=K, recall=1.0)) for leaf in ("cuvs", "torch")
    ]
    assert made[0] is not None and made[1] is not None
    assert made[0].ids.tobytes() == made[1].ids.tobytes()


def test_the_progress_reads_a_loss_without_waiting_for_the_device() -> None:
    import time

    import torch

    from grace_ds.integrations.progress import LossReader

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
