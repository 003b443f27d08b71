"""Carry what is counted of a few small simulated jobs on to any size of a job.

Each stage's bytes are a weighted sum of the ranks, the samples of a rank and the slots of a schedule, in the graph also of the
square root of the window, to which the number of clusters is chosen, and along its edges of a rank's distinct neighbours;
messages, of the other ranks and the graph's waves.  Jobs that the weights were not fitted to test them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from grace_ds.cli.simulate import Counted, Job, two_refreshes
from grace_ds.comm.simulated import Simulated, simulate
from grace_ds.config.schema import GraceConfig
from grace_ds.graph.clustered import wave_bytes, waves
from grace_ds.graph.placement import Placement
from grace_ds.graph.plan import clusters_for
from grace_ds.records import HIDDEN, Array
from grace_ds.refresh.choice import slack
from grace_ds.refresh.embed import SKETCHED

INTERVAL, BATCH = 16, 16  # of the small jobs
# Ranks, samples of a rank, batches of BATCH.  From 80,000 samples on the thresholds take as many sums as for 1e7 samples.
FITTED = ((2, 40_960, 1), (4, 40_960, 32), (8, 10_240, 1), (16, 6_144, 32), (32, 2_560, 1), (32, 4_096, 16))
TESTED = ((3, 49_152, 16), (48, 2_048, 8))
MANY = 8  # ranks from which nearly all messages are headers and pieces that go to all others alike
WHICH = ("first", "later")
QUANTITIES = ("messages", "bytes", "others", "root")


Figures = dict[tuple[str, str], float]  # by refresh and stage


@dataclass(frozen=True)
class Costs:
    """What one rank sends and holds: of the rank that has most.

    Attributes:
        messages, bytes: by refresh (first, later) and stage.
        others, root: bytes of memory held at once, likewise: of any rank but root, and of root; empty if not traced.
    """

    messages: Figures
    bytes: Figures
    others: Figures
    root: Figures

    def total(self, of: str, which: str) -> float:
        """Return the sum over the stages of ``of`` (messages or bytes) in the refresh ``which``."""
        return sum(value for (refresh, _), value in self.figures(of).items() if refresh == which)

    def peak(self, of: str) -> float:
        """Return the largest figure of ``of`` (others or root) in both refreshes."""
        return max(self.figures(of).values(), default=0.0)

    def figures(self, of: str) -> Figures:
        """Return the figures named ``of``."""
        figures: Figures = getattr(self, of)
        return figures


def measure(job: Job, config: GraceConfig, traced: bool = True, second: bool = True) -> Costs:
    """Simulate a job and return its costs; arguments as for :func:`two_refreshes`."""
    log = logging.getLogger("grace_ds")
    level = log.level
    log.setLevel(logging.ERROR)  # what each refresh says of its synthetic samples
    try:
        found: Simulated[Counted] = simulate(job.ranks, lambda comm: two_refreshes(comm, job, config, second), traced=traced)
    finally:
        log.setLevel(level)
    costs = Costs({}, {}, {}, {})
    for rank, (counted, turns) in enumerate(zip(found.results, found.peaks, strict=True)):
        done = 0  # primitives
        for which, stages in (("first", counted.first), ("later", counted.later)):
            for stage, sent in stages.items():
                key = which, stage
                figures = [(costs.messages, sent.messages), (costs.bytes, sent.bytes)]
                if traced:
                    held = turns[2 * done + (done > 0) : 2 * (done + sent.calls) + 1]
                    figures.append((costs.others if rank else costs.root, max(held, default=0)))
                for known, value in figures:
                    known[key] = max(known.get(key, 0.0), float(value))
                done += sent.calls
    return costs


@dataclass(frozen=True)
class Lines:
    """Costs as functions of the job's sizes, fitted to simulated jobs.

    Attributes:
        config: under which they were simulated.
        coefficients: quantity → weights of the terms of :func:`_terms`.
        errors: largest relative error for the jobs that were not fitted: of messages, bytes and memory.
    """

    config: GraceConfig
    coefficients: dict[tuple[str, str, str], Array]
    errors: dict[str, float]

    @staticmethod
    def of(config: GraceConfig) -> Lines:
        """Simulate the narrow jobs of :data:`FITTED` and :data:`TESTED`; takes a minute or two."""
        jobs = [Job(ranks, ranks * own, many * BATCH, INTERVAL) for ranks, own, many in (*FITTED, *TESTED)]
        measure(Job(2, 4096, BATCH, INTERVAL), config, traced=False)  # what is imported and made once counts for no rank
        costs = [measure(job, config) for job in jobs]
        slots = [slots_of(config, job) for job in jobs]
        coefficients: dict[tuple[str, str, str], Array] = {}
        for of in QUANTITIES:
            fitted = [i for i, job in enumerate(jobs[: len(FITTED)]) if of != "messages" or job.ranks >= MANY]
            for which, stage in costs[0].figures(of):
                terms = [_terms(of, stage, config, jobs[i], slots[i]) for i in fitted]
                coefficients[of, which, stage] = _fit(terms, [costs[i].figures(of)[which, stage] for i in fitted])
        lines = Lines(config, coefficients, {})
        for job, n, real in list(zip(jobs, slots, costs, strict=True))[len(FITTED) :]:
            said = lines.at(job, n)
            sent = ("messages", "bytes") if job.ranks >= MANY else ("bytes",)
            pairs = [(of, said.total(of, which), real.total(of, which)) for of in sent for which in WHICH]
            pairs += [("memory", said.peak(of), real.peak(of)) for of in ("others", "root")]
            for name, line, value in pairs:
                lines.errors[name] = max(lines.errors.get(name, 0.0), abs(line / value - 1))
        return lines

    def at(self, job: Job, slots: int) -> Costs:
        """Return the costs of a job whose schedule has ``slots`` slots."""
        figures: dict[str, Figures] = {of: {} for of in QUANTITIES}
        for (of, which, stage), weights in self.coefficients.items():
            figures[of][which, stage] = float(weights @ np.array(_terms(of, stage, self.config, job, slots)))
        return Costs(**figures)


def slots_of(config: GraceConfig, job: Job) -> int:
    """Return the slots of a job's schedule."""
    return (job.interval + slack(config, job.interval)) * job.batch


