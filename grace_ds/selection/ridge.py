"""Predict a signal that few samples were collected with for all samples, from content statistics: closed-form ridge.

A single sample's alignment is mostly noise; its kind of text explains most of the rest.  The statistics and their products go
into a weighted ridge regression, whose normal equations are sums over the collected samples.  They are added up as integers,
so the result has the same bits for any distribution of the samples over ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from grace_ds.records import Array, FloatArray

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

DAMPING = 0.05  # lambda, in mean diagonals of the normal equations
TARGET_CLIP = 6.0  # labels beyond are clipped: they are outliers of a single sample
_ROW_BITS, _WEIGHT_BITS, _TARGET_BITS = 8, 8, 10
_CLIP = 6.0  # statistics beyond are clipped
_BLOCK = 1 << 14  # rows processed at a time
_GRID = 2.0**-16  # predictions are rounded to it: products of other shapes may differ in their last bits


def columns(statistics: int) -> int:
    """Return the number of columns of the design for that many statistics: 1, each, and each product of two."""
    return 1 + statistics + statistics * (statistics + 1) // 2


def design(statistics: Array) -> Floats:
    """Return the design, (n, c) float64 on a grid of 2⁻⁸: 1, the (n, s) ``statistics``, a sixth of each product of two."""
    z = np.clip(np.nan_to_num(np.asarray(statistics, np.float64)), -_CLIP, _CLIP)
    rows = np.empty((len(z), columns(z.shape[1])))
    rows[:, 0], rows[:, 1 : 1 + z.shape[1]] = 1, z
    pairs = [(i, j) for i in range(z.shape[1]) for j in range(i, z.shape[1])]
    for column, (i, j) in enumerate(pairs, start=1 + z.shape[1]):
        rows[:, column] = z[:, i] * z[:, j] / _CLIP
    rows *= 2.0**_ROW_BITS
    np.rint(rows, out=rows)
    rows /= 2.0**_ROW_BITS
    return rows


def normal_equations(rows: Floats, target: Array, weight: Array) -> Integers:
    """Return Σ w x xᵀ and Σ w x y over these samples, (c·c + c,) int64 on a fixed grid; to be summed over the ranks.

    Exact for up to 2^24 samples in total.

    Args:
        rows: (n, c) from :func:`design`.
        target: (n,) finite labels; those beyond ±6 are clipped.
        weight: (n,) in [0, 1].
    """
    c = rows.shape[1]
    gram, right = np.zeros((c, c), np.int64), np.zeros(c, np.int64)
    for lo in range(0, len(rows), _BLOCK):
        part = slice(lo, lo + _BLOCK)
        x = np.rint(rows[part] * 2.0**_ROW_BITS).astype(np.int64)
        w = np.rint(np.asarray(weight[part], np.float64) * 2.0**_WEIGHT_BITS).astype(np.int64)
        clipped = np.clip(np.asarray(target[part], np.float64), -TARGET_CLIP, TARGET_CLIP)
        y = np.rint(clipped * 2.0**_TARGET_BITS).astype(np.int64)
        wx = x * w[:, None]
        for j in range(c):  # int64 matrix products have no BLAS; column by column keeps the scratch small
            gram[:, j] += wx.T @ x[:, j]
        right += wx.T @ y
    return np.concatenate([gram.ravel(), right])


def weight_of(equations: Integers) -> float:
    """Return the sum of the weights in :func:`normal_equations`: the effective number of samples."""
    return float(equations[0]) / 2.0 ** (2 * _ROW_BITS + _WEIGHT_BITS)


@dataclass(frozen=True)
class Ridge:
    """A fitted regression.

    Attributes:
        coefficients: (c,) float64.
    """

    coefficients: Floats

    @staticmethod
    def solve(equations: Integers) -> Ridge | None:
        """Solve :func:`normal_equations`, summed over all ranks; return None if nothing was collected."""
        c = int((np.sqrt(1 + 4 * len(equations)) - 1) / 2)
        gram = equations[: c * c].reshape(c, c) / 2.0 ** (2 * _ROW_BITS + _WEIGHT_BITS)
        right = equations[c * c :] / 2.0 ** (_ROW_BITS + _WEIGHT_BITS + _TARGET_BITS)
        if gram[0, 0] <= 0:
            return None
        damping = np.full(c, DAMPING * np.trace(gram) / c)
        damping[0] *= 1e-6  # the mean is not shrunk
        return Ridge(np.asarray(np.linalg.solve(gram + np.diag(damping), right), np.float64))

    def predict(self, rows: Floats) -> FloatArray:
        """Return the predictions for rows from :func:`design`, (n,) float32."""
        return np.asarray(np.rint(rows @ self.coefficients / _GRID) * _GRID, np.float32)
