"""Add GRACE to a Megatron job, by two lines of ``pretrain_gpt.py``.

The lines::

    import grace_ds.megatron
    …
    pretrain = grace_ds.megatron.wrap_pretrain(pretrain, "grace.yaml")   # before pretrain(...) is called

They do what a job with a loop of its own writes in its two providers, the model first for ``recipe: grace``::

    grace_ds.megatron.attach(model)                                          # at the end of model_provider
    return grace_ds.megatron.wrap(train_ds, "grace.yaml"), valid_ds, test_ds   # at the end of the datasets' provider

Both are called on every rank: the datasets' provider must set ``is_distributed = True``, as Megatron-LM's does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from grace_ds.data.trusted import Tokenize
from grace_ds.errors import ConfigError
from grace_ds.integrations.megatron import job as _job
from grace_ds.integrations.megatron.job import Feed
from grace_ds.records import IntArray

__all__ = ["attach", "detach", "ids", "wrap", "wrap_pretrain"]


def wrap_pretrain(pretrain: Callable[..., Any], config: Mapping[str, Any] | str, **options: Any) -> Callable[..., Any]:
    """Return Megatron-LM's ``pretrain`` with GRACE in it: :func:`attach` and :func:`wrap` around what its providers return.

    Args:
        pretrain: ``megatron.training.pretrain``, whose first two arguments provide the datasets and the model.
        config: see :func:`wrap`.
        options: further keywords of :func:`wrap`.

    Raises:
        ConfigError: by the function returned, on every rank, if the datasets' provider is called on some ranks only.
    """

    @functools.wraps(pretrain)
    def with_grace(
        train_valid_test_dataset_provider: Callable[..., Any], model_provider: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        provider = train_valid_test_dataset_provider
        detach()  # of an earlier call in this process, as after an in-process restart

        # Megatron-LM reads the provider's attributes, and looks for vp_stage in its signature.
        @functools.wraps(provider)
        def datasets(*sizes: Any, **stage: Any) -> tuple[Any, ...]:
            train_ds, *others = provider(*sizes, **stage)
            return wrap(train_ds, config, **options), *others

        def model(*positional: Any, **keywords: Any) -> Any:
            if not getattr(provider, "is_distributed", False):
                raise ConfigError(
                    "the datasets' provider is called on tensor-parallel rank 0 alone, and every rank takes part in a schedule: "
                    "set train_valid_test_datasets_provider.is_distributed = True before pretrain is called"
                )
            return attach(model_provider(*positional, **keywords))

        result = pretrain(datasets, model, *args, **kwargs)
        detach()
        return result

    return with_grace


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
    """Return the training dataset with the coreset's schedule: position p of the run gives the sample scheduled there.

    The samples to choose from are one epoch of the corpus, or of each dataset of a blend.  A blend's weights stay as they are,
    and each of its datasets is a source for ``selection.shares``, unless ``selection.sources`` names others.  The validation and
    test datasets are not touched.  Collective over all ranks.

    Args:
        train_ds: the dataset that the job's provider has built; None on a rank without one.
        config: the grace block, or the path of a YAML file with it.  ``run_dir`` is where a resumed run finds its schedules;
            ``recipe: grace`` needs :func:`attach` before, and ``auto`` is content without it.
        consumed_samples: samples trained on so far; this and the next three default to Megatron-LM's arguments.
        micro_batch_size: samples of a micro-batch on one data-parallel rank.
        global_batch_size: samples of an optimizer step.
        num_workers: data workers of a rank.
        lag: optimizer steps by which a schedule is published before its first sample; default: as many as the workers
            read ahead, plus one.
        trusted_data: a map-style dataset of trusted samples, instead of the config's ``trusted`` file.
        tokenize: text → token ids, for a ``trusted`` file of text.

    Returns:
        A dataset of the same length for the job's own loader (``--dataloader-type single`` or cyclic); None if ``train_ds`` is
        None.  In an interleaved pipeline, call it once for each virtual stage.
        With ``mode: shadow`` or ``enabled: false`` it is ``train_ds``.

    Raises:
        ConfigError: something is missing, or does not work in a Megatron job; with its name and the cure.
        CheckpointError: the run to resume used another dataset, or its schedules are damaged.
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
    """Make the schedule follow the job's optimizer steps; return ``model``.

    The model is not changed.  Its first training forward reveals the optimizer, whose calls of ``step`` are counted.

    Args:
        model: this rank's part of the model, or a list of its chunks.
        optimizer: Megatron's; needed only outside of Megatron-LM's training loop.
    """
    _job.job.attach(model, optimizer)
    return model


def detach() -> None:
    """Remove all hooks and replaced methods, and close the transport.  A second call does nothing."""
    _job.job.detach()


def ids(step: int, micro: int) -> IntArray:
    """Return this data-parallel rank's samples of micro-batch ``micro`` of the step after ``step`` steps: (rows,) int64.

    Ids are positions in one epoch of the corpus.  Available only on ranks with data, and only near the current position.

    Raises:
        ConfigError: this rank has no data, or :func:`wrap` was not called.
    """
    feed: Feed | None = _job.job.feed
    if feed is None:
        raise ConfigError("no schedule here: grace_ds.megatron.wrap was not called, or got no dataset on this rank")
    return feed.ids(step, micro)
