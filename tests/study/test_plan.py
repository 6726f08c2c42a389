"""Study files: what they run, and what is refused before anything runs."""

import pytest

from stage_rl.config import load_recipe
from stage_rl.errors import StageError
from stage_rl.evaluation.request import evaluation_of, recipe_request
from stage_rl.study.plan import built_in_studies, load_study

STUDY = """
recipe: shapes_grpo
overrides: [steps=9]
cells: {cold: [algorithm.beta=0.1], hot: [algorithm.beta=0.01]}
arms:
  grpo: {}
  stage: {overrides: [algorithm.reweight=both], cells: [hot], seeds: [1]}
seeds: [1, 2]
contrasts: [[stage, grpo]]
"""


@pytest.fixture
def study_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(STUDY)
    return file


def test_runs_go_seed_by_seed_and_cell_by_cell_with_the_overrides_in_order(study_file):
    study = load_study(study_file)
    assert study.name == "mine"
    assert [str(run) for run in study.runs()] == [
        *("cold/grpo/1", "hot/grpo/1", "hot/stage/1"),
        *("cold/grpo/2", "hot/grpo/2"),
    ]
    hot = next(run for run in study.runs() if str(run) == "hot/stage/1")
    assert hot.overrides == ("steps=9", "algorithm.beta=0.01", "algorithm.reweight=both", "seed=1")


@pytest.mark.parametrize("name", built_in_studies())
def test_every_built_in_study_loads(name):
    assert list(load_study(name).runs())


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("[[stage, grpo]]", "[[stage, gppo]]", "no arm is named 'gppo'"),
        ("[[stage, grpo]]", "[[stage, stage]]", "is 'stage' twice; write two arms"),
        ("cells: [hot]", "cells: [warm]", "no cell is named 'warm'"),
        ("algorithm.reweight=both", "algorithm.reweigh=both", "did you mean 'reweight'"),
        ("recipe: shapes_grpo", "recipe: shapes_gppo", "shapes_gppo"),
        ("seeds: [1, 2]", "seeds: []", "seeds"),
        ("overrides: [steps=9]", "steps: 9", "steps"),
        (STUDY, "just words", "is not a mapping"),
        (STUDY, "[1, 2]", "is not a mapping"),
        (STUDY, "", "recipe: is required"),
        (STUDY, "a: [", "line 2: "),
        (STUDY, "[" * 100_000, "is nested too deeply"),
        (STUDY, "- " * 500, "is nested too deeply"),
        ("seeds: [1, 2]", f"seeds: [{'9' * 5000}]", "holds a value that cannot be read"),
        ("seeds: [1, 2]", "seeds: [010]", "would be octal"),
    ],
)
def test_a_fault_is_one_line_before_anything_runs(study_file, before, after, message):
    study_file.write_text(STUDY.replace(before, after))
    with pytest.raises(StageError, match=message) as caught:
        load_study(study_file)
    assert "\n" not in str(caught.value)


def test_a_study_that_is_not_there_is_named():
    with pytest.raises(StageError, match="did you mean 'pilot'"):
        load_study("pilott")


@pytest.mark.parametrize("name", built_in_studies())
def test_all_runs_of_a_cell_are_validated_alike(name):
    seen = {}
    for run in load_study(name).runs():
        if (run.cell, run.arm) not in seen:
            recipe = load_recipe(run.recipe, run.overrides)
            seen[run.cell, run.arm] = recipe_request(evaluation_of(recipe), validation=True)
    for cell in {cell for cell, _ in seen}:
        assert len({repr(request) for key, request in seen.items() if key[0] == cell}) == 1
