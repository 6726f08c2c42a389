"""The test that a reward orders images of known order."""

from __future__ import annotations

from dataclasses import dataclass

from stage_rl.errors import RewardError
from stage_rl.rewards.base import ReferenceCase, RewardConfig, Score
from stage_rl.rewards.judge import WeightedReward, ask


def require_order(config: RewardConfig, item: WeightedReward) -> None:
    """Raises a RewardError unless the reward orders all reference cases of its config."""
    outcomes = check_reward(config, item)
    wrong = [outcome for outcome in outcomes if not outcome.is_right]
    if wrong:
        raise RewardError(
            f"reward '{config.name}': {len(wrong)} of {len(outcomes)} reference pairs are in the "
            f"wrong order; {wrong[0].sentence()}; put its weights right, or write "
            "self_test: false in the reward to train without this check"
        )


def check_reward(config: RewardConfig, item: WeightedReward) -> tuple[Outcome, ...]:
    """The outcome of every reference case of a config with the reward it built; () without cases.

    A RewardError where the reward fails on a case or gives no answer in time.
    """
    outcomes = []
    for case in config.reference_cases():
        scores = ask(item, case.images_NHWC(), [case.prompt, case.prompt])
        if isinstance(scores, str):
            raise RewardError(f"reward '{config.name}': {scores}; mend it")
        outcomes.append(Outcome(case, *scores))
    return tuple(outcomes)


@dataclass(frozen=True)
class Outcome:
    """What a reward said of one case."""

    case: ReferenceCase
    better: Score
    worse: Score

    @property
    def is_right(self) -> bool:
        """Whether the better image has the higher score; equal, absent and NaN scores are wrong."""
        better, worse = self.better.value, self.worse.value
        return better is not None and worse is not None and better > worse

    def sentence(self) -> str:
        """The scores of both images, and what they are of."""
        better, worse = (
            f"no score ({score.why})" if score.value is None else f"{score.value:.4f}"
            for score in (self.better, self.worse)
        )
        return f"'{self.case.prompt.text}': {self.case.what}: {better} against {worse}"
