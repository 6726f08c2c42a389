"""The public names."""

import pytest

import stage_rl

PUBLIC = {
    *("train", "evaluate", "sample", "load", "score", "export", "load_recipe"),
    *("evaluate_against", "evaluate_understanding", "Request"),
    *("Recipe", "PolicyConfig", "RewardConfig"),
    *("Policy", "Reward", "Score", "Rollout", "Prompt"),
    "StageError",
    "algorithm",
}


def test_the_public_names_are_pinned_and_each_is_what_it_says():
    assert set(stage_rl.__all__) == PUBLIC
    assert set(dir(stage_rl)) == PUBLIC
    for name in PUBLIC:
        assert getattr(stage_rl, name).__name__.rpartition(".")[2] == name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = stage_rl.trian
