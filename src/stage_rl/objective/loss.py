"""The policy loss.

`algorithm.loss` names a function of this form, a built-in one or `module:function`:

    def mine(inputs: LossInputs, settings: AlgorithmConfig, **parameters) -> LossOutputs: ...

`parameters` are those that the recipe writes beside the function's name, of the types that they are
annotated with.

It is called for some whole groups at a time. What it returns are means over all their tokens: they
are then weighted by the number of groups and added up, over micro-batches and processes.

At ratio 1, as in the only update on a rollout, the built-in losses have one gradient, that of
-advantage x log-probability, with two exceptions: `gspo` and `gmpo` give every token of an image
the mean of its advantages, and the advantage of `dr_grpo` is another one.

Shape suffixes: P prompts, G group, T image tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from pydantic import PositiveFloat
from torch import Tensor

from stage_rl import algorithm
from stage_rl.algorithm_config import AlgorithmConfig
from stage_rl.errors import RecipeError
from stage_rl.objective.kl import token_divergence


@dataclass(frozen=True)
class LossInputs:
    """Log-probabilities of the sampled tokens under the scored distribution, and their weights."""

    logprobs_PGT: Tensor
    """Of the policy, with gradient."""
    old_logprobs_PGT: Tensor
    """Of the policy before the first update on this rollout, measured like the policy's."""
    ref_logprobs_PGT: Tensor
    sampler_logprobs_PGT: Tensor | None
    """As the sampler's arithmetic has them; None for a rollout without them."""
    advantages_PGT: Tensor
    """With token credit and importance weights."""
    beta_PGT: Tensor
    """KL coefficient of each token."""
    valid_P: Tensor
    """0 for groups that were dropped from the step, whose advantages and beta are 0 too, else 1."""
    exact_kl_PGT: Tensor | None = None
    """KL(policy, reference) summed over the codebook, with gradient; for `kl.estimator: exact`."""


@dataclass(frozen=True)
class LossOutputs:
    """Scalars: means over P, G and T."""

    total: Tensor
    """What is minimized; with gradient."""
    policy: Tensor
    kl: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    """By the name they are logged under; scalars too, of which those that end in /max are not added
    up over micro-batches: the largest counts."""


LossFunction = Callable[[LossInputs, AlgorithmConfig], LossOutputs]
"""With its parameters bound to it."""


def policy_loss(
    function: LossFunction, inputs: LossInputs, settings: AlgorithmConfig
) -> LossOutputs:
    """What a function says; anything but scalars is a RecipeError."""
    outputs = function(inputs, settings)
    if not isinstance(outputs, LossOutputs):
        raise RecipeError(
            f"algorithm.loss: the function returned {type(outputs).__name__}; return LossOutputs"
        )
    parts = {"total": outputs.total, "policy": outputs.policy, "kl": outputs.kl}
    for part, value in (parts | dict(outputs.metrics)).items():
        if value.ndim:
            raise RecipeError(
                f"algorithm.loss: the function returned {part} of shape {tuple(value.shape)}; "
                "return its mean over all tokens, a scalar"
            )
    return outputs


def clip(inputs: LossInputs, settings: AlgorithmConfig) -> LossOutputs:
    """Equation 3, PPO's and GRPO's: the ratio within [1 - clip, 1 + clip_high]."""
    return _clipped(inputs, settings, _ratio(inputs), settings.clip, settings.clip_high)


def dr_grpo(inputs: LossInputs, settings: AlgorithmConfig) -> LossOutputs:
    """Dr.GRPO (arXiv 2503.20783): `clip` on advantages that are not divided by their group's
    deviation. Its sum over tokens is here a mean: all images have T.
    """
    return clip(inputs, settings)


def unclipped(inputs: LossInputs, settings: AlgorithmConfig) -> LossOutputs:
    """-ratio x advantage, of the released codes of STAGE, GCPO and EG-GRPO; for one update."""
    return _clipped(inputs, settings, _ratio(inputs), math.inf, None)


def gspo(
    inputs: LossInputs,
    settings: AlgorithmConfig,
    *,
    low: PositiveFloat = 3e-4,
    high: PositiveFloat = 4e-4,
) -> LossOutputs:
    """GSPO (arXiv 2507.18071): one ratio per image, the geometric mean of its tokens', within
    [1 - low, 1 + high].
    """
    ratio_PG1 = _log_ratio(inputs).mean(-1, keepdim=True).exp()
    ratio_PGT = ratio_PG1.expand_as(inputs.logprobs_PGT)
    return _clipped(inputs, settings, ratio_PGT, low, high)


def gspo_token(
    inputs: LossInputs,
    settings: AlgorithmConfig,
    *,
    low: PositiveFloat = 3e-4,
    high: PositiveFloat = 4e-4,
) -> LossOutputs:
    """GSPO's ratio and clip with the gradient of each token by itself, so that tokens may have
    advantages of their own.
    """
    ratio_PG1 = _log_ratio(inputs).mean(-1, keepdim=True).exp().detach()
    own_PGT = (inputs.logprobs_PGT - inputs.logprobs_PGT.detach()).exp()
    return _clipped(inputs, settings, ratio_PG1 * own_PGT, low, high)


