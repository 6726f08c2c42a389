"""`stage bench step`: a training step of the trainer against one built on transformers alone.

Shape suffixes: P prompts, G group, N = P x G completions, L positions of a prompt, S of prompt and
image together, T image tokens, C codebook channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import count

import torch
from pydantic import PositiveInt
from torch import Tensor

from stage_rl import algorithm
from stage_rl.algorithm_config import AlgorithmConfig
from stage_rl.bench.base import (
    BenchResult,
    Group,
    Guidance,
    copy_bytes_per_s,
    flat,
    matmul_flops_per_s,
    medians_in_turn,
    on_h200,
    table,
)
from stage_rl.bench.logprobs import naive_logprobs
from stage_rl.bench.models import SIZES, recipe_of
from stage_rl.bench.reweight import pair_loop_similarity
from stage_rl.bench.rollout import generate, padded_ids, with_plain_layers
from stage_rl.errors import InputError
from stage_rl.policies.base import Policy
from stage_rl.recipe import Recipe
from stage_rl.rewards.judge import RewardFunctions
from stage_rl.training.loop import train_step
from stage_rl.training.metrics import DecoderSize, RolloutStats, Timer, rates
from stage_rl.training.optim import apply_gradient, build_optimizer
from stage_rl.training.trainer import Trainer, build_trainer
from stage_rl.types import Measured, Prompt, Rollout

BAR = (
    ">= 3x the eager step (CPU, mixed, 64 images of 144 tokens); one H200: janus-7b, 64 images "
    "<= 10.5 s"
)
MIN_SPEEDUP = 3.0
MAX_SECONDS_7B = 10.5
IMAGES, TOKENS = 64, 144
"""Images of a step and tokens of an image that the bar of a CPU is set for."""

PHASES = {
    "sample": "time/sample_s",
    "judge": "time/judge_wait_s",
    "reference": "time/reference_s",
    "learn": "time/learn_s",
    "step": "time/step_s",
}
"""Rows of the table and the trainer's names of their durations."""
NOTES = (
    "judge: the trainer judges while it measures; the row is the wait that is left",
    "ideal: the bytes of the rollout as a copy moves them, the passes as one matmul computes",
)

Form = Callable[[], Mapping[str, float]]
"""Takes the next step; seconds by the trainer's names."""


def run(
    *,
    model: str = "shapes",
    num_prompts: PositiveInt = 8,
    group_size: Group = 8,
    guidance_scale: Guidance = 3.0,
    rounds: PositiveInt = 5,
    overrides: str = "",
) -> BenchResult:
    """Trains two copies of a model in turn: by the trainer, and by a step on transformers alone.

    Both take the recipe shapes_geneval with these settings, the same prompts and the same reward.
    `model` is a folder, a hub id, `shapes`, or `janus-1b` and `janus-7b` with random weights: then
    the trainer runs alone, with a reward that takes no time. `overrides` are further settings,
    key=value, with spaces between; the recipe's own precision is bf16 linear layers (a processor
    without bf16 arithmetic is slow at it), else rollout.dtype=float32 training.dtype=float32.
    """
    settings = [f"rollout.guidance_scale={guidance_scale}", *overrides.split()]
    recipe = recipe_of(model, settings, num_prompts=num_prompts, group_size=group_size)
    trainer = build_trainer(recipe, recipe.prompts.build())
    forms = {"trainer": trainer_form(trainer)}
    if model not in SIZES:
        forms["eager"] = eager_form(trainer)
    times = medians_in_turn(forms, rounds)
    ideal = ideal_ms(trainer)
    rows = {
        phase: {
            **{f"{form}_ms": times[form][key] * 1e3 for form in forms},
            "ideal_ms": ideal[phase],
        }
        for phase, key in PHASES.items()
    }
    step, num_images = rows["step"], num_prompts * group_size
    if model in SIZES:
        judged = model == "janus-7b" and num_images == IMAGES and on_h200()
        reached = step["trainer_ms"] <= MAX_SECONDS_7B * 1e3
        headline = f"{step['trainer_ms'] / 1e3:.1f} s, {step['ideal_ms'] / 1e3:.1f} s ideal"
    else:
        for figures in rows.values():
            figures["speedup"] = figures["eager_ms"] / figures["trainer_ms"]
        num_tokens = trainer.policy.layout.num_tokens
        on_cpu, mixed = trainer.policy.device.type == "cpu", recipe.training.dtype == "mixed"
        judged = on_cpu and mixed and (num_images, num_tokens) == (IMAGES, TOKENS)
        reached = step["speedup"] >= MIN_SPEEDUP
        headline = f"{step['speedup']:.1f}x the eager step, "
        headline += f"{step['trainer_ms']:.0f} against {step['eager_ms']:.0f} ms"
    shown = dict.fromkeys(step, ".1f")
    lines = (*table(rows, shown), *NOTES)
    return BenchResult(headline, reached if judged else None, flat(rows), lines)


def trainer_form(trainer: Trainer) -> Form:
    """The trainer's steps, one a call."""
    numbers = count()
    return lambda: train_step(trainer, next(numbers)).timer.times()


def eager_form(trainer: Trainer) -> Form:
    """The eager steps of a trainer's recipe, prompts and rewards, one a call."""
    eager = EagerStep(trainer.recipe, trainer.rewards, trainer.policy.device)
    numbers = count()
    return lambda: eager.step(trainer.prompts_of(next(numbers)))


