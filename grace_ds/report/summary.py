"""Summarise the run in few words and numbers, the same on the page and in the terminal."""

from __future__ import annotations

from grace_ds.report.facts import Facts
from grace_ds.report.load import Run


def cards(run_facts: Facts) -> list[tuple[str, str, str]]:
    """Return (label, value, remark) of the run's main numbers."""
    entries = []
    if run_facts.delta is not None:
        entries.append(("loss, grace − uniform", f"{run_facts.delta:+.4f}", "nats per token, one run each; below 0 is a gain"))
    else:
        entries.append(("loss, grace − uniform", "unknown", "an arm is missing"))
    cost = run_facts.cost
    if cost.training:
        until = "whole run" if cost.whole else "up to the last refresh"
        share = (cost.refreshes + cost.collect) / cost.training
        spent = f"refreshes {cost.refreshes:.2f} s, collect {cost.collect:.2f} s of {cost.training:.1f} s, {until}"
        entries.append(("added time", f"{share:.1%}", spent))
    else:
        entries.append(("added time", f"{cost.refreshes:.2f} s", "in refreshes; the training time is not recorded"))
    chosen = [g for g in run_facts.generations if not g.uniform]
    entries.append(("refreshes", str(len(run_facts.generations)), f"{len(chosen)} chose, {cost.failures} given up"))
    if chosen:
        latest = chosen[-1]
        entries.append(
            ("coreset", f"{latest.size:,}", f"{latest.size / latest.window:.0%} of {latest.window:,}" if latest.window else "")
        )
        churn = [g.churn for g in chosen if g.churn is not None]
        entries.append(("churn, mean", f"{sum(churn) / len(churn):.0%}" if churn else "–", f"of {len(churn)} changes"))
    if run_facts.use is not None:
        use = run_facts.use
        entries.append(
            ("different samples", f"{use.distinct:,}", f"in {use.slots:,} slots planned; one at most {use.most} times")
        )
    return entries


def chosen_by(run: Run, run_facts: Facts) -> str:
    """Return a paragraph on how the run chose samples, and on the guard's last decision."""
    recipe = str(run.config.get("recipe", "")) or "unknown"
    opened = [g for g in run_facts.generations if g.uniform]
    sentences = [f"Recipe {recipe}."]
    if run.config.get("mode") == "shadow":
        sentences.append("Shadow mode: the job trained on its own order, and on none of these schedules.")
    if opened:
        many = f"{len(opened)} of {len(run_facts.generations)} schedules"
        sentences.append(f"{many} were the whole pool in uniform order (the warm-up, or the guard).")
    decided = [g for g in run_facts.generations if g.level]
    if decided:
        sentences.append(f"The guard's last word, at step {decided[-1].step}: {decided[-1].level} ({decided[-1].reason}).")
    return " ".join(sentences)


def loss_verdict(run: Run, run_facts: Facts) -> str:
    """Return what can be concluded from the losses."""
    if not run.curves:
        return "No loss is known for this run."
    if run_facts.delta is None:
        return "There is no uniform arm beside this run: nothing here says whether selection helped."
    verdict = "below" if run_facts.delta < 0 else "not below"
    return (
        f"At the last common step GRACE is {run_facts.delta:+.4f} nats per token, {verdict} uniform. One run of each: how much "
        "two uniform runs in another order would differ is not known here. Equal steps; GRACE's own time is under “What it cost”."
    )
