"""Each peer chooses what its library or paper says, by an oracle of its own, and its cost is counted."""

from __future__ import annotations

import argparse
import functools
import math
import re
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from grace_ds_quickstart.model import GPT, GPTConfig
from grace_ds_quickstart.pollute import Kind

from benchmarks import peers
from benchmarks.peers import Net
from benchmarks.selection import matrix
from benchmarks.selection.arms import libraries
from benchmarks.selection.arms.attribution import Bergson
from benchmarks.selection.arms.base import Plan, View
from benchmarks.selection.arms.instep import DattriLlm
from benchmarks.selection.arms.lexical import Bm25, DsirLibrary, TokenFrequency, highest, off_median, prior_statistics
from benchmarks.selection.arms.libraries import PEERS
from benchmarks.selection.arms.offline import OfflineFilter
from benchmarks.selection.pools import GROUPS
from benchmarks.selection.report import PoolRuns
from benchmarks.selection.runs import ROOT, RunSpec
from benchmarks.selection.scoring import Scorer
from benchmarks.selection.sizes import training_flops
from benchmarks.selection.store import Stored
from benchmarks.selection.visits import VisitCounts
from grace_ds.errors import DataError


def needs(*modules: str) -> None:
    """Skips the calling test where a peer's library is missing, in CI too, where the extra is not installed."""
    for name in modules:
        pytest.importorskip(name, reason=f"{name} is not installed (pip install grace_ds[peers])")


CONFIG = GPTConfig(vocab=60, context=12, layers=2, heads=2, width=8)
PLAN = Plan(steps=20, batch=4, budget=0.25, interval=4, lr=1e-3, seed=0)


def of_texts(texts: list[str], trusted: list[str], seed: int = 0) -> View:
    """A view whose rows are these texts: a row holds the number of its text."""
    every = [*texts, *trusted]
    numbers = np.arange(len(every), dtype=np.int32)[:, None].repeat(CONFIG.context + 1, 1)
    visits = VisitCounts()
    return View(
        rows=numbers[: len(texts)],
        trusted=numbers[len(texts) :],
        kinds=np.zeros(len(texts), np.uint8),
        folder=Path("pool"),
        vocab=len(every),
        plan=replace(PLAN, seed=seed),
        visits=visits,
        scorer=Scorer(GPT(CONFIG), CONFIG, visits),
        new_model=lambda: GPT(CONFIG),
        decode=lambda rows: [every[row[0]] for row in rows],
    )


def of_rows(n: int = 40, trusted: int = 12, seed: int = 0) -> View:
    """A view of random rows with a model."""
    rng = np.random.default_rng(3)
    torch.manual_seed(1)
    model, visits = GPT(CONFIG), VisitCounts()
    return View(
        rows=rng.integers(0, CONFIG.vocab, (n, CONFIG.context + 1)).astype(np.int32),
        trusted=rng.integers(0, CONFIG.vocab // 2, (trusted, CONFIG.context + 1)).astype(np.int32),
        kinds=np.where(np.arange(n) % 2, Kind.UNIQUE, Kind.JUNK).astype(np.uint8),
        folder=Path("pool"),
        vocab=CONFIG.vocab,
        plan=replace(PLAN, seed=seed),
        visits=visits,
        scorer=Scorer(model, CONFIG, visits),
        new_model=lambda: GPT(CONFIG),
        decode=lambda rows: [" ".join(map(str, row)) for row in rows],
    )


def sentences(words: list[str], count: int, seed: int, length: int = 30) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(words, length)) for _ in range(count)]


WOODS = ["oak", "pine", "birch", "larch", "maple", "willow", "cedar", "elm", "ash", "beech", "alder", "hazel", "rowan"]
METALS = ["iron", "copper", "zinc", "tin", "lead", "silver", "gold", "nickel", "cobalt", "chrome", "titan", "brass"]


# -- by text -----------------------------------------------------------------------------------------------------------


def test_bm25_ranks_as_lucenes_formula_does() -> None:
    needs("bm25s")
    pool = [*sentences(WOODS + METALS, 40, 0, 12), *sentences(WOODS, 20, 1, 25)]
    trusted = [*sentences(WOODS[:6], 5, 2, 8), "(); {}"]
    view = of_texts(pool, trusted)
    arm = Bm25(view)
    words = [text.split() for text in pool]
    holding = Counter(word for row in words for word in set(row))
    mean = sum(map(len, words)) / len(words)

    def score(row: list[str], query: list[str]) -> float:
        counts, total = Counter(row), 0.0
        for word in query:
            idf = math.log(1 + (len(words) - holding[word] + 0.5) / (holding[word] + 0.5))
            total += idf * counts[word] / (counts[word] + 1.5 * (1 - 0.75 + 0.75 * len(row) / mean))
        return total

    expected = np.array([sum(score(row, text.split()) for text in trusted[:-1]) / len(trusted) for row in words])
    np.testing.assert_allclose(arm.scores(), expected, rtol=1e-4)
    chosen = arm.choose(0)
    assert chosen is not None and set(chosen) == set(np.argsort(-expected)[: view.k])
    assert arm.choose(1) is None  # once


