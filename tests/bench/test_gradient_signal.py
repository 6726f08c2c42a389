"""The gradient-signal benchmark."""

import math

import pytest
import torch

from stage_rl.bench.signal import gradient_signal
from stage_rl.bench.signal.gradient_signal import mean_cosine, step_gradient
from stage_rl.config import load_recipe
from stage_rl.training.trainer import build_trainer

SMALL = "rollout.prompts_per_step=2 rollout.group_size=4"


def test_the_mean_cosine_is_that_of_all_pairs():
    gradients = torch.tensor([[1.0, 0.0], [2.0, 2.0], [0.0, 3.0]])
    # Between 1 and 2: 1 / sqrt 2, 2 and 3: 1 / sqrt 2, 1 and 3: 0. Mean 0.4714, deviation 0.4082.
    mean, error = mean_cosine(gradients)
    assert mean == pytest.approx(2 / math.sqrt(2) / 3, abs=1e-6)
    assert error == pytest.approx(math.sqrt(1 / 6) / math.sqrt(3), abs=1e-6)


def test_the_steps_that_are_needed_follow_from_the_cosine():
    # Between the first and the second 0.6, so (1 - 0.6) / 0.6 = 0.67 steps.
    found = gradient_signal.result(torch.tensor([[1.0, 0.0], [0.6, 0.8]]))
    assert found.measures["plain_cosine"] == pytest.approx(0.6)
    assert found.headline.endswith("signal equals chance after 1 steps")
    opposed = gradient_signal.result(torch.tensor([[1.0, 0.0], [-0.6, 0.8]]))
    assert "chance" not in opposed.headline
    assert opposed.reached is False


def test_a_gradient_leaves_the_policy_as_it_is():
    recipe = load_recipe("shapes_geneval", SMALL.split())
    trainer = build_trainer(recipe, recipe.prompts.build())
    before = [p.detach().clone() for p in trainer.policy.module.parameters()]
    first, again = step_gradient(trainer, 0), step_gradient(trainer, 0)
    assert all(map(torch.equal, before, trainer.policy.module.parameters()))
    assert first.norm() > 0
    assert torch.equal(first, again)


def test_it_runs_on_a_recipe_with_overrides():
    result = gradient_signal.run(steps=3, overrides=SMALL)
    assert -1 < result.measures["plain_cosine"] < 1
