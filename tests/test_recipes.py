"""Every shipped recipe loads, explains itself and builds."""

import importlib.resources
import re
from pathlib import Path

import pytest
import torch

from stage_rl.config import describe, diff_recipes, load_recipe, resolved_json
from stage_rl.policies.janus import size_of
from stage_rl.recipes import list_recipes
from stage_rl.rewards.judge import check_fields
from stage_rl.training.memory import GB, check_memory, plan_of

RECIPES = sorted(list_recipes())
SHAPES = [name for name in RECIPES if name.startswith("shapes_")]
JANUS_PRO = [name for name in RECIPES if name.startswith("janus_pro_")]
LLAMAGEN = [name for name in RECIPES if name.startswith("llamagen_")]
EMU3 = ["emu3_gen_geneval", "emu3_gen_hps_lora"]
CPU = torch.device("cpu")
FORMS = ("", "_grpo", "_release", "_grpo_release")
PAPERS = (
    *("janus_pro_7b_geneval", "janus_pro_7b_hps_gdino_git", "janus_pro_7b_ocr"),
    "janus_pro_1b_geneval",
)
MORE_ARMS = (
    *("janus_pro_7b_geneval_entropy", "janus_pro_1b_geneval_entropy"),
    *("janus_pro_1b_hps_gdino_git", "janus_pro_1b_hps_gdino_git_grpo"),
)
"""Of the paper too, in fewer forms."""
RIVALS = (
    *("janus_pro_1b_geneval_critical", "janus_pro_7b_geneval_guidance"),
    "janus_pro_1b_hps_gdino_git_gdpo",
)
"""Methods of other papers, with the settings that they published."""
CREDIT_RULES = ("critical", "entropy_bonus", "guidance", "high_entropy", "uniform")
"""Of other papers than STAGE's, each with a recipe of its name."""
ONE_GPU = {
    "janus_pro_7b_geneval_lora": 80,
    "janus_pro_7b_geneval_1gpu": 141,
    "janus_pro_1b_geneval_24gb": 24,
}
LLAMAGEN_ONE_GPU = dict.fromkeys(
    ("llamagen_xl_256_geneval", "llamagen_xl_256_hps", "llamagen_xl_256_hps_critical"), 40
)
FOR_ONE_GPU = ONE_GPU | LLAMAGEN_ONE_GPU | {"emu3_gen_hps_lora": 80}
"""Recipes for one GPU, and its memory in GB."""


def test_the_shipped_recipes_are_these():
    strict = ["shapes_strict", "shapes_strict_entropy", "shapes_strict_grpo"]
    rules = [f"shapes_strict_{rule}" for rule in CREDIT_RULES]
    shapes = ["shapes_entropy", "shapes_geneval", "shapes_grpo", "shapes_smoke"]
    assert sorted([*shapes, *strict, *rules]) == SHAPES
    forms = [f"{name}{form}" for name in PAPERS for form in FORMS]
    assert sorted([*forms, *MORE_ARMS, *RIVALS, *ONE_GPU]) == JANUS_PRO
    assert sorted(LLAMAGEN_ONE_GPU) == LLAMAGEN
    assert sorted([*SHAPES, *JANUS_PRO, *LLAMAGEN, *EMU3]) == RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_opens_with_purpose_hardware_time_expectation_and_command(name):
    text = (importlib.resources.files("stage_rl") / "recipes" / f"{name}.yaml").read_text()
    header = text[: text.index("\nname:")]
    for word in ("Purpose:", "Hardware:", "Time:", "Expected:", f"train {name}"):
        assert word in header


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_named_after_its_file_and_describes_itself_as_a_recipe(name, tmp_path):
    recipe = load_recipe(name)
    assert recipe.name == name
    described = tmp_path / "described.yaml"
    described.write_text(describe(recipe))
    assert resolved_json(load_recipe(described)) == resolved_json(recipe)


@pytest.mark.parametrize("name", SHAPES)
def test_the_parts_of_a_recipe_build(name):
    recipe = load_recipe(name)
    prompts = recipe.prompts.build()
    assert len(prompts) >= recipe.rollout.prompts_per_step
    assert recipe.policy.build(CPU).layout.num_tokens > 0
    for reward in recipe.rewards:
        assert callable(reward.build(CPU))
        assert all(
            field in prompt.metadata for prompt in prompts for field in reward.required_fields
        )


