"""Prepare a process for a script that knows nothing of GRACE: what ``grace-ds run`` does before the script begins.

``deepspeed.initialize`` becomes :func:`grace_ds.initialize`, a ``transformers.Trainer`` is attached to when it begins to train,
and torch's DataLoaders are watched, so that the one that an engine is trained from can be adopted.  Each is done when the module
is imported; a script that does not import it pays nothing.
"""

from __future__ import annotations

import atexit
import functools
import logging
import os
import sys
from types import ModuleType
from typing import Any

from grace_ds.utils.imports import after_import
from grace_ds.utils.screen import log_to_screen

log = logging.getLogger("grace_ds")

_SPEAKER = "GRACE_DS_RANK_PROCESS"  # process id of a rank: a process that it starts inherits RANK, and must not speak for it
_prepared = False
_said = False
_unless = "it called neither deepspeed.initialize nor transformers.Trainer.train"  # why GRACE is off if nothing else happens


def prepare_process() -> None:
    """Prepare this process, before its script begins.  A second call does nothing."""
    global _prepared
    if _prepared:
        return
    _prepared = True
    if "RANK" in os.environ:
        os.environ.setdefault(_SPEAKER, str(os.getpid()))
    after_import("deepspeed", _replace_initialize)
    after_import("transformers.trainer", _attach_trainers)
    after_import("torch.utils.data.dataloader", _watch_loaders)
    atexit.register(_report_nothing_happened)


def switched_on() -> None:
    """Note that GRACE is on in this process, or has stopped it: the handle, or an error, says so."""
    global _said
    _said = True


def waits(unless: str) -> None:
    """Note that GRACE is to be switched on later; ``unless`` says why it is off if that never happens."""
    global _unless
    _unless = unless


def report_off(why: str) -> None:
    """Say, once on rank 0, that GRACE is off for an unchanged script, and why."""
    global _said
    if not _prepared or _said or not _is_rank_0():
        return
    _said = True
    log_to_screen(0)
    log.info("GRACE is off, and the job runs as it is: %s", why)


def _report_nothing_happened() -> None:
    if "torch" in sys.modules and "RANK" in os.environ:  # a launcher has no rank
        report_off(_unless)


def _is_rank_0() -> bool:
    """Return whether this process is rank 0 of a job, and not one that a rank has started."""
    return os.environ.get("RANK", "0") == "0" and os.environ.get(_SPEAKER, str(os.getpid())) == str(os.getpid())


def _replace_initialize(module: ModuleType) -> None:
    from grace_ds.integrations.deepspeed import replace_initialize

    replace_initialize(module)


def _attach_trainers(module: Any) -> None:
    """Have every Trainer attached to when it begins to train, unless its script has done so."""
    original = module.Trainer.train

    @functools.wraps(original)
    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        from grace_ds.integrations.huggingface import job

        job.attach_by_itself(self)
        return original(self, *args, **kwargs)

    module.Trainer.train = train


def _watch_loaders(module: ModuleType) -> None:
    from grace_ds.integrations.loader_watch import watch_loaders

    watch_loaders(module)
