"""Drawing equal-reward groups again: what is replaced, and that streams depend on nothing else."""

import math

import pytest
import torch

from stage_rl.training.resample import ATTEMPT_STRIDE, resample_groups
from stage_rl.training.trainer import PROBE_STEP, build_trainer
from stage_rl.types import Prompt, Rewards, Rollout

TEXTS = ("a", "b", "c")


def drawn(prompts, key):
    """Groups of two whose tokens and images say by which stream they were drawn."""
    values = torch.tensor([[prompt.index * 10 + key] * 2 for prompt in prompts]).view(-1, 1)
    images = values.to(torch.uint8)[:, :, None, None].expand(-1, 1, 1, 3)
    return Rollout(tuple(prompts), 2, values, images.clone(), values.float(), None, None)


def verdict(rewards, kept=None, **columns):
    rewards = torch.tensor(rewards)
    reasons = tuple(f"{x:.1f}" for x in rewards.flatten().tolist())
    kept = torch.tensor(kept) if kept else torch.ones(len(rewards), dtype=torch.bool)
    return Rewards(rewards, kept, {k: torch.tensor(v) for k, v in columns.items()}, reasons)


def resample(first, *later, cap=3):
    """Redraws three groups; `later` are the verdicts of the draws, whose prompts are recorded."""
    asked, given = [], iter(later)

    def draw(prompts, key):
        asked.append(([prompt.text for prompt in prompts], key))
        return drawn(prompts, key // ATTEMPT_STRIDE)

    prompts = tuple(Prompt(text, i) for i, text in enumerate(TEXTS))
    result = resample_groups(
        drawn(prompts, 0), first, step=5, cap=cap, draw=draw, score=lambda _: next(given)
    )
    return result, asked


def test_only_equal_groups_are_drawn_again_until_they_differ():
    first = verdict(
        [[1.0, 1.0], [0.0, 1.0], [0.5, 0.5]], score=[[1.0, 1.0], [0.0, 1.0], [0.5, 0.5]]
    )
    # The first attempt gives b's neighbours a difference in c alone, the second in a.
    one = verdict(
        [[0.0, 0.0], [0.2, 0.8]], score=[[0.0, 0.0], [0.2, 0.8]], part=[[1.0, 1.0], [2.0, 3.0]]
    )
    two = verdict([[0.3, 0.4]], score=[[0.3, 0.4]])
    result, asked = resample(first, one, two)
    assert asked == [
        (["a", "c"], 5 + ATTEMPT_STRIDE),
        (["a"], 5 + 2 * ATTEMPT_STRIDE),
    ]
    expected = torch.tensor([[0.3, 0.4], [0.0, 1.0], [0.2, 0.8]])
    assert torch.equal(result.rewards.rewards_PG, expected)
    assert torch.equal(result.rewards.columns["score"], expected)
    part = result.rewards.columns["part"].tolist()
    assert part[2] == [2.0, 3.0]
    assert all(math.isnan(x) for x in part[0] + part[1])
    assert result.rewards.reasons == ("0.3", "0.4", "0.0", "1.0", "0.2", "0.8")
    # a from the second attempt (0 * 10 + 2), b as it was (10), c from the first (20 + 1)
    assert result.rollout.tokens_NT.flatten().tolist() == [2, 2, 10, 10, 21, 21]
    assert result.rollout.images_NHWC[:, 0, 0, 0].tolist() == [2, 2, 10, 10, 21, 21]
    assert result.rollout.logprobs_NT.flatten().tolist() == [2, 2, 10, 10, 21, 21]
    assert result.rollout.entropy_NT is None
    # 2 + 1 groups drawn; the first draws: rewards 1, 1, 0, 1, 0.5, 0.5, two of three groups equal
    assert result.numbers == pytest.approx(
        {
            "resample/groups": 3,
            "resample/first_reward": 4 / 6,
            "resample/first_equal_groups": 2 / 3,
        }
    )


def test_the_first_draw_stays_where_no_draw_differs_up_to_the_cap():
    first = verdict([[1.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    result, asked = resample(first, verdict([[0.0, 0.0]]), verdict([[0.5, 0.5]]), cap=2)
    assert len(asked) == 2
    assert torch.equal(result.rewards.rewards_PG, first.rewards_PG)
    assert result.rollout.tokens_NT.flatten().tolist() == [0, 0, 10, 10, 20, 20]


def test_groups_without_a_verdict_are_neither_drawn_again_nor_taken():
    first = verdict([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0]], kept=[False, True, True])
    failed = verdict([[0.0, 0.0]], kept=[False])
    result, asked = resample(first, failed, verdict([[0.1, 0.9]]), cap=2)
    assert [texts for texts, _ in asked] == [["b"], ["b"]]
    assert result.rewards.valid_P.tolist() == [False, True, True]
    assert result.rewards.rewards_PG[1].tolist() == pytest.approx([0.1, 0.9])


def test_the_streams_of_an_attempt_are_those_of_no_step_and_of_no_probe(recipe):
    wanted = recipe("probe.every=0")
    trainer = build_trainer(wanted, wanted.prompts.build())
    assert PROBE_STEP < ATTEMPT_STRIDE
    prompts = trainer.prompts_of(0)
    keys = (0, ATTEMPT_STRIDE, 2 * ATTEMPT_STRIDE)
    first, second, third = (trainer.sample(trainer.engine, prompts, step=key) for key in keys)
    assert not torch.equal(first.tokens_NT, second.tokens_NT)
    assert not torch.equal(second.tokens_NT, third.tokens_NT)
    # A group is the same whichever others are drawn with it.
    alone = trainer.sample(trainer.engine, prompts[1:], step=ATTEMPT_STRIDE)
    assert torch.equal(alone.tokens_NT, second.tokens_NT[wanted.rollout.group_size :])
