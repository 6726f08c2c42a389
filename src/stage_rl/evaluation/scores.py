"""Scores on disk: a file for each prompt, which is read again while its images are the same."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from stage_rl.errors import RewardError
from stage_rl.evaluation.images import DrawnPrompt
from stage_rl.files import read_record, replace_text
from stage_rl.rewards.base import RewardConfig, Score
from stage_rl.rewards.judge import WeightedReward, ask

NO_SCORES = {"name", "weight", "self_test", "timeout_s", "device"}
"""Settings of a reward that change no score."""

SPEED = {"batch_size", "processes", "threads"}
"""Those on whatever level that change its speed and memory, and in bf16 a score's last digits."""


def settings_that_score(config: RewardConfig) -> dict[str, Any]:
    """The settings of a reward that its scores depend on."""
    settings = config.model_dump(mode="json", exclude={*NO_SCORES, *config.changeable})
    return _without(settings, SPEED)


def folder_name(config: RewardConfig) -> str:
    """Of the scores of a reward: settings that ask something else have another."""
    kept_over = config.kept_over()
    asked = {k: value for k, value in settings_that_score(config).items() if k not in kept_over}
    return f"{config.name}-{hash8(asked)}"


def _without(settings: dict[str, Any], names: Container[str]) -> dict[str, Any]:
    """A tree of mappings without some of its keys, on whatever level."""
    return {
        key: _without(value, names) if isinstance(value, dict) else value
        for key, value in settings.items()
        if key not in names
    }


@dataclass(frozen=True)
class ScoreFolder:
    """The scores of one reward on one prompt set: a file per prompt."""

    path: Path
    reward: RewardConfig

    def read(self, drawn: DrawnPrompt) -> list[Score] | None:
        """The scores of a prompt's images, a judge's replies read anew; None where they are not
        those of these files, or where an answer that is missing would now be tried for longer.
        """
        record = read_record(self._file(drawn))
        if record is None or record.get("made_of") != self._made_of(drawn):
            return None  # what was cut off is scored again
        scores = [self.reward.reread(drawn.prompt, _from_json(kept)) for kept in record["scores"]]
        has_missing = any(score.extras.get("missing") for score in scores)
        return None if has_missing and record["effort"] < self.reward.effort() else scores

    def write(self, drawn: DrawnPrompt, scores: Sequence[Score]) -> None:
        """Keeps the scores of a prompt's images."""
        self.path.mkdir(parents=True, exist_ok=True)
        record = {
            "made_of": self._made_of(drawn),
            "effort": self.reward.effort(),
            "scores": [_as_json(score) for score in scores],
        }
        replace_text(self._file(drawn), json.dumps(record, allow_nan=False) + "\n")

    def _file(self, drawn: DrawnPrompt) -> Path:
        return self.path / f"{drawn.place:05d}.json"

    def _made_of(self, drawn: DrawnPrompt) -> dict[str, Any]:
        """What a prompt's scores depend on besides the reward: what is asked, and the images."""
        asked = json.dumps(self.reward.asked_of(drawn.prompt), sort_keys=True, default=str)
        return {"prompt": drawn.prompt.text, "hash": hash8([asked, *map(_sum, drawn.files)])}


def _as_json(score: Score) -> dict[str, Any]:
    """As plain values: null for an extra that is not finite, which JSON does not know."""
    extras = {key: x if math.isfinite(x) else None for key, x in score.extras.items()}
    return {**asdict(score), "extras": extras}


def _from_json(kept: Mapping[str, Any]) -> Score:
    extras = {key: math.nan if x is None else x for key, x in kept["extras"].items()}
    return Score(**{**kept, "extras": extras, "replies": tuple(kept.get("replies", ()))})


def score_images(
    item: WeightedReward,
    some: Sequence[DrawnPrompt],
    folder: ScoreFolder,
    *,
    signals: Sequence[int] = (),
) -> None:
    """Scores the images of some prompts; those of other sizes go in calls of their own.

    A `RewardsPendingError` where a signal came and the reward gives no answer.
    """
    by_size: dict[tuple[int, ...], list[tuple[DrawnPrompt, torch.Tensor]]] = {}
    for one in some:
        images_GHWC = one.read_images()
        by_size.setdefault(tuple(images_GHWC.shape[1:]), []).append((one, images_GHWC))
    for same in by_size.values():
        prompts = [one.prompt for one, images_GHWC in same for _ in images_GHWC]
        images_NHWC = torch.cat([images_GHWC for _, images_GHWC in same])
        scores = ask(item, images_NHWC, prompts, signals=signals)
        if isinstance(scores, str):
            scores = ask(item, images_NHWC, prompts, signals=signals)
        if isinstance(scores, str):
            raise RewardError(
                f"reward '{item.name}' failed twice on '{prompts[0].text[:40]}' and what follows "
                f"({scores}); put it right and run the same command again"
            )
        rest = iter(scores)
        for one, images_GHWC in same:
            folder.write(one, [next(rest) for _ in images_GHWC])


def _sum(file: Path) -> str:
    stat = file.stat()
    return _sum_of(file, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=1 << 16)
def _sum_of(file: Path, size: int, changed: int) -> str:
    """Of a file's content, which a copy has too; read once for each size and time of change."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash8(value: Any) -> str:
    """Eight hexadecimal digits for a value that JSON can hold."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
