"""The configuration is closed: what is wrong is said before training, with path, value and cure."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import os
import pickle
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grace_ds.config import schema
from grace_ds.config.load import HOME, find_block, load_config, read_ds_config, refuse_curriculum, write_resolved
from grace_ds.config.reference import keys
from grace_ds.config.schema import GraceConfig
from grace_ds.errors import ConfigError
from grace_ds.recipes import names


def ds(grace: Any, **more: Any) -> dict[str, Any]:
    return {"data_efficiency": {"enabled": True, "data_sampling": {"enabled": True, "grace": grace}}, **more}


def test_defaults_load() -> None:
    assert load_config({}) == GraceConfig()


def test_only_the_uniform_recipe_does_without_content_features() -> None:
    assert load_config({"recipe": "uniform", "features": {"enabled": False}}).recipe == "uniform"
    assert load_config({"replay": "runs/a", "features": {"enabled": False}}).replay == "runs/a"


def test_layers_override_in_order(tmp_path: Path) -> None:
    file = tmp_path / "g.yaml"
    file.write_text("budget: 0.1\nseed: 5\nharvest:\n  dim: 64\n")
    config = load_config({"file": str(file), "seed": 6}, dotlist=["collect.rank=4", "budget=0.4"])
    assert (config.budget, config.seed, config.collect.dim, config.collect.rank) == (0.4, 6, 64, 4)


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"budjet": 0.3}, ["budjet", "0.3", "'budget'"]),
        ({"refresh": {"interval": 3}}, [f"{HOME}.refresh.interval", "interval_steps"]),
        ({"budget": "lots"}, ["budget", "lots"]),
        ({"budget": None}, ["budget", "None"]),
        ({"budget": 1.5}, ["budget", "1.5", "(0, 1]"]),
        ({"mode": "shadwo"}, ["mode", "shadwo", "'shadow'"]),
        ({"collect": 3}, ["collect", "3", "layers"]),
        ({"collect": {"layers": []}}, ["collect.layers", "auto"]),
        ({"refresh": {"interval_steps": 0}}, ["interval_steps", "0", "1 or more"]),
        ({"start_step": 10, "stop_step": 10}, ["stop_step", "10"]),
        ({"selection": {"explore": 0.6, "audit": 0.5}}, ["explore + audit", "1.1"]),
        ({"recipe": "grase"}, ["recipe", "grase", "'grace'"]),
        ({"recipe": "content", "features": {"enabled": False}}, ["recipe", "'content'", "features.enabled: false", "uniform"]),
        ({"features": {"enabled": False}}, ["recipe", "'auto'", "features.enabled: false", "uniform"]),
        ({"collect": {"every": 2}}, [f"{HOME}.collect.every", "gone", "collect.share"]),
        ({"graph": {"residuals": True}}, [f"{HOME}.graph.residuals", "gone", "ablate: [graph]"]),
        ({"selection": {"loss_tilt": False}}, [f"{HOME}.selection.loss_tilt", "gone", "ablate: [loss]"]),
        ({"ablate": ["grph"]}, [f"{HOME}.ablate", "'grph'", "recipe 'auto'", "gradients, graph, loss, sketches", "'graph'"]),
        ({"recipe": "content", "ablate": ["loss"]}, ["ablate", "'loss'", "recipe 'content'", "no parts to leave out"]),
        ({"ablate": "loss"}, ["ablate", "'loss'", "a list of texts"]),
        ({"collect": {"share": 0}}, ["collect.share", "0", "(0, 1]"]),
        ({"collect": {"share": 1.5}}, ["collect.share", "1.5", "(0, 1]"]),
        ({"graph": {"hops": 0}}, ["graph.hops", "0", "between 1 and 64"]),
        (
            {"recipe": "uniform", "selection": {"objective": "facility_location"}, "features": {"enabled": False}},
            ["facility_location", "features"],
        ),
        ({"weights": "inverse"}, ["weights", "inverse", "inverse_probability"]),
        ({"guard": {"clean_share": 0}}, ["guard.clean_share", "0", "(0, 1]"]),
        ({"guard": {"confidence": 1}}, ["guard.confidence", "1", "(0, 1)"]),
        ({"selection": {"prior": False}}, [f"{HOME}.selection.prior", "known here", "objective"]),
        ({"replay": "x", "mode": "shadow"}, ["replay", "shadow"]),
        ({"budget": "${nowhere}"}, ["budget", "nowhere"]),
        ({"file": "/does/not/exist.yaml"}, ["file", "exist.yaml"]),
    ],
)
def test_wrong_block_says_where_what_and_how(block: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(block)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("key", schema.REMOVED)
def test_a_key_of_the_first_version_is_refused_wherever_it_is_given(key: str, tmp_path: Path) -> None:
    section, name = key.split(".")
    file = tmp_path / "old.yaml"
    file.write_text(f"{section}:\n  {name}: 1\n")
    for give in (
        lambda: load_config({section: {name: 1}}),
        lambda: load_config({"file": str(file)}),
        lambda: load_config({}, dotlist=[f"{key}=1"]),
    ):
        with pytest.raises(ConfigError, match=f"{key} is gone"):
            give()
    assert key not in {k.path for k in keys()}


def test_an_old_name_of_a_recipe_is_taken_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING"):
        config = load_config({"recipe": "prior"})
    assert config == load_config({"recipe": "content"})
    assert "'prior' is now called 'content'" in caplog.text and f"{HOME}.recipe" in caplog.text
    caplog.clear()
    with caplog.at_level("WARNING"):
        assert load_config({"recipe": "${oc.env:NOT_SET,prior}", "resolvers": ["oc.env"]}).recipe == "content"
        assert "now called" in caplog.text
    assert set(schema.RENAMED_RECIPES).isdisjoint(names()) and set(schema.RENAMED_RECIPES.values()) <= set(names())


def test_old_keys_are_taken_with_a_warning_and_never_beside_the_new_ones(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        config = load_config({"harvest": {"share": 0.125}, "graph": {"leaf": "torch", "k": 9}}, dotlist=["harvest.dim=64"])
    assert (config.collect.share, config.collect.dim, config.graph.backend, config.graph.k) == (0.125, 64, "torch", 9)
    for old, new in schema.RENAMED.items():
        assert f"{HOME}.{old} is now called {new}" in caplog.text
        assert _known(new) and not _known(old)
    with pytest.raises(ConfigError, match=r"graph\.leaf is now called graph\.backend, and both are given"):
        load_config({"graph": {"leaf": "torch", "backend": "torch"}})


def _known(key: str) -> bool:
    node: Any = schema.GraceConfig()
    for part in key.split("."):
        if not hasattr(node, part):
            return False
        node = getattr(node, part)
    return True


# -- what a run asks for ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "collects", "graph"),
    [
        ({}, True, True),
        ({"recipe": "grace"}, True, True),
        ({"ablate": ["gradients"]}, True, True),  # the losses are still looked at
        ({"ablate": ["loss"]}, True, True),
        ({"ablate": ["gradients", "loss"]}, False, True),
        ({"ablate": ["graph"]}, True, False),
        ({"ablate": ["sketches"]}, True, True),
        ({"ablate": ["gradients", "graph", "loss", "sketches"]}, False, False),
        ({"selection": {"objective": "rs2"}}, False, False),  # nothing is weighed
        ({"selection": {"objective": "uniform"}}, False, False),
        ({"selection": {"objective": "topk"}}, True, True),
        ({"recipe": "content"}, False, False),
        ({"recipe": "density"}, False, False),
        ({"recipe": "uniform"}, False, False),
        ({"recipe": "content", "selection": {"objective": "facility_location"}}, False, True),
        ({"ablate": ["graph"], "selection": {"objective": "facility_location"}}, True, True),
    ],
)
def test_a_run_collects_and_builds_what_its_decisions_ask_for(block: dict[str, Any], collects: bool, graph: bool) -> None:
    config = load_config(block)
    assert (config.collects, config.builds_graph) == (collects, graph)
    learned = config.learned_shares
    assert any(learned) == (collects and "sketches" in config.parts)


@settings(deadline=None)  # a busy machine is no fault
@given(st.floats(0.001, 1), st.integers(1, 5000))
def test_the_collected_share_is_kept_to_but_for_a_few_steps_of_each_interval(share: float, interval: int) -> None:
    every = load_config({"collect": {"share": share}, "refresh": {"interval_steps": interval}}).collect_every
    assert every >= 1 and interval // every >= min(interval, 8)
    if interval * share >= 16:  # with room for eight steps the share is what was asked for, at most
        assert 1 / every <= share * (1 + 1e-12)
        assert every == 1 or 1 / (every - 1) > share * (1 - 1e-12)


def test_block_is_found_at_home_and_at_the_alias() -> None:
    assert find_block(ds({"budget": 0.3})) == (HOME, {"budget": 0.3})
    assert find_block({"grace_ds": {"budget": 0.3}}) == ("grace_ds", {"budget": 0.3})
    assert find_block({"zero_optimization": {"stage": 2}}) is None


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"grace": {}}, "stands at 'grace'"),
        ({"data_efficiency": {"enabled": True, "grace": {}}}, "'data_efficiency.grace'"),
        ({"zero_optimization": {"grace_ds": {}}}, "zero_optimization.grace_ds"),
        (ds({"budget": 0.1}, grace_ds={}), "keep one"),
        ({"data_efficiency": {"data_sampling": {"grace": {}}}}, "enabled is not true"),
        (ds(7), "must be an object"),
    ],
)
def test_misplaced_block_is_an_error(config: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=".*"):
        try:
            find_block(config)
        except ConfigError as error:
            assert word in str(error)
            raise


def test_disabled_block_needs_no_enabled_parents() -> None:
    found = find_block({"data_efficiency": {"data_sampling": {"grace": {"enabled": False}}}})
    assert found is not None
    assert found[1] == {"enabled": False}


def test_curriculum_is_refused() -> None:
    config = ds({})
    refuse_curriculum(config)
    config["data_efficiency"]["data_sampling"]["curriculum_learning"] = {"enabled": True}
    with pytest.raises(ConfigError, match="curriculum"):
        refuse_curriculum(config)


def test_ds_config_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(ds({})))
    assert read_ds_config(path) == ds({})
    path.write_text("{")
    with pytest.raises(ConfigError, match="line 1"):
        read_ds_config(path)
    with pytest.raises(ConfigError, match=r"no\.json"):
        read_ds_config(tmp_path / "no.json")


def test_resolved_config_loads_back(tmp_path: Path) -> None:
    config = load_config({"budget": 0.33, "collect": {"layers": ["a.*"]}})
    path = write_resolved(config, tmp_path / "run")
    assert load_config({"file": str(path)}) == config


SECRET = "s3cr3t-'quoted'"


def test_what_interpolations_stand_for_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", SECRET)
    monkeypatch.setenv("WHERE", "/data")
    block = {
        "budget": 0.3,
        "run_dir": str(tmp_path / "run"),
        "resolvers": ["oc.env"],
        "features": {"cache_dir": "${oc.env:WHERE}/${oc.env:TOKEN}", "tokens_key": "${.cache_dir}"},
        "collect": {"layers": ["a.*", "${oc.env:TOKEN}"], "exclude": "${.layers}"},
    }
    config = load_config(block)
    assert config.features.cache_dir == f"/data/{SECRET}" == config.features.tokens_key
    assert config.collect.layers == config.collect.exclude == ["a.*", SECRET]
    for kept in (
        config,
        copy.deepcopy(config),
        dataclasses.replace(config, recipe="content"),
        pickle.loads(pickle.dumps(config)),
    ):
        path = write_resolved(kept, tmp_path / "run")
        text = path.read_text()
        assert "s3cr3t" not in text and "/data" not in text and "${oc.env:WHERE}/${oc.env:TOKEN}" in text
        assert load_config({"file": str(path)}) == kept
    assert "s3cr3t" not in repr(config)
    monkeypatch.setenv("TOKEN", "another")
    assert load_config({"file": str(path)}).collect.exclude == ["a.*", "another"]


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_the_resolved_config_is_for_its_owner_alone(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        path = write_resolved(load_config({}), tmp_path / "run")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "block",
    [
        {"comm": "${oc.env:TOKEN}"},  # not one of the choices
        {"seed": "${oc.env:TOKEN}"},  # not a number
        {"budget": "${oc.decode:${oc.env:TOKEN}}"},
        {"graph": {"k": "${seed}"}, "seed": "${oc.env:TOKEN}"},
        {"collect": {"layers": "${oc.env:TOKEN}"}},
        {"ablate": ["${oc.env:TOKEN}"]},
        {"features": {"tokens_key": "${oc.env:TOKEN}"}, "mode": "${features.tokens_key}"},
    ],
)
def test_what_interpolations_stand_for_is_not_in_errors(block: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", SECRET)
    with pytest.raises(ConfigError) as raised:
        load_config({**block, "resolvers": ["oc.env", "oc.decode"]})
    assert "resolvers" not in str(raised.value)
    seen: BaseException | None = raised.value
    while seen is not None:  # a traceback would show what it came from too
        assert "s3cr3t" not in str(seen)
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    assert HOME in str(raised.value)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from([*GraceConfig.__dataclass_fields__, "budjet", "", "a.b", "file"])


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(KEYS, JUNK, max_size=3))
def test_any_block_loads_or_fails_with_our_error(block: dict[str, Any]) -> None:
    try:
        config = load_config(block)
    except ConfigError as error:
        assert HOME in str(error)
    else:
        assert isinstance(config, GraceConfig)
