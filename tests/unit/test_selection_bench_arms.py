"""Each arm chooses what its paper says, from the pool and within its budget, and pays for what it does."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from grace_ds_quickstart.model import GPT, GPTConfig
from grace_ds_quickstart.pollute import Kind, near_duplicates

from benchmarks.selection.arms import ARMS, SYSTEM
from benchmarks.selection.arms.base import Laps, Plan, SubsetArm, View
from benchmarks.selection.arms.filters import compression_ratios, dsir_log_ratio, duplicates, jaccard, shingles
from benchmarks.selection.arms.graph import d2_picks
from benchmarks.selection.arms.libraries import PEERS
from benchmarks.selection.arms.simple import InfoBatch, TrustedUpsample
from benchmarks.selection.arms.system import RECIPES, block
from benchmarks.selection.job import rescale
from benchmarks.selection.scoring import Scorer, head_gradient_norms, hidden_states, mean_loss
from benchmarks.selection.sizes import SHAPES, forward_flops, head_norm_flops, model_config
from benchmarks.selection.visits import VisitCounts
from grace_ds.config.load import load_config
from grace_ds.records import Neighbours

CONFIG = GPTConfig(vocab=50, context=16, layers=2, heads=2, width=8)
OWN = sorted(set(ARMS) - set(SYSTEM) - set(PEERS))  # the peers: test_selection_bench_peers.py


def view(n: int = 120, steps: int = 20, seed: int = 0, trusted: int = 16) -> View:
    rng = np.random.default_rng(5)
    torch.manual_seed(0)
    rows = rng.integers(0, CONFIG.vocab, (n, CONFIG.context + 1)).astype(np.int32)
    kinds = np.where(np.arange(n) < n // 2, Kind.UNIQUE, Kind.JUNK).astype(np.uint8)
    visits = VisitCounts()
    return View(
        rows=rows,
        trusted=rng.integers(0, CONFIG.vocab, (trusted, CONFIG.context + 1)).astype(np.int32),
        kinds=kinds,
        folder=Path("pool"),
        vocab=CONFIG.vocab,
        plan=Plan(steps=steps, batch=8, budget=0.25, interval=steps // 5, lr=1e-3, seed=seed),
        visits=visits,
        scorer=Scorer(GPT(CONFIG), CONFIG, visits),
        new_model=lambda: GPT(CONFIG),
        decode=lambda part: ["".join(chr(97 + t % 26) for t in row) for row in part],
    )


@pytest.mark.parametrize("name", OWN)
def test_an_arm_feeds_ids_of_the_pool_and_a_subset_arm_of_its_subset_only(name: str) -> None:
    v = view()
    arm = ARMS[name](v)
    arm.begin(None)
    fed: list[tuple[int, ...]] = []
    for step in range(v.plan.steps):
        arm.before(step)
        batch = arm.take(step)
        assert len(batch.ids) == v.plan.batch and batch.ids.min() >= 0
        assert batch.ids.max() < v.n + (len(v.trusted) if name == "trusted_upsample" else 0)
        if isinstance(arm, SubsetArm) and len(arm.laps.ids) < v.n:
            assert len(arm.laps.ids) <= v.k and set(batch.ids) <= set(arm.laps.ids.tolist())
        arm.observe(step, batch.ids, np.linspace(1, 2, len(batch.ids), dtype=np.float32))
        fed.append(tuple(batch.ids))
    arm.end()
    again = ARMS[name](view())  # deterministic in its seed
    again.begin(None)
    for step in range(3):
        again.before(step)
        assert tuple(again.take(step).ids) == fed[step]


@pytest.mark.parametrize("name", [n for n in OWN if n not in ("infobatch",)])
def test_another_seed_gives_another_order(name: str) -> None:
    first = []
    for seed in (0, 1):
        arm = ARMS[name](view(seed=seed))
        arm.begin(None)
        arm.before(0)
        first.append(tuple(arm.take(0).ids))
    assert first[0] != first[1]


def test_laps_use_every_id_equally() -> None:
    laps = Laps(np.array([3, 5, 9]), np.random.default_rng(0))
    drawn = np.concatenate([laps.take(2) for _ in range(9)])
    assert [int((drawn == i).sum()) for i in (3, 5, 9)] == [6, 6, 6]


def test_the_oracle_never_feeds_anything_but_unique_rows() -> None:
    v = view()
    arm = ARMS["oracle"](v)
    for step in range(v.plan.steps):
        arm.before(step)
        assert (v.kinds[arm.take(step).ids] == Kind.UNIQUE).all()


def test_rs2_is_fresh_at_each_refresh_and_static_random_is_not() -> None:
    subsets: dict[str, list[frozenset[int]]] = {"rs2": [], "static_random": []}
    for name, seen in subsets.items():
        arm = ARMS[name](view())
        for step in range(0, 16, 4):
            arm.before(step)
            seen.append(frozenset(arm.laps.ids.tolist()))
    assert len(set(subsets["static_random"])) == 1
    assert all(not a & b for a, b in itertools.combinations(subsets["rs2"], 2))  # 4 × 25 %: the whole pool once


def test_trusted_rows_get_a_tenth_of_the_slots() -> None:
    v = view(steps=50)
    arm = TrustedUpsample(v)
    ids = np.concatenate([arm.take(step).ids for step in range(50)])
    assert int((ids >= v.n).sum()) == round(0.1 * len(ids))
    assert len(np.unique(ids[ids >= v.n])) == len(v.trusted)


# -- InfoBatch ---------------------------------------------------------------------------------------------------------


def test_infobatch_keeps_the_expected_loss_and_the_high_losses() -> None:
    v = view(n=400)
    arm = InfoBatch(v)
    losses = np.random.default_rng(1).gamma(2.0, size=v.n).astype(np.float32)
    arm.observe(0, v.ids, losses)
    sums, sizes = [], []
    for _ in range(400):
        kept, weights = arm.epoch()
        assert set(np.flatnonzero(losses >= losses.mean())) <= set(kept)
        sums.append(float((weights * losses)[kept].sum()))
        sizes.append(len(kept))
    low = losses < losses.mean()
    error = float(np.sqrt(np.square(losses[low]).sum() / 400))  # of the mean of the sums
    assert np.mean(sums) == pytest.approx(float(losses.sum()), abs=4 * error)
    assert np.mean(sizes) == pytest.approx(v.n - low.sum() / 2, rel=0.02)


def test_infobatch_ends_on_the_whole_pool_without_weights_and_never_prunes_the_unseen() -> None:
    v = view(n=40, steps=80)
    arm = InfoBatch(v)
    for step in range(80):
        arm.before(step)
        batch = arm.take(step)
        assert batch.weights is not None
        if step < 5 or step >= 70:  # the first epoch, and the last eighth
            assert (batch.weights == 1).all()
        arm.observe(step, batch.ids, (batch.ids % 7 + 1).astype(np.float32))
    assert not np.isnan(arm.scores).any()


def test_rescaled_losses_have_the_gradient_of_the_weighted_mean() -> None:
    torch.manual_seed(0)
    model = GPT(CONFIG)
    rows = torch.randint(0, 50, (4, 17))
    weights = np.array([2.0, 0.0, 1.0, 0.5], np.float32)
    handle = rescale(model, weights)
    model(rows).backward()
    handle.remove()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    (sum(w * model(rows[i : i + 1]) for i, w in enumerate(weights.tolist())) / 4).backward()
    for a, p in zip(found, model.parameters(), strict=True):
        assert p.grad is not None
        torch.testing.assert_close(a, p.grad, atol=1e-6, rtol=1e-4)


# -- scoring and its cost ----------------------------------------------------------------------------------------------


def test_scores_are_those_of_one_sample_at_a_time() -> None:
    v = view(n=70)
    losses, norms = v.scorer.losses(v.rows), v.scorer.gradient_norms(v.rows)
    model = v.scorer.model
    for i in (0, 33, 69):
        row = torch.from_numpy(v.rows[i : i + 1].astype(np.int64))
        assert losses[i] == pytest.approx(float(model(row).detach()), rel=1e-5)
        hidden = hidden_states(model, row[:, :-1]).detach()
        head = model.lm_head.weight.detach().clone().requires_grad_()
        logits = hidden @ head.t()
        torch.nn.functional.cross_entropy(logits[0], row[0, 1:]).backward()  # type: ignore[no-untyped-call]
        assert head.grad is not None
        assert norms[i] == pytest.approx(float(head.grad.norm()), rel=1e-4)
        assert float(head_gradient_norms(hidden, logits.detach(), row[:, 1:])) == pytest.approx(float(head.grad.norm()), rel=1e-4)
    assert mean_loss(model, v.rows) == pytest.approx(float(losses.mean()), rel=1e-5)
    assert model.training
    assert v.visits.flops_selection == 70 * (2 * forward_flops(CONFIG) + head_norm_flops(CONFIG))


@pytest.mark.parametrize("name", SHAPES)
def test_flops_are_those_that_torch_counts(name: str) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    config = model_config(name, vocab=1024, context=64)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        GPT(config)(torch.zeros(2, 65, dtype=torch.long))
    assert counter.get_total_flops() == 2 * forward_flops(config)


def test_loss_topk_waits_for_the_first_refresh_and_takes_the_highest() -> None:
    v = view()
    arm = ARMS["loss_topk"](v)
    arm.before(0)
    assert len(arm.laps.ids) == v.n and v.visits.flops_selection == 0
    arm.before(4)
    losses = v.scorer.losses(v.rows)
    assert set(arm.laps.ids.tolist()) == set(np.argsort(-losses)[: v.k].tolist())


# -- filters and graphs ------------------------------------------------------------------------------------------------


def test_dedup_finds_planted_copies_and_keeps_distinct_rows() -> None:
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 1000, (400, 65)).astype(np.int32)
    copies = rows[rng.integers(0, 400, 300)].copy()
    copies[np.arange(300), rng.integers(0, 65, 300)] = 1001  # one token: at least 56 of 66 5-grams are shared
    found = duplicates(np.concatenate([rows, copies]), seed=0)
    assert not found[:400].any() and found[400:].all()


def test_dedup_decides_by_the_true_similarity() -> None:
    row = np.arange(65, dtype=np.int32)
    near, far = row.copy(), row.copy()
    near[[10, 40]] = 500, 501  # 10 of 61 5-grams changed: 51 / 71 = 0.72
    far[[10, 25, 40]] = 500, 501, 502  # 15 changed: 46 / 76 = 0.61
    sets = [frozenset(s.tolist()) for s in shingles(np.stack([row, near, far]))]
    assert jaccard(sets[0], sets[1]) == pytest.approx(51 / 71) and jaccard(sets[0], sets[2]) == pytest.approx(46 / 76)
    assert duplicates(np.stack([row, near]), 0).tolist() == [False, True]
    assert duplicates(np.stack([row, far]), 0).tolist() == [False, False]


def test_dedup_keeps_one_of_each_group_of_near_duplicates() -> None:
    rng = np.random.default_rng(3)
    rows = rng.integers(0, 1000, (50, 65)).astype(np.int32)
    copies, sources = near_duplicates(rows, rng, 200, 1000)
    found = duplicates(np.concatenate([rows, copies]), 0)
    light = (copies != rows[sources]).sum(axis=1) <= 2
    assert not found[:50].any() and found[50:][light].all()


def test_compression_tells_repetition_from_noise() -> None:
    ratio = compression_ratios(["ab" * 100, "".join(map(chr, np.random.default_rng(0).integers(33, 126, 200))), ""])
    assert ratio[0] < 0.2 < 0.8 < ratio[1] and ratio[2] == 1


def test_dsir_prefers_rows_like_the_target() -> None:
    rng = np.random.default_rng(0)
    alike, other = rng.integers(0, 20, (50, 30)), rng.integers(20, 40, (50, 30))
    ratio = dsir_log_ratio(np.concatenate([alike, other]), rng.integers(0, 20, (30, 30)), smoothing=1.0)
    assert ratio[:50].min() > ratio[50:].max()


def test_d2_spreads_its_picks_over_clusters_where_plain_difficulty_would_not() -> None:
    # Two cliques: in the first every sample is harder than any of the second's.
    n = 10
    ids = np.array([[j for j in range(n) if j != i and (j < 5) == (i < 5)] for i in range(n)])
    graph = Neighbours(ids, np.full(ids.shape, 0.99, np.float32))
    difficulty = np.where(np.arange(n) < 5, 1.0, 0.6) + 0.001 * np.arange(n)
    picks = d2_picks(difficulty, graph, 4)
    assert len(set(picks)) == 4 and {int(p) < 5 for p in picks[:2]} == {True, False}
    alone = Neighbours(np.full((n, 2), -1), np.full((n, 2), -np.inf, np.float32))
    assert d2_picks(difficulty, alone, n).tolist() == np.argsort(-difficulty).tolist()


# -- the system's arms -------------------------------------------------------------------------------------------------


def test_the_blocks_of_the_system_arms_are_what_the_system_takes_and_differ() -> None:
    v = view()
    told = {name: load_config(block(name, v), name) for name in RECIPES}
    assert len({str(config) for config in told.values()}) == len(RECIPES)
    for name in RECIPES:
        config = block(name, v)
        assert ("trusted" in config) == ("pseudo" not in name)
        assert config["refresh"] == {"interval_steps": 4, "cadence": "fixed"} and config["budget"] == 0.25
        assert config["total_steps"] == 20 and config["seed"] == v.plan.seed