def gmpo(
    inputs: LossInputs, settings: AlgorithmConfig, *, size: PositiveFloat = 0.4
) -> LossOutputs:
    """GMPO (arXiv 2507.20673): the geometric mean of ratios whose logarithm is clipped to +-size
    token by token, where that lowers the gain.
    """
    advantages_PGT = inputs.advantages_PGT
    log_ratio_PGT = _log_ratio(inputs)
    sign_PGT = torch.ones_like(advantages_PGT).copysign(advantages_PGT)
    gain_PGT = sign_PGT * log_ratio_PGT
    clipped_PGT = sign_PGT * log_ratio_PGT.clamp(-size, size)
    held_PGT = sign_PGT * gain_PGT.minimum(clipped_PGT)
    policy = -(advantages_PGT * held_PGT.mean(-1, keepdim=True).exp()).mean()
    return _outputs(policy, inputs, settings, held_back=clipped_PGT < gain_PGT)


def cispo(inputs: LossInputs, settings: AlgorithmConfig) -> LossOutputs:
    """CISPO (arXiv 2506.13585): the ratio within [1 - clip, 1 + clip_high] is a constant weight of
    the log-probability, so no token loses its gradient.
    """
    ratio_PGT = _ratio(inputs).detach()
    high = settings.clip if settings.clip_high is None else settings.clip_high
    clipped_PGT = ratio_PGT.clamp(1 - settings.clip, 1 + high)
    policy = -(clipped_PGT * inputs.advantages_PGT * inputs.logprobs_PGT).mean()
    return _outputs(policy, inputs, settings, held_back=clipped_PGT != ratio_PGT)


def sapo(
    inputs: LossInputs,
    settings: AlgorithmConfig,
    *,
    tau: PositiveFloat = 1.0,
    tau_negative: PositiveFloat = 1.05,
) -> LossOutputs:
    """SAPO (arXiv 2511.20347): a sigmoid of the ratio in place of a clip, steeper (`tau_negative`)
    where the advantage is not above 0.
    """
    advantages_PGT = inputs.advantages_PGT
    tau_PGT = torch.full_like(advantages_PGT, tau_negative).masked_fill(advantages_PGT > 0, tau)
    gate_PGT = (tau_PGT * (_ratio(inputs) - 1)).sigmoid()
    policy = -(4 / tau_PGT * gate_PGT * advantages_PGT).mean()
    return _outputs(policy, inputs, settings, held_back=None)


def _log_ratio(inputs: LossInputs) -> Tensor:
    return inputs.logprobs_PGT - inputs.old_logprobs_PGT


def _ratio(inputs: LossInputs) -> Tensor:
    return algorithm.importance_ratio(inputs.logprobs_PGT, inputs.old_logprobs_PGT)


def _divergence(inputs: LossInputs, settings: AlgorithmConfig) -> Tensor:
    """What `algorithm.kl.estimator` says, PGT."""
    if settings.kl.estimator == "exact":
        assert inputs.exact_kl_PGT is not None
        return inputs.exact_kl_PGT
    return token_divergence(
        settings.kl.estimator,
        inputs.logprobs_PGT,
        inputs.ref_logprobs_PGT,
        inputs.old_logprobs_PGT,
    )


def _clipped(
    inputs: LossInputs,
    settings: AlgorithmConfig,
    ratio_PGT: Tensor,
    low: float,
    high: float | None,
) -> LossOutputs:
    """-min(r A, clip(r, 1 - low, 1 + high) A) with the KL; `high` None is `low`."""
    loss = algorithm.grpo_loss(
        ratio_PGT,
        inputs.advantages_PGT,
        _divergence(inputs, settings),
        clip=low,
        clip_high=high,
        beta=inputs.beta_PGT,
    )
    ratio_PGT, advantages_PGT = ratio_PGT.detach(), inputs.advantages_PGT
    above_PGT = (ratio_PGT > 1 + (low if high is None else high)) & (advantages_PGT > 0)
    below_PGT = (ratio_PGT < 1 - low) & (advantages_PGT < 0)
    metrics = ratio_metrics(ratio_PGT, above_PGT | below_PGT, inputs.valid_P)
    return LossOutputs(loss.total, loss.policy, loss.kl, metrics)


def ratio_metrics(ratio_PGT: Tensor, held_PGT: Tensor | None, valid_P: Tensor) -> dict[str, Tensor]:
    """ratio/mean and ratio/max of the groups that count, and where a loss clips, clip/fraction, the
    share of tokens that it holds back, clip/high those of a ratio above 1, clip/low below; scalars.
    """
    valid_P11 = valid_P[:, None, None]
    metrics = {
        "ratio/mean": (ratio_PGT * valid_P11).mean(),
        "ratio/max": (ratio_PGT * valid_P11).amax(),
    }
    if held_PGT is not None:
        high_PGT, low_PGT = held_PGT & (ratio_PGT > 1), held_PGT & (ratio_PGT < 1)
        for name, mask_PGT in (("fraction", held_PGT), ("high", high_PGT), ("low", low_PGT)):
            metrics[f"clip/{name}"] = (mask_PGT * valid_P11).mean()
    return metrics


def _outputs(
    policy: Tensor, inputs: LossInputs, settings: AlgorithmConfig, *, held_back: Tensor | None
) -> LossOutputs:
    kl = (inputs.beta_PGT * _divergence(inputs, settings)).mean()
    metrics = ratio_metrics(_ratio(inputs).detach(), held_back, inputs.valid_P)
    return LossOutputs(policy + kl, policy, kl, metrics)
