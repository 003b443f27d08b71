"""Say what a folder of precomputed features was made for, and refuse it for anything else."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grace_ds.data.pool import Pool
from grace_ds.data.tokens import TokenReader
from grace_ds.errors import ConfigError, DataError
from grace_ds.features.corpus_cache import RECIPE, window_sums
from grace_ds.features.sweeps import TokenScorer
from grace_ds.records import IntArray
from grace_ds.utils.files import write_atomic

FILE = "features.json"
MOST_BYTES = 1 << 16
_WORDS = {
    "recipe": "edition of the features",
    "corpus": "corpus (fingerprint of its tokens)",
    "samples": "number of samples",
    "max_tokens": "features.max_tokens",
    "separator": "features.separator",
    "dim": "features.dim",
    "seed": "seed",
    "trusted": "trusted set (digest of its model)",
    "window": "first window (its samples, and sums over their ids)",
}


@dataclass(frozen=True)
class Manifest:
    """Everything that the features of a job's first window depend on.

    Attributes:
        recipe: of the formulas.
        corpus: :meth:`TokenReader.token_fingerprint`.
        samples: of the corpus.
        max_tokens, separator: of the reader.
        dim: width of the vectors; 0: without vectors.
        seed: of their projection, and of the windows.
        trusted: digest of the trusted model; empty: without.
        window: :func:`window_sums` of the first window whose features are computed.
    """

    recipe: int
    corpus: str
    samples: int
    max_tokens: int
    separator: int
    dim: int
    seed: int
    trusted: str
    window: tuple[int, ...]

    @staticmethod
    def of(
        reader: TokenReader, dim: int, seed: int, trusted: TokenScorer | None, blocks: Callable[[], Iterable[IntArray]]
    ) -> Manifest:
        """Return what a job needs.

        Args:
            blocks: the ids of the first window whose features are computed, over all ranks.
        """
        model = "" if trusted is None else trusted.digest()
        window = window_sums(blocks(), lambda sums: sums)
        settings = (len(reader), reader.max_tokens, reader.separator, dim, seed, model, window)
        return Manifest(RECIPE, reader.token_fingerprint(), *settings)

    def write(self, folder: Path) -> None:
        """Write it into ``folder``.

        Raises:
            OSError: it cannot be written.
        """
        write_atomic(folder / FILE, (json.dumps(dataclasses.asdict(self), indent=1) + "\n").encode())


def first_window(pool: Pool, start_step: int) -> Callable[[], Iterable[IntArray]]:
    """Return the ids of the first window whose features a run computes, block by block.

    Args:
        pool: of the run.
        start_step: of the config: with one, the first schedule is uniform and reads nothing.
    """
    return lambda: pool.blocks(int(start_step > 0))


def read_manifest(folder: Path) -> Manifest:
    """Read what a folder of features was made for.

    Raises:
        DataError: there is no such file, or it is none that ``grace-ds features`` has written.
    """
    path = folder / FILE
    try:
        with open(path, "rb") as file:
            text = file.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES} bytes")
        found = json.loads(text)
        names = {part.name: type_of for part, type_of in zip(dataclasses.fields(Manifest), _TYPES, strict=True)}
        if not isinstance(found, dict) or set(found) != set(names):
            raise ValueError("its keys are not those of a folder of features")
        wrong = [name for name, kind in names.items() if type(found[name]) is not kind]
        if wrong or not all(type(number) is int for number in found["window"]):
            raise ValueError(f"{(wrong or ['window'])[0]} has the wrong type")
        return Manifest(**{**found, "window": tuple(found["window"])})
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): name a folder that grace-ds features has written") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({error}): run grace-ds features again with this folder for --out") from error


_TYPES: tuple[Any, ...] = (int, str, int, int, int, int, int, str, list)


def check_precomputed(folder: Path, wanted: Manifest) -> None:
    """Check that a folder that the config names was made for this job.

    Raises:
        DataError: it cannot be read.
        ConfigError: it was made for something else; the message says what differs.
    """
    found = read_manifest(folder)
    differ = [name for name in _WORDS if getattr(found, name) != getattr(wanted, name)]
    if wanted.dim == 0:  # a job without a graph needs no vectors
        differ = [name for name in differ if name != "dim"]
    if not wanted.trusted:
        differ = [name for name in differ if name != "trusted"]
    if differ:
        pairs = [(_WORDS[name], _short(getattr(found, name)), _short(getattr(wanted, name))) for name in differ]
        said = "; ".join(f"{word}: {there} there, {here} here" for word, there, here in pairs)
        raise ConfigError(
            f"features.precomputed = {str(folder)!r} was made for something else ({said}); run grace-ds features with this job's "
            "config and corpus, or leave the key out to compute here"
        )


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        return f"{value[0]} samples ({sum(value[1:]) % 2**32:08x})" if value else "none"
    if isinstance(value, str):
        return value[:12] if value else "none"
    return str(value)
