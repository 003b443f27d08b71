"""What the data is like."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import IterableDataset

from tests.multirank.forms.job import LENGTH, ROWS, SAMPLES, VOCAB, Job, Net, Samples, spelled, trained
from tests.multirank.forms.registry import FED, REFUSED, form

DATA = "The data"


@form(DATA, "bare tensors")
def data_tensors() -> dict[str, Any]:
    return trained(data=Samples(lambda t: t))


@form(DATA, "tuples of inputs and labels")
def data_tuples() -> dict[str, Any]:
    return trained(lambda job, b: job.engine(b[0], labels=b[1]), data=Samples(lambda t: (t, t.roll(-1))))


@form(DATA, "with an attention mask and labels, padded by the collate function")
def data_padded() -> dict[str, Any]:
    def item(t: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"input_ids": t[: 6 + int(t[2]) % 6]}

    def pad(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        ids = nn.utils.rnn.pad_sequence([x["input_ids"] for x in items], batch_first=True)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(x["input_ids"]) for x in items], batch_first=True)
        return {"input_ids": ids, "attention_mask": mask}

    return trained(lambda job, b: job.engine(b["input_ids"], attention_mask=b["attention_mask"]), data=Samples(item), collate=pad)


@form(DATA, "masks that are the same tensor for every batch")
def data_shared_mask() -> dict[str, Any]:
    mask = torch.ones(ROWS, LENGTH, dtype=torch.int64)

    def collate(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.stack([x["input_ids"] for x in items]), "attention_mask": mask}

    def forward(job: Job, b: Any) -> torch.Tensor:
        return job.engine(b["input_ids"].clone(), attention_mask=b["attention_mask"])

    return trained(forward, collate=collate)


@form(DATA, "numpy arrays of 16 bits, lists, other columns beside")
def data_numpy() -> dict[str, Any]:
    def collate(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.from_numpy(np.stack([x["tokens"] for x in items]).astype(np.int64))}

    made = Samples(lambda t: {"tokens": t.numpy().astype(np.uint16), "url": "x", "n": [1, 2]})
    return trained(data=made, collate=collate)


@form(DATA, "rows dropped by the collate function")
def data_filtered() -> dict[str, Any]:
    def collate(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        kept = [x["input_ids"] for x in items if int(x["input_ids"][0]) % 16]
        return {"input_ids": torch.stack(kept)}

    return trained(collate=collate)


@form(DATA, "packed into one row by the collate function", FED, "cannot tell which")
def data_packed() -> dict[str, Any]:
    def pack(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.cat([x["input_ids"] for x in items])[None]}

    return trained(collate=pack)


@form(DATA, "read by data workers")
def data_workers() -> dict[str, Any]:
    return trained(workers=True)


@form(DATA, "read by data workers, rows dropped by the collate function")
def data_workers_filtered() -> dict[str, Any]:
    def collate(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.stack([x["input_ids"] for x in items if int(x["input_ids"][0]) % 16])}

    return trained(collate=collate, workers=True)


@form(DATA, "changed at random each time they are read")
def data_augmented() -> dict[str, Any]:
    def item(t: torch.Tensor) -> dict[str, torch.Tensor]:
        t[2 + int(torch.randint(0, LENGTH - 2, ()))] = int(torch.randint(2, VOCAB, ()))
        return {"input_ids": t}

    return trained(data=Samples(item))


@form(DATA, "a budget of one sample")
def data_one_sample() -> dict[str, Any]:
    return trained(grace={"budget": 1 / SAMPLES})


@form(DATA, "an iterable dataset")
def data_iterable() -> dict[str, Any]:
    class Endless(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            yield from Samples(n=3000)  # a pass: an id is the position over all passes

    return trained(data=Endless())


@form(DATA, "an item that cannot be read: the engine is left as it was", REFUSED, "could not be made")
def data_unreadable() -> dict[str, Any]:
    import grace_ds

    def item(t: torch.Tensor) -> dict[str, torch.Tensor]:
        if spelled(t[None]) == [7]:
            raise OSError("shard 7 is unreadable")
        return {"input_ids": t}

    engine = plain_engine()
    before = traces(engine)
    try:
        grace_ds.attach(engine, Samples(item), config={"recipe": "content", "pseudo_trusted": False})
    finally:
        assert traces(engine) == before, (traces(engine), before)
        engine.backward(engine(torch.stack([Samples()[i]["input_ids"] for i in range(ROWS)])))
        engine.step()
    return {}


def plain_engine() -> Any:
    """Without GRACE."""
    import deepspeed
    import torch.distributed as dist

    torch.manual_seed(0)
    model = Net()
    config = {
        "train_batch_size": ROWS * dist.get_world_size(),
        "train_micro_batch_size_per_gpu": ROWS,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "steps_per_print": 10**9,
        "dataloader_drop_last": True,
    }
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def traces(engine: Any) -> dict[str, Any]:
    """What GRACE puts onto an engine while it is there."""
    modules = [m for m in engine.module.modules()]
    names = ("forward", "backward", "step", "save_checkpoint", "load_checkpoint", "destroy")
    return {
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules),
        "methods": [name for name in names if name in vars(engine)],
        "handle": getattr(engine, "grace_ds", None) is not None,
        "excepthook": sys.excepthook,
    }


@form(DATA, "changed at random and packed, in shadow mode: bit for bit the job without GRACE", FED, "cannot tell which")
def data_shadow() -> dict[str, Any]:
    def item(t: torch.Tensor) -> dict[str, torch.Tensor]:
        t[2 + int(torch.randint(0, LENGTH - 2, ()))] = int(torch.randint(2, VOCAB, ()))
        return {"input_ids": t}

    def pack(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        tokens = torch.cat([x["input_ids"] for x in items])[None]
        return {"input_ids": torch.where(torch.rand(tokens.shape) < 0.1, torch.full_like(tokens, 2), tokens)}

    def seen(engine: Any, loader: Any) -> list[Any]:
        told: list[Any] = []
        torch.manual_seed(5)
        batches = iter(loader)
        for _ in range(9):
            tokens = next(batches)["input_ids"]
            loss = engine(tokens)
            engine.backward(loss)
            engine.step()
            told.append((tokens.tolist(), float(loss)))
        return told

    engine = plain_engine()
    without = seen(engine, engine.deepspeed_io(Samples(item), collate_fn=pack, num_local_io_workers=0))
    job = Job(data=Samples(item), collate=pack, grace={"mode": "shadow"})
    assert seen(job.engine, job.loader) == without
    return {**job.found(), "right": 0}