@pytest.mark.parametrize(
    "names",
    [
        ("shapes_geneval", "shapes_entropy", "shapes_grpo"),
        ("shapes_strict", "shapes_strict_entropy", "shapes_strict_grpo"),
    ],
)
def test_the_recipes_differ_from_each_other_in_the_method_only(names):
    full, entropy, grpo = (
        load_recipe(name, ["optimizer.lr=1e-5", "algorithm.beta=0.1", "steps=10", "name=same"])
        for name in names
    )
    assert diff_recipes(full, entropy) == ("algorithm.reweight",)
    assert diff_recipes(entropy, grpo) == ("algorithm.entropy.mode",)


@pytest.mark.parametrize("rule", CREDIT_RULES)
def test_a_recipe_of_a_rule_of_credit_differs_from_plain_grpo_in_that_alone(rule):
    pair = (load_recipe(f"shapes_strict_{name}", ["name=same"]) for name in (rule, "grpo"))
    grpo = {"algorithm.credit", "algorithm.reweight"}
    own = [key for key in diff_recipes(*pair) if not key.startswith("algorithm.credit.")]
    entropy = {"algorithm.entropy.mode", "algorithm.entropy.centred"}
    assert set(own) <= (grpo | entropy if rule == "guidance" else grpo)


@pytest.mark.parametrize("name", JANUS_PRO)
def test_the_policy_of_a_janus_pro_recipe_builds_on_weights_that_are_here(name, tiny_janus_folder):
    recipe = load_recipe(name, [f"policy.path={tiny_janus_folder}"])
    if recipe.policy.lora:
        pytest.importorskip("peft")
    assert recipe.policy.build(CPU).trunk_blocks
    assert size_of(load_recipe(name).policy.path) is not None


@pytest.mark.parametrize("name", LLAMAGEN)
def test_the_policy_of_a_llamagen_recipe_builds_on_weights_that_are_here(
    name, tiny_llamagen_folder
):
    own = ("policy.image_size=null", "policy.text_encoder=null")
    recipe = load_recipe(name, [f"policy.path={tiny_llamagen_folder}", *own])
    assert recipe.policy.build(CPU).trunk_blocks


def test_llamagen_recipes_have_the_settings_of_the_papers_that_trained_it():
    recipes = {name: load_recipe(name) for name in LLAMAGEN}
    for recipe in recipes.values():
        rollout, optimizer = recipe.rollout, recipe.optimizer
        assert (rollout.prompts_per_step, rollout.group_size, rollout.top_k) == (8, 8, 0)
        assert (optimizer.lr, recipe.algorithm.logprobs) == (1e-5, "conditional")
        assert recipe.policy.size().pixels == 256**2
    by_guidance = {recipe.guidance_scale: recipe.algorithm.beta for recipe in recipes.values()}
    assert by_guidance == {4.0: 0.03, 1.0: 0.04}
    pair = (load_recipe(f"llamagen_xl_256_hps{form}", ["name=same"]) for form in ("", "_critical"))
    differing = {".".join(key.split(".")[:2]) for key in diff_recipes(*pair)}
    assert differing == {"algorithm.credit"}


@pytest.mark.parametrize("name", [n for n in [*JANUS_PRO, *LLAMAGEN, *EMU3] if "_geneval" in n])
def test_the_prompts_of_a_geneval_recipe_can_be_judged(name):
    recipe = load_recipe(name, ["prompts.num_prompts=50"])
    check_fields(recipe.rewards, recipe.prompts.build())


@pytest.mark.parametrize("name", PAPERS)
def test_janus_pro_recipes_have_the_settings_of_the_paper(name):
    recipe = load_recipe(name)
    rollout, optimizer = recipe.rollout, recipe.optimizer
    assert (recipe.steps, rollout.group_size, rollout.guidance_scale) == (1600, 8, 5.0)
    assert (optimizer.kind, optimizer.betas, rollout.temperature) == ("adamw", (0.9, 0.999), 1.0)
    expected = (5e-6, 0.03, "reward") if "geneval" in name else (1e-6, 0.01, "none")
    assert (optimizer.lr, recipe.algorithm.beta, recipe.algorithm.entropy.mode) == expected
    # Two rollouts of 8 prompts for each update, or one.
    assert rollout.prompts_per_step == (16 if "hps" in name else 8)


