"""A training step as one writes it on transformers alone: what `stage bench step` compares with.

It samples with `generate`, runs policy and reference over left-padded prompts with an attention
mask, takes the log-softmax of all logits by plain autograd, and compares completions pair by pair.
It computes the same loss as the trainer.

Shape suffixes: P prompts, G group, N = P x G completions, L prompt slots, S slots of prompt and
image together, T image tokens, C codebook channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stage_rl.bench.logprobs import naive_logprobs
from stage_rl.bench.reweight import pair_loop_similarity
from stage_rl.bench.rollout import generate
from stage_rl.objective import AlgorithmConfig
from stage_rl.policies.base import Policy
from stage_rl.policies.janus import JanusPolicy
from stage_rl.rewards.judging import Judge
from stage_rl.schema import Recipe
from stage_rl.training.clock import Clock
from stage_rl.training.optim import apply_gradient, build_optimizer
from stage_rl.types import Measured, Prompt, Rollout


class EagerStep:
    """A policy, its reference and an optimizer, each its own, and the step that trains them."""

    def __init__(self, recipe: Recipe, judge: Judge, device: torch.device):
        settings = recipe.algorithm
        assert settings == AlgorithmConfig(beta=settings.beta), "eager_loss is the default preset"
        self.recipe, self.judge = recipe, judge
        self.policy = plain(recipe.policy.build(device))
        self.reference = plain(self.policy.reference())
        trained = [p for p in self.policy.module.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(trained, recipe.optimizer)

    def step(self, prompts: Sequence[Prompt]) -> dict[str, float]:
        """Samples, judges, measures and learns; seconds by phase, as the trainer names them."""
        settings, clock = self.recipe.optimizer, Clock()
        rollout = self.sample(prompts)
        clock.lap("sample_s")
        rewards_PG = self.judge.judge(rollout).rewards_PG.to(self.policy.device)
        clock.lap("judge_wait_s")
        with torch.no_grad():
            reference = self.measure(self.reference, rollout)
        clock.lap("reference_s")
        self.loss(rollout, rewards_PG, reference).backward()
        apply_gradient(self.optimizer, rate=settings.lr, max_grad_norm=settings.max_grad_norm)
        clock.lap("learn_s")
        return clock.times()

    def sample(self, prompts: Sequence[Prompt]) -> Rollout:
        """A group of images for each prompt, by `generate` on one left-padded batch."""
        settings = self.recipe.rollout
        ids_NL, mask_NL = padded_ids(self.policy, prompts, settings.group_size)
        tokens_NT = generate(
            self.policy, ids_NL, mask_NL=mask_NL, guidance_scale=settings.guidance_scale
        )
        module: Any = self.policy.module
        with torch.no_grad():
            pixels_NHWC = module.decode_image_tokens(tokens_NT).float()
        images_NHWC = pixels_NHWC.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).cpu()
        return Rollout(tuple(prompts), settings.group_size, tokens_NT, images_NHWC)

    def measure(self, policy: JanusPolicy, rollout: Rollout) -> Measured:
        """Log-probability and entropy of every token from the logits of all, NT."""
        module: Any = policy.module
        ids_NL, mask_NL = padded_ids(policy, rollout.prompts, rollout.group_size)
        mixed = self.recipe.training.dtype == "mixed"
        with torch.autocast(policy.device.type, torch.bfloat16, enabled=mixed):
            prompt_NLD = module.get_input_embeddings()(ids_NL)
            # The last token predicts none.
            image_NTD = module.prepare_embeddings_for_image_generation(rollout.tokens_NT[:, :-1])
            mask_NS = torch.cat([mask_NL, mask_NL.new_ones(image_NTD.shape[:2])], 1)
            states_NSD = module.model.language_model(
                inputs_embeds=torch.cat([prompt_NLD, image_NTD], 1),
                attention_mask=mask_NS,
                position_ids=(mask_NS.cumsum(1) - 1).clamp_min(0),
                use_cache=False,
            ).last_hidden_state
        # The image head in fp32, as in the trainer's mix.
        states_NTD = states_NSD[:, ids_NL.shape[1] - 1 :].float()
        logprobs_N, entropy_N = naive_logprobs(
            module.model.generation_head,
            states_NTD.flatten(0, 1),
            rollout.tokens_NT.flatten(),
            entropy_grad=False,
        )
        shape = rollout.tokens_NT.shape
        return Measured(logprobs_N.view(shape), entropy_N.view(shape))

    def loss(self, rollout: Rollout, rewards_PG: Tensor, reference: Measured) -> Tensor:
        """The loss of a judged rollout, with gradient."""
        now = self.measure(self.policy, rollout)
        codes_NTC = self.policy.codebook.vectors(rollout.tokens_NT)
        return eager_loss(
            now,
            reference,
            rewards_PG,
            codes_PGTC=codes_NTC.unflatten(0, rewards_PG.shape),
            settings=self.recipe.algorithm,
        )


def plain(policy: Policy) -> JanusPolicy:
    """The policy with transformers' own attention in place of ours."""
    assert isinstance(policy, JanusPolicy), type(policy)
    policy.module.set_attn_implementation("sdpa")
    return policy


