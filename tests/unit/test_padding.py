"""Samples of several lengths, collated with padding and with masked prompts: what is collected is that of each sample alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from grace_ds.data.in_flight import attention_of
from grace_ds.data.tokens import tokens_of
from grace_ds.gradients.capture import CollectedRows
from grace_ds.gradients.hooks import Sketcher
from grace_ds.gradients.layers import select_layers
from grace_ds.gradients.projection import bases, fold_table
from tests.oracles import batch_of_one_gradients, sketch_of

SEED, DIM, RANK, VOCAB, PAD = 5, 128, 6, 50, 0
LENGTHS, PROMPTS = (12, 5, 9, 3, 7), (4, 1, 3, 1, 6)
Item = dict[str, torch.Tensor]


def model() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, pad_token_id=PAD
    )
    return transformers.LlamaForCausalLM(config).train()


def items() -> list[Item]:
    """Samples without padding; the labels of their prompts are ignored."""
    draw = torch.Generator().manual_seed(1)
    made = []
    for length, prompt in zip(LENGTHS, PROMPTS, strict=True):
        tokens = torch.randint(1, VOCAB, (length,), generator=draw)
        labels = tokens.clone()
        labels[:prompt] = -100
        made.append({"input_ids": tokens, "labels": labels, "attention_mask": torch.ones(length, dtype=torch.int64)})
    return made


def padded(side: str, made: list[Item]) -> Item:
    most = max(len(item["input_ids"]) for item in made)
    fill = {"input_ids": PAD, "labels": -100, "attention_mask": 0}

    def row(item: Item, key: str) -> torch.Tensor:
        spare = most - len(item[key])
        return F.pad(item[key], (spare, 0) if side == "left" else (0, spare), value=fill[key])

    batch = {key: torch.stack([row(item, key) for item in made]) for key in fill}
    # Rotary positions count from a row's first token, as transformers' own generation does.
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return batch


def own_loss(module: Any, batch: Item) -> torch.Tensor:
    """A loop that computes its own loss, with a mask in the place of ignored labels."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits, labels = module(**inputs).logits[:, :-1], batch["labels"][:, 1:]
    mask = (labels != -100).float()
    each = F.cross_entropy(logits.flatten(0, 1), labels.clamp(min=0).flatten(), reduction="none")
    return (each * mask.flatten()).sum() / mask.sum()


LOSSES = {"of the model": lambda module, batch: module(**batch).loss, "of the job": own_loss}


def collected(batch: Item, loss_of: Any) -> tuple[CollectedRows, Sketcher]:
    module = model()
    with Sketcher(select_layers(module), SEED, DIM, RANK) as sketcher:
        capture = sketcher.begin(np.arange(len(batch["input_ids"])))
        capture.attention = attention_of(((), batch), len(batch["input_ids"]))
        loss = loss_of(module, batch)
        sketcher.observe_loss(loss)
        sketcher.end()
        loss.backward()
        rows = sketcher.finish(capture)
    assert rows is not None and not sketcher.failures
    return rows, sketcher


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_sketches_and_hidden_states_are_those_of_each_sample_alone(side: str, loss: str) -> None:
    rows, sketcher = collected(padded(side, items()), LOSSES[loss])
    module = model()
    weights = {name: module.get_submodule(name).weight for name in sketcher.names}
    sides = {layer.name: bases(layer.name, SEED, RANK, layer.inputs, layer.outputs) for layer in sketcher.layers}
    tables = {name: fold_table(name, SEED, RANK, DIM) for name in sketcher.names}
    for i, item in enumerate(items()):
        alone = padded(side, [item])
        assert rows.loss[i] == pytest.approx(LOSSES["of the model"](module, alone).item(), rel=1e-4)
        (gradient,) = batch_of_one_gradients(module, weights, alone["input_ids"], lambda m, _, a=alone: m(**a).loss)
        truth = sketch_of(gradient, sides, tables, DIM, None)
        assert np.linalg.norm(rows.sketch[i] - truth) <= 1e-4 * np.linalg.norm(truth)
        np.testing.assert_allclose(rows.hidden[i], collected(alone, LOSSES[loss])[0].hidden[0], atol=1e-4)


def test_without_its_mask_padding_would_tell_in_the_hidden_state() -> None:
    batch = padded("right", items())
    masked = collected(batch, LOSSES["of the model"])[0].hidden
    plain = collected({**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}, LOSSES["of the model"])[0].hidden
    assert np.abs(masked - plain)[0].max() < 1e-5  # the longest sample has none
    assert (np.abs(masked - plain)[1:].max(1) > 1e-2).all()


def test_the_attention_mask_is_found_by_its_name_and_form() -> None:
    mask = torch.ones(3, 4)
    assert attention_of((({"inputs": {"attention_mask": mask}},), {}), 3) is not None
    for inputs in (({}, {"mask": mask}), ({}, {"attention_mask": mask[:2]}), ({}, {"attention_mask": mask[:, None]}), ({}, {})):
        assert attention_of(inputs, 3) is None


@pytest.mark.parametrize("side", ["right", "left"])
def test_content_leaves_padding_out_with_a_mask_or_with_ignored_labels(side: str) -> None:
    batch = padded(side, items())
    for i, item in enumerate(items()):
        row = {key: batch[key][i] for key in ("input_ids", "labels", "attention_mask")}
        assert tokens_of(row).tolist() == item["input_ids"].tolist()
        del row["attention_mask"]
        assert tokens_of(row).tolist() == item["input_ids"].tolist()
        row = {key: value.tolist() for key, value in row.items()}
        assert tokens_of(row).tolist() == item["input_ids"].tolist()


def test_content_keeps_what_only_looks_like_padding() -> None:
    assert tokens_of({"input_ids": [7, 7, 7, 1, 2], "labels": [7, 7, 7, 1, 2]}).tolist() == [7, 7, 7, 1, 2]
    prompt = {"input_ids": [7, 8, 9, 1, 2], "labels": [-100, -100, -100, 1, 2]}
    assert tokens_of(prompt).tolist() == [7, 8, 9, 1, 2]
    assert tokens_of({"input_ids": [3, 4], "labels": [5]}).tolist() == [3, 4]  # labels of another form say nothing
