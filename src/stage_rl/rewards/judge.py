"""Judges a rollout with all rewards of a recipe: the weighted sum, what does not apply, what fails.

Shape suffixes: P prompts, G group, N = P x G images, H x W pixels, C colour channels, R rewards.
"""

from __future__ import annotations

import logging
import math
import numbers
import sysconfig
import traceback
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stage_rl.errors import InputError, RewardError, StageError
from stage_rl.rewards.base import Requirement, Reward, RewardConfig, Score
from stage_rl.rewards.threads import RewardsPendingError, on_thread, result_of
from stage_rl.types import Prompt, Rewards, Rollout

log = logging.getLogger(__name__)

FLOAT_MAX = torch.finfo(torch.float64).max

LARGEST = 1e16
"""Size of a score, and of its term of the sum: advantages square it in fp32, which ends at 3e38."""


@dataclass(frozen=True)
class WeightedReward:
    """A built reward with its column name and its weight in the sum."""

    name: str
    weight: float
    reward: Reward
    timeout_s: float | None = None
    """Longest time for a call; None: it is waited for."""
    requires: Requirement | None = None


def build_reward(config: RewardConfig, device: torch.device) -> WeightedReward:
    """The reward of a config with its weights on the config's device, else on the given one.

    A RewardError where `build` raises, whatever it is: it may be the user's code.
    """
    try:
        reward = config.build(config.device_or(device))
    except StageError:
        raise
    except (Exception, SystemExit) as error:
        what = f"could not be built: {_sentence_of(error)}"
        raise RewardError(f"reward '{config.name}': {what}; mend it") from error
    timeout_s = None if config.times_itself else config.timeout_s
    return WeightedReward(config.name, config.weight, reward, timeout_s, config.requires)


def check_fields(rewards: Sequence[RewardConfig], prompts: Sequence[Prompt]) -> None:
    """Raises an InputError when a reward cannot judge a prompt, such as for want of metadata."""
    for config in rewards:
        for prompt in prompts:
            unsupported_reason = config.unsupported_reason(prompt)
            if unsupported_reason:
                raise InputError(
                    f"{prompt.place} ('{prompt.text[:40]}'): reward '{config.name}' "
                    f"{unsupported_reason}; fix the prompts or drop the reward"
                )


class RewardFunctions:
    """Scores rollouts, each on a thread of its own, so that the model can work meanwhile."""

    def __init__(self, rewards: Sequence[WeightedReward]) -> None:
        self._rewards = tuple(rewards)

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        """A GPU's stream for all rewards, behind what has made their weights."""
        torch.cuda.synchronize()
        return torch.cuda.Stream()

    def submit(self, rollout: Rollout) -> Future[Rewards]:
        """Starts judging; `result()` waits for it."""
        # The thread ends with its rollout. On a CPU, one that stayed would keep a second team of
        # OpenMP workers, and OpenMP lets all workers sleep between two operations where they are
        # more than the cores: sampling then takes 1.3 to 1.6 times as long (measured, two cores).
        # What a reward does on a GPU runs beside the passes of the training.
        with torch.cuda.stream(self._stream) if torch.cuda.is_available() else nullcontext():
            return on_thread(lambda: self.score(rollout), "judge")

    def score(self, rollout: Rollout) -> Rewards:
        """All scores. A group on which a reward fails twice, or to which none applies, is dropped
        from the step.
        """
        size = rollout.group_size
        total_PG = torch.zeros(len(rollout.prompts), size)
        valid_P = torch.ones(len(rollout.prompts), dtype=torch.bool)
        columns: dict[str, Tensor] = {}
        reasons: list[list[str]] = [[] for _ in rollout.tokens_NT]
        for item in self._rewards:
            groups = _score_groups(item, rollout)
            valid_P &= torch.tensor([not isinstance(group, str) for group in groups])
            scores: list[Score | str] = []
            for group in groups:
                scores += [group] * size if isinstance(group, str) else group
            columns |= _columns(item.name, scores, size)
            for sentences, score in zip(reasons, scores, strict=True):
                sentences.append(_sentence(item.name, score))
        components = {item.name: _component(item, columns) for item in self._rewards}
        weights = {item.name: item.weight for item in self._rewards}
        terms, judged_P = {}, torch.zeros_like(valid_P)
        for name, component_PG in components.items():
            # A reward that skips one image of a group says nothing of the whole group.
            applies_P1 = component_PG.isfinite().all(1, keepdim=True)
            judged_P |= applies_P1[:, 0]
            terms[name] = torch.where(applies_P1, weights[name] * component_PG, 0.0)
            total_PG += terms[name]
        valid_P &= judged_P
        total_PG[~valid_P] = 0.0
        if len(terms) > 1 and size > 1:
            columns |= _shares(terms, valid_P)
        said = tuple("; ".join(sentences) for sentences in reasons)
        return Rewards(total_PG, valid_P, columns, said, components, weights)


def _score_groups(item: WeightedReward, rollout: Rollout) -> list[list[Score] | str]:
    """The scores of each group; how the reward failed where it did so twice."""
    size = rollout.group_size
    prompts = [prompt for prompt in rollout.prompts for _ in range(size)]
    scores = ask(item, rollout.images_NHWC, prompts)
    if not isinstance(scores, str):
        return [scores[i : i + size] for i in range(0, len(scores), size)]
    # Once more group by group, so that one bad image costs no more than its own group.
    groups = [
        ask(item, rollout.images_NHWC[i : i + size], prompts[i : i + size])
        for i in range(0, len(prompts), size)
    ]
    for failure in dict.fromkeys([scores, *(group for group in groups if isinstance(group, str))]):
        log.warning("reward '%s' %s", item.name, failure)
    return groups


