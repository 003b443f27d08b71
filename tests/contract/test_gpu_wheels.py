"""Our GPU code against the real RAPIDS, on a machine without a GPU: imports, signatures, and what is refused before CUDA.

Runs with GRACE_TEST_GPU_WHEELS=1; launch/test.sh then installs the cu12 wheels, about 4 GB.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

import numpy as np
import pytest

from grace_ds.errors import ConfigError
from grace_ds.graph import backends
from tests.contract.rapids_calls import LIBRARIES, array_sources, calls, signature, sources

WANTED = os.environ.get("GRACE_TEST_GPU_WHEELS") == "1"
MISSING = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(
    not WANTED or bool(MISSING),
    reason=f"not installed: {', '.join(MISSING)}" if WANTED else "set GRACE_TEST_GPU_WHEELS=1 (it installs about 4 GB of wheels)",
)


@pytest.mark.parametrize("name", ["memory", "raft_comms"])
def test_gpu_modules_can_be_imported(name: str) -> None:
    assert importlib.import_module(f"grace_ds.graph.gpu.{name}")


def test_every_call_fits_the_real_signature() -> None:
    found = list(calls())
    assert {c.where.split(":")[0] for c in found} == {path.name for path in [*sources(), *array_sources()]}
    assert {"arrays.py", "cuvs_leaf.py", "memory.py", "propagate.py", "raft_comms.py"} <= {c.where.split(":")[0] for c in found}
    checked = 0
    for call in found:
        real = signature(call.target)
        if real is None:
            continue
        try:
            real.bind(*([None] * call.positional), **dict.fromkeys(call.keywords))
        except TypeError as error:
            pytest.fail(f"{call.where}: {call.name}: {error}; it is {real}")
        checked += 1
    assert checked >= 60, f"only {checked} of {len(found)} calls have a signature that can be read"
    names = {call.name for call in found}
    assert {"brute_force.build", "brute_force.search", "nn_descent.build", "ivf_pq.search", "refine", "nccl"} <= names
    assert {"cupy.from_dlpack", "xp.where", "xp.astype", "xp.searchsorted"} <= names


def test_what_is_asked_of_their_objects_is_there() -> None:
    """Methods and attributes that no call by name shows: of what a constructor or a factory has returned."""
    import cupy
    from cuvs.common import Resources
    from cuvs.neighbors import nn_descent
    from pylibraft.common import Handle, Stream
    from raft_dask.common import Comms
    from raft_dask.common.nccl import nccl
    from rmm.allocators.cupy import rmm_cupy_allocator

    asked: list[tuple[Any, tuple[str, ...]]] = [
        (cupy.ndarray, ("get", "mean", "sum", "shape", "dtype", "__getitem__", "__dlpack__", "__cuda_array_interface__")),
        (cupy.cuda.Device, ("use",)),
        (cupy.cuda.Stream.null, ("ptr", "synchronize", "__enter__", "__exit__")),
        (cupy.get_default_memory_pool(), ("free_all_blocks", "malloc")),
        (nn_descent.Index, ("graph", "distances")),
        (Resources, ("sync", "get_c_obj")),
        (Handle, ("getHandle", "sync")),
        (Stream, ("sync",)),
        (nccl, ("init", "destroy", "abort", "user_rank", "get_unique_id")),
        (Comms(comms_p2p=False, client=object(), verbose=False), ("init", "destroy", "sessionId")),
    ]
    for thing, names in asked:
        for name in names:
            assert hasattr(thing, name), f"{thing} has no {name}"
    assert callable(rmm_cupy_allocator)


class Fake:
    """Memory that claims to be on a device."""

    def __init__(self, shape: tuple[int, ...], dtype: str, strides: tuple[int, ...] | None = None) -> None:
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": np.dtype(dtype).str,
            "data": (256, False),
            "version": 3,
            "strides": strides,
        }


class NoDevice:
    """Resources that must not be reached: what is wrong is to be said before CUDA is."""

    def get_c_obj(self) -> int:
        raise AssertionError("CUDA was reached")

    def sync(self) -> None:
        raise AssertionError("CUDA was reached")


def test_rows_of_a_wrong_dtype_or_order_are_refused_before_cuda() -> None:
    from cuvs.neighbors import brute_force, ivf_pq, nn_descent

    wrong = Fake((10, 8), "f8")
    with pytest.raises(TypeError, match="float64"):
        brute_force.build(wrong, metric="inner_product", resources=NoDevice())
    with pytest.raises(TypeError, match="float64"):
        nn_descent.build(nn_descent.IndexParams(metric="inner_product", graph_degree=32), wrong, resources=NoDevice())
    with pytest.raises(TypeError, match="float64"):
        ivf_pq.build(ivf_pq.IndexParams(n_lists=4, metric="inner_product"), wrong, resources=NoDevice())
    columns = Fake((10, 8), "f4", strides=(4, 40))
    with pytest.raises(ValueError, match="Row major"):
        nn_descent.build(nn_descent.IndexParams(metric="inner_product", graph_degree=32), columns, resources=NoDevice())


@pytest.mark.parametrize("dtype", ["f4", "f2"])
def test_rows_as_our_leaf_makes_them_reach_cuda(dtype: str) -> None:
    from cuvs.neighbors import brute_force

    with pytest.raises(AssertionError, match="CUDA was reached"):
        brute_force.build(Fake((10, 8), dtype), metric="inner_product", resources=NoDevice())


def test_the_parameters_that_our_leaf_sets_are_taken() -> None:
    import sys

    from cuvs.neighbors import nn_descent

    from grace_ds.graph.backends.cuvs_backend import DEGREES

    for degree in DEGREES:
        word = "".join(["f", "p32"])  # not interned, as from a file: cuVS compares by identity
        params = nn_descent.IndexParams(
            metric="inner_product",
            graph_degree=degree,
            intermediate_graph_degree=2 * degree,
            return_distances=True,
            dist_comp_dtype=sys.intern(word),
        )
        assert (params.graph_degree, params.intermediate_graph_degree) == (degree, 2 * degree)
        assert params.metric in ("inner_product", "innerproduct")


def test_a_unique_id_comes_without_a_gpu_and_is_new_each_time() -> None:
    from grace_ds.graph.gpu.raft_comms import ID_BYTES, unique_id

    a, b = unique_id(), unique_id()
    assert len(a) == len(b) == ID_BYTES and a != b


def test_raft_resources_speak_as_cuvs_asks() -> None:
    from grace_ds.graph.gpu.raft_comms import RaftResources

    class Handle:
        synced = 0

        def getHandle(self) -> int:
            return 4096

        def sync(self) -> None:
            self.synced += 1

    from pylibraft.common import Handle as Real

    assert {"getHandle", "sync"} <= set(dir(Real))
    handle: Any = Handle()
    resources = RaftResources(handle)
    resources.sync()
    assert (resources.get_c_obj(), handle.synced) == (4096, 1)


def test_the_leaf_says_that_there_is_no_gpu() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ConfigError, match="sees no GPU"):
        backends.choose("cuvs", 1000)
