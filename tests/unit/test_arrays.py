"""Which array library computes, and the way there and back; torch tensors on the CPU stand in for arrays of a device."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from grace_ds.graph.propagate import confidence
from grace_ds.utils import arrays


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """What a process finds out once is asked anew in every test."""
    for cached in (arrays._cupy_problem, arrays._log_choice):
        cached.cache_clear()
    yield
    for cached in (arrays._cupy_problem, arrays._log_choice):
        cached.cache_clear()


@pytest.fixture
def _torch_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "library_for", lambda device: ("torch", "asked for by the test"))


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), "xpu", "hpu:0"])
def test_numpy_computes_everywhere_but_on_cuda(device: object) -> None:
    assert arrays.library_for(device) == ("numpy", f"the device is {device}")


@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda", 0)])
def test_on_cuda_it_is_cupy_and_without_it_torch_with_the_reason(device: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "_cupy_problem", lambda: "")
    assert arrays.library_for(device)[0] == "cupy"
    monkeypatch.setattr(arrays, "_cupy_problem", lambda: "cupy is not installed (pip install grace_ds[gpu-cu12])")
    assert arrays.library_for(device) == ("torch", "cupy is not installed (pip install grace_ds[gpu-cu12])")


@pytest.mark.parametrize(("cuda", "extra"), [("12.8", "gpu-cu12"), ("13.0", "gpu-cu13"), (None, "gpu-cu12")])
def test_the_extra_is_that_of_torchs_cuda(cuda: str | None, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert arrays.gpu_extra() == extra
    if importlib.util.find_spec("cupy") is None:
        assert arrays._cupy_problem() == f"cupy is not installed (pip install grace_ds[{extra}])"


def test_a_cupy_that_does_not_work_is_a_reason_and_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cupy.py").write_text("raise ImportError('libcublas.so.12:\\n cannot open')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    assert arrays._cupy_problem() == "cupy does not work here: ImportError: libcublas.so.12: cannot open"


def test_the_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "grace_ds.utils.arrays"):
        for _ in range(3):
            arrays.to_device(np.ones(2), "cpu")
    assert [r.message for r in caplog.records] == ["rows of propagation and importance: numpy (the device is cpu)"]


def test_nothing_is_copied_where_numpy_computes() -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert arrays.to_device(x, "cpu") is x and arrays.to_host(x) is x
    there = arrays.to_device(torch.from_numpy(x), "cpu")
    assert isinstance(there, np.ndarray) and np.shares_memory(there, x)


@pytest.mark.usefixtures("_torch_on_the_cpu")
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int32, np.int64, np.bool_, np.uint8])
@pytest.mark.parametrize("shape", [(0, 3), (7,), (2, 3, 4)])
def test_there_and_back_again(dtype: type, shape: tuple[int, ...]) -> None:
    x = (np.random.default_rng(0).random(shape) * 9).astype(dtype)
    there = arrays.to_device(x, "cpu")
    assert isinstance(there, torch.Tensor) and there.shape == shape
    back = arrays.to_host(there)
    assert back.dtype == x.dtype and np.array_equal(back, x)


@pytest.mark.usefixtures("_torch_on_the_cpu")
@pytest.mark.filterwarnings("error")
def test_views_and_what_may_not_be_written_go_there_too() -> None:
    x: np.ndarray = np.arange(12.0).reshape(3, 4)
    frozen = x.copy()
    frozen.setflags(write=False)
    for view in (x[::-1], x.T, x[:, ::2], frozen, np.broadcast_to(x[0], (5, 4))):
        assert np.array_equal(arrays.to_host(arrays.to_device(view, "cpu")), view)


def test_what_torch_holds_comes_back_as_numpy_has_it() -> None:
    tensor = torch.arange(4, dtype=torch.float32, requires_grad=True)
    assert arrays.to_host(tensor).tolist() == [0, 1, 2, 3]
    narrow = arrays.to_host(torch.tensor([1.5, -2.0], dtype=torch.bfloat16))
    assert narrow.dtype == np.float32 and narrow.tolist() == [1.5, -2.0]
    assert arrays.to_host([1, 2]).tolist() == [1, 2]


@pytest.mark.usefixtures("_torch_on_the_cpu")
def test_rows_on_a_device_give_what_rows_on_the_host_give() -> None:
    age = np.array([0.0, 1.0, 2.5, np.inf])
    assert np.allclose(arrays.to_host(confidence(arrays.to_device(age, "cpu"), 0.5)), confidence(age, 0.5), rtol=1e-12)


@pytest.mark.parametrize("device", ["cpu", "xpu"])
def test_memory_is_only_moved_for_cupy(device: str) -> None:
    with pytest.raises(KeyError), arrays.device_memory(device):
        raise KeyError("passes through")
