"""Samples that cannot be run through the model are named before any rank begins a probe."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from grace_ds.comm.local import LocalComm
from grace_ds.config.schema import CollectConfig
from grace_ds.errors import DataError
from grace_ds.gradients.collector import GradientCollector
from grace_ds.gradients.influence_probe import InfluenceProbe, Probes
from grace_ds.gradients.passes import ModulePasses
from grace_ds.gradients.probe_items import SampleForm, embedding_rows
from tests.unit.narrow import VOCAB, Narrow, cycles
from tests.unit.test_influence_probe import Reads, loss, scaled_sketcher

pytestmark = pytest.mark.timeout(60)

FORM = SampleForm(VOCAB)


class Named(nn.Module):
    """A model of several tables that names the one of its tokens, as transformers' do."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(7, 2), nn.Embedding(100, 2)

    def get_input_embeddings(self) -> nn.Module:
        return self.words


def test_the_table_of_the_tokens_is_the_one_that_the_model_names_or_the_largest() -> None:
    assert embedding_rows(Named()) == 7
    assert embedding_rows(nn.Sequential(nn.Embedding(7, 2), nn.Embedding(9, 2))) == 9
    assert embedding_rows(nn.Linear(2, 2)) is None


@pytest.mark.parametrize(
    ("item", "token"),
    [
        (torch.tensor([1, VOCAB]), VOCAB),
        ({"input_ids": [1, 2, -100]}, -100),
        ({"input_ids": np.array([1, 10**9]), "attention_mask": np.array([1, 0])}, 10**9),  # what is masked is looked up too
    ],
)
def test_an_id_without_an_embedding_is_named(item: Any, token: int) -> None:
    with pytest.raises(
        DataError, match=rf"pool sample 7 holds token id {token}, and the model's embedding has {VOCAB} rows; give"
    ):
        FORM.check(item, 7, "pool")


@pytest.mark.parametrize("item", [torch.tensor([0, VOCAB - 1]), {"pixels": torch.zeros(3)}, {"input_ids": []}])
def test_ids_within_and_items_without_ids_pass(item: Any) -> None:
    FORM.check(item, 0, "pool")
    SampleForm(None).check([VOCAB], 0, "pool")


def test_a_pool_beyond_the_table_says_that_ids_are_not_embedded_as_they_are() -> None:
    """As where a model hashes its ids; nothing can be said of the trusted ones then."""
    model = Narrow()
    assert SampleForm.of(model, [[1, 2]] * 3, "auto").vocabulary == VOCAB
    assert SampleForm.of(model, [[1, 2], [VOCAB, 2]], "auto").vocabulary is None
    assert SampleForm.of(nn.Linear(2, 2), [[1, 2]], "auto").vocabulary is None


def test_trusted_samples_of_two_lengths_are_refused_at_the_start_where_nobody_pads_them() -> None:
    trusted = [torch.arange(n) for n in (5, 9, 5, 4)]
    with pytest.raises(
        DataError, match=r"cannot join trusted samples \(sample: tokens\) 3: 4, 1: 9 \(RuntimeError.*one length, or"
    ):
        FORM.check_all(trusted, torch.stack)
    FORM.check_all(trusted, None)  # only their text is read
    FORM.check_all(trusted, lambda items: nn.utils.rnn.pad_sequence(items, batch_first=True))
    FORM.check_all([torch.arange(5)] * 2, lambda items: 1 / 0)  # of one length: nobody is asked


def probe_of(trusted: Any, pool: Any) -> InfluenceProbe:
    model, halves = Narrow(), (np.arange(0, 24, 2), np.arange(1, 24, 2))
    sketcher, device, comm = scaled_sketcher(model), torch.device("cpu"), LocalComm(5.0)
    passes = ModulePasses(model, GradientCollector(sketcher, CollectConfig()), torch.stack, 40, device, loss, comm, FORM)
    return InfluenceProbe(passes, sketcher, trusted, halves, pool, comm, 3, Probes(64, 64, 64))


@pytest.mark.parametrize("which", ["trusted", "pool"])
def test_a_probe_names_the_sample_that_the_model_has_no_embedding_for(which: str) -> None:
    trusted, pool = cycles(24, 2, 0.1), cycles(40, 1, 0.8)
    {"trusted": trusted, "pool": pool}[which][11, 3] = VOCAB + 5  # of the half that judges
    probe = probe_of(Reads(trusted), Reads(pool))
    with pytest.raises(DataError, match=f"{which} sample 11 holds token id {VOCAB + 5}"):
        probe.fit(0, np.arange(40))


@pytest.mark.parametrize("which", ["trusted", "pool"])
def test_a_probe_names_samples_that_do_not_fit_together(which: str) -> None:
    trusted, pool = list(cycles(24, 2, 0.1)), list(cycles(40, 1, 0.8))
    {"trusted": trusted, "pool": pool}[which][12] = torch.arange(4)
    with pytest.raises(DataError, match=rf"cannot join {which} samples .*\b12: 4\b"):
        probe_of(trusted, pool).fit(0, np.arange(40))
