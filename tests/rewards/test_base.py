"""The order of reference images: what passes, what is refused, and the drawn images."""

import math
import threading

import pytest
import torch

from stage_rl.errors import RewardError
from stage_rl.rewards.base import RewardConfig, Score, shape_cases, shape_image
from stage_rl.rewards.check import check_reward, require_order
from stage_rl.rewards.geneval import GenEvalRewardConfig
from stage_rl.rewards.judge import WeightedReward, build_reward
from stage_rl.shapes.detector import ShapesDetectorConfig


class ColourConfig(RewardConfig):
    def build(self, device):
        return redness_where_red_is_asked_for

    def reference_cases(self):
        red, blue = ("red", "square", "blue", "square"), ("blue", "circle", "red", "circle")
        return shape_cases((red, blue))


def redness_where_red_is_asked_for(images_NHWC, prompts):
    """Mean of red less blue, with the sign the prompt asks for."""
    red_N = (images_NHWC[..., 0].float() - images_NHWC[..., 2].float()).mean((1, 2)).tolist()
    signs = [1 if "red" in prompt.text else -1 for prompt in prompts]
    return [Score(sign * red, "") for sign, red in zip(signs, red_N, strict=True)]


def test_a_reward_in_the_right_order_or_without_cases_passes():
    item = build_reward(ColourConfig(), torch.device("cpu"))
    outcomes = check_reward(ColourConfig(), item)
    assert [outcome.is_right for outcome in outcomes] == [True, True]
    require_order(ColourConfig(), item)
    require_order(GenEvalRewardConfig(detector=ShapesDetectorConfig()), item)


def test_a_reward_that_overlooks_the_prompt_is_refused_with_the_pair_and_the_way_out():
    def red(images_NHWC, prompts):
        return [Score(float(image[192, 192, 0]), "") for image in images_NHWC]

    with pytest.raises(RewardError) as caught:
        require_order(ColourConfig(name="mine"), WeightedReward("mine", 1.0, red))
    text = str(caught.value)
    assert "'mine': 1 of 2 reference pairs" in text
    assert "'a blue circle': a blue circle against a red circle: 0.0000 against 255.0000" in text
    assert "self_test: false" in text


@pytest.mark.parametrize("value", [0.5, None])
def test_equal_and_absent_scores_are_the_wrong_order(value):
    item = WeightedReward("mine", 1.0, lambda images, prompts: [Score(value, "why")] * 2)
    outcomes = check_reward(ColourConfig(), item)
    assert [outcome.is_right for outcome in outcomes] == [False, False]


def raises(images_NHWC, prompts):
    raise OSError("no such device")


def hangs(images_NHWC, prompts):
    threading.Event().wait(60)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (raises, r"reward 'mine': failed: OSError: no such device \(test_base\.py:\d+\); mend it"),
        (hangs, r"reward 'mine': gave no answer for 0\.1 s"),
        (lambda images, prompts: [0.5, 0.5], "reward 'mine': returned a list of float; return a"),
        (lambda images, prompts: [Score(math.nan, "why")] * 2, r"reward 'mine': gave nan \(why\)"),
    ],
)
def test_a_reward_that_cannot_score_its_reference_images_is_one_line(reward, message):
    item = WeightedReward("mine", 1.0, reward, timeout_s=0.1)
    with pytest.raises(RewardError, match=message):
        require_order(ColourConfig(name="mine"), item)


def test_a_reward_that_cannot_be_built_is_one_line():
    class Broken(ColourConfig):
        def build(self, device):
            raise KeyError("weights")

    message = r"reward 'mine': could not be built: KeyError: 'weights' \(test_base\.py:\d+\)"
    with pytest.raises(RewardError, match=message):
        build_reward(Broken(name="mine"), torch.device("cpu"))


def test_shapes_cover_the_middle_of_a_white_image():
    images = [shape_image(shape, "red") for shape in ("square", "circle", "triangle")]
    for image in images:
        assert image.getpixel((192, 211)) == (255, 0, 0)
        assert image.getpixel((20, 20)) == (255, 255, 255)
    # only the square reaches the corner of the middle half
    assert [image.getpixel((100, 100)) == (255, 0, 0) for image in images] == [True, False, False]


def test_images_of_a_case_come_as_rewards_get_them():
    images_NHWC = shape_cases()[0].images_NHWC()
    assert images_NHWC.dtype == torch.uint8
    assert images_NHWC.shape == (2, 384, 384, 3)
    assert images_NHWC[:, 192, 192].tolist() == [[255, 0, 0], [0, 0, 255]]
