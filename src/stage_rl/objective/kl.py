"""Estimates of the KL from the reference, by the sampled token: what each is worth and pulls at.

Shape suffixes: P prompts, G group, T image tokens.
"""

from __future__ import annotations

from torch import Tensor

from stage_rl import algorithm


def token_divergence(
    estimator: str, logprobs: Tensor, ref_logprobs: Tensor, old_logprobs: Tensor
) -> Tensor:
    """One estimate per token, of the inputs' shape, with gradient; d = log pi_ref - log pi.

    k1: -d, without any pull in expectation; k2: d^2 / 2; k3: exp(d) - d - 1, which pulls as
    KL(reference, policy); k3+: the value of k3 with the gradient of k2, that of KL(policy,
    reference); rk3 (DeepSeek-V3.2, arXiv 2512.02556): k3 times the ratio to the old policy, which
    keeps that gradient over several updates.
    """
    if estimator == "k1":
        return logprobs - ref_logprobs
    if estimator == "k2":
        return (ref_logprobs - logprobs).square() / 2
    k3 = algorithm.token_kl(logprobs, ref_logprobs)
    if estimator == "k3+":
        k2 = (ref_logprobs - logprobs).square() / 2
        return k2 - k2.detach() + k3.detach()
    if estimator == "rk3":
        return algorithm.importance_ratio(logprobs, old_logprobs) * k3
    assert estimator == "k3", estimator
    return k3


def kl_metrics(
    logprobs_PGT: Tensor,
    ref_logprobs_PGT: Tensor,
    valid_P: Tensor,
    token_mask_PGT: Tensor | None = None,
) -> dict[str, Tensor]:
    """kl/mean, by k3, kl/k1 and kl/k2: means over the tokens that count, 0 where `valid_P` is 0;
    scalars.
    """
    logprobs_PGT, valid_P11 = logprobs_PGT.detach(), valid_P[:, None, None]
    numbers = {}
    for name, estimator in (("kl/mean", "k3"), ("kl/k1", "k1"), ("kl/k2", "k2")):
        known = token_divergence(estimator, logprobs_PGT, ref_logprobs_PGT, logprobs_PGT)
        numbers[name] = algorithm.token_mean(known * valid_P11, token_mask_PGT)
    return numbers
