"""Calls of a reward: which requests share one, and what a failure costs."""

import asyncio

import numpy as np
import pytest

from stage_rl.errors import InputError, RewardError
from stage_rl.rewards.base import Score
from stage_rl.serving.limits import Metrics
from stage_rl.serving.service import Batcher
from stage_rl.types import Prompt


def images(count, side=2):
    return np.zeros((count, side, side, 3), np.uint8)


def prompts(*texts):
    return [Prompt(text, index) for index, text in enumerate(texts)]


class Recorder:
    """Scores a prompt by its text as a number, and keeps the texts of each call."""

    def __init__(self):
        self.calls = []

    def __call__(self, images_NHWC, prompts):
        assert len(images_NHWC) == len(prompts)
        self.calls.append([prompt.text for prompt in prompts])
        if "exit" in self.calls[-1]:
            raise SystemExit(3)
        return [Score(float(prompt.text), prompt.text) for prompt in prompts]


def run(jobs, *, reward, batch_size=4, delay_s=0.05):
    """The scores, or the error, of jobs that arrive at once: pairs of images and prompts."""

    async def all_jobs():
        batcher = Batcher("r", reward, batch_size=batch_size, delay_s=delay_s, metrics=Metrics())
        calling = asyncio.create_task(batcher.run())
        asked = [batcher.score(*job) for job in jobs]
        outcomes = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 10)
        assert batcher.num_waiting == 0
        calling.cancel()
        return outcomes

    return asyncio.run(all_jobs())


def test_requests_share_calls_up_to_the_batch_size_and_keep_their_scores():
    reward = Recorder()
    jobs = [(images(n), prompts(*"123"[:n])) for n in (2, 1, 3, 1)]
    outcomes = run(jobs, reward=reward)
    # 2 + 1, then the last 1 fits beside them and the 3 do not.
    assert reward.calls == [["1", "2", "1", "1"], ["1", "2", "3"]]
    assert [[score.value for score in scores] for scores in outcomes] == [
        [1, 2],
        [1],
        [1, 2, 3],
        [1],
    ]


def test_a_request_above_the_batch_size_is_one_call():
    reward = Recorder()
    run([(images(6), prompts(*"123456")), (images(1), prompts("1"))], reward=reward)
    assert [len(call) for call in reward.calls] == [6, 1]


def test_a_full_batch_does_not_wait():
    jobs = [(images(2), prompts("1", "2"))] * 2
    assert len(run(jobs, reward=Recorder(), delay_s=60)) == 2


def test_images_of_several_sizes_do_not_share_a_call():
    reward = Recorder()
    jobs = [(images(1, side), prompts(str(side))) for side in (2, 3, 2)]
    outcomes = run(jobs, reward=reward)
    assert reward.calls == [["2", "2"], ["3"]]
    assert [scores[0].value for scores in outcomes] == [2, 3, 2]


def test_with_a_batch_size_of_0_requests_share_no_call():
    reward = Recorder()
    run([(images(1), prompts("1"))] * 3, reward=reward, batch_size=0, delay_s=60)
    assert reward.calls == [["1"]] * 3


@pytest.mark.parametrize(("text", "error"), [("bad", ValueError), ("exit", RuntimeError)])
def test_a_failure_is_that_of_its_request_alone(text, error):
    reward = Recorder()
    first, second, third = run([(images(1), prompts(t)) for t in ("1", text, "3")], reward=reward)
    assert (first[0].value, third[0].value) == (1, 3)
    assert isinstance(second, error)
    assert reward.calls == [["1", text, "3"], ["1"], [text], ["3"]]


def test_a_reward_that_returns_something_else_is_an_error():
    (outcome,) = run([(images(2), prompts("1", "2"))], reward=lambda i, p: [Score(1, "")])
    assert isinstance(outcome, RewardError)
    assert "1 scores for 2 images" in str(outcome)


def test_the_users_mistake_stays_what_it_is():
    def refuse(images_NHWC, prompts):
        raise InputError("no such model")

    (outcome,) = run([(images(1), prompts("1"))], reward=refuse)
    assert isinstance(outcome, InputError)
