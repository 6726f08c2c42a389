"""The eager step is no straw man: it computes what the trainer computes."""

from __future__ import annotations

import copy

import pytest
import torch

from stage_rl.bench.rollout import generate
from stage_rl.bench.step import EagerStep, padded_ids, plain
from stage_rl.config import load_recipe
from stage_rl.rewards.judge import RewardFunctions
from stage_rl.rollout.engine import Engine
from stage_rl.rollout.sample import rollout as sample_rollout
from stage_rl.rollout.sampling import Sampling
from stage_rl.training.update import (
    Precision,
    Update,
    learn,
    measure_all,
    measure_to_learn,
    micro_batches,
)
from stage_rl.types import Prompt, Rewards, Rollout

PROMPTS = [
    Prompt("a red square", 0),
    Prompt("a photo of two blue circle and three green star", 1),
    Prompt("the star above a square", 2),
]
GROUP_SIZE = 4
# A best one, two best ones, all equal.
REWARDS_PG = torch.tensor([[1.0, 0.0, 0.5, 0.25], [0.0, 1.0, 1.0, 0.0], [0.3, 0.3, 0.3, 0.3]])


@pytest.fixture
def eager(tiny_janus_folder, tmp_path):
    """An eager step in fp32 whose policy has moved from its reference."""
    recipe = load_recipe(
        "shapes_geneval",
        [
            f"policy.path={tiny_janus_folder}",
            f"rollout.group_size={GROUP_SIZE}",
            "rollout.dtype=float32",
            "training.dtype=float32",
            # The policy term of a first update is a mean of advantages, near 0: rounding errors
            # would decide the loss.
            "algorithm.beta=1",
        ],
    )
    step = EagerStep(recipe, RewardFunctions([]), torch.device("cpu"))
    with torch.no_grad():
        for parameter in step.policy.module.model.language_model.parameters():
            parameter.mul_(1.05)
    return step


class Recorder(torch.optim.SGD):
    """Keeps the gradient of the update."""

    def step(self, closure=None):
        self.gradient = flat(p.grad for p in self.param_groups[0]["params"])
        return super().step(closure)


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def trained(policy):
    return [p for p in policy.module.parameters() if p.requires_grad]


def a_rollout():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(64, (len(PROMPTS) * GROUP_SIZE, 16), generator=generator)
    images = torch.zeros(len(tokens), 16, 16, 3, dtype=torch.uint8)
    return Rollout(tuple(PROMPTS), GROUP_SIZE, tokens, images)


def trainer_loss_and_gradient(recipe, policy, reference, rollout):
    """What the trainer makes of a rollout, with its own attention and right-padded prompts."""
    batches = list(micro_batches(rollout, None, torch.device("cpu")))
    optimizer = Recorder(trained(policy), lr=1e-3)
    update = Update(recipe.algorithm, Precision(), 1, 1e-3, None)
    learned = learn(
        policy,
        optimizer,
        batches,
        first=measure_to_learn(policy, batches[0], update),
        rewards=Rewards(REWARDS_PG, torch.ones(3, dtype=torch.bool), {}, ()),
        reference=measure_all(reference, batches, Precision()),
        update=update,
    )
    return learned.losses["loss/total"], optimizer.gradient


def test_loss_and_gradient_are_the_trainers(eager, tiny_janus):
    rollout = a_rollout()
    reference = tiny_janus.reference()
    tiny_janus.module.load_state_dict(eager.policy.module.state_dict())
    expected, expected_gradient = trainer_loss_and_gradient(
        eager.recipe, tiny_janus, reference, rollout
    )
    with torch.no_grad():
        measured = eager.measure(eager.reference, rollout)
    loss = eager.loss(rollout, REWARDS_PG, measured)
    loss.backward()
    gradient = flat(p.grad for p in trained(eager.policy))
    # Sums of terms of the size of 1 in fp32.
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert abs(loss.item()) > 1e-3
    assert (gradient - expected_gradient).norm() <= 1e-5 * expected_gradient.norm()


def test_left_padded_generate_draws_what_the_engine_draws(tiny_janus):
    engine = Engine(tiny_janus)
    ours = sample_rollout(
        engine,
        PROMPTS,
        group_size=1,
        sampling=Sampling(guidance_scale=3.0, temperature=0.0),
        seed=0,
        step=0,
    )
    baseline = plain(copy.deepcopy(tiny_janus))
    ids_NL, mask_NL = padded_ids(baseline, PROMPTS, 1)
    theirs = generate(baseline, ids_NL, mask_NL=mask_NL, guidance_scale=3.0, greedy=True)
    assert torch.equal(ours.tokens_NT, theirs)


def test_the_eager_models_use_transformers_attention(eager):
    for policy in (eager.policy, eager.reference):
        assert policy.module.model.language_model.config._attn_implementation == "sdpa"
