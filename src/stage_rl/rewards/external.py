"""A reward that another program gives: JSON lines to its standard input, JSON lines back.

For scorers that need an environment of their own. docs/rewards.md says what a line holds.

Shape suffixes: N images, H x W pixels, C colour channels.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import logging
import numbers
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image

from stage_rl.errors import RewardError
from stage_rl.rewards.base import Score
from stage_rl.rewards.line_process import LineProcess, ProcessFault

if TYPE_CHECKING:
    from torch import Tensor

    from stage_rl.types import Prompt

log = logging.getLogger(__name__)
ImageForm = Literal["files", "base64"]


class ExternalReward:
    """Scores images with a program that is started once and kept."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        cwd: str | None = None,
        images: ImageForm = "files",
        batch_size: int = 16,
        timeout_s: float = 600.0,
    ) -> None:
        self._process = LineProcess(command, cwd=cwd)
        self._form: ImageForm = images
        self._batch_size = batch_size
        self._timeout_s = timeout_s
        self._ids = itertools.count()

    def __call__(self, images_NHWC: Tensor, prompts: list[Prompt]) -> list[Score]:
        """One score per image.

        A RewardError where the program dies or says nothing twice, or writes what is no answer; a
        RuntimeError where it reports that it could not score an image.
        """
        scores = []
        for first in range(0, len(prompts), self._batch_size):
            rows = slice(first, first + self._batch_size)
            with tempfile.TemporaryDirectory(prefix="stage-images-") as folder:
                pictures = [Image.fromarray(image) for image in images_NHWC[rows].numpy()]
                requests = [
                    self._request(picture, prompt, Path(folder))
                    for picture, prompt in zip(pictures, prompts[rows], strict=True)
                ]
                answers = self._answers(requests)
            scores += [_score(answers[request["id"]]) for request in requests]
        return scores

    def close(self) -> None:
        """Ends the program."""
        self._process.stop()

    def _request(self, picture: Image.Image, prompt: Prompt, folder: Path) -> dict[str, Any]:
        request = {
            "id": next(self._ids),
            "prompt": prompt.text,
            "metadata": dict(prompt.metadata),
        }
        # Speed matters more than size for files that live for seconds.
        if self._form == "files":
            file = folder / f"{request['id']}.png"
            picture.save(file, compress_level=1)
            return {**request, "image": str(file)}
        buffer = io.BytesIO()
        picture.save(buffer, "PNG", compress_level=1)
        return {**request, "image_png": base64.b64encode(buffer.getvalue()).decode()}

    def _answers(self, requests: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
        try:
            return self._ask(requests)
        except ProcessFault as fault:
            log.warning("external scorer: %s; it is started again", fault)
        try:
            return self._ask(requests)
        except ProcessFault as fault:
            raise RewardError(
                f"external scorer: {fault}, for the second time; run its command by hand"
            ) from fault

    def _ask(self, requests: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
        """The answer to each request by its id, in whatever order they come."""
        answers: dict[int, dict[str, Any]] = {}
        waiting = {request["id"] for request in requests}
        lines = [json.dumps(request) for request in requests]
        try:
            self._process.send(lines)
            while waiting:
                answer = _parse(self._process.receive(self._timeout_s), waiting)
                waiting.remove(answer["id"])
                answers[answer["id"]] = answer
        except (ProcessFault, RewardError):
            # What it may still write belongs to a question that is over.
            self._process.stop()
            raise
        return answers


def _parse(line: str, waiting: set[int]) -> dict[str, Any]:
    """An answer that was waited for, of the right form; else a RewardError with the line."""
    shown = line if len(line) <= 120 else line[:117] + "..."
    try:
        answer = json.loads(line)
    except json.JSONDecodeError as error:
        raise RewardError(
            f"external scorer: wrote '{shown}', which is no JSON; print messages to stderr"
        ) from error
    fault = _fault(answer, waiting)
    if fault:
        raise RewardError(f"external scorer: wrote '{shown}': {fault}")
    return answer


def _fault(answer: Any, waiting: set[int]) -> str | None:
    """What is wrong with the form of an answer, and what to write instead."""
    if not isinstance(answer, dict):
        return 'not an object; write {"id": ..., "score": ...}'
    if not isinstance(answer.get("id"), int) or answer["id"] not in waiting:
        return "its id was not asked for, or is answered twice; give each request's id back once"
    if isinstance(answer.get("error"), str):
        return None
    if "score" not in answer or not _is_number(answer["score"], or_none=True):
        return 'no score; write a number, or null where it does not apply, or an "error"'
    if not isinstance(answer.get("why", ""), str):
        return "why is not a text"
    extras = answer.get("extras", {})
    if not isinstance(extras, dict) or not all(_is_number(value) for value in extras.values()):
        return "extras is not an object of numbers"
    return None


def _is_number(value: Any, *, or_none: bool = False) -> bool:
    if value is None:
        return or_none
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _score(answer: Mapping[str, Any]) -> Score:
    if "error" in answer:
        raise RuntimeError(f"the external scorer could not score an image: {answer['error']}")
    return Score(answer["score"], answer.get("why", ""), answer.get("extras", {}))
