"""Sampler against trainer: the figures, both distributions, truncated importance sampling."""

import math

import pytest
import torch
from run_files import steps_of

from stage_rl.algorithm import truncated_importance
from stage_rl.errors import RecipeError
from stage_rl.recipe import AlgorithmConfig
from stage_rl.rollout.engine import Engine
from stage_rl.rollout.sample import rollout
from stage_rl.rollout.sampling import Sampling
from stage_rl.training.loop import train
from stage_rl.training.metrics import mismatch_metrics, trained_mismatch, untrained_mismatch
from stage_rl.training.update import Precision, micro_batches
from stage_rl.types import Measured, Prompt, Rollout

CPU = torch.device("cpu")
NAMES = ("logprobs", "guided_logprobs")
FIGURES = ("mean", "max", "weight")


def test_the_figures_by_hand():
    # Differences ln 2 and -ln 4: mean ln 8 / 2, largest ln 4; weights 2 and 1/4, mean 1.125.
    trainer, sampler = torch.tensor([[math.log(0.5), -3.0]]), torch.tensor([[math.log(0.25), -3.0]])
    sampler[0, 1] += math.log(4)
    numbers = mismatch_metrics(trainer, sampler, "guided")
    assert numbers == pytest.approx(
        {
            "mismatch/guided_logprobs_mean": math.log(8) / 2,
            "mismatch/guided_logprobs_max": math.log(4),
            "mismatch/guided_logprobs_weight": 1.125,
        }
    )


def test_importance_weights_are_capped_constants():
    logprobs = torch.tensor([math.log(0.5), math.log(0.1)], requires_grad=True)
    weights = truncated_importance(logprobs, torch.tensor([math.log(0.1), math.log(0.2)]), 2.0)
    # 0.5 / 0.1 = 5, capped at 2; 0.1 / 0.2 = 0.5
    assert weights.tolist() == pytest.approx([2.0, 0.5])
    assert not weights.requires_grad


def test_the_share_of_capped_weights_is_logged_where_they_are_used():
    sampler = torch.log(torch.tensor([[0.1, 0.2, 0.5, 0.5]]))
    measured = Measured(torch.log(torch.tensor([[0.5, 0.1, 0.5, 0.5]])), torch.zeros(1, 4))
    drawn = Rollout((Prompt("a"),), 1, torch.zeros(1, 4), torch.zeros(1), sampler)
    plain = trained_mismatch(measured, drawn, AlgorithmConfig())
    assert "mismatch/capped" not in plain
    truncated = AlgorithmConfig(importance_sampling="truncated", importance_cap=2.0)
    # one of four weights, 5, is above 2
    assert trained_mismatch(measured, drawn, truncated)["mismatch/capped"] == 0.25


def test_a_rollout_without_log_probabilities_has_no_mismatch():
    measured = Measured(torch.zeros(1, 4), torch.zeros(1, 4))
    drawn = Rollout((Prompt("a"),), 1, torch.zeros(1, 4), torch.zeros(1))
    assert trained_mismatch(measured, drawn, AlgorithmConfig()) == {}


def untrained(policy, sampling, logprobs="conditional", num_images=2):
    prompts = (Prompt("a red circle", 0), Prompt("a star", 1))
    drawn = rollout(Engine(policy), prompts, group_size=3, sampling=sampling, seed=0, step=0)
    batch = next(micro_batches(drawn, None, CPU))
    precision = Precision(scoring=sampling.scoring(logprobs))
    return untrained_mismatch(policy, batch, precision, sampling=sampling, num_images=num_images)


@pytest.mark.parametrize(
    ("logprobs", "name"), [("conditional", "guided_logprobs"), ("guided", "logprobs")]
)
def test_the_distribution_that_is_not_trained_is_measured_too(tiny_janus, logprobs, name):
    numbers = untrained(tiny_janus, Sampling(3.0, 0.9), logprobs, num_images=100)
    assert set(numbers) == {f"mismatch/{name}_{figure}" for figure in FIGURES}
    assert 0 < numbers[f"mismatch/{name}_max"] < 1e-3
    assert numbers[f"mismatch/{name}_weight"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("sampling", "num_images"),
    [
        (Sampling(1.0, 1.0), 2),  # one distribution
        (Sampling(3.0, 1.0, top_k=5), 2),  # sampled from a truncated one
        (Sampling(3.0, 1.0), 0),
    ],
)
def test_nothing_is_measured_where_there_is_nothing_to_compare(tiny_janus, sampling, num_images):
    assert untrained(tiny_janus, sampling, num_images=num_images) == {}


@pytest.mark.parametrize("logprobs", ["conditional", "guided", "guided_detached"])
def test_a_run_logs_both_distributions_in_every_form(recipe, logprobs):
    run = train(recipe("steps=2", "probe.every=2", f"algorithm.logprobs={logprobs}"))
    for line in steps_of(run):
        for name in NAMES:
            assert 0 < line[f"mismatch/{name}_max"] < 1e-3
            assert line[f"mismatch/{name}_mean"] <= line[f"mismatch/{name}_max"]
        assert line["grad/norm"] > 0
    # Policy and reference are the same at first, under either distribution.
    assert steps_of(run)[0]["entropy/gap"] == 0
    assert steps_of(run)[0]["kl/mean"] == 0


def test_weights_near_1_change_nothing_and_a_low_cap_shrinks_the_gradient(recipe, tmp_path):
    plain = "algorithm.importance_sampling=none", "algorithm.importance_sampling=truncated"
    low = (*plain[1:], "algorithm.importance_cap=0.5")
    norms, capped = [], []
    for number, overrides in enumerate((plain[:1], plain[1:], low)):
        settings = ("steps=1", "probe.every=0", "algorithm.beta=0", f"run.dir={tmp_path}/{number}")
        line = steps_of(train(recipe(*settings, *overrides)))[0]
        norms.append(line["grad/norm"])
        capped.append(line.get("mismatch/capped"))
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)
    # Every weight is the cap, 0.5: half the gradient.
    assert norms[2] == pytest.approx(norms[0] / 2, rel=1e-3)
    assert capped == [None, 0.0, 1.0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.top_k=5"], r"rollout\.top_k: guided log-probabilities .* write 0, or"),
        (["rollout.top_p=0.9"], r"rollout\.top_p: guided log-probabilities .* write 1, or"),
        # Scale and temperature of the scores are the rollout's: there is no key to differ by.
        (["algorithm.guidance_scale=3"], "unknown key; did you mean 'rollout.guidance_scale'"),
        (["algorithm.temperature=0.5"], "unknown key; did you mean 'rollout.temperature'"),
    ],
)
def test_scores_of_another_distribution_than_the_sampled_are_refused(recipe, overrides, message):
    with pytest.raises(RecipeError, match=message):
        recipe("algorithm.logprobs=guided", *overrides)