@pytest.mark.parametrize("name", PAPERS)
def test_the_baseline_and_the_release_form_differ_in_the_method_only(name):
    full, grpo, release, grpo_release = (
        load_recipe(f"{name}{form}", ["name=same"]) for form in FORMS
    )
    method = {"algorithm.reweight", "algorithm.entropy.mode"}
    assert set(diff_recipes(full, grpo)) <= method
    assert set(diff_recipes(release, grpo_release)) <= method
    others = [key for key in diff_recipes(full, release) if not key.startswith("algorithm.")]
    assert all(key.startswith(("rewards.", "policy.prompt_format")) for key in others)
    assert release.algorithm.preset == "release"


@pytest.mark.parametrize(
    ("name", "other", "keys"),
    [
        ("7b_geneval_entropy", "7b_geneval", {"algorithm.reweight"}),
        ("1b_geneval_entropy", "1b_geneval", {"algorithm.reweight"}),
        ("1b_hps_gdino_git", "1b_hps_gdino_git_grpo", {"algorithm.reweight"}),
        (
            *("1b_hps_gdino_git", "7b_hps_gdino_git"),
            {"policy.path", "training.activation_checkpointing", "run.save_every"},
        ),
    ],
)
def test_the_other_arms_of_the_paper_differ_in_what_they_are_named_after(name, other, keys):
    pair = (load_recipe(f"janus_pro_{one}", ["name=same"]) for one in (name, other))
    assert set(diff_recipes(*pair)) == keys


@pytest.mark.parametrize(
    ("name", "other", "published"),
    [
        ("1b_geneval_critical", "1b_geneval_grpo", (3e-6, "linear", 0.01, 4)),
        ("7b_geneval_guidance", "7b_geneval", (5e-6, "cosine", 0.03, 16)),
        ("1b_hps_gdino_git_gdpo", "1b_hps_gdino_git_grpo", (1e-6, "linear", 0.01, 8)),
    ],
)
def test_the_recipe_of_a_rival_has_its_published_settings_and_no_others(name, other, published):
    pair = [load_recipe(f"janus_pro_{one}", ["name=same"]) for one in (name, other)]
    recipe, settings = pair[0], pair[0].algorithm
    own = (recipe.optimizer.lr, recipe.optimizer.schedule, settings.beta, recipe.rollout.group_size)
    assert own == published
    assert (recipe.steps, recipe.guidance_scale) == (1600, 5.0)
    method = {"credit", "advantage", "reweight", "beta", "entropy.centred"}
    allowed = {f"algorithm.{key}" for key in method}
    allowed |= {"optimizer.lr", "optimizer.schedule"}
    allowed |= {"rollout.group_size", "rollout.release_cache"}
    keys = {key for key in diff_recipes(*pair) if not key.startswith("algorithm.credit.")}
    assert keys <= allowed


@pytest.mark.parametrize("name", EMU3)
def test_emu3_recipes_draw_as_the_published_code_at_512_pixels(name):
    recipe = load_recipe(name)
    rollout, size = recipe.rollout, recipe.policy.size()
    assert (rollout.guidance_scale, rollout.top_k, rollout.temperature) == (3.0, 2048, 1.0)
    assert (size.image_tokens, size.columns, size.pixels) == (4096, 4159, 512**2)


@pytest.mark.parametrize(("name", "memory_gb"), FOR_ONE_GPU.items())
def test_a_recipe_for_one_gpu_fits_it_by_prediction(name, memory_gb):
    check_memory(load_recipe(name), memory_gb)


@pytest.mark.parametrize("name", [*PAPERS, *RIVALS, "emu3_gen_geneval"])
def test_a_recipe_for_several_gpus_fits_eight_of_80_gb_by_prediction(name):
    check_memory(load_recipe(name), 80, num_processes=8)


def test_the_memory_in_the_table_of_models_is_that_of_the_dry_run():
    text = (Path(__file__).parents[1] / "docs" / "models.md").read_text()
    cells = re.findall(r"`(\w+(?: [\w.]+=\w+)*)`: ((?:\d+\.\d on \d(?:, )?)+)", text)
    assert {name for name, _ in cells} >= {
        *("janus_pro_1b_geneval", "llamagen_xl_256_geneval policy.image_size=512"),
        *(*EMU3, "emu3_gen_geneval policy.image_area=518400"),
    }
    for command, figures in cells:
        name, *overrides = command.split()
        for shown, processes in re.findall(r"([\d.]+) on (\d)", figures):
            plan = plan_of(load_recipe(name, overrides), num_processes=int(processes))
            assert f"{plan.peak / GB:.1f}" == shown, (name, processes)