def ideal_ms(trainer: Trainer) -> dict[str, float]:
    """Milliseconds of each phase of the last step at the speed of a copy and of one large matmul.

    Bytes and operations by the formulas of the metrics.
    """
    settings = trainer.recipe.rollout
    # What the phases did in all is what they would do a second if each took one.
    work = rates(
        DecoderSize.of(trainer.engine.decoder),
        RolloutStats.of(trainer.engine.passes),
        dict.fromkeys(PHASES.values(), 1.0),
        num_images=settings.prompts_per_step * settings.group_size,
        scoring=trainer.precision.scoring,
        num_updates=trainer.recipe.optimizer.updates_per_rollout,
    )
    mixed = trainer.recipe.training.dtype == "mixed"
    device, dtype = trainer.policy.device, torch.bfloat16 if mixed else torch.float32
    flops_per_s = matmul_flops_per_s(device, dtype)
    seconds = {
        "sample": work["throughput/sample_gb_per_s"] * 1e9 / copy_bytes_per_s(device),
        "judge": 0.0,
        "reference": work["throughput/reference_tflop_per_s"] * 1e12 / flops_per_s,
        "learn": work["throughput/learn_tflop_per_s"] * 1e12 / flops_per_s,
    }
    seconds["step"] = sum(seconds.values())
    return {phase: value * 1e3 for phase, value in seconds.items()}


class EagerStep:
    """A training step as one writes it on transformers alone.

    It samples with `generate`, runs policy and reference over left-padded prompts with an attention
    mask, takes the log-softmax of all logits by plain autograd, and compares completions pair by
    pair. It computes the same loss as the trainer. Policy, reference and optimizer are its own.
    """

    def __init__(self, recipe: Recipe, judge: RewardFunctions, device: torch.device):
        if recipe.algorithm != AlgorithmConfig(beta=recipe.algorithm.beta):
            text = "overrides: the eager form has the default objective; leave algorithm.* out but"
            raise InputError(f"{text} for beta, or name a model of random weights")
        self.recipe, self.judge = recipe, judge
        self.policy = with_plain_layers(recipe.policy.build(device))
        self.reference = with_plain_layers(self.policy.reference())
        trained = [p for p in self.policy.module.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(trained, recipe.optimizer)

    def step(self, prompts: Sequence[Prompt]) -> dict[str, float]:
        """Samples, judges, measures and learns; seconds by phase, as the trainer names them."""
        settings, timer = self.recipe.optimizer, Timer()
        rollout = self.sample(prompts)
        timer.record("sample_s")
        rewards_PG = self.judge.score(rollout).rewards_PG.to(self.policy.device)
        timer.record("judge_wait_s")
        with torch.no_grad():
            reference = self.measure(self.reference, rollout)
        timer.record("reference_s")
        self.loss(rollout, rewards_PG, reference).backward()
        apply_gradient(self.optimizer, rate=settings.lr, max_grad_norm=settings.max_grad_norm)
        timer.record("learn_s")
        return timer.times()

    def sample(self, prompts: Sequence[Prompt]) -> Rollout:
        """A group of images for each prompt, by `generate` on one left-padded batch."""
        settings = self.recipe.rollout
        images = [prompt for prompt in prompts for _ in range(settings.group_size)]
        tokens_NT = generate(self.policy, images, guidance_scale=self.recipe.guidance_scale)
        with torch.no_grad():
            pixels_NHWC = self.policy.module.decode_image_tokens(tokens_NT).float()
        images_NHWC = pixels_NHWC.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).cpu()
        return Rollout(tuple(prompts), settings.group_size, tokens_NT, images_NHWC)

    def measure(self, policy: Policy, rollout: Rollout) -> Measured:
        """Log-probability and entropy of every token from the logits of all, NT."""
        module = policy.module
        images = [prompt for prompt in rollout.prompts for _ in range(rollout.group_size)]
        ids_NL, mask_NL = padded_ids(policy, images)
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
        """The loss of a judged rollout, with gradient: equations 2 to 12, preset `default`."""
        settings, shape = self.recipe.algorithm, (*rewards_PG.shape, -1)
        now = self.measure(self.policy, rollout)
        logprobs_PGT, ref_PGT = (x.logprobs_NT.view(shape) for x in (now, reference))
        entropies = (x.entropy_NT.view(shape).mean(-1) for x in (now, reference))
        advantages_PG = algorithm.group_advantages(
            algorithm.add_entropy_bonus(
                rewards_PG, algorithm.entropy_bonus(*entropies), settings.entropy.scale
            ),
            settings.advantage_eps,
            settings.advantage_std_floor,
        )
        codes_PGTC = self.policy.codes(rollout.tokens_NT).unflatten(0, rewards_PG.shape)
        sim_PGT = pair_loop_similarity(codes_PGTC, advantages_PG)
        mask_PGT = algorithm.normalize_mask(algorithm.advantage_mask(sim_PGT))
        kl = settings.kl
        return algorithm.grpo_loss(
            algorithm.importance_ratio(logprobs_PGT, logprobs_PGT.detach()),
            algorithm.reweight_advantages(advantages_PG, mask_PGT),
            algorithm.token_kl(logprobs_PGT, ref_PGT),
            clip=settings.clip,
            beta=settings.beta
            * algorithm.kl_weight(sim_PGT, kl.a, kl.b, weight_clip=kl.weight_clip),
        ).total
