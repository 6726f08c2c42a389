"""The decoder on families other than Llama: biases, normed queries and keys, grouped heads."""

import pytest
import torch
from torch.testing import assert_close
from transformers import Qwen2Config, Qwen2Model, Qwen3Config, Qwen3Model

from stage_rl.policies.base import DecoderWeights, LayerWeights
from stage_rl.rollout.attention import Backend
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


def layer_weights(layer) -> LayerWeights:
    attn, mlp = layer.self_attn, layer.mlp
    optional = {
        "bq": attn.q_proj.bias,
        "bk": attn.k_proj.bias,
        "bv": attn.v_proj.bias,
        "q_norm": getattr(getattr(attn, "q_norm", None), "weight", None),
        "k_norm": getattr(getattr(attn, "k_norm", None), "weight", None),
    }
    return LayerWeights(
        attention_norm=layer.input_layernorm.weight,
        wq=attn.q_proj.weight,
        wk=attn.k_proj.weight,
        wv=attn.v_proj.weight,
        wo=attn.o_proj.weight,
        mlp_norm=layer.post_attention_layernorm.weight,
        w_gate=mlp.gate_proj.weight,
        w_up=mlp.up_proj.weight,
        w_down=mlp.down_proj.weight,
        **optional,
    )


def decoder_weights(trunk, head_dim: int) -> DecoderWeights:
    cos, sin = trunk.rotary_emb(torch.empty(0), position_ids=torch.arange(64)[None])
    return DecoderWeights(
        layers=[layer_weights(layer) for layer in trunk.layers],
        final_norm=trunk.norm.weight,
        norm_eps=trunk.config.rms_norm_eps,
        num_heads=4,
        num_kv_heads=2,
        head_dim=head_dim,
        rotary_cos_SR=cos[0],
        rotary_sin_SR=sin[0],
        input_embeds=trunk.embed_tokens.weight,
        head=[(trunk.embed_tokens.weight, None)],
    )


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
    weights = decoder_weights(trunk, head_dim)
    assert getattr(weights.layers[0], has) is not None
    decoder = Decoder(weights, dtype="float32", backend=Backend())
    decoder.load(weights)
    inputs_1SD = torch.randn(1, 40, 32)
    theirs_1SD = trunk(inputs_embeds=inputs_1SD).last_hidden_state
    cache = decoder.new_cache(2, 40)
    coords_SA = torch.arange(40)[:, None]
    # One prompt of 36 slots, then 4 steps, in a group of 2 rows.
    state_1D = decoder.prefill(
        inputs_1SD[:, :36], torch.tensor([36]), coords_SA[:36], cache, group_size=2
    )
    assert_close(state_1D, theirs_1SD[:, 35], atol=1e-5, rtol=1e-5)
    for slot in range(36, 40):
        inputs_RD, positions_R = inputs_1SD[:, slot].repeat(2, 1), torch.tensor([slot, slot])
        states_RD = decoder.step(
            inputs_RD, positions_R, positions_R[:, None], cache, num_live=slot + 1
        )
        assert_close(states_RD, theirs_1SD[:, slot].repeat(2, 1), atol=1e-5, rtol=1e-5)
