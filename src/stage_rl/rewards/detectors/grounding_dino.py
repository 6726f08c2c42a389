"""GroundingDINO: boxes for the nouns of a prompt.

Shape suffixes: N images, H x W pixels, C colour channels, Q queries, K nouns, L text tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from pydantic import Field, PositiveInt
from torch import Tensor
from transformers import GroundingDinoForObjectDetection
from transformers.image_transforms import center_to_corners_format

from stage_rl.errors import RewardError
from stage_rl.rewards.base import Detection, DetectorConfig
from stage_rl.rewards.pretrained import SWIN_IGNORED_KEYS, detr_pixels, load_model, load_tokenizer
from stage_rl.types import Prompt

Span = tuple[int, int]
"""First character and the one after the last."""


class GroundingDinoDetectorConfig(DetectorConfig):
    """GroundingDINO asked for the nouns of each prompt."""

    path: str = "IDEA-Research/grounding-dino-tiny"
    """Folder or hub id."""
    shortest_side: PositiveInt = 800
    """Pixels that the shorter side of an image is scaled to."""
    longest_side: PositiveInt = 1333
    """Most pixels along the longer side."""
    batch_size: PositiveInt = 8
    """Images at a time."""
    min_score: float = Field(default=0.05, ge=0, lt=1)
    """Boxes of at most this confidence are left out."""

    def build(self, device: torch.device) -> GroundingDino:
        module = load_model(
            GroundingDinoForObjectDetection, self.path, device=device, ignore_keys=SWIN_IGNORED_KEYS
        )
        return GroundingDino(module, load_tokenizer(self.path), self)


@dataclass(frozen=True)
class GroundingDino:
    """Finds the nouns of prompts (`metadata['nouns']`) in images."""

    module: GroundingDinoForObjectDetection
    tokenizer: Any
    settings: GroundingDinoDetectorConfig

    def __call__(self, images_NHWC: Tensor, prompts: Sequence[Prompt]) -> list[list[Detection]]:
        """The detections of each image, labelled with its prompt's nouns, most confident first."""
        assert len(images_NHWC) == len(prompts)
        places: dict[tuple[str, ...], list[int]] = {}
        for place, prompt in enumerate(prompts):
            if "nouns" not in prompt.metadata:
                raise RewardError(
                    f"GroundingDINO looks for 'nouns', which {prompt.place} lacks; take a "
                    "prompt set that has them, such as t2i_r1, or another detector"
                )
            places.setdefault(tuple(prompt.metadata["nouns"]), []).append(place)
        found: list[list[Detection]] = [[] for _ in prompts]
        # One caption at a time: texts padded to different lengths are masked differently.
        for nouns, rows in places.items():
            for place, detections in zip(rows, self.detect(images_NHWC[rows], nouns), strict=True):
                found[place] = detections
        return found

    @torch.inference_mode()
    def detect(self, images_NHWC: Tensor, nouns: Sequence[str]) -> list[list[Detection]]:
        """The same for images of which all are asked for the same nouns."""
        if not nouns:
            return [[] for _ in images_NHWC]
        caption, spans = caption_of(nouns)
        text = self.tokenizer(caption, return_tensors="pt")
        longest = self.module.config.max_text_len
        if text["input_ids"].shape[1] > longest:
            raise RewardError(f"GroundingDINO: '{caption[:40]}...' is longer than {longest} tokens")
        weights_KL = token_weights(text, spans, nouns).to(self.module.device)
        found = []
        for images in images_NHWC.split(self.settings.batch_size):
            found += self._detect_batch(images, text, weights_KL, nouns=nouns)
        return found

    def _detect_batch(
        self, images_NHWC: Tensor, text: Any, weights_KL: Tensor, *, nouns: Sequence[str]
    ) -> list[list[Detection]]:
        count, height, width = images_NHWC.shape[:3]
        device = self.module.device
        sides = {"shortest": self.settings.shortest_side, "longest": self.settings.longest_side}
        pixels = detr_pixels(images_NHWC, **sides, device=device)
        asked = {key: value.expand(count, -1).to(device) for key, value in text.items()}
        output = self.module(pixel_values=pixels, **asked)
        # Places beyond the text hold -inf, which is 0 here.
        shares_NQL = output.logits[..., : weights_KL.shape[1]].sigmoid()
        scores_NKQ = (shares_NQL @ weights_KL.T).transpose(1, 2)
        scale = torch.tensor([width, height, width, height], device=device)
        boxes_NQ4: Any = center_to_corners_format(output.pred_boxes) * scale
        return [
            _detections(*image, nouns=nouns, min_score=self.settings.min_score)
            for image in zip(scores_NKQ.cpu(), boxes_NQ4.cpu(), strict=True)
        ]


def caption_of(nouns: Sequence[str]) -> tuple[str, list[list[Span]]]:
    """The text a grounding model is asked, and of each noun the spans that stand for it.

    A noun of several words is stood for by its first and its last.
    """
    spans, start = [], 0
    for noun in nouns:
        words, end = noun.split(), start + len(noun)
        first, last = (start, start + len(words[0])), (end - len(words[-1]), end)
        spans.append([first] if len(words) == 1 else [first, last])
        start = end + len(" . ")
    return " . ".join(nouns) + ".", spans


def token_weights(text: Any, spans: Sequence[Sequence[Span]], nouns: Sequence[str]) -> Tensor:
    """weights_KL: of each noun the mean over the tokens of its spans; a RewardError without any."""
    length = text["input_ids"].shape[1]
    weights_KL = torch.zeros(len(spans), length)
    for row, (noun, parts) in enumerate(zip(nouns, spans, strict=True)):
        for start, end in parts:
            first = _first_token(text, range(start, min(start + 3, end)))
            last = _first_token(text, range(end - 1, max(end - 4, start - 1), -1))
            if first is None or last is None:
                raise RewardError(f"GroundingDINO: '{noun}' holds no word that its tokenizer knows")
            weights_KL[row, first : last + 1] = 1
    return weights_KL / (weights_KL.sum(1, keepdim=True) + 1e-6)


def _first_token(text: Any, characters: Sequence[int]) -> int | None:
    """The token of the first of these characters that has one."""
    tokens = (text.char_to_token(0, at) for at in characters)
    return next((token for token in tokens if token is not None), None)


def _detections(
    scores_KQ: Tensor, boxes_Q4: Tensor, *, nouns: Sequence[str], min_score: float
) -> list[Detection]:
    """One detection per noun and query above a confidence; a query may serve several nouns."""
    found = []
    rows, queries = (scores_KQ > min_score).nonzero(as_tuple=True)
    for row, query in zip(rows.tolist(), queries.tolist(), strict=True):
        box = cast("tuple[float, float, float, float]", tuple(boxes_Q4[query].tolist()))
        found.append(Detection(nouns[int(row)], scores_KQ[row, query].item(), box))
    return sorted(found, key=lambda detection: -detection.score)
