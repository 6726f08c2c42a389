"""GIT asked whether each attribute or noun of a prompt is in the image (the VQA reward of T2I-R1).

Shape suffixes: N images, H x W pixels, C colour channels, K questions per image, L text tokens,
R = K x N rows (question by question), D width, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from PIL import Image
from pydantic import model_validator
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor, GitForCausalLM

from stage_rl.errors import WeightsError
from stage_rl.rewards.base import ReferenceCase, RewardConfig, Score
from stage_rl.rewards.pretrained import (
    DTYPES,
    TINY,
    clip_pixels,
    load_model,
    load_part,
    load_tokenizer,
)
from stage_rl.rewards.selftest import _cat_or_cup
from stage_rl.rewards.tiny import tiny_git, tiny_scene_tokenizer, tiny_vlm
from stage_rl.settings import Count, complaint
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


# Yes or no, read off a language model's next token.
#
# Shape suffixes: R rows, V vocabulary.


@dataclass(frozen=True)
class Answer:
    """What a model thinks of one question on one image."""

    yes: float
    """P(yes) / (P(yes) + P(no)), in [0, 1]."""
    belief: float
    """P(yes) + P(no): near 0 where the model would have said something else."""


def answers_from(logits_RV: Tensor, yes: Sequence[int], no: Sequence[int]) -> list[Answer]:
    """The answer of each row, from the logits of the next token and the tokens of either word."""
    logprobs_RV = logits_RV.float().log_softmax(-1)
    yes_R = logprobs_RV[:, list(yes)].logsumexp(-1)
    no_R = logprobs_RV[:, list(no)].logsumexp(-1)
    # In logarithms, so that two tiny probabilities still have a ratio.
    shares = (yes_R - no_R).sigmoid().tolist()
    beliefs = (yes_R.exp() + no_R.exp()).tolist()
    return [Answer(share, belief) for share, belief in zip(shares, beliefs, strict=True)]


def tokens_of(tokenizer: Any, spellings: Sequence[str]) -> list[int]:
    """The tokens of those spellings of a word that are one token; a WeightsError without any."""
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in spellings]
    unknown = tokenizer.unk_token_id
    tokens = sorted({ids[0] for ids in encoded if len(ids) == 1 and ids[0] != unknown})
    if not tokens:
        raise WeightsError(
            f"the tokenizer has no token '{spellings[0]}'; write a model that answers by it"
        )
    return tokens


# Any image-text-to-text model asked whether an image shows its prompt.
#
# Shape suffixes: N images, H x W pixels, C colour channels, V vocabulary.


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


class GitRewardConfig(RewardConfig):
    """GIT asked for each attribute or noun of a prompt whether it is there."""

    required_fields: ClassVar[tuple[str, ...]] = ("task_type", "nouns")

    path: str = "microsoft/git-large-vqav2"
    """Folder or hub id; tiny: random weights, for smoke runs."""
    compat: Literal["fixed", "release"] = "fixed"
    """release: 0 for spatial and numeracy prompts, to which the reward does not apply."""
    batch_size: Count = 8
    """Images at a time, each with all its questions."""

    def build(self, device: torch.device) -> GitReward:
        """The reward with its weights on a device."""

        model = load_git(self.path, batch_size=self.batch_size, device=device)
        return GitReward(model, self.compat)

    def reference_cases(self) -> tuple[ReferenceCase, ...]:
        """Photographs of a cat and a cup, asked for by name; none for random weights."""
        return () if self.path == TINY else _cat_or_cup()


class YesNoRewardConfig(RewardConfig):
    """A yes-or-no question to any image-text-to-text model that has a chat template."""

    path: str
    """Folder or hub id; tiny: random weights, for smoke runs."""
    question: str = "Does this image show {prompt}? Please answer yes or no without explanation."
    """What is asked; {prompt} stands for the prompt's text."""
    dtype: Literal["float32", "float16", "bfloat16"] = "bfloat16"
    """Precision of the model."""
    batch_size: Count = 8
    """Images at a time."""

    @model_validator(mode="after")
    def _asks_for_the_prompt(self) -> Self:
        if "{prompt}" not in self.question:
            raise complaint("question", "does not name the prompt; write {prompt} in it")
        return self

    def build(self, device: torch.device) -> YesNoReward:
        """The reward with its weights on a device."""

        return load_yes_no(
            self.path,
            question=self.question,
            dtype=self.dtype,
            batch_size=self.batch_size,
            device=device,
        )

    def reference_cases(self) -> tuple[ReferenceCase, ...]:
        """Photographs of a cat and a cup, asked for by name; none for random weights."""
        return () if self.path == TINY else _cat_or_cup()
