"""Facts about a checkout of Megatron-LM, as JSON: ``python -m tests.contract.megatron_lm_facts CHECKOUT FILE``."""

from __future__ import annotations

import functools
import inspect
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

READ = [
    "micro_batch_size",
    "global_batch_size",
    "num_workers",
    "dataloader_type",
    "data_sharding",
    "train_samples",
    "train_iters",
]
READ += ["rampup_batch_size", "iterations_to_skip", "phase_transition_iterations", "hybrid_context_parallel", "skip_train"]
SET_IN_LOOP = {"consumed_train_samples": "args.consumed_train_samples += ", "curr_iteration": "args.curr_iteration = iteration"}


def signatures(training: Any) -> dict[str, Any]:
    import grace_ds.megatron

    def provider(train_val_test_num_samples: Any, vp_stage: Any = None) -> Any:
        return None, None, None

    provider.is_distributed = True  # type: ignore[attr-defined]
    given: list[Any] = []
    grace_ds.megatron.wrap_pretrain(lambda datasets, model: given.append(datasets), {"enabled": False})(provider, None)
    assert given[0].is_distributed and functools.partial(given[0], vp_stage=0)
    return {
        "pretrain": list(inspect.signature(training.pretrain).parameters),
        "signature through the wrapper": list(inspect.signature(given[0]).parameters),
    }


def arguments(training: Any) -> dict[str, Any]:
    from megatron.training import global_vars
    from megatron.training.arguments import parse_args

    assert hasattr(global_vars, "_GLOBAL_ARGS")
    sys.argv = ["pretrain_gpt.py"]
    args = parse_args()
    loop = inspect.getsource(training.train)
    missing = [name for name in READ if not hasattr(args, name)]
    unset = [name for name, line in SET_IN_LOOP.items() if line not in loop]
    if "config.grad_scale_func = optimizer.scale_loss" not in loop:
        unset.append("grad_scale_func")
    if "args.iteration, " not in inspect.getsource(training.setup_model_and_optimizer):
        unset.append("iteration")
    types = ["single", "cyclic", "external"]
    source = inspect.getsource(training.build_train_valid_test_data_iterators)
    return {"missing arguments": missing, "unset in the loop": unset, "loader types": types if str(types) in source else source}


def samplers() -> dict[str, Any]:
    from megatron.training.datasets import data_samplers

    single, cyclic = [], []
    for ranks, rows, rank in ((1, 4, 0), (2, 3, 0), (2, 3, 1), (3, 2, 2)):
        for consumed in (0, 2 * ranks * rows):
            place = {"ranks": ranks, "rows": rows, "rank": rank, "consumed": consumed}
            made = data_samplers.MegatronPretrainingSampler(101, consumed, rows, rank, ranks)
            single.append(place | {"batches": list(made)})
            for sharded in (True, False):
                random = data_samplers.MegatronPretrainingRandomSampler(None, 101, consumed, rows, rank, ranks, sharded)
                cyclic.append(place | {"length": 101, "sharded": sharded, "batches": list(random)})
    return {"single": single, "cyclic": cyclic}


class Tokenizer:
    """Characters; with what Megatron-LM's dataset for --sft asks of a tokeniser."""

    eod, pad = 1, 0
    unique_identifiers = {"class": "characters"}  # noqa: RUF012

    def tokenize_conversation(self, conversation: list[dict[str, str]], **_: Any) -> tuple[Any, Any]:
        tokens = np.array([ord(c) for turn in conversation for c in turn["content"]])
        return tokens, tokens


def conversations(folder: Path) -> dict[str, Any]:
    from megatron.core.datasets.utils import Split
    from megatron.training.datasets.sft_dataset import SFTDataset

    from grace_ds.integrations.megatron.corpus import Texts, one_epoch

    file, texts = folder / "conversations.jsonl", ["abc", "defgh", "ij", "klmnop", "q"]
    lines = [json.dumps({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": t}]}) for t in texts]
    file.write_text("\n".join(lines))
    config: Any = SimpleNamespace(
        tokenizer=Tokenizer(),
        sequence_length=16,
        reset_position_ids=False,
        create_attention_mask=False,
        reset_attention_mask=False,
        context_parallel_size=1,
        random_seed=1,
        split="100,0,0",
        split_matrix=[(0, 1.0), None, None],
    )
    low = SFTDataset.build_low_level_dataset(str(file), config)
    made = [SFTDataset(low, str(file), np.arange(5), samples, Split.train, config) for samples in (40, 60)]
    corpora = [one_epoch(dataset, True, lambda: None) for dataset in made]
    corpus = corpora[0]
    assert corpus is not None
    found = [Texts(corpus)[i]["input_ids"].tolist() for i in range(len(corpus))]
    return {
        "sft": {
            "length": len(corpus),
            "asked for": len(made[0]),
            "texts": ["".join(map(chr, ids[: ids.index(1)])) for ids in found],
            "conversations": ["s" + text for text in texts],
            "digests": len({c.digest for c in corpora if c is not None}),
        }
    }


def main() -> None:
    checkout, out = sys.argv[1], Path(sys.argv[2])
    sys.path.append(checkout)  # behind the wheel of megatron-core, which is compiled
    import megatron.training.training as training

    torch.set_num_threads(1)
    found = signatures(training) | samplers() | conversations(out.parent) | arguments(training)
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
