"""`stage bench step`: a training step of the trainer against one built on transformers alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stage_rl.bench.base import (
    PASSES_OF_A_STEP,
    BenchResult,
    Setting,
    Work,
    at_least,
    check_guided,
    copy_bytes_per_s,
    matmul_flops_per_s,
)
from stage_rl.bench.logprobs import naive_logprobs
from stage_rl.bench.models import RANDOM_JANUS, RANDOM_REWARD, SIZES
from stage_rl.bench.reweight import pair_loop_similarity
from stage_rl.bench.rollout import generate
from stage_rl.config import load_recipe
from stage_rl.policies.base import Policy
from stage_rl.policies.janus import JanusPolicy
from stage_rl.prompts.files import prompts_of_step
from stage_rl.recipe import AlgorithmConfig, Recipe
from stage_rl.rewards.judge import RewardFunctions
from stage_rl.training.loop import train_step
from stage_rl.training.metrics import Timer
from stage_rl.training.optim import apply_gradient, build_optimizer
from stage_rl.training.trainer import Trainer, build_trainer
from stage_rl.types import Measured, Prompt, Rollout

Step = Callable[[int], Mapping[str, float]]
"""Runs the step of a number; seconds by the trainer's names."""

BAR = (
    ">= 2x the eager step (CPU, mixed, 64 images of 144 tokens); one H200: janus-7b, 64 images "
    "<= 10.5 s"
)

LEAST_SPEEDUP = 2.0

MOST_SECONDS_7B = 10.5

IMAGES = 64

TOKENS = 144
"""Images of a step and tokens of an image that the bar of a CPU is set for."""

RECIPE = "shapes_geneval"

PHASES = {
    "sample": "time/sample_s",
    "judge": "time/judge_wait_s",
    "reference": "time/reference_s",
    "learn": "time/learn_s",
    "step": "time/step_s",
}
"""Rows of the table and the trainer's names of their durations."""

NOTE = "judge: the trainer judges while it measures; the row is the wait that is left"

IDEAL = "ideal: the bytes of the rollout as a copy moves them, the passes as one product computes"


def run(
    *,
    model: str = "shapes",
    num_prompts: int = 8,
    group_size: int = 8,
    guidance_scale: float = 3.0,
    dtype: str = "mixed",
    rounds: int = 3,
    seed: int = 0,
    overrides: str = "",
) -> BenchResult:
    """Trains two copies of a model in turn: by the trainer, and by a step on transformers alone.

    Both take the recipe shapes_geneval with these settings, the same prompts and the same reward.
    `model` is a folder, a hub id, `shapes`, or `janus-1b` and `janus-7b` with random weights: then
    the trainer runs alone, with a reward that takes no time. `dtype` is `mixed` (bf16 linear layers
    in sampler and trunk, on any processor: one without bf16 arithmetic is slow at it) or `float32`.
    `overrides` are further settings, key=value, with spaces between.
    """
    settings: dict[str, Setting] = dict(locals())
    at_least(1, num_prompts=num_prompts, rounds=rounds)
    at_least(2, group_size=group_size)
    at_least(0, seed=seed)
    check_guided(guidance_scale)
    recipe = recipe_of(
        model,
        [
            f"rollout.prompts_per_step={num_prompts}",
            f"rollout.group_size={group_size}",
            f"rollout.guidance_scale={guidance_scale}",
            f"rollout.dtype={dtype}",
            f"training.dtype={dtype}",
            f"seed={seed}",
            *overrides.split(),
        ],
    )
    if model in SIZES:
        return alone(recipe, rounds=rounds, settings=settings)
    return compare(recipe, rounds=rounds, settings=settings)


def recipe_of(model: str, overrides: Sequence[str], *, random: bool | None = None) -> Recipe:
    """The recipe of a benchmark, whose steps are alike: no picture, no probe, one learning rate.

    `random`: weights of a size are drawn and the reward takes no time (None: for a published size).
    """
    parts = [f"policy.path={model}"]
    if model in SIZES if random is None else random:
        parts += [f"policy.kind={RANDOM_JANUS}", f"rewards=[{{kind: '{RANDOM_REWARD}'}}]"]
        parts += ["training.groups_per_microbatch=null", "training.logprob_rows=2048"]
    shown = ["run.log_images_every=0", "probe.every=0", "probe.mismatch_images=0"]
    return load_recipe(RECIPE, [*parts, *shown, "optimizer.schedule=constant", *overrides])


def compare(recipe: Recipe, *, rounds: int, settings: Mapping[str, Setting]) -> BenchResult:
    """The benchmark for a recipe with a Janus policy and the objective's default preset."""
    prompts = recipe.prompts.build()
    trainer = build_trainer(recipe, prompts)
    eager = EagerStep(recipe, trainer.rewards, trainer.policy.device)
    forms: dict[str, Step] = {
        "trainer": trainer_form(trainer),
        "eager": lambda step: eager.step(_prompts_of(recipe, prompts, step)),
    }
    measures = _measures(_medians(forms, rounds)) | ideal_ms(trainer)
    num_images = recipe.rollout.prompts_per_step * recipe.rollout.group_size
    num_tokens = trainer.policy.layout.num_tokens
    on_cpu, mixed = trainer.policy.device.type == "cpu", recipe.training.dtype == "mixed"
    judged = on_cpu and mixed and (num_images, num_tokens) == (IMAGES, TOKENS)
    return BenchResult(
        name="step",
        headline=f"{measures['speedup_step']:.1f}x the eager step, "
        f"{measures['trainer_step_ms']:.0f} against {measures['eager_step_ms']:.0f} ms",
        bar=BAR,
        reached=measures["speedup_step"] >= LEAST_SPEEDUP if judged else None,
        settings=settings,
        measures=measures,
        table=_table(measures),
    )


