"""One reward of a server: from the body of a request to the body of its answer."""

from __future__ import annotations

import asyncio
import logging

from pydantic import ValidationError
from pydantic_core import from_json

from stage_rl.errors import StageError
from stage_rl.rewards.base import Score
from stage_rl.rewards.wire import Offer, Question, answer_json
from stage_rl.schema import RewardConfig
from stage_rl.serving.batching import Batcher
from stage_rl.serving.limits import PIXEL_BYTES, Held, Limits, Refusal
from stage_rl.serving.pictures import decode, png_files
from stage_rl.types import Prompt

log = logging.getLogger(__name__)


class RewardService:
    """Answers requests for the scores of one reward."""

    def __init__(
        self, config: RewardConfig, batcher: Batcher, *, limits: Limits, held: Held
    ) -> None:
        self._config = config
        self._limits = limits
        self._held = held
        self.batcher = batcher
        self.offer = Offer(
            name=config.name,
            kind=config.kind,
            required_fields=list(config.required_fields),
            whole_groups=config.whole_groups,
        )

    async def answer(self, body: bytes) -> bytes:
        """The scores of a question as JSON; a Refusal where there are none."""
        prompts, files, pixels = await asyncio.to_thread(self._read, body)
        with self._held.hold(PIXEL_BYTES * pixels):
            images_NHWC = await asyncio.to_thread(decode, files)
            scores = await self._score(images_NHWC, prompts)
        return answer_json(scores)

    def _read(self, body: bytes) -> tuple[list[Prompt], list[bytes], int]:
        """The prompts, the PNG files, and the pixels in them."""
        items = _question(body).items
        if len(items) > self._limits.images:
            most = f"at most {self._limits.images}"
            raise Refusal(413, "images", f"{len(items)} images; send {most} in a request")
        prompts = [Prompt(item.prompt, item.index, item.metadata) for item in items]
        for place, prompt in enumerate(prompts):
            objection = self._config.objection(prompt)
            if objection:
                what = f"items.{place} ('{prompt.text[:40]}'): reward '{self._config.name}'"
                raise Refusal(422, "prompt", f"{what} {objection}")
        return prompts, *png_files(items, self._limits)

    async def _score(self, images_NHWC, prompts: list[Prompt]) -> list[Score]:
        name = self._config.name
        try:
            return await self.batcher.score(images_NHWC, prompts)
        except StageError as error:
            raise Refusal(422, "refused", str(error)) from error
        except Exception as error:  # the user's code, which may raise anything
            log.warning("reward '%s' failed", name, exc_info=error)
            what = " ".join(f"{type(error).__name__}: {error}".split())
            raise Refusal(500, "reward_failed", what) from error


def _question(body: bytes) -> Question:
    """The body as a question; a Refusal says what is wrong with it."""
    try:
        return Question.model_validate(from_json(body, allow_inf_nan=False))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise Refusal(422, "question", f"{where or 'body'}: {first['msg']}") from error
    except ValueError as error:
        raise Refusal(400, "json", f"is no JSON: {error}") from error
