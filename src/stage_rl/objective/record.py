"""What a rule of token credit is given, what it gives, and what it may ask for beyond that.

Shape suffixes: P prompts, G group, T image tokens, C codebook channels, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from stage_rl.algorithm_config import AlgorithmConfig
from stage_rl.errors import RecipeError


@dataclass(frozen=True)
class RewardTerms:
    """Several rewards, each normalized by itself, before they are added (`algorithm.advantage`)."""

    by_reward: Mapping[str, Tensor]
    """Weight x advantage, PG; over the deviation of the step where the recipe divides by it."""
    std_P: Tensor
    """That deviation, of the sum over all images of the step: one number, once for each group."""

    def of(self, groups: slice, device: torch.device) -> RewardTerms:
        """Those of some groups."""
        parts = {name: term_PG[groups].to(device) for name, term_PG in self.by_reward.items()}
        return RewardTerms(parts, self.std_P[groups].to(device))


@dataclass(frozen=True, kw_only=True)
class MeasuredGroups:
    """Some groups of a step once they are judged and measured; constants."""

    summed_rewards_PG: Tensor
    """The weighted sum of the rewards, as they gave it."""
    scores: Mapping[str, Tensor]
    """The rewards one by one, unweighted, PG; NaN where one does not apply."""
    terms: RewardTerms | None = None
    """With `algorithm.advantage: gdpo`: what the images are compared by in place of the sum."""
    valid_P: Tensor
    """0 for groups that were dropped from the step, else 1; their weights do not matter."""
    codes_PGTC: Tensor
    """Codebook vectors of the tokens."""
    grid: tuple[int, int]
    """Rows and columns that the tokens lie on, row by row."""
    vocab: int
    """Size of the codebook: an entropy is at most ln vocab."""
    logprobs_PGT: Tensor
    """Of the policy that drew the tokens, under the scored distribution."""
    ref_logprobs_PGT: Tensor
    entropy_PGT: Tensor
    ref_entropy_PGT: Tensor
    sampler_logprobs_PGT: Tensor | None = None
    """As the sampler's arithmetic has them; None for a rollout without them."""
    token_mask_PGT: Tensor | None = None
    """The tokens that count, bool; None: all, T of the image."""
    modality_PGT: Tensor | None = None
    """Which kind of token each is, 0 of the image, others as a family numbers them; None: all of
    the image."""
    # The rest is there for functions that need it.
    cond_logprobs_PGT: Tensor | None = None
    """`conditional`: of the policy given the prompt, at temperature 1."""
    uncond_logprobs_PGT: Tensor | None = None
    """`unconditional`: of the policy without the prompt."""
    guidance_kl_PGT: Tensor | None = None
    """`exact_guidance`: KL(conditional, unconditional), summed over the codebook."""
    embeddings_PGTD: Tensor | None = None
    """`embeddings`: the tokens as inputs of the decoder."""
    guided_entropy_PGT: Tensor | None = None
    """`guided_entropy`: of the guided distribution at temperature 1, by the sampler."""


@dataclass(frozen=True, kw_only=True)
class CreditInputs(MeasuredGroups):
    """What a credit function is given: the groups, and the advantages of their images."""

    rewards_PG: Tensor
    """What the images are compared by: the summed rewards with the entropy bonus."""
    advantages_PG: Tensor
    """Equation 2, of `rewards_PG`."""
    equal_P: Tensor
    """Groups whose rewards were all equal before the bonus."""


@dataclass(frozen=True)
class CreditOutputs:
    """What a credit function returns; a token's advantage is policy x advantage + bonus."""

    policy_PGT: Tensor
    kl_PGT: Tensor
    """Factor of beta."""
    bonus_PGT: Tensor | None = None
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    """By the name they are logged under, each with one row per group (P, PG or PGT): their mean is
    logged. Those of shape PGT are kept in samples/STEP.npz, a final /mean dropped."""


CreditFunction = Callable[[CreditInputs, AlgorithmConfig], CreditOutputs]
"""With its parameters bound to it."""
F = TypeVar("F", bound=Callable[..., object])

Refusals = Callable[..., Iterator[tuple[str, str]]]
"""refusals(settings, num_updates, **parameters): keys of the `algorithm` section, those of the
parameters among them, and what is wrong with them."""


def refuse_token_mask(inputs: CreditInputs, rule: str) -> None:
    """A RecipeError where some tokens do not count, for a rule that takes T of them for an image:
    its ranks, shares and tenths would be those of another number.
    """
    if inputs.token_mask_PGT is not None:
        raise RecipeError(
            f"algorithm.credit: {rule} ranks all tokens of an image, and some of these do not "
            "count; write uniform or stage"
        )


NEEDS = ("conditional", "unconditional", "exact_guidance", "embeddings", "guided_entropy")
"""What a function may ask for beyond the record. The first three cost forward passes of the policy,
unless it is what the recipe scores anyway; guided_entropy a softmax per token while sampling."""


def needs(*names: str | Callable[..., tuple[str, ...]]) -> Callable[[F], F]:
    """Marks a credit function as needing some of `NEEDS`; no other function pays for them.

    Where that depends on parameters, one function of them says it.
    """
    unknown = [name for name in names if isinstance(name, str) and name not in NEEDS]
    if unknown:
        raise ValueError(f"needs: '{unknown[0]}' is none of {', '.join(NEEDS)}")

    def mark(function: F) -> F:
        function.needs = names  # pyright: ignore[reportFunctionMemberAccess]
        return function

    return mark


def refuses(refusals: Refusals) -> Callable[[F], F]:
    """Marks a function of credit or loss with what it makes no sense with: a recipe that says so is
    refused when it is read. `num_updates` are those per rollout.
    """

    def mark(function: F) -> F:
        function.refuses = refusals  # pyright: ignore[reportFunctionMemberAccess]
        return function

    return mark
