"""The mismatch benchmark, on a model of a few thousand parameters."""

import pytest
import torch

from stage_rl.bench import mismatch
from stage_rl.rollout.engine import Engine
from stage_rl.rollout.sample import rollout
from stage_rl.rollout.sampling import Sampling
from stage_rl.types import Prompt


def test_engine_and_trainer_agree_in_fp32_but_not_to_the_last_bit_in_bf16(tiny_janus_folder):
    result = mismatch.run(model=str(tiny_janus_folder), num_prompts=2, group_size=2)
    for kind in ("logprobs", "guided_logprobs", "entropy"):
        assert result.measures[f"float32_{kind}_max"] <= 1e-3
        assert result.measures[f"mixed_{kind}_mean"] > 1e-5
    assert result.measures["float32_logprobs_max"] <= 1e-4
    # 3 bits of the mantissa in the cache, 8 in the linear layers.
    assert result.measures["fp8_logprobs_mean"] > result.measures["mixed_logprobs_mean"]
    assert len(result.table) == 1 + 3 * 3


def test_a_published_size_is_compared_in_bf16_alone(tiny_published):
    result = mismatch.run(model="janus-1b", num_prompts=1, group_size=2)
    assert {name.split("_")[0] for name in result.measures} == {"mixed", "fp8"}


@pytest.mark.parametrize(
    ("largest", "mean", "reached"), [(1e-4, 0.03, True), (1.1e-4, 0.0, False), (0.0, 0.031, False)]
)
def test_the_bar_is_the_largest_in_fp32_and_the_mean_in_the_mix(largest, mean, reached):
    measures = {"float32_logprobs_max": largest, "mixed_logprobs_mean": mean}
    assert mismatch._reached(measures) is reached


def test_an_engine_with_old_weights_is_found_out(tiny_janus):
    sampling = Sampling(guidance_scale=3.0)
    drawn = rollout(
        Engine(tiny_janus), [Prompt("a star")], group_size=2, sampling=sampling, seed=0, step=0
    )
    with torch.no_grad():
        for parameter in tiny_janus.module.model.generation_head.parameters():
            parameter.mul_(1.5)
    for gap in mismatch.differences(tiny_janus, drawn, sampling, mixed=False).values():
        assert gap.max() > 0.01
