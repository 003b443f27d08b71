"""Attach hooks to the chosen layers; they are idle between captures, and removed by detach and after an exception.

The job's numbers are never touched: hooks return nothing and draw nothing from any global random state.  Of a layer's
input they keep only its projection (rank + trusted rank numbers per token), so that checkpointing keeps its effect.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import nn

from grace_ds.errors import CheckpointError, ConfigError
from grace_ds.gradients.basis import TRUSTED_RANK, BasisAccumulator, TrustedBasis
from grace_ds.gradients.capture import CollectedRows, HookSink, LossCapture, Meter, MicroBatchCapture, Plan
from grace_ds.gradients.kfac import MomentAccumulator
from grace_ds.gradients.layers import Layer
from grace_ds.gradients.losses import sample_losses
from grace_ds.gradients.projection import Fold, Side, bases, signs
from grace_ds.gradients.scale import LayerScale
from grace_ds.records import HIDDEN, IntArray

logger = logging.getLogger("grace_ds")


def _in_backward() -> bool:
    # torch.utils.checkpoint itself uses this to distinguish a recomputation from a first pass.
    return bool(torch._C._current_graph_task_id() != -1)


def _own_dtype(device_type: str) -> AbstractContextManager[Any]:
    """Disable autocast for the sketch products: it would copy a whole float32 input just to narrow it."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


