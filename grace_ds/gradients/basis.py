"""Fit the trusted basis: a few factors of each layer's trusted gradient G = Σ a gᵀ.  G itself is never formed.

Single-view randomised SVD (Tropp, Yurtsever, Udell, Cevher 2017, algorithms 4 and 7): the range sketch Y = G Ω and the
co-range sketch W = Ψ G are plain sums over tokens, so over micro-batches and ranks too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from grace_ds.errors import CheckpointError, DataError
from grace_ds.gradients.capture import HookSink, Meter, Receiver
from grace_ds.gradients.layers import Layer
from grace_ds.gradients.projection import Side, product_dtype, signs
from grace_ds.records import FloatArray

TRUSTED_RANK = 8  # factors kept per layer
Factors = tuple[FloatArray, FloatArray, FloatArray]
Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True)
class TrustedBasis:
    """Factors G_l ≈ U diag(s) Vᵀ of the trusted gradient of each sketched layer; equal on all ranks.

    Attributes:
        version: number of the fit within the run; stored with every alignment.
        factors: layer name → U (inputs, q), s (q,), V (outputs, q), all float32; columns of U and of V orthonormal.
    """

    version: int
    factors: Mapping[str, Factors]

    def plus(self, older: TrustedBasis, weight: float) -> TrustedBasis:
        """Return this gradient plus ``weight`` times an older one: the best approximation with the same number of factors."""
        factors = {n: _sum(newer, older.factors[n], weight) for n, newer in self.factors.items()}
        return TrustedBasis(self.version, factors)

    def check(self, layers: Sequence[Layer]) -> None:
        """Check that a saved basis belongs to ``layers``.

        Raises:
            CheckpointError: a layer is missing from the basis, or has another shape in it.
        """
        for layer in layers:
            found = self.factors.get(layer.name)
            shapes = [f.shape for f in found] if found is not None else []
            rank = shapes[1][:1] if shapes else ()
            if shapes != [(layer.inputs, *rank), rank, (layer.outputs, *rank)]:
                raise CheckpointError(
                    f"the checkpoint's trusted basis does not fit layer {layer.name} ({layer.inputs} inputs, {layer.outputs} "
                    "outputs); restore the old model and collect.layers, or start without the old GRACE state"
                )

    def to_arrays(self) -> dict[str, FloatArray]:
        """Return a flat mapping for a checkpoint's file: "layer/U", "layer/s", "layer/V"."""
        return {f"{n}/{k}": a for n, factors in self.factors.items() for k, a in zip("UsV", factors, strict=True)}

    @staticmethod
    def from_arrays(version: int, arrays: Mapping[str, FloatArray]) -> TrustedBasis:
        """Build a basis from the arrays of :meth:`to_arrays`."""
        names = [key[:-2] for key in arrays if key.endswith("/s")]
        try:
            factors = {n: (arrays[f"{n}/U"], arrays[f"{n}/s"], arrays[f"{n}/V"]) for n in names}
        except KeyError as error:
            raise CheckpointError(
                f"the saved trusted basis lacks {error}; delete it, and the next refresh fits a new one"
            ) from error
        return TrustedBasis(version, factors)


