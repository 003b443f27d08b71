"""Forms of real jobs, each with what GRACE makes of it: right ids, or a refusal with a cure; never something in between.

A form is a function that trains a small engine in its way and may say what it found; :data:`FORMS` holds all of them, for the
test that runs them on two ranks and for the page of the documentation that lists them.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset, IterableDataset

VOCAB, LENGTH, SAMPLES, ROWS = 64, 12, 96, 4
COLLECTED, FED, COUNTED, LEFT_OUT, REFUSED = "collected", "fed", "counted", "left out", "refused"
MEANING = {
    COLLECTED: "recognised; gradients and losses are put down to the right samples",
    FED: "the schedule's samples, in its order; nothing is collected",
    COUNTED: "not recognised: samples are counted by steps, nothing is collected, the log says so",
    LEFT_OUT: "what is not the schedule's, or not certain, is left out; the rest is collected",
    REFUSED: "refused, with the cure",
}


@dataclass(frozen=True)
class Form:
    """One form of a job.

    Attributes:
        name: of its function.
        area: heading that it stands under.
        what: the job does, for the page.
        outcome: what GRACE makes of it, a key of :data:`MEANING`.
        words: that the refusal or the warning holds.
        run: trains; returns what it saw.
    """

    name: str
    area: str
    what: str
    outcome: str
    words: str
    run: Callable[[], dict[str, Any]]


FORMS: list[Form] = []


def form(area: str, what: str, outcome: str = COLLECTED, words: str = "") -> Callable[[Callable[[], Any]], Any]:
    """Registers a form."""

    def register(run: Callable[[], Any]) -> Any:
        FORMS.append(Form(run.__name__, area, what, outcome, words, run))
        return run

    return register


def markdown() -> str:
    """The forms as tables, a heading an area."""
    lines: list[str] = ["| outcome | meaning |", "| --- | --- |"]
    lines += [f"| *{name}* | {meaning} |" for name, meaning in MEANING.items()]
    for area in dict.fromkeys(f.area for f in FORMS):
        lines += ["", f"## {area}", "", "| the job | outcome |", "| --- | --- |"]
        lines += [f"| {f.what} | {f.outcome} |" for f in FORMS if f.area == area]
    return "\n".join(lines) + "\n"


# -- data and model: a sample's tokens tell its id, so that the model sees which samples it is given -------------------------


class Samples(Dataset[Any]):
    """Sample i begins with tokens that spell i; ``make`` turns its tokens into an item."""

    def __init__(self, make: Callable[[torch.Tensor], Any] = lambda t: {"input_ids": t}, n: int = SAMPLES) -> None:
        draw = np.random.default_rng(n)
        self.tokens = torch.from_numpy(draw.integers(2, VOCAB, (n, LENGTH)))
        self.tokens[:, 0], self.tokens[:, 1] = torch.arange(n) % 50, torch.arange(n) // 50
        self.make = make

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> Any:
        return self.make(self.tokens[i].clone())


def spelled(tokens: torch.Tensor) -> list[int]:
    """The ids of the samples in rows of tokens."""
    return [int(a) + 50 * int(b) for a, b in tokens[:, :2]]


class Net(nn.Module):
    """A language model; ``answer`` makes its output of loss and logits."""

    def __init__(
        self, answer: Callable[[torch.Tensor, torch.Tensor], Any] = lambda loss, logits: loss, again: bool = False
    ) -> None:
        super().__init__()
        self.answer, self.again = answer, again
        self.embed = nn.Embedding(VOCAB, 16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(2))
        self.head = nn.Linear(16, VOCAB)

    def forward(self, input_ids: Any, labels: torch.Tensor | None = None, attention_mask: Any = None) -> Any:
        tokens = input_ids["input_ids"] if isinstance(input_ids, dict) else input_ids
        tokens = tokens.long()
        x, y = (tokens[:, :-1], tokens[:, 1:]) if labels is None else (tokens, labels)
        h = self.embed(x)
        for block in self.blocks:
            h = h + (checkpoint(block, h, use_reentrant=False) if self.again else block(h))
        logits = self.head(h).float()
        return self.answer(F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-100), logits)


class Job:
    """An engine with GRACE, and a record of what the model was given beside what it was put down to.

    Args:
        grace: further keys of the block.
        model, data, collate: of the job.
        trusted, loss_fn: as for ``grace_ds.initialize``.
        workers: whether processes of the loader read the data, as they do by default.
        engine: further keys of DeepSpeed's config.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        data: Any = None,
        collate: Any = None,
        grace: dict[str, Any] | None = None,
        accumulation: int = 1,
        stage: int = 0,
        workers: bool = False,
        trusted: Any = None,
        loss_fn: Any = None,
        **engine: Any,
    ) -> None:
        import torch.distributed as dist

        import grace_ds

        block = {
            "budget": 0.4,
            "recipe": "grace",
            "start_step": 0,
            "pseudo_trusted": False,
            "guard": {"enabled": False},
            "refresh": {"interval_steps": 4, "cadence": "fixed", "timeout_seconds": 20},
            **(grace or {}),
        }
        config = {
            "train_micro_batch_size_per_gpu": ROWS,
            "gradient_accumulation_steps": accumulation,
            "train_batch_size": ROWS * accumulation * dist.get_world_size(),
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
            "dataloader_drop_last": True,
            "steps_per_print": 10**9,
            "data_efficiency": {"enabled": True, "data_sampling": {"enabled": True, "grace": block}},
            **engine,
        }
        torch.manual_seed(0)
        model = model if model is not None else Net()  # a compiled one has no truth of its own
        made = grace_ds.initialize(
            model=model,
            model_parameters=model.parameters(),
            training_data=Samples() if data is None else data,
            collate_fn=collate,
            config=config,
            trusted_data=trusted,
            loss_fn=loss_fn,
        )
        self.engine = made[0]
        # Workers that end with the garbage are waited for, ten seconds a form: only the forms about them have any.
        self.loader = made[2] if workers else self.engine.grace_ds.deepspeed_loader(num_local_io_workers=0)
        self.controller = self.engine.grace_ds.controller
        self.bound: list[tuple[list[int], list[int]]] = []  # what the model was given, and what it was put down to
        self.unbound = 0
        self._watch()

    def _watch(self) -> None:
        original = self.controller.before_forward

        def before_forward(inputs: Any) -> None:
            original(inputs)
            current = self.controller._current
            given = next(t for t in _tensors(inputs) if t.dim() == 2)
            if current is None:
                self.unbound += 1
            elif len(current[0].ids) == len(given):
                self.bound.append((spelled(given), current[0].ids.tolist()))
            else:
                self.bound.append((spelled(given), []))

        self.controller.before_forward = before_forward

    def batches(self) -> Iterator[Any]:
        """The loader's, epoch after epoch."""
        while True:
            yield from self.loader

    def train(self, steps: int, forward: Callable[[Any], Any] | None = None) -> None:
        """``forward`` gives the loss of a batch; default: the engine called with it whole."""
        batches, until = self.batches(), self.engine.global_steps + steps
        while self.engine.global_steps < until:
            batch = next(batches)
            loss = forward(batch) if forward is not None else self.engine(batch)
            self.engine.backward(loss)
            self.engine.step()

    def found(self, **more: Any) -> dict[str, Any]:
        """What there is to judge by; takes GRACE off."""
        c, g = self.controller, self.controller.geometry
        told = {
            "right": sum(a == b for a, b in self.bound),
            "wrong": [pair for pair in self.bound if pair[0] != pair[1]][:2],
            "unbound": self.unbound,
            "cursor": c.cursor,
            "expected": c.step * g.batch,
            "rows": c.collector.rows_kept if c.collector is not None else 0,
            "mismatches": c.watch.mismatches,
            "slips": c.watch.slips,
            "failures": c.metrics.refresh_failures,
            **more,
        }
        self.engine.grace_ds.detach()
        return told


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from _tensors(value)


