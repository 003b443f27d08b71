"""What a refresh leaves to the next, saved by some ranks and loaded by others."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from grace_ds.comm.buckets import owner_of
from grace_ds.comm.local import LocalComm
from grace_ds.config.schema import GraphConfig
from grace_ds.errors import CheckpointError, DamagedState
from grace_ds.features.content import ContentFeatures, Counts
from grace_ds.graph.repair import KeptGraph, build_kept
from grace_ds.records import HIDDEN, Array
from grace_ds.refresh.embed import SKETCHED, Learned
from grace_ds.refresh.state import RefreshState

N, WIDTH = 120, 8


def whole(trusted: bool = True) -> RefreshState:
    draw, ids = np.random.default_rng(0), np.sort(np.random.default_rng(1).choice(5000, N, replace=False)).astype(np.int64)
    x = draw.normal(size=(N, WIDTH)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    counts = Counts(draw.integers(0, 9, 64).astype(np.int32), draw.integers(0, 9, 65), np.array([3]))
    quality = draw.random(N).astype(np.float32) if trusted else None
    statistics = draw.normal(size=(N, 5)).astype(np.float32) if trusted else None
    content = ContentFeatures(ids, draw.random(N).astype(np.float32), quality, statistics, x, counts=counts)
    values = draw.normal(size=(N, SKETCHED + HIDDEN)).astype(np.float32)
    graph = build_kept(LocalComm(5.0), ids, x, GraphConfig(k=4))
    assert graph is not None
    return RefreshState(content, Learned(ids, draw.integers(-1, 50, N), values), graph)


def part(kept: RefreshState, rank: int, world: int) -> RefreshState:
    content, learned, graph = kept.content, kept.learned, kept.graph
    assert content is not None and learned is not None and graph is not None
    own = owner_of(content.ids, world) == rank
    mine = {name: getattr(graph, name)[own] for name in ("ids", "X", "where", "keys", "depth")}
    return RefreshState(
        content.take(own),
        Learned(learned.ids[own], learned.step[own], learned.values[own]),
        dataclasses.replace(graph, **mine),
    )


def save_all(kept: RefreshState, folder: Path, world: int, rolls: bool = True) -> tuple[dict[str, str], dict[str, Array]]:
    files: dict[str, str] = {}
    shared: dict[str, Array] = {}
    for rank in range(world):
        mine, shared = part(kept, rank, world).save(folder, rolls, rank, world)
        files |= mine
    return files, shared


def same(a: RefreshState, b: RefreshState) -> bool:
    def arrays(k: RefreshState) -> list[Array | None]:
        assert k.content is not None and k.learned is not None and k.graph is not None and k.content.counts is not None
        c, g = k.content, k.graph
        found = [c.ids, c.density, c.quality, c.statistics, c.vectors, *vars(c.counts).values()]
        return [*found, *vars(k.learned).values(), g.ids, g.X, g.where, g.keys, g.depth, g.centroids]

    pairs = zip(arrays(a), arrays(b), strict=True)
    return all((x is None and y is None) or (x is not None and y is not None and np.array_equal(x, y)) for x, y in pairs)


@pytest.mark.parametrize("trusted", [True, False])
@pytest.mark.parametrize("old", [1, 3])
@pytest.mark.parametrize("new", [1, 2])
def test_any_number_of_ranks_loads_what_any_other_has_saved(tmp_path: Path, old: int, new: int, trusted: bool) -> None:
    kept = whole(trusted)
    files, shared = save_all(kept, tmp_path, old)
    for rank in range(new):
        found = RefreshState.load(tmp_path, files, shared, rank, new)
        assert same(found, part(kept, rank, new))
        assert found.graph is not None and (found.graph.k, found.graph.exact) == (4, True)


def test_a_window_that_stands_still_saves_no_content_and_one_without_learned_parts_nothing(tmp_path: Path) -> None:
    kept = whole()
    files, shared = save_all(kept, tmp_path, 1, rolls=False)
    found = RefreshState.load(tmp_path, files, shared, 0, 1)
    assert found.content is None and found.learned is not None and found.graph is not None
    bare = dataclasses.replace(kept, learned=None)
    assert bare.save(tmp_path, False, 0, 1) == ({}, {})
    inexact = dataclasses.replace(bare, graph=dataclasses.replace(_graph(bare), exact=False))
    files, shared = inexact.save(tmp_path, False, 0, 1)
    assert files  # its repairs cannot be repeated
    assert not _graph(RefreshState.load(tmp_path, files, shared, 0, 1)).exact
    assert RefreshState.load(tmp_path, {}, {}, 0, 1) == RefreshState()


def test_a_file_that_is_torn_or_of_another_form_is_named(tmp_path: Path) -> None:
    files, shared = save_all(whole(), tmp_path, 2)
    with pytest.raises(CheckpointError, match="counts.grams"):
        RefreshState.load(tmp_path, files, {}, 0, 2)
    name = next(iter(files))
    with pytest.raises(CheckpointError, match="incomplete"):
        RefreshState.load(tmp_path, {name: files[name]}, shared, 0, 2)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-1])
    with pytest.raises(DamagedState, match=name):
        RefreshState.load(tmp_path, files, shared, 0, 1)


def _graph(kept: RefreshState) -> KeptGraph:
    assert kept.graph is not None
    return kept.graph
