"""The step benchmark, on a model of a few thousand parameters."""

from __future__ import annotations

import json

import pytest

from stage_rl.bench import step
from stage_rl.bench.base import BenchResult
from stage_rl.config import load_recipe
from stage_rl.errors import InputError, StageError

PARTS = """
from stage_rl import Prompt, RewardConfig, Score
from stage_rl.prompts.files import PromptsConfig


class Texts(PromptsConfig):
    def build(self):
        return tuple(Prompt(text, i) for i, text in enumerate(("a red star", "two blue square")))


class Brightness(RewardConfig):
    def build(self, device):
        def score(images_NHWC, prompts):
            return [Score(x, "") for x in (images_NHWC.float().mean((1, 2, 3)) / 255).tolist()]

        return score
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch, tiny_janus_folder):
    (tmp_path / "step_parts.py").write_text(PARTS)
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "tiny.yaml"
    file.write_text(f"""
steps: 4
policy: {{kind: janus, path: {tiny_janus_folder}}}
prompts: {{kind: "step_parts:Texts"}}
rewards: [{{kind: "step_parts:Brightness"}}]
rollout: {{prompts_per_step: 2, group_size: 3, guidance_scale: 3.0, dtype: mixed}}
training: {{dtype: mixed}}
probe: {{every: 0}}
run: {{dir: {tmp_path}/run, log_images_every: 0}}
""")
    return load_recipe(file)


def test_every_phase_of_both_forms_is_measured(recipe, tmp_path):
    result = step.compare(recipe, rounds=2, settings={"rounds": 2})
    assert result.reached is None
    for phase in ("sample", "judge", "reference", "learn", "step"):
        trainer, eager = (result.measures[f"{form}_{phase}_ms"] for form in ("trainer", "eager"))
        assert trainer > 0
        assert eager > 0
        assert result.measures[f"speedup_{phase}"] == pytest.approx(eager / trainer)
    assert json.loads(json.dumps(result.to_dict()))["settings"] == {"rounds": 2}
    assert not (tmp_path / "run").exists()


def test_the_table_has_a_row_for_each_phase():
    measures = {
        f"{name}_{phase}{unit}": value
        for phase in step.PHASES
        for name, unit, value in (
            ("trainer", "_ms", 50.0),
            ("eager", "_ms", 120.0),
            ("ideal", "_ms", 25.0),
        )
    } | {f"speedup_{phase}": 2.4 for phase in step.PHASES}
    head, *rows, _, _ = step._table(measures)
    assert head.split() == ["phase", "trainer", "ms", "eager", "ms", "ratio", "ideal", "ms"]
    assert [row.split() for row in rows] == [
        [p, "50.0", "120.0", "2.4x", "25.0"] for p in step.PHASES
    ]
    alone = {name: value for name, value in measures.items() if not name.startswith("eager")}
    head, *rows, _, _ = step._table(alone)
    assert head.split() == ["phase", "trainer", "ms", "ideal", "ms"]
    assert [row.split() for row in rows] == [[p, "50.0", "25.0"] for p in step.PHASES]


def test_phases_are_medians_after_a_round_to_warm_up():
    def at(values):
        return lambda number: dict.fromkeys(step.PHASES.values(), values[number])

    seconds = step._medians({"a": at([9.0, 1.0, 3.0, 2.0]), "b": at([0.0, 5.0, 5.0, 8.0])}, 3)
    assert set(seconds["a"].values()) == {2.0}
    assert set(seconds["b"].values()) == {5.0}


def test_run_takes_the_shapes_recipe_with_its_options(monkeypatch, tiny_janus_folder):
    seen = {}

    def compare(recipe, *, rounds, settings):
        seen.update(recipe=recipe, rounds=rounds)
        return BenchResult("step", "", "", None, settings, {})

    monkeypatch.setattr(step, "compare", compare)
    options = {"num_prompts": 2, "group_size": 4, "guidance_scale": 2.5, "dtype": "float32"}
    result = step.run(model=str(tiny_janus_folder), **options, rounds=1, seed=3)
    recipe = seen["recipe"]
    assert recipe.policy.path == str(tiny_janus_folder)
    assert (recipe.rollout.prompts_per_step, recipe.rollout.group_size) == (2, 4)
    assert recipe.rollout.guidance_scale == 2.5
    assert recipe.rollout.dtype == recipe.training.dtype == "float32"
    assert (recipe.seed, seen["rounds"]) == (3, 1)
    assert options.items() <= dict(result.settings).items()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": 1.0}, "--guidance-scale: transformers' generate needs more than 1"),
        ({"rounds": 0}, "--rounds: 0 is out of range; write at least 1"),
        ({"group_size": 1}, "--group-size: 1 is out of range"),
        ({"dtype": "bf16"}, "rollout.dtype"),
        ({"model": "no/such/folder"}, "no/such/folder: no such folder"),
    ],
)
def test_a_wrong_option_is_one_line(options, message):
    with pytest.raises(StageError) as caught:
        step.run(**options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, InputError)


@pytest.mark.parametrize(("speedup", "reached"), [(2.0, True), (1.9, False)])
def test_the_bar_holds_for_the_shapes_sizes(monkeypatch, recipe, speedup, reached):
    seconds = {"trainer": dict.fromkeys(step.PHASES, 1.0)}
    seconds["eager"] = dict.fromkeys(step.PHASES, speedup)
    monkeypatch.setattr(step, "_medians", lambda *_: seconds)
    monkeypatch.setattr(step, "IMAGES", 2 * 3)
    monkeypatch.setattr(step, "TOKENS", 16)
    result = step.compare(recipe, rounds=1, settings={})
    assert result.reached is reached
    assert result.headline == f"{speedup:.1f}x the eager step, 1000 against {speedup * 1e3:.0f} ms"


def test_a_published_size_is_trained_alone_beside_its_ideal(tiny_published, monkeypatch):
    result = step.run(
        model="janus-7b", num_prompts=1, group_size=2, rounds=1, overrides="training.dtype=float32"
    )
    assert result.reached is None
    assert not any("eager" in name for name in result.measures)
    for phase in ("sample", "reference", "learn", "step"):
        assert result.measures[f"trainer_{phase}_ms"] > 0
        assert result.measures[f"ideal_{phase}_ms"] > 0
    assert result.headline.endswith("s ideal")
