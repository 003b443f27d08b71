"""Puts a controller together for an engine: transport, window, features, hooks, trusted set."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from grace_ds.chart import Chart
from grace_ds.comm.base import Comm
from grace_ds.comm.choose import choose
from grace_ds.comm.rollcall import RollCall
from grace_ds.config.schema import GraceConfig
from grace_ds.errors import ConfigError
from grace_ds.features import ContentFeatures, TokenReader, content_features
from grace_ds.harvest import Harvester
from grace_ds.integrations.controller import Controller
from grace_ds.integrations.engine import is_pipeline, shares_model
from grace_ds.integrations.record import monitor_of, preview_of
from grace_ds.integrations.together import together
from grace_ds.integrations.trust import TrustedProbe, probed
from grace_ds.integrations.trusted_set import Extras, trusted_set
from grace_ds.integrations.verdict import Verdict, job_store
from grace_ds.order import Order, SeededOrder
from grace_ds.pool import Pool, check_repeats, read_ids, read_sources
from grace_ds.records import IntArray, Schedule
from grace_ds.refresh import carries
from grace_ds.sampler import Geometry
from grace_ds.selection.prior import BigramPrior
from grace_ds.signals import Pipeline
from grace_ds.sketch.layers import select_layers
from grace_ds.sketch.sketcher import Sketcher
from grace_ds.trusted import split_trusted

log = logging.getLogger("grace_ds")


def build_controller(
    engine: Any,
    dataset: Any,
    config: GraceConfig,
    geometry: Geometry,
    collate: Callable[[list[Any]], Any],
    extras: Extras,
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
    # Ranks that work on the same samples must agree on them, so that all take part in one refresh.
    shared = shares_model(engine)
    if (shared or is_pipeline(engine)) and config.replay is None and config.uses_gradients:
        raise ConfigError(
            "recipe: grace fits its trusted basis to layers that a rank sees whole; with tensor, sequence or pipeline "
            "parallelism set recipe: prior, which needs no gradient"
        )
    group = None if shared else engine.data_parallel_group
    comm = choose(config.comm, dp_group=group, timeout=config.refresh.timeout_seconds)
    parts: Parts = together(comm, lambda: prepare(dataset, config, geometry, extras))
    pipeline = pipeline_of(comm, config, geometry, parts)
    harvester = None
    if config.replay is None and config.uses_gradients:
        layers = select_layers(engine.module, config.harvest.layers, config.harvest.exclude)
        sketcher = Sketcher(layers, config.seed, config.harvest.dim, config.harvest.rank).attach()
        harvester = Harvester(sketcher, config.harvest)
        log.info("sketching %d layers: %s … %s", len(layers), layers[0].name, layers[-1].name)
    trust = None
    if harvester is not None and parts.trusted is not None:
        trust = TrustedProbe(
            engine.module,
            harvester.sketcher,
            parts.trusted,
            split_trusted(len(parts.trusted), config.seed),
            dataset,
            collate,
            geometry.rows,
            torch.device(engine.device),
            extras.loss_fn,
            comm,
            config.seed,
            probed(config.refresh.probe_share, config.refresh.interval_steps, geometry.batch),
        )
    show = preview_of(dataset, config.features.tokens_key)
    verdict, call = Verdict(job_store(comm.size)), RollCall.open(os.environ)
    return Controller(config, geometry, pipeline, harvester, verdict, call, trust, monitor_of(engine), show)


@dataclass(frozen=True)
class Parts:
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
    prior: BigramPrior | None
    include: IntArray
    exclude: IntArray
    sources: IntArray | None = None


def prepare(dataset: Any, config: GraceConfig, geometry: Geometry, extras: Extras) -> Parts:
    """Opens and checks everything that the config names."""
    n = len(dataset)
    pool = Pool(n, config.window, config.budget, config.refresh.interval_steps, geometry.batch, config.seed)
    c = config.selection
    include, exclude = (read_ids(path, n) if path else np.empty(0, np.int64) for path in (c.include, c.exclude))
    both = np.intersect1d(include, exclude)
    if len(both):
        raise ConfigError(f"sample {int(both[0])} is in selection.include and in selection.exclude; drop it from one")
    reader = None
    if config.features.enabled and config.replay is None and config.recipe != "uniform":
        reader = TokenReader(dataset, config.features.tokens_key, config.features.max_tokens)
    trusted = trusted_set(dataset, reader, config, extras) if config.recipe in ("grace", "prior") else None
    prior = None
    if trusted is not None and reader is not None:
        tokens = TokenReader(trusted, config.features.tokens_key, config.features.max_tokens).all()
        prior = BigramPrior.fit(tokens.flat, tokens.offsets)
    sources = read_sources(c.sources, n) if c.sources is not None else None
    order = extras.order or SeededOrder(n, config.seed)
    return Parts(pool, order, reader, trusted, prior, include, exclude, sources)


def pipeline_of(
    comm: Comm,
    config: GraceConfig,
    geometry: Geometry,
    parts: Parts,
    arrange: Callable[[Schedule], Schedule] | None = None,
) -> Pipeline:
    """What a refresh works on."""
    labels = parts.sources
    return Pipeline(
        comm=comm,
        config=config,
        pool=parts.pool,
        order=parts.order,
        batch=geometry.batch,
        contents=Contents(comm, config, parts),
        include=parts.include,
        exclude=parts.exclude,
        trusted=parts.prior.held_out if parts.prior is not None else None,
        sources=(lambda ids: np.asarray(labels[ids])) if labels is not None else None,
        arrange=arrange,
        chart=_chart(config, parts) if config.run_dir is not None and comm.rank == 0 else None,
    )


def _chart(config: GraceConfig, parts: Parts) -> Chart | None:
    """Of the samples' tokens; None where they are not read."""
    f = config.features
    return None if parts.reader is None else Chart(parts.reader.dataset, f.tokens_key, f.dim, config.seed)


class Contents:
    """Content features of the window's samples; those of the last window are kept."""

    def __init__(self, comm: Comm, config: GraceConfig, parts: Parts) -> None:
        self.comm, self.config, self.parts = comm, config, parts
        self._last: ContentFeatures | None = None

    def __call__(self, ids: IntArray) -> ContentFeatures:
        """Features of ``ids`` (n,), this rank's share of the window.  Collective when the window has moved."""
        reader, c = self.parts.reader, self.config
        if reader is None:
            return ContentFeatures(ids, np.zeros(len(ids), np.float32), None, None, None)
        # A window that has not moved has not moved on any rank: then nobody takes part in a collective.
        if self._last is None or not np.array_equal(self._last.ids, ids) or self.parts.pool.advance:
            self._last = content_features(
                reader,
                ids,
                dim=c.features.dim,
                seed=c.seed,
                allreduce=self.comm.allreduce,
                trusted=self.parts.prior,
                want_density=True,
                want_tfidf=carries(c) or c.selection.objective == "facility_location",
                want_statistics=c.uses_gradients,
                cache_dir=c.features.cache_dir,
            )
        return self._last
