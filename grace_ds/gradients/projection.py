"""Make seeded projections: the bases of a layer's two sides, the fold, and the shapes they are applied to.

Every number here is a function of (seed, global layer name) alone, drawn from NumPy's counter-based Philox bit stream.
So it is equal on all ranks, devices and releases, and no global random state is touched.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from grace_ds.records import FloatArray, IntArray


def _stream(name: str, seed: int, purpose: str) -> np.random.Philox:
    digest = hashlib.blake2b(f"{purpose}\0{seed}\0{name}".encode(), digest_size=16).digest()
    return np.random.Philox(key=np.frombuffer(digest, "<u8"))


def side_exponent(width: int) -> int:
    """Return the k of the entries ±2⁻ᵏ of a base over ``width`` coordinates: near 1/√width, so that no dtype overflows."""
    return int(max(width, 1)).bit_length() // 2


def signs(name: str, seed: int, purpose: str, shape: tuple[int, int]) -> FloatArray:
    """Return independent random entries ±2⁻ᵏ, float32 of ``shape`` (rows, width).

    They are exact in every floating dtype, so bfloat16 loses nothing.
    """
    count = shape[0] * shape[1]
    words = _stream(name, seed, purpose).random_raw((count + 63) // 64)
    bits = np.unpackbits(words.astype("<u8").view(np.uint8))[:count]
    values = (bits.reshape(shape) * 2.0 - 1.0) * 2.0 ** -side_exponent(shape[1])
    return values.astype(np.float32)


def bases(name: str, seed: int, rank: int, inputs: int, outputs: int) -> tuple[FloatArray, FloatArray, float]:
    """Return (P_in (rank, inputs), P_out (rank, outputs), unit): ``unit · P_in G P_outᵀ`` is the unbiased sketch of G.

    The expected squared length of that sketch is ``‖G‖²``.
    """
    unit = 2.0 ** (side_exponent(inputs) + side_exponent(outputs)) / rank
    return signs(name, seed, "in", (rank, inputs)), signs(name, seed, "out", (rank, outputs)), unit


def fold_table(name: str, seed: int, rank: int, dim: int) -> tuple[IntArray, FloatArray]:
    """Return the sign-hash of a layer's rank² coordinates into ``dim`` buckets, written as a gather.

    A gather (bucket ← coordinate) is deterministic on every device, a scatter-add is not.  Buckets are drawn without
    replacement as long as they last, so within one layer coordinates collide only if rank² > dim.


    Returns:
        source (slots · dim,) int64: the coordinate of each slot, rank² for "none".  Slot s belongs to bucket s % dim.
        sign (slots · dim,) float32: ±1, 0 at "none".
    """
    coords = rank * rank
    size = -(-coords // dim) * dim
    order = np.argsort(_stream(name, seed, "bucket").random_raw(size), kind="stable")[:coords]
    flips = _stream(name, seed, "sign").random_raw(coords)
    source = np.full(size, coords, np.int64)
    sign = np.zeros(size, np.float32)
    source[order] = np.arange(coords)
    sign[order] = np.where(flips >> np.uint64(63), 1.0, -1.0)
    return source, sign


class Fold:
    """Fold the coordinates of all layers into one vector per sample.

    Args:
        names: the layers, in the order of the coordinates' layer axis.
    """

    def __init__(self, names: Sequence[str], seed: int, rank: int, dim: int) -> None:
        tables = [fold_table(name, seed, rank, dim) for name in names]
        width = rank * rank + 1  # the last coordinate of each layer is a zero for the empty slots
        self.dim = dim
        self._source = torch.from_numpy(np.concatenate([t[0] + i * width for i, t in enumerate(tables)]))
        self._sign = torch.from_numpy(np.concatenate([t[1] for t in tables]))
        self._slots = len(tables[0][0])

    def __call__(self, coordinates: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Return the folded coordinates, (n, dim) float32.

        Args:
            coordinates: (n, layers, rank²) float32.
            scale: (layers,) factors of the layers.
        """
        if self._source.device != coordinates.device:
            self._source, self._sign = self._source.to(coordinates.device), self._sign.to(coordinates.device)
        n = coordinates.shape[0]
        padded = torch.nn.functional.pad(coordinates * scale.view(1, -1, 1), (0, 1)).reshape(n, -1)
        return (padded.index_select(1, self._source) * self._sign).view(n, -1, self.dim).sum(1)


@functools.cache
def _narrow_is_native() -> bool:
    """Return whether this CPU multiplies bfloat16 in hardware.

    Without that, torch falls back to loops 10 to 30 times slower than float32.
    """
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(available and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the dtype to multiply ``x`` in: its own, or float32 on a CPU without instructions for its own.

    The instructions sum in float32 anyway.
    """
    if x.device.type != "cpu" or x.dtype == torch.float64 or _narrow_is_native():
        return x.dtype
    return torch.float32


class Side:
    """One side of a layer's projection, cached per dtype and device.

    Args:
        matrix: (width, features) float32; rows are the base, then the trusted factors if there are any.
    """

    def __init__(self, matrix: npt.NDArray[np.float32]) -> None:
        self._master = torch.from_numpy(np.ascontiguousarray(matrix, np.float32))
        self._ready: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}

    def project(self, flat: torch.Tensor) -> torch.Tensor:
        """Return the projection of ``flat`` (rows, features), (width, rows) in its :func:`product_dtype`.

        Written ``B xᵀ``: with a small width this product is several times faster on a CPU than ``x Bᵀ``.
        """
        flat = flat.to(product_dtype(flat))
        key = (flat.dtype, flat.device)
        base = self._ready.get(key)
        if base is None:
            base = self._ready[key] = self._master.to(device=flat.device, dtype=flat.dtype)
        return torch.mm(base, flat.t())

    @property
    def nbytes(self) -> int:
        """Bytes of the cached copies."""
        return sum(t.numel() * t.element_size() for t in self._ready.values())


Layout = tuple[int, bool]  # (tokens per sample, whether the token axis comes before the sample axis)


def layout(shape: Sequence[int], n: int, time_major: bool = False) -> Layout | None:
    """Return how a tensor (..., features) splits into ``n`` samples; None if it does not.

    (n, T, ·) and (n, ·) are batch-major, (n·T, ·) and (n·k, T, ·) too (row-major), (T, n, ·) is time-major.

    Args:
        time_major: the tensor is known to be (T, n, ·), even if T equals n.
    """
    if time_major:
        return (shape[0], True) if len(shape) == 3 and shape[1] == n and shape[0] else None
    rows = 1
    for length in shape[:-1]:
        rows *= length
    if rows == 0 or rows % n:
        return None
    if len(shape) > 2 and shape[0] != n:
        if shape[1] == n:
            return rows // n, True
        if shape[0] % n:
            return None
    return rows // n, False


def per_sample(projected: torch.Tensor, n: int, split: Layout) -> torch.Tensor:
    """Return ``projected`` (width, rows) as (n, width, T) float32, a view or a copy."""
    tokens, time_major = split
    values = projected.float()
    if time_major:
        return values.view(-1, tokens, n).permute(2, 0, 1)
    return values.view(-1, n, tokens).permute(1, 0, 2)
