"""What a recipe says of the OCR reward; free of torch."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from stage_rl.schema import RewardConfig
from stage_rl.settings import Count
from stage_rl.types import Prompt

if TYPE_CHECKING:
    import torch

    from stage_rl.rewards.ocr import OcrReward
    from stage_rl.rewards.selftest import ReferenceCase


class OcrRewardConfig(RewardConfig):
    """How much of the text that a prompt quotes can be read in its image."""

    engine: Literal["rapidocr", "paddleocr"] = "rapidocr"
    """What reads: rapidocr has its models with it; paddleocr is the released code's."""
    language: str = "en"
    """Language of PaddleOCR's model; RapidOCR's reads Latin and Chinese script."""
    compat: Literal["fixed", "release"] = "fixed"
    """release: the engine is given red in the place of blue."""
    allow_more: bool = True
    """A target inside a longer text scores 1, as released; false: as in the paper."""
    min_confidence: float = Field(default=0.0, ge=0, lt=1)
    """Confidence above which a line counts."""
    processes: Count = 1
    """Processes that read, each with an engine of its own; 1: the trainer's."""
    threads: Count = 1
    """Threads of one engine."""

    def objection(self, prompt: Prompt) -> str | None:
        """Also that a prompt has no text to be read."""
        from stage_rl.rewards.ocr import target_of

        try:
            target_of(prompt)
        except ValueError as error:
            return str(error)
        return super().objection(prompt)

    def build(self, device: torch.device) -> OcrReward:
        """The reward with its engine, on the CPU; an InputError where that is not installed."""
        from stage_rl.rewards.ocr import OcrReward
        from stage_rl.rewards.ocr_engines import PaddleOcr, RapidOcr
        from stage_rl.rewards.worker_processes import ParallelReader

        make = functools.partial(RapidOcr, threads=self.threads)
        if self.engine == "paddleocr":
            make = functools.partial(PaddleOcr, language=self.language, threads=self.threads)
        several = self.processes > 1
        reader = ParallelReader(make, processes=self.processes) if several else make()
        return OcrReward(reader, self.compat, self.min_confidence, self.allow_more)

    def reference_cases(self) -> tuple[ReferenceCase, ...]:
        """Legible words against the same letters cut up."""
        from stage_rl.rewards.written import written_cases

        return written_cases()
