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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from stage_rl import algorithm
from stage_rl.algorithm_config import AlgorithmConfig
from stage_rl.errors import RecipeError
from stage_rl.objective.kl import token_divergence
from stage_rl.objective.record import refuses


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
    token_mask_PGT: Tensor | None = None
    """The tokens that count, bool; None: all."""
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


Size = Annotated[float, Field(gt=0, lt=1)]
"""How far below or above 1 a ratio may go."""


def _one_update(
    settings: AlgorithmConfig, num_updates: int, **parameters: Any
) -> Iterator[tuple[str, str]]:
    if num_updates > 1:
        text = f"{settings.loss_kind} is for one update per rollout; write clip, or "
        yield "loss", f"{text}optimizer.updates_per_rollout=1"


def _narrow_above(
    settings: AlgorithmConfig, num_updates: int, *, low: float, high: float
) -> Iterator[tuple[str, str]]:
    if high < low:
        yield "loss.high", f"{high} is below loss.low ({low}); write a larger one"


def _image_credit(
    settings: AlgorithmConfig, num_updates: int, **parameters: Any
) -> Iterator[tuple[str, str]]:
    loss = settings.loss_kind
    text = f"{loss} has one ratio per image, so all its tokens get their mean advantage"
    if not settings.one_advantage_per_image:
        yield "loss", f"{text}; write gspo_token, or algorithm.credit=uniform"
    if settings.importance_sampling.startswith("token"):
        hint = f"write {settings.importance_sampling.replace('token', 'sequence')}"
        yield "importance_sampling", f"{text}; {hint}, or geometric_mask"


def _image_credit_in_range(
    settings: AlgorithmConfig, num_updates: int, *, low: float, high: float
) -> Iterator[tuple[str, str]]:
    yield from _image_credit(settings, num_updates)
    yield from _narrow_above(settings, num_updates, low=low, high=high)


def clip(inputs: LossInputs, settings: AlgorithmConfig) -> LossOutputs:
    """Equation 3, PPO's and GRPO's: the ratio within [1 - clip, 1 + clip_high]."""
    return _clipped(inputs, settings, _ratio(inputs), *settings.clip_range)


def dr_grpo(inputs: LossInputs, settings: AlgorithmConfig) -> LossOutputs:
    """Dr.GRPO (arXiv 2503.20783): `clip` on advantages that are not divided by their group's
    deviation. Its sum over tokens is here a mean: all images have T.
    """
    return clip(inputs, settings)


@refuses(_one_update)
def unclipped(inputs: LossInputs, settings: AlgorithmConfig) -> LossOutputs:
    """-ratio x advantage, of the released codes of STAGE, GCPO and EG-GRPO; for one update."""
    return _clipped(inputs, settings, _ratio(inputs), math.inf, math.inf)


@refuses(_image_credit_in_range)
def gspo(
    inputs: LossInputs,
    settings: AlgorithmConfig,
    *,
    low: Size = 3e-4,
    high: Size = 4e-4,
) -> LossOutputs:
    """GSPO (arXiv 2507.18071): one ratio per image, the geometric mean of its tokens', within
    [1 - low, 1 + high].
    """
    ratio_PGT = _image_ratio(inputs).expand_as(inputs.logprobs_PGT)
    return _clipped(inputs, settings, ratio_PGT, low, high)


@refuses(_narrow_above)
def gspo_token(
    inputs: LossInputs,
    settings: AlgorithmConfig,
    *,
    low: Size = 3e-4,
    high: Size = 4e-4,
) -> LossOutputs:
    """GSPO's ratio and clip with the gradient of each token by itself, so that tokens may have
    advantages of their own.
    """
    own_PGT = (inputs.logprobs_PGT - inputs.logprobs_PGT.detach()).exp()
    return _clipped(inputs, settings, _image_ratio(inputs).detach() * own_PGT, low, high)


@refuses(_image_credit)
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
    least_PGT = sign_PGT * gain_PGT.minimum(clipped_PGT)
    mean_PG1 = algorithm.image_mean(least_PGT, inputs.token_mask_PGT)[..., None]
    return _outputs(
        advantages_PGT * mean_PG1.exp(),
        inputs,
        settings,
        ratio_PGT=log_ratio_PGT.exp(),
        held_PGT=clipped_PGT < gain_PGT,
    )


