"""Build the controller of an engine from its parts: transport, window, features, hooks, trusted set."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from grace_ds.comm.agreement import agreement_of
from grace_ds.comm.all_ranks import run_on_all_ranks
from grace_ds.comm.base import Comm
from grace_ds.comm.choose import choose
from grace_ds.comm.liveness import LivenessProbe
from grace_ds.comm.time_limits import within_job_limit
from grace_ds.config.schema import FeaturesConfig, GraceConfig
from grace_ds.data.iterable import IterableBuffer
from grace_ds.data.iterable_pool import IterablePool
from grace_ds.data.order import Order, SeededOrder
from grace_ds.data.pool import Pool, Windows, check_repeats, read_ids, read_sources
from grace_ds.data.sampler import Geometry
from grace_ds.data.trusted import split_trusted
from grace_ds.errors import ConfigError
from grace_ds.features.content import ContentFeatures, TokenReader, content_features, follow_window
from grace_ds.features.corpus_cache import CorpusCache
from grace_ds.features.duplicates import COPIES
from grace_ds.features.precomputed import Manifest, check_precomputed, first_window
from grace_ds.features.quality import QualityModel
from grace_ds.gradients.influence_probe import InfluenceProbe, Probes
from grace_ds.gradients.passes import ModulePasses, Passes
from grace_ds.gradients.probe_items import SampleForm
from grace_ds.gradients.sharded_collector import ShardedGradientCollector
from grace_ds.integrations.controller import Controller
from grace_ds.integrations.engine import is_pipeline, shares_model
from grace_ds.integrations.pipeline_passes import PipelinePasses
from grace_ds.integrations.shared_model import collector_of, sketcher_of
from grace_ds.integrations.trusted_set import UserInputs, trusted_set
from grace_ds.monitor.metrics import monitor_of, preview_of
from grace_ds.recipes import AUTO, recipe
from grace_ds.records import IntArray, Schedule
from grace_ds.refresh.projection import PCAProjection
from grace_ds.refresh.signals import RefreshContext
from grace_ds.utils.threads import threads_of_rank

log = logging.getLogger("grace_ds")

# Largest error of the relative chance of a text with five copies (0.20 of a unique text's) that gives no warning.
MISSED = 0.10

Reader = TypeVar("Reader")


def build_controller(
    engine: Any,
    dataset: Any,
    config: GraceConfig,
    geometry: Geometry,
    collate: Callable[[list[Any]], Any],
    user_inputs: UserInputs,
) -> Controller:
    """Build the controller of an engine; the engine itself is not changed yet.  Collective.

    Args:
        dataset: the job's own, map-style.
        collate: the job's collate function, for the trusted probe.
        user_inputs: the job's inputs that the config cannot hold.

    Raises:
        ConfigError, DataError: the config cannot be satisfied; on every rank.
    """
    if config.total_steps and not isinstance(dataset, IterableBuffer):
        n = len(dataset)
        repeats = check_repeats(config.total_steps, geometry.batch, config.budget, n, config.max_repeats)
        log.info("implied repeats of a chosen sample: %.2f", repeats)
    fallback = fallback_of(config)
    config, sketcher = settled(config, lambda config: sketcher_of(config, engine))
    # Ranks that work on the same samples must agree on them, so all of them take part in one refresh.
    group = None if shares_model(engine) else engine.data_parallel_group
    comm = choose(config.comm, dp_group=group, timeout=within_job_limit(config.refresh.timeout_seconds))
    probed = sketcher is not None and "gradients" in config.parts

    def read() -> tuple[Components, SampleForm]:
        parts = prepare(dataset, config, geometry, user_inputs)
        form = SampleForm.of(engine.module, dataset, config.features.tokens_key) if parts.trusted is not None else SampleForm()
        if parts.trusted is not None:
            form.check_all(parts.trusted, collate if probed else None)
        return parts, form

    undo: list[Callable[[], None]] = [comm.close]
    try:
        parts, form = run_on_all_ranks(comm, read)
        context = refresh_context(comm, config, geometry, parts, device=str(engine.device))
        collector = None
        if sketcher is not None:
            undo.append(sketcher.detach)
            collector = collector_of(engine, config, sketcher.attach(), comm, geometry)
        influence_probe = None
        if collector is not None and parts.trusted is not None and probed:
            shared = isinstance(collector, ShardedGradientCollector)
            passes: Passes
            if is_pipeline(engine):
                passes = PipelinePasses(engine, collector, collate, geometry.rows, comm, form)
            else:
                device, loss_fn = torch.device(engine.device), user_inputs.loss_fn
                passes = ModulePasses(engine.module, collector, collate, geometry.rows, device, loss_fn, comm, form, shared)
            influence_probe = InfluenceProbe(
                passes,
                collector.sketcher,
                parts.trusted,
                split_trusted(len(parts.trusted), config.seed),
                dataset,
                comm,
                config.seed,
                Probes.of(config.refresh.probe_share, config.refresh.interval_steps, geometry.batch),
                (geometry.rank, geometry.ranks),
                not isinstance(collector, ShardedGradientCollector) or collector.leader,
            )
        show = preview_of(dataset, config.features.tokens_key)
        agreement, liveness = agreement_of(comm), LivenessProbe.open(os.environ)
        return Controller(
            config, geometry, context, collector, agreement, liveness, influence_probe, monitor_of(engine), show, fallback
        )
    except BaseException:
        while undo:
            undo.pop()()
        raise


def settled(config: GraceConfig, reads: Callable[[GraceConfig], Reader]) -> tuple[GraceConfig, Reader | None]:
    """Return the config with ``recipe: auto`` decided, and what reads the model's gradients; None if nothing is collected.

    Args:
        reads: returns the latter, or raises a ConfigError where gradients cannot be read; the same on every rank.

    Raises:
        ConfigError: the config names gradients or layers that cannot be used.
    """
    fallback = fallback_of(config)
    config = replace(config, recipe=recipe(config.recipe).name)
    if config.replay is not None or not config.collects:
        return config, None
    try:
        reader = reads(config)
    except ConfigError as error:
        if fallback is None:
            raise
        log.info("recipe: auto is %s here: %s", fallback, error)
        return replace(config, recipe=fallback, ablate=[]), None
    log.info("recipe: %s", config.recipe)
    return config, reader


def fallback_of(config: GraceConfig) -> str | None:
    """Return what ``recipe: auto`` becomes if gradients cannot be used; None if the config names them explicitly."""
    auto = config.recipe == AUTO and list(config.collect.layers) == ["auto"]
    return recipe(config.recipe).fallback if auto else None


@dataclass(frozen=True)
class Components:
    """What can be read before any collective.

    Attributes:
        pool: the windows.
        order: of the corpus, used wherever nothing is chosen.
        reader: of the dataset's tokens; None without content features.
        trusted: map-style dataset of trusted samples; None without.
        quality_model: the trusted n-gram model; None without.
        include, exclude: sorted ids.
        sources: (n,) source of every sample; None if they are not known.
    """

    pool: Windows
    order: Order
    reader: TokenReader | None
    trusted: Any
    quality_model: QualityModel | None
    include: IntArray
    exclude: IntArray
    sources: IntArray | None = None


def prepare(dataset: Any, config: GraceConfig, geometry: Geometry, user_inputs: UserInputs) -> Components:
    """Open and check everything that the config names.

    Raises:
        ConfigError, DataError: something cannot be read, or does not fit together.
    """
    pool: Windows
    interval = config.refresh.interval_steps
    if isinstance(dataset, IterableBuffer):
        pool = IterablePool(dataset, config.window, config.budget, interval, geometry.batch, geometry.ranks)
    else:
        pool = Pool(len(dataset), config.window, config.budget, interval, geometry.batch, config.seed)
    n = len(dataset)
    selection = config.selection
    include, exclude = (read_ids(path, n) if path else np.empty(0, np.int64) for path in (selection.include, selection.exclude))
    both = np.intersect1d(include, exclude)
    if len(both):
        raise ConfigError(f"sample {int(both[0])} is in selection.include and in selection.exclude; drop it from one")
    reader = None
    if config.features.enabled and config.replay is None and recipe(config.recipe).content:
        reader = reader_of(dataset, config.features)
    trusted = trusted_set(dataset, reader, config, user_inputs) if recipe(config.recipe).trusted else None
    quality_model = None
    if trusted is not None and reader is not None:
        tokens = reader_of(trusted, config.features).all()
        quality_model = QualityModel.fit(tokens.flat, tokens.offsets)
    sources = read_sources(selection.sources, n) if selection.sources is not None else None
    if config.features.precomputed is not None and reader is not None and isinstance(pool, Pool):
        dim, folder = config.features.dim if config.builds_graph else 0, Path(config.features.precomputed)
        blocks = first_window(pool, config.start_step)
        check_precomputed(folder, Manifest.of(reader, dim, config.seed, quality_model, blocks))
    order = user_inputs.order or SeededOrder(n, config.seed)
    return Components(pool, order, reader, trusted, quality_model, include, exclude, sources)


def reader_of(dataset: Any, features: FeaturesConfig) -> TokenReader:
    """Return the reader of a dataset's tokens that the config describes."""
    return TokenReader(dataset, features.tokens_key, features.max_tokens, features.separator)