def trained(forward: Callable[[Job, Any], Any] | None = None, steps: int = 10, **how: Any) -> dict[str, Any]:
    """A job of ``steps`` steps, as found."""
    job = Job(**how)
    job.train(steps, None if forward is None else lambda batch: forward(job, batch))
    return job.found()


# -- what the module returns --------------------------------------------------------------------------------------------------

OUTPUTS = "What the module returns"
Named = namedtuple("Named", "loss logits")


@dataclass
class Answer:
    loss: torch.Tensor
    logits: torch.Tensor | None = None


class Plain:
    def __init__(self, loss: torch.Tensor, logits: torch.Tensor) -> None:
        self.loss, self.logits = loss, logits


class Opaque:
    """An output that shows no tensor to who looks for one."""

    __slots__ = ("hidden",)

    def __init__(self, loss: torch.Tensor) -> None:
        self.hidden = lambda: loss


@form(OUTPUTS, "the loss, a tensor")
def output_tensor() -> dict[str, Any]:
    return trained()


@form(OUTPUTS, "a tuple of loss and logits")
def output_tuple() -> dict[str, Any]:
    return trained(lambda job, b: job.engine(b)[0], model=Net(lambda loss, logits: (loss, logits)))


@form(OUTPUTS, "a named tuple")
def output_namedtuple() -> dict[str, Any]:
    return trained(lambda job, b: job.engine(b).loss, model=Net(Named))


