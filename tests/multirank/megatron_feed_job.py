"""What two data-parallel ranks of a Megatron job consume, step by step: the worked example's parts, looked into."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from torch.utils.data import DataLoader

import grace_ds.megatron
from grace_ds.errors import CheckpointError, ConfigError, DataError
from grace_ds.integrations.megatron.job import job
from tests.multirank.harness import ROOT, World
from tests.multirank.megatron_shims import on_cpu

MICRO, BATCH, STEPS, INTERVAL, LENGTH = 2, 8, 14, 4, 16
DOCUMENTS = 300
Record = list[list[list[int]]]  # step → micro-batch → ids


class Looked:
    """An iterator over micro-batches that remembers them."""

    def __init__(self, inner: Iterator[Any]) -> None:
        self.inner, self.seen = inner, list[Any]()

    def __next__(self) -> Any:
        self.seen.append(next(self.inner))
        return self.seen[-1]


def corpus(prefix: Path, salt: int, copied: int = 0) -> None:
    """Documents of random bytes; on rank 0.

    Args:
        copied: texts of which all documents are near copies, some of many and some of few; 0: none is.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    if dist.get_rank() == 0:
        draw, builder = np.random.default_rng(salt), IndexedDatasetBuilder(f"{prefix}.bin")
        known = draw.integers(0, 256, (copied, 40))
        for i in range(DOCUMENTS):
            text = draw.integers(0, 256 if i % 3 else 20, int(draw.integers(20, 60)))
            if copied:
                text = known[int(copied * draw.random() ** 3)]
                text = np.where((np.arange(40) % 16 >= 14) | (np.arange(40) >= 38), draw.integers(0, 256, 40), text)
            builder.add_document(torch.from_numpy(np.append(text, 256)), [len(text) + 1])
        builder.finalize(f"{prefix}.idx")
    dist.barrier()


