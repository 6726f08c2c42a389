"""The overlap benchmark, on a model of a few thousand parameters."""

import json

import pytest
import torch

from stage_rl.bench import reward_overlap
from stage_rl.bench.reward_overlap import SlowReward, measure
from stage_rl.config import load_recipe
from stage_rl.errors import InputError

PARTS = """
from stage_rl import Prompt, RewardConfig
from stage_rl.prompts.files import PromptsConfig


class Texts(PromptsConfig):
    def build(self):
        return tuple(Prompt(text, i) for i, text in enumerate(("a red star", "two blue square")))


class Nothing(RewardConfig):
    def build(self, device):
        return None
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch, tiny_janus_folder):
    (tmp_path / "overlap_parts.py").write_text(PARTS)
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "tiny.yaml"
    file.write_text(f"""
steps: 9
policy: {{kind: janus, path: {tiny_janus_folder}}}
prompts: {{kind: "overlap_parts:Texts"}}
rewards: [{{kind: "overlap_parts:Nothing", self_test: false}}]
rollout: {{prompts_per_step: 2, group_size: 3, guidance_scale: 3.0}}
probe: {{every: 0}}
run: {{dir: {tmp_path}/run, log_images_every: 0}}
""")
    return load_recipe(file)


def test_hidden_is_what_the_step_does_not_wait_for(recipe, tmp_path):
    result = measure(recipe, lengths=(1.0, 60.0), rounds=1, settings={"rounds": 1})
    figures = result.measures
    for length in ("1x", "60x"):
        waited = figures[f"wait_{length}_ms"] / figures[f"reward_{length}_ms"]
        assert figures[f"hidden_{length}"] == pytest.approx(1 - waited)
    # A reward much longer than the reference pass cannot hide behind it.
    assert figures["hidden_60x"] < 0.5
    assert figures["reward_60x_ms"] >= 60 * figures["reference_ms"]
    assert figures["hidden_by_step_60x"] < 1
    assert json.loads(json.dumps(result.to_dict()))["settings"]["lengths"] == [1.0, 60.0]
    assert not (tmp_path / "run").exists()


def figures_of(hidden):
    names = ("reward", "wait")
    rows = {f"{name}_{length}x_ms": 100.0 for name in names for length in ("1", "2")}
    shares = {f"{name}_{x}x": hidden for name in ("hidden", "hidden_by_step") for x in ("1", "2")}
    return {"reference_ms": 100.0, **rows, **shares}


@pytest.mark.parametrize(
    ("hidden", "lengths", "reached"),
    [(0.8, (2.0, 1.0), True), (0.79, (1.0,), False), (0.9, (2.0,), None)],
)
def test_the_bar_holds_for_a_reward_as_long_as_the_reference_pass(hidden, lengths, reached):
    result = reward_overlap._result(figures_of(hidden), lengths, {})
    assert result.reached is reached
    assert len(result.table) == 1 + len(lengths)
    assert result.headline.startswith(f"{hidden:.0%} of a reward of 100 ms is hidden")


def test_the_slow_reward_waits_and_scores_brightness():
    reward = SlowReward(0.01)
    images = torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(2, 2, 2, 3)
    assert [score.value for score in reward(images, [])] == [0.0, 1.0]
    assert reward.took_s >= 0.01


def test_a_length_of_0_is_refused():
    with pytest.raises(InputError, match="--lengths: 0 is out of range"):
        reward_overlap.run(lengths=(0.0, 1.0))
