"""The summary: documented keys, overheads as shares, a table and a picture for one arm and for two."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from grace_ds_quickstart.model import GPT, GPTConfig
from grace_ds_quickstart.pollute import Kind
from grace_ds_quickstart.summary import count_sources, source_table, summarise, table, write
from rich.console import Console

from grace_ds.data.schedule import save_schedule
from grace_ds.records import Role, Schedule

MANIFEST = {"rows": {"train": 20}, "kinds": {"unique": 20}, "digest": "d", "packages": {}, "key": {}}
POOL = {"unique": 0.4, "duplicate": 0.2, "generated": 0.25, "junk": 0.15}
CORE = {"unique": 0.9, "duplicate": 0.05, "generated": 0.05, "junk": 0.0}
SOURCES = {"pool": POOL, "coreset": CORE, "trained": {**CORE, "unique": 0.8, "junk": 0.1}}
WAY = {
    "transport": "mpi",
    "collected_rows": 12345,
    "gathered_bytes": 3 * 2**20,
    "graph_first_seconds": 1.5,
    "graph_repair_seconds": 0.25,
    "propagated_rows": 6789,
}


def result(loss: float, grace: dict | None = None) -> dict:
    curve = [{"step": s, "val_loss": loss + 1 / s, "train_loss": 4.0, "seconds": s / 2} for s in (50, 100)]
    fixed = {"steps": 100, "seed": 5, "ranks": 2, "zero_stage": 2, "batch": 32, "parameters": 9}
    return {**fixed, "val_loss": loss, "train_seconds": 50.0, "curve": curve, "grace": grace}


GRACE = {
    "collect_seconds": 2.5,
    "refresh_seconds": 5.0,
    "refreshes": 4,
    "coreset_size": 4000,
    "churn": [0.25, 0.75],
    "version": 4,
    "more": 1,
}


def both(**metrics):
    results = {"uniform": result(4.0), "grace": result(3.75, GRACE | metrics)}
    return summarise("crawl", MANIFEST, results, {"uniform": 60.0, "grace": 70.0}, launcher="openmpi", sources=SOURCES)


def shown(renderable) -> str:
    screen = io.StringIO()
    Console(file=screen, width=120).print(renderable)
    return screen.getvalue()


def cells(text: str, label: str) -> list[str]:
    return next(line for line in text.splitlines() if label in line).replace(label, "").replace("│", " ").split()


def test_documented_keys():
    summary = both()
    assert summary["uniform"]["val_loss"] == 4.0 and summary["grace"]["val_loss"] == 3.75
    assert summary["delta"] == pytest.approx(-0.25)
    assert summary["grace"]["collect_overhead"] == pytest.approx(0.05)
    assert summary["grace"]["refresh_overhead"] == pytest.approx(0.1)
    assert summary["grace"]["choosing_share"] == pytest.approx(0.15)
    assert (summary["grace"]["refreshes"], summary["seed"]) == (4, 5)
    assert summary["launcher"] == "openmpi" and summary["sources"] == SOURCES
    assert {"python", "torch", "deepspeed", "numpy"} <= summary["versions"].keys()
    assert "collect_overhead" not in summary["uniform"]


def test_the_way_of_the_rows_is_told_where_it_is_known():
    grace = both(**WAY)["grace"]
    assert (grace["transport"], grace["collected_rows"], grace["gathered_bytes"], grace["propagated_rows"]) == (
        "mpi",
        12345,
        3 * 2**20,
        6789,
    )
    assert grace["graph_seconds"] == {"first": 1.5, "repair": 0.25}
    text = shown(table(both(**WAY), ["uniform", "grace"]))
    assert cells(text, "transport") == ["–", "mpi"] and cells(text, "rows collected") == ["–", "12,345"]
    assert cells(text, "gathered over mpi (MiB)") == ["–", "3.00"]
    assert cells(text, "graph, first (s)") == ["–", "1.50"] and cells(text, "graph, repair (s)") == ["–", "0.25"]
    assert cells(text, "rows given influence by propagation") == ["–", "6,789"]
    assert cells(text, "choosing, share of the training time") == ["–", "15.0%"]


def test_what_is_not_known_is_null_and_leaves_its_row_out():
    summary = both(collect_seconds=None)
    grace = json.loads(json.dumps(summary))["grace"]
    unknown = ("transport", "collected_rows", "gathered_bytes", "propagated_rows", "choosing_share")
    assert all(grace[key] is None for key in unknown)
    assert grace["graph_seconds"] == {"first": None, "repair": None} and grace["refresh_overhead"] == pytest.approx(0.1)
    text = shown(table(summary, ["uniform", "grace"]))
    assert "transport" not in text and "graph" not in text and "choosing, share" not in text and "refreshes" in text


def test_table_and_files_for_two_arms_and_for_one(tmp_path):
    alone = {"launcher": "deepspeed", "sources": {"pool": POOL}}
    for summary, arms in (
        (both(), ["uniform", "grace"]),
        (summarise("natural", MANIFEST, {"uniform": result(4.0)}, {"uniform": 1.0}, **alone), ["uniform"]),
    ):
        text = shown(table(summary, arms))
        write(summary, arms, tmp_path)
        assert "4.0000" in text and ("collecting gradients" in text) == ("grace" in arms)
        if "grace" in arms:
            assert all(cell in text for cell in ("3.7500", "5.0%", "10.0%", "4000", "50%", "-0.2500"))
        assert json.loads((tmp_path / "summary.json").read_text())["pool"] == summary["pool"]
        assert (tmp_path / "loss_curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert sorted(p.name for p in tmp_path.iterdir()) == ["loss_curves.png", "summary.json"]


def test_sources_are_told_apart():
    text = shown(source_table(both()))
    assert cells(text, "unique") == ["40.0%", "90.0%", "80.0%"] and cells(text, "near-duplicates") == ["20.0%", "5.0%", "5.0%"]
    assert cells(text, "machine-written") == ["25.0%", "5.0%", "5.0%"] and cells(text, "junk") == ["15.0%", "0.0%", "10.0%"]


def test_sources_are_counted_from_the_schedules_that_were_trained_on(tmp_path):
    kinds = np.array([Kind.UNIQUE] * 4 + [Kind.DUPLICATE] * 2 + [Kind.JUNK] + [Kind.GENERATED] * 3, np.uint8)
    np.save(tmp_path / "kinds.npy", kinds)
    assert count_sources(tmp_path, tmp_path / "run", 0) == {
        "pool": {"unique": 0.4, "duplicate": 0.2, "generated": 0.3, "junk": 0.1},
    }
    # A schedule of all kinds, one of unique rows with one of junk to explore, and one that nothing was trained on any more.
    core, explore = Role.CORE, Role.EXPLORE
    save(tmp_path / "run/schedules", 0, 0, [0, 4, 6, 7], [core] * 4)
    save(tmp_path / "run/schedules", 1, 4, [0, 1, 1, 6], [core] * 3 + [explore])
    save(tmp_path / "run/schedules", 2, 8, [7, 8, 9, 7], [core] * 4)
    found = count_sources(tmp_path, tmp_path / "run", 8)
    assert found["coreset"] == {"unique": 1.0, "duplicate": 0.0, "generated": 0.0, "junk": 0.0}
    assert found["trained"] == {"unique": 0.5, "duplicate": 0.125, "generated": 0.125, "junk": 0.25}


def test_a_run_without_schedules_has_no_sources_of_its_coreset(tmp_path):
    np.save(tmp_path / "kinds.npy", np.zeros(4, np.uint8))
    found = count_sources(tmp_path, tmp_path / "run", 8)
    assert found["coreset"] is None and found["trained"] is None
    assert cells(shown(source_table({"sources": found})), "unique") == ["100.0%", "–", "–"]


def save(folder, version: int, start: int, ids: list[int], roles: list[int]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    ones = np.ones(len(ids), np.float32)
    save_schedule(Schedule(version, start, np.array(ids, np.int64), np.array(roles, np.uint8), ones, 0), folder)


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
