"""The overlap benchmark, on a model of a few thousand parameters."""

import pytest
import torch

from stage_rl.bench import reward_overlap


def test_hidden_is_what_the_step_does_not_wait_for(tiny_shapes_folder):
    result = reward_overlap.run(
        model=str(tiny_shapes_folder), num_prompts=2, group_size=2, lengths=(1.0, 20.0), rounds=1
    )
    figures = result.measures
    for length in ("1x", "20x"):
        waited = figures[f"{length}_wait_ms"] / figures[f"{length}_reward_ms"]
        assert figures[f"{length}_hidden"] == pytest.approx(1 - waited)
    # A reward much longer than the reference pass cannot hide behind it.
    assert figures["20x_hidden"] < 0.5
    assert figures["20x_reward_ms"] >= 20 * figures["reference_ms"]
    assert len(result.table) == 1 + 2


@pytest.mark.parametrize(
    ("hidden", "length", "reached"), [(0.8, "1", True), (0.79, "1", False), (0.9, "2", None)]
)
def test_the_bar_holds_for_a_reward_as_long_as_the_reference_pass(hidden, length, reached):
    slow = {"time/step_s": 2.0, "reward_s": 0.1, "time/judge_wait_s": 0.1 * (1 - hidden) - 1e-12}
    result = reward_overlap._result({"0": slow | {"time/step_s": 1.95}, length: slow}, 100.0)
    assert result.reached is reached
    # The step is 0.05 s longer by a reward of 0.1 s.
    assert result.measures[f"{length}x_hidden_by_step"] == pytest.approx(0.5)
    assert result.headline.startswith(f"{hidden:.0%} of a reward of 100 ms is hidden")
    assert result.measures[f"{length}x_hidden_by_step"] == pytest.approx(0.5)


def test_the_slow_reward_waits_and_scores_brightness():
    reward = reward_overlap.SlowReward(0.01)
    images = torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(2, 2, 2, 3)
    assert [score.value for score in reward(images, [])] == [0.0, 1.0]
    assert reward.took_s >= 0.01
