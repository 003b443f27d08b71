"""The goals that were set before anything was measured, each for the pools that it speaks of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.quickstart import LEAST, standard_error
from benchmarks.record import Claim
from benchmarks.selection.equal_loss import joint_bound
from benchmarks.selection.pools import HELDOUT
from benchmarks.selection.report import PoolRuns

BOUNDS = {"": "", ">": ", a lower bound", "<": ", an upper bound", "?": ", of lower and upper bounds"}
# Claim → the arm that does without a part, what it does without, and the goals on generated pools and on any other.
GAINS = {
    "gradient_gain": ("no_gradients", "gradients and loss", 0.2, -0.05),
    "graph_gain": ("no_graph", "the graph", 0.1, -0.05),
    "sketch_gain": ("no_sketches", "the learned parts of the graph's rows", None, None),
}


def claims(pools: Sequence[PoolRuns], arm: str, model: str = "small") -> list[Claim]:
    """The claims about ``arm`` that these pools can tell of; none about an arm that did not run."""
    by_name = {runs.pool: runs for runs in pools}
    found: list[Claim] = []
    if "crawl" in by_name and by_name["crawl"].of(arm):
        found += crawl_claims(by_name["crawl"], arm)
    held_out = [by_name[name] for name in HELDOUT if name in by_name and not is_generated(name)]
    if held_out:
        found += share_claims("oracle_share_heldout", held_out, arm, 0.75)
    generated = [runs for runs in pools if is_generated(runs.pool)]
    if generated:
        found += share_claims("oracle_share_generated", generated, arm, 0.9)
    if "natural" in by_name and by_name["natural"].of(arm):
        found += natural_claims(by_name["natural"], arm)
    if "answers" in by_name and by_name["answers"].of(arm):
        found += against_content(by_name["answers"], arm)
    found += gain_claims(generated, arm, True) + gain_claims([r for r in pools if not is_generated(r.pool)], arm, False)
    if found and any(runs.of(arm) for runs in pools):
        found.append(choosing_claim(pools, arm, model))
    return found


def is_generated(pool: str) -> bool:
    """Whether a pool holds machine-written code."""
    return pool.startswith("generated") or pool == "machine-written"


def crawl_claims(runs: PoolRuns, arm: str) -> list[Claim]:
    """Steps and net cost to equal loss, share of the oracle's gain."""
    found: list[Claim] = []
    against = runs.ratios(arm)
    if against:
        bound = BOUNDS[joint_bound([r.bound for r in against])]
        least = min(against, key=lambda r: r.steps)
        steps, net = [r.steps for r in against], [r.cpu for r in against]
        unit = f"uniform's steps to equal loss / {arm}'s"
        found += [
            Claim("steps_ratio_mean", float(np.mean(steps)), f"{unit}, mean over seeds{bound}", 2.0, True),
            Claim("steps_ratio_min", least.steps, f"{unit}, worst seed{BOUNDS[least.bound]}", 1.6, True),
            Claim("net_ratio", float(np.mean(net)), f"uniform's CPU s to equal loss / {arm}'s, all in, mean{bound}", 1.9, True),
        ]
    share = runs.share(arm)
    if share is not None:
        found.append(Claim("oracle_share", share, "of the oracle's gain over uniform", 1.0, True))
    return found + against_content(runs, arm)


def share_claims(name: str, pools: Sequence[PoolRuns], arm: str, goal: float) -> list[Claim]:
    """The least share of the oracle's gain over these pools, where the arm ran on all of them."""
    shares = [share for runs in pools if (share := runs.share(arm)) is not None]
    if len(shares) < len(pools):
        return []
    names = ", ".join(runs.pool for runs in pools)
    return [Claim(name, min(shares), f"of the oracle's gain, least of {names}", goal, True)]


def gain_claims(pools: Sequence[PoolRuns], arm: str, generated: bool) -> list[Claim]:
    """What the parts add: shares of the oracle's gain with all of them, less those with one left out; the least over pools."""
    found = []
    for name, (without, what, high, low) in GAINS.items():
        gains = {
            runs.pool: whole - part
            for runs in pools
            if (whole := runs.share(arm)) is not None and (part := runs.share(without)) is not None
        }
        if gains:
            unit = f"oracle shares, {arm} minus the same without {what}, least of {', '.join(gains)}"
            suffix, goal = ("_generated", high) if generated else ("_elsewhere", low)
            found.append(Claim(name + suffix, min(gains.values()), unit, goal, True))
    return found


def against_content(runs: PoolRuns, arm: str) -> list[Claim]:
    """Loss beyond that of content alone, seed by seed, in units of nothing but nats; below 0 the arm is ahead."""
    content = {run["settings"]["seed"]: float(run[runs.metric]) for run in runs.of("content")}
    apart = [float(r[runs.metric]) - content[seed] for r in runs.of(arm) if (seed := r["settings"]["seed"]) in content]
    if not apart or arm == "content":
        return []
    unit = f"nats/token on {runs.pool}, {arm} minus content, mean over seeds; the goal is the standard error"
    return [Claim(f"beyond_content_{runs.pool}", float(np.mean(apart)), unit, standard_error(apart))]


def natural_claims(runs: PoolRuns, arm: str) -> list[Claim]:
    """Where there is nothing to win: what is lost."""
    deltas = runs.deltas(arm)
    goal = max(LEAST, standard_error(deltas))
    return [Claim("natural_delta_mean", float(np.mean(deltas)), f"nats/token, {arm} minus uniform", goal)]


def choosing_claim(pools: Sequence[PoolRuns], arm: str, model: str) -> Claim:
    """What choosing costs, collecting and refreshes counted."""
    share = float(np.mean([runs.choosing(arm) for runs in pools if runs.of(arm)]))
    return Claim(f"choosing_share_{model}", share, f"share of {arm}'s CPU s spent on choosing", {"small": 0.08}.get(model, 0.02))
