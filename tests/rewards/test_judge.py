"""Weighted sums, rewards that do not apply, and rewards that fail."""

import math
import sys
import threading
from fractions import Fraction

import numpy as np
import pytest
import torch

from stage_rl.errors import InputError, RewardError
from stage_rl.prompts.sets import FilePromptsConfig
from stage_rl.rewards import threads
from stage_rl.rewards.base import Requirement, RewardConfig, Score
from stage_rl.rewards.judge import RewardFunctions, WeightedReward, ask, check_fields
from stage_rl.training.metrics import reward_metrics
from stage_rl.types import Prompt, Rollout


def a_rollout(num_prompts=2, group_size=2):
    """Images whose first pixel is their number."""
    num = num_prompts * group_size
    images = torch.arange(num, dtype=torch.uint8).view(num, 1, 1, 1).expand(num, 4, 4, 3)
    prompts = tuple(Prompt(f"prompt {i}", i) for i in range(num_prompts))
    return Rollout(prompts, group_size, torch.zeros(num, 3, dtype=torch.long), images)


def number(images, prompts):
    return [Score(float(image[0, 0, 0]), f"number {image[0, 0, 0]}") for image in images]


def judge(*rewards):
    return RewardFunctions([WeightedReward(*reward) for reward in rewards]).score(a_rollout())


def test_the_reward_is_the_weighted_sum_and_columns_stay_raw():
    constant = [Score(1.0, "always", {"strict": 0.5})]
    judged = judge(("a", 0.5, number), ("b", 2.0, lambda images, prompts: constant * len(images)))
    # 0.5 x number + 2 x 1
    assert judged.rewards_PG.tolist() == [[2.0, 2.5], [3.0, 3.5]]
    assert judged.columns["a"].tolist() == [[0, 1], [2, 3]]
    assert judged.columns["b_strict"].tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert judged.valid_P.tolist() == [True, True]
    assert judged.reasons[3] == "a 3.00: number 3; b 1.00: always"


def test_a_reward_that_skips_one_image_drops_out_for_its_whole_group():
    def skips_image_1(images, prompts):
        return [Score(None if s.value == 1 else s.value, s.why) for s in number(images, prompts)]

    judged = judge(("a", 1.0, skips_image_1), ("b", 10.0, number))
    # group 0: only b; group 1: a + 10 b
    assert judged.rewards_PG.tolist() == [[0, 10], [22, 33]]
    assert judged.columns["a_share"].tolist() == [[0, 0], [pytest.approx(1 / 11)] * 2]
    assert math.isnan(judged.columns["a"][0, 1])
    assert judged.valid_P.all()


def test_a_reward_with_a_condition_counts_where_another_says_enough_and_its_column_stays_raw():
    def applies_to_group_1(images, prompts):
        return [Score(s.value if s.value > 1 else None, "") for s in number(images, prompts)]

    rewards = [
        WeightedReward("a", 1.0, number, requires=Requirement(reward="b", at_least=3)),
        WeightedReward("b", 10.0, applies_to_group_1),
    ]
    judged = RewardFunctions(rewards).score(a_rollout())
    # b says 2 and 3 of the second group and nothing of the first, so a counts for image 3 alone.
    assert judged.rewards_PG.tolist() == [[0, 0], [20, 33]]
    assert judged.columns["a"].tolist() == [[0, 1], [2, 3]]
    assert judged.components["a"].tolist() == [[0, 0], [0, 3]]
    assert judged.weights == {"a": 1.0, "b": 10.0}
    assert judged.valid_P.all()


def test_the_share_of_a_reward_is_its_part_of_the_groups_spread():
    def constant_in_group_1(images, prompts):
        return [Score(s.value if s.value < 2 else 7.0, "") for s in number(images, prompts)]

    judged = judge(("a", 1.0, number), ("b", -3.0, constant_in_group_1))
    # group 0: deviations of 0, 1 and of 0, -3 are 1 : 3; group 1: only a differs
    assert judged.columns["a_share"].tolist() == [[0.25, 0.25], [1, 1]]
    assert judged.columns["b_share"].tolist() == [[0.75, 0.75], [0, 0]]