def alone(recipe: Recipe, *, rounds: int, settings: Mapping[str, Setting]) -> BenchResult:
    """The trainer's step beside its ideal, for models of which a machine holds one at a time."""
    trainer = build_trainer(recipe, recipe.prompts.build())
    measures = _measures(_medians({"trainer": trainer_form(trainer)}, rounds)) | ideal_ms(trainer)
    seconds = measures["trainer_step_ms"] / 1e3
    num_images = recipe.rollout.prompts_per_step * recipe.rollout.group_size
    on_h200 = torch.cuda.is_available() and "H200" in torch.cuda.get_device_name()
    judged = settings["model"] == "janus-7b" and num_images == IMAGES and on_h200
    return BenchResult(
        name="step",
        headline=f"{seconds:.1f} s, {measures['ideal_step_ms'] / 1e3:.1f} s ideal",
        bar=BAR,
        reached=seconds <= MOST_SECONDS_7B if judged else None,
        settings=settings,
        measures=measures,
        table=_table(measures),
    )


def trainer_form(trainer: Trainer) -> Step:
    """The trainer's step of a number; seconds by phase."""
    return lambda step: train_step(trainer, step).timer.times()


def ideal_ms(trainer: Trainer) -> dict[str, float]:
    """Milliseconds of each phase at the speed of a copy and of one large product, by formula."""
    recipe, policy, decoder = trainer.recipe, trainer.policy, trainer.engine.decoder
    prompts = trainer.prompts_of(0)
    work = Work(
        recipe.rollout.prompts_per_step * recipe.rollout.group_size,
        policy.encode(prompts).embeds_PLD.shape[1],
        policy.layout.num_tokens,
        recipe.rollout.guidance_scale != 1,
    )
    mixed = recipe.training.dtype == "mixed"
    dtype = torch.bfloat16 if mixed else torch.float32
    sample = work.rollout_bytes(decoder) / copy_bytes_per_s(policy.device)
    one_pass = work.pass_flops(decoder) / matmul_flops_per_s(policy.device, dtype)
    seconds = {
        "sample": sample,
        "judge": 0.0,
        "reference": one_pass,
        "learn": (PASSES_OF_A_STEP - 1) * one_pass,
        "step": sample + PASSES_OF_A_STEP * one_pass,
    }
    return {f"ideal_{phase}_ms": value * 1e3 for phase, value in seconds.items()}


def _prompts_of(recipe: Recipe, prompts: Sequence[Prompt], step: int) -> tuple[Prompt, ...]:
    """The prompts that the trainer takes."""
    count = recipe.rollout.prompts_per_step
    return prompts_of_step(prompts, step=step, prompts_per_step=count, seed=recipe.seed)


def _medians(forms: Mapping[str, Step], rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of each form's phases over `rounds` in turn, after one round to warm up."""
    laps: dict[str, list[Mapping[str, float]]] = {name: [] for name in forms}
    for step in range(rounds + 1):
        for name, form in forms.items():
            laps[name].append(form(step))
    return {
        name: {
            phase: statistics.median(lap[key] for lap in timed[1:]) for phase, key in PHASES.items()
        }
        for name, timed in laps.items()
    }


def _measures(seconds: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    measures = {
        f"{name}_{phase}_ms": value * 1e3
        for name, phases in seconds.items()
        for phase, value in phases.items()
    }
    if "eager" in seconds:
        for phase in PHASES:
            measures[f"speedup_{phase}"] = seconds["eager"][phase] / seconds["trainer"][phase]
    return measures


def _table(measures: Mapping[str, float]) -> tuple[str, ...]:
    eager = "eager_step_ms" in measures
    head = f"{'phase':<10}{'trainer ms':>12}" + f"{'eager ms':>10}{'ratio':>8}" * eager
    rows = [f"{head}{'ideal ms':>10}"]
    for phase in PHASES:
        row = f"{phase:<10}{measures[f'trainer_{phase}_ms']:>12.1f}"
        if eager:
            row += f"{measures[f'eager_{phase}_ms']:>10.1f}{measures[f'speedup_{phase}']:>7.1f}x"
        rows.append(f"{row}{measures[f'ideal_{phase}_ms']:>10.1f}")
    return (*rows, NOTE, IDEAL)


# A training step as one writes it on transformers alone: what `stage bench step` compares with.
#
# It samples with `generate`, runs policy and reference over left-padded prompts with an attention
# mask, takes the log-softmax of all logits by plain autograd, and compares completions pair by
# pair.
# It computes the same loss as the trainer.
#
# Shape suffixes: P prompts, G group, N = P x G completions, L prompt slots, S slots of prompt and
# image together, T image tokens, C codebook channels.


class EagerStep:
    """A policy, its reference and an optimizer, each its own, and the step that trains them."""

    def __init__(self, recipe: Recipe, judge: RewardFunctions, device: torch.device):
        settings = recipe.algorithm
        assert settings == AlgorithmConfig(beta=settings.beta), "eager_loss is the default preset"
        self.recipe, self.judge = recipe, judge
        self.policy = plain(recipe.policy.build(device))
        self.reference = plain(self.policy.reference())
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
        codes_NTC = self.policy.codes(rollout.tokens_NT)
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
