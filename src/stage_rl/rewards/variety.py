"""How much the images of one prompt differ from each other, to CLIP.

Shape suffixes: N images, H x W pixels, C colour channels, G images of a prompt, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from stage_rl.rewards.base import Score
from stage_rl.rewards.clip import Clip
from stage_rl.types import Prompt


@dataclass(frozen=True)
class VarietyReward:
    """1 - cosine of an image to the others of its prompt, in the mean over them.

    The mean over a prompt's images is that over its pairs. Each call needs all images of a prompt;
    to an image without others the reward does not apply.
    """

    clip: Clip

    def __call__(self, images_NHWC: Tensor, prompts: list[Prompt]) -> list[Score]:
        """One score per image, in [0, 2]."""
        vectors_ND = self.clip.images_ND(images_NHWC)
        groups: dict[int, list[int]] = {}
        for place, prompt in enumerate(prompts):
            groups.setdefault(prompt.index, []).append(place)
        scores = [Score(None, "no other image of its prompt")] * len(prompts)
        for places in groups.values():
            if len(places) > 1:
                for place, distance in zip(places, _distances(vectors_ND[places]), strict=True):
                    scores[place] = Score(distance, f"{distance:.3f} from the others")
        return scores


def _distances(vectors_GD: Tensor) -> list[float]:
    """Of each unit vector, 1 - the mean cosine to the others."""
    cosine_GG = vectors_GD @ vectors_GD.T
    others_G = (cosine_GG.sum(1) - cosine_GG.diagonal()) / (len(vectors_GD) - 1)
    return (1 - others_G).tolist()