def _terms(of: str, stage: str, config: GraceConfig, job: Job, slots: int) -> list[float]:
    """Return the terms that a quantity is a weighted sum of.

    A message goes to each other rank, in the graph once a wave; bytes and memory follow from ranks, own samples, slots and, in
    the graph, the clusters, and along its edges the distinct neighbours.
    """
    others = job.ranks - 1
    if of == "messages":
        return [1.0, float(others), float(others * graph_waves(config, job)) if stage == "graph" else 0.0]
    own, further = job.samples / job.ranks, 0.0
    if stage == "graph":
        further = math.sqrt(job.samples)
    elif stage in ("embed", "propagate") and config.builds_graph:
        # The distinct neighbours of a rank's samples, drawn from all: ranks (1 - e^(-k / ranks)) for each sample, k at most.
        further = own * job.ranks * -math.expm1(-config.graph.k / job.ranks)
    leaving = others / job.ranks if of == "bytes" else 1.0  # the share of what is exchanged that leaves a rank
    if stage == "broadcast" and of == "bytes":  # root sends the schedule to each of its children in the tree
        slots, leaving = slots * (job.ranks - 1).bit_length(), 1.0
    return [leaving * term for term in (1.0, float(job.ranks), own, float(slots), further)]


def graph_waves(config: GraceConfig, job: Job) -> int:
    """Return the waves in which the graph of a job is searched, its clusters being equal; 0 in the exact tier, or without one."""
    if not config.builds_graph or config.graph.tier != "clustered":
        return 0
    clusters, nothing = clusters_for(config.graph, job.samples), np.empty((0, config.graph.overlap), np.int32)
    rows = np.full(clusters, -(-config.graph.overlap * job.samples // clusters), np.int64)
    placement = Placement(clusters, config.graph.overlap, 1.0, nothing, nothing, rows, rows)
    width = row_width(config)
    return len(waves(placement, job.ranks, width, True, wave_bytes(job.samples, width, job.ranks)))


def row_width(config: GraceConfig) -> int:
    """Return the numbers in a row of the graph."""
    return config.features.dim + (SKETCHED + HIDDEN if any(config.learned_shares) else 0)


def _fit(terms: Sequence[Sequence[float]], values: Sequence[float]) -> Array:
    """Return weights, none below 0, of the least relative errors; a term that would count less than nothing is left out."""
    matrix, target = np.array(terms, np.float64), np.array(values, np.float64)
    weights = np.zeros(matrix.shape[1])
    used = np.flatnonzero(matrix.any(axis=0))
    scale = 1 / np.maximum(target, 1.0)
    while len(used):
        unit = matrix[:, used].max(axis=0)
        found = np.linalg.lstsq(matrix[:, used] / unit * scale[:, None], target * scale, rcond=None)[0] / unit
        if (found >= 0).all():
            weights[used] = found
            break
        used = np.delete(used, int(np.argmin(found * unit)))
    return weights
