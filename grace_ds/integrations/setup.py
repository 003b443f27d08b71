"""Puts a controller together for an engine: transport, window, features, hooks, trusted set."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from grace_ds.comm.agreement import agreement_of
from grace_ds.comm.all_ranks import run_on_all_ranks
from grace_ds.comm.base import Comm
from grace_ds.comm.choose import choose
from grace_ds.comm.liveness import LivenessProbe
from grace_ds.comm.time_limits import within_job_limit
from grace_ds.config.schema import GraceConfig
from grace_ds.data.order import Order, SeededOrder
from grace_ds.data.pool import Pool, check_repeats, read_ids, read_sources
from grace_ds.data.sampler import Geometry
from grace_ds.data.trusted import split_trusted
from grace_ds.errors import ConfigError
from grace_ds.features.content import ContentFeatures, TokenReader, content_features, follow_window
from grace_ds.features.duplicates import COPIES
from grace_ds.features.quality import QualityModel
from grace_ds.gradients.collector import GradientCollector
from grace_ds.gradients.hooks import Sketcher
from grace_ds.gradients.influence_probe import InfluenceProbe, Probes
from grace_ds.gradients.layers import select_layers
from grace_ds.gradients.probe_items import SampleForm
from grace_ds.integrations.controller import Controller
from grace_ds.integrations.engine import is_pipeline, shares_model
from grace_ds.integrations.trusted_set import UserInputs, trusted_set
from grace_ds.monitor.metrics import monitor_of, preview_of
from grace_ds.recipes import AUTO, recipe
from grace_ds.records import IntArray, Schedule
from grace_ds.refresh.projection import PCAProjection
from grace_ds.refresh.signals import RefreshContext

log = logging.getLogger("grace_ds")

MISSED = 0.10  # so far off is the chance of five copies, 0.20 of a unique text's, that it is said


def build_controller(
    engine: Any,
    dataset: Any,
    config: GraceConfig,
    geometry: Geometry,
    collate: Callable[[list[Any]], Any],
    user_inputs: UserInputs,
) -> Controller:
    """The controller of an engine; nothing of the engine is changed yet.  Collective.

    Args:
        dataset: the job's own, map-style.
        collate: the job's, for the trusted probe.
        extras: what the config cannot hold.

    Raises:
        ConfigError, DataError: what is asked for cannot be had; on every rank.
    """
    n = len(dataset)
    if config.total_steps:
        repeats = check_repeats(config.total_steps, geometry.batch, config.budget, n, config.max_repeats)
        log.info("implied repeats of a chosen sample: %.2f", repeats)
    fallback = _fallback(config)
    config, sketcher = settled(config, engine)
    # Ranks that work on the same samples must agree on them, so that all take part in one refresh.
    group = None if shares_model(engine) else engine.data_parallel_group
    comm = choose(config.comm, dp_group=group, timeout=within_job_limit(config.refresh.timeout_seconds))
    probed = sketcher is not None and "gradients" in config.parts
    whole = not (shares_model(engine) or is_pipeline(engine))

    def read() -> tuple[Components, SampleForm]:
        parts = prepare(dataset, config, geometry, user_inputs)
        form = (
            SampleForm.of(engine.module, dataset, config.features.tokens_key)
            if whole and parts.trusted is not None
            else SampleForm()
        )
        if parts.trusted is not None:
            form.check_all(parts.trusted, collate if probed else None)
        return parts, form

    undo: list[Callable[[], None]] = [comm.close]
    try:
        parts, form = run_on_all_ranks(comm, read)
        context = refresh_context(comm, config, geometry, parts, device=str(engine.device))
        collector = GradientCollector(sketcher.attach(), config.collect) if sketcher is not None else None
        if collector is not None:
            undo.append(collector.sketcher.detach)
        influence_probe = None
        if collector is not None and parts.trusted is not None and probed:
            influence_probe = InfluenceProbe(
                engine.module,
                collector.sketcher,
                parts.trusted,
                split_trusted(len(parts.trusted), config.seed),
                dataset,
                collate,
                geometry.rows,
                torch.device(engine.device),
                user_inputs.loss_fn,
                comm,
                config.seed,
                Probes.of(config.refresh.probe_share, config.refresh.interval_steps, geometry.batch),
                form,
            )
        show = preview_of(dataset, config.features.tokens_key)
        agreement, call = agreement_of(comm), LivenessProbe.open(os.environ)
        return Controller(
            config, geometry, context, collector, agreement, call, influence_probe, monitor_of(engine), show, fallback
        )
    except BaseException:
        while undo:
            undo.pop()()
        raise


def settled(config: GraceConfig, engine: Any) -> tuple[GraceConfig, Sketcher | None]:
    """The config with ``recipe: auto`` decided, and the sketcher of the model's layers, not attached yet.

    The sketcher is None where nothing is collected.  What is decided depends on the model and its parallelism alone, so it is
    the same on every rank.

    Raises:
        ConfigError: gradients or layers are asked for by name, and cannot be had.
    """
    fallback = _fallback(config)
    config = replace(config, recipe=recipe(config.recipe).name)
    if config.replay is not None or not config.collects:
        return config, None
    try:
        sketcher = sketcher_of(config, engine)
    except ConfigError as error:
        if fallback is None:
            raise
        log.info("recipe: auto is %s here: %s", fallback, error)
        return replace(config, recipe=fallback, ablate=[]), None
    log.info("recipe: %s", config.recipe)
    return config, sketcher


def _fallback(config: GraceConfig) -> str | None:
    """What ``recipe: auto`` becomes where gradients cannot be used; None where they are asked for by name."""
    auto = config.recipe == AUTO and list(config.collect.layers) == ["auto"]
    return recipe(config.recipe).fallback if auto else None


def sketcher_of(config: GraceConfig, engine: Any) -> Sketcher:
    """Of the layers that the config names.

    Raises:
        ConfigError: a rank sees parts of layers only, or there is none to sketch.
    """
    if shares_model(engine) or is_pipeline(engine):
        raise ConfigError(
            f"recipe: {config.recipe} fits its trusted basis to layers that a rank sees whole; with tensor, sequence or pipeline "
            f"parallelism set recipe: {recipe(config.recipe).fallback}, which needs no gradient"
        )
    layers = select_layers(engine.module, config.collect.layers, config.collect.exclude)
    log.info("sketching %d layers: %s … %s", len(layers), layers[0].name, layers[-1].name)
    return Sketcher(layers, config.seed, config.collect.dim, config.collect.rank)


@dataclass(frozen=True)
class Components:
    """What can be read before any collective.

    Attributes:
        pool: the windows.
        order: of the corpus where nothing is chosen.
        reader: of the dataset's tokens; None without content features.
        trusted: map-style dataset of trusted samples; None without.
        prior: the trusted n-gram model; None without.
        include, exclude: sorted ids.
        sources: (n,) source of every sample; None where they are not known.
    """

    pool: Pool
    order: Order
    reader: TokenReader | None
    trusted: Any
    quality_model: QualityModel | None
    include: IntArray
    exclude: IntArray
    sources: IntArray | None = None


def prepare(dataset: Any, config: GraceConfig, geometry: Geometry, user_inputs: UserInputs) -> Components:
    """Opens and checks everything that the config names."""
    n = len(dataset)
    pool = Pool(n, config.window, config.budget, config.refresh.interval_steps, geometry.batch, config.seed)
    c = config.selection
    include, exclude = (read_ids(path, n) if path else np.empty(0, np.int64) for path in (c.include, c.exclude))
    both = np.intersect1d(include, exclude)
    if len(both):
        raise ConfigError(f"sample {int(both[0])} is in selection.include and in selection.exclude; drop it from one")
    reader = None
    if config.features.enabled and config.replay is None and recipe(config.recipe).content:
        reader = TokenReader(dataset, config.features.tokens_key, config.features.max_tokens)
    trusted = trusted_set(dataset, reader, config, user_inputs) if recipe(config.recipe).trusted else None
    quality_model = None
    if trusted is not None and reader is not None:
        tokens = TokenReader(trusted, config.features.tokens_key, config.features.max_tokens).all()
        quality_model = QualityModel.fit(tokens.flat, tokens.offsets)
    sources = read_sources(c.sources, n) if c.sources is not None else None
    order = user_inputs.order or SeededOrder(n, config.seed)
    return Components(pool, order, reader, trusted, quality_model, include, exclude, sources)


def refresh_context(
    comm: Comm,
    config: GraceConfig,
    geometry: Geometry,
    parts: Components,
    arrange: Callable[[Schedule], Schedule] | None = None,
    device: str = "cpu",
) -> RefreshContext:
    """What a refresh works on."""
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
    """Of the samples' tokens; None where they are not read."""
    f = config.features
    return None if parts.reader is None else PCAProjection(parts.reader.dataset, f.tokens_key, f.dim, config.seed)


