"""Token credit and losses as a user writes them."""

import torch
from fake_family import FakePolicy

from stage_rl import algorithm
from stage_rl.objective.loss import LossOutputs
from stage_rl.objective.record import CreditOutputs, needs, refuses
from stage_rl.policies.base import PolicyConfig

SEEN = []


def first_half(inputs, settings, *, weight=2.0):
    """The first rows of an image alone count, twice."""
    rows, columns = inputs.grid
    weight_PGT = torch.zeros_like(inputs.logprobs_PGT)
    weight_PGT[..., : rows // 2 * columns] = weight
    return CreditOutputs(
        weight_PGT,
        torch.ones_like(weight_PGT),
        bonus_PGT=0.01 * inputs.entropy_PGT / inputs.vocab,
        metrics={
            "credit/share": (weight_PGT > 0).float(),
            "credit/best": inputs.rewards_PG.amax(1),
        },
    )


def stage_by_hand(inputs, settings):
    """STAGE with the settings of the preset `default`."""
    sim_PGT = algorithm.opposing_similarity(inputs.codes_PGTC, inputs.advantages_PG)
    mask_PGT = algorithm.advantage_mask(sim_PGT)
    return CreditOutputs(algorithm.normalize_mask(mask_PGT), algorithm.kl_weight(sim_PGT))


@needs("conditional", "unconditional")
def guided(inputs, settings, times=1):
    SEEN.append(inputs)
    return CreditOutputs(torch.ones_like(inputs.logprobs_PGT), torch.ones_like(inputs.logprobs_PGT))


def one_number(inputs, settings):
    return CreditOutputs(torch.ones(1), torch.ones_like(inputs.logprobs_PGT))


def reinforce(inputs, settings, *, scale=1.0):
    """No ratio at all, and a squared difference for the KL."""
    policy = -scale * (inputs.advantages_PGT * inputs.logprobs_PGT).mean()
    gap_PGT = inputs.logprobs_PGT - inputs.ref_logprobs_PGT
    kl = (inputs.beta_PGT * gap_PGT.square() / 2).mean()
    return LossOutputs(policy + kl, policy, kl, {"kl/largest": gap_PGT.detach().abs().amax()})


def per_token(inputs, settings):
    loss_PGT = -inputs.advantages_PGT * inputs.logprobs_PGT
    return LossOutputs(loss_PGT, loss_PGT.mean(), loss_PGT.mean() * 0)


def demanding(inputs, settings, *, share):
    return first_half(inputs, settings, weight=share)


def _limited(settings, num_updates, *, limit):
    if limit > 1:
        yield "loss.limit", f"{limit} is too much; write less"


@refuses(_limited)
def for_one_update(inputs, settings, *, limit=2.0):
    return reinforce(inputs, settings)


def one_argument(inputs):
    return inputs


class NoFunction:
    pass


@needs("conditional", "unconditional", "exact_guidance", "embeddings", "guided_entropy")
def needs_everything(inputs, settings):
    SEEN.append(inputs)
    return CreditOutputs(torch.ones_like(inputs.logprobs_PGT), torch.ones_like(inputs.logprobs_PGT))


class UnguidedConfig(PolicyConfig):
    policy_class = FakePolicy

    def build(self, device):
        return FakePolicy()