def datasets(folder: Path, names: list[str], steps: int = STEPS, seed: int = 1) -> tuple[Any, Any]:
    """Training and validation data of Megatron's own kind; of two corpora a blend of 3 to 1."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    from examples.megatron_core.pretrain_gpt import BYTES, Tokens

    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=LENGTH,
        blend=([str(folder / name) for name in names], [3.0, 1.0] if len(names) == 2 else None),
        split="88,6,6",
        path_to_cache=str(folder / "indices"),
        tokenizer=Tokens(**BYTES),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    config.token_dtype_code = None
    train, valid, _ = BlendedMegatronDatasetBuilder(GPTDataset, [steps * BATCH, 16, 8], lambda: True, config).build()
    return train, valid


def settings(run_dir: Path | None, **grace: Any) -> dict[str, Any]:
    return {
        "recipe": "content",
        "budget": 0.5,
        "guard": {"enabled": False},
        "run_dir": None if run_dir is None else str(run_dir),
        "refresh": {"interval_steps": INTERVAL, "cadence": "fixed", "timeout_seconds": 30},
        **grace,
    }


def wrap(train: Any, block: dict[str, Any], consumed: int = 0, workers: int = 0, lag: int | None = 2) -> Any:
    sizes = {"micro_batch_size": MICRO, "global_batch_size": BATCH, "num_workers": workers, "lag": lag}
    return grace_ds.megatron.wrap(train, block, consumed_samples=consumed, **sizes)


class Trainer:
    """A job: model, optimizer, loader; the ids that every step consumed, and those that arithmetic says."""

    def __init__(self, train: Any, consumed: int = 0, workers: int = 0) -> None:
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        from examples.megatron_core import pretrain_gpt as example

        self.example, self.consumed = example, consumed
        self.c = OmegaConf.merge(
            OmegaConf.load(ROOT / "configs" / "megatron_cpu.yaml"),
            {
                "parallel": {"tensor": 1},
                "model": {"layers": 1, "hidden": 16, "heads": 2, "length": LENGTH},
                "train": {"micro": MICRO, "batch": BATCH},
            },
        )
        torch.manual_seed(0)
        self.model = example.model_of(self.c)  # type: ignore[arg-type]
        self.optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-3, clip_grad=0.0), [self.model])
        self.model.config.finalize_model_grads_func = example.finalize_model_grads
        self.model.config.grad_scale_func = self.optimizer.scale_loss
        how: dict[str, Any] = (
            {"multiprocessing_context": "fork"} if workers else {}
        )  # as in jobs; the harness has another default
        sampler = example.Single(consumed, len(train), MICRO)
        self.data = Looked(iter(DataLoader(train, batch_sampler=sampler, num_workers=workers, **how)))
        feed = job.feed
        assert feed is not None
        self.known = {feed.corpus[i]["tokens"].numpy().tobytes(): i for i in range(len(feed.corpus))}
        assert len(self.known) == len(feed.corpus)
        self.model.train()

    def step(self, rerun: bool = False, data: Any = None) -> tuple[list[list[int]], list[list[int]]]:
        """(consumed, by arithmetic) of one step, a list a micro-batch."""
        micro = BATCH // (MICRO * 2)
        step = self.consumed // BATCH
        said = [grace_ds.megatron.ids(step, k).tolist() for k in range(micro)]
        self.data.seen.clear()
        self.forward_backward(self.data, micro)
        seen = list(self.data.seen)
        if rerun:
            self.forward_backward(iter(seen), micro)
        self.optimizer.step()
        self.consumed += BATCH
        return [[self.known[row.numpy().tobytes()] for row in item["tokens"]] for item in seen], said

    def forward_backward(self, data: Any, micro: int, evaluate: bool = False) -> None:
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.example.run(self.c, self.model, data, micro, evaluate)  # type: ignore[arg-type]

    def evaluate(self, valid: Any) -> None:
        self.model.eval()
        self.forward_backward(iter(DataLoader(valid, batch_size=MICRO)), 2, evaluate=True)
        self.model.train()


def consume(train: Any, block: dict[str, Any], first: int, last: int, workers: int, **how: Any) -> dict[str, Any]:
    """Steps ``first`` to ``last`` of a run.  ``how``: step to run again, validation data to look at in between."""
    wrapped = wrap(train, block, first * BATCH, workers)
    trainer = Trainer(wrapped, first * BATCH, workers)
    consumed, said = [], []
    looked_at: list[Any] | None = None
    for step in range(first, last):
        content = job.feed.controller.kept.content if job.feed is not None else None
        if step == 10 and content is not None:
            looked_at = [content.ids.tolist(), content.density.tolist()]
        seen, arithmetic = trainer.step(rerun=step == how.get("rerun"))
        consumed.append(seen)
        said.append(arithmetic)
        if "valid" in how and step % 3 == 0:
            trainer.evaluate(how["valid"])
    feed = job.feed
    assert feed is not None
    state: dict[str, Any] = {
        "step": feed.controller.step,
        "cursor": feed.controller.cursor,
        "version": feed.controller.metrics.version,
    }
    uses = {k: feed.controller.metrics.refresh_failures for k in ("failures",)}
    samples = len(feed.corpus)
    state["content"] = looked_at
    grace_ds.megatron.detach()
    del trainer, wrapped, feed
    gc.collect()  # a job has its process to itself: nothing of this one may end in a data worker that the next one forks
    return {"consumed": consumed, "said": said, "samples": samples, **state, **uses}


def work(world: World, folder: str) -> dict[str, Any]:
    """Every scenario on this rank."""
    from megatron.core import parallel_state

    on_cpu()
    parallel_state.initialize_model_parallel(1, 1)
    home = Path(folder)
    corpus(home / "a", 1)
    corpus(home / "b", 2)
    train, valid = datasets(home, ["a"])
    found: dict[str, Any] = {"none": consume(train, settings(home / "run0"), 0, STEPS, 0)}
    lines = (home / "run0" / "refreshes.jsonl").read_text().splitlines()
    found["objectives"] = [json.loads(line)["objective"] for line in lines]
    found["coreset"], found["window"] = (json.loads(lines[1])[key] for key in ("coreset", "window"))
    found["workers"] = consume(train, settings(home / "run1"), 0, STEPS, 2)
    # A run that goes on after its last checkpoint, and is then taken up at that.
    found["before"] = consume(train, settings(home / "run2"), 0, 9, 2)
    found["after"] = consume(train, settings(home / "run2"), 6, STEPS, 2)
    found["abandoned"] = [path.name for path in (home / "run2" / "schedules").glob("*.abandoned")]
    found["rerun"] = consume(train, settings(home / "run3"), 0, STEPS, 0, rerun=3, valid=valid)
    # A window of half the pool, which moves on with each schedule.
    corpus(home / "c", 3, copied=12)
    copies, _ = datasets(home, ["c"], steps=20)
    rolling = settings(home / "run6", window=300)
    found["rolling"] = {**consume(copies, rolling, 0, 20, 0), "window": 300}
    found["rolled"] = consume(copies, rolling, 10, 20, 0)
    longer, _ = datasets(home, ["a"], steps=10 * STEPS)
    found["longer"] = consume(longer, settings(home / "run4"), 0, 5, 0)
    blend, _ = datasets(home, ["a", "b"])
    found["blend"] = consume(blend, settings(home / "run5"), 0, STEPS, 0)
    found["blend"]["wanted"] = blend.dataset_index[: STEPS * BATCH].tolist()
    lines = (home / "run5" / "refreshes.jsonl").read_text().splitlines()
    found["blend"]["sources"] = [json.loads(line)["sources"] for line in lines if json.loads(line)["objective"] == "sample"]
    found["blend"]["first"] = len(_one_epoch(blend.datasets[0]))
    found["shadow"] = wrap(train, settings(None, mode="shadow")) is train
    grace_ds.megatron.detach()
    found["refused"] = refusals(home, train)
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(1, 2, virtual_pipeline_model_parallel_size=2)
    found["interleaved"] = interleaved(train)
    parallel_state.destroy_model_parallel()
    return found


def interleaved(train: Any) -> dict[str, Any]:
    """Two stages of two virtual ones: the first rank's first and the last rank's last build the dataset."""
    stages: list[Any] = [None, None]
    rank = dist.get_rank()
    stages[rank] = train
    read: Any = None
    holds = []
    early = ""
    for stage in stages:
        if holds:  # a step between the stages
            try:
                job._step(lambda: (True, None, None))
            except ConfigError as error:
                early = str(error)
        wrapped = wrap(stage, settings(None), workers=1)
        holds.append(wrapped is not None)
        if wrapped is not None:
            order = [list(range(first, first + MICRO)) for first in range(0, INTERVAL * BATCH, MICRO)]
            read = iter(DataLoader(wrapped, batch_sampler=order, num_workers=1, multiprocessing_context="fork"))
    feed = job.feed
    assert feed is not None
    known = {feed.corpus[i]["tokens"].numpy().tobytes(): i for i in range(len(feed.corpus))}
    ids = [known[row.numpy().tobytes()] for item in read for row in item["tokens"]]
    scheduled = feed.slots(0, INTERVAL * BATCH).ids.tolist()
    grace_ds.megatron.detach()
    return {"holds": holds, "read": ids, "scheduled": scheduled, "early": early}


def _one_epoch(d: Any) -> Any:
    return type(d)(d.dataset, d.dataset_path, d.indices, None, d.index_split, d.config)


def refusals(home: Path, train: Any) -> dict[str, str]:
    """The words of every refusal."""
    said: dict[str, str] = {}

    def refused(name: str, kind: type[Exception], act: Any) -> None:
        try:
            act()
        except kind as error:
            said[name] = str(error)
        finally:
            grace_ds.megatron.detach()

    def reads_ahead() -> None:
        wrapped = wrap(train, settings(None), workers=0, lag=0)
        loader = DataLoader(
            wrapped, batch_sampler=Trainer(wrapped).example.Single(0, len(wrapped), MICRO), num_workers=2, prefetch_factor=8
        )
        for _ in loader:
            pass

    other, _ = datasets(home, ["a"], seed=2)
    refused("lag", ConfigError, lambda: wrap(train, settings(None), workers=2, lag=1))
    refused("ahead", DataError, reads_ahead)
    refused("hash", CheckpointError, lambda: wrap(other, settings(home / "run0"), consumed=6 * BATCH))
    refused("grace", ConfigError, lambda: wrap(train, settings(None, recipe="grace")))
    missing = settings(home / "nowhere", checkpoint={"on_missing_state": "error"})
    refused("missing", CheckpointError, lambda: wrap(train, missing, consumed=6 * BATCH))
    refused("between", ConfigError, lambda: wrap(train, settings(None), consumed=BATCH + 1))
    said["left in /dev/shm"] = " ".join(name for name in os.listdir("/dev/shm") if name.startswith(f"torch_{os.getpid()}_"))
    return said
