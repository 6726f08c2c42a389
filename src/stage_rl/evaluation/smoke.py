"""A smoke run: prompts of the shapes world in the form of every benchmark, and made-up scores.

It tries the whole way in seconds and without any download; the figures mean nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stage_rl.prompts.files import as_prompts, read_records
from stage_rl.rewards.base import Reward, RewardConfig, Score
from stage_rl.rewards.vlm.chat import Reply
from stage_rl.rewards.vlm.judge import JudgeReward, JudgeRewardConfig, Request
from stage_rl.types import Prompt

IMAGES = 2
"""Images of each prompt where the benchmark has as many, or of each task where those count."""


def smoke_prompts(prompt_set: str) -> tuple[Prompt, ...]:
    """Two or three prompts for each row of the tables of a prompt set."""
    file = Path(__file__).with_name("smoke_prompts") / f"{prompt_set}.jsonl"
    return as_prompts(record for _, record in read_records(file))


def made_up_reward(name: str, verdicts: tuple[str, ...], config: RewardConfig) -> Reward:
    """Random scores; of a judge the answers are, and what reads them is the judge's own."""
    if isinstance(config, JudgeRewardConfig):
        return MadeUpJudge(config)
    return MadeUpReward(name, verdicts)


@dataclass(frozen=True)
class MadeUpReward:
    """Random scores in [0, 1) and verdicts that depend on scorer, image and prompt alone.

    Each question of a prompt has a verdict too, and some words of its text are read.
    """

    name: str
    verdicts: tuple[str, ...] = ()
    """Extras that are 0 or 1."""

    def __call__(self, images_NHWC: Tensor, prompts: list[Prompt]) -> list[Score]:
        scores = []
        for image_HWC, prompt in zip(images_NHWC, prompts, strict=True):
            rng = _rng(image_HWC, f"{self.name} {prompt.text}")
            questions = range(len(prompt.metadata.get("questions", ())))
            names = (*self.verdicts, *(f"q{number}" for number in questions))
            extras = {name: float(rng.integers(2)) for name in names}
            words = str(prompt.metadata.get("fields", {}).get("text", "")).split()
            replies = tuple(word for word in words if rng.integers(2))
            scores.append(Score(float(rng.random()), "made up", extras, replies))
        return scores


class MadeUpChat:
    """Probabilities at random."""

    @property
    def tokenizer(self) -> Any:
        """A token for each text, of 64."""
        return lambda text, **_: {"input_ids": [hashlib.sha256(text.encode()).digest()[0] % 64]}

    def next_logits_NV(self, images_NHWC: Tensor, conversations: Sequence[Any]) -> Tensor:
        """Normal numbers."""
        rows = zip(images_NHWC, conversations, strict=True)
        return torch.stack(
            [torch.from_numpy(_rng(*row).standard_normal(64)) for row in rows]
        ).float()

    def replies(
        self, images_NHWC: Tensor, conversations: Sequence[Any], *, max_new_tokens: int
    ) -> list[Reply]:
        """None: what can be read depends on the questions."""
        raise AssertionError("a made-up judge writes its own replies")


class MadeUpJudge(JudgeReward):
    """Answers at random in the form that its mode asks for, and now and then in none."""

    def __init__(self, settings: JudgeRewardConfig) -> None:
        super().__init__(MadeUpChat(), settings)

    def _replies(
        self, images_RHWC: Tensor, requests: Sequence[Request], longest: int
    ) -> list[Reply]:
        """One of ten is cut off and unreadable; another time it is not."""
        replies = []
        for image_HWC, one in zip(images_RHWC, requests, strict=True):
            rng = _rng(image_HWC, f"{one.text} {longest}")
            verdicts = [int(value) for value in rng.integers(2, size=len(one.questions))]
            forms = {
                "one_reply_lines": "\n".join("yes" if value else "no" for value in verdicts),
                "binary_lists": f"<analysis>{verdicts}</analysis><score>{verdicts}</score>",
                "score_line": f"Score: {rng.integers(2)}",
                "reply_equals": str(rng.choice(["Yes", "No"])),
                "read_text": str(rng.choice(["circle", "red square", "No text recognized."])),
            }
            is_cut = bool(rng.random() <= 0.1)
            replies.append(Reply("" if is_cut else forms[self._settings.mode], is_cut))
        return replies


def _rng(image_HWC: Tensor, text: Any) -> np.random.Generator:
    """A stream that image and text alone decide on."""
    digest = hashlib.sha256(image_HWC.numpy().tobytes() + str(text).encode()).digest()
    return np.random.default_rng(list(digest))