def test_dsirs_library_draws_what_is_like_the_target_and_leaves_numpys_generator_alone() -> None:
    needs("data_selection")
    pool = [*sentences(WOODS, 50, 0), *sentences(METALS, 150, 1)]
    kept = []
    for seed in (0, 0, 1):
        np.random.seed(7)
        before = np.random.get_state()[1].tolist()  # type: ignore[index,union-attr]
        view = of_texts(pool, sentences(WOODS, 20, 2), seed=seed)
        chosen = DsirLibrary(view).choose(0)
        assert np.random.get_state()[1].tolist() == before  # type: ignore[index,union-attr]
        assert chosen is not None and len(np.unique(chosen)) == view.k == 50
        assert (chosen < 50).all()  # e^30 and more apart
        kept.append(chosen.tolist())
    assert kept[0] == kept[1]
    alike = [of_texts(sentences(WOODS, 200, 5), sentences(WOODS, 20, 2), seed=seed) for seed in (0, 1)]
    first, second = (set(np.asarray(DsirLibrary(view).choose(0)).tolist()) for view in alike)
    assert first != second  # a draw, not a ranking


def test_offline_drops_every_planted_copy_and_keeps_the_first() -> None:
    needs("datasketch", "fasttext")
    plain = sentences(WOODS + METALS, 60, 0, 40)
    copies = [text.replace("oak", "fir", 1).replace("gold", "ore", 1) for text in plain[:15]]
    order = np.random.default_rng(1).permutation(75)
    texts = [[*plain, *copies][i] for i in order]
    found = OfflineFilter(of_texts(texts, sentences(WOODS, 20, 2))).copies()
    for at in range(15):
        places = sorted((int(np.flatnonzero(order == at)[0]), int(np.flatnonzero(order == 60 + at)[0])))
        assert [bool(found[place]) for place in places] == [False, True]
    assert int(found.sum()) == 15


def test_offline_keeps_the_part_of_the_pool_that_reads_like_the_trusted_text() -> None:
    needs("datasketch", "fasttext")
    pool = [*sentences(METALS, 100, 0), *sentences(WOODS, 100, 1)]
    arm = OfflineFilter(of_texts(pool, sentences(WOODS, 100, 2)))
    chosen = arm.choose(0)
    assert chosen is not None and len(chosen) == 70 and (chosen >= 100).all()
    assert arm.choose(1) is None and arm.end() == {"left": 200 - int(arm.copies().sum())}


def test_priors_are_those_of_a_loop_over_tokens() -> None:
    rows = np.random.default_rng(0).integers(0, 9, (30, 7)).astype(np.int32)
    term, document = Counter(rows.reshape(-1).tolist()), Counter(t for row in rows.tolist() for t in set(row))
    total = sum(term[t] * document[t] for t in term)
    prior = [[term[t] * document[t] / total for t in row] for row in rows.tolist()]
    mean, spread = prior_statistics(rows, 9)
    np.testing.assert_allclose(mean, [sum(map(math.log, row)) / 7 for row in prior])
    np.testing.assert_allclose(spread, [np.std(row, ddof=1) for row in prior])
    assert off_median(np.array([5.0, 1.0, 3.0])).tolist() == [0.5, 0.5, 0.0]


def test_token_frequency_keeps_the_ordinary_half() -> None:
    rng = np.random.default_rng(0)
    common = 20 + rng.zipf(1.6, (100, 13)) % 30
    odd = np.concatenate([rng.integers(0, 20, (25, 13)), np.full((25, 13), 21)])  # rare tokens; one token over and over
    view = replace(of_rows(150), rows=np.concatenate([common, odd]).astype(np.int32))
    chosen = TokenFrequency(view).choose(0)
    assert chosen is not None and len(chosen) == 75
    assert np.mean(chosen >= 100) < 0.05


def test_the_highest_are_those_of_a_sort() -> None:
    assert highest(np.array([1.0, 3.0, 3.0, 2.0]), 3).tolist() == [1, 2, 3]


# -- by gradients ------------------------------------------------------------------------------------------------------


