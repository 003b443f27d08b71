"""Render the plan: lines with the origin of each figure, a table of what-ifs, or JSON."""

from __future__ import annotations

import json
import textwrap
from dataclasses import asdict, replace
from typing import Any

from grace_ds import recipes
from grace_ds.cli.plan import RefreshPlan, Sizes, plan
from grace_ds.cli.plan_rates import MEASURED
from grace_ds.config.schema import GraceConfig
from grace_ds.errors import GraceError
from grace_ds.recipes import DEFAULT


def render(sizes: Sizes, config: GraceConfig, as_json: bool, columns: int = 110) -> str:
    """Render the plan and its what-ifs as JSON, or as text of at most ``columns`` columns (50 at least).

    Raises:
        ConfigError, DataError: the sizes are impossible.
    """
    current = plan(sizes, config)
    others = _what_ifs(sizes, config, current)
    if as_json:
        return json.dumps(_json(sizes, current, others), indent=1) + "\n"
    columns = max(columns, 50)
    lines = [*_refresh_lines(current, sizes, config), *_memory_lines(current), *_even_lines(current)]
    width = max(len(name) for name, _ in lines)
    body = "\n".join(_wrapped(f"{name:<{width}}  {value}", columns, width + 2) for name, value in lines)
    if not current.builds:
        body += f"\nTo build it: --set recipe={DEFAULT}"
    origins = "\n".join(_wrapped(line, columns, 2) for line in _origins(sizes, current))
    return f"{body}\n\n{_table(others, columns)}\n\n{origins}\n"


def _wrapped(line: str, columns: int, indent: int) -> str:
    """Return a line over as many lines as ``columns`` needs, those after the first indented."""
    name, rest = line[:indent], line[indent:]
    return textwrap.fill(rest, columns, initial_indent=name, subsequent_indent=" " * indent, break_on_hyphens=False)


def _refresh_lines(plan: RefreshPlan, sizes: Sizes, config: GraceConfig) -> list[tuple[str, str]]:
    graph = plan.graph
    every = f"{plan.every:,} steps"
    if plan.every > sizes.interval:
        most = f"{config.refresh.max_overhead:.3g} of the time"
        every += f": stretched from {sizes.interval:,}, so that refreshes take {most} at most (refresh.cadence adaptive)"
    how = f"{graph.tier} ({graph.why})" + (
        f", {graph.clusters:,} clusters, overlap about {graph.overlap}" if graph.clusters else ""
    )
    again = "at each refresh: the window rolls" if plan.rolls else "once: the window stays"
    return [
        ("window", f"{plan.window:,} samples"),
        (
            "repeats of a chosen sample",
            "not known: give --steps"
            if plan.repeats is None
            else f"{plan.repeats:.2f} over the run, at most {config.max_repeats:g} (max_repeats)",
        ),
        ("a refresh every", every),
        (
            "refresh, seconds",
            f"first {plan.first_seconds:.2f}, mean of the others {plan.mean_seconds:.2f}, last {plan.last_seconds:.2f}",
        ),
        ("  features", f"{plan.feature_seconds:.2f}, {again}"),
        ("  choice", f"{plan.choose_seconds:.2f}"),
        ("  trusted probes", f"{plan.probe_seconds:.2f}"),
        ("  graph", f"{plan.graph_seconds:.1f} at {plan.gflops:.0f} Gflop/s" + ("" if plan.builds else ", not counted in")),
        ("graph", how if plan.builds else f"not built by this configuration; if it were: {how}"),
        ("graph, operations a rank", f"{graph.flop:.2e}"),
        ("graph, sent by a rank", in_bytes(graph.wire_bytes)),
    ]


