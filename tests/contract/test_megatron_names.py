"""What GRACE takes for granted of Megatron, against the installed megatron-core and against a checkout of Megatron-LM.

No wheel has Megatron-LM's training loop: those tests need GRACE_MEGATRON_LM to name a checkout of core_v0.16.1.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed (pip install grace_ds[megatron])")

from grace_ds.data.sampler import Geometry
from grace_ds.integrations.megatron.cyclic import CyclicPositions
from grace_ds.integrations.megatron.schedules import SCHEDULES, SIDE_EFFECTS
from tests.multirank.harness import ROOT, run_command

CHECKOUT = os.environ.get("GRACE_MEGATRON_LM")
with_checkout = pytest.mark.skipif(CHECKOUT is None, reason="GRACE_MEGATRON_LM names no checkout of Megatron-LM core_v0.16.1")


def parameters(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def test_megatron_core_is_the_version_that_the_documentation_states():
    import megatron.core

    stated = (ROOT / "docs" / "megatron.md").read_text()
    assert f"megatron-core {megatron.core.__version__}" in stated and f"core_v{megatron.core.__version__}" in stated


def test_megatron_core_datasets_are_built_anew_from_what_they_hold():
    from megatron.core.datasets.gpt_dataset import GPTDataset
    from megatron.core.datasets.megatron_dataset import MegatronDataset

    for kind in (MegatronDataset, GPTDataset):
        assert [name.removeprefix("indexed_") for name in parameters(kind)] == [
            "dataset",
            "dataset_path",
            "indices",
            "num_samples",
            "index_split",
            "config",
        ]
    kept = inspect.getsource(MegatronDataset.__init__)
    for name in ("dataset", "dataset_path", "indices", "num_samples", "index_split", "config", "unique_description_hash"):
        assert f"self.{name} = " in kept


def test_megatron_core_blends_say_which_dataset_each_position_draws_from():
    from megatron.core.datasets.blended_dataset import BlendedDataset

    kept = inspect.getsource(BlendedDataset)
    for name in ("datasets", "dataset_index", "dataset_sample_index"):
        assert f"self.{name} = " in kept or f"self.{name}, " in kept
    for name in ("path_to_dataset_index", "path_to_dataset_sample_index"):
        assert name in kept  # read where defer_npy_index_mmap leaves the arrays out
    assert '"dataset_id": dataset_id' in kept and "**self.datasets[dataset_id][dataset_sample_id]" in kept


def test_megatron_core_optimizers_are_found_and_say_whether_they_stepped():
    from megatron.core.optimizer import optimizer as optimizers
    from megatron.core.transformer import TransformerConfig

    assert "grad_scale_func" in inspect.signature(TransformerConfig).parameters
    for name in ("FP32Optimizer", "MixedPrecisionOptimizer", "ChainedOptimizer"):
        kind = getattr(optimizers, name)
        assert parameters(kind.step) == []
        assert callable(kind.scale_loss) and parameters(kind.get_loss_scale) == []
        returned = [line.strip() for line in inspect.getsource(kind.step).splitlines() if line.strip().startswith("return ")]
        assert returned and all(line.count(",") == 2 for line in returned)  # (applied, gradient norm, zeros)


def test_megatron_core_places_ranks_by_these_functions():
    from megatron.core import parallel_state

    for name in (
        "model_parallel_is_initialized",
        "get_data_parallel_world_size",
        "get_data_parallel_rank",
        "get_virtual_pipeline_model_parallel_world_size",
        "get_tensor_model_parallel_group",
        "get_tensor_model_parallel_rank",
        "get_pipeline_model_parallel_world_size",
        "get_context_parallel_world_size",
        "get_expert_model_parallel_world_size",
    ):
        function = getattr(parallel_state, name)
        assert all(p.default is not inspect.Parameter.empty for p in inspect.signature(function).parameters.values()), name


def test_megatron_core_calculator_of_micro_batches_can_look_ahead():
    from megatron.core import num_microbatches_calculator as calculator

    assert hasattr(calculator, "_GLOBAL_NUM_MICROBATCHES_CALCULATOR")
    for kind in (calculator.ConstantNumMicroBatchesCalculator, calculator.RampupBatchsizeNumMicroBatchesCalculator):
        assert parameters(kind.update)[:2] == ["consumed_samples", "consistency_check"]
        assert parameters(kind.get) == []


def test_megatron_core_parallel_layers_have_what_the_sketches_read():
    from megatron.core.tensor_parallel import layers

    column, row = (inspect.getsource(kind.__init__) for kind in (layers.ColumnParallelLinear, layers.RowParallelLinear))
    for name in ("input_size", "output_size", "tp_group", "sequence_parallel"):
        assert f"self.{name} = " in column and f"self.{name} = " in row
    assert "self.output_size_per_partition = " in column and "self.gather_output = " in column
    assert "self.input_size_per_partition = " in row and "self.input_is_parallel = " in row
    for kind in (layers.ColumnParallelLinear, layers.RowParallelLinear):
        assert "self._forward_impl(" in inspect.getsource(kind.forward)


def test_megatron_core_schedules_are_called_by_keyword_and_looked_up_at_each_call():
    from megatron.core.pipeline_parallel import schedules

    chooses = inspect.getsource(schedules.get_forward_backward_func)
    assert chooses.count("forward_backward_func = ") == len(SCHEDULES)
    for name in SCHEDULES:
        assert f"forward_backward_func = {name}\n" in chooses
        taken = inspect.signature(getattr(schedules, name)).parameters
        assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in taken.values())
        assert {"forward_step_func", "data_iterator", "model", "num_microbatches", "forward_only"} <= taken.keys()


def test_megatron_core_schedules_do_nothing_but_passes_once_these_functions_are_unset():
    """A function that a later version calls besides must be set aside too, or a probe would change the job."""
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.transformer import TransformerConfig

    known = inspect.signature(TransformerConfig).parameters
    assert all(known[name].default is None for name in SIDE_EFFECTS)
    text = inspect.getsource(schedules)
    used = {name for name in known if name.endswith("_func") and f"config.{name}" in text}
    assert {*used, "timers"} == set(SIDE_EFFECTS)


def test_megatron_core_reruns_of_a_step_can_be_set_aside():
    from megatron.core import rerun_state_machine as reruns

    assert hasattr(reruns, "_GLOBAL_RERUN_STATE_MACHINE") and hasattr(reruns.RerunMode, "DISABLED")
    assert "self.mode" in inspect.getsource(reruns.RerunStateMachine)


@pytest.fixture(scope="module")
def facts(tmp_path_factory) -> dict[str, Any]:
    """What megatron_lm_facts.py finds in the checkout, in a process of its own."""
    out = tmp_path_factory.mktemp("facts") / "facts.json"
    paths = [str(ROOT), sysconfig.get_paths()["purelib"], *filter(None, [os.environ.get("PYTHONPATH")])]
    run_command(
        [sys.executable, "-m", "tests.contract.megatron_lm_facts", str(CHECKOUT), str(out)],
        timeout=180,
        env={"PYTHONPATH": os.pathsep.join(paths)},
    )
    found: dict[str, Any] = json.loads(Path(out).read_text())
    return found


@with_checkout
def test_megatron_lm_pretrain_takes_the_two_providers_first(facts):
    assert facts["pretrain"][:2] == ["train_valid_test_dataset_provider", "model_provider"]
    assert facts["signature through the wrapper"] == ["train_val_test_num_samples", "vp_stage"]


@with_checkout
def test_megatron_lm_arguments_have_the_names_that_are_read(facts):
    assert facts["missing arguments"] == []
    assert facts["unset in the loop"] == []
    assert facts["loader types"] == ["single", "cyclic", "external"]


@with_checkout
def test_megatron_lm_single_sampler_is_the_arithmetic_of_positions(facts):
    for case in facts["single"]:
        geometry = Geometry(case["ranks"], case["rank"], case["rows"], 2)
        first = case["consumed"] // geometry.micro
        for q, batch in enumerate(case["batches"], start=first):
            start = (q * geometry.ranks + geometry.rank) * geometry.rows
            assert batch == list(range(start, start + geometry.rows))


@with_checkout
def test_megatron_lm_cyclic_sampler_is_undone(facts):
    for case in facts["cyclic"]:
        geometry = Geometry(case["ranks"], case["rank"], case["rows"], 2)
        position = CyclicPositions(case["length"], geometry, case["sharded"], None)
        first = case["consumed"] // geometry.micro
        assert len(case["batches"]) > 3
        for q, batch in enumerate(case["batches"], start=first):
            start = (q * geometry.ranks + geometry.rank) * geometry.rows
            assert [position(index) for index in batch] == list(range(start, start + geometry.rows))


@with_checkout
def test_megatron_lm_conversations_of_sft_are_a_corpus(facts):
    assert facts["sft"]["length"] == 5 and facts["sft"]["asked for"] == 40
    assert facts["sft"]["texts"] == facts["sft"]["conversations"]
    assert facts["sft"]["digests"] == 1  # whatever the run's length