class BasisAccumulator(HookSink):
    """Accumulate Y and W of every layer on this rank, from the backward passes routed to it (``Sketcher.route``).

    Unlike a :class:`MicroBatchCapture` it keeps each layer's input alive until its gradient arrives.  Use it for probes, not for
    training.  Of a layer that is split over ranks each of them adds its blocks of Y and of W, or its terms of their sums.

    Args:
        layers: the sketcher's layers.
        seed: of the test matrices; equal on all ranks.
        rank: number of factors to keep (q).
        meter: counts the bytes held; ``Sketcher.accumulator`` passes the sketcher's own.
    """

    def __init__(self, layers: Sequence[Layer], seed: int, rank: int = TRUSTED_RANK, meter: Meter | None = None) -> None:
        super().__init__(meter or Meter())
        self._layers = list(layers)
        self._seed, self._rank = seed, rank
        self._columns = 2 * rank + 1  # the paper's sizes: k = 2r + 1 and l = 2k + 1
        self._rows = 2 * self._columns + 1
        self._sides: dict[int, tuple[Side, Side]] = {}
        self._y: dict[int, torch.Tensor] = {}  # (k, inputs) float32: Yᵀ
        self._w: dict[int, torch.Tensor] = {}  # (l, outputs) float32

    def capture(self, index: int, x: torch.Tensor) -> Receiver | None:
        """Keep the input of layer ``index``; the returned receiver adds this call's contribution to Y and W."""
        flat, split = x.detach().reshape(-1, x.shape[-1]), self._layers[index].split
        psi, omega = self._pair(index)
        held = [(flat, split.all_tokens(psi.project(flat)))]
        nbytes = sum(t.numel() * t.element_size() for t in held[0])
        self.hold(nbytes)

        def receive(grad: torch.Tensor) -> None:
            if self.closed or not held:
                return
            a, psi_a = held.pop()
            g = grad.detach().reshape(-1, grad.shape[-1]).to(product_dtype(grad))
            omega_g = omega.project(g)
            if split.scattered:  # a has this rank's tokens and all features, g all tokens and this rank's block
                omega_g = split.own_tokens(split.whole("out", omega_g))
            self._add(self._y, index, torch.mm(omega_g, a.to(g.dtype)))
            self._add(self._w, index, torch.mm(psi_a.to(g.dtype), g))
            self.seen.add(index)
            self.backward_seen = True
            self.hold(-nbytes)

        return receive

    def _pair(self, index: int) -> tuple[Side, Side]:
        if index not in self._sides:
            layer = self._layers[index]
            psi = signs(layer.name, self._seed, "psi", (self._rows, layer.inputs))
            omega = signs(layer.name, self._seed, "omega", (self._columns, layer.outputs))
            self._sides[index] = Side(layer.split.block("in", psi)), Side(layer.split.block("out", omega))
        return self._sides[index]

    def _add(self, sums: dict[int, torch.Tensor], index: int, part: torch.Tensor) -> None:
        if index in sums:
            sums[index] += part
        else:
            sums[index] = part.float()
            self.hold(part.numel() * 4)

    def pack(self) -> npt.NDArray[np.float64]:
        """Return this rank's Y and W of all layers in order, 1-D float64, 0 where another rank has them.

        Their sum over all ranks of the job covers the whole trusted set and the whole model.
        """
        parts = []
        for index, layer in enumerate(self._layers):
            for sums, side, shape in zip((self._y, self._w), ("in", "out"), self._shapes(layer), strict=True):
                parts.append(placed(sums.get(index), layer, side, shape))
        return np.concatenate(parts)

    def _shapes(self, layer: Layer) -> tuple[tuple[int, int], tuple[int, int]]:
        return (self._columns, layer.inputs), (self._rows, layer.outputs)

    def fit(self, packed: npt.NDArray[np.float64], version: int) -> TrustedBasis:
        """Return the basis fitted to ``packed``, the sum of :meth:`pack` over all ranks.

        Equal inputs and equal library versions give equal factors.

        Raises:
            DataError: ``packed`` is not finite or has another length, or no layer received a gradient.
        """
        expected = sum(a * b for layer in self._layers for a, b in self._shapes(layer))
        if len(packed) != expected or not np.isfinite(packed).all() or not packed.any():
            raise DataError(
                f"no trusted basis can be fitted from {len(packed)} numbers ({expected} expected, all finite; "
                f"{np.count_nonzero(packed)} are not zero): check that the trusted samples give a finite loss, or set "
                "trusted: null"
            )
        factors: dict[str, Factors] = {}
        start = 0
        for layer in self._layers:
            arrays = []
            for shape in self._shapes(layer):
                size = shape[0] * shape[1]
                arrays.append(packed[start : start + size].reshape(shape))
                start += size
            psi = signs(layer.name, self._seed, "psi", (self._rows, layer.inputs)).astype(np.float64)
            factors[layer.name] = _factorise(arrays[0].T, arrays[1], psi, self._rank)
        return TrustedBasis(version, factors)


def placed(block: torch.Tensor | None, layer: Layer, side: str, shape: tuple[int, int]) -> Matrix:
    """Return this rank's ``block`` (rows, its features of ``side``) within the whole layer's ``shape``, 0 elsewhere, flat."""
    whole = np.zeros(shape)
    if block is not None:
        whole[:, layer.split.columns(side, shape[1])] = block.double().cpu().numpy()
    return whole.ravel()


def _sum(newer: Factors, older: Factors, weight: float) -> Factors:
    """Return as many factors of U diag(s) Vᵀ + weight U' diag(s') V'ᵀ as ``newer`` has."""
    left, upper = np.linalg.qr(np.concatenate([newer[0], older[0]], 1).astype(np.float64))
    right, lower = np.linalg.qr(np.concatenate([newer[2], older[2]], 1).astype(np.float64))
    inner = upper @ np.diag(np.concatenate([newer[1], weight * older[1]]).astype(np.float64)) @ lower.T
    u, s, v = np.linalg.svd(inner, full_matrices=False)
    rank = len(newer[1])
    return padded(left @ u[:, :rank], s[:rank], right @ v[:rank].T, rank)


def padded(u: Matrix, s: Matrix, v: Matrix, rank: int) -> Factors:
    """Return ``rank`` factors from u (inputs, q), s (q,) and v (outputs, q), q at most ``rank``; missing factors are zeros."""
    missing = (0, rank - len(s))  # above 0 for a layer that is narrower than the rank
    found = [np.ascontiguousarray(np.pad(a, [(0, 0)] * (a.ndim - 1) + [missing]), np.float32) for a in (u, s, v)]
    return found[0], found[1], found[2]


def _factorise(y: Matrix, w: Matrix, psi: Matrix, rank: int) -> Factors:
    """Return ``rank`` factors from Y (inputs, k), W (l, outputs) and Ψ (l, inputs), padded with zeros for a small layer."""
    q, _ = np.linalg.qr(y)
    x = np.linalg.lstsq(psi @ q, w, rcond=None)[0]
    left, s, right = np.linalg.svd(x, full_matrices=False)
    return padded((q @ left)[:, :rank], s[:rank], right[:rank].T, rank)