class Sketcher:
    """Hooks on ``layers`` and their projections.  A context manager: attaches on entry, detaches on exit.

    Args:
        layers: from :func:`~grace_ds.gradients.layers.select_layers`.
        seed: of the bases and of the fold; equal on all ranks.
        dim: width of the folded sketch.
        rank: rows of the base of each side.
        pipelined: several micro-batches are in flight at once; their backward passes follow the order of their forwards.
    """

    def __init__(self, layers: Sequence[Layer], seed: int, dim: int = 256, rank: int = 8, pipelined: bool = False) -> None:
        if not layers or dim < 1 or rank < 1:
            raise ConfigError(f"collect needs layers, a dim and a rank; got {len(layers)} layers, {dim=}, {rank=}")
        self.layers = list(layers)
        self.names = [layer.name for layer in layers]
        self.seed, self.dim, self.rank, self.pipelined = seed, dim, rank, pipelined
        self.scale = LayerScale(self.names)
        self.failures = 0  # exceptions inside these hooks; the job goes on
        self.seconds = 0.0  # wall time spent in the hooks (on a GPU: launching their work) and reading losses
        self._fold = Fold(self.names, seed, rank, dim)
        self._meter = Meter()
        self._handles: list[Callable[[], None]] = []
        self._in_flight: list[HookSink] = []  # pipelined: in the order of their forwards
        self._current: HookSink | None = None  # takes forwards
        self._latest: HookSink | None = None  # receives the recomputations inside its backward
        self._reading: LossCapture | None = None  # receives the losses of a micro-batch without sketches
        self._warned: set[str] = set()
        # The last layer that reads the residual stream: its input is as wide as the narrowest one of all layers.
        narrowest = min(layer.inputs for layer in self.layers)
        self._pooled = max(i for i, layer in enumerate(self.layers) if layer.inputs == narrowest)
        signed = signs(self.names[self._pooled], seed, "hidden", (HIDDEN, narrowest))
        self._pooling = torch.from_numpy(np.ascontiguousarray(signed.T))
        self._basis: TrustedBasis | None = None
        self._plan = self._make_plan()

    # -- lifetime ------------------------------------------------------------------------------------------------------

    def attach(self) -> Sketcher:
        """Register one forward hook per layer; a second call does nothing."""
        if not self._handles:
            try:
                for index, layer in enumerate(self.layers):
                    if layer.here and layer.module is not None and layer.rule is not None:
                        self._handles.append(layer.rule.watch(layer.module, self._hook(index, layer)))
            except BaseException:
                self.detach()
                raise
        return self

    def detach(self) -> None:
        """Remove every hook and close the open capture; a second call does nothing."""
        for remove in self._handles:
            remove()
        self._handles.clear()
        self._in_flight.clear()
        if self._latest is not None:
            self._latest.close()
        self._current = self._latest = self._reading = None

    def __enter__(self) -> Sketcher:
        return self.attach()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.detach()

    # -- captures ------------------------------------------------------------------------------------------------------

    def begin(self, ids: IntArray) -> MicroBatchCapture:
        """Capture the forwards from here to :meth:`end`, and their backward, for the samples ``ids`` (n,) int64."""
        capture = MicroBatchCapture(ids, self._plan, self._fold, self._meter)
        self.route(capture)
        return capture

    def read(self, ids: IntArray) -> LossCapture:
        """Read only the losses of the samples ``ids`` (n,) int64 at the next :meth:`observe_loss`; the hooks stay idle."""
        self._current = self._latest = None
        self._reading = LossCapture(ids)
        return self._reading

    def route(self, target: HookSink) -> None:
        """Send what the hooks capture to ``target``, until :meth:`end`."""
        self._current = self._latest = target
        self._reading = None
        if self.pipelined and not any(sink is target for sink in self._in_flight):
            self._in_flight = [*(sink for sink in self._in_flight if not sink.closed), target]

    def end(self) -> None:
        """End the forward: later forwards are not captured, the backward of this one still is."""
        self._current = None

    def discard(self, capture: HookSink) -> None:
        """Drop a capture whose backward never came or whose step was not applied."""
        capture.close()

    def observe_loss(self, output: Any) -> None:
        """Read the per-sample losses and token counts of the current micro-batch.  Call it before the backward."""
        target = self._reading if self._reading is not None else self._latest
        if not isinstance(target, MicroBatchCapture | LossCapture) or (isinstance(target, MicroBatchCapture) and target.closed):
            return
        started = time.perf_counter()
        held, latest = self._current, self._latest
        self._current = self._latest = None  # reading may recompute a checkpointed loss
        try:
            found = sample_losses(output, len(target.ids))
            if found is not None:
                target.losses, target.tokens = found
        except Exception as error:
            self._warn_once("losses", "losses cannot be read from the autograd graph (%r); rows go without", error)
        finally:
            self._current, self._latest = held, latest
            self.seconds += time.perf_counter() - started

    def finish(
        self, capture: MicroBatchCapture, grad_scale: float = 1.0, reduction: str = "mean", tokens: IntArray | None = None
    ) -> CollectedRows | None:
        """Turn a capture whose backward is over into rows, and close it.

        Args:
            capture: from :meth:`begin`.
            grad_scale: factor that turns the job's gradients into those of its loss: accumulation steps
                divided by the loss scale.
            reduction: "mean" or "sum", how the job's loss joins the tokens of a micro-batch.
            tokens: (n,) valid tokens per sample; default: those that :meth:`observe_loss` found.

        Returns:
            The rows; None if no gradient arrived or the capture is spoiled.
        """
        if reduction not in ("mean", "sum"):
            raise ConfigError(f"collect.reduction={reduction!r} is not known; use 'mean' or 'sum'")
        try:
            if capture.spoiled or not capture.backward_seen or capture.closed:
                return None
            missing = [layer.name for i, layer in enumerate(self.layers) if layer.here and i not in capture.seen]
            if missing:
                message = "%d of the sketched layers had no gradient, e.g. %s; they count as zero"
                self._warn_once("missing", message, len(missing), missing[0])
            factor = capture.row_factor(grad_scale, reduction, tokens)
            collected, squares = capture.compute(self.scale.sigma, factor)
            self.scale.add(squares)
            return collected
        finally:
            capture.close()

    # -- trusted basis -------------------------------------------------------------------------------------------------

    @property
    def basis(self) -> TrustedBasis | None:
        """The trusted basis in force."""
        return self._basis

    def set_basis(self, basis: TrustedBasis | None) -> None:
        """Set the basis (equal on all ranks) whose alignment is measured from the next :meth:`begin` on."""
        self._basis = basis
        self._plan = self._make_plan()

    def accumulator(self, rank: int = TRUSTED_RANK) -> BasisAccumulator:
        """Return an empty accumulator for a basis of ``rank`` factors per layer, fed through :meth:`route`."""
        return BasisAccumulator(self.layers, self.seed, rank, self._meter)

    def moments(self) -> MomentAccumulator:
        """Return an empty accumulator of the layers' second moments, fed through :meth:`route`."""
        return MomentAccumulator(self.layers, self.seed, meter=self._meter)

    def _make_plan(self) -> Plan:
        sides: list[tuple[Side, Side]] = []
        units: list[float] = []
        for layer in self.layers:
            left, right, unit = bases(layer.name, self.seed, self.rank, layer.inputs, layer.outputs)
            if not layer.here:  # kept only for its position and its unit
                left, right = left[:0], right[:0]
            elif self._basis is not None:
                u, _, v = self._basis.factors[layer.name]
                left, right = np.concatenate([left, u.T]), np.concatenate([right, v.T])
            sides.append((Side(layer.split.block("in", left)), Side(layer.split.block("out", right))))
            units.append(unit)
        strength = None
        if self._basis is not None:
            strength = np.stack([self._basis.factors[name][1] for name in self.names])
        version = -1 if self._basis is None else self._basis.version
        return Plan(self.layers, sides, np.array(units), self.rank, strength, version, self._pooled, self._pooling)

    # -- memory, state -------------------------------------------------------------------------------------------------

    @property
    def peak_bytes(self) -> int:
        """Maximum number of bytes held since the last :meth:`reset_peak`: bases, projections and sums."""
        return self._meter.peak + sum(side.nbytes for pair in self._plan.sides for side in pair)

    def reset_peak(self) -> None:
        """Start a new high-water mark from what is held now."""
        self._meter.peak = self._meter.now

    def state_dict(self) -> dict[str, Any]:
        """Return what old sketches need to compare with new ones: widths, seed and the per-layer scale.  JSON-able."""
        return {"seed": self.seed, "dim": self.dim, "rank": self.rank, "scale": self.scale.state_dict()}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Check that :meth:`load_state_dict` can restore ``state``; change nothing.

        Raises:
            CheckpointError: ``state`` has other layers, another seed or other widths, so old sketches do not compare.
        """
        for key, value in (("seed", self.seed), ("dim", self.dim), ("rank", self.rank)):
            if state.get(key) != value:
                raise CheckpointError(
                    f"the checkpoint's sketches were made with {key}={state.get(key)}, this run has {key}={value}; restore "
                    "the old collect settings, or start without the old GRACE state"
                )
        self.scale.read(state.get("scale", {}))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state saved by :meth:`state_dict`.

        Raises:
            CheckpointError: as :meth:`check_state`.
        """
        self.check_state(state)
        self.scale.load_state_dict(state["scale"])

    # -- hooks ---------------------------------------------------------------------------------------------------------

    def _hook(self, index: int, layer: Layer) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            target = self._latest
            if target is None:
                return
            started = time.perf_counter()
            try:
                self._on_forward(target, index, layer, args, output)
            except Exception as error:
                self._spoil(target, layer.name, error)
            self.seconds += time.perf_counter() - started

        return hook

    def _on_forward(self, target: HookSink, index: int, layer: Layer, args: tuple[Any, ...], output: Any) -> None:
        if target.closed:
            self._current = self._latest = None
            return
        if not torch.is_grad_enabled():
            if self._current is not None or _in_backward():
                target.defer(index)
            return
        if _in_backward():
            claimed = self._claim(index)
            if claimed is None:
                return
            target = claimed
        elif self._current is None:
            return
        assert layer.rule is not None
        found = layer.rule.tensors(args, output)
        if found is None:
            message = "layer %s is not sketched: its call has a form that its rule %s cannot read"
            self._warn_once(layer.name, message, layer.name, type(layer.rule).__name__)
            return
        if not found[1].requires_grad:
            return
        x, out = found
        with _own_dtype(x.device.type):
            receive = target.capture(index, x)
        if receive is None:
            message = "layer %s is not sketched: its input %s does not split by sample"
            self._warn_once(layer.name, message, layer.name, tuple(x.shape))
            return

        def on_grad(grad: torch.Tensor) -> None:
            started = time.perf_counter()
            try:
                with _own_dtype(grad.device.type):
                    receive(grad)
            except Exception as error:
                self._spoil(target, layer.name, error)
            self.seconds += time.perf_counter() - started

        out.register_hook(on_grad)  # type: ignore[no-untyped-call]

    def _claim(self, index: int) -> HookSink | None:
        """Return the sink whose forward of layer ``index`` is being recomputed; None if there is none.

        This is the latest forward, or in a pipeline the oldest that waits.
        """
        waiting = self._in_flight if self.pipelined else [self._latest]
        return next((sink for sink in waiting if sink is not None and not sink.closed and sink.claim(index)), None)

    def _spoil(self, target: HookSink, name: str, error: Exception) -> None:
        target.spoiled = True
        self.failures += 1
        message = "sketching layer %s failed (%r); this micro-batch gives no rows, training goes on"
        self._warn_once("failure", message, name, error)

    def _warn_once(self, key: str, message: str, *args: Any) -> None:
        if key not in self._warned:  # one warning per micro-batch would bury the job's own log
            self._warned.add(key)
            logger.warning(message, *args)
