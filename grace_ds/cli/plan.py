"""``grace-ds plan``: what GRACE will ask of each rank and when it pays, from the sizes of a job and before there is one.

Memory is counted; seconds are counts over rates (:mod:`grace_ds.cli.plan_rates`), each of which is assumed, given or measured
by ``--calibrate``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from grace_ds.cli.calibrate import products
from grace_ds.cli.plan_model import BYTES_AN_OPERATION, BreakEven, CollectCost, Model, probe_flop
from grace_ds.cli.plan_rates import ASSUMED, GIVEN, MEASURED, Rates
from grace_ds.config.schema import GraceConfig
from grace_ds.data.pool import Pool, implied_repeats
from grace_ds.data.tokens import BLOCK_TOKENS
from grace_ds.features.content import MEMORY_BYTES
from grace_ds.features.ngrams import GRAM, SMALLEST, Sampling
from grace_ds.features.quality import STATISTICS
from grace_ds.gradients.influence_probe import FORWARDS, Probes
from grace_ds.graph.plan import GraphPlan, plan_graph
from grace_ds.graph.repair import SPARE
from grace_ds.recipes import recipe
from grace_ds.refresh.choice import slack

SCHEDULE_BYTES = 8 + 1 + 4  # id, role, weight of a slot
SELECT_BYTES = 3 * 32 + 48  # of a sample of the window on rank 0: its signals sent, joined and sorted; what is drawn with
VISIT_BYTES = 16  # of a sample met, on every rank
ROW_BYTES = 32  # of a collected row beside its sketch (grace_ds.records.Rows)
BLOCK_BYTES = 60  # of a token of a block: what the allocator of a job that trains keeps of its temporaries
TERM_BYTES = 1.7 * 5  # of a token: its distinct terms, kept between the two sweeps
GREEDY_SECONDS = 6e-6  # of a sample of the window under facility_location: 0.60 s for 100,000 (benchmarks greedy)
ATTACH_BYTES = 9 << 20  # of hooks, sampler, loaders and transport, before the first refresh (benchmarks plan)
HOOK_SECONDS, ROWS_SECONDS = 2e-4, 1.5e-3  # of a layer's two hooks, of a step's rows: what small models pay for Python
TRAINING_SHARE = 0.4  # of a core's products, reached in training


@dataclass(frozen=True)
class Sizes:
    """A job.

    Attributes:
        samples: of the corpus.
        dim: width of the content vectors.
        ranks: data-parallel.
        batch: samples of an optimizer step over all ranks.
        interval: steps between two refreshes.
        budget: share of the window that a coreset holds.
        tokens: of a sample.
        steps: of the run; 0: not known.
        gflops: of a rank's products; 0: measured here.
        gbits: a second between two ranks; 0: as in ``rates``.
        model: that is trained; None: not known.
        step_seconds: of an optimizer step without GRACE; 0: from the model and ``tflops``.
        tflops: that a rank reaches in training; 0: from ``rates``.
        item_seconds: of the dataset to hand out one sample; 0: as in ``rates``.
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
    """One refresh, and what it and the collection come to; bytes and seconds of the busiest rank.

    Attributes:
        window: samples of a window.
        anchors: samples that rows were collected of by the run's end; 0 without gradients.
        repeats: of a chosen sample over the run; None where its length is not known.
        rolls: whether each refresh reads the content of samples that enter the window.
        features_bytes, table_bytes, schedule_bytes, ledger_bytes, resting_bytes: held between refreshes.
        scratch_bytes, select_bytes: for the features, and on rank 0 for the choice, beyond that.
        feature_seconds, graph_seconds: of the first refresh.
        root_seconds, probe_seconds, fixed_seconds: of any.
        step_seconds: of an optimizer step without GRACE; None where it is not known, ``step_origin`` says from where.
        collect_flop_share: added operations over the step's; None without a model, 0 where nothing is collected.
        collect_seconds: in each step; None where it is not known.
        collect_bytes: held by the hooks within a step, on the device.
        even: None where a step's seconds are not known.
        gflops: that the seconds are for.
        builds: whether the configuration builds a graph at all.
        graph: of the window.
    """

    window: int
    anchors: int
    repeats: float | None
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
    root_seconds: float
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
        """Between two refreshes."""
        return self.features_bytes + self.table_bytes + self.schedule_bytes + self.visit_bytes + self.resting_bytes

    @property
    def peak_bytes(self) -> int:
        """Of the busiest rank, at the widest point of a refresh."""
        widest = max(self.graph.host_bytes if self.builds else 0, self.select_bytes, 2 * self.table_bytes)
        first = self.scratch_bytes + self.features_bytes + self.resting_bytes + self.schedule_bytes // 2
        return max(self.held_bytes + widest, first)