def gradients(model: GPT, rows: np.ndarray, names: list[str]) -> torch.Tensor:
    """The gradient of the mean loss of ``rows`` by the named parameters, in one vector."""
    model.zero_grad()
    model(torch.from_numpy(rows.astype(np.int64))).backward()
    parameters = dict(model.named_parameters())
    return torch.cat([parameters[name].grad.flatten().clone() for name in names])  # type: ignore[union-attr]


def test_bergsons_scores_are_cosines_of_gradients_taken_one_row_at_a_time() -> None:
    needs("bergson")
    view = of_rows()
    model = view.scorer.model
    names = [
        f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear) and name != "lm_head"
    ]
    single = functools.partial(gradients, model, names=names)
    trusted = torch.stack([(g := single(view.trusted[i : i + 1])) / g.norm() for i in range(len(view.trusted))]).mean(0)
    expected = torch.stack([(g := single(view.rows[i : i + 1])) @ trusted / g.norm() for i in range(view.n)]).numpy()
    arm = Bergson(view)
    np.testing.assert_allclose(arm.scores(model, projection=None), expected, atol=1e-5)
    assert arm.choose(0) is None  # not before the model has learned anything
    chosen = arm.choose(1)
    assert chosen is not None and len(chosen) == view.k and arm.choose(2) is None
    assert view.visits.flops_selection == (view.n + len(view.trusted)) * training_flops(CONFIG)


def test_dattri_leaves_the_gradient_of_the_half_that_helps_the_trusted_rows_most() -> None:
    needs("dattri_llm")
    view = of_rows()
    model, plain = view.scorer.model, GPT(CONFIG)
    plain.load_state_dict(model.state_dict())  # without hooks
    names = [name for name, _ in model.named_parameters() if name != "positions.weight"]
    alone = functools.partial(gradients, plain, names=names)
    untied = GPT(CONFIG)  # the library scores layers: head and embedding are two, though they share their weight
    untied.load_state_dict(model.state_dict())
    untied.lm_head.weight = torch.nn.Parameter(untied.tokens.weight.detach().clone())
    scored = [
        name for name in (*names, "lm_head.weight") if "norm" in name or name.endswith("weight")
    ]  # no biases of linear layers
    by_layer = functools.partial(gradients, untied, names=scored)
    arm, twin = DattriLlm(view), DattriLlm(of_rows())
    arm.begin(SimpleNamespace(module=model))
    for step in range(3):
        rows = view.rows[arm.take(step).ids]
        assert len(rows) == 2 * view.plan.batch
        with view.visits.counted():
            left = gradients(model, rows, names)
        kept = np.delete(np.arange(len(rows)), arm.callback.last_dropped)
        target = by_layer(view.trusted[twin._trusted.take(arm.TARGET)])
        scores = torch.stack([by_layer(row[None]) @ target for row in rows])
        assert kept.tolist() == sorted(torch.argsort(scores)[view.plan.batch :].tolist())
        torch.testing.assert_close(left, alone(rows[kept]), rtol=1e-3, atol=1e-6)
    assert 0 < view.visits.cpu_selection < view.visits.cpu_total
    told = arm.end()
    assert sum(told["kept"].values()) == pytest.approx(1) and 0 < told["distinct_kept"] <= 3 * view.plan.batch
    assert view.visits.flops_selection == 3 * (arm.TARGET + view.plan.batch) * training_flops(CONFIG)
    torch.testing.assert_close(gradients(model, rows, names), alone(rows))  # no hook is left


# -- what is installed -------------------------------------------------------------------------------------------------


def test_every_library_of_a_peer_is_in_the_extra() -> None:
    told = (ROOT / "pyproject.toml").read_text("utf-8")
    extra = re.search(r"^peers = \[(.*?)^\]", told, re.DOTALL | re.MULTILINE)
    assert extra is not None
    named = set(re.findall(r'"([a-z0-9-]+)>=', extra.group(1)))
    assert {name for needed in PEERS.values() for name in needed} | {"datasets"} == named


def test_a_missing_library_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEERS, "bm25", ("a-wheel-that-nobody-has",))
    assert libraries.missing(["uniform", "token_frequency", "bm25"]) == {"bm25": ["a-wheel-that-nobody-has"]}
    with pytest.raises(DataError, match=r"arms bm25 need a-wheel-that-nobody-has.*grace_ds\[peers\].*--arms"):
        libraries.require(["uniform", "bm25"])
    libraries.require(["uniform", "token_frequency"])
    assert libraries.installed("token_frequency") == ""


# -- net of cost -------------------------------------------------------------------------------------------------------

SPEC = RunSpec(pool="crawl", pool_folder="/a", pool_digest="d", arm="uniform", seed=0, order_seed=0, steps=400)


