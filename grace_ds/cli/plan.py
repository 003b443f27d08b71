"""Plan a job from its sizes: what GRACE costs each rank and when it pays off, before there is a job: ``grace-ds plan``.

Memory is counted.  Seconds are counts divided by rates (:mod:`grace_ds.cli.plan_rates`), each of which is assumed, given or
measured by ``--calibrate``.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from grace_ds.cli.calibrate import products
from grace_ds.cli.plan_model import BYTES_AN_OPERATION, BreakEven, CollectCost, Model, probe_flop
from grace_ds.cli.plan_rates import ASSUMED, GIVEN, MEASURED, Rates
from grace_ds.config.schema import GraceConfig
from grace_ds.data.pool import Pool, check_repeats
from grace_ds.data.tokens import BLOCK_TOKENS
from grace_ds.features.content import MEMORY_BYTES
from grace_ds.features.ngrams import GRAM, SMALLEST, Sampling
from grace_ds.features.quality import STATISTICS
from grace_ds.gradients.influence_probe import FORWARDS, Probes
from grace_ds.graph.plan import GraphPlan, plan_graph
from grace_ds.graph.repair import SPARE
from grace_ds.recipes import recipe
from grace_ds.refresh.choice import slack
from grace_ds.refresh.trigger import stretched_interval
from grace_ds.utils.threads import AHEAD

SCHEDULE_BYTES = 8 + 1 + 4  # per slot: id, role, weight
SELECT_BYTES = 52 + 92  # per sample that a rank owns: its signals, and the data to draw with
VISIT_BYTES = 16  # per sample seen, on every rank
ROW_BYTES = 32  # per collected row in addition to its sketch (grace_ds.records.SampleRecords)
WAITING_BYTES = 24  # per token of a block that waits for a thread or to be taken: tokens, or 6-grams and terms
BLOCK_BYTES = 60  # per token of a block: temporaries that the allocator of a training job retains
TERM_BYTES = (
    1.7 * 5
)  # per token: its distinct terms, kept between the two sweeps; its 6-grams take 4, or fewer if some are left out
GREEDY_SECONDS = 6e-6  # per sample of the window under facility_location: 0.60 s for 100,000 (benchmarks greedy)
ATTACH_BYTES = 9 << 20  # hooks, sampler, loaders and transport, before the first refresh (benchmarks plan)
HOOK_SECONDS, ROWS_SECONDS = 2e-4, 1.5e-3  # per layer for its two hooks, per step for its rows: Python's overhead in small models
TRAINING_SHARE = 0.4  # share of a core's product speed that training reaches


@dataclass(frozen=True)
class Sizes:
    """Sizes of a job.

    Attributes:
        samples: number in the corpus.
        dim: width of the content vectors.
        ranks: number of data-parallel ranks.
        batch: samples of an optimizer step over all ranks.
        interval: steps between two refreshes.
        budget: share of the window that a coreset holds.
        tokens: number per sample.
        steps: number in the run; 0: unknown.
        gflops: speed of a rank's products; 0: measure it here.
        gbits: Gbit/s between two ranks; 0: as in ``rates``.
        model: the model that is trained; None: unknown.
        step_seconds: seconds of an optimizer step without GRACE; 0: from the model and ``tflops``.
        tflops: speed that a rank reaches in training; 0: from ``rates``.
        item_seconds: seconds to read one sample from the dataset; 0: as in ``rates``.
        rates: of this machine, or assumed.
    """

    samples: int
    dim: int
    ranks: int
    batch: int
    interval: int
    budget: float
    tokens: int
    steps: int
    gflops: float
    gbits: float
    model: Model | None = None
    step_seconds: float = 0.0
    tflops: float = 0.0
    item_seconds: float = 0.0
    rates: Rates = field(default_factory=Rates)


@dataclass(frozen=True)
class RefreshPlan:
    """Cost of a refresh and of the collection; bytes and seconds of the busiest rank.

    Attributes:
        window: samples of a window.
        anchors: samples with collected rows at the end of the run; 0 without gradients.
        repeats: repeats of a chosen sample over the run; None if the length of the run is unknown.
        every: steps between two refreshes; more than ``Sizes.interval`` if ``refresh.cadence`` stretches it.
        rolls: whether each refresh reads the content of samples that enter the window.
        features_bytes, table_bytes, schedule_bytes, visit_bytes, resting_bytes: held between refreshes.
        scratch_bytes, select_bytes: additionally held for the features, and for the choice.
        feature_seconds, graph_seconds: of the first refresh.
        choose_seconds, probe_seconds, fixed_seconds: of any refresh.
        step_seconds: of an optimizer step without GRACE; None if unknown; ``step_origin`` names its origin.
        collect_flop_share: added operations relative to the step's; None without a model, 0 if nothing is collected.
        collect_seconds: in each step; None if unknown.
        collect_bytes: held by the hooks within a step, on the device.
        even: the break-even; None if the seconds of a step are unknown.
        gflops: speed that the seconds are based on.
        builds: whether the configuration builds a graph.
        graph: plan of the window's graph.
    """

    window: int
    anchors: int
    repeats: float | None
    every: int
    rolls: bool
    features_bytes: int
    table_bytes: int
    schedule_bytes: int
    visit_bytes: int
    resting_bytes: int
    scratch_bytes: int
    select_bytes: int
    feature_seconds: float
    graph_seconds: float
    choose_seconds: float
    probe_seconds: float
    fixed_seconds: float
    first_seconds: float
    last_seconds: float
    mean_seconds: float
    step_seconds: float | None
    step_origin: str
    collect_flop_share: float | None
    collect_seconds: float | None
    collect_bytes: int
    even: BreakEven | None
    gflops: float
    builds: bool
    graph: GraphPlan

    @property
    def held_bytes(self) -> int:
        """Bytes held between two refreshes."""
        return self.features_bytes + self.table_bytes + self.schedule_bytes + self.visit_bytes + self.resting_bytes

    @property
    def peak_bytes(self) -> int:
        """Peak bytes of the busiest rank during a refresh."""
        widest = max(self.graph.host_bytes if self.builds else 0, self.select_bytes, 2 * self.table_bytes)
        first = self.scratch_bytes + self.features_bytes + self.resting_bytes + self.schedule_bytes // 2
        return max(self.held_bytes + widest, first)


def plan(sizes: Sizes, config: GraceConfig) -> RefreshPlan:
    """Compute the figures for ``sizes`` under ``config``.

    Raises:
        ConfigError, DataError: the sizes are impossible, or a job would be refused for its repeats.
    """
    repeats = None
    if sizes.steps:
        repeats = check_repeats(sizes.steps, sizes.batch, sizes.budget, sizes.samples, config.max_repeats)
    rates, c = _given(sizes), config
    pool = Pool(sizes.samples, c.window, sizes.budget, sizes.interval, sizes.batch, c.seed)
    per_rank = -(-pool.size // sizes.ranks)
    seen = sizes.steps * sizes.batch or pool.size
    anchors = min(pool.size, seen // c.collect_every) if c.collects else 0
    covers = c.covers
    builds = c.builds_graph
    graph = plan_graph(c.graph, pool.size, pool.size, sizes.dim, sizes.ranks, True)
    row = 2 * c.collect.dim + ROW_BYTES
    kept = (4 * sizes.dim + 8 * (c.graph.k + SPARE + 1)) * builds  # per sample: its vector and its list in the graph
    reads = recipe(c.recipe).content and c.features.enabled
    sampling, threads = Sampling.of(pool.size * max(sizes.tokens - GRAM + 1, 0), pool.size), max(1, c.features.threads)
    table, held = sampling.table_bytes, _Held.of(per_rank * sizes.tokens, sampling.level, builds)
    feature = _feature_seconds(sizes, rates, per_rank, table, held, threads) if reads else 0.0
    graph_seconds = graph.seconds(rates.gflops, rates.gbits) * rates.graph * rates.busy
    chosen = rates.busy * per_rank * (rates.sample_seconds + (GREEDY_SECONDS if covers else 0.0))
    step, origin = _step(sizes, rates)
    probe, share, collect, hooks = _gradients(sizes, c, rates, step)
    rolls = bool(pool.advance)
    built = graph_seconds if builds else 0.0
    # The graph of a rolling window is repaired: entering rows are compared with all, and all rows with the entering ones.
    entering = min(1.0, pool.advance / pool.size)
    repaired = built * min(1.0, 2 * entering)
    last = rates.fixed_seconds + chosen + repaired + probe + feature * entering
    mean = last
    every = _every(sizes, c, mean, step + (collect or 0.0))
    slots = (every + slack(c, every)) * sizes.batch
    first = rates.fixed_seconds + feature + chosen + built
    even = None
    if step and collect is not None:
        even = BreakEven.of(step, collect, first, mean, every, sizes.steps)
    return RefreshPlan(
        window=pool.size,
        anchors=anchors,
        repeats=repeats,
        every=every,
        rolls=rolls,
        features_bytes=int(per_rank * (16 + kept + 4 * STATISTICS * c.collects)) + table * rolls if reads else 0,
        table_bytes=int((anchors + every * sizes.batch) / sizes.ranks * row) if c.collects else 0,
        schedule_bytes=2 * slots * SCHEDULE_BYTES,
        visit_bytes=VISIT_BYTES * min(sizes.samples, seen),
        resting_bytes=int(rates.resting_bytes) + ATTACH_BYTES,
        scratch_bytes=_scratch(sizes, rates, per_rank, held, threads) + table - SMALLEST.table_bytes if reads else 0,
        select_bytes=per_rank * SELECT_BYTES,
        feature_seconds=feature,
        graph_seconds=graph_seconds,
        choose_seconds=chosen,
        probe_seconds=probe,
        fixed_seconds=rates.fixed_seconds,
        first_seconds=first,
        last_seconds=last,
        mean_seconds=mean,
        step_seconds=step or None,
        step_origin=origin,
        collect_flop_share=share,
        collect_seconds=collect,
        collect_bytes=hooks,
        even=even,
        gflops=rates.gflops,
        builds=builds,
        graph=graph,
    )


def _every(sizes: Sizes, config: GraceConfig, refresh_seconds: float, step_seconds: float) -> int:
    """Return the steps between two refreshes after the warm-up, by the rule that the job itself follows."""
    fixed = dataclasses.replace(config, refresh=dataclasses.replace(config.refresh, interval_steps=sizes.interval))
    late = max(fixed.start_step, fixed.warmup_steps) + sizes.interval
    return stretched_interval(fixed, late, refresh_seconds, step_seconds or None)


def _given(sizes: Sizes) -> Rates:
    """Return the rates, replaced by those given on the command line."""
    rates = sizes.rates
    if sizes.gflops:
        rates = rates.having(GIVEN, gflops=sizes.gflops)
    elif not rates.gflops:
        rates = rates.having(MEASURED, gflops=products(sizes.dim))
    given = {"gbits": sizes.gbits, "item_seconds": sizes.item_seconds}
    return rates.having(GIVEN, **{name: value for name, value in given.items() if value})


@dataclass(frozen=True)
class _Held:
    """What a rank keeps between the two sweeps over its samples.

    Attributes:
        bytes: of 6-grams, terms and tokens.
        reread: share of the samples that are read twice, for nothing of them fits.
    """

    bytes: float
    reread: float

    @staticmethod
    def of(tokens: int, level: int, vectors: bool) -> _Held:
        """Return it for ``tokens`` of which one 6-gram in 2^level is counted."""
        sizes = [(4.0 if not level else 8.0 / 2**level) * tokens, TERM_BYTES * tokens * vectors]
        # Tokens are kept of the samples whose 6-grams or terms have no room.
        rest = max(0.0, *(1 - MEMORY_BYTES / size for size in sizes if size)) if tokens else 0.0
        kept = min(MEMORY_BYTES, 2 * rest * tokens)
        reread = rest - kept / (2 * tokens) if tokens else 0.0
        return _Held(sum(min(MEMORY_BYTES, size) for size in sizes) + kept, reread)


def _feature_seconds(sizes: Sizes, rates: Rates, own: int, table: int, held: _Held, threads: int) -> float:
    """Return the seconds of both sweeps over this rank's share, and of the sum of the 6-gram counts beyond what was measured.

    Samples whose tokens do not fit into memory between the sweeps are read twice.

    Args:
        sizes: of the job.
        rates: of a rank.
        own: samples of this rank.
        table: bytes of the counts.
        held: between the sweeps.
        threads: that compute.
    """

    def sent(ranks: int, size: int) -> float:
        return 2 * (ranks - 1) / ranks * 8 * size / rates.gbits / 1e9

    extra_transfer = max(0.0, sent(sizes.ranks, table) - sent(rates.measured_ranks, SMALLEST.table_bytes))
    read = own * (1 + held.reread) * rates.item_seconds
    computed = rates.busy * own * sizes.tokens * rates.token_seconds / threads
    return read + computed + rates.fixed_feature_seconds + extra_transfer


def _scratch(sizes: Sizes, rates: Rates, own: int, held: _Held, threads: int) -> int:
    """Return the scratch bytes of the features.

    Tables of counts while they are summed, remains of the last blocks, and what is kept between the two sweeps.
    """
    tokens, block = own * sizes.tokens, min(BLOCK_TOKENS, 1024 * sizes.tokens)
    blocks = min(tokens, threads * block) * BLOCK_BYTES
    waiting = min(tokens, AHEAD * threads * block) * WAITING_BYTES if threads > 1 else 0
    return int(rates.fixed_bytes - rates.resting_bytes + held.bytes + blocks + waiting)


def _step(sizes: Sizes, rates: Rates) -> tuple[float, str]:
    """Return the seconds of an optimizer step (0 if unknown) and their origin."""
    if sizes.step_seconds:
        return sizes.step_seconds, GIVEN
    if sizes.model is None:
        return 0.0, "not known: give --step-seconds, or --parameters (or --layers and --hidden)"
    flop = sizes.model.flop(sizes.tokens) * sizes.batch / sizes.ranks
    if sizes.tflops:
        return flop / sizes.tflops / 1e12, "counted, at the rate given"
    reached = rates.gflops * TRAINING_SHARE
    return rates.busy * flop / reached / 1e9, f"counted, at {TRAINING_SHARE:.0%} of this core's products ({ASSUMED})"


def _gradients(sizes: Sizes, config: GraceConfig, rates: Rates, step: float) -> tuple[float, float | None, float | None, int]:
    """Return the cost of gradients.

    Returns:
        The seconds of a refresh's probes; the collection's share of operations, its seconds in a step, its bytes within it.
    """
    if not config.collects:
        return 0.0, 0.0, 0.0, 0
    per_rank = sizes.batch / sizes.ranks
    probes = Probes.of(config.refresh.probe_share, sizes.interval, sizes.batch)
    count = sum(max(1, n // sizes.ranks) for n in (probes.pool, probes.fit, probes.judge))
    count += max(1, FORWARDS // 3 // sizes.ranks)  # a forward pass is a third of a step
    if sizes.model is None or not step:
        return count * step / per_rank, None, None, 0
    collect = CollectCost.of(sizes.model, config.collect, sizes.tokens)
    flop = sizes.model.flop(sizes.tokens)
    probe = count * step / per_rank * probe_flop(sizes.model, config.collect, sizes.tokens) / flop
    layers = len(sizes.model.sketched)
    reached = flop * per_rank / step  # operations a second in training
    if rates.narrow_gflops and reached < 4e9 * rates.gflops:  # training runs on the measured processor
        seconds = rates.busy * per_rank * collect.flop / rates.narrow_gflops / 1e9
    else:  # training runs on an accelerator: narrow products are bound by its memory, not by arithmetic
        seconds = per_rank * collect.traffic / reached / BYTES_AN_OPERATION
    seconds += rates.busy * (layers * HOOK_SECONDS + ROWS_SECONDS)
    held = layers * per_rank * collect.width * (2 * sizes.tokens + 4 * collect.width)
    return probe, collect.flop / flop / config.collect_every, seconds / config.collect_every, int(held)