@form(OUTPUTS, "a list")
def output_list() -> dict[str, Any]:
    return trained(lambda job, b: job.engine(b)[0], model=Net(lambda loss, logits: [loss, logits]))


@form(OUTPUTS, "a dict with `loss`")
def output_dict() -> dict[str, Any]:
    return trained(lambda job, b: job.engine(b)["loss"], model=Net(lambda loss, logits: {"loss": loss, "logits": logits}))


@form(OUTPUTS, "a nested dict")
def output_nested() -> dict[str, Any]:
    return trained(lambda job, b: job.engine(b)["out"]["loss"], model=Net(lambda loss, logits: {"out": {"loss": loss}}))


@form(OUTPUTS, "a dataclass")
def output_dataclass() -> dict[str, Any]:
    return trained(lambda job, b: job.engine(b).loss, model=Net(Answer))


@form(OUTPUTS, "an object with `.loss`")
def output_object() -> dict[str, Any]:
    return trained(lambda job, b: job.engine(b).loss, model=Net(Plain))


@form(OUTPUTS, "`ModelOutput` of transformers")
def output_modeloutput() -> dict[str, Any]:
    from transformers.modeling_outputs import CausalLMOutput

    return trained(lambda job, b: job.engine(b).loss, model=Net(lambda loss, logits: CausalLMOutput(loss=loss, logits=logits)))


@form(OUTPUTS, "logits; the loss is computed outside of the module")
def output_logits() -> dict[str, Any]:
    def forward(job: Job, batch: Any) -> torch.Tensor:
        logits = job.engine(batch)
        return F.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten())

    return trained(forward, model=Net(lambda loss, logits: logits))


@form(OUTPUTS, "an object that shows no tensor")
def output_opaque() -> dict[str, Any]:
    return trained(lambda job, b: job.engine(b).hidden(), model=Net(lambda loss, logits: Opaque(loss)))


# -- how the module is called -------------------------------------------------------------------------------------------------

CALLS = "How the batch comes to the module"


@form(CALLS, "by keyword")
def call_keyword() -> dict[str, Any]:
    return trained(lambda job, b: job.engine(input_ids=b["input_ids"]))


@form(CALLS, "cut into inputs and labels, as views")
def call_views() -> dict[str, Any]:
    return trained(lambda job, b: job.engine(b["input_ids"][:, :-1], labels=b["input_ids"][:, 1:]))


