"""Learn from the job's own calls how it puts a batch into its model, so that a probe can make the same call with another one.

An argument is rebuilt only if its origin is certain: the whole batch, an entry of it, a cut of an entry such as
``x[:, 1:]``, or a constant.  A view is recognised by its memory.  A copy (on another device, say) is recognised by its
values, in two different batches.  Every origin that fits all calls seen so far is kept; if there are several, they must
agree on the probed batch.  Everything else is refused: a tensor that the job computes from its batch would be that of
another batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch

from grace_ds.data.in_flight import IssuedBatch, leaf_version, walk
from grace_ds.errors import ConfigError, DataError
from grace_ds.gradients.call_arguments import (
    Constant,
    Cut,
    Node,
    Path,
    Rows,
    Source,
    alike,
    copies,
    describe,
    equal,
    fits,
    is_whole,
    memory_of,
    name_of,
    views,
)
from grace_ds.gradients.losses import scalar_loss

CURE = (
    "pass loss_fn=lambda module, batch: ... to grace_ds.initialize (or attach), which is then called in the place of the job's "
    "own call (where ranks share a sequence: with this rank's tokens, for its part of the loss), or set recipe: content, which "
    "needs no probe"
)
WATCHED = 8  # calls examined at the start of a run; later, one between two refreshes


def refuse(recipe: str, why: str, cure: str = CURE) -> NoReturn:
    """Raise the error for a recipe whose probes cannot be made."""
    raise ConfigError(f"recipe: {recipe} has its probes repeat the job's call of its model, which cannot be: {why}; {cure}")


@dataclass
class Argument:
    """Possible origins of one argument of the model call, or of one leaf of a container argument.

    Attributes:
        sources: all origins that fit every call seen so far.
        sure: whether one call is proof: for a view, or a value that is not a tensor.
    """

    sources: list[Source]
    sure: bool


@dataclass
class JobCall:
    """The form of the job's model call.

    Attributes:
        seen: number of calls that it was learned from.
        refused: reason why the call cannot be repeated; empty if none is known.
    """

    seen: int = 0
    refused: str = ""
    _watch: int = WATCHED
    _form: Any = None
    _arguments: dict[Path, Argument] = field(default_factory=dict)
    _first: dict[Path, torch.Tensor] = field(default_factory=dict)
    _varied: bool = False  # two different batches have been seen
    _strange: int = 0  # calls without any part of the batch

    @property
    def watching(self) -> bool:
        """Whether to examine the next call."""
        return self._watch > 0 and not self.refused

    def look_again(self) -> None:
        """Examine the next call too: a job may begin to call its model in another way."""
        self._watch = max(self._watch, 1)

    def learn(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], issued: IssuedBatch) -> None:
        """Learn from a call of the module with the batch ``issued``."""
        found: dict[Path, Argument] = {}
        batch = _Batch(issued)
        why = ""
        try:
            form = (
                tuple(_read(x, (i,), batch, found) for i, x in enumerate(args)),
                {name: _read(x, (name,), batch, found) for name, x in kwargs.items()},
            )
        except _Unknown as unknown:
            why = str(unknown)
        if not any(map(_of_batch, found.values())) and not batch.reaches((args, kwargs)):
            self._strange += 1  # perhaps a forward of other data
            return
        self._watch -= 1
        self._varied = self._varied or batch.differs(self._first)
        if why:
            self.refused = why
        elif not self.seen:
            self._first = {path: tensor.detach().clone() for path, tensor in batch.tensors.items()}
            self._form, self._arguments = form, found
        elif form != self._form:
            self.refused = "the job calls its model in more than one way"
        else:
            self._narrow(found)
        self.seen += 1

    def returned(self, output: Any) -> None:
        """Learn from the output of a training forward."""
        if not self.refused and scalar_loss(output) is None:
            self.refused = f"the model's output ({type(output).__name__}) holds no scalar loss"

    def known(self, proven: bool = False) -> bool:
        """Return whether a probe can make the call.

        Args:
            proven: whether an earlier process of this run has proven the call: then one call is enough.
        """
        if self.refused or not self.seen:
            return False
        return all(a.sure or proven or (self._varied and self.seen > 1) for a in self._arguments.values())

    def obstacle(self) -> str:
        """Return why the call cannot be repeated; empty if no reason is known.

        Call it after an optimizer step.
        """
        if not self.seen and self._strange:
            return "the model's arguments hold nothing of the batch: the job makes them itself"
        return self.refused

    def rebuild(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return (positional, keyword) arguments of the job's call with another batch of the same form.

        Raises:
            DataError: the call is not known, the batch has another form, or the origin of an argument is ambiguous.
        """
        if self.refused or not self.seen:
            raise DataError(f"a probe cannot repeat the job's call ({self.refused or 'none was seen yet'}); {CURE}")
        values = {path: _agreed(path, argument, batch) for path, argument in self._arguments.items()}
        args, kwargs = self._form
        return (
            tuple(_build(form, (i,), values) for i, form in enumerate(args)),
            {name: _build(form, (name,), values) for name, form in kwargs.items()},
        )

    def _narrow(self, found: dict[Path, Argument]) -> None:
        """Keep, for each argument, the sources that fit this call too."""
        for path, new in found.items():
            old = self._arguments[path]
            old.sources = [s for s in old.sources if any(fits(s, other) for other in new.sources)]
            old.sure = old.sure and new.sure
            if not old.sources:
                self.refused = f"argument {name_of(path)} changes from call to call in a way that cannot be told from the batch"
                return


