"""What every policy must keep; a new adapter's test calls `check` with a policy and two prompts.

Shape suffixes: P prompts, N completions, T image tokens, U columns with control tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from stage_rl.errors import InputError
from stage_rl.policies.base import Policy
from stage_rl.policies.logprobs import Scoring
from stage_rl.rollout.engine import Engine, Generated
from stage_rl.rollout.sampling import Sampling, image_uniforms
from stage_rl.types import Prompt

GUIDANCE = 3.0


def check(policy: Policy, short: Prompt, long: Prompt) -> None:
    """All of the contract; the two prompts differ in length."""
    decode_agrees_with_teacher_forcing(policy, [short, long])
    a_batch_gives_what_each_prompt_gives_alone(policy, [short, long])
    the_unconditional_row_ignores_the_prompt(policy, short)
    tokens_have_codes_and_images(policy, short)
    the_engine_gets_the_embeddings_of_all_tokens(policy)
    a_control_token_changes_what_follows_it(policy, short)
    prompts_are_checked_as_they_are_encoded(policy, short)


@torch.no_grad()
def is_guided(policy: Policy) -> bool:
    assert policy.guided == (policy.encode([Prompt("a")]).uncond is not None)
    return policy.guided


def draw(policy: Policy, prompts: Sequence[Prompt], *, temperature: float = 1.0) -> Generated:
    """One image per prompt, with guidance where the family has it."""
    uniforms_NT = image_uniforms(
        seed=0,
        step=0,
        prompt_indices=[prompt.index for prompt in prompts],
        group_size=1,
        num_tokens=policy.layout.num_tokens,
    )
    scale = GUIDANCE if is_guided(policy) else 1.0
    sampling = Sampling(guidance_scale=scale, temperature=temperature)
    with torch.no_grad():
        prefix = policy.encode(prompts)
    return Engine(policy).generate(prefix, group_size=1, sampling=sampling, uniforms_NT=uniforms_NT)


@torch.no_grad()
def teacher_forced_logits(policy: Policy, prompts: Sequence[Prompt], tokens_NT: torch.Tensor):
    """Conditional and unconditional logits, NTV; without guidance the former twice."""
    prefix = policy.encode(prompts)
    rows = (prefix, prefix.uncond or prefix)
    states = [policy.hidden(row, tokens_NT) for row in rows]
    assert all(state.shape[:2] == tokens_NT.shape for state in states)
    return tuple(policy.head(state) for state in states)


def decode_agrees_with_teacher_forcing(policy: Policy, prompts: Sequence[Prompt]) -> None:
    drawn = draw(policy, prompts)
    assert drawn.tokens_NT.shape == (len(prompts), policy.layout.num_tokens)
    assert drawn.tokens_NT.max() < policy.codebook_size
    cond_NTV, uncond_NTV = teacher_forced_logits(policy, prompts, drawn.tokens_NT)
    logprobs_NTV = cond_NTV.log_softmax(-1)
    entropy_NT = -(logprobs_NTV.exp() * logprobs_NTV).sum(-1)
    guided_NTV = (uncond_NTV + GUIDANCE * (cond_NTV - uncond_NTV)).log_softmax(-1)
    index = drawn.tokens_NT[..., None]
    near = {"atol": 1e-4, "rtol": 0}
    assert_close(drawn.logprobs_NT, logprobs_NTV.gather(-1, index)[..., 0], **near)
    assert_close(drawn.guided_logprobs_NT, guided_NTV.gather(-1, index)[..., 0], **near)
    assert_close(drawn.entropy_NT, entropy_NT, **near)
    with torch.no_grad():
        scored = policy(prompts, drawn.tokens_NT)
    for found, expected in zip(scored, (drawn.logprobs_NT, drawn.entropy_NT), strict=True):
        assert_close(found, expected, **near)
    if is_guided(policy):
        with torch.no_grad():
            scored = policy(prompts, drawn.tokens_NT, scoring=Scoring("guided", GUIDANCE))
        assert_close(scored[0], drawn.guided_logprobs_NT, **near)


def a_batch_gives_what_each_prompt_gives_alone(policy: Policy, prompts: Sequence[Prompt]) -> None:
    for temperature in (0.0, 1.0):
        together = draw(policy, prompts, temperature=temperature).tokens_NT
        alone = [draw(policy, [p], temperature=temperature).tokens_NT for p in prompts]
        assert torch.equal(together, torch.cat(alone))
    logits_of_all = teacher_forced_logits(policy, prompts, together)
    for row, prompt in enumerate(prompts):
        logits_alone = teacher_forced_logits(policy, [prompt], together[row : row + 1])
        for batch_NTV, alone_1TV in zip(logits_of_all, logits_alone, strict=True):
            assert_close(batch_NTV[row], alone_1TV[0], atol=1e-5, rtol=0)


def the_unconditional_row_ignores_the_prompt(policy: Policy, prompt: Prompt) -> None:
    first, *rest = prompt.text.split()
    turned = Prompt(" ".join([*rest, first]), prompt.index)
    with torch.no_grad():
        prefix = policy.encode([prompt, turned])
    assert prefix.lengths_P[0] == prefix.lengths_P[1]
    assert not torch.equal(prefix.embeds_PLD[0], prefix.embeds_PLD[1])
    if not is_guided(policy):
        with pytest.raises(InputError, match="no unconditional rows; write 1"):
            prefix.unconditional()
        return
    uncond = prefix.unconditional()
    assert torch.equal(uncond.embeds_PLD[0], uncond.embeds_PLD[1])


def tokens_have_codes_and_images(policy: Policy, prompt: Prompt) -> None:
    num_tokens = policy.layout.num_tokens
    tokens_NT = torch.arange(2 * num_tokens, device=policy.device) % policy.codebook_size
    tokens_NT = tokens_NT.view(2, num_tokens)
    codes_NTC = policy.codes(tokens_NT)
    assert codes_NTC.shape[:2] == (2, num_tokens)
    assert codes_NTC.dtype == torch.float32
    images_NHWC = policy.images([prompt] * 2, tokens_NT)
    assert images_NHWC.shape[::3] == (2, 3)
    assert images_NHWC.dtype == torch.uint8
    assert images_NHWC.device.type == "cpu"


@torch.no_grad()
def the_engine_gets_the_embeddings_of_all_tokens(policy: Policy) -> None:
    embeds = policy.decoder_weights().input_embeds
    assert len(embeds) >= policy.codebook_size
    assert_close(embeds, policy.embed(torch.arange(len(embeds), device=policy.device)))


@torch.no_grad()
def a_control_token_changes_what_follows_it(policy: Policy, prompt: Prompt) -> None:
    """The states of the tokens behind each fixed column read it, those before it do not."""
    layout, prefix = policy.layout, policy.encode([prompt])
    if layout.fixed_U is None:
        return
    tokens_NT = torch.arange(layout.num_tokens, device=policy.device)[None] % policy.codebook_size
    before_NTD = policy.hidden(prefix, tokens_NT)
    for column in (layout.fixed_U >= 0).nonzero().flatten().tolist():
        other_U = layout.fixed_U.clone()
        other_U[column] = 0  # the input of an image token in its place
        try:
            policy.layout = replace(layout, fixed_U=other_U)
            after_NTD = policy.hidden(prefix, tokens_NT)
        finally:
            policy.layout = layout
        behind_T = layout.token_columns() > column
        assert torch.equal(after_NTD[:, ~behind_T], before_NTD[:, ~behind_T])
        moved_T = (after_NTD - before_NTD).abs().amax((0, 2)).cpu()
        assert (moved_T[behind_T] > 1e-4).all()


def prompts_are_checked_as_they_are_encoded(policy: Policy, prompt: Prompt) -> None:
    policy.check([prompt])
    for read in (policy.check, policy.encode):
        with pytest.raises(InputError, match="is empty"):
            read([prompt, Prompt(" ", 7)])