@form(CALLS, "cut into inputs and labels, as copies")
def call_copies() -> dict[str, Any]:
    return trained(lambda job, b: job.engine(b["input_ids"][:, :-1].clone(), labels=b["input_ids"][:, 1:].clone()))


@form(CALLS, "as a copy of the batch, as a move to a device makes one")
def call_moved() -> dict[str, Any]:
    return trained(lambda job, b: job.engine({name: value.clone() for name, value in b.items()}))


@form(CALLS, "in another integer type")
def call_converted() -> dict[str, Any]:
    return trained(lambda job, b: job.engine(b["input_ids"].to(torch.int32)))


@form(CALLS, "with tokens masked at random after the loader", COUNTED, "not recognised as the loader's")
def call_masked() -> dict[str, Any]:
    def forward(job: Job, batch: Any) -> torch.Tensor:
        tokens = batch["input_ids"].clone()
        tokens[:, 2:][torch.rand(tokens[:, 2:].shape) < 0.3] = 2
        return job.engine(tokens)

    return trained(forward)


@form(CALLS, "to `engine.module`, past the engine")
def call_module() -> dict[str, Any]:
    return trained(lambda job, b: job.engine.module(b))


@form(CALLS, "two batches ahead of training")
def call_lookahead() -> dict[str, Any]:
    job = Job()
    batches = job.batches()
    held = [next(batches), next(batches)]
    for _ in range(10):
        held.append(next(batches))
        job.engine.backward(job.engine(held.pop(0)))
        job.engine.step()
    return job.found()


@form(CALLS, "twice in a step, with one backward of the sum")
def call_twice() -> dict[str, Any]:
    return trained(lambda job, b: job.engine(b) + job.engine(b))


@form(CALLS, "after a look at it without gradients")
def call_after_a_look() -> dict[str, Any]:
    def forward(job: Job, batch: Any) -> torch.Tensor:
        with torch.no_grad():
            job.engine(batch)
        return job.engine(batch)

    return trained(forward)


@form(CALLS, "a second time in a step of its own", LEFT_OUT)
def call_two_steps() -> dict[str, Any]:
    job = Job()
    batches = job.batches()
    for _ in range(6):
        batch = next(batches)
        for _ in range(2):
            job.engine.backward(job.engine(batch))
            job.engine.step()
    return job.found(expected=6 * job.controller.geometry.batch)


@form(CALLS, "beside batches of another source, in steps of their own", LEFT_OUT)
def call_rehearsal() -> dict[str, Any]:
    job, other = Job(), Samples(n=SAMPLES + 1)
    batches = job.batches()
    for k in range(8):
        rows = torch.stack([other[(ROWS * k + j) % SAMPLES]["input_ids"].flip(0) for j in range(ROWS)])
        for batch in (next(batches), {"input_ids": rows})[:: 1 if k % 2 else -1]:
            job.engine.backward(job.engine(batch))
            job.engine.step()
    return job.found(expected=8 * job.controller.geometry.batch)


@form(CALLS, "joined with rows of another source", COUNTED, "not recognised as the loader's")
def call_joined() -> dict[str, Any]:
    other = Samples(n=SAMPLES + 1)[5]["input_ids"]
    return trained(lambda job, b: job.engine(torch.cat([b["input_ids"], other[None]])))


@form(CALLS, "with one batch in four passed over", LEFT_OUT, "was not trained on")
def call_skips() -> dict[str, Any]:
    job = Job()
    batches = job.batches()
    for k in range(8):
        batch = next(batches)
        if k % 4 == 2:
            batch = next(batches)
        job.engine.backward(job.engine(batch))
        job.engine.step()
    return job.found(expected=10 * job.controller.geometry.batch)


# -- the data -----------------------------------------------------------------------------------------------------------------

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


# -- the trusted set ------------------------------------------------------------------------------------------------------------

TRUSTED = "The trusted set"