class _Unknown(Exception):
    """An argument that cannot be rebuilt."""


class _Batch:
    """A batch as it was issued.

    Attributes:
        whole: the batch as the user gets it.
        leaves: by path, those that were not changed in place since the batch was issued.
        tensors: the leaves that are tensors.
        rows: number of samples.
    """

    def __init__(self, issued: IssuedBatch) -> None:
        self.whole, self._issued = issued.batch, issued.entries
        self.leaves = {path: leaf for path, (leaf, version) in issued.entries.items() if leaf_version(leaf) == version}
        self.tensors = {path: x for path, x in self.leaves.items() if isinstance(x, torch.Tensor)}
        self.rows = next((len(x) for x, _ in issued.entries.values() if isinstance(x, torch.Tensor) and x.dim()), 0)

    def differs(self, first: Mapping[Path, torch.Tensor]) -> bool:
        """Return whether the batch holds other values than the ``first`` one."""
        return any(path in first and not equal(first[path], x) for path, x in self.tensors.items())

    def reaches(self, tree: Any) -> bool:
        """Return whether a tensor of ``tree`` shares memory with one of the batch."""
        batch_memory = {memory_of(x) for x, _ in self._issued.values() if isinstance(x, torch.Tensor)}
        return any(isinstance(x, torch.Tensor) and memory_of(x) in batch_memory for _, x in walk(tree))

    def path_of(self, x: Any) -> Path | None:
        """Return the path of the container ``x`` in the batch.

        None if it is not part of the batch, or if the job has changed something in it.
        """
        at = next((path for path, container in _containers(self.whole) if container is x), None)
        if at is None:
            return None
        now = {(*at, *path): leaf for path, leaf in walk(x)}
        then = {path for path in self._issued if path[: len(at)] == at}
        return at if now.keys() == then and all(self.leaves.get(p) is leaf for p, leaf in now.items()) else None


def _read(x: Any, path: Path, batch: _Batch, found: dict[Path, Argument]) -> Any:
    """Return the form of an argument: "leaf", or a container's type and parts; add the origins of its leaves to ``found``."""
    if isinstance(x, torch.Tensor):
        found[path] = _tensor(x, path, batch)
        return "leaf"
    at = batch.path_of(x) if isinstance(x, Mapping | list | tuple) or x is batch.whole else None
    if at is not None:
        found[path] = Argument([Node(at)], sure=True)
        return "leaf"
    if type(x) is dict:
        return dict, {key: _read(value, (*path, key), batch, found) for key, value in x.items()}
    if isinstance(x, list | tuple) and (type(x) in (list, tuple) or hasattr(x, "_fields")):
        form = type(x), tuple(_read(value, (*path, i), batch, found) for i, value in enumerate(x))
        parts = [argument for p, argument in found.items() if p[: len(path)] == path]
        if len(x) == batch.rows > 1 and not any(map(_of_batch, parts)):
            raise _Unknown(
                f"argument {name_of(path)} is a {type(x).__name__} with an entry for each sample that the job makes itself"
            )
        return form
    if isinstance(x, Mapping | list | tuple):
        return _moved(x, path, batch, found)
    found[path] = Argument(_scalar(x, batch), sure=True)
    return "leaf"


