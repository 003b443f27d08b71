"""Attempt a refresh so that it succeeds on every rank or on none.

Whatever fails on any rank, all ranks leave :meth:`RefreshRunner.run_refresh` with the same outcome, and this rank's state has
not been changed: the caller takes over the result.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from grace_ds.comm.agreement import Agreement
from grace_ds.comm.peer_failure import PeerFailureHandler
from grace_ds.errors import GraceError, PeerFailed, PeerLost, ProbeFailed, TransportError, TransportTimeout, during
from grace_ds.features.limits import Limits
from grace_ds.gradients.collector import GradientCollector
from grace_ds.gradients.influence_probe import Fitted, InfluenceProbe
from grace_ds.refresh import trigger
from grace_ds.refresh.line import RefreshResult, refresh
from grace_ds.refresh.signals import RefreshContext, RefreshInputs, active_parts, weighed_parts

log = logging.getLogger("grace_ds")


@dataclass(frozen=True)
class AgreedRefresh:
    """The result of a refresh that succeeded on all ranks, for this rank to take over.

    Attributes:
        inputs: of the refresh; the outcome's table now holds their rows.
        outcome: the schedule and the table; its counts are of all ranks.
        running_mean: of the loss, for :meth:`~grace_ds.gradients.collector.GradientCollector.drained`.
        fitted: the trusted basis fitted in this refresh; None if none was.
    """

    inputs: RefreshInputs
    outcome: RefreshResult
    running_mean: float | None
    fitted: Fitted | None


@dataclass(frozen=True)
class RefreshAttempt:
    """How an attempt ended.

    Attributes:
        fresh: the result; None if the attempt was given up, on every rank.
        lost: the error that has ended the transport; None while it works.
    """

    fresh: AgreedRefresh | None
    lost: TransportError | None


class RefreshRunner:
    """Attempts refreshes.

    Args:
        context: of the refresh; its ``comm`` is the transport.
        collector: None if nothing is collected.
        influence_probe: fits the trusted basis; None without a trusted set.
        agreement: decides whether a refresh counts when the transport has failed.
        peer_failures: distinguishes a late rank from a lost one.
    """

    def __init__(
        self,
        context: RefreshContext,
        collector: GradientCollector | None,
        influence_probe: InfluenceProbe | None,
        agreement: Agreement,
        peer_failures: PeerFailureHandler,
    ) -> None:
        self.context, self.collector, self.influence_probe, self.agreement = context, collector, influence_probe, agreement
        self.peer_failures = peer_failures
        self.comm = context.comm
        self._attempts = 0

    def change(self, context: RefreshContext) -> None:
        """Continue with ``context``, and without anything that is read from the backward."""
        self.context, self.collector, self.influence_probe = context, None, None

    def run_refresh(self, step: int, version: int, inputs_of: Callable[[], RefreshInputs]) -> RefreshAttempt:
        """Make schedule ``version`` after ``step`` optimizer steps.  Collective; no exception leaves another rank waiting.

        Args:
            inputs_of: returns what this rank knows locally: all inputs except the rows, with the interval that it would choose.
                It is called in here, so that an error in it is agreed on like any other; it may use the transport.

        Raises:
            PeerLost: a rank's process has ended.
            ProbeFailed: a probe has failed while other ranks wait for this one in the job's own collective.
        """
        self._attempts += 1
        where = f"in refresh {version} at step {step}"
        try:
            fresh = self._make(inputs_of)
            return RefreshAttempt(fresh, self._agree(where))
        except (PeerLost, ProbeFailed):
            raise
        except PeerFailed as error:
            log.warning("step %d: %s; schedule %d stays", step, error, version - 1)
            return RefreshAttempt(None, None)
        except TransportError as error:
            self.peer_failures.check(error, where)
            return RefreshAttempt(None, error)
        except Exception as error:
            trace = self.context.config.debug or not isinstance(error, GraceError)
            message = "step %d: refresh %d failed on this rank (%s: %s); schedule %d stays"
            log.warning(message, step, version, type(error).__name__, error, version - 1, exc_info=trace)
            return RefreshAttempt(None, self._tell_others(where))

    def _make(self, inputs_of: Callable[[], RefreshInputs]) -> AgreedRefresh:
        inputs = inputs_of()
        # Every rank has its own clock; rank 0's decides.
        interval = int(self.comm.broadcast(np.array([inputs.interval], np.int64))[0])
        reference, fitted = inputs.reference, None
        wanted = self._wants_basis(inputs, interval) and trigger.basis_due(reference, inputs.version)
        if self.influence_probe is not None and self.influence_probe.ready and wanted:
            with during("trusted basis"):
                fitted = self.influence_probe.fit(inputs.version, self.context.pool.known(inputs.version, inputs.book))
            reference = {**reference, inputs.version: fitted.unit}
        inputs, mean = dataclasses.replace(inputs, interval=interval, reference=reference), None
        if self.collector is not None:
            with during("collect"):
                collect = self.collector.pending(self.comm)
            inputs, mean = dataclasses.replace(inputs, rows=collect.rows, losses=collect.losses), collect.running_mean
        weighed = mean is not None and not inputs.uniform and "loss" in weighed_parts(self.context, inputs)
        if self.influence_probe is not None and self.influence_probe.ready and mean is not None and weighed:
            with during("trusted losses"):
                inputs = dataclasses.replace(
                    inputs, loss_limits=Limits.around(self.influence_probe.losses(inputs.version) - np.float32(mean))
                )
        outcome = refresh(self.context, inputs)
        outcome = dataclasses.replace(outcome, counts=self._of_all_ranks(outcome.counts))
        return AgreedRefresh(inputs, outcome, mean, fitted)

    def _of_all_ranks(self, counts: dict[str, float]) -> dict[str, float]:
        """Return the counts and those of the collection, summed over the ranks: rank 0 records them for all.  Collective."""
        if self.collector is not None:
            counts = counts | {
                "rows_dropped": float(self.collector.rows_dropped),
                "hook_failures": float(self.collector.sketcher.failures),
            }
        total = self.comm.allreduce(np.array(list(counts.values()), np.float64))
        return dict(zip(counts, total.tolist(), strict=True))

    def _wants_basis(self, inputs: RefreshInputs, interval: int) -> bool:
        """Return whether a trusted basis can be fitted now, and will be used: not while the guard has stepped down."""
        if self.collector is None or not self.collector.sketcher.scale.frozen:
            return False
        uses_gradients = "gradients" in active_parts(self.context, inputs)
        return uses_gradients and trigger.wants_basis(self.context.config, inputs.step, interval)

    def _agree(self, where: str) -> TransportError | None:
        """Return once the refresh counts on every rank, with the transport's error if it has failed meanwhile.

        Raises:
            TransportError: the refresh does not count.
        """
        try:
            with during("agreement"):
                self.comm.agree()
        except PeerFailed:
            raise
        except TransportError as error:
            self.peer_failures.check(error, where)  # the store may lie on the host that is lost
            # Perhaps every rank has joined and only the answer was lost: then the others have published, and so must this rank.
            if not self.agreement.abort(self._attempts):
                raise
            return error
        if not self.agreement.commit(self._attempts):
            raise TransportTimeout("another rank had given this refresh up when its wait ran out")
        return None

    def _tell_others(self, where: str) -> TransportError | None:
        try:
            self.comm.abort()
        except TransportError as error:
            self.peer_failures.check(error, where)
            return error
        return None
