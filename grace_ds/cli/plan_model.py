"""Count what a training step costs, and what the collection adds to it, from the shapes of a transformer.

Multiplications and additions count as two operations.  A linear layer of w weights takes 2 w per token forward and 4 w
backward; attention scores and their product with the values, 4 T H per token and layer forward, twice that backward.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from grace_ds.config.schema import CollectConfig
from grace_ds.errors import ConfigError
from grace_ds.gradients.basis import TRUSTED_RANK
from grace_ds.gradients.kfac import RANK as MOMENT_RANK

ASPECT = 128  # hidden width over layers if only the parameters are given: between GPT-3's and Llama's
BYTES_AN_OPERATION = 0.008  # memory traffic of a GPU relative to its training rate: an H100 at 400 TFLOP/s


@dataclass(frozen=True)
class Model:
    """A decoder of equal blocks: query-key-value H x 3H, output H x H, up H x 4H, down 4H x H.

    Attributes:
        layers: number of blocks.
        hidden: H.
        vocab: size of the head's vocabulary.
        assumed: whether the shape was derived from the number of parameters.
    """

    layers: int
    hidden: int
    vocab: int
    assumed: bool

    @staticmethod
    def of(parameters: float, layers: int, hidden: int, vocab: int) -> Model | None:
        """Build the model from the options of the command line; None without any.

        Raises:
            ConfigError: only half of a shape is given.
        """
        if bool(layers) != bool(hidden):
            raise ConfigError("--layers and --hidden make a shape together; give both, or --parameters alone")
        if layers:
            return Model(layers, hidden, vocab, False)
        if not parameters:
            return None
        width = max(1, round((parameters * ASPECT / 12) ** (1 / 3)))
        return Model(max(1, round(width / ASPECT)), width, 0, True)

    @property
    def weights(self) -> float:
        """Number of weights of the blocks and the head."""
        return 12.0 * self.layers * self.hidden**2 + self.vocab * self.hidden

    def flop(self, tokens: int) -> float:
        """Return the operations of one sample of ``tokens`` tokens, forward and backward."""
        return tokens * (6.0 * self.weights + 12.0 * self.layers * tokens * self.hidden)

    @property
    def sketched(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of the layers that ``collect.layers: auto`` takes: those of the last half of the blocks."""
        h = self.hidden
        return [(h, 3 * h), (h, h), (h, 4 * h), (4 * h, h)] * (self.layers - self.layers // 2)


@dataclass(frozen=True)
class CollectCost:
    """Cost of the hooks, for one sample.

    Attributes:
        flop: projections of both sides and their products, with a trusted basis in force.
        traffic: bytes of the inputs and output gradients that the projections read, in 16 bits.
        width: rows of a projection.
    """

    flop: float
    traffic: float
    width: int

    @staticmethod
    def of(model: Model, config: CollectConfig, tokens: int, basis: bool = True) -> CollectCost:
        """Count by the sketch's formula ``P_in aᵀ (P_out gᵀ)ᵀ``, with rank + trusted rank rows per side (gradients.capture)."""
        width = config.rank + (TRUSTED_RANK if basis else 0)
        sides = sum(a + b for a, b in model.sketched)
        flop = tokens * (2.0 * width * sides + 2.0 * width**2 * len(model.sketched))
        return CollectCost(flop, 2.0 * tokens * sides, width)


def probe_flop(model: Model, config: CollectConfig, tokens: int) -> float:
    """Return the operations of one probed sample.

    A step's, and the sketch of second moments A Ω of both sides, Ω of ``MOMENT_RANK`` columns.
    """
    sides = sum(a + b for a, b in model.sketched)
    return model.flop(tokens) + CollectCost.of(model, config, tokens).flop + tokens * 4.0 * MOMENT_RANK * sides


@dataclass(frozen=True)
class BreakEven:
    """Savings that GRACE needs to pay for itself, in optimizer steps of the job without it.

    Attributes:
        overhead: seconds of GRACE relative to the seconds of the training steps.
        ratio: steps of uniform over those of GRACE at equal loss; above this value GRACE is ahead.
        steps: maximum steps of GRACE in the time of ``uniform`` steps of a uniform run; 0 if unknown.
        uniform: steps of the run.
    """

    overhead: float
    ratio: float
    steps: int
    uniform: int

    @staticmethod
    def of(step: float, collect: float, first: float, later: float, interval: int, uniform: int) -> BreakEven:
        """Compute from the seconds of a step without GRACE, of the collection in it, of the first refresh and of each other one.

        At equal time: s (step + collect) + first + later (s / interval - 1) = uniform · step.

        If the number of steps is unknown, the first refresh is not counted.
        """
        a_step = step + collect + later / interval
        if not uniform:
            return BreakEven(a_step / step - 1, a_step / step, 0, 0)
        steps = max(0.0, (uniform * step - max(0.0, first - later)) / a_step)
        ratio = uniform / steps if steps else math.inf
        return BreakEven(ratio - 1, ratio, math.floor(steps), uniform)
