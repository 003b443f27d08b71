"""The run in few words and numbers, the same on the page and in the terminal."""

from __future__ import annotations

from grace_ds.report.facts import Facts
from grace_ds.report.load import Run


def cards(run: Run, found: Facts) -> list[tuple[str, str, str]]:
    """(what, value, remark) of the run's chief numbers."""
    out = []
    if found.delta is not None:
        out.append(("loss, grace − uniform", f"{found.delta:+.4f}", "nats per token, one run each; below 0 is a gain"))
    else:
        out.append(("loss, grace − uniform", "unknown", "an arm is missing"))
    cost = found.cost
    if cost.training:
        until = "whole run" if cost.whole else "up to the last refresh"
        share = (cost.refreshes + cost.collect) / cost.training
        spent = f"refreshes {cost.refreshes:.2f} s, collect {cost.collect:.2f} s of {cost.training:.1f} s, {until}"
        out.append(("added time", f"{share:.1%}", spent))
    else:
        out.append(("added time", f"{cost.refreshes:.2f} s", "in refreshes; the training time is not recorded"))
    chosen = [g for g in found.generations if not g.uniform]
    out.append(("refreshes", str(len(found.generations)), f"{len(chosen)} chose, {cost.failures} given up"))
    if chosen:
        g = chosen[-1]
        out.append(("coreset", f"{g.size:,}", f"{g.size / g.window:.0%} of {g.window:,}" if g.window else ""))
        churn = [g.churn for g in chosen if g.churn is not None]
        out.append(("churn, mean", f"{sum(churn) / len(churn):.0%}" if churn else "–", f"of {len(churn)} changes"))
    if found.use is not None:
        use = found.use
        out.append(("different samples", f"{use.distinct:,}", f"in {use.slots:,} slots planned; one at most {use.most} times"))
    return out


def chosen_by(run: Run, found: Facts) -> str:
    """One paragraph: by what the run chose, and what the guard said last."""
    recipe = str(run.config.get("recipe", "")) or "unknown"
    opened = [g for g in found.generations if g.uniform]
    words = [f"Recipe {recipe}."]
    if run.config.get("mode") == "shadow":
        words.append("Shadow mode: the job trained on its own order, and on none of these schedules.")
    if opened:
        many = f"{len(opened)} of {len(found.generations)} schedules"
        words.append(f"{many} were the whole pool in uniform order (the warm-up, or the guard).")
    told = [g for g in found.generations if g.level]
    if told:
        words.append(f"The guard's last word, at step {told[-1].step}: {told[-1].level} ({told[-1].reason}).")
    return " ".join(words)


def loss_said(run: Run, found: Facts) -> str:
    """What the losses allow to be said."""
    if not run.curves:
        return "No loss is known for this run."
    if found.delta is None:
        return "There is no uniform arm beside this run: nothing here says whether selection helped."
    verdict = "below" if found.delta < 0 else "not below"
    return (
        f"At the last common step GRACE is {found.delta:+.4f} nats per token, {verdict} uniform. One run of each: how much "
        "two uniform runs in another order would differ is not known here. Equal steps; GRACE's own time is under “What it cost”."
    )
