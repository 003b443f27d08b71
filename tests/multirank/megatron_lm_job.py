"""Megatron-LM's own ``pretrain_gpt.py`` with the lines that ``docs/megatron.md`` adds, on a CPU, looked into.

``torchrun … megatron_lm_job.py CHECKOUT OUT [arguments of pretrain_gpt.py]``: the program's text is read from the checkout, the
documented lines are added, and it runs as ``__main__``.  What the model was given in each iteration is written to
``OUT/trained-RANK.npz``, what was read of their gradients to ``OUT/counts-RANK.npz``, and the corpus to ``OUT/corpus.npz``.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]


def program(checkout: Path, config: str) -> str:
    """``pretrain_gpt.py`` with the change that docs/megatron.md shows, for the GRACE config ``config``."""
    text = (checkout / "pretrain_gpt.py").read_text()
    (change,) = re.findall(r"^```diff\n(.*?)^```", (ROOT / "docs" / "megatron.md").read_text(), re.M | re.S)
    lines = [line for line in change.splitlines() if not line.startswith(("---", "+++", "@@"))]
    before = "\n".join(line[1:] for line in lines if not line.startswith("+"))
    after = "\n".join(line[1:] for line in lines if not line.startswith("-"))
    if text.count(before) != 1:
        raise SystemExit(
            f"pretrain_gpt.py of {checkout} has not, or not once, the lines that docs/megatron.md changes:\n{before}"
        )
    return text.replace(before, after).replace('"grace.yaml"', repr(config))


class Recorder:
    """What the model's training forwards were given on this rank."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.batches: list[np.ndarray[Any, Any]] = []
        self.starts: list[int] = []  # samples consumed when the iteration of each batch began

    def around(self, pretrain: Any) -> Any:
        """``pretrain`` whose model is watched, and which leaves its records in a file."""

        @functools.wraps(pretrain)
        def recorded(datasets: Any, model_provider: Any, *args: Any, **kwargs: Any) -> Any:
            def model(*positional: Any, **keywords: Any) -> Any:
                made = model_provider(*positional, **keywords)
                made.register_forward_pre_hook(self.saw, with_kwargs=True)
                return made

            result = pretrain(datasets, model, *args, **kwargs)
            self.write()
            return result

        return recorded

    def saw(self, model: Any, args: Any, kwargs: Any) -> None:
        """A forward pre-hook: the first stage gets tokens, the last labels, those between neither."""
        import torch
        from megatron.training import get_args

        rows = args[0] if model.pre_process else kwargs.get("labels") if model.post_process else None
        if model.training and torch.is_grad_enabled() and rows is not None:
            self.batches.append(rows.numpy().copy())
            self.starts.append(int(get_args().consumed_train_samples))

    def write(self) -> None:
        from megatron.core import mpu

        from grace_ds.integrations.megatron.job import job

        rank = int(os.environ["RANK"])
        facts = {
            "labels": np.array(not mpu.is_pipeline_first_stage()),
            "place": np.array([mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()]),
        }
        if self.batches:
            np.savez(self.out / f"trained-{rank}.npz", rows=np.stack(self.batches), starts=np.array(self.starts), **facts)
        if job.feed is not None:
            counts = job.feed.controller.snapshot()
            kept = {key: counts[key] for key in ("position_slips", "refresh_failures", "cursor", "step")}
            rows = job.feed.controller.table.rows
            np.savez(self.out / f"counts-{rank}.npz", **kept, ids=rows.ids, influence=rows.influence)
            if rank == 0:
                items = [job.feed.corpus[i] for i in range(len(job.feed.corpus))]
                np.savez(self.out / "corpus.npz", **{key: np.stack([i[key] for i in items]) for key in ("tokens", "labels")})


def main() -> None:
    checkout, out = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
    sys.path.append(str(checkout))  # behind the wheel of megatron-core, which is compiled
    sys.argv = [str(checkout / "pretrain_gpt.py"), *sys.argv[3:]]
    from tests.multirank.megatron_lm_shims import training_on_cpu

    training_on_cpu()
    import megatron.training

    megatron.training.pretrain = Recorder(out).around(megatron.training.pretrain)
    text = program(checkout, str(out / "grace.yaml"))
    exec(compile(text, sys.argv[0], "exec"), {"__name__": "__main__", "__file__": sys.argv[0]})


if __name__ == "__main__":
    main()