class Contents:
    """Content features of the window's samples: those that stay are kept, those that enter are read."""

    def __init__(self, comm: Comm, config: GraceConfig, parts: Components) -> None:
        self.comm, self.config, self.parts = comm, config, parts
        self._warned = False

    def __call__(self, kept: ContentFeatures | None, ids: IntArray) -> ContentFeatures:
        """Features of ``ids`` (n,), sorted, this rank's share of the window.  Collective where the window has moved.

        Args:
            kept: of the window before, on all ranks or on none.
        """
        reader, c, rolls = self.parts.reader, self.config, bool(self.parts.pool.advance)
        if reader is None:
            return ContentFeatures(ids, np.zeros(len(ids), np.float32), None, None, None)
        if kept is not None and not rolls:
            return kept
        common: dict[str, Any] = {"dim": c.features.dim, "seed": c.seed, "trusted": self.parts.quality_model}
        common["allreduce"] = self.comm.allreduce
        if kept is not None:
            found = follow_window(kept, reader, ids, **common)
        else:
            found = content_features(
                reader,
                ids,
                **common,
                want_density=True,
                want_tfidf=c.builds_graph,
                want_statistics=c.collects,
                cache_dir=c.features.cache_dir,
                keep_counts=rolls,
            )
        self._watch(found.density_ratio)
        return found

    def _watch(self, ratio: float) -> None:
        """Says once, on rank 0, that the 6-gram counts no longer tell copies from unique texts."""
        if abs(ratio - 1 / COPIES) > MISSED and self.comm.rank == 0 and not self._warned:
            self._warned = True
            log.warning(
                "near-duplicates are hardly seen: a text that stands five times in the window has %.2f of a unique one's chance "
                "where 0.20 is right, for the 6-gram counts are too full; set window to fewer samples than %d, best to at most "
                "10000000, and start anew instead of resuming",
                ratio,
                self.parts.pool.size,
            )
