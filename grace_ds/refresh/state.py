"""Hold the state that one refresh leaves to the next, and store it in a checkpoint.

A resumed run must continue with exactly the graph of the uninterrupted run.  State that depends only on the window is
computed again: content, and the graph over it, if the window does not move.  The rest is saved: content and counts of a
rolling window, the learned parts, and a graph that has been repaired.  Belongs to the refresh's own layer.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from grace_ds.errors import CheckpointError
from grace_ds.features.content import COLUMNS, COUNTS, ContentFeatures, Counts
from grace_ds.graph.repair import KeptGraph
from grace_ds.records import Array
from grace_ds.refresh.bucket_files import Columns, load_columns, save_columns
from grace_ds.refresh.embed import Learned

SCHEMA = 2
PREFIX = "window"
_GRAPH, _LEARNED = ("X", "where", "keys", "depth"), ("step", "values")


@dataclass(frozen=True)
class RefreshState:
    """What one refresh leaves to the next, of this rank's samples of the window; None for parts that do not exist.

    Attributes:
        content: features; computed only for samples that enter the window.
        learned: learned parts of the samples; computed again only for samples with new rows.
        graph: the k-NN graph; searched again only for rows that are new, removed or moved.
    """

    content: ContentFeatures | None = None
    learned: Learned | None = None
    graph: KeptGraph | None = None

    def save(self, directory: str | os.PathLike[str], rolls: bool, rank: int, world: int) -> tuple[dict[str, str], Columns]:
        """Write the state that a resumed run cannot compute again.

        Args:
            rolls: whether the window moves.

        Returns:
            {file name: digest} of this rank's file, if there is one; and arrays that are equal on all ranks, for rank 0 to write.
        """
        columns: dict[str, Array] = {}
        shared: dict[str, Array] = {}
        if self.content is not None and rolls:
            columns |= {f"content.{name}": column for name in COLUMNS[1:] if (column := getattr(self.content, name)) is not None}
            shared |= {f"counts.{name}": value for name, value in vars(self.content.counts).items()}
        if self.learned is not None:
            columns |= {f"learned.{name}": getattr(self.learned, name) for name in _LEARNED}
        graph = self.graph
        if graph is not None and (rolls or self.learned is not None or not graph.exact):
            columns |= {f"graph.{name}": getattr(graph, name) for name in _GRAPH}
            shared |= {"graph.centroids": graph.centroids, "graph.facts": np.array([graph.k, graph.exact], np.int64)}
        if not columns:
            return {}, {}
        ids = next(part.ids for part in (self.content, self.learned, self.graph) if part is not None)
        return save_columns(directory, PREFIX, SCHEMA, {"ids": ids, **columns}, rank, world), shared

    @staticmethod
    def load(
        directory: str | os.PathLike[str], files: Mapping[str, str], shared: Mapping[str, Array], rank: int, world: int
    ) -> RefreshState:
        """Load what ``rank`` of ``world`` owns, whatever number of ranks wrote it.

        Args:
            files: {file name: digest} of all ranks; empty: there was nothing to save.
            shared: the arrays that are equal on all ranks.

        Raises:
            CheckpointError: a file is missing, changed, or of another form.
        """
        if not files:
            return RefreshState()
        parts = load_columns(directory, PREFIX, SCHEMA, files, rank, world)
        if not parts:  # this rank owns no bucket
            return RefreshState()
        if len({frozenset(columns) for _, columns in parts}) > 1:
            raise CheckpointError(f"{Path(directory)} mixes window files of different columns: load another checkpoint")
        joined = {name: np.concatenate([columns[name] for _, columns in parts]) for name in parts[0][1]}
        order = np.argsort(joined["ids"])
        joined = {name: column[order] for name, column in joined.items()}
        try:
            return RefreshState(_content(joined, shared), _learned(joined), _graph(joined, shared))
        except (KeyError, IndexError, TypeError) as error:
            raise CheckpointError(f"{parts[0][0]} lacks {error}: load another checkpoint") from error


def _content(columns: Columns, shared: Mapping[str, Array]) -> ContentFeatures | None:
    if "content.density" not in columns:
        return None
    arrays: dict[str, Any] = {name: columns.get(f"content.{name}") for name in COLUMNS[1:]}
    counts = Counts(*(shared[f"counts.{name}"] for name in COUNTS))
    return ContentFeatures(columns["ids"], **arrays, counts=counts)


def _learned(columns: Columns) -> Learned | None:
    if "learned.step" not in columns:
        return None
    return Learned(columns["ids"], *(columns[f"learned.{name}"] for name in _LEARNED))


def _graph(columns: Columns, shared: Mapping[str, Array]) -> KeptGraph | None:
    if "graph.keys" not in columns:
        return None
    k, exact = shared["graph.facts"].tolist()
    arrays: dict[str, Any] = {name: columns[f"graph.{name}"] for name in _GRAPH}
    return KeptGraph(k=k, ids=columns["ids"], centroids=shared["graph.centroids"], exact=bool(exact), **arrays)
