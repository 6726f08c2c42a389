"""Which settings of a recipe contradict each other or have no effect, and what to write instead."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from stage_rl.settings import BUILT_IN, did_you_mean, needs_of, resolve_function

if TYPE_CHECKING:
    from stage_rl.recipe import AlgorithmConfig, Recipe


class Idle(NamedTuple):
    """Keys of the objective without effect where another key has one of some values."""

    keys: tuple[str, ...]
    other: str
    values: tuple[str, ...]
    instead: str = ""
    """What to write; empty: the default."""


IDLE = (
    Idle(
        (
            *("reweight", "mask_normalization", "self_similarity", "equal_group_similarity"),
            *("kl.a", "kl.b", "kl.weight_clip"),
        ),
        "credit",
        tuple(name for name in BUILT_IN["credit"] if name != "stage"),
    ),
    Idle(("mask_normalization",), "reweight", ("kl",)),
    Idle(("kl.a", "kl.b", "kl.weight_clip"), "reweight", ("advantages",)),
    Idle(("clip", "clip_high"), "loss", ("unclipped", "gspo", "gspo_token", "gmpo", "sapo")),
    Idle(("advantage_eps", "advantage_std_floor"), "loss", ("dr_grpo",)),
    Idle(("importance_cap",), "importance_sampling", ("none",)),
    Idle(
        ("importance_floor",),
        "importance_sampling",
        ("none", "token_truncate", "sequence_truncate"),
    ),
    Idle(("whiten",), "advantage", ("sum",)),
    Idle(("entropy.scale",), "entropy.mode", ("loss",), "penalty_scale"),
    Idle(("entropy.scope", "entropy.centred"), "entropy.mode", ("loss",)),
    Idle(("entropy.penalty_scale",), "entropy.mode", ("reward", "constant"), "scale"),
)
"""Who writes one of these believes that it changes something: it is refused. Not where another key
switches the whole off, as an ablation does (`entropy.mode: none`, `reweight: none`)."""


def contradictions(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Keys, what is wrong with them, and what to write instead."""
    yield from _of_the_names(recipe)
    for key, text in _idle(recipe.algorithm):
        yield f"algorithm.{key}", text
    yield from _of_the_credit(recipe)
    yield from _of_the_loss(recipe)
    yield from _of_the_kl(recipe)
    yield from _of_the_sampler(recipe)
    yield from _of_the_rewards(recipe)
    yield from _of_the_policy(recipe)
    yield from _of_the_evaluation(recipe)
    if recipe.optimizer.warmup_steps > recipe.steps:
        text = f"{recipe.optimizer.warmup_steps} is more than steps ({recipe.steps}); write at "
        text += f"most {recipe.steps}, or more steps"
        yield "optimizer.warmup_steps", text


def _of_the_names(recipe: Recipe) -> Iterator[tuple[str, str]]:
    for name, count in Counter(reward.name for reward in recipe.rewards).items():
        if count > 1:
            yield "rewards", f"{count} rewards are named '{name}'; give each its own name"
        if name in ("mean", "std", "equal_groups", "failed_groups"):
            text = f"'{name}' is a metric of the summed reward; give the reward another name"
            yield "rewards", text


def _idle(settings: AlgorithmConfig) -> Iterator[tuple[str, str]]:
    """Keys of the objective that were changed to no effect, and what to write instead."""
    preset = settings.of_preset
    for rule in IDLE:
        other = _value(settings, rule.other)
        for key in rule.keys if other in rule.values else ():
            section, _, name = key.rpartition(".")
            owner = getattr(settings, section) if section else settings
            default = type(owner).model_fields[name].default
            preset_values = preset.get(section, {}) if section else preset
            value = getattr(owner, name)
            # A recipe that is written out in full has the values of its preset.
            if value in (default, preset_values.get(name, default)):
                continue
            if key == "reweight" and value == "none":
                continue
            instead = rule.instead or (default if isinstance(default, str) else json.dumps(default))
            yield key, f"has no effect with {rule.other}: {other}; write {instead}"


def _value(settings: AlgorithmConfig, key: str) -> Any:
    """By its dotted key; of a function its name."""
    section, _, name = key.rpartition(".")
    value = getattr(getattr(settings, section) if section else settings, name)
    return value["kind"] if isinstance(value, dict) else value


def _of_the_credit(recipe: Recipe) -> Iterator[tuple[str, str]]:
    settings, credit = recipe.algorithm, recipe.algorithm.credit
    parameters = {"kind": credit} if isinstance(credit, str) else credit
    released = parameters["kind"] == "entropy_bonus" and parameters.get("form") != "paper"
    if released and parameters.get("kappa", 1.0) != 1.0:
        text = "has no effect with form: release; write form: paper"
        yield "algorithm.credit.kappa", text
    if parameters["kind"] != "critical":
        return
    daw, gradient = parameters.get("daw", "release"), parameters.get("daw_gradient")
    through = settings.through_weights(gradient)
    if daw == "none" and gradient == "through":
        text = "has no effect with daw: none; write detached, or daw: release"
        yield "algorithm.credit.daw_gradient", text
    elif through and recipe.optimizer.updates_per_rollout > 1:
        text = "through is the gradient of one update per rollout; write detached, or "
        yield "algorithm.credit.daw_gradient", f"{text}optimizer.updates_per_rollout=1"
    if daw == "paper" and not through and settings.entropy.mode != "loss":
        text = "paper is 0 where policy and reference are the same, as they are at first, and so"
        text += " they stay; write release, or daw_gradient: through"
        yield "algorithm.credit.daw", text


