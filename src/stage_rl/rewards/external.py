"""A reward that another program gives: JSON lines to its standard input, JSON lines back.

For scorers that need an environment of their own. docs/rewards.md says what a line holds.

Shape suffixes: N images, H x W pixels, C colour channels.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import queue
import shutil
import signal
import subprocess
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from stage_rl.errors import InputError, RewardError
from stage_rl.rewards.base import RewardConfig, Score
from stage_rl.rewards.protocol import is_number, is_texts, png_base64
from stage_rl.types import Prompt

log = logging.getLogger(__name__)

MPLUG_SCORER = str(Path(__file__).with_name("vlm") / "mplug_scorer.py")
"""The program that comes with the package: the judge of DPG-Bench."""

STOP_S = 5.0
"""How long a program may take to end after its input has ended."""


class ExternalRewardConfig(RewardConfig):
    """A program of the user's that reads JSON lines and answers each with a score."""

    changeable = ("self_test", "cwd", "images", "batch_size", "timeout_s", "device")

    times_itself: ClassVar[bool] = True
    command: tuple[Annotated[str, Field(min_length=1)], ...] = Field(min_length=1)
    """The program and its arguments; no shell reads them."""
    cwd: str | None = None
    """Folder it is started in; null: that of the trainer."""
    images: Literal["files", "base64"] = "files"
    """files: paths of PNG files, deleted when all of a batch are answered; base64: PNG inline."""
    batch_size: PositiveInt = 16
    """Images that are asked for before the first answer is waited for."""
    timeout_s: PositiveFloat = 600.0
    """Longest wait for an answer; the first includes what the program takes to start."""

    def missing(self) -> tuple[str, ...]:
        """The program, or the script that it is to run."""
        program, *rest = self.command
        folder = Path(self.cwd or ".")
        if shutil.which(program) is None and shutil.which(program, path=str(folder)) is None:
            return (f"program '{program}'",)
        scripts = [text for text in rest[:1] if text.endswith(".py")]
        return tuple(f"file '{text}'" for text in scripts if not (folder / text).exists())

    def build(self, device: torch.device) -> ExternalReward:
        """The reward; the program starts with the first image. An InputError without one."""
        if self.cwd is not None and not Path(self.cwd).is_dir():
            raise InputError(f"reward '{self.name}': cwd: no folder '{self.cwd}'; name one")
        if missing := self.missing():
            raise InputError(f"reward '{self.name}': command: no {missing[0]}; write its path")
        return ExternalReward(self)


