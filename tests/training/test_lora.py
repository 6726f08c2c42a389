"""A run with an adapter: what its checkpoints hold, and that it resumes."""

import importlib.util

import pytest
import torch
from run_files import assert_resumes_to_the_bit, parameters_of

from stage_rl.api import load
from stage_rl.training.loop import train

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="needs the extra lora"
)


def test_checkpoints_hold_the_adapter_alone_and_a_resumed_run_is_exact(recipe, tmp_path):
    whole = assert_resumes_to_the_bit(recipe, tmp_path, "policy.lora.rank=2")
    saved = parameters_of(whole, 4)
    # 2 layers, 7 matrices, A and B of each; B has left 0.
    assert len(saved) == 28
    assert all(".lora_" in name for name in saved)
    assert all(tensor.any() for name, tensor in saved.items() if ".lora_B." in name)
    loaded = dict(load(str(whole), torch.device("cpu")).module.named_parameters())
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)


def test_an_adapter_on_a_bfloat16_base_trains_with_recomputed_layers(recipe):
    low = ("policy.lora.rank=2", "policy.dtype=bfloat16", "training.dtype=mixed")
    run = train(recipe(*low, "training.activation_checkpointing=full", "steps=2"))
    assert {tensor.dtype for tensor in parameters_of(run, 2).values()} == {torch.float32}
