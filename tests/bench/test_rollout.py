"""The rollout benchmark and its limits, on models of a few thousand parameters."""

import json

import pytest
import torch

from stage_rl.bench import base as limits
from stage_rl.bench import rollout
from stage_rl.bench import rollout as growing
from stage_rl.bench.base import Work
from stage_rl.policies.janus import JanusConfig
from stage_rl.rollout.engine import Engine
from stage_rl.types import Prompt


def test_every_form_is_measured(tiny_janus_folder):
    result = rollout.run(model=str(tiny_janus_folder), num_prompts=2, group_size=2, rounds=1)
    assert result.reached is None
    for form in ("mixed", "float32", "generate", "growing"):
        assert result.measures[f"{form}_images_per_s"] == pytest.approx(
            4 / result.measures[f"{form}_s"]
        )
    assert result.measures["greedy_equal"] == 1
    assert [line.split()[0] for line in result.table[1:5]] == [
        *("mixed", "float32", "generate", "growing")
    ]
    assert json.loads(json.dumps(result.to_dict()))["settings"]["rounds"] == 1


def test_a_published_size_is_measured_in_bf16_and_by_windows(tiny_published, monkeypatch):
    whole = []
    monkeypatch.setattr(rollout, "grow", lambda *a, **k: whole.append(1))
    result = rollout.run(model="janus-1b", num_prompts=1, group_size=2, rounds=1)
    assert not whole
    assert result.measures["growing_s"] > 0
    assert "float32_s" not in result.measures
    assert "greedy_equal" not in result.measures
    assert "of the byte limit" in result.headline


@pytest.mark.parametrize(
    ("changed", "reached"),
    [({}, True), ({"speedup_mixed": 1.9}, False), ({"greedy_equal": 0.99}, False)],
)
def test_the_bar_of_a_cpu_asks_for_speed_and_equal_tokens(tiny_janus, changed, reached):
    case = rollout.Case(tiny_janus, [Prompt("a star", i) for i in range(8)], 8, 5.0)
    measures = {"speedup_mixed": 2.0, "speedup_float32": 1.2, "greedy_equal": 1.0} | changed
    assert rollout._reached("shapes", case, measures) is reached
    assert rollout._reached("janus-7b", case, measures) is None


def test_a_rollout_moves_its_weights_once_a_token_and_its_live_cache(tiny_janus):
    decoder = Engine(tiny_janus).decoder
    work = Work(num_images=3, prompt_slots=10, num_tokens=16, guided=True)
    # A slot of a row: 2 (keys, values) x 2 layers x 2 heads x 16 wide x 4 bytes = 512 bytes.
    # 6 rows read 16 x 10 + 16 x 17 / 2 = 296 slots: 6 x 296 x 512.
    assert work.rollout_bytes(decoder) == 16 * decoder.step_bytes + 6 * 296 * 512
    # A layer: 2 norms of 32, qkv 96 x 32, wo 32 x 32, gate and up 96 x 32, down 32 x 48. The
    # head: 32 x 32 + 32 and 64 x 32 + 64, the last norm 32.
    layer = 64 + 96 * 32 + 32 * 32 + 96 * 32 + 32 * 48
    assert decoder.step_bytes == 4 * (2 * layer + 32 + 32 * 32 + 32 + 64 * 32 + 64)


def test_a_pass_multiplies_every_weight_and_attends(tiny_janus):
    decoder = Engine(tiny_janus).decoder
    work = Work(num_images=3, prompt_slots=5, num_tokens=16, guided=False)
    weights = 2 * (96 * 32 + 32 * 32 + 96 * 32 + 32 * 48)
    head = 32 * 32 + 64 * 32
    # 20 slots in the trunk, 16 in the head; attention 2 x 20^2 x 32 for each of 2 layers.
    row = 2 * weights * 20 + 2 * head * 16 + 2 * 400 * 32 * 2
    assert work.pass_flops(decoder) == 3 * row
    assert work.num_rows == 3


def test_windows_reach_from_the_first_token_to_the_last():
    # 576 - 16 = 560, in quarters.
    assert growing.window_starts(576) == [0, 140, 280, 420, 560]
    assert growing.window_starts(16) == [0]


def test_windows_of_a_time_that_grows_with_the_position_integrate_exactly():
    starts = growing.window_starts(576)
    middles = [start + 7.5 for start in starts]
    seconds = [1 + 0.01 * middle for middle in middles]
    # Tokens 0 to 575 on the line: 576 + 0.01 x 575 x 576 / 2 = 2232. Before 7.5 and behind 567.5
    # the nearest window counts: the 8 tokens at each end are off by 0.01 x (7.5 + ... + 0.5) = 0.32
    # and by as much with the other sign.
    assert growing.integrate(middles, seconds, 576) == pytest.approx(2232)


def test_the_windows_add_up_to_about_the_whole_loop(tiny_janus, monkeypatch):
    monkeypatch.setattr(growing, "WINDOW", 4)
    prompts = [Prompt("a red star", i) for i in range(4)]
    monkeypatch.setattr(growing, "seconds_of", lambda function: function().shape[1] * 0.5)
    # Every token takes half a second: 16 tokens take 8.
    seconds = growing.grow_seconds(tiny_janus, prompts, guidance_scale=3.0, rounds=1)
    assert seconds == pytest.approx(8.0)


def test_rates_of_the_machine_are_positive():
    cpu = torch.device("cpu")
    assert limits.copy_bytes_per_s(cpu) > 1e8
    assert limits.matmul_flops_per_s(cpu, torch.float32) > 1e8


def test_the_growing_loop_draws_whole_images(tiny_janus_folder):
    policy = JanusConfig(path=str(tiny_janus_folder), trainable=()).build(torch.device("cpu"))
    tokens_NT = growing.grow(policy, [Prompt("a star")] * 2, guidance_scale=2.0)
    assert tokens_NT.shape == (2, 16)