def probed(forward: Callable[[Job, Any], Any] | None = None, **how: Any) -> dict[str, Any]:
    """A job with trusted samples, whose influences are measured by probes; as found, with the probes that were made."""
    job = Job(trusted=how.pop("trusted", None) or Samples(n=24), **how)
    job.train(14, None if forward is None else lambda batch: forward(job, batch))
    made = job.engine.grace_ds.metrics["probe_samples"]
    recipe = job.engine.grace_ds.config.recipe
    return job.found(probes=made, recipe=recipe)


@form(TRUSTED, "the module is called with the batch as it is")
def trusted_whole() -> dict[str, Any]:
    return probed()


@form(TRUSTED, "the module is called with cuts of the batch: a probe makes the same cuts")
def trusted_cut() -> dict[str, Any]:
    return probed(lambda job, b: job.engine(b["input_ids"][:, :-1], labels=b["input_ids"][:, 1:]))


@form(TRUSTED, "the module is called with something made of the batch, and `recipe: grace` is asked for", REFUSED, "loss_fn")
def trusted_made() -> dict[str, Any]:
    return probed(lambda job, b: job.engine(b["input_ids"], labels=(b["input_ids"] + 1) % VOCAB))


@form(TRUSTED, "the same with `recipe: auto`: it goes on as `content`", LEFT_OUT, "goes on as content")
def trusted_made_auto() -> dict[str, Any]:
    return probed(lambda job, b: job.engine(b["input_ids"], labels=(b["input_ids"] + 1) % VOCAB), grace={"recipe": "auto"})


@form(TRUSTED, "the same with a `loss_fn`")
def trusted_loss_fn() -> dict[str, Any]:
    def loss_fn(module: nn.Module, b: Any) -> torch.Tensor:
        loss: torch.Tensor = module(b["input_ids"], labels=(b["input_ids"] + 1) % VOCAB)
        return loss

    return probed(lambda job, b: loss_fn(job.engine, b), loss_fn=loss_fn)


@form(TRUSTED, "a token that the model has no embedding for, under ZeRO 3", REFUSED, "embedding")
def trusted_stray_token() -> dict[str, Any]:
    bad = Samples(n=24)
    bad.tokens[5, 7] = VOCAB + 7
    return probed(trusted=bad, stage=3)


@form(TRUSTED, "lengths that the collate function cannot join", REFUSED, "cannot join")
def trusted_lengths() -> dict[str, Any]:
    return probed(trusted=Samples(lambda t: {"input_ids": t[: 8 + int(t[0]) % 3]}, n=24))


@form(TRUSTED, "fewer samples than two halves need", REFUSED, "at least 4")
def trusted_few() -> dict[str, Any]:
    return probed(trusted=Samples(n=3))


# -- the engine ---------------------------------------------------------------------------------------------------------------

ENGINES = "The engine"


@form(ENGINES, "ZeRO 1")
def engine_zero1() -> dict[str, Any]:
    return trained(stage=1)


@form(ENGINES, "ZeRO 2")
def engine_zero2() -> dict[str, Any]:
    return trained(stage=2)


@form(ENGINES, "ZeRO 3")
def engine_zero3() -> dict[str, Any]:
    return trained(stage=3)


@form(ENGINES, "bf16")
def engine_bf16() -> dict[str, Any]:
    return trained(bf16={"enabled": True})


@form(ENGINES, "accumulation over 3 micro-batches")
def engine_accumulation() -> dict[str, Any]:
    return trained(accumulation=3)


@form(ENGINES, "activation checkpointing")
def engine_checkpointing() -> dict[str, Any]:
    return trained(model=Net(again=True))


@form(ENGINES, "`engine.compile()`")
def engine_compiled() -> dict[str, Any]:
    job = Job()
    job.engine.compile(backend="eager")
    job.train(10)
    return job.found()


@form(ENGINES, "a module from `torch.compile`")
def engine_of_compiled() -> dict[str, Any]:
    return trained(model=torch.compile(Net(), backend="eager"))  # type: ignore[arg-type]


@form(ENGINES, "`module.compile()`")
def engine_compiled_in_place() -> dict[str, Any]:
    model = Net()
    model.compile(backend="eager")
    return trained(model=model)


