"""What a recipe asks of its evaluations."""

import hashlib
import json

import pytest

from stage_rl.config import load_recipe
from stage_rl.evaluation.request import asked_of, evaluation_of, recipe_request
from stage_rl.evaluation.suites import find_suite
from stage_rl.policies.llamagen import LlamaGenConfig
from stage_rl.recipe import EvaluationConfig
from stage_rl.training.monitor import validation_hash8


@pytest.mark.parametrize(
    ("written", "drawn"),
    [
        ([], (4, 0)),
        (["rollout.guidance_scale=3", "rollout.top_k=9"], (3, 9)),
        (["rollout.top_k=9", "evaluation.top_k=0"], (4, 0)),
        (["evaluation.guidance_scale=2", "evaluation.top_k=1000"], (2, 1000)),
    ],
)
def test_an_evaluation_draws_as_the_rollout_where_it_does_not_say(written, drawn):
    # The family itself would draw with 7.5 from the 1,000 likeliest tokens.
    recipe = load_recipe("llamagen_xl_256_geneval", ["evaluation={every: 5}", *written])
    evaluation = evaluation_of(recipe)
    policy = LlamaGenConfig.policy_class
    for request in (recipe_request(evaluation), recipe_request(evaluation, validation=True)):
        sampling = request.sampling(find_suite(evaluation.benchmark), policy)
        assert (sampling.guidance_scale, sampling.top_k) == drawn
    asked = asked_of(evaluation)
    assert (asked["guidance_scale"], asked["top_k"]) == drawn


@pytest.mark.parametrize(
    ("name", "same", "other"),
    [
        ("shapes_geneval", "rollout.top_k=0", "rollout.top_k=9"),
        ("llamagen_xl_256_geneval", "evaluation.top_k=1000", "rollout.top_k=0"),
        ("emu3_gen_geneval", "evaluation.top_k=2048", "evaluation.top_k=0"),
    ],
)
def test_scores_of_former_versions_count_where_they_were_drawn_alike(name, same, other):
    # They had no top_k, and drew as the family does.
    section = {"every": 5, "guidance_scale": 2.0}
    values = EvaluationConfig.model_validate(section).model_dump(mode="json")
    for key in ("every", "data", "seed", "images_per_task", "top_k"):
        del values[key]
    former = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]
    written = "evaluation={every: 5, guidance_scale: 2.0}"
    hashes = [validation_hash8(load_recipe(name, [written, more])) for more in (same, other)]
    assert hashes[0] == former != hashes[1]


def test_how_a_validation_draws_decides_what_its_score_is_compared_with():
    hashes = [
        validation_hash8(load_recipe("shapes_geneval", ["evaluation.every=5", *more]))
        for more in ([], ["evaluation.top_k=0"], ["rollout.top_k=9"], ["evaluation.top_k=9"])
    ]
    assert hashes[0] == hashes[1] != hashes[2] == hashes[3]
