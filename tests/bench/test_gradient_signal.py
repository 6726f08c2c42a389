"""The gradient-signal benchmark."""

import math

import pytest
import torch

from stage_rl.bench import gradient_signal
from stage_rl.bench.gradient_signal import headline, mean_cosine, step_gradient
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
    measures = {"plain_cosine": 0.01, "plain_standard_error": 0.004}
    measures |= {"scaled_cosine": 0.002, "scaled_standard_error": 0.001}
    assert headline(measures).endswith("signal equals chance after 99 steps")
    assert "chance" not in headline(measures | {"plain_cosine": -0.01})


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
    assert set(result.settings) == {"recipe", "steps", "overrides"}
    assert -1 < result.measures["plain_cosine"] < 1
