"""Tests of an optional extra: skipped with the reason where it is not installed, except in CI, where it must be."""

from __future__ import annotations

import os

import pytest


def needs(extra: str, *modules: str) -> None:
    """Skips the calling test, or module, where one of ``modules`` is missing."""
    if not os.environ.get("CI"):
        for name in modules:
            pytest.importorskip(name, reason=f"{name} is not installed (pip install grace_ds[{extra}])")
