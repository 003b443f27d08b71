"""Turn what is computed of samples into rows of 32-bit words and back: scores, 6-grams, vectors.

Whatever a file may hold, what is read here has the form and the range of what is computed: anything else is not found.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from grace_ds.features.duplicates import Grams
from grace_ds.features.ngrams import Sampling
from grace_ds.features.quality import STATISTICS
from grace_ds.features.row_files import Ragged, RowFiles
from grace_ds.records import Array, FloatArray, IntArray

Bools = npt.NDArray[np.bool_]
OTHER_FORM = "rows of it are not of the form that is computed"


@dataclass(frozen=True)
class Scores:
    """Scores of m samples by the trusted model.

    Attributes:
        quality: (m,) float32 in (0, 1].
        statistics: (m, 5) float32; None: not computed.
    """

    quality: FloatArray
    statistics: FloatArray | None


def write_scores(files: RowFiles | None, ids: IntArray, scores: Scores) -> None:
    """Take scores of the samples ``ids`` (m,) to be written."""
    if files is not None:
        quality = scores.quality.astype(np.float32)[:, None]
        files.add(ids, Ragged.table(quality if scores.statistics is None else np.hstack([quality, scores.statistics])))


def read_scores(files: RowFiles | None, ids: IntArray, statistics: bool) -> tuple[Bools, Scores]:
    """Return which of ``ids`` (n,) have scores, (n,) bool, and these scores.

    Args:
        statistics: whether they must have statistics.
    """
    found, rows = _read(files, ids)
    wide = rows.lengths == 1 + STATISTICS
    first = np.cumsum(rows.lengths) - rows.lengths
    usable = wide if statistics else wide | (rows.lengths == 1)
    values = rows.words.view(np.float32)
    quality = np.full(len(rows.lengths), np.nan, np.float32)
    quality[usable] = values[first[usable]]
    sound = (quality > 0) & (quality <= 1)
    table = None
    if statistics:
        table = np.zeros((len(quality), STATISTICS), np.float32)
        table[usable] = values[first[usable][:, None] + np.arange(1, 1 + STATISTICS)]
        sound &= np.isfinite(table).all(1)
    found = _kept(files, found, sound, but=rows.lengths == 1)
    return found, Scores(quality[sound], None if table is None else table[sound])


def write_grams(files: RowFiles | None, ids: IntArray, grams: Grams) -> None:
    """Take the 6-grams of the samples ``ids`` (m,) to be written."""
    if files is None:
        return
    bins = grams.bins.astype(np.uint32, copy=False)
    if grams.times is None:
        files.add(ids, Ragged(grams.lengths, bins))
        return
    both = np.concatenate([bins, grams.times.astype(np.uint32)])
    twice = Ragged(np.concatenate([grams.lengths, grams.lengths]), both)
    n = len(grams.lengths)  # a row is its bins, then how often each occurs
    paired = twice.take(np.arange(2 * n).reshape(2, n).T.reshape(-1))
    files.add(ids, Ragged(2 * grams.lengths, paired.words))


def read_grams(files: RowFiles | None, ids: IntArray, sampling: Sampling) -> tuple[Bools, Grams]:
    """Return which of ``ids`` (n,) have 6-grams in the cache, (n,) bool, and these 6-grams."""
    found, rows = _read(files, ids)
    of_row = np.repeat(np.arange(len(rows.lengths)), rows.lengths)
    is_bin = np.ones(len(rows.words), np.bool_)
    sound: Bools = np.ones(len(rows.lengths), np.bool_)
    lengths = rows.lengths
    if sampling.level:
        lengths = rows.lengths // 2
        sound = np.asarray(rows.lengths % 2 == 0)
        is_bin = np.arange(len(of_row)) - (np.cumsum(rows.lengths) - rows.lengths)[of_row] < lengths[of_row]
    wrong: Bools = np.where(is_bin, rows.words >> np.uint32(sampling.bits) != 0, (rows.words == 0) | (rows.words >= 1 << 31))
    sound[of_row[wrong]] = False
    found = _kept(files, found, sound)
    keep = sound[of_row] if not sound.all() else slice(None)
    words, is_bin = rows.words[keep], is_bin[keep]
    times = words[~is_bin].astype(np.int32) if sampling.level else None
    return found, Grams(words[is_bin].astype(np.intp), lengths[sound], times)


def write_vectors(files: RowFiles | None, ids: IntArray, vectors: FloatArray) -> None:
    """Take vectors (m, dim) of the samples ``ids`` (m,) to be written."""
    if files is not None:
        files.add(ids, Ragged.table(vectors))


def read_vectors(files: RowFiles | None, ids: IntArray, dim: int) -> tuple[Bools, FloatArray]:
    """Return which of ``ids`` (n,) have vectors, (n,) bool, and these vectors, (k, dim) float32."""
    found, rows = _read(files, ids)
    sound: Bools = np.asarray(rows.lengths == dim)
    if not sound.all():
        rows = rows.take(np.flatnonzero(sound))
    vectors = rows.words.view(np.float32).reshape(-1, dim)
    fine: Bools = np.all(np.abs(vectors) <= 1, axis=1)  # false for NaN too
    sound[sound] = fine
    return _kept(files, found, sound), vectors[fine]


def _read(files: RowFiles | None, ids: IntArray) -> tuple[Bools, Ragged]:
    if files is None:
        return np.zeros(len(ids), np.bool_), Ragged.joined([])
    return files.read(ids)


def _kept(files: RowFiles | None, found: Bools, sound: Bools, but: Array | None = None) -> Bools:
    """Return ``found`` without the rows that are not sound, and warn of these ``but`` (k,) some that may be as they are."""
    strange = ~sound if but is None else ~sound & ~but
    if files is not None and strange.any():
        files.refuse(files.folder, OTHER_FORM)
    kept: Bools = found.copy()
    kept[found] = sound
    return kept
