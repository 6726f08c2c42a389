"""The decoder on families other than Llama: biases, normed queries and keys, grouped heads."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import Qwen2Config, Qwen2Model, Qwen3Config, Qwen3Model

from stage_rl.policies.trunk import trunk_weights
from stage_rl.rollout.attention import Backend, SharedPrompts
from stage_rl.rollout.decoder import Decoder

SIZE = {
    "vocab_size": 8,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@torch.no_grad()
@pytest.mark.parametrize(
    ("trunk", "head_dim", "has"),
    [
        (lambda: Qwen2Model(Qwen2Config(**SIZE)), 8, "bq"),
        (lambda: Qwen3Model(Qwen3Config(**SIZE, head_dim=16)), 16, "q_norm"),
    ],
)
def test_prefill_and_steps_agree_with_transformers(trunk, head_dim, has):
    torch.manual_seed(0)
    trunk = trunk().eval()
    for parameter in trunk.parameters():
        # Biases begin at 0 and norms at 1: a part that is left out would not show.
        parameter.add_(torch.randn_like(parameter) * 0.3)
    weights = trunk_weights(trunk, input_embeds=trunk.embed_tokens.weight, head=[nn.Linear(32, 8)])
    assert weights.head_dim == head_dim
    layers = list(weights.layers)
    assert getattr(layers[0], has) is not None
    weights = replace(weights, layers=layers)
    decoder = Decoder(weights, dtype="float32", backend=Backend())
    decoder.load(weights)
    inputs_1SD = torch.randn(1, 40, 32)
    theirs_1SD = trunk(inputs_embeds=inputs_1SD).last_hidden_state
    cache = decoder.new_cache(2, 40)
    coords_SA = torch.arange(40)[:, None]
    # One prompt of 36 positions, then 4 steps, in a group of 2 rows.
    state_1D = decoder.prefill(
        inputs_1SD[:, :36], torch.tensor([36]), coords_SA[:36], cache, group_size=2
    )
    assert_close(state_1D, theirs_1SD[:, 35], atol=1e-5, rtol=1e-5)
    prompts = SharedPrompts(torch.tensor([36, 36]), torch.tensor([0, 0]))
    for position in range(36, 40):
        inputs_RD, positions_R = (
            inputs_1SD[:, position].repeat(2, 1),
            torch.tensor([position, position]),
        )
        states_RD = decoder.step(
            inputs_RD,
            positions_R,
            positions_R[:, None],
            cache,
            prompts=prompts,
            num_live=position + 1,
        )
        assert_close(states_RD, theirs_1SD[:, position].repeat(2, 1), atol=1e-5, rtol=1e-5)
