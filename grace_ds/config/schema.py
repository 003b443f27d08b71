"""Define the configuration: every key that grace_ds knows, with its type, its default and its meaning.

The sections are plain dataclasses, used as OmegaConf structured configs.  An unknown key or a wrong type is an error with the
key's path; rules that span several keys are in :mod:`grace_ds.config.checks`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil
from typing import Any

from grace_ds import recipes, registry

RENAMED_RECIPES = {"prior": "content"}  # old names, accepted with a warning for one version
RENAMED = {"harvest": "collect", "graph.leaf": "graph.backend"}  # old keys, accepted with a warning for one version
REMOVED = {  # keys of the first version → what to do instead
    "collect.every": "set collect.share, the share of the steps that are collected, at most",
    "graph.residuals": "leave it out: recipe grace always spreads along the graph; ablate: [graph] does without",
    "selection.loss_tilt": "leave it out: recipe grace always weighs by loss; ablate: [loss] does without",
}
WARMUP_SHARE = 20  # the warm-up of a run of known length lasts at most one part in so many of it
LEAST_COLLECTED = 8  # fewest steps between two refreshes that are collected, if there are so many


@dataclass
class RefreshConfig:
    """When the coreset is chosen again."""

    interval_steps: int = 500  # optimizer steps between two refreshes
    cadence: str = "adaptive"  # adaptive: stretched to stay below max_overhead; fixed: exactly interval_steps
    max_overhead: float = 0.05  # adaptive only: share of wall time that refreshes may take
    slack_steps: int = -1  # steps a schedule lasts beyond the interval; -1: a quarter of the interval
    probe_share: float = 0.01  # samples run through the model at a refresh, of those trained on in between
    timeout_seconds: float = 300.0  # limit of every wait inside a refresh


@dataclass
class CollectConfig:
    """What is read from the job's own backward."""

    layers: list[str] = field(default_factory=lambda: ["auto"])  # name patterns; auto: the last half of the blocks
    exclude: list[str] = field(default_factory=lambda: ["*lm_head*", "*expert*", "*router*"])  # never hooked
    share: float = 0.25  # share of the optimizer steps that are collected, at most; fewer where the estimates need fewer
    dim: int = 256  # width of the folded sketch
    rank: int = 8  # rows of the random projections of a layer's two sides
    reduction: str = "mean"  # how the job's loss joins the samples of a micro-batch: mean | sum


@dataclass
class FeaturesConfig:
    """Content statistics of the token ids; no gradients, no model."""

    enabled: bool = True  # content statistics; only recipe uniform does without
    tokens_key: str = "auto"  # key (or tuple position) of the token ids in a dataset item
    dim: int = 96  # width of the projected TF-IDF vectors
    max_tokens: int = 4096  # tokens of a sample that are looked at
    separator: int = -1  # token id that ends a document of a packed sample; -1: an item's seq_lengths or position_ids tell
    cache_dir: str | None = None  # where what was computed of a sample is kept, for refreshes and runs; null: not kept
    precomputed: str | None = None  # folder that grace-ds features has written for this corpus and config; null: none
    threads: int = 0  # of a rank; 0: its share of the cores that it may run on, and OMP_NUM_THREADS at most


@dataclass
class GraphConfig:
    """The k-NN graph of the window: scores travel along it, and it tells how crowded a sample's neighbourhood is."""

    backend: str = "auto"  # torch: exact | faiss: exact, tuned from 100,000 rows | cuvs: GPU | auto: cuvs on GPUs, faiss, torch
    tier: str = "auto"  # exact: every pair; clustered: rows that share a cluster; auto: clustered from 30,000 rows where it pays
    executor: str = "ring"  # ring: over the job's transport; dask: a Dask cluster inside the job, started for each graph
    clusters: int = 0  # of the clustered tier; 0: the square root of the rows
    overlap: int = 0  # clusters that each row goes to; 0: as few as reach the recall
    k: int = 15  # neighbours of a sample
    recall: float = 0.99  # sampled recall that an approximate backend or the clustered tier must reach
    shrink: float = 0.5  # lambda of the propagation: neighbour evidence that counts as much as no evidence
    sketch_share: float = 0.05  # of a row's squared length: what its gradient sketch has of it, or those of its neighbours
    hidden_share: float = 0.05  # the same of its pooled hidden state; the rest is content
    drift: float = 0.02  # 1 - cosine by which a row must have moved to be searched for again
    hops: int = 5  # that scores travel from measured samples to others
    decay: float = 0.7  # confidence of a collected value per refresh of age


@dataclass
class SelectionConfig:
    """How the coreset is drawn from the window."""

    objective: str = "sample"  # sample | facility_location | topk | rs2 | uniform
    explore: float = 0.05  # share of slots for samples outside of the coreset: those most in doubt, or any
    audit: float = 0.01  # share of slots drawn uniformly from the window
    include: str | None = None  # file of ids (one a line, or .npy) that every coreset holds
    exclude: str | None = None  # file of ids that no coreset holds
    sources: str | None = None  # .npy of one integer for each sample of the dataset: the source of the blend that it is from
    shares: str = "keep"  # with sources. keep: each has its share of the window; floor: half of it at least; free; adapt: learned
    least_share: float = 0.5  # shares: adapt: least share of a source in a coreset, in multiples of its share of the window
    most_share: float = 2.0  # shares: adapt: largest share of a source, likewise