def result(arm: str, seed: int, dev: float, *, steps: int = 400, chosen: float = 0.0) -> dict[str, Any]:
    """A run of 0.2 CPU seconds a step for training and ``chosen`` CPU seconds for selection."""
    spec = replace(SPEC, arm=arm, seed=seed, order_seed=seed, steps=steps)
    return {"settings": asdict(spec), "dev": dev, "cpu_total": 0.2 * steps + chosen, "cpu_selection": chosen}


def uniform(seed: int = 0) -> list[dict[str, Any]]:
    return [result("uniform", seed, loss, steps=steps) for steps, loss in ((400, 4.4), (600, 4.2), (1000, 4.0))]


def test_selection_is_paid_for_in_uniform_steps() -> None:
    assert peers.net(result("rs2", 0, 4.1), uniform(), "dev") == Net(400, False, pytest.approx(0.3))
    # 40 s of selection beside 80 s of training: 600 steps.
    assert peers.net(result("bm25", 0, 4.1, chosen=40), uniform(), "dev") == Net(pytest.approx(600), False, pytest.approx(0.1))
    # √(400 · 600) steps: half-way in the logarithm.
    half = peers.net(result("bm25", 0, 4.1, chosen=0.2 * math.sqrt(400 * 600) - 80), uniform(), "dev")
    assert half.gain == pytest.approx(0.2)
    # Beyond the longest run its loss stands.
    dear = peers.net(result("dattri", 0, 4.1, chosen=400), uniform(), "dev")
    assert dear.beyond and dear.steps == pytest.approx(2400) and dear.gain == pytest.approx(-0.1)


def pool(name: str = "crawl", grace: tuple[float, ...] = (0.30, 0.34), offline: tuple[float, ...] = (0.20, 0.22)) -> PoolRuns:
    found: list[dict[str, Any]] = []
    for seed, (ours, theirs) in enumerate(zip(grace, offline, strict=True)):
        found += [*uniform(seed), result("grace", seed, 4.4 - ours), result("offline", seed, 4.4 - theirs)]
        found += [result("bm25", seed, 4.4 - theirs - 0.1, chosen=40)]  # ahead before its cost, behind after it
    return PoolRuns(name, found, "dev", 400)


def test_the_margin_is_over_the_best_peer_after_its_cost_in_errors_of_the_difference() -> None:
    assert peers.best_peer(pool()) == "offline"
    (claim,) = peers.claims([pool()], "grace")
    # Differences 0.10 and 0.12: mean 0.11, standard error 0.01.
    assert claim.name == "peers_margin_crawl" and claim.value == pytest.approx(11) and claim.met
    assert "offline" in claim.unit
    rows = {row["arm"]: row for row in peers.net_rows(pool(), "grace")}
    assert rows["offline"]["ahead"] == pytest.approx(0.11) and rows["offline"]["in s.e."] == pytest.approx(11)
    assert rows["bm25"]["equal steps"] == "600" and rows["bm25"]["net gain"] == pytest.approx(0.11)
    assert rows["grace"]["ahead"] is None and next(iter(rows)) == "grace"


def test_the_margin_on_generated_pools_is_the_least_and_answers_have_no_goal() -> None:
    pools = [pool("generated-heldout-25"), pool("machine-written", grace=(0.21, 0.24)), pool("answers")]
    found = {claim.name: claim for claim in peers.claims(pools, "grace")}
    # Differences 0.01 and 0.02: mean 0.015, standard error 0.005.
    assert found["peers_margin_generated"].value == pytest.approx(3) and found["peers_margin_generated"].met
    assert found["peers_margin_answers"].goal is None
    assert peers.claims([pool(grace=(0.3,), offline=(0.2,))], "grace") == []  # one seed has no error


def test_the_command_runs_every_arm_of_a_seed_before_the_next_and_uniform_at_three_lengths() -> None:
    parser = argparse.ArgumentParser()
    peers.add_arguments(parser)
    args = parser.parse_args(["--arms", "token_frequency", "grace", "--seeds", "2"])
    assert GROUPS[args.pool] == (*GROUPS["generated-heldout"], "crawl", "answers")
    stored = Stored(Path("/p"), {"digest": "d", "rows": {"train": 20_000}}, reused=True)
    specs = matrix.run_specs(args, "crawl", stored, matrix.seeds_of(args, 0))
    runs = [("uniform", 400), ("token_frequency", 400), ("grace", 400), ("uniform", 600), ("uniform", 1000)]
    assert [(s.arm, s.steps, s.seed) for s in specs] == [(*run, seed) for seed in (0, 1) for run in runs]