def _memory_lines(plan: RefreshPlan) -> list[tuple[str, str]]:
    graph = plan.graph
    return [
        ("memory of a rank: features", in_bytes(plan.features_bytes)),
        ("  collected rows", in_bytes(plan.table_bytes)),
        ("  schedules, two, and uses", in_bytes(plan.schedule_bytes + plan.visit_bytes)),
        ("  code and libraries", in_bytes(plan.resting_bytes)),
        ("  held between refreshes", in_bytes(plan.held_bytes)),
        ("  features, while computed", in_bytes(plan.scratch_bytes)),
        ("  graph, at its peak", in_bytes(graph.host_bytes)),
        ("  graph, on the GPU", in_bytes(graph.device_bytes) if graph.device_bytes else "none: a CPU backend"),
        ("  selection", in_bytes(plan.select_bytes)),
        ("  in all, at the peak", in_bytes(plan.peak_bytes)),
        ("  hooks, within a step", f"{in_bytes(plan.collect_bytes)}, on the device"),
    ]


def _even_lines(plan: RefreshPlan) -> list[tuple[str, str]]:
    lines = [("a step without GRACE", f"{plan.step_seconds:.4g} s" if plan.step_seconds else "not known")]
    if plan.collect_flop_share is not None and plan.collect_seconds is not None:
        lines.append(("collect", f"{plan.collect_flop_share:.2%} more operations, {plan.collect_seconds:.2g} s a step"))
    else:
        lines.append(("collect", "not known: give --parameters, or --layers and --hidden"))
    if plan.even is None:
        return [
            *lines,
            ("break-even", f"not known: {'a step is' if not plan.step_seconds else 'collecting is'} not known"),
        ]
    even = plan.even
    lines.append(("overhead", f"{even.overhead:.2%} of the steps' time"))
    saved = f": {even.uniform - even.steps:,} of {even.uniform:,} to be saved" if even.uniform else ""
    lines.append(("break-even", f"where uniform needs {even.ratio:.4f} × the steps for the same loss{saved}"))
    return lines