def test_a_group_without_spread_or_that_failed_has_no_shares():
    def fails_on_image_0(images, prompts):
        if images[0, 0, 0, 0] == 0:
            raise OSError
        return [Score(1.0, "")] * len(images)

    judged = judge(("a", 1.0, fails_on_image_0), ("b", 1.0, lambda i, p: [Score(2.0, "")] * len(i)))
    assert judged.valid_P.tolist() == [False, True]
    assert judged.columns["a_share"].isnan().all()
    assert judged.columns["b_share"].isnan().all()


def test_a_failing_image_takes_only_its_group_out_of_the_step():
    calls = []

    def fails_on_image_2(images, prompts):
        calls.append(len(images))
        if any(image[0, 0, 0] == 2 for image in images):
            raise OSError("no such device")
        return number(images, prompts)

    judged = judge(("a", 1.0, fails_on_image_2))
    assert judged.valid_P.tolist() == [True, False]
    assert judged.rewards_PG.tolist() == [[0, 1], [0, 0]]
    assert judged.columns["a"][1].isnan().all()
    line = fails_on_image_2.__code__.co_firstlineno + 3
    assert judged.reasons[2] == f"a failed: OSError: no such device (test_judge.py:{line})"
    # once for all images, then once for each group
    assert calls == [4, 2, 2]


def test_a_reward_that_fails_once_is_asked_again():
    calls = []

    def fails_first(images, prompts):
        calls.append(len(images))
        if len(calls) == 1:
            raise TimeoutError("slow")
        return number(images, prompts)

    assert judge(("a", 1.0, fails_first)).rewards_PG.tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    ("value", "weight"), [(math.nan, 1), (math.inf, 1), (-1e39, 1), (10**400, 1), (3e38, 10)]
)
def test_a_score_that_is_no_number_in_fp32_is_a_failure_and_not_a_zero(value, weight):
    def broken(images, prompts):
        return [Score(value if s.value == 3 else s.value, s.why) for s in number(images, prompts)]

    judged = judge(("a", weight, broken))
    assert list(judged.columns) == ["a"]  # one reward alone has no share
    assert judged.valid_P.tolist() == [True, False]
    assert judged.reasons[3] == f"a gave {value} (number 3)"


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (None, r"returned NoneType; return a list with one Score\(value, why\) per image"),
        ([Score(1.0, "")], "1 scores for 4 images"),
        ([0.5] * 4, r"returned a list of float; return a list with one Score"),
        ([None] * 4, r"returned a list of NoneType; return a list with one Score"),
        ([Score("0.5", "")] * 4, r"a score holds '0\.5', of type str; write a float"),
        ([Score(0.5, "", {"x": None})] * 4, r"a score holds None, of type NoneType"),
    ],
)
def test_a_return_that_is_no_list_of_scores_names_the_reward_and_what_to_return(returned, words):
    with pytest.raises(RewardError, match=f"reward 'mine': {words}"):
        judge(("mine", 1.0, lambda images, prompts: returned))


def test_a_missing_field_names_reward_and_field():
    class NeedsTag(RewardConfig):
        required_fields = ("tag",)

        def build(self, device):
            raise AssertionError

    reward = NeedsTag(name="needs_tag")
    check_fields([reward], [Prompt("a", 0, {"tag": "colors"})])
    with pytest.raises(InputError, match=r"prompt 7 .*'needs_tag' needs 'tag'"):
        check_fields([reward], [Prompt("a", 7)])


@pytest.mark.parametrize("value", [1, True, Fraction(1, 2), np.float32(0.5), np.int64(3)])
def test_any_real_number_is_a_score_and_an_extra(value):
    scores = [Score(value, "", {"extra": value})] * 4
    judged = judge(("a", 1.0, lambda images, prompts: scores))
    assert judged.columns["a"].tolist() == [[float(value)] * 2] * 2
    assert reward_metrics(judged)["reward/a_extra"] == float(value)


