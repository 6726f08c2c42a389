"""The attention of the training module on a CPU against torch's own in fp32."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from stage_rl.policies import trunk
from stage_rl.policies.trunk import (
    MAX_POSITIONS,
    InputNorm,
    causal_attention,
    padded_positions,
)
from stage_rl.types import Prompt

ROWS, HEADS, LENGTH, WIDTH = 3, 4, 40, 8
SCALE = WIDTH**-0.5


class Module(torch.nn.Module):
    """What transformers' attention asks of its layer."""

    is_causal = True
    num_key_value_groups = 1


def inputs(num_positions=LENGTH, *, key_heads=HEADS):
    generator = torch.Generator().manual_seed(0)

    def drawn(num_heads):
        # As projections leave them: positions outside heads.
        rows = torch.randn(ROWS, num_positions, num_heads, WIDTH, generator=generator)
        return rows.transpose(1, 2).requires_grad_()

    return drawn(HEADS), drawn(key_heads), drawn(key_heads)


def ours(*parts, mask=None, module=None):
    out, _ = causal_attention(module or Module(), *parts, mask, scaling=SCALE, dropout=0.0)
    return out


def exact(*parts):
    return scaled_dot_product_attention(*parts, is_causal=True, scale=SCALE).transpose(1, 2)


def distance(ours, theirs):
    return (ours.float() - theirs).norm() / theirs.norm()


def test_in_a_mix_output_and_gradients_are_within_what_bf16_rounds():
    parts = inputs()
    assert torch.equal(ours(*parts), exact(*parts))  # without autocast it is torch's own
    weights = torch.randn(ROWS, LENGTH, HEADS, WIDTH)
    theirs = exact(*parts)
    expected = torch.autograd.grad((theirs * weights).sum(), parts)
    with torch.autocast("cpu", torch.bfloat16):
        out = ours(*parts)
        with torch.no_grad():
            assert torch.equal(ours(*(part.detach() for part in parts)), out)
    grads = torch.autograd.grad((out * weights).sum(), parts)
    # A rounding to bf16 changes a number by at most 2^-8, 0.4 %.
    assert distance(out, theirs) < 0.01
    for grad, wanted in zip(grads, expected, strict=True):
        assert grad.dtype == torch.float32
        assert distance(grad, wanted) < 0.01


def test_a_query_may_ask_for_more_keys_than_its_own():
    query, key, value = (part.detach() for part in inputs())
    with torch.autocast("cpu", torch.bfloat16):
        last = ours(query[:, :, -1:], key, value)
        whole = ours(query, key, value)
    assert distance(last[:, 0], whole[:, -1].float()) < 0.01


@pytest.mark.parametrize("case", ["long", "mask", "grouped"])
def test_what_the_products_do_not_cover_goes_to_torchs_own(case, monkeypatch):
    monkeypatch.setattr(trunk, "_MixedCausal", None)
    module, mask = Module(), None
    parts = inputs(MAX_POSITIONS + 1 if case == "long" else LENGTH)
    theirs = exact(*parts)
    if case == "mask":
        mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()[None, None]
    if case == "grouped":
        module.num_key_value_groups = 2
        parts = inputs(key_heads=HEADS // 2)
        theirs = exact(parts[0], *(part.repeat_interleave(2, 1) for part in parts[1:]))
    with torch.autocast("cpu", torch.bfloat16):
        out = ours(*parts, mask=mask, module=module)
    assert distance(out, theirs) < 1e-5


def test_positions_that_pad_a_length_change_nothing(tiny_janus, monkeypatch):
    policy = tiny_janus
    prompts = [Prompt("a red circle"), Prompt("a red circle and a blue circle")]
    tokens_NT = torch.randint(policy.codebook_size, (2, policy.layout.num_tokens))
    plain = policy(prompts, tokens_NT)
    monkeypatch.setattr(
        trunk, "padded_positions", lambda number, **_: padded_positions(number, on_gpu=True)
    )
    for ours, theirs in zip(policy(prompts, tokens_NT), plain, strict=True):
        assert_close(ours, theirs, atol=1e-6, rtol=0)
    assert [padded_positions(n, on_gpu=True) for n in (1, 64, 65, 604)] == [64, 64, 128, 640]
    assert padded_positions(65, on_gpu=False) == 65


def test_the_norm_before_linear_layers_is_transformers_and_rounds_once_in_a_mix():
    theirs = LlamaRMSNorm(WIDTH, 1e-5)
    torch.nn.init.normal_(theirs.weight)
    norm = InputNorm(theirs.weight, 1e-5)
    states = (3 * torch.randn(ROWS, LENGTH, WIDTH)).requires_grad_()
    weights = torch.randn(ROWS, LENGTH, WIDTH).bfloat16()
    wanted = theirs(states)
    assert_close(norm(states), wanted, atol=1e-6, rtol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = norm(states)
    assert mixed.dtype == torch.bfloat16
    # At most one rounding to 8 bits away; almost always the same one.
    assert_close(mixed.float(), wanted, atol=0, rtol=2**-8)
    assert (mixed == wanted.bfloat16()).float().mean() > 0.99
    inputs = (states, theirs.weight)
    grads = torch.autograd.grad(mixed, inputs, weights)
    expected = torch.autograd.grad(wanted, inputs, weights.float())
    for grad, exact_grad in zip(grads, expected, strict=True):
        assert_close(grad, exact_grad, atol=1e-5, rtol=1e-4)
