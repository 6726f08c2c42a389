"""What the protocol allows beyond Janus, on a family of the tests."""

import policy_contract
import pytest
import torch
from fake_family import COORDS, EncodedFakePolicy, FakePolicy, GuidedFakePolicy
from pydantic import ValidationError

from stage_rl.api import evaluate, sample
from stage_rl.config import explain, load_recipe
from stage_rl.errors import InputError
from stage_rl.evaluation.suites import PromptSet, Scorer, Suite
from stage_rl.policies.base import PolicyConfig
from stage_rl.policies.digest import base_digest
from stage_rl.recipe import Recipe
from stage_rl.rollout.engine import Engine
from stage_rl.rollout.sample import rollout
from stage_rl.rollout.sampling import Sampling
from stage_rl.types import Prompt

SHORT, LONG = Prompt("a red square", 0), Prompt("a blue circle and two red square", 1)


@pytest.fixture
def policy():
    return FakePolicy()


@pytest.mark.parametrize("family", [FakePolicy, GuidedFakePolicy, EncodedFakePolicy])
def test_the_families_keep_the_contract(family):
    policy_contract.check(family(), SHORT, LONG)


def test_the_second_axis_changes_what_follows(policy):
    tokens_NT = torch.arange(6)[None]
    with torch.no_grad():
        before_NTD = policy.hidden(policy.encode([SHORT]), tokens_NT)
        policy.layout.coords_UA[1, 1] = 4
        moved_NTD = policy.hidden(policy.encode([SHORT]), tokens_NT)
        policy.layout.coords_UA[1, 1] = COORDS[1][1]
    # Column 1 is an input of token 2.
    assert torch.equal(moved_NTD[:, :2], before_NTD[:, :2])
    assert not torch.allclose(moved_NTD[:, 2], before_NTD[:, 2])


def test_guidance_is_refused(policy):
    with pytest.raises(InputError, match="no unconditional rows; write 1"):
        rollout(Engine(policy), [SHORT], group_size=2, sampling=Sampling(5.0), seed=0, step=0)


def test_weights_outside_of_the_module_are_part_of_the_digest():
    one, other = EncodedFakePolicy(), EncodedFakePolicy()
    other.frozen_modules()["text_encoder"].load_state_dict(
        one.frozen_modules()["text_encoder"].state_dict()
    )
    assert base_digest(one) == base_digest(other) != base_digest(FakePolicy())
    with torch.no_grad():
        other.frozen_modules()["text_encoder"].weight[0] += 1
    assert base_digest(one) != base_digest(other)


SUITE = Suite(
    name="words",
    prompt_set=PromptSet("words", lambda: (SHORT, LONG), has_smoke_prompts=False),
    scorers={"brightness": Scorer({"kind": "loop_parts:Brightness"})},
    task_of=lambda prompt: "all",
    by_task=("brightness",),
)


@pytest.mark.parametrize(
    ("family", "own", "top_k"), [(FakePolicy, 1.0, 0), (GuidedFakePolicy, 3.0, 2)]
)
def test_how_to_draw_is_the_family_s_where_nobody_says_it(family, own, top_k, tmp_path):
    policy, texts = family(), [SHORT.text, LONG.text]
    drawn = sample(policy, texts, seed=1)
    said = sample(policy, texts, seed=1, guidance_scale=own, top_k=top_k)
    assert torch.equal(drawn.tokens_NT, said.tokens_NT)
    other = sample(policy, texts, seed=1, guidance_scale=own, top_k=1)
    assert not torch.equal(drawn.tokens_NT, other.tokens_NT)
    results = evaluate(policy, f"{__name__}:SUITE", out=tmp_path)
    assert (results.setup.guidance_scale, results.setup.top_k) == (own, top_k)
    plain = evaluate(policy, f"{__name__}:SUITE", out=tmp_path / "plain", top_k=0)
    assert plain.setup.top_k == 0


class Unguided(PolicyConfig):
    policy_class = FakePolicy

    def build(self, device):
        return FakePolicy()


def test_a_recipe_of_a_family_without_guidance_needs_none_and_refuses_other(tiny_recipe):
    recipe = load_recipe(tiny_recipe)
    given = {name: getattr(recipe, name) for name in ("name", "steps", "prompts", "rewards")}
    given["policy"] = Unguided()
    for settings in ({}, {"guidance_scale": 1.0}):
        assert Recipe.model_validate(given | {"rollout": settings}).guidance_scale == 1
    for section in ("rollout", "evaluation"):
        with pytest.raises(ValidationError, match="has no unconditional rows; write 1") as caught:
            Recipe.model_validate(given | {section: {"guidance_scale": 2.0}})
        assert explain(caught.value).startswith(f"{section}.guidance_scale: ")
