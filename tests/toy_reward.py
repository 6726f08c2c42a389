"""A reward whose scores are known from image and prompt, so that a mixed-up answer shows."""

import math
import time
from typing import ClassVar

from stage_rl.rewards.base import RewardConfig, Score

NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class Toy(RewardConfig):
    required_fields: ClassVar[tuple[str, ...]] = ("place",)
    call_s: float = 0.0
    """How long a call takes."""

    def build(self, device):
        def score(images_NHWC, prompts):
            time.sleep(self.call_s)
            return [
                expected(image, prompt) for image, prompt in zip(images_NHWC, prompts, strict=True)
            ]

        return score


class Crowd(RewardConfig):
    """Says how many images of its prompt an image was scored with."""

    whole_groups: ClassVar[bool] = True

    def build(self, device):
        def score(images_NHWC, prompts):
            indices = [prompt.index for prompt in prompts]
            return [Score(indices.count(index), f"of {len(indices)}") for index in indices]

        return score


def expected(image_HWC, prompt):
    """A third of the sum of the pixels; None for every seventh place; errors by the text."""
    if prompt.text == "fails":
        raise ValueError("cannot look at this")
    total = int(image_HWC.long().sum())
    place = prompt.metadata["place"]
    value = None if place % 7 == 3 else NOT_FINITE.get(prompt.text, total / 3)
    return Score(value, f"sum {total} for '{prompt.text}'", {"place": place, "third": total / 3})
