"""Simulate the refreshes of a job on many ranks, and say what they send and hold: ``grace-ds plan --simulate``."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from grace_ds.cli.plan import VISIT_BYTES, Sizes, plan
from grace_ds.cli.plan_summary import in_bytes
from grace_ds.cli.simulate import Job, simulated_config
from grace_ds.cli.simulate_lines import (
    BATCH,
    INTERVAL,
    QUANTITIES,
    WHICH,
    Costs,
    Lines,
    graph_waves,
    measure,
    row_width,
    slots_of,
)
from grace_ds.comm.traffic import Traffic
from grace_ds.config.schema import GraceConfig
from grace_ds.features.ngrams import GRAM, Sampling
from grace_ds.features.tfidf import TERMS
from grace_ds.graph.clusters import ROUNDS, SAMPLE_ROWS
from grace_ds.graph.plan import clusters_for
from grace_ds.recipes import recipe

OWN_RANKS = 32, 81_920  # least samples of a rank, and of the window, where the job's own number of ranks is simulated
# CPU seconds in which a rank makes one id of the window, to see whether it owns it (one x86 core); more where the window rolls.
ID_SECONDS, ROLLED_ID_SECONDS = 2.2e-8, 2.9e-7


@dataclass(frozen=True)
class Simulation:
    """A job's refreshes as simulated.

    Attributes:
        narrow: the job with its own number of ranks and few samples, and what its first refresh cost.
        narrow_costs: of it, counted.
        slots: of a schedule of the job itself.
        costs: of the job itself, by the lines; messages at most.
        errors: of the lines, for the tested jobs and ``narrow``.
        content: what the sums of the content's counts send in the first refresh, beyond ``costs``; counted, not simulated.
        seconds: by refresh.
        fit_seconds, assign_seconds: of those, in which root fits the clusters, and a rank assigns its rows to them.
        visit_bytes: held by every rank once the run has met every sample of the window.
    """

    narrow: Job
    narrow_costs: Costs
    slots: int
    costs: Costs
    errors: dict[str, float]
    content: Traffic
    seconds: dict[str, float]
    fit_seconds: float
    assign_seconds: float
    visit_bytes: int


def run_simulation(sizes: Sizes, config: GraceConfig) -> Simulation:
    """Simulate a job; takes minutes.

    Raises:
        ConfigError, DataError: the job cannot be simulated, or not be planned.
    """
    planned = plan(sizes, config)
    simulated = simulated_config(config, planned.window, sizes.ranks)
    lines = Lines.of(simulated)
    samples = max(OWN_RANKS[0] * sizes.ranks, OWN_RANKS[1])
    narrow = Job(sizes.ranks, samples, max(BATCH, sizes.ranks), INTERVAL)
    counted = measure(narrow, simulated, traced=False, second=False)
    said, errors = lines.at(narrow, slots_of(simulated, narrow)), dict(lines.errors)
    if sizes.ranks > 1:
        errors["bytes"] = max(errors["bytes"], abs(said.total("bytes", "first") / counted.total("bytes", "first") - 1))
    job = Job(sizes.ranks, planned.window, sizes.batch, planned.every)
    costs = lines.at(job, slots_of(config, job))
    content = _content_sums(sizes, config, planned.window)
    rates = sizes.rates
    gbits, gflops = sizes.gbits or rates.gbits, planned.gflops / 2  # clusters are computed in double precision
    offline = plan(replace(sizes, gbits=1e6), config)  # the transfers are counted here
    looked = job.samples * (ROLLED_ID_SECONDS if planned.rolls else ID_SECONDS)
    compute = {"first": offline.first_seconds, "later": offline.mean_seconds}
    seconds = {}
    for which in WHICH:
        extra = content if which == "first" else Traffic()
        messages, sent = costs.total("messages", which) + extra.messages, costs.total("bytes", which) + extra.bytes
        seconds[which] = compute[which] + messages * rates.message_seconds + 8 * sent / gbits / 1e9 + looked
    clusters = clusters_for(config.graph, job.samples) if graph_waves(simulated, job) else 0
    flop = 2.0 * row_width(simulated) * clusters
    return Simulation(
        narrow,
        counted,
        slots_of(config, job),
        costs,
        errors,
        content,
        seconds,
        flop * SAMPLE_ROWS * clusters * ROUNDS / gflops / 1e9,
        flop * job.samples / sizes.ranks / gflops / 1e9,
        VISIT_BYTES * job.samples,
    )


def _content_sums(sizes: Sizes, config: GraceConfig, window: int) -> Traffic:
    """Return what a rank sends at most while the 6-grams and terms of the first window are summed."""
    sent = Traffic()
    if recipe(config.recipe).content and config.features.enabled:
        table = Sampling.of(window * max(sizes.tokens - GRAM + 1, 0), window)
        sent.ring(0, sizes.ranks, table.table_bytes // 4, 4)
        if config.builds_graph:
            sent.ring(0, sizes.ranks, TERMS + 1, 8)
    return sent


def render(sizes: Sizes, config: GraceConfig, as_json: bool) -> str:
    """Render a simulation as lines or JSON; errors as :func:`run_simulation`."""
    found = run_simulation(sizes, config)
    if as_json:
        return json.dumps(_json(found), indent=1) + "\n"
    narrow, costs = found.narrow, found.costs
    lines = [f"simulated: {narrow.ranks:,} ranks, {narrow.samples:,} samples, first refresh; most of any rank"]
    lines.append(f"{'stage':<12}{'messages':>14}{'bytes':>18}")
    for stage in (stage for which, stage in found.narrow_costs.bytes if which == "first"):
        key = ("first", stage)
        lines.append(f"{stage:<12}{found.narrow_costs.messages[key]:>14,.0f}{found.narrow_costs.bytes[key]:>18,.0f}")
    window = found.visit_bytes // VISIT_BYTES
    lines += ["", f"the job: {sizes.ranks:,} ranks, a window of {window:,} samples, schedules of {found.slots:,} slots"]
    for which in WHICH:
        messages, sent = costs.total("messages", which), costs.total("bytes", which)
        took = f"about {found.seconds[which]:,.0f} s"
        lines.append(f"{which + ' refresh':<16}{messages:,.0f} messages, {in_bytes(sent)} sent by a rank; {took}")
    lines.append(f"{'content, once':<16}{found.content.messages:,} messages, {in_bytes(found.content.bytes)} sent by a rank")
    lines.append(
        f"{'memory, peak':<16}{in_bytes(costs.peak('others'))} on a rank, {in_bytes(costs.peak('root'))} on root, content given"
    )
    lines.append(f"{'and later':<16}{in_bytes(found.visit_bytes)} on every rank, once the run has met all of the window")
    limit = config.refresh.timeout_seconds
    for what, seconds in (
        ("root fits the clusters", found.fit_seconds),
        ("a rank assigns its rows to them", found.assign_seconds),
    ):
        if seconds:
            over = f": above refresh.timeout_seconds {limit:g}, so such a refresh is given up" if seconds > limit else ""
            lines.append(f"{'':<16}{what} in {seconds:,.0f} s{over}")
    missed = ", ".join(f"{name} {error:.1%}" for name, error in found.errors.items())
    lines += ["", f"The job's figures are by formula; for simulated jobs that it was not fitted to it was wrong by: {missed}."]
    return "\n".join(lines) + "\n"


def _json(found: Simulation) -> dict[str, Any]:
    def one(costs: Costs) -> dict[str, Any]:
        return {
            of: {which: {stage: round(n) for (its, stage), n in costs.figures(of).items() if its == which} for which in WHICH}
            for of in QUANTITIES
        }

    plain = {**vars(found), "narrow": vars(found.narrow), "content": vars(found.content)}
    return plain | {"narrow_costs": one(found.narrow_costs), "costs": one(found.costs)}
