"""Selection inside of the step by dattri-llm: rows whose gradients help the trusted rows least are taken out of the gradient."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from grace_ds_quickstart.pollute import Kind

from benchmarks.selection.arms.base import Arm, Batch, Laps, View
from benchmarks.selection.sizes import training_flops
from grace_ds.records import IntArray

# All layers but the positions, whose input has no rows: their gradient keeps what was dropped.
LAYERS = [r"^tokens$", r"^blocks\.", r"^norm$", r"^lm_head$"]


class DattriLlm(Arm):
    """Each step draws twice its rows and trains on the better half: dattri-llm's ``DataSelectionCallback``, used as it is.

    Its ghost scores are the inner products of each row's gradient with that of trusted rows, drawn anew at each step; it takes
    the lower half's share out of the gradients during the backward pass and rescales the rest to a mean.

    Cost: the callback's own CPU seconds, and of the forward and backward pass the part of the rows that are dropped. What
    capturing costs is split in the same proportion, so a part of it counts as training.
    """

    KEPT = 0.5
    TARGET = 16  # trusted rows of a step

    def __init__(self, view: View) -> None:
        super().__init__(view)
        import dattri_llm

        self._library = dattri_llm
        self._trusted = Laps(np.arange(len(view.trusted), dtype=np.int64), np.random.default_rng([view.plan.seed, 2]))
        self._ids = np.empty(0, np.int64)
        self._kept = np.zeros(view.n, np.int64)
        self._began: float | None = None  # CPU seconds at the start of the step's forward pass
        self._scoring = False
        self._steps = 0

    def begin(self, engine: Any) -> None:
        """Hooks on the model, for the whole run."""
        model = engine.module
        model.register_forward_pre_hook(self._forward_begins)
        self.callback = self._callback(model)
        # Factorized: of what it captures in another style, dattri-llm 0.1.0 takes nothing out, and says nothing.
        config = self._library.HookManagerConfig(linear_io=LAYERS, capture_style="factorized")
        self._manager = self._library.HookManager(model, config=config, callbacks=[self.callback])
        self._collecting = self._manager.collect(deregister_on_exit=True)
        self._collecting.__enter__()

    def take(self, step: int) -> Batch:
        """The candidates of the step."""
        self._ids = self.laps.take(round(self.plan.batch / self.KEPT))
        return Batch(self._ids)

    def end(self) -> dict[str, Any]:
        """What was kept, in shares of the kinds; the result's own count holds the candidates too."""
        self._collecting.__exit__(None, None, None)
        total = max(1, int(self._kept.sum()))
        kinds = {kind.name.lower(): float(self._kept[self.view.kinds == kind].sum()) / total for kind in Kind}
        flops, dropped = training_flops(self.view.scorer.config), round(self.plan.batch * (1 / self.KEPT - 1))
        self.view.visits.flops_selection += self._steps * self.TARGET * flops
        # The loop counts every candidate as trained on; what was dropped was selection.
        self.view.visits.flops_train -= self._steps * dropped * flops
        self.view.visits.flops_selection += self._steps * dropped * flops
        return {"kept": kinds, "distinct_kept": int((self._kept > 0).sum())}

    def _trusted_rows(self) -> Any:
        while True:
            yield torch.from_numpy(self.view.trusted[self._trusted.take(self.TARGET)].astype(np.int64))

    def _forward_begins(self, module: Any, args: Any) -> None:
        if module.training and not self._scoring:
            self._began = time.process_time()

    def _callback(self, model: Any) -> Any:
        arm, visits = self, self.view.visits

        class Timed(self._library.DataSelectionCallback):  # type: ignore[misc,name-defined]
            """The library's callback with its CPU seconds entered."""

            def on_step_end(self, record: Any) -> None:
                if arm._began is None:  # the pass over trusted rows, within the step's own call, whose clock runs
                    super().on_step_end(record)
                    return
                visits.cpu_selection += (1 - arm.KEPT) * (time.process_time() - arm._began)
                arm._began, arm._scoring = None, True
                with visits.selecting():
                    super().on_step_end(record)
                    arm._stepped(self.last_dropped)
                arm._scoring = False

        return Timed(
            model,
            target="val_loader",
            val_loader=self._trusted_rows(),
            val_loss_fn=lambda module, rows: module(rows),
            renormalize=True,
            selection_kwargs={"threshold": 1 - self.KEPT, "threshold_mode": "bottom_fraction"},
        )

    def _stepped(self, dropped: list[int]) -> None:
        self._steps += 1
        kept: IntArray = np.delete(self._ids, dropped)
        np.add.at(self._kept, kept, 1)
