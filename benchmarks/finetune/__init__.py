"""Fine-tuning as the paper does it, small: SmolLM2-135M-Instruct, LoRA, GSM8K, under transformers.Trainer.

Arms at equal optimizer steps: a random subset held fixed (uniform), one drawn anew at each refresh (rs2), GRACE by content alone
(content) and with gradient sketches of the adapters (grace), all with the same budget; and the whole pool (full). The guard is
off in GRACE's arms, so that they are what they are called. The trusted samples are problems of the training file that are in no
arm's pool. The figures are of a fixed slice of the test file, which nothing is chosen by: the mean loss of answer tokens, and
exact match of the final number under greedy decoding. Each run is a process of its own (``python -m benchmarks.finetune.job``);
one that was finished before with the same settings and sources is taken from --out.
"""

from benchmarks.finetune.matrix import add_arguments, run

__all__ = ["add_arguments", "run"]