def plan(sizes: Sizes, config: GraceConfig) -> RefreshPlan:
    """The figures for ``sizes`` under ``config``.

    Raises:
        ConfigError, DataError: sizes that no job can have.
    """
    rates, c = _given(sizes), config
    pool = Pool(sizes.samples, c.window, sizes.budget, sizes.interval, sizes.batch, c.seed)
    own = -(-pool.size // sizes.ranks)
    met = sizes.steps * sizes.batch or pool.size
    anchors = min(pool.size, met // c.collect_every) if c.collects else 0
    whole = c.covers
    builds = c.builds_graph
    graph = plan_graph(c.graph, pool.size, pool.size, sizes.dim, sizes.ranks, True)
    row = 2 * c.collect.dim + ROW_BYTES
    kept = (4 * sizes.dim + 8 * (c.graph.k + SPARE + 1)) * builds  # a sample's vector and its list in the graph
    slots = (sizes.interval + slack(c, sizes.interval)) * sizes.batch
    reads = recipe(c.recipe).content and c.features.enabled
    table = Sampling.of(pool.size * max(sizes.tokens - GRAM + 1, 0), pool.size).table_bytes
    feature = _feature_seconds(sizes, rates, own, table) if reads else 0.0
    graph_seconds = graph.seconds(rates.gflops, rates.gbits) * rates.graph * rates.busy
    root = rates.busy * pool.size * (rates.sample_seconds + (GREEDY_SECONDS if whole else 0.0))
    step, origin = _step(sizes, rates)
    probe, share, collect, hooks = _gradients(sizes, c, rates, step)
    rolls = bool(pool.advance)
    built = graph_seconds if builds else 0.0
    # A window that rolls has its graph repaired: what enters is compared with all, and all with what enters.
    entering = min(1.0, pool.advance / pool.size)
    repaired = built * min(1.0, 2 * entering)
    last = rates.fixed_seconds + root + repaired + probe + feature * entering
    mean = last
    first = rates.fixed_seconds + feature + root + built
    even = None
    if step and collect is not None:
        even = BreakEven.of(step, collect, first, mean, sizes.interval, sizes.steps)
    return RefreshPlan(
        window=pool.size,
        anchors=anchors,
        repeats=implied_repeats(sizes.steps, sizes.batch, sizes.budget, sizes.samples) if sizes.steps else None,
        rolls=rolls,
        features_bytes=int(own * (16 + kept + 4 * STATISTICS * c.collects)) + table * rolls if reads else 0,
        table_bytes=int((anchors + sizes.interval * sizes.batch) / sizes.ranks * row) if c.collects else 0,
        schedule_bytes=2 * slots * SCHEDULE_BYTES,
        visit_bytes=VISIT_BYTES * min(sizes.samples, met),
        resting_bytes=int(rates.resting_bytes) + ATTACH_BYTES,
        scratch_bytes=_scratch(sizes, rates, own, builds) + table - SMALLEST.table_bytes if reads else 0,
        select_bytes=pool.size * SELECT_BYTES,
        feature_seconds=feature,
        graph_seconds=graph_seconds,
        root_seconds=root,
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


def _given(sizes: Sizes) -> Rates:
    """The rates, with what the command line says in their place."""
    rates = sizes.rates
    if sizes.gflops:
        rates = rates.having(GIVEN, gflops=sizes.gflops)
    elif not rates.gflops:
        rates = rates.having(MEASURED, gflops=products(sizes.dim))
    told = {"gbits": sizes.gbits, "item_seconds": sizes.item_seconds}
    return rates.having(GIVEN, **{name: value for name, value in told.items() if value})


def _feature_seconds(sizes: Sizes, rates: Rates, own: int, table: int) -> float:
    """Both sweeps over this rank's share, and the sum of the 6-gram counts over the ranks beyond what was measured.

    Samples whose tokens do not fit into memory between the sweeps are read twice.

    Args:
        table: bytes of the counts.
    """

    def sent(ranks: int, size: int) -> float:
        return 2 * (ranks - 1) / ranks * 8 * size / rates.gbits / 1e9

    more = max(0.0, sent(sizes.ranks, table) - sent(rates.measured_ranks, SMALLEST.table_bytes))
    again = max(0.0, 1 - MEMORY_BYTES / (2.0 * own * sizes.tokens))
    read = own * (1 + again) * rates.item_seconds
    return read + rates.busy * own * sizes.tokens * rates.token_seconds + rates.fixed_feature_seconds + more


def _scratch(sizes: Sizes, rates: Rates, own: int, vectors: bool) -> int:
    """Tables of counts while they are summed, what is left of the last block, tokens and terms kept between the two sweeps."""
    tokens = own * sizes.tokens
    kept = min(MEMORY_BYTES, 2 * tokens) + (min(MEMORY_BYTES, TERM_BYTES * tokens) if vectors else 0)
    block = BLOCK_BYTES * min(tokens, BLOCK_TOKENS, 1024 * sizes.tokens)
    return int(rates.fixed_bytes - rates.resting_bytes + kept + block)


def _step(sizes: Sizes, rates: Rates) -> tuple[float, str]:
    """Seconds of an optimizer step, 0 where they are not known, and where they come from."""
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
    """Seconds of a refresh's probes; the collection's share of operations, seconds in a step, bytes within it."""
    if not config.collects:
        return 0.0, 0.0, 0.0, 0
    each = sizes.batch / sizes.ranks
    probes = Probes.of(config.refresh.probe_share, sizes.interval, sizes.batch)
    count = sum(max(1, n // sizes.ranks) for n in (probes.pool, probes.fit, probes.judge))
    count += max(1, FORWARDS // 3 // sizes.ranks)  # a forward pass is a third of a step
    if sizes.model is None or not step:
        return count * step / each, None, None, 0
    collect = CollectCost.of(sizes.model, config.collect, sizes.tokens)
    flop = sizes.model.flop(sizes.tokens)
    probe = count * step / each * probe_flop(sizes.model, config.collect, sizes.tokens) / flop
    layers = len(sizes.model.sketched)
    reached = flop * each / step  # operations a second in training
    if rates.narrow_gflops and reached < 4e9 * rates.gflops:  # it trains on what was measured
        seconds = rates.busy * each * collect.flop / rates.narrow_gflops / 1e9
    else:  # an accelerator; skinny products are bound by its memory, not by arithmetic
        seconds = each * collect.traffic / reached / BYTES_AN_OPERATION
    seconds += rates.busy * (layers * HOOK_SECONDS + ROWS_SECONDS)
    held = layers * each * collect.width * (2 * sizes.tokens + 4 * collect.width)
    return probe, collect.flop / flop / config.collect_every, seconds / config.collect_every, int(held)