@form(ENGINES, "two at once, each with GRACE")
def engine_two() -> dict[str, Any]:
    first, second = Job(), Job(data=Samples(n=90))
    a, b = first.batches(), second.batches()
    for _ in range(9):
        for job, batches in ((first, a), (second, b)):
            job.engine.backward(job.engine(next(batches)))
            job.engine.step()
    other = second.found()
    return first.found(other=other)


@form(ENGINES, "destroyed and made anew")
def engine_anew() -> dict[str, Any]:
    job = Job()
    job.train(5)
    job.engine.grace_ds.detach()
    job.engine.destroy()
    return trained()


@form(ENGINES, "evaluation between the steps")
def engine_evaluation() -> dict[str, Any]:
    job, held = Job(), Samples(n=40)
    for _ in range(5):
        job.train(2)
        job.engine.eval()
        with torch.no_grad():
            job.engine(torch.stack([held[j]["input_ids"] for j in range(ROWS)]))
        job.engine.train()
    return job.found()


@form(ENGINES, "a batch that is ramped up (`set_train_batch_size`)")
def engine_ramp() -> dict[str, Any]:
    job = Job()
    ranks = job.controller.geometry.ranks
    job.train(4)
    job.engine.set_train_batch_size(3 * ROWS * ranks)
    job.train(6)  # the first of them ends where three divides the micro-batches so far
    return job.found(expected=(4 + 2 + 3 * 5) * ROWS * ranks)


@form(ENGINES, "a micro-batch that is changed in the middle", REFUSED, "set_train_batch_size")
def engine_micro() -> dict[str, Any]:
    job = Job()
    job.train(3)
    ranks = job.controller.geometry.ranks
    job.engine._config.train_micro_batch_size_per_gpu *= 2
    job.engine._config.train_batch_size = 2 * ROWS * ranks
    try:
        job.train(2)
    finally:
        job.engine.grace_ds.detach()
    return {}


# -- failures -----------------------------------------------------------------------------------------------------------------

FAILURES = "Failures"


def _tag(name: str) -> str:
    folder = Path(sys.argv[2]) / "saved" / name
    return str(folder)


@form(FAILURES, "a checkpoint in the middle of the run, loaded again")
def failure_none() -> dict[str, Any]:
    job = Job()
    job.train(5)
    job.engine.save_checkpoint(_tag("none"))
    job.train(2)
    job.engine.load_checkpoint(_tag("none"))
    job.train(4)
    return job.found(expected=9 * job.controller.geometry.batch)


@form(FAILURES, "GRACE's part of a checkpoint cannot be written: the engine's is saved")
def failure_save() -> dict[str, Any]:
    import torch.distributed as dist

    job, folder = Job(), Path(_tag("blocked"))
    job.train(5)
    if dist.get_rank() == 0:
        (folder / "t").mkdir(parents=True)
        (folder / "t" / "grace_ds").write_text("a file where our folder would be")
    dist.barrier()
    job.engine.save_checkpoint(str(folder), tag="t")
    job.train(5)
    assert (folder / "t" / "mp_rank_00_model_states.pt").exists()
    return job.found()


@form(FAILURES, "a rank late for a refresh: training, saving and loading go on", LEFT_OUT, "GRACE is frozen")
def failure_late() -> dict[str, Any]:
    job = Job(grace={"refresh": {"interval_steps": 4, "cadence": "fixed", "timeout_seconds": 2}})
    c = job.controller
    job.train(1)
    job.engine.save_checkpoint(_tag("late"))
    saved = [schedule.digest() for schedule in c.book.schedules]
    job.train(2)
    _spoil(job, rank=1, late=4.0)
    job.train(3)
    assert c.frozen and [schedule.digest() for schedule in c.book.schedules] != saved
    job.engine.save_checkpoint(_tag("late"), tag="frozen")
    job.engine.load_checkpoint(_tag("late"), tag="global_step1")
    assert [schedule.digest() for schedule in c.book.schedules] == saved
    job.train(3)
    job.engine.save_checkpoint(_tag("late"), tag="again")
    job.engine.load_checkpoint(_tag("late"), tag="again")  # has no state of ours: the job's own order goes on
    ahead = c.cursor + np.arange(2 * c.geometry.batch)
    assert c.book.slots(c.cursor, len(ahead)).ids.tolist() == c.context.order(ahead).tolist()
    job.train(2)
    return job.found(expected=6 * c.geometry.batch)


