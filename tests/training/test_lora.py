"""A run with an adapter: what its checkpoints hold, and that it resumes."""

import importlib.util

import pytest
import torch
from safetensors.torch import load_file

from stage_rl.api import load
from stage_rl.training.loop import train

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="needs the extra lora"
)


def adapter_of(run, step):
    return load_file(run / "checkpoints" / f"step_{step:06d}" / "policy.safetensors")


def test_checkpoints_hold_the_adapter_alone_and_a_resumed_run_is_exact(recipe, tmp_path):
    lora = ("policy.lora.rank=2", "optimizer.schedule=constant", "probe.every=1")
    whole = train(recipe(*lora, f"run.dir={tmp_path}/whole"))
    train(recipe(*lora, f"run.dir={tmp_path}/halves", "steps=2"))
    resumed = train(recipe(*lora, f"run.dir={tmp_path}/halves"))
    one, other = adapter_of(whole, 4), adapter_of(resumed, 4)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    # 2 layers, 7 matrices, A and B of each; B has left 0.
    assert len(one) == 28
    assert all(".lora_" in name for name in one)
    assert all(tensor.any() for name, tensor in one.items() if ".lora_B." in name)

    policy = load(str(whole), torch.device("cpu"))
    loaded = dict(policy.module.named_parameters())
    assert all(torch.equal(loaded[name], one[name]) for name in one)


def test_an_adapter_on_a_bfloat16_base_trains_with_recomputed_layers(recipe):
    run = train(
        recipe(
            "policy.lora.rank=2",
            "policy.dtype=bfloat16",
            "training.dtype=mixed",
            "training.activation_checkpointing=full",
            "steps=2",
        )
    )
    assert {tensor.dtype for tensor in adapter_of(run, 2).values()} == {torch.float32}
