"""Adopt the DataLoader of an unchanged job: an engine got no training data, and its job trains it from a loader of its own.

Nothing tells in advance which of a job's loaders is the one it trains on.  So until the first training forward the loaders are
only watched.  The loader whose batch reaches that forward is adopted: its batches so far become the first positions of the
schedule, which therefore begins in the job's own order, and from the next batch on the loader gives the schedule's.  No other
loader is touched.

A checkpoint names the adopted loader, so that a resumed job is fed from its first batch on.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import BatchSampler, DataLoader

from grace_ds.config.schema import GraceConfig
from grace_ds.data.dataset import IdCollate, IdDataset, loader_options
from grace_ds.data.in_flight import InFlightBatches
from grace_ds.data.order import Order, order_of, shuffled
from grace_ds.data.sampler import Geometry, StreamSampler
from grace_ds.errors import ConfigError, GraceError
from grace_ds.integrations import checkpoint, unchanged
from grace_ds.integrations.engine import geometry_of, shares_model
from grace_ds.integrations.handle import Grace
from grace_ds.integrations.loader_watch import OWN, WATCH, Drawn
from grace_ds.integrations.trusted_set import UserInputs
from grace_ds.records import IntArray
from grace_ds.utils.methods import replace_method
from grace_ds.utils.rng import undisturbed_rng

log = logging.getLogger("grace_ds")

LOADER = "grace_ds_loader"  # of the client state: which loader was adopted
_ATTRIBUTE = "grace_ds_pending"
_CURE = "pass the dataset to deepspeed.initialize as training_data, or use grace_ds.attach(engine, dataset) and its loader()"
_pending: weakref.WeakSet[PendingEngine] = weakref.WeakSet()


class PendingEngine:
    """An engine that waits for the loader that it is trained from.

    Args:
        engine: from ``deepspeed.initialize`` without training data.
        config: the grace block.
        user_inputs: the job's inputs that the config cannot hold.
    """

    def __init__(self, engine: Any, config: GraceConfig, user_inputs: UserInputs) -> None:
        self.engine, self.config, self.user_inputs = engine, config, user_inputs
        self._loaded: tuple[Any, tuple[Any, ...], dict[str, Any]] | None = None  # result and arguments of load_checkpoint
        self._identity: dict[str, Any] | None = None  # of the loader that the loaded checkpoint names
        replacements: dict[str, Callable[..., Any]] = {
            "forward": self._forward,
            "backward": self._refuse,
            "step": self._refuse,
            "load_checkpoint": self._load,
        }
        self._undo = [replace_method(engine, name, method) for name, method in replacements.items()]
        setattr(engine, _ATTRIBUTE, self)
        _pending.add(self)
        WATCH.keeping = True

    def release(self) -> None:
        """Leave the engine as it was.  A second call does nothing."""
        while self._undo:
            self._undo.pop()()
        _pending.discard(self)
        if getattr(self.engine, _ATTRIBUTE, None) is self:
            delattr(self.engine, _ATTRIBUTE)
        if not _pending:
            WATCH.stop()
            if WATCH.adopter is _WAITING:
                WATCH.adopter = None

    @property
    def _training(self) -> bool:
        return bool(self.engine.module.training and torch.is_grad_enabled())

    # -- the engine's methods ------------------------------------------------------------------------------------------

    def _forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._training:
            return original(*args, **kwargs)
        found = self._source((args, kwargs))
        if _on_all(self.engine, found is not None):
            assert found is not None
            self._adopt(*found)
            return self.engine.forward(*args, **kwargs)
        return original(*args, **kwargs)

    def _refuse(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stop the job: it trains, and not from a loader that is watched."""
        if WATCH.unsuitable:
            why = f"it iterates an iterable dataset ({', '.join(sorted(WATCH.unsuitable))}), and a coreset is drawn by id"
        elif WATCH.iterators():
            why = "what it trains on is not what a DataLoader gave: it is made by hand, or changed on the way"
        else:
            why = "it iterates no torch DataLoader"
        unchanged.switched_on()
        raise ConfigError(f"grace is on, and the loader of this job cannot be adopted: {why}; {_CURE}, or set enabled: false")

    def _load(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Load the engine's part of a checkpoint; GRACE's part is loaded once the loader is adopted."""
        result = original(*args, **kwargs)
        self._loaded = (result, args, kwargs)
        self._identity = (result[1] or {}).get(LOADER) if result[0] is not None else None
        return result

    # -- the adoption --------------------------------------------------------------------------------------------------

    def _source(self, inputs: Any) -> tuple[Any, Drawn, int] | None:
        """Return the iterator that has given the batch among ``inputs``, and the place of that batch among its recent ones."""
        for iterator, drawn in WATCH.iterators():
            if not drawn.recent:
                continue
            candidates = InFlightBatches(Geometry(1, 0, 1, 1))
            for place, (_, batch) in enumerate(drawn.recent):
                candidates.issue(torch.tensor([place]), torch.tensor([place]), batch)
            found = candidates.match(inputs)
            if found is not None:
                return iterator, drawn, int(found.ids[0])
        return None

    def _adopt(self, iterator: Any, drawn: Drawn, place: int) -> None:
        """Attach GRACE to the engine and to the loader whose iterator has given the batch of this forward.  Collective."""
        batches = list(drawn.recent)[place:]
        geometry, loader = geometry_of(self.engine), drawn.loader
        _check(self.engine, loader, geometry, [indices for indices, _ in batches])
        step = int(self.engine.global_steps)
        config = self.config
        if config.start_step >= 0 or step:
            # The batches that the job has drawn itself are those of the schedule only while nothing is chosen.
            config = dataclasses.replace(config, start_step=max(config.start_step, step + 1))
        cursor, n = step * geometry.batch, len(loader.dataset)
        base = order_of(_of_batches(loader, "sampler"), n, config.seed) or shuffled(n, 0, config.seed)
        drawn_ids = _drawn_by_all(self.engine, np.array([_ids(indices) for indices, _ in batches], np.int64))
        job = self._attach(loader, config, DrawnOrder(drawn_ids, cursor, base))
        job.take_up(iterator, drawn, batches)

    def offered(self, loader: Any) -> Iterator[Any] | None:
        """Adopt a loader that the job begins to iterate, if it is the one that the loaded checkpoint names.  Collective."""
        if self._identity is None or not self._training or _identity(loader) != self._identity:
            return None
        geometry, n = geometry_of(self.engine), len(loader.dataset)
        _check(self.engine, loader, geometry, [])
        base = order_of(_of_batches(loader, "sampler"), n, self.config.seed) or shuffled(n, 0, self.config.seed)
        return self._attach(loader, self.config, base).offered(loader)

    def _attach(self, loader: Any, config: GraceConfig, order: Order) -> AdoptedGrace:
        loaded = self._loaded
        for waiting in list(_pending):
            waiting.release()
            if waiting is not self:
                log.info("another engine of this job is trained without GRACE: it is on for the first one that is trained")
        inputs = dataclasses.replace(self.user_inputs, order=order)
        job = AdoptedGrace(self.engine, loader, config, inputs)
        if loaded is not None:
            result, args, kwargs = loaded
            again = functools.wraps(self.engine.load_checkpoint)(lambda *_, **__: result)
            checkpoint.load(job.controller, self.engine, again, *args, **kwargs)
        return job


class DrawnOrder:
    """The order of a job whose first batches are known: these, and then that of its sampler.

    Args:
        drawn: (m,) int64, ids of the first batches of all ranks, by position.
        start: position of the first.
        base: the order of the rest.
    """

    def __init__(self, drawn: IntArray, start: int, base: Order) -> None:
        self.drawn, self.start, self.base = drawn, start, base

    def __call__(self, positions: IntArray) -> IntArray:
        """See :class:`grace_ds.data.order.Order`."""
        ids = np.array(self.base(positions), np.int64)
        within = (positions >= self.start) & (positions < self.start + len(self.drawn))
        ids[within] = self.drawn[positions[within] - self.start]
        return ids


class AdoptedStream(StreamSampler):
    """A stream that begins behind the batches that the job holds already.

    Attributes:
        begin: micro-batch that the next iteration begins with, if that is behind the position of training.
    """

    begin = 0

    def batches(self, count: int) -> Iterator[list[tuple[int, int]]]:
        """Yield the (position, id) of ``count`` micro-batches of this rank, from the position of training on."""
        geometry, first = self.geometry, max(self.frontier, self.begin)
        self.begin, self.issued = 0, first
        for q in range(first, first + count):
            start = q * geometry.micro + geometry.rank * geometry.rows
            ids = self.book.slots(start, geometry.rows).ids.tolist()
            self.issued = max(self.issued, q + 1)
            yield list(zip(range(start, start + geometry.rows), ids, strict=True))


class AdoptedGrace(Grace):
    """The handle ``engine.grace_ds`` of an engine whose job iterates a loader of its own."""

    fed_by = "the job's own DataLoader, adopted"

    def __init__(self, engine: Any, loader: Any, config: GraceConfig, user_inputs: UserInputs) -> None:
        self._loader, self._dataset, self._identity = weakref.ref(loader), loader.dataset, _identity(loader)
        self._batches = len(loader)
        self._feeds: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
        self._sure = False  # a batch of the schedule has reached a training forward
        super().__init__(engine, loader.dataset, config, loader.collate_fn, user_inputs)
        WATCH.adopter = self
        self._restore.append(self._leave_loaders)

    def feed(self) -> Any:
        """Raise an error: the job has its own loader.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "this job's own DataLoader feeds its engine; iterate that one, or give deepspeed.initialize training_data"
        )

    def _stream_sampler(self, geometry: Geometry, samples: int) -> StreamSampler:
        return AdoptedStream(self.controller.book, geometry, self._batches, samples)

    def attach_hooks(self) -> None:
        """Attach the hooks of every engine; a checkpoint also names the loader."""
        super().attach_hooks()
        self._restore.append(replace_method(self.engine, "save_checkpoint", self._save))

    def _save(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        kwargs["client_state"] = {**(kwargs.get("client_state") or {}), LOADER: self._identity}
        return original(*args, **kwargs)

    def _leave_loaders(self) -> None:
        if WATCH.adopter is self:
            WATCH.adopter = None
        for _, drawn in WATCH.iterators():
            if drawn.listen == self._heard:
                drawn.listen = None

    # -- the loader ----------------------------------------------------------------------------------------------------

    def take_up(self, iterator: Any, drawn: Drawn, batches: list[tuple[Any, Any]]) -> None:
        """Continue an iterator in progress with the schedule, behind ``batches``, which the job holds.

        Raises:
            ConfigError: the schedule does not begin with these batches.
        """
        controller, geometry, stream = self.controller, self.controller.geometry, self.controller.sampler
        if stream is None:  # shadow mode: the job's own batches, whose samples are known
            for indices, batch in batches:
                self._heard(indices, batch)
            drawn.listen = self._heard
            return
        assert isinstance(stream, AdoptedStream)
        first = stream.frontier
        for place, (indices, batch) in enumerate(batches):
            start = (first + place) * geometry.micro + geometry.rank * geometry.rows
            due = controller.book.slots(start, geometry.rows).ids.tolist()
            if due != _ids(indices):
                raise ConfigError(
                    f"the job's first batch holds the samples {_ids(indices)[:4]} and the schedule has {due[:4]} there: a "
                    "replay, or a checkpoint that names no loader, cannot begin with a batch that the job has drawn itself; "
                    + _CURE
                )
            positions = torch.arange(start, start + geometry.rows)
            controller.in_flight.issue(positions, torch.tensor(due), batch)
        stream.begin = stream.issued = first + len(batches)
        left = max(0, len(drawn.loader) - drawn.given)
        drawn.feed = self._switch(iterator, drawn.loader, left)

    def _switch(self, iterator: Any, loader: Any, count: int) -> Iterator[Any]:
        """Yield the schedule's batches in the place of an iterator's own; its workers, which read ahead, are ended."""
        if hasattr(iterator, "_shutdown_workers") and not getattr(iterator, "_persistent_workers", False):
            iterator._shutdown_workers()
        yield from self._feed(loader, count)

    def offered(self, loader: Any) -> Iterator[Any] | None:
        """Return the schedule's batches for an iteration of the training loader; None for every other loader."""
        if self.controller.sampler is None or not self._is_training(loader):
            return None
        return self._feed(loader, len(loader))

    def _is_training(self, loader: Any) -> bool:
        """Return whether an iteration that begins now is for training: of the adopted loader, or one like it."""
        if loader.dataset is not self._dataset or not torch.is_grad_enabled():
            return False
        same = loader is self._loader()
        return same or bool(self.engine.module.training and _identity(loader) == self._identity)

    def _feed(self, loader: Any, count: int) -> Iterator[Any]:
        batches = MicroBatches(self.controller.sampler, count)
        feed = self._feeds.get(loader)
        if feed is None:
            feed = _rebuilt(loader, batches)
            self._feeds[loader] = feed
        else:
            feed.batch_sampler.count = count
        with undisturbed_rng():  # torch draws a seed for the workers
            inner = iter(feed)
        for positions, ids, batch in inner:
            self.controller.in_flight.issue(positions, ids, batch)
            yield batch

    def begun(self, drawn: Drawn) -> None:
        """Listen to an iteration in shadow mode."""
        if self.controller.sampler is None and self._is_training(drawn.loader):
            drawn.listen = self._heard

    def _heard(self, indices: Any, batch: Any) -> None:
        ids = torch.tensor(_ids(indices), dtype=torch.int64)
        self.controller.in_flight.issue(torch.full_like(ids, -1), ids, batch)

    # -- the first batch -----------------------------------------------------------------------------------------------

    def _before_forward(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super()._before_forward(module, args, kwargs)
        stream = self.controller.sampler
        if self._sure or stream is None or not (torch.is_grad_enabled() and module.training):
            return
        self._sure = True
        end = self.controller.forward_end
        if not end:
            raise GraceError(
                "the first batch of the resumed job does not come from the DataLoader that the checkpoint names: it has two "
                f"alike, or begins with another; {_CURE}"
            )
        if end - 1 != stream.frontier:
            raise GraceError(
                f"the first batch is micro-batch {end - 1} of the schedule and training stands at {stream.frontier}: "
                "the job has skipped batches after the resume that were never trained on; GRACE goes on at the right sample by "
                "itself: leave the skipping out"
            )


class MicroBatches(BatchSampler):
    """This rank's micro-batches of the schedule, ``count`` an iteration."""

    def __init__(self, stream: Any, count: int) -> None:
        self.stream, self.count = stream, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        return iter(self.stream.batches(self.count))


def _rebuilt(loader: Any, batches: MicroBatches) -> Any:
    """Return a DataLoader with the options of the job's, over the schedule's batches."""
    dataset, collate, options = IdDataset(loader.dataset), IdCollate(loader.collate_fn), loader_options(loader)
    feed: Any = DataLoader(dataset, batch_sampler=batches, collate_fn=collate, **options)
    setattr(feed, OWN, True)
    return feed


def release_all() -> None:
    """Let no engine wait any more: the job is attached to in another way."""
    for waiting in list(_pending):
        waiting.release()


class _Waiting:
    """The adopter while engines wait: offers a loader to each of them."""

    def offered(self, loader: Any) -> Iterator[Any] | None:
        """See :class:`grace_ds.integrations.loader_watch.Adopter`."""
        feeds = (waiting.offered(loader) for waiting in list(_pending))
        return next((feed for feed in feeds if feed is not None), None)

    def begun(self, drawn: Drawn) -> None:
        """See :class:`grace_ds.integrations.loader_watch.Adopter`."""


_WAITING = _Waiting()


def await_loader(engine: Any, config: GraceConfig, user_inputs: UserInputs) -> None:
    """Have an engine wait for the loader that it is trained from.

    Raises:
        ConfigError: several ranks share its model, or this torch's loaders cannot be watched.
    """
    if shares_model(engine):
        raise ConfigError(
            "grace is on, and with tensor, sequence or pipeline parallelism the job's own DataLoader is not adopted; " + _CURE
        )
    if WATCH.missing:
        raise ConfigError(
            f"torch {torch.__version__} has no {' and no '.join(WATCH.missing)}, by which the job's own DataLoader would be "
            f"watched; {_CURE}"
        )
    if WATCH.adopter not in (None, _WAITING):
        log.info("another engine of this job is trained without GRACE: it is on for the first one that is trained")
        return
    WATCH.adopter = _WAITING
    unchanged.waits("its engine was never trained")
    PendingEngine(engine, config, user_inputs)


def _check(engine: Any, loader: Any, geometry: Geometry, batches: list[Any]) -> None:
    """Check that a loader can be adopted.

    Raises:
        ConfigError: its batches are not the engine's micro-batches, or come in another order than they are drawn.
    """
    unchanged.switched_on()
    rows = _of_batches(loader, "batch_size")
    if loader.batch_sampler is None:
        raise ConfigError(
            f"the job's DataLoader has batch_size=None and gives samples one by one; give it a batch_size, or {_CURE}"
        )
    if rows != geometry.rows or any(len(indices) != geometry.rows for indices in batches):
        found = next((len(indices) for indices in batches if len(indices) != geometry.rows), rows)
        raise ConfigError(
            f"the job's DataLoader gives {found} samples a rank, the DeepSpeed config says train_micro_batch_size_per_gpu = "
            f"{geometry.rows}; make them agree"
        )
    try:
        len(loader)
    except TypeError:
        raise ConfigError(f"the job's DataLoader has no length; give its batch sampler a __len__, or {_CURE}") from None
    if loader.num_workers and not getattr(loader, "in_order", True):
        raise ConfigError(
            "the job's DataLoader has in_order=False, so that it is not known whose batch comes when; set it to True"
        )


def _ids(indices: Any) -> list[int]:
    return [int(index) for index in indices]


def _identity(loader: Any) -> dict[str, Any]:
    """Return what tells the training loader from the others of a job, also in its next process."""
    rows = _of_batches(loader, "batch_size")
    return {"dataset": type(loader.dataset).__qualname__, "samples": len(loader.dataset), "rows": rows}


def _of_batches(loader: Any, name: str) -> Any:
    """Return an attribute of the batch sampler; accelerate wraps it, on several ranks and to skip batches."""
    batches = loader.batch_sampler
    while batches is not None:
        value = getattr(batches, name, None)
        if value is not None:
            return value
        batches = getattr(batches, "batch_sampler", None)
    return None


def _on_all(engine: Any, found: bool) -> bool:
    """Return whether all data-parallel ranks have found their batch.  Collective."""
    if not dist.is_initialized():
        return found
    flag = torch.tensor([int(found)], device=engine.device)
    dist.all_reduce(flag, dist.ReduceOp.MIN, group=engine.data_parallel_group)
    return bool(flag.item())


def _drawn_by_all(engine: Any, ids: IntArray) -> IntArray:
    """Return the ids that all data-parallel ranks have drawn so far, by position.  Collective.

    Args:
        ids: (micro-batches, rows) int64, of this rank.

    Raises:
        ConfigError: the ranks have drawn different numbers of batches.
    """
    if not dist.is_initialized():
        return ids.reshape(-1)
    group = engine.data_parallel_group
    ranks = dist.get_world_size(group)
    counts = [torch.zeros(1, dtype=torch.int64, device=engine.device) for _ in range(ranks)]
    dist.all_gather(counts, torch.tensor([len(ids)], device=engine.device), group=group)
    numbers = [int(count) for count in counts]
    if len(set(numbers)) > 1:
        raise ConfigError(f"the ranks have drawn {numbers} batches before the first forward; draw as many on each, or {_CURE}")
    parts = [torch.zeros(ids.shape, dtype=torch.int64, device=engine.device) for _ in range(ranks)]
    dist.all_gather(parts, torch.from_numpy(ids).to(engine.device), group=group)
    by_position: IntArray = torch.stack(parts, 1).cpu().numpy().reshape(-1)
    return by_position
