"""Obtain the trusted set: from the job, from a file, or from the pool's own typical samples."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

from grace_ds.config.schema import GraceConfig
from grace_ds.data.order import Order, Permutation
from grace_ds.data.tokenizer import load_tokenizer
from grace_ds.data.tokens import key_of
from grace_ds.data.trusted import Tokenize, TrustedDataset, load_trusted, refuse_overlap
from grace_ds.errors import DataError
from grace_ds.features.content import TokenReader, tokens_of
from grace_ds.features.pseudo_trusted import LOOKED_AT, typical
from grace_ds.gradients.probe import LossFn
from grace_ds.utils.rng import undisturbed_rng

log = logging.getLogger("grace_ds")

_LEAST = 4  # two halves of two


@dataclass(frozen=True)
class UserInputs:
    """What a job passes in addition to its config; None for what it does not pass.

    Attributes:
        trusted_data: a map-style dataset of trusted samples, instead of ``config.trusted``.
        validation_data: the job's validation set, map-style; only read to make sure that it holds no trusted sample.
        tokenize: text → token ids, for a trusted file of text.
        loss_fn: (module, batch) → scalar mean loss, if the module's output holds none.
        order: of the job's own sampler, used wherever nothing is chosen; None: an order of GRACE's own.
    """

    trusted_data: Any = None
    validation_data: Any = None
    tokenize: Tokenize | None = None
    loss_fn: LossFn | None = None
    order: Order | None = None


def trusted_set(dataset: Any, reader: TokenReader | None, config: GraceConfig, user_inputs: UserInputs) -> Any:
    """Return the trusted samples, map-style, with items like those of ``dataset``.

    Returns:
        None if none are given and the config asks for no typical samples instead, or the pool is too small for them.

    Raises:
        DataError: the set is too small, cannot be read, or shares a sample with the validation set.
    """
    trusted = user_inputs.trusted_data
    if trusted is None and config.trusted is not None:
        probed = config.replay is None and config.collects and "gradients" in config.parts
        with undisturbed_rng():
            example = dataset[0]
        tokenize = user_inputs.tokenize
        if tokenize is None and config.tokenizer is not None:
            tokenize = load_tokenizer(config.tokenizer)
        trusted = load_trusted(config.trusted, example, tokenize, key=_key(example, config), probed=probed)
    if trusted is None:
        return _typical_of(dataset, reader, config.seed) if reader is not None and config.pseudo_trusted else None
    if len(trusted) < _LEAST:
        raise DataError(f"the trusted set holds {len(trusted)} samples; give at least {_LEAST} (64 or more to be of use)")
    if user_inputs.validation_data is not None:
        refuse_overlap(trusted, user_inputs.validation_data, lambda item: tokens_of(item, config.features.tokens_key))
    return trusted


def _key(item: Any, config: GraceConfig) -> Any:
    """Return the key of an item's token ids; None if the item has none, or if it consists of them."""
    try:
        return key_of(item, config.features.tokens_key)
    except DataError:
        return None


def _typical_of(dataset: Any, reader: TokenReader, seed: int) -> Any:
    """Return the pool's most typical samples; the same on every rank, because each reads the same few thousand."""
    n = len(dataset)
    ids = np.sort(Permutation(n, seed)(np.arange(min(n, LOOKED_AT))))
    tokens = reader.all(ids)
    selected = typical(tokens.flat, tokens.offsets)
    chosen = ids[selected.positions]
    if len(chosen) < _LEAST:
        log.warning("no trusted set, and the pool is too small to find typical samples in: density alone selects")
        return None
    if selected.smaller:
        log.warning(
            "no trusted set, and the pool has two kinds of text, shares %.2f and %.2f of its samples; of the typical ones that "
            "stand in for a trusted set a share of %.2f is of the smaller kind: give a trusted set (trusted, or trusted_data=) "
            "to say which is good",
            1 - selected.smaller,
            selected.smaller,
            selected.among,
        )
    log.info("no trusted set: the %d most typical of %d samples of the pool stand in for one", len(chosen), len(ids))
    return TrustedDataset([dataset[int(i)] for i in chosen])