def ask(
    item: WeightedReward,
    images_NHWC: Tensor,
    prompts: list[Prompt],
    *,
    signals: Sequence[int] | None = None,
) -> list[Score] | str:
    """The scores; or how the reward failed, by an error or by a number that is none to learn from.

    A RewardError where it gives no answer in time; a `RewardsPendingError` where it gives none
    after a signal, for callers that have no thread of their own for it.
    """
    try:
        # A copy: a reward that edits its images changes nobody else's.
        scores = _call(item, images_NHWC.clone(), prompts, signals)
    except (StageError, RewardsPendingError):
        raise  # the user's input is wrong: trying again does not fix it
    # A reward is the user's code and may raise anything, and an exit of its own is no success.
    except (Exception, SystemExit) as error:
        return f"failed: {_sentence_of(error)}"
    check_scores(item.name, scores, len(prompts))
    # The value and its term of the sum.
    limit = LARGEST / max(1.0, abs(item.weight))
    for score in scores:
        if score.value is not None and not abs(score.value) <= limit:
            return f"gave {score.value} ({score.why})"
    return [_in_floats(score) for score in scores]


def _in_floats(score: Score) -> Score:
    """Of numbers of numpy's or of any other kind the floats that JSON can hold."""
    value = None if score.value is None else float(score.value)
    return replace(score, value=value, extras={k: float(v) for k, v in score.extras.items()})


def _call(
    item: WeightedReward,
    images_NHWC: Tensor,
    prompts: list[Prompt],
    signals: Sequence[int] | None,
) -> list[Score]:
    if item.timeout_s is None and signals is None:
        return item.reward(images_NHWC, prompts)
    called = on_thread(lambda: item.reward(images_NHWC, prompts), f"reward-{item.name}")
    try:
        return result_of(called, timeout_s=item.timeout_s, signals=signals or ())
    except TimeoutError as error:
        if called.done():
            raise  # its own
        raise RewardError(
            f"reward '{item.name}': gave no answer for {item.timeout_s:g} s; see where it waits, "
            "or raise its timeout_s"
        ) from error


def _sentence_of(error: BaseException) -> str:
    """An error in one line, with the innermost place that is no library's."""
    libraries = {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not any(f.filename.startswith(path) for path in libraries)]
    last = (own or frames)[-1]
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return f"{text} ({Path(last.filename).name}:{last.lineno})"


def check_scores(name: str, scores: Any, num_images: int) -> None:
    """A RewardError where a reward returns anything but one `Score` of numbers per image."""
    wanted = "return a list with one Score(value, why) per image"
    if not isinstance(scores, list | tuple):
        raise RewardError(f"reward '{name}': returned {type(scores).__name__}; {wanted}")
    others = [type(score).__name__ for score in scores if not isinstance(score, Score)]
    if others:
        raise RewardError(f"reward '{name}': returned a list of {others[0]}; {wanted}")
    if len(scores) != num_images:
        raise RewardError(
            f"reward '{name}': {len(scores)} scores for {num_images} images; give one each"
        )
    for score in scores:
        if not isinstance(score.why, str):
            raise RewardError(f"reward '{name}': why is {score.why!r:.40}; write a text")
        if any(isinstance(x, int | Fraction) and abs(x) > FLOAT_MAX for x in score.extras.values()):
            raise RewardError(f"reward '{name}': an extra is beyond what a float holds")
        values = [] if score.value is None else [score.value]
        for value in (*values, *score.extras.values()):
            if not isinstance(value, numbers.Real):
                raise RewardError(
                    f"reward '{name}': a score holds {value!r}, of type {type(value).__name__}; "
                    "write a float, or None as the value where the reward does not apply"
                )


def _columns(name: str, scores: Sequence[Score | str], size: int) -> dict[str, Tensor]:
    """The value and the extras as PG tensors, NaN where there is none."""
    given = [Score(None, score) if isinstance(score, str) else score for score in scores]
    values = {name: [math.nan if s.value is None else s.value for s in given]}
    for key in dict.fromkeys(key for score in given for key in score.extras):
        values[f"{name}_{key}"] = [score.extras.get(key, math.nan) for score in given]
    return {
        key: torch.tensor([float(value) for value in column]).view(-1, size)
        for key, column in values.items()
    }


def _component(item: WeightedReward, columns: dict[str, Tensor]) -> Tensor:
    """The scores of a reward as they count, PG: 0 for images that do not meet its condition."""
    values_PG = columns[item.name]
    if item.requires is None:
        return values_PG
    met_PG = columns[item.requires.reward] >= item.requires.at_least
    return torch.where(met_PG | values_PG.isnan(), values_PG, 0.0)


def _shares(terms: dict[str, Tensor], valid_P: Tensor) -> dict[str, Tensor]:
    """How much of a group's spread is each reward's, PG columns NAME_share that sum to 1.

    The standard deviation of a weighted term within the group over the sum of all terms'; NaN in
    groups without any spread or dropped from the step. A reward of small spread steers nothing.
    """
    spread_RP1 = torch.stack([term_PG.std(1, keepdim=True) for term_PG in terms.values()])
    share_RP1 = spread_RP1 / spread_RP1.sum(0)  # 0 / 0 where nothing differs: NaN
    share_RP1[:, ~valid_P] = math.nan
    return {
        f"{name}_share": share_P1.expand_as(terms[name])
        for name, share_P1 in zip(terms, share_RP1, strict=True)
    }


def _sentence(name: str, score: Score | str) -> str:
    if isinstance(score, str):
        return f"{name} {score}"
    if score.value is None:
        return f"{name} does not apply: {score.why}"
    return f"{name} {float(score.value):.2f}: {score.why}"
