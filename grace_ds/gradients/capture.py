"""Capture one micro-batch with the hooks: what they collect, and how it becomes rows.

A capture ties a forward and its backward to the dataset ids of the micro-batch.  The hooks keep the capture in their
closures, so that a later micro-batch's forward cannot misroute an earlier one's backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from grace_ds.errors import DataError
from grace_ds.gradients.layers import Layer
from grace_ds.gradients.projection import Fold, Layout, Side, layout, per_sample
from grace_ds.records import HIDDEN, FloatArray, IntArray, SampleRecords

Receiver = Callable[[torch.Tensor], None]


class Meter:
    """Count the bytes that the hooks hold: the current number, and the maximum since the last reset."""

    def __init__(self) -> None:
        self.now = 0
        self.peak = 0

    def add(self, nbytes: int) -> None:
        """Add bytes that were taken; a negative number returns them."""
        self.now += nbytes
        self.peak = max(self.peak, self.now)


class HookSink:
    """Target that the hooks write to.  It is open from its creation until :meth:`close`.

    Attributes:
        spoiled: a hook failed or a layer did not fit; the numbers must not be used.
        backward_seen: at least one layer has received its gradient.
    """

    closed = True  # for an object whose __init__ failed: it holds nothing, and __del__ still runs

    def __init__(self, meter: Meter) -> None:
        self.spoiled = False
        self.backward_seen = False
        self.closed = False
        self.seen: set[int] = set()
        self._deferred: dict[int, int] = {}
        self._meter = meter
        self._held = 0

    def capture(self, index: int, x: torch.Tensor) -> Receiver | None:
        """Take the input of layer ``index``.

        Returns:
            The function to call with the output's gradient, or None to skip the call.
        """
        raise NotImplementedError

    def defer(self, index: int) -> None:
        """Record a forward under no_grad: a re-entrant checkpoint will run it again inside the backward."""
        self._deferred[index] = self._deferred.get(index, 0) + 1

    def claim(self, index: int) -> bool:
        """Return whether a forward inside the backward repeats a deferred one, and remove it from those that are due."""
        due = self._deferred.get(index, 0)
        self._deferred[index] = max(due - 1, 0)
        return due > 0

    def hold(self, nbytes: int) -> None:
        """Count bytes that stay alive until they are returned by a negative count or by :meth:`close`."""
        self._held += nbytes
        self._meter.add(nbytes)

    def close(self) -> None:
        """Close the target: later gradients are ignored and its bytes no longer count."""
        if not self.closed:
            self.closed = True
            self._meter.add(-self._held)
            self._held = 0

    def __del__(self) -> None:
        self.close()


@dataclass(frozen=True)
class Plan:
    """The projections in force when a capture began.

    Attributes:
        layers: the sketched layers.
        sides: per layer, the input's and the output's projection; ``rank`` rows, then the trusted factors if any.
        unit: (layers,) float64, the factor that makes each layer's sketch unbiased.
        rank: rows of the seeded bases.
        strength: (layers, q) float32 on the CPU, singular values of the trusted factors; None without a basis.
        basis_version: of the trusted basis; -1 without one.
        pooled: index of the layer whose input, averaged over tokens, is the sample's hidden state.
        pooling: (inputs, HIDDEN) float32, the projection applied to that mean.
    """

    layers: Sequence[Layer]
    sides: Sequence[tuple[Side, Side]]
    unit: npt.NDArray[np.float64]
    rank: int
    strength: FloatArray | None
    basis_version: int
    pooled: int
    pooling: torch.Tensor

    @property
    def width(self) -> int:
        """Rows of a side's projection: those of the seeded base and the trusted factors."""
        return self.rank + (0 if self.strength is None else self.strength.shape[1])

    def rows(
        self,
        ids: IntArray,
        folded: npt.NDArray[np.float32],
        product: npt.NDArray[np.float32] | None,
        loss: FloatArray,
        hidden: npt.NDArray[np.float32],
        sigma: npt.NDArray[np.float64],
        factor: npt.NDArray[np.float64],
    ) -> CollectedRows:
        """Build the rows from values that are linear in the gradients.

        Args:
            ids: (n,) int64.
            folded: (n, dim) folded sketches.
            product: (n,) inner products with the trusted gradient of the basis in force; None without a basis.
            loss: (n,) float32.
            hidden: (n, HIDDEN) float32.
            sigma: (layers,) the per-layer scale.
            factor: (n,) from :func:`row_factor`.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            sketch = (folded * factor[:, None]).astype(np.float32)
            norm = np.sqrt((sketch.astype(np.float64) ** 2).sum(1))
            influence = np.full(len(ids), np.nan)
            if self.strength is not None and product is not None:
                lengths = norm * np.sqrt(((self.strength / sigma[:, None]) ** 2).sum())
                np.divide(product * factor, lengths, out=influence, where=lengths > 0)
        return CollectedRows(ids, sketch, norm.astype(np.float32), influence.astype(np.float32), loss, self.basis_version, hidden)


@dataclass(frozen=True)
class CollectedRows:
    """What the backward pass of one micro-batch gave for its samples, on this rank.

    Attributes:
        ids: (n,) int64, as captured; may repeat.
        sketch: (n, dim) float32, folded sketch of the gradient of the sample's mean loss, each layer over its scale.
        norm: (n,) float32, length of ``sketch``.
        influence: (n,) float32, cosine with the trusted gradient under the same scale; NaN without a basis.
        loss: (n,) float32, nats per token; NaN if the loss was not seen.
        basis: version of the trusted basis; -1 without one.
        hidden: (n, HIDDEN) float32, pooled and projected hidden state; 0 if it was not seen.
    """

    ids: IntArray
    sketch: FloatArray
    norm: FloatArray
    influence: FloatArray
    loss: FloatArray
    basis: int
    hidden: FloatArray

    def rows(self, step: int, loss_mean: float = 0.0) -> SampleRecords:
        """Return the rows for the table: unit sketches, losses minus ``loss_mean``.

        Samples without a finite gradient are left out.
        """
        n = len(self.ids)
        with np.errstate(invalid="ignore", divide="ignore"):
            unit = (self.sketch / self.norm[:, None]).astype(np.float16)
        rows = SampleRecords(
            ids=self.ids,
            sketch=unit,
            norm=self.norm,
            loss=self.loss - np.float32(loss_mean),
            influence=self.influence,
            step=np.full(n, step, np.int64),
            basis=np.full(n, self.basis, np.int32),
            hidden=np.nan_to_num(self.hidden).astype(np.float16),
        )
        return rows.take(np.isfinite(self.norm) & (self.norm > 0))


class LossCapture:
    """The losses of one micro-batch whose gradients are not collected: only the output of its forward is read.

    Attributes:
        ids: (n,) int64, dataset ids, in the order of the batch's rows.
        losses: (n,) float32 tensor or None; see :meth:`Sketcher.observe_loss`.
        tokens: (n,) int64 tensor of valid targets, or None.
    """

    def __init__(self, ids: IntArray) -> None:
        self.ids = np.ascontiguousarray(ids, np.int64).reshape(-1)
        self.losses: torch.Tensor | None = None
        self.tokens: torch.Tensor | None = None


class MicroBatchCapture(HookSink):
    """The sketches of one micro-batch.

    Attributes:
        ids: (n,) int64, dataset ids, in the order of the batch's rows.
        plan: the projections in force when the capture began.
        losses: (n,) float32 tensor or None; see :meth:`Sketcher.observe_loss`.
        tokens: (n,) int64 tensor of valid targets, or None.
        attention: (n, T) tensor, 0 at the padding of the batch's rows; None: nothing is known of padding.
    """

    def __init__(self, ids: IntArray, plan: Plan, fold: Fold, meter: Meter) -> None:
        super().__init__(meter)
        self.ids = np.ascontiguousarray(ids, np.int64).reshape(-1)
        if not len(self.ids):
            raise DataError("a micro-batch with no ids cannot be bound; leave it out of the collection")
        self.losses: torch.Tensor | None = None
        self.tokens: torch.Tensor | None = None
        self.attention: torch.Tensor | None = None
        self.plan = plan
        self._fold = fold
        self._sums: torch.Tensor | None = None  # (layers, n, width, width) float32
        self._hidden: torch.Tensor | None = None  # (n, HIDDEN) float32

    def capture(self, index: int, x: torch.Tensor) -> Receiver | None:
        """Project the input of layer ``index`` at once; return None if it does not split into the samples of the capture."""
        n = len(self.ids)
        share = self.plan.layers[index].split
        split = layout(x.shape, n, share.time_major)
        if split is None:
            return None
        if index == self.plan.pooled and self._hidden is None and x.shape[-1] == len(self.plan.pooling):
            self._hidden = self._pool(x.detach(), split) * share.of_mean
        if share.scattered:
            split = (split[0] * share.size, split[1])
        side_in, side_out = self.plan.sides[index]
        held = [share.all_tokens(side_in.project(x.detach().reshape(-1, x.shape[-1])))]
        nbytes = held[0].numel() * held[0].element_size()
        self.hold(nbytes)

        def receive(grad: torch.Tensor) -> None:
            if self.closed or not held:  # do not count a second backward through the same graph
                return
            projected = held.pop()
            out = side_out.project(grad.detach().reshape(-1, grad.shape[-1]))
            self._accumulate(index, projected, out, split)
            self.hold(-nbytes)

        return receive

    def _pool(self, x: torch.Tensor, split: Layout) -> torch.Tensor:
        """Return the projected mean of ``x`` over each sample's tokens without known padding, (n, HIDDEN) float32."""
        n, (tokens, time_major) = len(self.ids), split
        flat = x.reshape(-1, x.shape[-1])
        rows = flat.view(tokens, n, -1).transpose(0, 1) if time_major else flat.view(n, tokens, -1)
        # A mask of another length belongs to other tokens: the batch was cut, or its tokens are spread over ranks.
        if self.attention is None or self.attention.shape != (n, tokens):
            mean = rows.mean(1, dtype=torch.float32)
        else:
            real = (self.attention != 0).to(x.device).unsqueeze(2)
            mean = (rows * real).sum(1, dtype=torch.float32) / real.sum(1, dtype=torch.float32).clamp(min=1)
        return mean @ self.plan.pooling.to(x.device)

    def pooled(self) -> npt.NDArray[np.float32]:
        """Return the samples' hidden states, (n, HIDDEN) float32; 0 if the layer was not seen."""
        if self._hidden is None:
            return np.zeros((len(self.ids), HIDDEN), np.float32)
        hidden: npt.NDArray[np.float32] = self._hidden.cpu().numpy()
        return hidden

    def _accumulate(self, index: int, a: torch.Tensor, g: torch.Tensor, split: Layout) -> None:
        n = len(self.ids)
        if self._sums is None:
            shape = (len(self.plan.layers), n, self.plan.width, self.plan.width)
            self._sums = torch.zeros(shape, dtype=torch.float32, device=g.device)
            self.hold(self._sums.numel() * 4)
        elif self._sums.device != g.device:
            raise DataError(f"layers on {self._sums.device} and {g.device} in one binding; sketch the layers of one device only")
        self._sums[index].baddbmm_(per_sample(a, n, split), per_sample(g, n, split).transpose(1, 2))
        self.seen.add(index)
        self.backward_seen = True

    def row_factor(self, grad_scale: float, reduction: str, tokens: IntArray | None) -> npt.NDArray[np.float64]:
        """Return (n,) factors that turn each row into the gradient of its own sample's mean loss; see :func:`row_factor`."""
        if tokens is None and self.tokens is not None:
            tokens = self.tokens.cpu().numpy()
        return row_factor(len(self.ids), grad_scale, reduction, tokens)

    def coordinates(self) -> npt.NDArray[np.float32]:
        """Return the layers' unfolded, unscaled sketches, (n, layers, rank²) float32; 0 if no gradient arrived."""
        n, r, depth = len(self.ids), self.plan.rank, len(self.plan.layers)
        if self._sums is None:
            return np.zeros((n, depth, r * r), np.float32)
        out: npt.NDArray[np.float32] = self._sums.transpose(0, 1)[:, :, :r, :r].reshape(n, depth, r * r).cpu().numpy()
        return out

    def linear(self, sigma: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
        """Return the folded sketch and the inner product with the trusted gradient, (n, dim + 1) float32.

        The inner product is 0 without a basis.  Both are linear in the gradients, so the values of ranks that hold parts of one
        model can be added up.
        """
        n, dim = len(self.ids), self._fold.dim
        if self._sums is None:
            return np.zeros((n, dim + 1), np.float32)
        numbers = self._numbers(sigma)
        last = numbers[:, -1:] if self.plan.strength is not None else np.zeros((n, 1), np.float32)
        return np.concatenate([numbers[:, :dim], last], 1)

    def _numbers(self, sigma: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
        """Return the sketch, the squared length of each layer's sketch, and the inner product with the basis if there is one.

        Shape (n, dim + layers), or (n, dim + layers + 1) with a basis; float32.
        """
        assert self._sums is not None, "no gradient was received"
        plan, n = self.plan, len(self.ids)
        r, device = plan.rank, self._sums.device
        sums = self._sums.transpose(0, 1)
        coordinates = sums[:, :, :r, :r].reshape(n, -1, r * r)
        coefficient = torch.from_numpy((plan.unit / sigma).astype(np.float32)).to(device)
        parts = [self._fold(coordinates, coefficient), coordinates.square().sum(2)]
        if plan.strength is not None:
            products = torch.diagonal(sums[:, :, r:, r:], dim1=2, dim2=3)
            weight = torch.from_numpy((plan.strength / sigma[:, None] ** 2).astype(np.float32)).to(device)
            parts.append((products * weight).sum((1, 2)).unsqueeze(1))
        numbers: npt.NDArray[np.float32] = torch.cat(parts, 1).cpu().numpy()  # one copy from the device
        return numbers

    def compute(
        self, sigma: npt.NDArray[np.float64], factor: npt.NDArray[np.float64]
    ) -> tuple[CollectedRows, npt.NDArray[np.float64]]:
        """Return the rows, and the squared lengths of the layers' sketches for the calibration of the scale.

        Args:
            sigma: (layers,) the per-layer scale to divide by.
            factor: (n,) from :meth:`row_factor`.

        Returns:
            The rows, and (n, layers) float64 squared lengths before the division by ``sigma``.
        """
        numbers = self._numbers(sigma)
        dim, depth = self._fold.dim, len(self.plan.layers)
        with np.errstate(over="ignore", invalid="ignore"):
            squares = numbers[:, dim : dim + depth].astype(np.float64) * (factor[:, None] * self.plan.unit) ** 2
        loss = np.full(len(self.ids), np.nan, np.float32) if self.losses is None else self.losses.float().cpu().numpy()
        product = None if self.plan.strength is None else numbers[:, -1]
        return self.plan.rows(self.ids, numbers[:, :dim], product, loss, self.pooled(), sigma, factor), squares


def row_factor(n: int, grad_scale: float, reduction: str, tokens: IntArray | None) -> npt.NDArray[np.float64]:
    """Return (n,) factors that turn a micro-batch's gradients into those of each sample's own mean loss.

    Args:
        n: samples of the micro-batch.
        grad_scale: accumulation steps divided by the loss scale.
        reduction: "mean" or "sum", how the job's loss joins the tokens of a micro-batch.
        tokens: (n,) valid tokens per sample; None: the same number for all.
    """
    if tokens is None:
        return np.full(n, grad_scale * (n if reduction == "mean" else 1.0))
    counts = np.asarray(tokens, np.float64)
    total = counts.sum() if reduction == "mean" else 1.0
    return np.asarray(grad_scale * np.where(counts > 0, total / np.maximum(counts, 1.0), 0.0), np.float64)
