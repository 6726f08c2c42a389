"""Every shipped recipe loads, explains itself and builds."""

import importlib.resources

import pytest
import torch

from stage_rl.config import describe, diff_recipes, list_recipes, load_recipe, resolved_json

RECIPES = sorted(list_recipes())
CPU = torch.device("cpu")


def test_the_shipped_recipes_are_these():
    assert RECIPES == ["shapes_entropy", "shapes_geneval", "shapes_grpo"]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_opens_with_purpose_hardware_time_expectation_and_command(name):
    text = (importlib.resources.files("stage_rl") / "recipes" / f"{name}.yaml").read_text()
    header = text[: text.index("\nname:")]
    for word in ("Purpose:", "Hardware:", "Time:", "Expected:", f"stage train {name}"):
        assert word in header


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_named_after_its_file_and_describes_itself_as_a_recipe(name, tmp_path):
    recipe = load_recipe(name)
    assert recipe.name == name
    described = tmp_path / "described.yaml"
    described.write_text(describe(recipe))
    assert resolved_json(load_recipe(described)) == resolved_json(recipe)


@pytest.mark.parametrize("name", RECIPES)
def test_the_parts_of_a_recipe_build(name):
    recipe = load_recipe(name)
    prompts = recipe.prompts.build()
    assert len(prompts) >= recipe.rollout.prompts_per_step
    assert recipe.policy.build(CPU).layout(prompts[:1]).num_tokens > 0
    for reward in recipe.rewards:
        assert callable(reward.build(CPU))
        assert all(
            field in prompt.metadata for prompt in prompts for field in reward.required_fields
        )


def test_the_recipes_differ_from_each_other_in_the_method_only():
    full, entropy, grpo = (
        load_recipe(name, ["optimizer.lr=1e-5", "algorithm.beta=0.1", "steps=10", "name=same"])
        for name in ("shapes_geneval", "shapes_entropy", "shapes_grpo")
    )
    assert diff_recipes(full, entropy) == ("algorithm.reweight",)
    assert diff_recipes(entropy, grpo) == ("algorithm.entropy.mode",)
