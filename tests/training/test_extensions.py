"""Token credit and loss as functions that a recipe names: built in, and a user's own."""

import sys

import pytest
import torch
from run_files import assert_resumes_to_the_bit, parameters_of, steps_of, untimed

from stage_rl.errors import RecipeError
from stage_rl.training.credit import needs
from stage_rl.training.loop import train

METHODS = '''
import torch

from stage_rl import algorithm
from stage_rl.training.credit import TokenWeights, needs
from stage_rl.training.loss import LossOutputs

SEEN = []


def first_half(inputs, settings):
    """The first rows of an image alone count, twice."""
    rows, columns = inputs.grid
    weight_PGT = torch.zeros_like(inputs.logprobs_PGT)
    weight_PGT[..., : rows // 2 * columns] = 2.0
    return TokenWeights(
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
    metrics = {"similarity/mean": sim_PGT, "mask/mean": mask_PGT}
    kl_PGT = algorithm.kl_weight(sim_PGT)
    return TokenWeights(algorithm.normalize_mask(mask_PGT), kl_PGT, metrics=metrics)


@needs("conditional", "unconditional")
def guided(inputs, settings):
    SEEN.append(inputs)
    return TokenWeights(torch.ones_like(inputs.logprobs_PGT), torch.ones_like(inputs.logprobs_PGT))


def one_number(inputs, settings):
    return TokenWeights(torch.ones(1), torch.ones_like(inputs.logprobs_PGT))


def reinforce(inputs, settings):
    """No ratio at all, and a squared difference for the KL."""
    policy = -(inputs.advantages_PGT * inputs.logprobs_PGT).mean()
    gap_PGT = inputs.logprobs_PGT - inputs.ref_logprobs_PGT
    kl = (inputs.beta_PGT * gap_PGT.square() / 2).mean()
    return LossOutputs(policy + kl, policy, kl, {"kl/largest": gap_PGT.detach().abs().amax()})


def per_token(inputs, settings):
    loss_PGT = -inputs.advantages_PGT * inputs.logprobs_PGT
    return LossOutputs(loss_PGT, loss_PGT.mean(), loss_PGT.mean() * 0)


class NoFunction:
    pass
'''

ONE_RATE = ("optimizer.schedule=constant", "probe.every=0")
OURS = ("algorithm.credit=methods:first_half", "algorithm.loss=methods:reinforce")


@pytest.fixture
def methods(recipe, tmp_path, monkeypatch):
    """A recipe beside a module with methods of a user."""
    (tmp_path / "methods.py").write_text(METHODS)
    monkeypatch.delitem(sys.modules, "methods", raising=False)
    return recipe


def same_parameters(one, other, step):
    left, right = parameters_of(one, step), parameters_of(other, step)
    return all(torch.equal(left[name], right[name]) for name in left)


def test_a_users_credit_and_loss_train_in_any_micro_batches_and_resume_to_the_bit(
    methods, tmp_path
):
    whole = assert_resumes_to_the_bit(methods, tmp_path, *ONE_RATE, *OURS)
    assert not same_parameters(whole, train(methods(*ONE_RATE, "steps=4")), 4)
    pieces = ("training.groups_per_microbatch=1", "steps=1", f"run.dir={tmp_path}/pieces")
    (line,), first = steps_of(train(methods(*ONE_RATE, *OURS, *pieces))), steps_of(whole)[0]
    for name in ("credit/share", "credit/best", "grad/norm", "kl/mean", "loss/total"):
        assert line[name] == pytest.approx(first[name], rel=1e-4, abs=1e-6), name
    assert first["credit/share"] == 0.5
    assert first["kl/largest"] == 0
    assert "similarity/mean" not in first


def test_uniform_credit_is_stage_without_its_reweighting(methods, tmp_path):
    """That is plain GRPO."""
    grpo = train(methods(*ONE_RATE, "algorithm.reweight=none", f"run.dir={tmp_path}/none"))
    uniform = train(methods(*ONE_RATE, "algorithm.credit=uniform"))
    assert same_parameters(grpo, uniform, 4)
    expected = untimed(steps_of(grpo))
    for line in expected:
        del line["similarity/mean"], line["mask/mean"]
    assert untimed(steps_of(uniform)) == expected


def test_stage_is_written_as_any_user_would_write_it(methods, tmp_path):
    stage = train(methods(*ONE_RATE, f"run.dir={tmp_path}/stage"))
    by_hand = train(methods(*ONE_RATE, "algorithm.credit=methods:stage_by_hand"))
    assert same_parameters(stage, by_hand, 4)
    assert untimed(steps_of(stage)) == untimed(steps_of(by_hand))


@pytest.mark.parametrize("logprobs", ["conditional", "guided"])
def test_a_credit_function_gets_the_log_probabilities_that_it_needs(methods, logprobs):
    train(methods("steps=1", "algorithm.credit=methods:guided", f"algorithm.logprobs={logprobs}"))
    (seen,) = sys.modules["methods"].SEEN
    scored, cond, uncond = seen.logprobs_PGT, seen.cond_logprobs_PGT, seen.uncond_logprobs_PGT
    assert torch.equal(scored, cond) == (logprobs == "conditional")
    assert (cond - uncond).abs().max() > 1e-3
    assert not uncond.requires_grad


def test_an_unknown_need_is_refused():
    with pytest.raises(ValueError, match="'embeddings' is none of conditional, unconditional"):
        needs("embeddings")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("credit=stag", r"algorithm\.credit: unknown credit kind 'stag'; did you mean 'stage'"),
        ("loss=ppo", r"algorithm\.loss: .*'ppo'; write one of: grpo, or module:function"),
        ("loss=no_such:loss", r"algorithm\.loss: cannot import 'no_such'"),
        ("credit=methods:lost", r"algorithm\.credit: 'methods' has no 'lost'; .* of a function"),
        ("loss=methods:NoFunction", r"algorithm\.loss: 'methods:NoFunction' is no function"),
    ],
)
def test_a_wrong_name_shows_when_the_recipe_is_read(methods, override, message):
    with pytest.raises(RecipeError, match=message):
        methods(f"algorithm.{override}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("credit=methods:one_number", r"policy_PGT of shape \(1,\); return .* \(2, 3, 16\)"),
        ("loss=methods:per_token", r"total of shape \(2, 3, 16\); return its mean"),
    ],
)
def test_what_a_function_must_return_is_said(methods, override, message):
    with pytest.raises(RecipeError, match=message):
        train(methods(f"algorithm.{override}"))
