"""The rollout benchmark, on models of a few thousand parameters."""

import pytest
import torch

from stage_rl.bench import rollout
from stage_rl.types import Prompt


def test_every_form_is_measured(tiny_janus_folder):
    result = rollout.run(model=str(tiny_janus_folder), num_prompts=2, group_size=2, rounds=1)
    assert result.reached is None
    forms = ("mixed", "float32", "torch", "generate", "growing")
    for form in forms:
        rate = result.measures[f"{form}_images_per_s"]
        assert rate == pytest.approx(4 / result.measures[f"{form}_s"])
    assert result.measures["greedy_equal"] == 1
    assert tuple(line.split()[0] for line in result.table[1:6]) == forms


def test_a_published_size_is_measured_in_bf16_and_by_windows(tiny_published):
    result = rollout.run(model="janus-1b", num_prompts=1, group_size=2, rounds=1)
    assert result.measures["growing_s"] > 0
    assert not {"float32_s", "greedy_equal"} & result.measures.keys()
    assert "of the byte limit" in result.headline


@pytest.mark.parametrize(
    ("changed", "reached"),
    [({}, True), ({"mixed_speedup": 2.9}, False), ({"greedy_equal": 0.99}, False)],
)
def test_the_bar_of_a_cpu_asks_for_speed_and_equal_tokens(changed, reached, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    measures = {"mixed_speedup": 3.0, "float32_speedup": 1.2, "greedy_equal": 1.0} | changed
    assert rollout._reached("shapes", 64, measures) is reached
    assert rollout._reached("shapes", 32, measures) is None
    assert rollout._reached("janus-7b", 64, measures) is None


def test_windows_from_the_first_token_to_the_last_integrate_a_line_exactly(tiny_janus, monkeypatch):
    # Token t takes 1 + 0.1 t seconds; windows of 4 at 0, 3, 6, 9, 12 of 16 tokens.
    windows = iter([start for start in (0, 3, 6, 9, 12) for _ in range(2)])
    monkeypatch.setattr(rollout, "WINDOW", 4)

    def of_window(function, timer):
        assert function().shape == (4, 4)
        first = next(windows)
        return sum(1 + 0.1 * (first + token) for token in range(4))

    monkeypatch.setattr(rollout, "seconds_of", of_window)
    prompts = [Prompt("a red star", i) for i in range(4)]
    seconds = rollout.grow_seconds(tiny_janus, prompts, guidance_scale=3.0, rounds=1)
    # 16 + 0.1 x 15 x 16 / 2; the ends, where the nearest window counts, cancel.
    assert seconds == pytest.approx(28.0)