def padded_ids(
    policy: JanusPolicy, prompts: Sequence[Prompt], group_size: int
) -> tuple[Tensor, Tensor]:
    """Ids and attention mask of the prompts, left-padded, each once for every completion, NL."""
    rows = [policy.prompt_ids(prompt) for prompt in prompts]
    longest = max(len(row) for row in rows)
    # What stands in a masked slot plays no part; 0 is an id of every vocabulary.
    ids_PL = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask_PL = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    ids_NL, mask_NL = (x.repeat_interleave(group_size, 0) for x in (ids_PL, mask_PL))
    return ids_NL.to(policy.device), mask_NL.to(policy.device)


def eager_loss(
    now: Measured,
    reference: Measured,
    rewards_PG: Tensor,
    *,
    codes_PGTC: Tensor,
    settings: AlgorithmConfig,
) -> Tensor:
    """Equations 2 to 12 of the preset `default`, written out; a scalar with gradient."""
    shape = codes_PGTC.shape[:3]
    logprobs_PGT = now.logprobs_NT.view(shape)
    old_PGT = logprobs_PGT.detach()
    entropy_PG, ref_entropy_PG = (x.entropy_NT.view(shape).mean(-1) for x in (now, reference))
    best_PG = rewards_PG == rewards_PG.amax(1, keepdim=True)
    bonus_PG = settings.entropy.scale / (1 + (ref_entropy_PG - entropy_PG) ** 2)
    rewards_PG = rewards_PG + best_PG * bonus_PG
    std_P1 = rewards_PG.std(1, keepdim=True).clamp_min(settings.advantage_std_floor)
    centred_PG = rewards_PG - rewards_PG.mean(1, keepdim=True)
    advantages_PG = centred_PG / (std_P1 + settings.advantage_eps)
    sim_PGT = pair_loop_similarity(codes_PGTC, advantages_PG)
    mask_PGT = (1 - sim_PGT) / 2
    advantages_PGT = advantages_PG[:, :, None] * mask_PGT / mask_PGT.mean((1, 2), keepdim=True)
    kl = settings.kl
    beta_PGT = settings.beta * (kl.a + kl.b * (sim_PGT + 1).clamp(*kl.weight_clip))
    ratio_PGT = torch.exp(logprobs_PGT - old_PGT)
    clipped_PGT = ratio_PGT.clamp(1 - settings.clip, 1 + settings.clip)
    gain_PGT = torch.minimum(ratio_PGT * advantages_PGT, clipped_PGT * advantages_PGT)
    difference_PGT = reference.logprobs_NT.view(shape) - logprobs_PGT
    kl_PGT = torch.exp(difference_PGT) - difference_PGT - 1
    return (beta_PGT * kl_PGT - gain_PGT).mean()
