"""The arms that other people's libraries choose for: which distributions each needs, and what to do where one is missing."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

from grace_ds.errors import DataError

PEERS: dict[str, tuple[str, ...]] = {  # arm → distributions, as pip names them; all are in the extra `peers`
    "offline": ("datasketch", "fasttext-numpy2-wheel"),
    "bm25": ("bm25s",),
    "dsir_library": ("data-selection",),
    "token_frequency": (),
    "bergson": ("bergson",),
    "dattri": ("dattri-llm",),
}


def installed(arm: str) -> str:
    """The versions of what ``arm`` is made of, "name version" each; empty for an arm of this project alone.

    Raises:
        PackageNotFoundError: one of them is not installed.
    """
    return " ".join(f"{name} {version(name)}" for name in PEERS.get(arm, ()))


def missing(arms: Iterable[str]) -> dict[str, list[str]]:
    """The distributions that are not installed, by the arm that needs them."""
    found: dict[str, list[str]] = {}
    for arm in arms:
        for name in PEERS.get(arm, ()):
            try:
                version(name)
            except PackageNotFoundError:
                found.setdefault(arm, []).append(name)
    return found


def require(arms: Iterable[str]) -> None:
    """Stops where an arm's library is not installed.

    Raises:
        DataError: says which, and how to get them.
    """
    absent = missing(arms)
    if absent:
        names = sorted({name for needed in absent.values() for name in needed})
        raise DataError(
            f"arms {', '.join(absent)} need {', '.join(names)}, not installed: pip install 'grace_ds[peers]', "
            f"or pip install {' '.join(names)}; or leave them out with --arms"
        )