def cispo(inputs: LossInputs, settings: AlgorithmConfig) -> LossOutputs:
    """CISPO (arXiv 2506.13585): the ratio within [1 - clip, 1 + clip_high] is a constant weight of
    the log-probability, so no token loses its gradient.
    """
    ratio_PGT = _ratio(inputs).detach()
    low, high = settings.clip_range
    clipped_PGT = ratio_PGT.clamp(1 - low, 1 + high)
    gain_PGT = clipped_PGT * inputs.advantages_PGT * inputs.logprobs_PGT
    held_PGT = clipped_PGT != ratio_PGT
    return _outputs(gain_PGT, inputs, settings, ratio_PGT=ratio_PGT, held_PGT=held_PGT)


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
    ratio_PGT = _ratio(inputs)
    gate_PGT = (tau_PGT * (ratio_PGT - 1)).sigmoid()
    gain_PGT = 4 / tau_PGT * gate_PGT * advantages_PGT
    return _outputs(gain_PGT, inputs, settings, ratio_PGT=ratio_PGT, held_PGT=None)


def _log_ratio(inputs: LossInputs) -> Tensor:
    return inputs.logprobs_PGT - inputs.old_logprobs_PGT


def _ratio(inputs: LossInputs) -> Tensor:
    return algorithm.importance_ratio(inputs.logprobs_PGT, inputs.old_logprobs_PGT)


def _image_ratio(inputs: LossInputs) -> Tensor:
    """Geometric mean of the ratios of an image's tokens, ratio_PG1."""
    return algorithm.image_mean(_log_ratio(inputs), inputs.token_mask_PGT)[..., None].exp()


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
    inputs: LossInputs, settings: AlgorithmConfig, ratio_PGT: Tensor, low: float, high: float
) -> LossOutputs:
    """-min(r A, clip(r, 1 - low, 1 + high) A) with the KL."""
    gain_PGT, held_PGT = algorithm.clipped_gain(ratio_PGT, inputs.advantages_PGT, low, high)
    return _outputs(gain_PGT, inputs, settings, ratio_PGT=ratio_PGT, held_PGT=held_PGT)


def _outputs(
    gain_PGT: Tensor,
    inputs: LossInputs,
    settings: AlgorithmConfig,
    *,
    ratio_PGT: Tensor,
    held_PGT: Tensor | None,
) -> LossOutputs:
    """Minus the mean gain and the KL; `held_PGT` as in `ratio_metrics`."""
    mask_PGT = inputs.token_mask_PGT
    policy = -algorithm.token_mean(gain_PGT, mask_PGT)
    kl = algorithm.token_mean(inputs.beta_PGT * _divergence(inputs, settings), mask_PGT)
    metrics = ratio_metrics(ratio_PGT.detach(), held_PGT, inputs.valid_P, mask_PGT)
    return LossOutputs(policy + kl, policy, kl, metrics)


def ratio_metrics(
    ratio_PGT: Tensor,
    held_PGT: Tensor | None,
    valid_P: Tensor,
    token_mask_PGT: Tensor | None = None,
) -> dict[str, Tensor]:
    """ratio/mean and ratio/max of the groups that count, and where a loss clips, clip/fraction, the
    share of tokens that it holds back, clip/high those of a ratio above 1, clip/low below; scalars.
    """
    counts_PGT = valid_P[:, None, None]
    if token_mask_PGT is not None:
        counts_PGT = counts_PGT * token_mask_PGT
    metrics = {
        "ratio/mean": algorithm.token_mean(ratio_PGT * counts_PGT, token_mask_PGT),
        "ratio/max": (ratio_PGT * counts_PGT).amax(),
    }
    if held_PGT is not None:
        high_PGT, low_PGT = held_PGT & (ratio_PGT > 1), held_PGT & (ratio_PGT < 1)
        for name, where_PGT in (("fraction", held_PGT), ("high", high_PGT), ("low", low_PGT)):
            share = algorithm.token_mean(where_PGT * counts_PGT, token_mask_PGT)
            metrics[f"clip/{name}"] = share
    return metrics