@form(FAILURES, "the answer to a refresh lost on one rank, a checkpoint after it", LEFT_OUT, "GRACE is frozen")
def failure_answer_lost() -> dict[str, Any]:
    from grace_ds.errors import TransportTimeout

    job = Job()
    job.train(3)
    comm, original = job.controller.comm, job.controller.comm.agree

    def agree() -> None:
        original()
        comm._retire("the answer was lost")  # type: ignore[attr-defined]
        raise TransportTimeout("the answer was lost")

    if comm.rank == 1:
        comm.agree = agree  # type: ignore[method-assign]
    job.train(1)
    job.engine.save_checkpoint(_tag("lost"))
    job.train(5)
    job.engine.load_checkpoint(_tag("lost"))
    job.train(2)
    assert job.controller.frozen
    return job.found(expected=6 * job.controller.geometry.batch)


@form(FAILURES, "an exception in a refresh on one rank: the old schedule stays")
def failure_refresh() -> dict[str, Any]:
    job = Job()
    job.train(3)
    _spoil(job, rank=1)
    job.train(7)
    return job.found(gave_up=job.controller.metrics.refresh_failures)


def _spoil(job: Job, rank: int, late: float = 0.0) -> None:
    """Lets the next refresh fail on a rank, or be late there."""
    import time

    context, original = job.controller.context, job.controller.context.contents
    once = [job.controller.comm.rank == rank]

    def contents(kept: Any, ids: Any) -> Any:
        if once.pop() if once else False:
            if not late:
                raise OSError("the disk has gone")
            time.sleep(late)
        return original(kept, ids)

    changed = dataclasses.replace(context, contents=contents)
    job.controller.context = job.controller.runner.context = changed


@form(FAILURES, "a loss that is not finite on one rank")
def failure_nan() -> dict[str, Any]:
    def forward(job: Job, b: Any) -> torch.Tensor:
        loss = job.engine(b)
        return loss * (float("nan") if job.controller.comm.rank == 1 and job.engine.global_steps == 4 else 1.0)

    return trained(forward)


# -- running all of them ------------------------------------------------------------------------------------------------------


@dataclass
class RefreshResult:
    """What a form came to on this rank."""

    found: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    log: str = ""


def main() -> None:
    """Runs every form in its order: ``forms.py OUT FOLDER [NAME ...]``; writes OUT/RANK.json."""
    import logging

    import deepspeed
    import torch.distributed as dist

    from grace_ds.errors import GraceError

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("grace_ds").addHandler(handler)
    logging.getLogger("grace_ds").setLevel(logging.INFO)
    told: dict[str, Any] = {}
    wanted = sys.argv[3:]
    for one in FORMS:
        if wanted and one.name not in wanted:
            continue
        lines.clear()
        outcome = RefreshResult()
        try:
            outcome.found = one.run()
        except GraceError as error:
            outcome.error = f"{type(error).__name__}: {error}"
        except Exception as error:
            outcome.error = f"not ours: {type(error).__name__}: {error}"
        outcome.log = "\n".join(lines)
        gc.collect()  # what a form leaves behind must not end in a data worker that the next one forks
        told[one.name] = dataclasses.asdict(outcome)
        Path(sys.argv[1], f"{dist.get_rank()}.json").write_text(json.dumps(told))
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.argv = [a for a in sys.argv if not a.startswith("--local_rank")]
    sys.modules["tests.multirank.forms"] = sys.modules["__main__"]
    main()
