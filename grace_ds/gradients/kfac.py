"""Estimate second moments of a layer's inputs and output gradients, and divide the trusted basis by them.

A raw trusted gradient points where every sample points: along the few directions in which inputs and gradients are large.
Two optimizer steps later the model has moved there, and what is left of the alignment is chance.  Dividing by the
second moments A = E[a aᵀ] and B = E[g gᵀ], taken over the *pool*, gives the direction of influence functions under a
Kronecker-factored curvature (K-FAC: Martens & Grosse 2015; for language models: Grosse et al. 2023, arXiv 2308.03296),

    D = A⁻¹ G B⁻¹,

along which good and bad samples differ for as long as a refresh lasts.  A and B are never formed: a randomised Nyström
approximation (Tropp, Yurtsever, Udell, Cevher 2017, arXiv 1706.05736, algorithm 3) needs only the sketches A Ω and B Ω,
which are plain sums over tokens, and so over micro-batches and ranks too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from grace_ds.errors import DataError
from grace_ds.gradients.basis import Factors, TrustedBasis, padded, placed
from grace_ds.gradients.capture import HookSink, Meter, Receiver
from grace_ds.gradients.layers import Layer
from grace_ds.gradients.projection import Side, product_dtype, signs

Matrix = npt.NDArray[np.float64]

RANK = 32  # directions per side that are divided by their own moment; the others share one
DAMPING = 0.1  # fraction of the mean moment added to all directions


@dataclass(frozen=True)
class Moment:
    """A side's second moment as ``vectors diag(values) vectorsᵀ + rest I``.

    Attributes:
        vectors: (features, r) float64, orthonormal columns.
        values: (r,) float64, at least 0: the moment of these directions in excess of ``rest``.
        rest: moment of every other direction, damping included; above 0.
    """

    vectors: Matrix
    values: Matrix
    rest: float

    def solve(self, x: Matrix) -> Matrix:
        """Return the moment's inverse times ``x`` (features, q), same shape."""
        share = self.values / (self.values + self.rest)
        inside: Matrix = self.vectors @ (share[:, None] * (self.vectors.T @ x))
        return np.asarray((x - inside) / self.rest, np.float64)


class MomentAccumulator(HookSink):
    """Accumulate A Ω and B Ω of every layer on this rank, from the backward passes routed to it (``Sketcher.route``).

    Args:
        layers: the sketcher's layers.
        seed: of the test matrices; equal on all ranks.
        rank: number of directions (r).
        meter: counts the bytes held.
    """

    def __init__(self, layers: Sequence[Layer], seed: int, rank: int = RANK, meter: Meter | None = None) -> None:
        super().__init__(meter or Meter())
        self._layers, self._seed, self._rank = list(layers), seed, rank
        self._sides: dict[tuple[int, str], Side] = {}
        self._sums: dict[tuple[int, str], torch.Tensor] = {}  # (r, features) float32
        self._totals = np.zeros((len(self._layers), 2))  # traces of A and of B
        self._tokens = np.zeros(len(self._layers))

    def capture(self, index: int, x: torch.Tensor) -> Receiver | None:
        """Add the input's contribution at once; the returned receiver adds the gradient's."""
        split = self._layers[index].split
        self._add(index, "in", x.detach().reshape(-1, x.shape[-1]))
        if split.rank == 0 or split.scattered:
            self._tokens[index] += x.numel() // x.shape[-1]

        def receive(grad: torch.Tensor) -> None:
            if not self.closed:
                self._add(index, "out", grad.detach().reshape(-1, grad.shape[-1]))
                self.seen.add(index)
                self.backward_seen = True

        return receive

    def _add(self, index: int, side: str, flat: torch.Tensor) -> None:
        key, split = (index, side), self._layers[index].split
        if not split.adds(side):
            return
        if key not in self._sides:
            self._sides[key] = Side(split.block(side, self._test(index, side).astype(np.float32)))
        wide = flat.to(product_dtype(flat))
        part = torch.mm(split.whole(side, self._sides[key].project(wide)), wide).float()
        self._totals[index, int(side == "out")] += float(wide.float().square().sum())
        if key in self._sums:
            self._sums[key] += part
        else:
            self._sums[key] = part
            self.hold(part.numel() * 4)

    def _test(self, index: int, side: str) -> Matrix:
        """Return the test matrix Ω, (r, features) float64."""
        layer = self._layers[index]
        shape = (self._rank, layer.inputs if side == "in" else layer.outputs)
        return signs(layer.name, self._seed, f"moment-{side}", shape).astype(np.float64)

    def pack(self) -> Matrix:
        """Return this rank's sums of all layers in order, 1-D float64, 0 where another rank has them.

        Their sum over all ranks of the job covers all probed samples and the whole model.
        """
        parts = [self._totals.ravel(), self._tokens]
        for index, layer in enumerate(self._layers):
            for side, width in (("in", layer.inputs), ("out", layer.outputs)):
                parts.append(placed(self._sums.get((index, side)), layer, side, (self._rank, width)))
        return np.concatenate(parts)

    def fit(self, packed: Matrix) -> dict[str, tuple[Moment, Moment]]:
        """Fit the moments to ``packed``, the sum of :meth:`pack` over all ranks.

        Returns:
            Layer name → the moments of its inputs and of its output gradients.  A layer that no gradient reached is left out.

        Raises:
            DataError: the sums are not finite.
        """
        if not np.isfinite(packed).all():
            raise DataError(
                "the second moments of the probed pool samples are not finite: check that they give a finite loss, or set "
                "recipe: content"
            )
        n = len(self._layers)
        totals, tokens, rest = packed[: 2 * n].reshape(n, 2), packed[2 * n : 3 * n], packed[3 * n :]
        moments: dict[str, tuple[Moment, Moment]] = {}
        for index, layer in enumerate(self._layers):
            pair = []
            for column, (side, width) in enumerate((("in", layer.inputs), ("out", layer.outputs))):
                y, rest = rest[: self._rank * width].reshape(self._rank, width), rest[self._rank * width :]
                if totals[index, column] > 0:
                    count = tokens[index]
                    pair.append(_nystrom(y.T / count, self._test(index, side).T, totals[index, column] / count))
            if len(pair) == 2:
                moments[layer.name] = (pair[0], pair[1])
        return moments


