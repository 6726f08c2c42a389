"""What the protocol allows beyond Janus, on a family of the tests."""

import policy_contract
import pytest
import torch
from fake_family import COORDS, FakePolicy
from pydantic import ValidationError
from torch.testing import assert_close

from stage_rl.algorithm import group_advantages
from stage_rl.config import load_recipe
from stage_rl.errors import InputError
from stage_rl.policies.base import PolicyConfig
from stage_rl.recipe import Recipe
from stage_rl.rollout.engine import Engine
from stage_rl.rollout.sample import rollout
from stage_rl.rollout.sampling import Sampling
from stage_rl.types import Prompt

SHORT, LONG = Prompt("a red square", 0), Prompt("a blue circle and two red square", 1)


@pytest.fixture
def policy():
    return FakePolicy()


def test_the_family_keeps_the_contract(policy):
    policy_contract.check(policy, SHORT, LONG)


def test_a_control_token_and_the_second_axis_change_what_follows(policy):
    tokens_NT = torch.arange(6)[None]
    with torch.no_grad():
        before_NTD = policy.hidden(policy.encode([SHORT]), tokens_NT)
        policy.module["tokens"].weight[-1] += 1
        after_NTD = policy.hidden(policy.encode([SHORT]), tokens_NT)
        policy.layout.coords_UA[1, 1] = 4
        moved_NTD = policy.hidden(policy.encode([SHORT]), tokens_NT)
        policy.layout.coords_UA[1, 1] = COORDS[1][1]
    # The control token stands behind 3 tokens; column 1 is an input of token 2.
    assert torch.equal(after_NTD[:, :3], before_NTD[:, :3])
    assert (after_NTD[:, 3:] - before_NTD[:, 3:]).abs().min(0).values.max() > 1e-3
    assert torch.equal(moved_NTD[:, :2], after_NTD[:, :2])
    assert not torch.allclose(moved_NTD[:, 2], after_NTD[:, 2])


def test_guidance_is_refused(policy):
    with pytest.raises(InputError, match="no unconditional rows; write 1"):
        rollout(Engine(policy), [SHORT], group_size=2, sampling=Sampling(), seed=0, step=0)


def test_the_gradient_of_a_step_is_that_of_a_loop_written_by_hand(policy):
    sampling = Sampling(guidance_scale=1.0)
    drawn = rollout(Engine(policy), [SHORT, LONG], group_size=2, sampling=sampling, seed=0, step=0)
    rewards_PG = torch.tensor([[1.0, 0.0], [0.2, 0.9]])
    advantages_N1 = group_advantages(rewards_PG).flatten()[:, None]

    logprobs_NT, _ = policy((SHORT, LONG), drawn.tokens_NT, group_size=2)
    (-(logprobs_NT * advantages_N1).mean()).backward()
    ours = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}

    policy.zero_grad()
    loss = 0.0
    for row, prompt in enumerate((SHORT, SHORT, LONG, LONG)):
        for place in range(6):
            loss = loss - advantages_N1[row, 0] * by_hand(policy, prompt, drawn, row, place) / 24
    loss.backward()
    theirs = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert_close(ours[name], gradient, atol=1e-6, rtol=1e-4)


def by_hand(policy, prompt, drawn, row, place):
    """Log-probability of one token: its prompt and all before it as one plain sequence."""
    trunk, (embeds_1LD,) = policy.module["trunk"], [policy.encode([prompt]).embeds_PLD]
    tokens = drawn.tokens_NT[row].tolist()
    column = [0, 1, 2, 4, 5, 6][place]
    ids = [*tokens[:3], 11, *tokens[3:]][:column]
    inputs = torch.cat([embeds_1LD[0], policy.embed(torch.tensor(ids, dtype=torch.long))])[None]
    coords = torch.tensor([(0, 0)] * embeds_1LD.shape[1] + COORDS[:column])[None]
    states, rotation = inputs, policy.rotary(inputs, coords)
    for layer in trunk.layers:
        states = layer(states, position_embeddings=rotation)
    logits_V = policy.head(trunk.norm(states)[0, -1])
    return logits_V.log_softmax(-1)[tokens[place]]


class Unguided(PolicyConfig):
    guided = False

    def build(self, device):
        return FakePolicy()


def test_a_recipe_of_a_family_without_guidance_needs_none_and_refuses_other(tiny_recipe):
    recipe = load_recipe(tiny_recipe)
    given = {name: getattr(recipe, name) for name in ("name", "steps", "prompts", "rewards")}
    given["policy"] = Unguided()
    for settings in ({}, {"guidance_scale": 1.0}):
        assert Recipe.model_validate(given | {"rollout": settings}).rollout.guidance_scale == 1
    with pytest.raises(ValidationError, match="has no unconditional rows; write 1"):
        Recipe.model_validate(given | {"rollout": {"guidance_scale": 2.0}})