def _moved(x: Any, path: Path, batch: _Batch, found: dict[Path, Argument]) -> Any:
    """Return the form of a copy of a container of the batch, with all of its entries.

    Such kinds of containers can copy themselves, for example to another device.
    """
    for at, container in _containers(batch.whole):
        if isinstance(x, Mapping) and type(x) is type(container) and x.keys() == container.keys():
            inner: dict[Path, Argument] = {}
            for key, value in x.items():
                _read(value, (*at, key), batch, inner)
            if all(_is_entry(argument, p) for p, argument in inner.items()):
                found[path] = Argument([Node(at)], sure=all(a.sure for a in inner.values()))
                return "leaf"
    raise _Unknown(f"argument {name_of(path)} is a {type(x).__name__} that the job makes itself")


def _is_entry(argument: Argument, path: Path) -> bool:
    return any(isinstance(s, Cut | Node) and s.path == path and is_whole(s) for s in argument.sources)


def _scalar(x: Any, batch: _Batch) -> list[Source]:
    """Return the possible origins of a value that is not a tensor: a constant, or an entry of the batch."""
    sources: list[Source] = [Constant(x)]
    sources += [Node(p) for p, leaf in batch.leaves.items() if not isinstance(leaf, torch.Tensor) and alike(leaf, x)]
    return sources


def _tensor(x: torch.Tensor, path: Path, batch: _Batch) -> Argument:
    """Return the possible origins of a tensor.

    Raises:
        _Unknown: the tensor has a row for each sample and does not come from the batch.
    """
    cuts = [cut for at, leaf in batch.tensors.items() for cut in views(x, leaf, at)]
    if cuts:
        entries = [cut for cut in cuts if is_whole(cut)]
        return Argument(list(entries or cuts), sure=True)
    cuts = [cut for at, leaf in batch.tensors.items() for cut in copies(x, leaf, at)]
    named = [cut for cut in cuts if cut.path[-1:] == path[-1:] and isinstance(path[-1], str) and is_whole(cut)]
    if named:
        return Argument(list(named), sure=False)
    sources: list[Source] = list(cuts)
    value = x.detach().clone()
    if not x.dim() or x.shape[0] != batch.rows:
        sources.append(Constant(value))
    elif cuts and bool((value == value[:1]).all()):
        sources.append(Rows(value[0], cuts[0]))
    if not sources:
        raise _Unknown(
            f"argument {name_of(path)}, a tensor of shape {tuple(x.shape)} with a row for each sample, is neither an entry of "
            "the batch nor a cut of one: the job makes it itself"
        )
    return Argument(sources, sure=False)


def _agreed(path: Path, argument: Argument, batch: Any) -> Any:
    """Return the value that all sources of an argument give for ``batch``.

    Raises:
        DataError: the sources give different values.
    """
    first, *others = [source.of(batch) for source in argument.sources]
    for source, other in zip(argument.sources[1:], others, strict=True):
        if not alike(other, first):
            raise DataError(
                f"argument {name_of(path)} of the job's call may be {describe(argument.sources[0])} or {describe(source)}, "
                f"which is not the same in a probed batch; {CURE}"
            )
    return first


def _of_batch(argument: Argument) -> bool:
    return any(isinstance(source, Cut | Node) for source in argument.sources)


def _build(form: Any, path: Path, values: Mapping[Path, Any]) -> Any:
    """Build an argument of the given form, with its leaves from ``values``."""
    if form == "leaf":
        return values[path]
    kind, parts = form
    if kind is dict:
        return {key: _build(part, (*path, key), values) for key, part in parts.items()}
    built = [_build(part, (*path, i), values) for i, part in enumerate(parts)]
    return kind(*built) if hasattr(kind, "_fields") else kind(built)


def _containers(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield the containers of a batch with their paths, the batch itself first."""
    if isinstance(tree, Mapping | list | tuple):
        yield path, tree
        pairs = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
        for key, value in pairs:
            yield from _containers(value, (*path, key))
    elif not path and not isinstance(tree, torch.Tensor):
        yield path, tree
