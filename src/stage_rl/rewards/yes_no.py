"""Any image-text-to-text model asked whether an image shows its prompt.

Shape suffixes: N images, H x W pixels, C colour channels, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from stage_rl.errors import WeightsError
from stage_rl.rewards.answers import Answer, answers_from, tokens_of
from stage_rl.rewards.base import Score
from stage_rl.rewards.tiny import TINY
from stage_rl.rewards.tiny_scenes import tiny_vlm
from stage_rl.rewards.weights import DTYPES, load_model, load_part

if TYPE_CHECKING:
    from stage_rl.types import Prompt

YES = ("yes", "Yes", "YES", " yes", " Yes")
NO = ("no", "No", "NO", " no", " No")


class YesNoReward:
    """The probability of yes against no to one question; nothing is sampled."""

    def __init__(
        self, module: nn.Module, processor: Any, *, question: str, batch_size: int = 8
    ) -> None:
        self._module: Any = module
        self._processor = processor
        self._question = question
        self._batch_size = batch_size
        tokenizer = processor.tokenizer
        tokenizer.padding_side = "left"  # the answer follows the last place of every row
        self._yes, self._no = tokens_of(tokenizer, YES), tokens_of(tokenizer, NO)
        takes_rows = "logits_to_keep" in inspect.signature(self._module.forward).parameters
        self._last_row_alone = {"logits_to_keep": 1} if takes_rows else {}

    def __call__(self, images_NHWC: Tensor, prompts: list[Prompt]) -> list[Score]:
        """One score per image; the extra is how much of the model's belief is a yes or a no."""
        questions = [self._question.replace("{prompt}", prompt.text) for prompt in prompts]
        scores = []
        for first in range(0, len(questions), self._batch_size):
            rows = slice(first, first + self._batch_size)
            answers = self._ask(images_NHWC[rows], questions[rows])
            scores += [
                Score(answer.yes, f"{question} {answer.yes:.2f}", {"answered": answer.belief})
                for question, answer in zip(questions[rows], answers, strict=True)
            ]
        return scores

    @torch.inference_mode()
    def _ask(self, images_NHWC: Tensor, questions: Sequence[str]) -> list[Answer]:
        pictures = [Image.fromarray(image) for image in images_NHWC.numpy()]
        inputs = self._processor.apply_chat_template(
            [_turn(picture, text) for picture, text in zip(pictures, questions, strict=True)],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(self._module.device, dtype=self._module.dtype)
        logits_NV = self._module(**inputs, **self._last_row_alone).logits[:, -1]
        return answers_from(logits_NV, self._yes, self._no)


def load_yes_no(
    path: str,
    *,
    question: str,
    batch_size: int = 8,
    dtype: str = "bfloat16",
    device: torch.device | str = "cpu",
) -> YesNoReward:
    """The reward on the model of a folder or hub id; `tiny` is random."""
    if path == TINY:
        module, processor = tiny_vlm()
        nn.Module.to(module, device, DTYPES[dtype])
        return YesNoReward(module, processor, question=question, batch_size=batch_size)
    processor = load_part(AutoProcessor.from_pretrained, path, "the processor")
    if not getattr(processor, "chat_template", None):
        raise WeightsError(f"{path}: its processor has no chat template; write a chat model")
    module = load_model(AutoModelForImageTextToText, path, dtype=dtype, device=device)
    return YesNoReward(module, processor, question=question, batch_size=batch_size)


def _turn(picture: Image.Image, question: str) -> list[dict[str, Any]]:
    """A conversation of one turn: the picture, then the question."""
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]