@dataclass
class GuardConfig:
    """What stops a selection that does not help."""

    enabled: bool = True  # false: the recipe is used whatever comes of it
    clean_share: float = 0.8  # effective share of the window from which on nothing is worth leaving out, by content and by losses
    confidence: float = 0.95  # of the bootstrap interval that core and audit samples are compared by


@dataclass
class CheckpointConfig:
    """What to do with our own state in a checkpoint."""

    on_missing_state: str = "rebuild"  # the checkpoint has none: rebuild (start afresh at its step) | error
    on_damaged_state: str = "error"  # a file of it is torn, altered or missing; the log names it either way
    on_failed_save: str = "warn"  # GRACE's state cannot be written: warn (the engine's checkpoint is saved without it) | error


@dataclass
class GraceConfig:
    """The block ``data_efficiency.data_sampling.grace`` of a DeepSpeed config (alias: top-level ``grace_ds``)."""

    enabled: bool = True  # false: an exact pass-through
    recipe: str = "auto"  # grace | content | density | uniform; auto: grace where gradients can be read, else content
    ablate: list[str] = field(default_factory=list)  # parts of recipe grace to do without: gradients, loss, graph, sketches
    mode: str = "train"  # train | shadow: collect, refresh and log, but leave the job's batches alone
    budget: float = 0.2  # share of the window that one coreset may hold
    window: int = 0  # samples in the rolling window; 0: so that a refresh collects at least 5 % of it
    seed: int = 1234  # of windows, projections and draws
    total_steps: int = 0  # optimizer steps of the whole run, for max_repeats and the length of the warm-up; 0: not known
    max_repeats: float = 4.0  # implied repeats of a sample above which the run is refused
    start_step: int = -1  # first step on a coreset, uniform before; 0: at once; -1: an interval, a 20th of total_steps at most
    stop_step: int = 0  # optimizer step at which selection ends and uniform goes on; 0: never
    trusted: str | None = None  # trusted samples: .jsonl with input_ids or text, .txt, or .npy (n, tokens)
    tokenizer: str | None = None  # for trusted text: tokenizer.json, or a Hugging Face folder; null: the script's tokenize=
    pseudo_trusted: bool = True  # without a trusted set: take the pool's most typical samples for one
    weights: str = "none"  # what grace_ds.sample_weights() gives: none (ones) | inverse_probability
    comm: str = "auto"  # auto | mpi | torch | local
    plugins: list[str] = field(default_factory=list)  # modules to import first: recipes, objectives and the like
    resolvers: list[str] = field(default_factory=list)  # resolvers that ${name:...} may call, such as oc.env
    run_dir: str | None = None  # where the resolved config and every schedule are kept; null: nowhere
    replay: str | None = None  # folder of schedules of an earlier run: feed those, choose nothing
    debug: bool = False  # full tracebacks
    refresh: RefreshConfig = field(default_factory=RefreshConfig)
    collect: CollectConfig = field(default_factory=CollectConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    graph: GraphConfig = field(default_factory=GraphConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    @property
    def warmup_steps(self) -> int:
        """Optimizer steps at the start of a run that train on the unfiltered pool, while signals are already collected."""
        if self.start_step >= 0:
            return 0
        interval = self.refresh.interval_steps
        return min(interval, max(1, self.total_steps // WARMUP_SHARE)) if self.total_steps else interval

    @property
    def learning(self) -> int:
        """Optimizer steps at the start of a run whose influences are fitted but do not yet weigh samples."""
        return self.refresh.interval_steps if self.start_step < 0 else 0

    @property
    def parts(self) -> frozenset[str]:
        """The parts of the recipe that are not switched off."""
        return recipes.recipe(self.recipe).uses - frozenset(self.ablate)

    @property
    def collects(self) -> bool:
        """Whether any decision of this run needs gradients or losses from the job's own training."""
        return bool(self.parts & {"gradients", "loss"} and registry.objectives.get(self.selection.objective).weighs)

    @property
    def learned_shares(self) -> tuple[float, float]:
        """Shares of gradient sketch and hidden state in a row of the graph; 0 if the run has none or they are switched off."""
        learned = self.collects and "sketches" in self.parts
        return (self.graph.sketch_share, self.graph.hidden_share) if learned else (0.0, 0.0)

    @property
    def builds_graph(self) -> bool:
        """Whether any decision of this run needs the k-NN graph."""
        objective = registry.objectives.get(self.selection.objective)
        return bool(objective.covers or ("graph" in self.parts and objective.weighs))

    @property
    def covers(self) -> bool:
        """Whether the objective draws along the k-NN graph of the whole window."""
        return bool(registry.objectives.get(self.selection.objective).covers)

    @property
    def collect_every(self) -> int:
        """Smallest k such that every k-th step is collected: from ``collect.share``, but with some between any two refreshes."""
        return max(1, min(ceil(1 / self.collect.share), self.refresh.interval_steps // LEAST_COLLECTED))


Plain = dict[str, Any]