def _of_the_loss(recipe: Recipe) -> Iterator[tuple[str, str]]:
    settings = recipe.algorithm
    loss = settings.loss_kind
    if recipe.optimizer.updates_per_rollout > 1 and loss == "unclipped":
        text = "unclipped is for one update per rollout; write clip, or "
        yield "algorithm.loss", f"{text}optimizer.updates_per_rollout=1"
    high = settings.clip_high
    if loss in ("clip", "dr_grpo", "cispo") and high is not None and high < settings.clip:
        text = f"{high} is below algorithm.clip ({settings.clip}); write a larger one"
        yield "algorithm.clip_high", text
    if loss in ("gspo", "gmpo"):
        text = f"{loss} has one ratio per image, so all its tokens get their mean advantage"
        if not settings.one_advantage_per_image:
            yield "algorithm.loss", f"{text}; write gspo_token, or algorithm.credit=uniform"
        if settings.importance_sampling.startswith("token"):
            hint = f"write {settings.importance_sampling.replace('token', 'sequence')}"
            yield "algorithm.importance_sampling", f"{text}; {hint}, or geometric_mask"
    if settings.importance_floor > settings.importance_cap:
        text = f"{settings.importance_floor} is above importance_cap; write a lower one"
        yield "algorithm.importance_floor", text


def _of_the_kl(recipe: Recipe) -> Iterator[tuple[str, str]]:
    settings, rollout = recipe.algorithm, recipe.rollout
    if settings.exact_kl and settings.beta == 0:
        text = "exact takes memory and time, and algorithm.beta is 0; write k3"
        yield "algorithm.kl.estimator", text
    unguided = (recipe.guidance_scale, rollout.temperature) == (1, 1)
    whole = (rollout.top_k, rollout.top_p) == (0, 1)
    own_samples = settings.logprobs != "conditional" or (unguided and whole)
    once = recipe.optimizer.updates_per_rollout == 1
    if settings.kl.estimator == "k1" and settings.beta and own_samples and once:
        text = "k1 pulls nowhere on samples of the policy that is scored; write k2, k3 or k3+"
        yield "algorithm.kl.estimator", text


def _of_the_sampler(recipe: Recipe) -> Iterator[tuple[str, str]]:
    rollout, settings = recipe.rollout, recipe.algorithm
    if rollout.cache_dtype == "fp8" and settings.importance_sampling == "none":
        text = "fp8 draws from another distribution than the policy's; write auto, or "
        yield "rollout.cache_dtype", f"{text}algorithm.importance_sampling=token_truncate"
    if settings.logprobs != "conditional":
        for key, off in (("top_k", 0), ("top_p", 1)):
            if getattr(rollout, key) != off:
                text = "guided log-probabilities are those of the whole distribution; write "
                yield f"rollout.{key}", f"{text}{off}, or algorithm.logprobs=conditional"


def _of_the_rewards(recipe: Recipe) -> Iterator[tuple[str, str]]:
    settings, names = recipe.algorithm, [reward.name for reward in recipe.rewards]
    if settings.advantage == "gdpo" and settings.loss_kind == "dr_grpo":
        text = "gdpo divides by deviations, which dr_grpo leaves out; write sum, or loss=clip"
        yield "algorithm.advantage", text
    for number, reward in enumerate(recipe.rewards):
        others = [name for name in names if name != reward.name]
        if reward.requires and reward.requires.reward not in others:
            hint = did_you_mean(reward.requires.reward, others)
            text = f"no other reward is named '{reward.requires.reward}'; {hint}"
            yield f"rewards.{number}.requires.reward", text


def _of_the_policy(recipe: Recipe) -> Iterator[tuple[str, str]]:
    if recipe.policy.policy_class.guided:
        return
    text = f"the policy {recipe.policy.kind} has no unconditional rows; write 1"
    if recipe.rollout.guidance_scale not in (None, 1):
        yield "rollout.guidance_scale", text
    if recipe.evaluation and recipe.evaluation.guidance_scale not in (None, 1):
        yield "evaluation.guidance_scale", text
    needed = needs_of(resolve_function("credit", recipe.algorithm.credit))
    if {"unconditional", "exact_guidance"} & {*needed}:
        text = "needs unconditional rows, and the policy has none; write another credit"
        yield "algorithm.credit", text


def _of_the_evaluation(recipe: Recipe) -> Iterator[tuple[str, str]]:
    evaluation = recipe.evaluation
    validates = evaluation is not None and evaluation.every > 0
    if recipe.tripwires.validation_drop is not None and not validates:
        text = "needs validation while training; write evaluation.every, or null here"
        yield "tripwires.validation_drop", text
    if evaluation and validates and evaluation.validation_seed == evaluation.seed:
        text = "is evaluation.seed too, so the best checkpoint would be judged on the images it"
        yield "evaluation.validation_seed", f"{text} was chosen by; write another"
