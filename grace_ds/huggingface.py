"""Add GRACE to a ``transformers.Trainer`` with a DeepSpeed config, by two lines of the script.

The lines::

    import grace_ds.huggingface
    …
    trainer = Trainer(model=model, args=TrainingArguments(deepspeed="ds.json", …), train_dataset=data)
    grace_ds.huggingface.attach(trainer)      # the grace block stands in ds.json
    trainer.train()

Any subclass of Trainer works.  Evaluation, saving and ``trainer.train(resume_from_checkpoint=…)`` stay as they are.
"""

from __future__ import annotations

from typing import Any

from grace_ds.data.trusted import Tokenize
from grace_ds.gradients.probe import LossFn
from grace_ds.integrations.huggingface import job as _job
from grace_ds.integrations.trusted_set import UserInputs

__all__ = ["attach"]


def attach(
    trainer: Any,
    *,
    trusted_data: Any = None,
    validation_data: Any = None,
    tokenize: Tokenize | None = None,
    loss_fn: LossFn | None = None,
) -> Any:
    """Make ``trainer.train()`` train on the coreset that the grace block of its DeepSpeed config describes.

    Call it once, before ``train()``, on every rank.  Without a block, or with ``enabled: false``, nothing is changed.  During
    training the handle is ``trainer.model_wrapped.grace_ds``.

    Args:
        trainer: a ``transformers.Trainer`` (or a subclass's) with a map-style training set.
        trusted_data: a map-style dataset of trusted samples, items like the training set's; instead of the config's
            ``trusted`` file.
        validation_data: only read to make sure that no trusted sample is in it; default: the Trainer's ``eval_dataset``.
        tokenize: text → token ids, for a ``trusted`` file of text.
        loss_fn: (module, batch) → scalar mean loss, for the trusted probe of ``recipe: grace``; default: the Trainer's own.

    Returns:
        ``trainer``.

    Raises:
        ConfigError: the Trainer uses no DeepSpeed, the block is wrong, or a setting does not work with a coreset.
        DataError: the training set cannot be read by index.
    """
    _job.attach(trainer, UserInputs(trusted_data, validation_data, tokenize, loss_fn))
    return trainer