def refresh_context(
    comm: Comm,
    config: GraceConfig,
    geometry: Geometry,
    parts: Components,
    arrange: Callable[[Schedule], Schedule] | None = None,
    device: str = "cpu",
) -> RefreshContext:
    """Return the context of all refreshes of the run.

    Args:
        arrange: what root does to a schedule before it is published; None: nothing.
        device: of the job's model, as torch names it.
    """
    labels = parts.sources
    return RefreshContext(
        comm=comm,
        config=config,
        pool=parts.pool,
        order=parts.order,
        batch=geometry.batch,
        contents=Contents(comm, config, parts),
        include=parts.include,
        exclude=parts.exclude,
        trusted=parts.quality_model.held_out if parts.quality_model is not None else None,
        sources=(lambda ids: np.asarray(labels[ids])) if labels is not None else None,
        arrange=arrange,
        chart=_chart(config, parts) if config.run_dir is not None and comm.rank == 0 else None,
        device=device,
    )


def _chart(config: GraceConfig, parts: Components) -> PCAProjection | None:
    """Return the projection of the samples' tokens; None if tokens are not read."""
    features = config.features
    return None if parts.reader is None else PCAProjection(parts.reader.dataset, features.tokens_key, features.dim, config.seed)


class Contents:
    """Content features of the window's samples: kept for samples that stay, read for samples that enter."""

    def __init__(self, comm: Comm, config: GraceConfig, parts: Components) -> None:
        self.comm, self.config, self.parts = comm, config, parts
        self._warned = False

    @cached_property
    def _cache(self) -> CorpusCache | None:
        features, reader = self.config.features, self.parts.reader
        if reader is None or (features.cache_dir is None and features.precomputed is None):
            return None
        folder, precomputed = (None if path is None else Path(path) for path in (features.cache_dir, features.precomputed))
        return CorpusCache(reader.token_fingerprint(), folder, precomputed, self.comm.rank == 0)

    def __call__(self, kept: ContentFeatures | None, ids: IntArray) -> ContentFeatures:
        """Return the features of ``ids`` (n,), sorted: this rank's share of the window.  Collective if the window has moved.

        Args:
            kept: features of the previous window, on all ranks or on none.
        """
        reader, config, rolls = self.parts.reader, self.config, bool(self.parts.pool.advance)
        if reader is None:
            return ContentFeatures(ids, np.zeros(len(ids), np.float32), None, None, None)
        if kept is not None and not rolls:
            return kept
        common: dict[str, Any] = {"dim": config.features.dim, "seed": config.seed, "trusted": self.parts.quality_model}
        common |= {"allreduce": self.comm.allreduce, "cache": self._cache}
        common["threads"] = config.features.threads or threads_of_rank(os.environ)
        if kept is not None:
            features = follow_window(kept, reader, ids, **common)
        else:
            features = content_features(
                reader,
                ids,
                **common,
                want_density=True,
                want_tfidf=config.builds_graph,
                want_statistics=config.collects,
                keep_counts=rolls,
            )
        self._watch(features.density_ratio)
        return features

    def _watch(self, ratio: float) -> None:
        """Warn once, on rank 0, if the 6-gram counts no longer distinguish copies from unique texts."""
        if abs(ratio - 1 / COPIES) > MISSED and self.comm.rank == 0 and not self._warned:
            self._warned = True
            log.warning(
                "near-duplicates are hardly seen: a text that stands five times in the window has %.2f of a unique one's chance "
                "where 0.20 is right, for the 6-gram counts are too full; set window to fewer samples than %d, best to at most "
                "10000000, and start anew instead of resuming",
                ratio,
                self.parts.pool.size,
            )
