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


def claims(pools: Sequence[PoolRuns], arm: str) -> list[Claim]:
    """The claims about ``arm`` that these pools can tell of; none about an arm that did not run."""
    by_name = {runs.pool: runs for runs in pools}
    found: list[Claim] = []
    if "crawl" in by_name and by_name["crawl"].of(arm):
        found += crawl_claims(by_name["crawl"], arm)
    held_out = [by_name[name] for name in HELDOUT if name in by_name]
    if held_out:
        found += held_out_claims(held_out, arm)
    if "natural" in by_name and by_name["natural"].of(arm):
        found += natural_claims(by_name["natural"], arm)
    return found


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
            Claim("net_ratio", float(np.mean(net)), f"uniform's CPU s to equal loss / {arm}'s, all in, mean{bound}", 1.8, True),
        ]
    share = runs.share(arm)
    if share is not None:
        found.append(Claim("oracle_share", share, "of the oracle's gain over uniform", 0.9, True))
    return found


def held_out_claims(pools: Sequence[PoolRuns], arm: str) -> list[Claim]:
    """The worst share over the held-out pools, and what gradients add beyond the prior at best."""
    found: list[Claim] = []
    shares = [share for runs in pools if (share := runs.share(arm)) is not None]
    names = ", ".join(runs.pool for runs in pools)
    if len(shares) == len(pools):
        found.append(Claim("oracle_share_heldout", min(shares), f"of the oracle's gain, least of {names}", 0.75, True))
    gains = [
        grace - prior
        for runs in pools
        if (grace := runs.share("grace")) is not None and (prior := runs.share("prior")) is not None
    ]
    if gains:
        found.append(Claim("gradient_gain", max(gains), f"grace minus prior, oracle shares, largest of {names}", 0.1, True))
    return found


def natural_claims(runs: PoolRuns, arm: str) -> list[Claim]:
    """Where there is nothing to win: what is lost, and what is paid."""
    deltas = runs.deltas(arm)
    goal = max(LEAST, standard_error(deltas))
    return [
        Claim("natural_delta_mean", float(np.mean(deltas)), f"nats/token, {arm} minus uniform", goal),
        Claim("natural_cost", runs.choosing(arm), f"share of {arm}'s CPU s spent on selection", 0.02),
    ]
