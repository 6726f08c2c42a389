"""GIT asked whether each attribute or noun of a prompt is in the image (the VQA reward of T2I-R1).

Shape suffixes: N images, H x W pixels, C colour channels, K questions per image, L text tokens,
R = K x N rows (question by question), D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from transformers import GitForCausalLM

from stage_rl.rewards.answers import Answer, answers_from, tokens_of
from stage_rl.rewards.base import Score
from stage_rl.rewards.pixels import clip_pixels
from stage_rl.rewards.tiny import TINY
from stage_rl.rewards.tiny_scenes import tiny_git, tiny_scene_tokenizer
from stage_rl.rewards.weights import load_model, load_tokenizer

if TYPE_CHECKING:
    from stage_rl.types import Prompt

Compat = Literal["fixed", "release"]


class GitVqa:
    """Answers yes-or-no questions on images."""

    def __init__(self, module: GitForCausalLM, tokenizer: Any, *, batch_size: int = 8) -> None:
        self._module: Any = module
        self._tokenizer = tokenizer
        self._batch_size = batch_size
        self._yes = tokens_of(tokenizer, ("yes",))
        self._no = tokens_of(tokenizer, ("no",))

    def ask(
        self, images_NHWC: Tensor, questions: Sequence[tuple[str, ...]]
    ) -> list[tuple[Answer, ...]]:
        """The answers to the questions on each image, in order."""
        assert len(images_NHWC) == len(questions)
        answers: list[tuple[Answer, ...]] = [()] * len(questions)
        # Images with equally many questions share a batch, in which each is encoded once.
        for count in {len(asked) for asked in questions} - {0}:
            rows = [row for row, asked in enumerate(questions) if len(asked) == count]
            for first in range(0, len(rows), self._batch_size):
                batch = rows[first : first + self._batch_size]
                found = self._ask_batch(images_NHWC[batch], [questions[row] for row in batch])
                for row, answer in zip(batch, found, strict=True):
                    answers[row] = answer
        return answers

    @torch.inference_mode()
    def _ask_batch(
        self, images_NHWC: Tensor, questions: Sequence[tuple[str, ...]]
    ) -> list[tuple[Answer, ...]]:
        side = self._module.config.vision_config.image_size
        pixels = clip_pixels(images_NHWC, side, device=self._module.device)
        # The model repeats the images as a whole, so rows go question by question.
        asked = [question for column in zip(*questions, strict=True) for question in column]
        ids_RL, lengths_R = self._tokens(asked)
        mask_RL = (torch.arange(ids_RL.shape[1]) < lengths_R[:, None]).long()
        hidden_RLD = self._module.git(
            input_ids=ids_RL.to(self._module.device),
            attention_mask=mask_RL.to(self._module.device),
            pixel_values=pixels,
        ).last_hidden_state
        # The image tokens come first; the answer follows the last token of the question.
        last_R = hidden_RLD.shape[1] - ids_RL.shape[1] + lengths_R - 1
        hidden_RD = hidden_RLD[torch.arange(len(asked)), last_R.to(hidden_RLD.device)]
        answers = answers_from(self._module.output(hidden_RD), self._yes, self._no)
        num_images = len(questions)
        return [tuple(answers[image::num_images]) for image in range(num_images)]

    def _tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """ids_RL padded on the right, and how many of each row are real; [CLS] comes first."""
        encoded = self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        rows = [[self._tokenizer.cls_token_id, *ids] for ids in encoded]
        lengths_R = torch.tensor([len(row) for row in rows])
        longest = int(lengths_R.max())
        pad = self._tokenizer.pad_token_id
        return torch.tensor([row + [pad] * (longest - len(row)) for row in rows]), lengths_R


@dataclass(frozen=True)
class GitReward:
    """The mean probability of yes over the attributes of a prompt, else its nouns."""

    model: GitVqa
    compat: Compat = "fixed"

    def __call__(self, images_NHWC: Tensor, prompts: list[Prompt]) -> list[Score]:
        """One score per image; the extra is how much of the model's belief is a yes or a no."""
        questions = [questions_of(prompt.metadata) for prompt in prompts]
        answers = self.model.ask(images_NHWC, questions)
        return [
            score_answers(prompt.metadata, asked, given, compat=self.compat)
            for prompt, asked, given in zip(prompts, questions, answers, strict=True)
        ]


def questions_of(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """What is asked of a prompt's image: nothing where places or numbers are judged."""
    if metadata["task_type"] in ("spatial", "numeracy"):
        return ()
    items = metadata.get("attr_nouns") or metadata["nouns"]
    return tuple(f"{item}?" for item in items)


def score_answers(
    metadata: Mapping[str, Any],
    questions: Sequence[str],
    answers: Sequence[Answer],
    *,
    compat: Compat = "fixed",
) -> Score:
    """The mean share of yes. Without a question the reward does not apply; released: 0 where
    places or numbers are judged, else 1.
    """
    if not questions:
        task = metadata["task_type"]
        released = 0.0 if task in ("spatial", "numeracy") else 1.0
        return Score(released if compat == "release" else None, f"asks nothing of {task} prompts")
    pairs = zip(questions, answers, strict=True)
    why = ", ".join(f"{question} {answer.yes:.2f}" for question, answer in pairs)
    value = sum(answer.yes for answer in answers) / len(answers)
    belief = sum(answer.belief for answer in answers) / len(answers)
    return Score(value, why, {"answered": belief})


def load_git(path: str, *, batch_size: int = 8, device: torch.device | str = "cpu") -> GitVqa:
    """The model of a folder or hub id; `tiny` is random."""
    if path == TINY:
        module = tiny_git()
        nn.Module.to(module, device)
        return GitVqa(module, tiny_scene_tokenizer(), batch_size=batch_size)
    module = load_model(GitForCausalLM, path, device=device)
    return GitVqa(module, load_tokenizer(path), batch_size=batch_size)
