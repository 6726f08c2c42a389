"""BLIP asked about each noun phrase of a prompt, as T2I-CompBench judges attributes.

Shape suffixes: N images, H x W pixels, C colour channels, R rows (a question on an image),
P image patches, L text tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BlipConfig, BlipForQuestionAnswering

from stage_rl.rewards.answers import Answer, answers_from, tokens_of
from stage_rl.rewards.base import Score
from stage_rl.rewards.compbench import attribute_score, question_of
from stage_rl.rewards.pixels import CLIP_MEAN, CLIP_STD, normalize, resize
from stage_rl.rewards.tiny import TINY, random_model, tiny_blip_configs
from stage_rl.rewards.tiny_scenes import tiny_scene_tokenizer
from stage_rl.rewards.weights import load_model, load_tokenizer
from stage_rl.types import Prompt

MAX_TOKENS = 35


class BlipVqa:
    """The probability of yes to questions, from the first token of the answer."""

    def __init__(self, module: BlipForQuestionAnswering, tokenizer: Any, *, side: int) -> None:
        self._module: Any = module
        self._tokenizer = tokenizer
        self._side = side
        self._yes, self._no = tokens_of(tokenizer, ("yes",)), tokens_of(tokenizer, ("no",))
        self._begin: int = self._module.decoder_start_token_id
        # The two marks that BLIP adds follow BERT's words: begin of answer, begin of question.
        self._encode = self._begin + 1

    @torch.inference_mode()
    def ask(self, images_NHWC: Tensor, questions: Sequence[Sequence[str]]) -> list[list[float]]:
        """P(yes) / (P(yes) + P(no)) of every question on each image (uint8)."""
        rows = [n for n, asked in enumerate(questions) for _ in asked]
        if not rows:
            return [[] for _ in questions]
        sized = resize(images_NHWC, (self._side, self._side), "bicubic")
        pixels = normalize(sized.to(self._module.device), CLIP_MEAN, CLIP_STD)
        patches_NPD = self._module.vision_model(
            pixel_values=pixels, interpolate_pos_encoding=True
        ).last_hidden_state
        texts = [question for asked in questions for question in asked]
        ids = self._tokenizer(texts, truncation=True, max_length=MAX_TOKENS)["input_ids"]
        shares = [0.0] * len(rows)
        # Rows of one length share a batch: the library's decoder attends to padding (5.23 drops
        # the mask of its cross-attention).
        for length in {len(row) for row in ids}:
            places = [place for place, row in enumerate(ids) if len(row) == length]
            ids_RL = torch.tensor([ids[place] for place in places])
            answers = self._answers(ids_RL, patches_NPD[[rows[place] for place in places]])
            for place, answer in zip(places, answers, strict=True):
                shares[place] = answer.yes
        left = iter(shares)
        return [[next(left) for _ in asked] for asked in questions]

    def _answers(self, ids_RL: Tensor, patches_RPD: Tensor) -> list[Answer]:
        """The first word of the answer to each question, all of one length."""
        ids_RL = ids_RL.to(self._module.device)
        ids_RL[:, 0] = self._encode
        read_RLD = self._module.text_encoder(
            input_ids=ids_RL, encoder_hidden_states=patches_RPD
        ).last_hidden_state
        begin_R1 = torch.full_like(ids_RL[:, :1], self._begin)
        output = self._module.text_decoder(input_ids=begin_R1, encoder_hidden_states=read_RLD)
        return answers_from(output.logits[:, -1], self._yes, self._no)


@dataclass(frozen=True)
class AttributeReward:
    """The product of the probabilities that a prompt's noun phrases are seen."""

    model: BlipVqa
    batch_size: int = 16

    def __call__(self, images_NHWC: Tensor, prompts: list[Prompt]) -> list[Score]:
        """One score per image; the phrases are those of `attr_nouns`."""
        assert len(images_NHWC) == len(prompts)
        scores: list[Score] = []
        for images in images_NHWC.split(self.batch_size):
            phrases = [p.metadata["attr_nouns"] for p in prompts[len(scores) :][: len(images)]]
            questions = [[question_of(phrase) for phrase in some] for some in phrases]
            shares = self.model.ask(images, questions)
            scores += [attribute_score(*pair) for pair in zip(shares, phrases, strict=True)]
        return scores


def load_blip_vqa(path: str, *, side: int, device: torch.device | str = "cpu") -> BlipVqa:
    """The model of a folder or hub id, fp32; `tiny` is random."""
    if path == TINY:
        module, tokenizer = tiny_blip_vqa(), tiny_scene_tokenizer()
        nn.Module.to(module, device)
        return BlipVqa(module, tokenizer, side=side)
    module = load_model(BlipForQuestionAnswering, path, device=device)
    return BlipVqa(module, load_tokenizer(path), side=side)


def tiny_blip_vqa() -> BlipForQuestionAnswering:
    """A BLIP of two layers that reads 32 x 32 and what `tiny_scene_tokenizer` writes."""
    vision, text = tiny_blip_configs()
    words = len(tiny_scene_tokenizer())
    sizes = {**text.to_dict(), "vocab_size": words + 2, "bos_token_id": words}
    config = BlipConfig(text_config=sizes, vision_config=vision.to_dict(), projection_dim=32)
    return random_model(lambda: BlipForQuestionAnswering(config), scale=2.0)
