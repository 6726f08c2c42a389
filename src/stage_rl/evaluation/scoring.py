"""Scores images with one reward, prompt by prompt, into files that a later call takes up.

Shape suffixes: N images, H x W pixels, C colour channels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from stage_rl.errors import RewardError, StageError, Stopped
from stage_rl.evaluation.images import DrawnPrompt, read_images
from stage_rl.rewards.base import Reward, Score
from stage_rl.rewards.judging import check_scores
from stage_rl.schema import RewardConfig
from stage_rl.training.runs import replace_text

IMAGES_AT_ONCE = 64
"""Images that a reward gets in one call, where a prompt has fewer."""


@dataclass(frozen=True)
class ScoreFolder:
    """The scores of one reward on one prompt set: a file per prompt."""

    root: Path
    config: RewardConfig

    @property
    def path(self) -> Path:
        """NAME-HASH8, so that other settings of the reward have other scores."""
        settings = self.config.model_dump(mode="json", exclude={"name", "weight", "self_test"})
        return self.root / f"{self.config.name}-{_hash8(settings)}"

    def read(self, drawn: DrawnPrompt) -> list[Score] | None:
        """The scores of a prompt's images; None where they are not those of these files."""
        file = self._file(drawn)
        if not file.exists():
            return None
        record = json.loads(file.read_text(encoding="utf-8"))
        if record["made_of"] != _made_of(drawn):
            return None
        return [Score(**score) for score in record["scores"]]

    def write(self, drawn: DrawnPrompt, scores: Sequence[Score]) -> None:
        """Keeps the scores of a prompt's images."""
        self.path.mkdir(parents=True, exist_ok=True)
        record = {"made_of": _made_of(drawn), "scores": [asdict(score) for score in scores]}
        replace_text(self._file(drawn), json.dumps(record, allow_nan=False) + "\n")

    def _file(self, drawn: DrawnPrompt) -> Path:
        return self.path / f"{drawn.place:05d}.json"


def score_missing(
    folder: ScoreFolder,
    prompts: Sequence[DrawnPrompt],
    *,
    device: torch.device,
    advance: Callable[[int], None] = lambda _: None,
    signals: Sequence[int] = (),
) -> None:
    """Scores the prompts that have no scores yet; the reward is built where there are any.

    A reward that fails twice on the same images is a `RewardError`; a failure is no score. Raises
    `Stopped` when `signals` fills.
    """
    lacking = [drawn for drawn in prompts if folder.read(drawn) is None]
    advance(sum(len(one.files) for one in prompts) - sum(len(one.files) for one in lacking))
    if not lacking:
        return
    reward = folder.config.build(device)
    for some in _batches(lacking):
        if signals:
            raise Stopped(
                f"{folder.path}: stopped; run the same command again to go on",
                signal_number=signals[0],
            )
        for drawn, scores in zip(some, _scores(folder.config.name, reward, some), strict=True):
            folder.write(drawn, scores)
            advance(len(scores))


def _batches(prompts: Sequence[DrawnPrompt]) -> Iterator[list[DrawnPrompt]]:
    batch: list[DrawnPrompt] = []
    for drawn in prompts:
        if batch and sum(len(one.files) for one in (*batch, drawn)) > IMAGES_AT_ONCE:
            yield batch
            batch = []
        batch.append(drawn)
    if batch:
        yield batch


def _scores(name: str, reward: Reward, some: Sequence[DrawnPrompt]) -> list[list[Score]]:
    """The scores of each prompt's images; images of other sizes go in calls of their own."""
    images = [read_images(drawn.files) for drawn in some]
    scores: list[list[Score]] = [[] for _ in some]
    sizes = [{tuple(image.shape) for image in group} for group in images]
    for n, drawn in enumerate(some):
        if len(sizes[n]) != 1:
            raise RewardError(f"{drawn.files[0].parent}: images of several sizes; make them one")
    for size in dict.fromkeys(next(iter(one)) for one in sizes):
        places = [n for n, one in enumerate(sizes) if size in one]
        images_NHWC = torch.stack([image for n in places for image in images[n]])
        prompts = [some[n].prompt for n in places for _ in some[n].files]
        given = iter(_twice(name, reward, images_NHWC, prompts))
        for n in places:
            scores[n] = [next(given) for _ in some[n].files]
    return scores


def _twice(name: str, reward: Reward, images_NHWC: torch.Tensor, prompts: list[Any]) -> list[Score]:
    """The scores of one call, asked for again once; a RewardError where that fails too."""
    failures = []
    for _ in range(2):
        try:
            scores = reward(images_NHWC, prompts)
        except StageError:
            raise  # the user's input is wrong: trying again does not mend it
        except Exception as error:  # a reward is the user's code and may raise anything
            failures.append(f"{type(error).__name__}: {' '.join(str(error).split())}")
            continue
        check_scores(name, scores, len(prompts))
        bad = [one.value for one in scores if one.value is not None and not _finite(one.value)]
        if not bad:
            return list(scores)
        failures.append(f"gave {bad[0]}")
    raise RewardError(
        f"reward '{name}' failed twice on '{prompts[0].text[:40]}' and what follows ("
        f"{failures[-1]}); put it right and run the same command again"
    )


def _finite(value: float) -> bool:
    return abs(value) < float("inf")


def _made_of(drawn: DrawnPrompt) -> dict[str, Any]:
    """What a prompt's scores depend on besides the reward: prompt, metadata, image files."""
    stamps = [(file.name, stat.st_size, stat.st_mtime_ns) for file, stat in _stats(drawn)]
    metadata = json.dumps(dict(drawn.prompt.metadata), sort_keys=True, default=str)
    return {"prompt": drawn.prompt.text, "hash": _hash8([metadata, stamps])}


def _stats(drawn: DrawnPrompt) -> Iterator[tuple[Path, Any]]:
    for file in drawn.files:
        yield file, file.stat()


def _hash8(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
