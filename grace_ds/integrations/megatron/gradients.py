"""Read gradients in a Megatron job: what one rank of a model collects, probes and follows.

On the ranks with the dataset the controller decides when gradients are collected and what a refresh makes of them; the other
ranks do at each step, and during a refresh, what the leader of their model commands.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import nn
from torch.utils.data import default_collate

from grace_ds.comm.base import Comm
from grace_ds.comm.choose import share
from grace_ds.config.schema import GraceConfig
from grace_ds.data.trusted import split_trusted
from grace_ds.errors import ConfigError, PeerLost, ProbeFailed, TransportError
from grace_ds.gradients.capture import LossCapture, MicroBatchCapture
from grace_ds.gradients.collector import CollectedInterval
from grace_ds.gradients.hooks import Sketcher
from grace_ds.gradients.influence_probe import InfluenceProbe, Probes
from grace_ds.gradients.megatron_layers import select_parallel
from grace_ds.gradients.pipeline_batches import MicroBatches
from grace_ds.gradients.probe_items import SampleForm
from grace_ds.gradients.sharded_collector import ShardedGradientCollector
from grace_ds.integrations.controller import Controller
from grace_ds.integrations.megatron.basis_on_ranks import BasisOnRanks
from grace_ds.integrations.megatron.corpus import Corpus
from grace_ds.integrations.megatron.job_state import Facts
from grace_ds.integrations.megatron.model_ranks import Command, ModelRanks, model_ranks
from grace_ds.integrations.megatron.passes import MegatronPasses, ModelRuns
from grace_ds.integrations.megatron.probe_data import JobItems
from grace_ds.integrations.megatron.schedules import CallRecorder
from grace_ds.records import IntArray

log = logging.getLogger("grace_ds")

ROWS, LOSSES, NOTHING = "rows", "losses", ""


def gradients_of(config: GraceConfig, facts: Facts, chunks: Sequence[nn.Module], holds_data: bool) -> Gradients:
    """Prepare this rank to read gradients.  Collective over all ranks.

    Args:
        chunks: this rank's parts of the model, as ``attach`` got them.
        holds_data: whether this rank has the dataset.

    Raises:
        ConfigError: gradients cannot be read in this job; with the reason, on every rank.
    """
    reasons = [reason for reason in share(_obstacle(config, chunks)) if reason]
    if reasons:
        raise ConfigError(reasons[0])
    from megatron.core import parallel_state

    replica, tensor_rank = facts.geometry.rank, parallel_state.get_tensor_model_parallel_rank()

    def of_model(mine: Any) -> list[Any]:
        """Return the values of the ranks of this model."""
        return [value for place, value in share((replica, mine)) if place == replica]

    layers = select_parallel(chunks, config.collect.layers, config.collect.exclude, tensor_rank, of_model)
    log.info("sketching %d layers: %s … %s", len(layers), layers[0].name, layers[-1].name)
    if getattr(get_model_config(chunks[0]), "calculate_per_token_loss", False):
        config.collect.reduction = "sum"
    sketcher = Sketcher(layers, config.seed, config.collect.dim, config.collect.rank, pipelined=True)
    return Gradients(config, model_ranks(config, replica, holds_data), chunks, sketcher, facts.geometry.rows, tensor_rank == 0)


def _obstacle(config: GraceConfig, chunks: Sequence[nn.Module]) -> str:
    """Return why gradients cannot be read on this rank, with the cure; empty if they can."""
    if not chunks:
        return (
            f"recipe: {config.recipe} sketches the model's layers, and none is known when the training dataset is wrapped: call "
            "grace_ds.megatron.attach(model) before grace_ds.megatron.wrap, or set recipe: content"
        )
    if config.mode == "shadow":
        return (
            f"mode: shadow leaves the job its own order, whose samples have no ids that recipe: {config.recipe} could keep "
            "gradients by; use mode: train, or set recipe: content"
        )
    if getattr(get_model_config(chunks[0]), "fp16", False):
        return (
            f"recipe: {config.recipe} probes without loss scaling, and small gradients are lost in float16: train in bfloat16 "
            "(--bf16), or set recipe: content"
        )
    return ""


def get_model_config(chunk: nn.Module) -> Any:
    """Return the config of a chunk of Megatron's model."""
    from megatron.core import utils

    return utils.get_model_config(chunk)