def whiten(basis: TrustedBasis, moments: dict[str, tuple[Moment, Moment]], sigma: dict[str, float]) -> TrustedBasis:
    """Return ``basis`` with each layer's G replaced by A⁻¹ G B⁻¹.

    Layers without moments are left out (factors of zero).

    Args:
        basis: of the trusted gradient.
        moments: from :meth:`MomentAccumulator.fit`.
        sigma: layer name → the frozen scale that sketches are divided by.  It does not enter influence, so it is undone here.
    """
    return TrustedBasis(
        basis.version,
        {name: _whitened(factors, moments.get(name), sigma[name]) for name, factors in basis.factors.items()},
    )


def _whitened(factors: Factors, pair: tuple[Moment, Moment] | None, sigma: float) -> Factors:
    u, s, v = (a.astype(np.float64) for a in factors)
    if pair is None:
        return factors[0], np.zeros_like(factors[1]), factors[2]
    left, lower = np.linalg.qr(pair[0].solve(u))
    right, upper = np.linalg.qr(pair[1].solve(v))
    inner_left, strength, inner_right = np.linalg.svd(lower @ np.diag(s) @ upper.T, full_matrices=False)
    return padded(left @ inner_left, strength * sigma**2, right @ inner_right.T, len(s))


def _nystrom(y: Matrix, omega: Matrix, trace: float) -> Moment:
    """Return the moment M behind ``y`` = M Ω (features, r).

    ``trace`` is the whole trace of M; directions beyond r share what the first r leave of it.
    """
    features = len(omega)
    scale = max(trace / features, np.finfo(np.float64).tiny)
    shift = 1e-10 * trace  # keeps the core positive definite; subtracted from the eigenvalues again
    y = y + shift * omega
    core = omega.T @ y
    values, vectors = np.linalg.eigh((core + core.T) / 2)
    positive = values > 1e-12 * max(values.max(), 0.0)
    root = y @ (vectors[:, positive] / np.sqrt(values[positive]))
    left, singular, _ = np.linalg.svd(root, full_matrices=False)
    found = np.maximum(singular**2 - shift, 0.0)
    found *= min(1.0, trace / max(found.sum(), np.finfo(np.float64).tiny))  # noise must not exceed the trace
    # The other directions share the rest of the trace equally.  A found direction with less than such a share is dropped.
    ranks = np.arange(1, len(found) + 1)
    share = np.maximum(trace - np.cumsum(found), 0.0) / np.maximum(features - ranks, 1)
    n_kept = int(np.sum(np.logical_and.accumulate(found >= share)))
    rest = float(share[n_kept - 1]) if n_kept else trace / features
    return Moment(left, np.where(ranks <= n_kept, np.maximum(found - rest, 0.0), 0.0), rest + DAMPING * scale)
