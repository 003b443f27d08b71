"""The models of the benchmark and what they cost, counted from their shapes.

Shape legend: T = tokens of a row that are read (its last one is a target only), C = width, V = vocabulary.  A product of (a, b)
and (b, c) counts 2abc; what is not a matrix product is not counted.
"""

from __future__ import annotations

from grace_ds_quickstart.model import GPTConfig

SHAPES = {"small": (96, 4), "4m": (256, 5)}  # width, layers


def model_config(name: str, vocab: int, context: int) -> GPTConfig:
    """The shape of a model by its name in ``SHAPES``."""
    width, layers = SHAPES[name]
    return GPTConfig(vocab=vocab, context=context, layers=layers, width=width)


def forward_flops(config: GPTConfig) -> int:
    """FLOPs of one row's forward pass: the layers' products, attention over all pairs, the head."""
    t, c = config.context, config.width
    layer = 2 * 12 * c * c * t + 2 * 2 * t * t * c
    return config.layers * layer + 2 * t * c * config.vocab


def training_flops(config: GPTConfig) -> int:
    """FLOPs of one row's forward and backward pass: each product is met again for its input and for its weight."""
    return 3 * forward_flops(config)


def head_norm_flops(config: GPTConfig) -> int:
    """FLOPs that the norm of the head's gradient takes beyond a forward pass: the two Gram matrices of a row's positions."""
    t = config.context
    return 2 * t * t * (config.vocab + config.width)
