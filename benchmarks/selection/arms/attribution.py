"""Scores of an attribution library used once: the cosine of each row's gradient with the trusted rows', by bergson."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from grace_ds_quickstart.model import GPT
from torch import Tensor, nn

from benchmarks.selection.arms.base import SubsetArm, View
from benchmarks.selection.arms.lexical import highest
from benchmarks.selection.sizes import training_flops
from grace_ds.records import Array, FloatArray, IntArray

BATCH = 32


class Bergson(SubsetArm):
    """The rows whose gradients point most as the trusted rows' do, scored once by ``bergson`` and kept for the rest of the run.

    Scored at the first refresh after the start, uniform before: an untrained model's gradients order nothing. Gradients of the
    blocks' linear layers, each projected to 16 × 16 (the size of bergson's TrackStar), of length 1 for each row; the score is
    the inner product with the mean over the trusted rows. No Hessian, which would cost a further pass.
    """

    def __init__(self, view: View) -> None:
        super().__init__(view)
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing of a hub is needed
        import bergson
        import datasets
        from bergson.score.score_writer import InMemorySequenceScoreWriter

        self._library, self._dataset, self._writer = bergson, datasets.Dataset, InMemorySequenceScoreWriter

    def choose(self, version: int) -> IntArray | None:
        """The top of the pool, at the first refresh after the start."""
        if version != 1:
            return None
        view = self.view
        view.visits.flops_selection += (view.n + len(view.trusted)) * training_flops(view.scorer.config)
        return highest(self.scores(view.scorer.model), view.k)

    def scores(self, model: GPT, projection: int | None = 16) -> FloatArray:
        """(n,) float32: the cosine of each row's gradient with the mean of the trusted rows' unit gradients, up to its length.

        Args:
            model: its gradients are cleared.
            projection: rows and columns that a layer's gradient is projected to; None for none.
        """
        wrapped = Logits(model)
        query = self._collected(wrapped, self.view.trusted, projection, aggregation="mean").gradients
        writer = self._writer(self.view.n, 1)
        scorer = self._library.Scorer(query, list(query), writer, wrapped.device, wrapped.dtype, unit_normalize=True)
        self._collected(wrapped, self.view.rows, projection, scorer=scorer)
        scores: FloatArray = writer.scores[:, 0].numpy()
        return scores

    def _collected(
        self, model: Logits, rows: Array, projection: int | None, aggregation: str = "none", scorer: Any = None
    ) -> Any:
        """The library's collector after a pass over ``rows``."""
        library, data = self._library, self._dataset.from_dict({"input_ids": rows.tolist()})
        with tempfile.TemporaryDirectory(prefix="bergson-") as folder:
            config = library.IndexConfig(run_path=str(Path(folder) / "run"), projection_dim=projection or 0)
            config.partial_run_path.mkdir()
            collector = library.InMemoryCollector(
                model=model,
                cfg=config,
                data=data,
                processor=library.GradientProcessor(projection_dim=projection),
                filter_modules="*lm_head",
                scorer=scorer,
                preprocess_cfg=library.PreprocessConfig(unit_normalize=True, aggregation=aggregation),
            )
            batches = [list(range(at, min(at + BATCH, len(rows)))) for at in range(0, len(rows), BATCH)]
            computer = library.CollectorComputer(model=model, data=data, collector=collector, batches=batches, cfg=config)
            computer.run_with_collector_hooks("gradients")
        return collector


class Logits(nn.Module):
    """A GPT that gives logits, as bergson expects of a model: for every token, the last one included.

    The last token has no position of its own in a GPT of as many positions as inputs. It takes the last position again: its
    logits are dropped, and no other token looks at it.
    """

    def __init__(self, gpt: GPT) -> None:
        super().__init__()
        self.gpt = gpt

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return self.gpt.tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.gpt.tokens.weight.dtype

    def forward(self, ids: Tensor) -> SimpleNamespace:
        """``logits`` (B, T + 1, V) of ``ids`` (B, T + 1)."""
        gpt = self.gpt
        at = torch.arange(ids.shape[1], device=ids.device).clamp(max=gpt.positions.num_embeddings - 1)
        hidden = gpt.tokens(ids) + gpt.positions(at)
        for block in gpt.blocks:
            hidden = block(hidden)
        return SimpleNamespace(logits=gpt.lm_head(gpt.norm(hidden)).float())