class ExternalReward:
    """Scores images with a program that is started once and kept."""

    def __init__(self, config: ExternalRewardConfig) -> None:
        self._config = config
        self._process: LineProcess | None = None
        self._ids = itertools.count()

    def __call__(self, images_NHWC: Tensor, prompts: list[Prompt]) -> list[Score]:
        """One score per image.

        A RewardError where the program dies or says nothing twice, or writes what is no answer; a
        RuntimeError where it reports that it could not score an image.
        """
        scores, asked = [], list(zip(images_NHWC.numpy(), prompts, strict=True))
        for first in range(0, len(asked), self._config.batch_size):
            batch = asked[first : first + self._config.batch_size]
            with tempfile.TemporaryDirectory(prefix="stage-images-") as folder:
                requests = [self._request(*drawing, Path(folder)) for drawing in batch]
                answers = self._answers(requests)
            scores += [_score(answers[request["id"]]) for request in requests]
        return scores

    def close(self) -> None:
        """Ends the program; the next call starts it again."""
        if self._process is not None:
            self._process.stop()
        self._process = None

    def _request(
        self, image_HWC: NDArray[np.uint8], prompt: Prompt, folder: Path
    ) -> dict[str, Any]:
        number = next(self._ids)
        request = {"id": number, "prompt": prompt.text, "metadata": dict(prompt.metadata)}
        if self._config.images == "base64":
            return {**request, "image_png": png_base64(image_HWC)}
        file = folder / f"{number}.png"
        # Speed matters more than size for files that live for seconds.
        Image.fromarray(image_HWC).save(file, compress_level=1)
        return {**request, "image": str(file)}

    def _answers(self, requests: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
        try:
            return self._ask(requests)
        except ProcessFault as fault:
            log.warning("external scorer: %s; it is started again", fault)
        try:
            return self._ask(requests)
        except ProcessFault as fault:
            what = f"external scorer: {fault}, for the second time; run its command by hand"
            raise RewardError(what) from fault

    def _ask(self, requests: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
        """The answer to each request by its id, in whatever order they come."""
        answers: dict[int, dict[str, Any]] = {}
        waiting = {request["id"] for request in requests}
        lines = [json.dumps(request) for request in requests]
        try:
            config = self._config
            self._process = self._process or LineProcess(config.command, cwd=config.cwd)
            self._process.send(lines)
            while waiting:
                answer = _parse(self._process.receive(config.timeout_s), waiting)
                waiting.remove(answer["id"])
                answers[answer["id"]] = answer
        except (ProcessFault, RewardError):
            # What it may still write belongs to a question that is over.
            self.close()
            raise
        return answers


def _parse(line: str, waiting: set[int]) -> dict[str, Any]:
    """An answer that was waited for, of the right form; else a RewardError with the line."""
    shown = line if len(line) <= 120 else line[:117] + "..."
    try:
        answer = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RewardError(
            f"external scorer: wrote '{shown}', which is not JSON; print messages to stderr"
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
    if "score" not in answer or not (answer["score"] is None or is_number(answer["score"])):
        return 'no score; write a number, or null where it does not apply, or an "error"'
    if not isinstance(answer.get("why", ""), str):
        return "why is not a text"
    extras = answer.get("extras", {})
    if not isinstance(extras, dict) or not all(is_number(value) for value in extras.values()):
        return "extras is not an object of numbers"
    if not is_texts(answer.get("replies", [])):
        return "replies is not a list of texts"
    return None


def _score(answer: Mapping[str, Any]) -> Score:
    if "error" in answer:
        raise RuntimeError(f"the external scorer could not score an image: {answer['error']}")
    replies = tuple(answer.get("replies", ()))
    return Score(answer["score"], answer.get("why", ""), answer.get("extras", {}), replies)


class ProcessFault(Exception):
    """The program could not be started, has ended, or says nothing."""


class LineProcess:
    """A program that is written to and read from line by line.

    It ends with `stop`, with this object or with the interpreter, and sees its input end if that is
    killed.
    """

    def __init__(self, command: Sequence[str], *, cwd: str | None) -> None:
        try:
            self._process = subprocess.Popen(
                command,
                cwd=cwd,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                encoding="utf-8",
                errors="replace",
                # Ctrl-C is the trainer's to answer: it finishes the step first.
                start_new_session=True,
            )
        except OSError as error:
            raise ProcessFault(f"'{command[0]}' cannot be started: {error}") from error
        self._lines: queue.Queue[str] = queue.Queue()
        self._errors: deque[str] = deque(maxlen=6)
        self._writers: list[threading.Thread] = []
        listeners = [
            threading.Thread(target=_listen, args=(stream, hand_on), daemon=True)
            for stream, hand_on in (
                (self._process.stdout, self._lines.put),
                (self._process.stderr, self._errors.append),
            )
        ]
        for listener in listeners:
            listener.start()
        self.stop = weakref.finalize(self, _end, self._process, listeners, self._writers)

    def send(self, lines: Sequence[str]) -> None:
        """Writes lines, from a thread of its own: the program need not read before it answers."""
        text = "".join(f"{line}\n" for line in lines)
        writer = threading.Thread(target=_write, args=(self._process.stdin, text), daemon=True)
        writer.start()
        self._writers[:] = [*(one for one in self._writers if one.is_alive()), writer]

    def receive(self, timeout_s: float) -> str:
        """The next line; a ProcessFault where none comes in time or the program has ended."""
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty as error:
            raise ProcessFault(f"gave no answer for {timeout_s:g} s{self._last_words()}") from error
        if not line:
            status = self._process.wait()
            raise ProcessFault(f"ended with exit status {status}{self._last_words()}")
        return line

    def _last_words(self) -> str:
        """What it wrote last to its standard error, in one line."""
        lines = [line for line in self._errors if line]
        return f" ({'; '.join(lines)})" if lines else ""


def _write(stream: IO[str], text: str) -> None:
    # A program that ends early shows on its output, where it is reported.
    with contextlib.suppress(BrokenPipeError, ValueError):
        stream.write(text)
        stream.flush()


def _listen(stream: IO[str], hand_on: Callable[[str], None]) -> None:
    """Hands on each line that is not empty, then an empty one at the end."""
    for line in stream:
        if line.strip():
            hand_on(line.strip())
    hand_on("")


def _end(
    process: subprocess.Popen[str],
    listeners: Sequence[threading.Thread],
    writers: Sequence[threading.Thread],
) -> None:
    """Ends a program, by force with all it started if it does not by itself."""
    streams = [stream for stream in (process.stdin, process.stdout, process.stderr) if stream]
    is_written_to = any(writer.is_alive() for writer in writers)
    try:
        # To close a stream that a thread is writing to would wait for it.
        if not is_written_to:
            _close(streams[0])
        process.wait(0 if is_written_to else STOP_S)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for thread in (*listeners, *writers):
        thread.join(STOP_S)
    for stream in streams:
        _close(stream)


def _close(stream: IO[str]) -> None:
    # What the program no longer reads is of no use to it.
    with contextlib.suppress(BrokenPipeError):
        stream.close()
