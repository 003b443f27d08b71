"""What can be said of the GPU code without RAPIDS and without a GPU."""

from __future__ import annotations

import importlib.util

import pytest

from grace_ds.errors import ConfigError, DataError
from grace_ds.graph import leaves
from grace_ds.graph.gpu.memory import LEAST, pool_bytes


def test_a_leaf_whose_libraries_are_missing_names_them_and_the_cure() -> None:
    if importlib.util.find_spec("cuvs") is not None:
        pytest.skip("cuvs is installed")
    with pytest.raises(ConfigError, match=r"cuvs is not installed: pip install grace_ds\[gpu-cu12\]"):
        leaves.choose("cuvs", 1000)


def test_auto_does_not_take_what_has_not_run_yet() -> None:
    assert leaves.choose("auto", 1000).name != "cuvs"


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

    leaf = Held()
    with pytest.raises(MemoryError), leaves.opened(None, leaf):
        assert leaf.open_ == 1
        leaf.search(None, None, 1)
    assert leaf.open_ == 0
