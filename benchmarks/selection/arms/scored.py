"""Arms that run the model over the pool to choose: by loss, by gradient norm, by loss beyond a holdout model's."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from grace_ds_quickstart.model import GPT

from benchmarks.selection.arms.base import SubsetArm, View
from benchmarks.selection.scoring import Scorer, mean_loss
from benchmarks.selection.sizes import forward_flops, training_flops
from grace_ds.data.trusted import split_trusted
from grace_ds.records import Array, IntArray
from grace_ds.selection.objectives import select


def _top(values: Array, k: int) -> IntArray:
    """The positions of the k largest, the first ones of equal values."""
    return select("topk", np.arange(len(values)), values, k, seed=0, version=0).ids


class LossTopK(SubsetArm):
    """The samples of highest loss: online hard example mining (arXiv 1604.03540), over the whole pool at each refresh.

    Uniform up to the first refresh after the start: an untrained model's losses order nothing. Simplified: one scoring pass
    per refresh and not one per step.
    """

    def choose(self, version: int) -> IntArray | None:
        """The top of the pool by the model's present losses."""
        return _top(self.view.scorer.losses(self.view.rows), self.view.k) if version else None


class GradientNormTopK(SubsetArm):
    """The samples of the largest last-layer gradient norm (GraNd, arXiv 2107.07075; importance sampling, arXiv 1803.00942).

    Uniform up to the first refresh after the start. Simplified: the head's gradient alone, exact, by a forward pass; and the
    largest are taken where the second paper draws in proportion and reweights.
    """

    def choose(self, version: int) -> IntArray | None:
        """The top of the pool by gradient norm."""
        return _top(self.view.scorer.gradient_norms(self.view.rows), self.view.k) if version else None


class RhoLoss(SubsetArm):
    """RHO-LOSS (arXiv 2206.07137): the samples of the largest loss beyond that of a model trained on holdout data.

    The holdout model has the shape of the one in training and learns from one half of the trusted set until the loss on the
    other half has not fallen for three epochs. Simplified: the pool is scored at each refresh, not a large batch at each step,
    and the holdout set is as small as a trusted set is.
    """

    PATIENCE, EPOCHS = 3, 60

    def __init__(self, view: View) -> None:
        super().__init__(view)
        self.epochs = 0
        self.holdout_loss = float("nan")
        self._irreducible = np.empty(0, np.float32)

    def begin(self, engine: Any) -> None:
        """Trains the holdout model and scores the pool by it."""
        holdout = self._train()
        self._irreducible = Scorer(holdout, self.view.scorer.config, self.view.visits).losses(self.view.rows)

    def choose(self, version: int) -> IntArray | None:
        """The top of the pool by reducible loss; from the start on, as in the paper."""
        return _top(self.view.scorer.losses(self.view.rows) - self._irreducible, self.view.k)

    def end(self) -> dict[str, Any]:
        """What became of the holdout model."""
        return {"holdout_epochs": self.epochs, "holdout_loss": self.holdout_loss}

    def _train(self) -> GPT:
        view, lr = self.view, self.plan.lr
        fit, judge = (view.trusted[ids] for ids in split_trusted(len(view.trusted), self.plan.seed))
        model = view.new_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)
        best, kept, waited = float("inf"), copy.deepcopy(model.state_dict()), 0
        while waited < self.PATIENCE and self.epochs < self.EPOCHS:
            self._epoch(model, optimizer, fit)
            self.epochs += 1
            loss = mean_loss(model, judge)
            view.visits.flops_selection += len(fit) * training_flops(view.scorer.config)
            view.visits.flops_selection += len(judge) * forward_flops(view.scorer.config)
            waited += 1
            if loss < best:
                best, kept, waited = loss, copy.deepcopy(model.state_dict()), 0
        model.load_state_dict(kept)
        self.holdout_loss = best
        return model

    def _epoch(self, model: GPT, optimizer: torch.optim.Optimizer, rows: Array) -> None:
        order = self.rng.permutation(len(rows))
        for start in range(0, len(rows), self.plan.batch):
            optimizer.zero_grad()
            loss = model(torch.from_numpy(rows[order[start : start + self.plan.batch]].astype(np.int64)))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