def test_an_extra_beyond_what_a_float_holds_names_the_reward():
    for huge in (10**400, Fraction(10**400, 3)):
        scores = [Score(1.0, "", {"extra": huge})] * 4
        with pytest.raises(RewardError, match="reward 'a': an extra is beyond what a float holds"):
            judge(("a", 1.0, lambda images, prompts, scores=scores: scores))


def test_an_exit_is_a_failure_that_names_file_and_line(caplog):
    def leaves(images, prompts):
        sys.exit(0)

    with caplog.at_level("WARNING"):
        judged = judge(("a", 1.0, leaves))
    assert not judged.valid_P.any()
    line = leaves.__code__.co_firstlineno + 1
    # In one line for all groups, which failed for the same reason.
    expected = [f"reward 'a' failed: SystemExit: 0 (test_judge.py:{line})"]
    assert [record.getMessage() for record in caplog.records] == expected


def test_a_reward_that_edits_its_images_changes_nobody_elses():
    def blackens(images, prompts):
        scores = number(images, prompts)
        images.zero_()
        return scores

    rollout = a_rollout()
    before = rollout.images_NHWC.clone()
    rewards = [WeightedReward(name, 1.0, blackens) for name in "ab"]
    assert RewardFunctions(rewards).score(rollout).rewards_PG.tolist() == [[0, 2], [4, 6]]
    assert torch.equal(rollout.images_NHWC, before)


def test_a_group_to_which_no_reward_applies_is_dropped_and_has_no_mean():
    judged = judge(("a", 1.0, lambda images, prompts: [Score(None, "no faces")] * 4))
    assert not judged.valid_P.any()
    assert reward_metrics(judged) == {"reward/failed_groups": 2.0}
    assert judged.reasons[0] == "a does not apply: no faces"


def test_a_reward_that_never_returns_is_left_after_a_signal(monkeypatch):
    monkeypatch.setattr(threads, "STOP_S", 0.1)
    item = WeightedReward("slow", 1.0, lambda images, prompts: threading.Event().wait(60))
    with pytest.raises(threads.RewardsPendingError):
        ask(item, torch.zeros(1, 2, 2, 3, dtype=torch.uint8), [Prompt("a", 0)], signals=[15])


def test_a_reward_that_never_returns_ends_in_time():
    stop = threading.Event()

    def hangs(images, prompts):
        stop.wait(20)

    with pytest.raises(RewardError, match=r"'a': gave no answer for 0\.05 s; see where it waits"):
        judge(("a", 1.0, hangs, 0.05))
    stop.set()

    def own_timeout(images, prompts):
        raise TimeoutError("its own")

    assert not judge(("a", 1.0, own_timeout, 5.0)).valid_P.any()


def test_a_score_whose_square_fp32_does_not_hold_is_a_failure():
    def huge(images, prompts):
        return [Score(s.value * 1e19, s.why) for s in number(images, prompts)]

    assert not judge(("a", 1.0, huge)).valid_P.any()
    assert not judge(("a", 1e19, number)).valid_P.any()


def test_a_reason_is_a_text():
    with pytest.raises(RewardError, match="reward 'a': why is None; write a text"):
        judge(("a", 1.0, lambda images, prompts: [Score(1.0, None)] * 4))


def test_a_prompt_of_a_file_that_a_reward_cannot_judge_is_named_by_its_line(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "a dog", "tag": "x"}\n{"prompt": "a star"}\n')

    class Tagged(RewardConfig):
        required_fields = ("tag",)

        def build(self, device):
            return number

    prompts = FilePromptsConfig(path=str(file)).build()
    with pytest.raises(InputError, match=rf"^{file}:2 \('a star'\): reward 'tagged' needs 'tag'"):
        check_fields([Tagged(name="tagged")], prompts)
