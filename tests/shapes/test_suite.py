"""`shapes-geneval`, run on a tiny random Janus."""

import functools
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

import stage_rl
from stage_rl.api import evaluate_against
from stage_rl.errors import CheckpointError, InputError
from stage_rl.evaluation import run
from stage_rl.evaluation.request import Request
from stage_rl.evaluation.run import compare_policies, run_suite
from stage_rl.evaluation.suites import PromptSet
from stage_rl.prompts.geneval import TASKS
from stage_rl.recipe import EvaluationConfig
from stage_rl.shapes.prompts import evaluation_records
from stage_rl.shapes.suite import INDEX_STRIDE, SHAPES_GENEVAL, benchmark_prompts
from stage_rl.types import Prompt

SETS = (*TASKS, "retention", "transfer")


def evaluate(policy, **options):
    return run_suite(policy, "shapes-geneval", Request(**options))


@pytest.fixture(scope="module")
def scored(few, tiny_shapes):
    return evaluate(tiny_shapes, images_per_task=3, guidance_scale=2.0, seed=7, dtype="float32")


@pytest.mark.parametrize("images_per_task", [1, 5, 48, 100])
def test_every_set_gets_its_images_spread_evenly(images_per_task):
    job = run._job(SHAPES_GENEVAL, Request(images_per_task=images_per_task))
    by_task = {}
    for prompt, number in zip(job.prompts, job.num_images, strict=True):
        by_task.setdefault(SHAPES_GENEVAL.task_of(prompt), []).append(number)
    assert tuple(by_task) == SETS
    for numbers in by_task.values():
        assert sum(numbers) == images_per_task
        assert max(numbers) - min(numbers) <= 1


def test_no_two_prompts_share_a_random_stream():
    prompts = benchmark_prompts()
    assert len({prompt.index for prompt in prompts}) == len(prompts) == 164 + 2 * 96
    geneval = {p.index: p.text for p in prompts if p.index < INDEX_STRIDE}
    assert geneval == {i: record["prompt"] for i, record in enumerate(evaluation_records())}


def test_every_image_is_scored_by_both_judges(scored):
    for measure in ("gold", "detector", "agreement", "structure"):
        assert Counter(one.task for one in scored.scores[measure]) == dict.fromkeys(TASKS, 3)
    for name in ("retention", "transfer"):
        assert [one.task for one in scored.scores[name]] == [name] * 3
    images = [(one.prompt, one.image) for one in scored.scores["gold"] if one.task == "counting"]
    first, second = sorted({prompt for prompt, _ in images})
    assert sorted(images) == [(first, 0), (first, 1), (second, 0)]  # 3 images of 2 prompts
    # Only the prompt with two images has a pair to compare.
    assert len(scored.scores["diversity_background"]) <= 6
    assert set(scored.scores) <= {*SHAPES_GENEVAL.by_task, *SHAPES_GENEVAL.overall}
    assert "shapes-geneval, 3 images per task, guidance 2, seed 7, float32" in scored.table()


def test_random_streams_do_not_depend_on_how_many_images_there_are(scored, few, tiny_shapes):
    fewer = evaluate(tiny_shapes, images_per_task=2, guidance_scale=2.0, seed=7, dtype="float32")
    known = {(one.prompt, one.image): one.value for one in scored.scores["structure"]}
    assert fewer.scores["structure"]
    for one in fewer.scores["structure"]:
        assert one.value == known[one.prompt, one.image]


def test_a_policy_compared_with_itself_has_no_difference(few, tiny_shapes, tmp_path):
    request = Request(out=tmp_path, images_per_task=2, guidance_scale=1.0)
    (comparison,) = evaluate_against(tiny_shapes, tiny_shapes, ["shapes-geneval"], request)
    # What is there, the diversity of each prompt's images too, is taken up.
    assert evaluate_against(tiny_shapes, tiny_shapes, ["shapes-geneval"], request) == [comparison]
    assert (tmp_path / "model" / "shapes-geneval.json").exists()
    for measure in comparison.base.scores:
        change = comparison.difference(measure)
        assert change
        assert all(row.mean == 0 for row in change.values())


