"""GRACE in a Megatron job, by three lines of ``pretrain_gpt.py``.

The lines::

    import grace_ds.megatron
    …
    grace_ds.megatron.attach(model)                                        # at the end of model_provider
    …
    return grace_ds.megatron.wrap(train_ds, "grace.yaml"), valid_ds, test_ds   # at the end of the datasets' provider

The model's side may come first or second.  Both are called on every rank: the provider must say ``is_distributed = True``, as
Megatron-LM's does.  The loader must be Megatron's ``single`` one (its default).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grace_ds.data.trusted import Tokenize
from grace_ds.errors import ConfigError
from grace_ds.integrations.megatron import job as _job
from grace_ds.integrations.megatron.job import Feed
from grace_ds.records import IntArray

__all__ = ["attach", "detach", "ids", "wrap"]


def wrap(
    train_ds: Any,
    config: Mapping[str, Any] | str,
    *,
    consumed_samples: int | None = None,
    micro_batch_size: int | None = None,
    global_batch_size: int | None = None,
    num_workers: int | None = None,
    lag: int | None = None,
    trusted_data: Any = None,
    tokenize: Tokenize | None = None,
) -> Any:
    """The training dataset with the coreset's schedule in it: position p of the run gives the sample that is due there.

    The samples to choose from are one epoch of the corpus (of each dataset of a blend, whose weights stay as they are).  The
    validation and test datasets are not touched.  Collective over all ranks.

    Args:
        train_ds: what the job's provider has built; None on a rank that has none.
        config: the grace block, or the path of a YAML file with it.  ``run_dir`` is where a resumed run finds its schedules;
            ``recipe`` content (which ``auto`` is here), density or uniform.
        consumed_samples: samples trained on so far; this and the three that follow default to Megatron-LM's arguments.
        micro_batch_size: samples of a micro-batch on one data-parallel rank.
        global_batch_size: samples of an optimizer step.
        num_workers: data workers of a rank.
        lag: optimizer steps by which a schedule is published before its first sample; default: as far as the workers
            read ahead, and one more.
        trusted_data: a map-style dataset of trusted samples, in the place of the config's ``trusted`` file.
        tokenize: text → token ids, for a ``trusted`` file of text.

    Returns:
        A dataset of the same length for the job's own loader (``--dataloader-type single``); None where there was none.
        With ``mode: shadow`` or ``enabled: false`` it is ``train_ds``.

    Raises:
        ConfigError: something is missing, or cannot be had in a Megatron job; names it and the cure.
        CheckpointError: the run that is to be taken up was made of another dataset, or its schedules are damaged.
        DataError: the corpus or the trusted samples cannot be used.
    """
    return _job.wrap(
        train_ds,
        config,
        consumed_samples=consumed_samples,
        micro_batch_size=micro_batch_size,
        global_batch_size=global_batch_size,
        num_workers=num_workers,
        lag=lag,
        trusted_data=trusted_data,
        tokenize=tokenize,
    )


def attach(model: Any, optimizer: Any = None) -> Any:
    """Lets the schedule follow the job's steps; returns ``model``.

    Nothing of the model changes: its first training forward tells the optimizer, whose ``step`` is what counts.

    Args:
        model: this rank's part of the model, or a list of its chunks.
        optimizer: Megatron's; needed only outside of Megatron-LM's training loop.
    """
    _job.job.attach(model, optimizer)
    return model


def detach() -> None:
    """Takes hooks and methods off again and closes the transport.  A second call does nothing."""
    _job.job.detach()


def ids(step: int, micro: int) -> IntArray:
    """(rows,) int64: this data-parallel rank's samples of micro-batch ``micro`` of the step after ``step`` steps.

    Ids are positions in one epoch of the corpus.  Only on ranks with data, and only around the present.

    Raises:
        ConfigError: this rank has no data, or :func:`wrap` was not called.
    """
    feed: Feed | None = _job.job.feed
    if feed is None:
        raise ConfigError("no schedule here: grace_ds.megatron.wrap was not called, or got no dataset on this rank")
    return feed.ids(step, micro)
