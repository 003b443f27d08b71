"""The summary: documented keys, overheads as shares, a table and a picture for one arm and for two."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console

from grace_ds.quickstart.model import GPT, GPTConfig
from grace_ds.quickstart.summary import summarise, table, write

MANIFEST = {"rows": {"train": 20}, "kinds": {"unique": 20}, "digest": "d", "packages": {}, "key": {}}


def result(loss: float, grace: dict | None = None) -> dict:
    curve = [{"step": s, "val_loss": loss + 1 / s, "train_loss": 4.0, "seconds": s / 2} for s in (50, 100)]
    fixed = {"steps": 100, "seed": 5, "ranks": 2, "zero_stage": 2, "batch": 32, "parameters": 9}
    return {**fixed, "val_loss": loss, "train_seconds": 50.0, "curve": curve, "grace": grace}


GRACE = {
    "harvest_seconds": 2.5,
    "refresh_seconds": 5.0,
    "refreshes": 4,
    "coreset_size": 4000,
    "churn": [0.25, 0.75],
    "version": 4,
    "more": 1,
}


def both():
    return summarise("crawl", MANIFEST, {"uniform": result(4.0), "grace": result(3.75, GRACE)}, {"uniform": 60.0, "grace": 70.0})


def test_documented_keys():
    summary = both()
    assert summary["uniform"]["val_loss"] == 4.0 and summary["grace"]["val_loss"] == 3.75
    assert summary["delta"] == pytest.approx(-0.25)
    assert summary["grace"]["harvest_overhead"] == pytest.approx(0.05)
    assert summary["grace"]["refresh_overhead"] == pytest.approx(0.1)
    assert (summary["grace"]["refreshes"], summary["seed"]) == (4, 5)
    assert {"python", "torch", "deepspeed", "numpy"} <= summary["versions"].keys()
    assert "harvest_overhead" not in summary["uniform"]


def test_table_and_files_for_two_arms_and_for_one(tmp_path):
    for summary, arms in (
        (both(), ["uniform", "grace"]),
        (summarise("natural", MANIFEST, {"uniform": result(4.0)}, {"uniform": 1.0}), ["uniform"]),
    ):
        screen = io.StringIO()
        Console(file=screen, width=120).print(table(summary, arms))
        write(summary, arms, tmp_path)
        text = screen.getvalue()
        assert "4.0000" in text and ("harvest overhead" in text) == ("grace" in arms)
        if "grace" in arms:
            assert all(cell in text for cell in ("3.7500", "5.0%", "10.0%", "4000", "50%", "-0.2500"))
        assert json.loads((tmp_path / "summary.json").read_text())["pool"] == summary["pool"]
        assert (tmp_path / "loss_curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert sorted(p.name for p in tmp_path.iterdir()) == ["loss_curves.png", "summary.json"]


def test_model_is_causal_small_and_starts_beside_the_uniform_loss():
    torch.manual_seed(0)
    model = GPT(GPTConfig())
    assert 0.5e6 < sum(p.numel() for p in model.parameters()) < 0.8e6
    ids = torch.randint(0, 2048, (8, 65))
    loss = model(ids)
    assert loss.shape == () and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(7.6246 + 0.5, abs=0.1)  # ln 2048, and half the variance of logits that is 1
    # The gradient of the loss at the first position alone reaches no later token's embedding.
    hidden = []
    handle = model.tokens.register_forward_hook(lambda m, i, out: (out.retain_grad(), hidden.append(out))[1])
    kept = {}
    model.lm_head.register_forward_hook(lambda m, i, out: kept.update(logits=out))
    model(ids)
    kept["logits"][:, 3].sum().backward()
    handle.remove()
    reached = hidden[0].grad.abs().sum((0, 2)) > 0
    assert reached.nonzero().flatten().tolist() == [0, 1, 2, 3]