def _what_ifs(sizes: Sizes, config: GraceConfig, current: RefreshPlan) -> list[tuple[str, RefreshPlan | str]]:
    """Return name → plan of each what-if, or the reason in words if it is impossible; first the plan itself."""
    changes: list[tuple[str, dict[str, Any], dict[str, Any]]] = []  # name, changed sizes, changed config
    asked = recipes.recipe(config.recipe).name
    changes += [(f"recipe {name}", {}, {"recipe": name, "ablate": []}) for name in recipes.names()[::-1] if name != asked]
    changes += [(f"without {part}", {}, {"ablate": [*config.ablate, part]}) for part in sorted(config.parts)]
    if current.builds:
        changes += [(f"tier {tier}", {}, {"graph": replace(config.graph, tier=tier)}) for tier in ("exact", "clustered")]
    # The same batch over twice the ranks takes half the time.
    changes += [
        ("ranks × 2", {"ranks": 2 * sizes.ranks, "step_seconds": sizes.step_seconds / 2}, {}),
        ("interval × 2", {"interval": 2 * sizes.interval}, {}),
        ("interval ÷ 2", {"interval": max(1, sizes.interval // 2)}, {}),
        ("budget × 2", {"budget": min(1.0, 2 * sizes.budget)}, {}),
        ("budget ÷ 2", {"budget": sizes.budget / 2}, {}),
    ]
    found: list[tuple[str, RefreshPlan | str]] = [("as asked", current)]
    for name, of_sizes, of_config in changes:
        try:
            found.append((name, plan(replace(sizes, **of_sizes), replace(config, **of_config))))
        except GraceError as error:
            found.append((name, str(error)))
    return found


def _table(others: list[tuple[str, RefreshPlan | str]], columns: int) -> str:
    """Return the table of what-ifs; as several, with some of the columns each, where ``columns`` is too few for one."""
    head = ("what if", "window", "every", "refresh s", "memory peak", "repeats", "overhead", "steps × to break even")
    rows, refused = [head], list[str]()
    for name, p in others:
        if isinstance(p, str):
            refused.append(_wrapped(f"{name}: {p}", columns, 2))
            continue
        repeats = "–" if p.repeats is None else f"{p.repeats:.2f}"
        even = ("–", "–") if p.even is None else (f"{p.even.overhead:.2%}", f"{p.even.ratio:.4f}")
        rows.append((name, f"{p.window:,}", f"{p.every:,}", f"{p.mean_seconds:.2f}", in_bytes(p.peak_bytes), repeats, *even))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    blocks, used = [[0]], widths[0]
    for i in range(1, len(head)):
        if used + 2 + widths[i] > columns and len(blocks[-1]) > 1:
            blocks.append([0])
            used = widths[0]
        blocks[-1].append(i)
        used += 2 + widths[i]
    tables = [
        "\n".join("  ".join(f"{row[i]:>{widths[i]}}" if i else f"{row[i]:<{widths[i]}}" for i in block).rstrip() for row in rows)
        for block in blocks
    ]
    return "\n\n".join([*tables, *(["\n".join(["impossible", *refused])] if refused else [])])


def _origins(sizes: Sizes, plan: RefreshPlan) -> list[str]:
    """Return which figures are counted, measured, given and assumed, in lines."""
    rates = sizes.rates
    gflops = "given" if sizes.gflops else MEASURED
    item = ("given", sizes.item_seconds) if sizes.item_seconds else (rates.of("item_seconds"), rates.item_seconds)
    gbits = ("given", sizes.gbits) if sizes.gbits else (rates.of("gbits"), rates.gbits)
    shape = ""
    if sizes.model is not None:
        m = sizes.model
        shape = f", the model as {m.layers} blocks of width {m.hidden}" + (" (assumed from its parameters)" if m.assumed else "")
    figures = [
        (f"products {plan.gflops:.0f} Gflop/s", gflops),
        (f"features {1e-6 / max(rates.token_seconds, 1e-12):.1f}M tokens a second", rates.of("token_seconds")),
        (f"the dataset hands a sample out in {1e6 * item[1]:.0f} µs", item[0]),
        (f"choice {1e6 * rates.sample_seconds:.1f} µs a sample", rates.of("sample_seconds")),
        (f"between ranks {gbits[1]:.1f} Gbit/s", gbits[0]),
        (f"graph {rates.graph:.2f} × its count", rates.of("graph")),
        (f"wall {rates.busy:.2f} × CPU", rates.of("busy")),
        (f"a refresh at least {rates.fixed_seconds + rates.fixed_feature_seconds:.2f} s", rates.of("fixed_seconds")),
        (f"and {in_bytes(rates.fixed_bytes)}", rates.of("fixed_bytes")),
    ]
    origins = dict.fromkeys(origin for _, origin in figures)
    lines = [f"{origin.capitalize()}: " + "; ".join(name for name, its in figures if its == origin) + "." for origin in origins]
    lines = [
        f"Counted: bytes, operations, window, repeats{shape}.",
        f"A step: {plan.step_origin}.",
        *lines,
        "Expected, not measured: bytes within about 15 %, seconds within a factor of two.",
    ]
    if rates.of("token_seconds") != MEASURED:
        lines.append("--calibrate measures the assumed ones here, in some seconds.")
    return lines


def _json(sizes: Sizes, current: RefreshPlan, others: list[tuple[str, RefreshPlan | str]]) -> dict[str, Any]:
    def one(plan: RefreshPlan) -> dict[str, Any]:
        return {**asdict(plan), "held_bytes": plan.held_bytes, "peak_bytes": plan.peak_bytes}

    what_if = {name: one(p) if not isinstance(p, str) else {"error": p} for name, p in others[1:]}
    return {**one(current), "sizes": asdict(sizes), "what_if": what_if}


def in_bytes(n: float) -> str:
    """Return a number of bytes in words."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024 or unit == "GiB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    raise AssertionError
