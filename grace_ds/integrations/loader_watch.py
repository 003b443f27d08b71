"""Know which samples the batches of a job's own DataLoaders hold, without changing the loaders.

Two methods of torch's iterators are replaced by ones that call the original and note: the indices that an iterator has drawn
from its sampler, and which of them are in the batch that it gives out.  Once a loader is adopted (see
:mod:`grace_ds.integrations.adoption`), its iterators give the schedule's batches instead.

This module does not import torch: it is called in the middle of torch's own import.
"""

from __future__ import annotations

import functools
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

_RECENT = 8  # batches of an iterator that are remembered: more than a job looks ahead
_ATTRIBUTE = "_grace_ds_drawn"
OWN = "_grace_ds_feed"  # attribute of the loaders that feed the schedule


@dataclass(eq=False)
class Drawn:
    """What an iterator over a DataLoader has drawn and given out.

    Attributes:
        loader: the DataLoader; None while its iterator is being made.
        indices: of each batch that is drawn and not yet given out, in order.
        given: number of batches given out.
        recent: (indices, batch) of those given out last, while an engine waits for its loader.
        feed: what the iterator gives from now on instead of its own batches; None: its own.
        listen: called with (indices, batch) of each batch given out; None: nobody.
    """

    loader: Any = None
    indices: deque[Any] = field(default_factory=deque)
    given: int = 0
    recent: deque[tuple[Any, Any]] = field(default_factory=lambda: deque(maxlen=_RECENT))
    feed: Iterator[Any] | None = None
    listen: Callable[[Any, Any], None] | None = None


class Adopter(Protocol):
    """What may feed a loader from the schedule."""

    def offered(self, loader: Any) -> Iterator[Any] | None:
        """Return what is to be iterated instead of a loader; None: the loader itself."""
        ...

    def begun(self, drawn: Drawn) -> None:
        """Note a new iterator over a loader itself."""
        ...


class LoaderWatch:
    """The iterators of this process's DataLoaders.

    Attributes:
        keeping: whether an engine waits for its loader, so that recent batches are kept.
        adopter: asked when a job begins to iterate a loader; None: nobody.  Held weakly, as it holds an engine.
        unsuitable: type names of the iterable datasets that were iterated, for messages.
        missing: methods that this torch does not have, so that nothing is watched.
    """

    def __init__(self) -> None:
        self.keeping = False
        self.missing: list[str] = []
        self._adopter: weakref.ref[Adopter] | None = None
        self.unsuitable: set[str] = set()
        self._living: weakref.WeakSet[Any] = weakref.WeakSet()

    @property
    def adopter(self) -> Adopter | None:
        """The one that is asked when a job begins to iterate a loader."""
        return self._adopter() if self._adopter is not None else None

    @adopter.setter
    def adopter(self, adopter: Adopter | None) -> None:
        self._adopter = weakref.ref(adopter) if adopter is not None else None

    def iterators(self) -> list[tuple[Any, Drawn]]:
        """Return the iterators that still exist, each with what it has drawn."""
        return [(iterator, getattr(iterator, _ATTRIBUTE)) for iterator in list(self._living)]

    def stop(self) -> None:
        """Keep no batches any more."""
        self.keeping = False
        for _, drawn in self.iterators():
            drawn.recent.clear()

    # -- the replaced methods ------------------------------------------------------------------------------------------

    def iterate(self, original: Callable[[Any], Any], loader: Any) -> Any:
        """Begin to iterate a loader (``DataLoader.__iter__``)."""
        if getattr(loader, OWN, False):
            return original(loader)
        from torch.utils.data import IterableDataset

        if isinstance(loader.dataset, IterableDataset):
            self.unsuitable.add(type(loader.dataset).__name__)
            return original(loader)
        adopter = self.adopter
        feed = adopter.offered(loader) if adopter is not None else None
        if feed is not None:
            return feed
        before = getattr(loader, "_iterator", None)  # with persistent workers one iterator serves all epochs
        if before is not None:
            setattr(before, _ATTRIBUTE, Drawn())
        iterator = original(loader)
        drawn = _drawn(iterator)
        drawn.loader = loader
        self._living.add(iterator)
        if (adopter := self.adopter) is not None:  # may be another by now
            adopter.begun(drawn)
        return iterator

    def draw(self, original: Callable[[Any], Any], iterator: Any) -> Any:
        """Draw the indices of a batch (``_BaseDataLoaderIter._next_index``)."""
        indices = original(iterator)
        _drawn(iterator).indices.append(indices)
        return indices

    def give(self, original: Callable[[Any], Any], iterator: Any) -> Any:
        """Give out a batch (``_BaseDataLoaderIter.__next__``)."""
        drawn = _drawn(iterator)
        if drawn.feed is not None:
            return next(drawn.feed)
        batch = original(iterator)
        indices = drawn.indices.popleft() if drawn.indices else None
        drawn.given += 1
        if self.keeping:
            drawn.recent.append((indices, batch))
        if drawn.listen is not None:
            drawn.listen(indices, batch)
        return batch


WATCH = LoaderWatch()


def watch_loaders(module: Any) -> None:
    """Replace the methods of torch's DataLoader and its iterators, for this process; none of them if one is not there.

    Args:
        module: ``torch.utils.data.dataloader``.
    """
    watched: dict[tuple[str, str], Callable[..., Any]] = {
        ("DataLoader", "__iter__"): WATCH.iterate,
        ("_BaseDataLoaderIter", "_next_index"): WATCH.draw,
        ("_BaseDataLoaderIter", "__next__"): WATCH.give,
    }
    owners = {name: getattr(module, name, object) for name, _ in watched}
    WATCH.missing = [f"{owner}.{name}" for owner, name in watched if name not in vars(owners[owner])]
    if not WATCH.missing:
        for (owner, name), method in watched.items():
            _replace(owners[owner], name, method)


def _replace(owner: Any, name: str, method: Callable[..., Any]) -> None:
    original = vars(owner)[name]

    @functools.wraps(original)
    def replaced(instance: Any) -> Any:
        return method(original, instance)

    setattr(owner, name, replaced)


def _drawn(iterator: Any) -> Drawn:
    drawn: Drawn | None = vars(iterator).get(_ATTRIBUTE)
    if drawn is None:
        drawn = Drawn()
        setattr(iterator, _ATTRIBUTE, drawn)
    return drawn