class MegatronCollector(ShardedGradientCollector):
    """The collector of a rank with the dataset: it lets the model's other ranks take part in its sums.

    Attributes:
        emptied: the rows were stored since the last command about it.
    """

    emptied = False
    ranks: ModelRanks  # = peers

    def pending(self, comm: Comm | None) -> CollectedInterval:
        """See :meth:`ShardedGradientCollector.pending`.  Collective over all ranks of the model."""
        self.ranks.send("pending")
        return super().pending(comm)

    def drained(self, running_mean: float | None) -> None:
        """See :meth:`GradientCollector.drained`."""
        super().drained(running_mean)
        self.emptied = True


class Gradients:
    """What a rank reads of the job's steps, and how it takes part in probes.

    Args:
        config: of the job.
        ranks: that hold one model together with this one.
        chunks: this rank's parts of the model.
        sketcher: over the layers of the whole model, not attached yet.
        rows: samples of a micro-batch.
        counts_losses: whether this rank's losses count: tensor-parallel peers all have the same ones.

    Attributes:
        kind: what is read of the step in progress: "rows", "losses" or nothing.
        ids: returns the ids of the step's micro-batch k; on a rank with the dataset.
    """

    def __init__(
        self,
        config: GraceConfig,
        ranks: ModelRanks,
        chunks: Sequence[nn.Module],
        sketcher: Sketcher,
        rows: int,
        counts_losses: bool,
    ) -> None:
        self.config, self.ranks, self.sketcher, self.chunks = config, ranks, sketcher, list(chunks)
        kind = MegatronCollector if ranks.holds_data else ShardedGradientCollector
        self.collector = kind(sketcher.attach(), config.collect, ranks, ranks.leads, counts_losses)
        if isinstance(self.collector, MegatronCollector):
            self.collector.ranks = ranks
        self.micro = MicroBatches(chunks, sketcher, 1, self._ids, counts_losses, lambda: self.kind == LOSSES)
        self.recorder = CallRecorder(self.micro.begin)
        self.runs = ModelRuns(ranks, self.recorder, chunks, self.collector, rows)
        self.basis = BasisOnRanks(ranks, sketcher)
        self.kind = NOTHING
        self.ids: Callable[[int], IntArray] | None = None
        self._step, self._lost = 0, False

    def close(self) -> None:
        """Remove all hooks, restore Megatron's functions, and close the transport.  A second call does nothing."""
        self._stop()
        self.recorder.close()
        self.ranks.comm.close()

    def _stop(self) -> None:
        self.kind, self._lost = NOTHING, True
        self.micro.detach()
        self.sketcher.detach()

    def _ids(self, micro: int) -> IntArray | None:
        if self.kind == NOTHING:
            return None
        return self.ids(micro) if self.ids is not None else np.arange(self.runs.rows, dtype=np.int64)

    def grad_scale(self, loss_scale: float) -> float:
        """Return the factor that turns the gradients of the step that was just made into those of its mean loss.

        Megatron divides each micro-batch's loss by their number, except where it sums the losses of all tokens.  A rank has
        the gradient of its own tokens' share, times the context-parallel size.
        """
        if self.config.collect.reduction == "sum":
            return 1.0 / loss_scale
        from megatron.core import parallel_state

        return self.micro.count / (int(parallel_state.get_context_parallel_world_size()) * loss_scale)

    # -- on a rank with the dataset ------------------------------------------------------------------------------------

    def influence_probe(self, comm: Comm, corpus: Corpus, trusted: Any, facts: Facts) -> InfluenceProbe:
        """Return the probe of the trusted samples.

        Args:
            comm: between the ranks with the dataset.
            corpus: the pool.
            trusted: map-style dataset of trusted samples.

        Raises:
            DataError: the trusted samples cannot be run through the model.
        """
        config, geometry = self.config, facts.geometry
        items = JobItems(trusted, corpus[0], config.features.tokens_key)
        form = SampleForm(_vocabulary(self.chunks), config.features.tokens_key)
        form.check_all(items, default_collate)
        return InfluenceProbe(
            MegatronPasses(self.runs, self.basis, comm, form),
            self.sketcher,
            items,
            split_trusted(len(items), config.seed),
            corpus,
            comm,
            config.seed,
            Probes.of(config.refresh.probe_share, config.refresh.interval_steps, geometry.batch),
            replicas=(geometry.rank, geometry.ranks),
            reports=self.ranks.leads,
        )

    def release(self, controller: Controller | None, error: BaseException | None) -> None:
        """Send the ranks that follow what the next step gives, whatever came of the refresh.  Collective over the model's ranks.

        Args:
            controller: None if it could not be made.
            error: that leaves the step on this rank; after some, no rank receives any more.
        """
        if self._lost or isinstance(error, PeerLost | ProbeFailed):
            return
        goes_on, kind = False, NOTHING
        if controller is not None and error is None and controller.collector is not None and not controller.frozen:
            goes_on, kind = True, ROWS if controller.collecting else LOSSES if controller.reading else NOTHING
        try:
            if goes_on:
                self.basis.share()
            emptied = isinstance(self.collector, MegatronCollector) and self.collector.emptied
            self.ranks.send("step", kind=kind, emptied=emptied, ends=not goes_on)
        except TransportError as lost:
            if goes_on and controller is not None:
                controller.retire(str(lost))
            goes_on, kind = False, NOTHING
        if isinstance(self.collector, MegatronCollector):
            self.collector.emptied = False
        self.kind = kind
        if not goes_on:
            self._stop()

    # -- on a rank without the dataset ---------------------------------------------------------------------------------

    def follow(self, applied: bool, loss_scale: float) -> None:
        """Keep what this rank has of the step that was just made, then execute the commands of the leader until the next one.

        Args:
            applied: False if the step was skipped for an overflow.
            loss_scale: of the step.
        """
        if self._lost:
            return
        self._step += 1
        captures = self.micro.take()
        gradients = [capture for capture in captures if isinstance(capture, MicroBatchCapture)]
        try:
            if applied:
                self.collector.read([capture for capture in captures if isinstance(capture, LossCapture)], self._step)
            if applied and self.kind == ROWS:
                self.collector.commit(gradients, self._step, self.grad_scale(loss_scale), None)
            else:
                self.collector.discard(gradients)
        except TransportError as error:
            self._give_up(error)
        self.listen()

    def listen(self) -> None:
        """Execute the commands of the leader up to the one that begins the next step.  Collective over the model's ranks."""
        try:
            while not self._lost and not self._execute(self.ranks.receive()):
                pass
        except TransportError as error:
            self._give_up(error)

    def _give_up(self, error: TransportError) -> None:
        log.error("%s; this rank reads no more gradients: training goes on with the schedule at hand", error)
        self._stop()

    def _execute(self, command: Command) -> bool:
        """Execute ``command``; return whether the next step is to be made now."""
        runs, what, count = self.runs, command["what"], int(command.get("count", 0))
        if what == "step":
            self.kind = str(command["kind"])
            if command["emptied"]:
                self.collector.drained(None)
            if command["ends"]:
                self._stop()
            return True
        if what == "pending":
            self.collector.pending(None)
        elif what == "basis":
            self.basis.take(command)
        elif what == "gradients":
            runs.sink = runs.sink_of(str(command["kind"]))
            runs.gradients([None] * count, count, runs.sink)
        elif what == "sum":
            assert runs.sink is not None
            self.ranks.allreduce(runs.sink.pack())
            runs.sink = None
        elif what == "rows":
            runs.rows_of([None] * count, runs.placeholders(count))
        elif what == "losses":
            runs.losses_of([None] * count, runs.placeholders(count))
        return False


def _vocabulary(chunks: Sequence[nn.Module]) -> int | None:
    """Return the rows of the token embedding over all tensor-parallel ranks; None if it lies on another rank."""
    from megatron.core.tensor_parallel import VocabParallelEmbedding

    modules = (module for chunk in chunks for module in chunk.modules())
    return next((int(module.num_embeddings) for module in modules if isinstance(module, VocabParallelEmbedding)), None)