def test_measures_that_were_cut_off_are_taken_again(few, tiny_shapes, tmp_path):
    options = {"images_per_task": 2, "guidance_scale": 1.0, "out": tmp_path}
    whole = stage_rl.evaluate(tiny_shapes, **options)
    files = sorted(tmp_path.glob("images/*/*/measures.json"))
    kept = [file.read_text() for file in files[:3]]
    for file, damaged in zip(files, (kept[0][:20], "[]", '{"num_images": 2}'), strict=False):
        file.write_text(damaged)
    assert stage_rl.evaluate(tiny_shapes, **options) == whole
    assert [file.read_text() for file in files[:3]] == kept
    record = files[0].with_name("metadata.jsonl")
    record.write_text(record.read_text()[:20])
    files[0].unlink()
    with pytest.raises(InputError, match=r"metadata\.jsonl: is cut off or damaged; remove .*00"):
        stage_rl.evaluate(tiny_shapes, **options)


def test_a_run_gets_its_figures_and_its_grid(few, tiny_shapes, tmp_path):
    settings = EvaluationConfig(images_per_task=1, guidance_scale=1.0, seed=1)
    run_it = functools.partial(compare_policies, tiny_shapes, tiny_shapes, evaluation=settings)
    title = run_it(out=tmp_path).splitlines()[0]
    assert title.endswith("1 images per task, guidance 1, seed 1, mixed")
    figures = json.loads((tmp_path / "evaluation.json").read_text())
    assert set(figures) == {"asked", "base", "trained", "difference", "figures"}
    assert figures["base"]["guidance_scale"] == 1.0
    shown = json.loads((tmp_path / "before_after.json").read_text())
    assert shown["measure"] == "gold"
    gold = {
        (task, image): bool(value)
        for task, rows in figures["base"]["scores"]["gold"].items()
        for _, image, value in rows
    }
    with Image.open(tmp_path / "before_after.png") as picture:
        for one in shown["images"]:
            # A policy beside itself: both halves hold the same image and verdict.
            base, trained = one["base"], one["trained"]
            assert base["value"] == trained["value"] == gold[one["task"], one["image"]]
            same = [np.asarray(picture.crop(side["box"])) for side in (base, trained)]
            assert same[0].shape == (192, 192, 3)  # 4 x 48 pixels
            assert np.array_equal(*same)
            assert base["box"][0] < trained["box"][0]
    names = {"before_after.json", "before_after.png", "evaluation.json"}
    assert {path.name for path in tmp_path.iterdir()} == names
    with pytest.raises(CheckpointError, match="could not be written"):
        run_it(out=tmp_path / "evaluation.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"benchmark": "shapes_geneval"}, "did you mean 'shapes-geneval'?"),
        ({"images_per_task": 0}, "images_per_task: 0 is out of range"),
        ({"seed": -1}, "seed: -1 is out of range"),
        ({"guidance_scale": -2.0}, "guidance_scale: -2.0 is out of range"),
        ({"dtype": "bf16"}, "dtype: unknown 'bf16'"),
    ],
)
def test_wrong_settings_are_one_clear_line(tiny_shapes, options, message):
    fields = dict(options)
    name = fields.pop("benchmark", "shapes-geneval")
    with pytest.raises(InputError) as caught:
        run_suite(tiny_shapes, name, Request(**fields))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_is_loaded_by_name_before_another_is_scored(few, tiny_shapes_folder, tmp_path):
    options = {"images_per_task": 1, "guidance_scale": 1.0}
    seen = stage_rl.evaluate(str(tiny_shapes_folder), out=tmp_path / "out", **options)
    assert seen.model == str(tiny_shapes_folder)
    with pytest.raises(InputError, match="no such folder"):
        evaluate_against(str(tiny_shapes_folder), str(tmp_path / "none"), ["shapes-geneval"])


def test_a_model_of_another_image_size_is_refused(tiny_janus, monkeypatch):
    prompts = [Prompt("a red circle", 0, {"tag": "colors", "include": []})]
    monkeypatch.setattr(PromptSet, "prompts", lambda *_args, **_options: prompts)
    with pytest.raises(InputError, match="draws images of 16 x 16; shapes-geneval judges 48 x 48"):
        evaluate(tiny_janus, images_per_task=1, guidance_scale=1.0)
