"""UnifiedReward 2.0 (Wang et al. 2025, arXiv 2503.05236): a model writes three marks for an image.

Shape suffixes: N images, H x W pixels, C colour channels.
"""

from __future__ import annotations

import re

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from stage_rl.rewards.base import ReferenceCase, Reward, RewardConfig, Score, cat_or_cup_cases
from stage_rl.rewards.pretrained import batches, on_jpeg
from stage_rl.rewards.vlm.chat import ChatModel, Dtype, published_template, question
from stage_rl.types import Prompt

MARKS = ("alignment", "coherence", "style")

LOWEST, HIGHEST = 1, 5
"""Of each mark; models write decimals."""

MAX_NEW_TOKENS = 128
"""Three lines with all digits of a double."""


class UnifiedRewardConfig(RewardConfig):
    """UnifiedReward 2.0: the mean of the marks for alignment, coherence and style, 0.2 to 1."""

    path: str = "CodeGoat24/UnifiedReward-2.0-qwen3vl-8b"
    """Folder or hub id of a model of version 2.0; version 1 was asked otherwise."""
    dtype: Dtype = "bfloat16"
    """Precision of the model."""
    batch_size: PositiveInt = 8
    """Images at a time."""
    jpeg_quality: int | None = Field(default=95, ge=1, le=100)
    """Show the images as JPEG of this quality, as the authors do; null: as drawn."""

    def build(self, device: torch.device) -> Reward:
        model = ChatModel.load(self.path, dtype=self.dtype, device=device)
        return on_jpeg(UnifiedReward(model, self.batch_size), self.jpeg_quality)

    def reference_cases(self) -> tuple[ReferenceCase, ...]:
        return cat_or_cup_cases()


class UnifiedReward:
    """Reads three marks from one reply; the most probable one, so asking again changes nothing."""

    def __init__(self, model: ChatModel, batch_size: int) -> None:
        self._model = model
        self._batch_size = batch_size

    def __call__(self, images_NHWC: Tensor, prompts: list[Prompt]) -> list[Score]:
        """One score per image: the mean of the marks over 5; the extras are the marks."""
        scores = []
        for images, asked in batches(images_NHWC, prompts, self._batch_size):
            texts = [published_template("unified_reward_2", prompt=one.text) for one in asked]
            replies = self._model.replies(
                images, [question(text) for text in texts], max_new_tokens=MAX_NEW_TOKENS
            )
            scores += [score_reply(reply.text) for reply in replies]
        return scores


def score_reply(reply: str) -> Score:
    """The marks of a reply; without a value where one is missing or not from 1 to 5."""
    marks = {}
    for name in MARKS:
        found = re.search(rf"(?i){name} score[^:\n]*:[*\s]*(\d+(?:\.\d+)?)", reply)
        if found is None or not LOWEST <= float(found[1]) <= HIGHEST:
            return Score(None, f"no {name} score from 1 to 5 in '{reply[:60]}'", replies=(reply,))
        marks[name] = float(found[1])
    said = ", ".join(f"{name} {mark:.2f}" for name, mark in marks.items())
    return Score(sum(marks.values()) / len(marks) / HIGHEST, said, marks, (reply,))
