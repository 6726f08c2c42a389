"""A study run for real, at toy size: side by side, resumed, with a run that fails."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from stage_rl.config import load_recipe, resolved_json
from stage_rl.errors import InputError
from stage_rl.study import run
from stage_rl.study.plan import load_study
from stage_rl.study.run import read_results, run_study
from stage_rl.study.tables import study_tables

STUDY = """
recipe: {recipe}
overrides: [steps=2, evaluation.every=1, evaluation.images_per_task=0, probe.every=1,
  evaluation.validation_images_per_task=1, rollout.prompts_per_step=2, rollout.group_size=2,
  optimizer.warmup_steps=0, probe.num_prompts=1, probe.images_per_prompt=1]
cells: {{toy: []}}
arms:
  grpo: {{}}
  broken: {{overrides: ['rewards.0.detector={{kind: broken_detector:Broken}}']}}
seeds: [1]
contrasts: [[broken, grpo]]
"""

BROKEN = """
from stage_rl.rewards.base import DetectorConfig


class Broken(DetectorConfig):
    def build(self, device):
        raise RuntimeError("no such detector")
"""


@pytest.mark.slow
def test_one_failed_run_does_not_end_the_others_and_the_same_command_goes_on(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "broken_detector.py").write_text(BROKEN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    file = tmp_path / "toy.yaml"
    file.write_text(STUDY.format(recipe="shapes_grpo"))
    results = run_study(load_study(file), tmp_path / "out", jobs=2)
    assert "toy/broken/1: " in capsys.readouterr().err
    broken, run = results["runs"]
    assert (broken["arm"], broken["series"]) == ("broken", {})
    assert "no such detector" in broken["failed"]
    assert run["series"]["validation/gold"][0] == [1, 2]
    assert results["base"]["toy"].keys() >= {"validation/gold", "validation/structure"}
    assert "grpo" in study_tables(results)

    before = (tmp_path / "out/runs/toy/grpo/1/metrics.jsonl").read_bytes()
    assert run_study(load_study(file), tmp_path / "out", jobs=1)["runs"] == results["runs"]
    assert (tmp_path / "out/runs/toy/grpo/1/metrics.jsonl").read_bytes() == before
    assert read_results(tmp_path / "out") == json.loads(json.dumps(results))

    shutil.rmtree(tmp_path / "out/runs/toy/grpo")
    assert (
        run_study(load_study(file), tmp_path / "out")["runs"]
        == read_results(tmp_path / "out")["runs"]
    )
    assert not (tmp_path / "out/runs/toy/grpo").exists()


def test_a_run_that_another_study_has_is_taken_over_and_none_of_other_settings(
    tmp_path, monkeypatch
):
    text = re.sub("broken: .*", "other: {{overrides: [optimizer.lr=3e-5]}}", STUDY)
    text = text.format(recipe="shapes_grpo").replace("[[broken, grpo]]", "[]")
    (tmp_path / "first.yaml").write_text(text)
    (tmp_path / "second.yaml").write_text(text.replace("grpo:", "plain:") + "reuse: [first]\n")
    first, second = (load_study(tmp_path / f"{name}.yaml") for name in ("first", "second"))
    plain, other = first.runs()
    series = {"reward/mean": [[1, 2], [0.1, 0.2]]}
    done = {"steps": 2, "failed": "", "series": series, "cell": "toy", "seed": 1}
    records = [
        done | {"arm": "grpo", "recipe": plain.recipe, "overrides": list(plain.overrides)},
        done | {"arm": "other", "recipe": other.recipe, "overrides": [*other.overrides, "seed=2"]},
    ]
    write_results(tmp_path / "first", first, records)
    started = []
    monkeypatch.setattr(run, "_run_all", lambda waiting, *_, **__: started.extend(waiting) or ())
    monkeypatch.setattr(run, "_score_base", lambda run: {})
    (taken,) = run_study(second, tmp_path / "second", jobs=1)["runs"]
    assert (taken["arm"], taken["series"]) == ("plain", series)
    assert [one.arm for one in started] == ["other"]


def write_results(folder, study, records, base=()):
    folder.mkdir(exist_ok=True)
    results = {"study": study.model_dump(mode="json"), "base": dict(base), "runs": records}
    (folder / "results.json").write_text(json.dumps(results))


@pytest.fixture
def edited(tmp_path, monkeypatch):
    """Runs a study of one arm with other overrides, training nothing; gives what was started."""
    monkeypatch.setattr(run, "_score_base", lambda recipe: {"guided": recipe.guidance_scale})

    def edit(*overrides, reuse="", name="mine", ended=()):
        text = re.sub("  broken: .*", "", STUDY).replace("[[broken, grpo]]", "[]")
        more = ", ".join(["steps=2", *overrides])
        text = text.format(recipe="shapes_grpo").replace("steps=2", more)
        (tmp_path / f"{name}.yaml").write_text(text + reuse)
        study, started = load_study(tmp_path / f"{name}.yaml"), []

        def run_all(waiting, *_, **__):
            started.extend(waiting)
            yield from ((one, why) for one in waiting for why in ended)

        monkeypatch.setattr(run, "_run_all", run_all)
        return run_study(study, tmp_path / name, jobs=1), started

    return edit


def begun(place, study_run, *, steps=2, **status):
    """The folder of a run that did some steps."""
    place.mkdir(parents=True)
    recipe = load_recipe(study_run.recipe, study_run.overrides)
    (place / "recipe.json").write_text(resolved_json(recipe))
    (place / "status.json").write_text(json.dumps(status))
    lines = [json.dumps({"step": step, "reward/mean": 0.5}) + "\n" for step in range(steps)]
    (place / "metrics.jsonl").write_text("".join(lines))


def test_a_study_file_that_was_edited_does_not_rename_finished_runs(edited, tmp_path):
    _, (first,) = edited("algorithm.beta=0.01")
    begun(first.folder(tmp_path / "mine"), first)
    results, started = edited("algorithm.beta=0.01")
    assert (results["runs"][0]["overrides"], started) == (list(first.overrides), [])
    # Another spelling of the same settings is no change.
    assert edited("algorithm.beta=1e-2")[1] == []
    before = (tmp_path / "mine/results.json").read_text()
    for change in ("algorithm.beta=0.03", "evaluation.validation_seed=5", "steps=1"):
        key = change.partition("=")[0]
        with pytest.raises(InputError, match=rf"toy/grpo/1.*differs in .*{key}"):
            edited("algorithm.beta=0.01", change)
    assert (tmp_path / "mine/results.json").read_text() == before
    # So it is where only the record is left, and where another study has the run.
    shutil.rmtree(tmp_path / "mine/runs")
    assert edited("algorithm.beta=1e-2")[1] == []
    with pytest.raises(InputError, match=r"toy/grpo/1.*differs in algorithm\.beta\)"):
        edited("algorithm.beta=0.03")


def test_a_run_whose_record_is_not_that_of_its_folder_is_not_taken_over(edited, tmp_path):
    _, (first,) = edited("algorithm.beta=0.01")
    _, (other,) = edited("algorithm.beta=0.03", name="other")
    begun(first.folder(tmp_path / "mine"), other)
    record = {"cell": "toy", "arm": "grpo", "seed": 1, "steps": 2, "failed": "", "series": {}}
    record |= {"recipe": first.recipe, "overrides": list(first.overrides)}
    write_results(tmp_path / "mine", load_study(tmp_path / "mine.yaml"), [record])
    with pytest.raises(InputError, match=r"mine/runs/toy/grpo/1: .*differs in algorithm\.beta\)"):
        edited("algorithm.beta=0.01", name="third", reuse="reuse: [mine]\n")


def test_the_base_is_drawn_again_where_its_settings_were_edited(edited):
    assert edited()[0]["base"] == {"toy": {"guided": 1.0}}
    assert edited("rollout.guidance_scale=2.0")[0]["base"] == {"toy": {"guided": 2.0}}


def test_the_base_of_another_study_is_taken_over_where_it_was_seen_alike(edited, monkeypatch):
    edited("algorithm.beta=0.01")
    monkeypatch.setattr(run, "_score_base", lambda recipe: {"drawn": recipe.guidance_scale})
    again = {"name": "third", "reuse": "reuse: [mine]\n"}
    assert edited("algorithm.beta=0.03", **again)[0]["base"] == {"toy": {"guided": 1.0}}
    other = {"name": "fourth", "reuse": "reuse: [mine]\n"}
    assert edited("rollout.guidance_scale=2.0", **other)[0]["base"] == {"toy": {"drawn": 2.0}}


def test_a_run_that_did_no_step_may_be_given_other_settings(edited):
    (found,) = edited("algorithm.beta=0.01", ended=["", "no such file"])[0]["runs"]
    assert (found["failed"], found["series"]) == ("no such file", {})
    assert [str(one) for one in edited("algorithm.beta=0.03")[1]] == ["toy/grpo/1"]


def test_why_a_run_failed_is_known_until_it_is_started_again(edited, tmp_path):
    _, (first,) = edited()
    begun(first.folder(tmp_path / "mine"), first, steps=1, state="failed", error="DivergedError")
    (found,) = edited(ended=["", "the loss"])[0]["runs"]
    assert (found["failed"], found["diverged"]) == ("the loss", True)
    (found,) = edited()[0]["runs"]
    assert (found["failed"], found["diverged"]) == ("the loss", True)
    (found,) = edited(ended=[""])[0]["runs"]
    assert (found["failed"], found.get("diverged")) == ("", None)


@pytest.mark.parametrize(
    ("visible", "expected"),
    [(None, ["0", "1"]), ("4,5", ["4", "5"]), ("GPU-a, GPU-b", ["GPU-a", "GPU-b"])],
)
def test_trainings_get_the_gpus_that_the_study_was_given(monkeypatch, visible, expected):
    monkeypatch.setattr(run.torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert run._gpus() == expected


WAITS = """
import signal, sys, time
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
open(sys.argv[1] + ".ready", "w").close()
while not told:
    time.sleep(0.01)
time.sleep(0.5)
open(sys.argv[1], "w").write(str(len(told)))
"""


def test_a_stop_is_passed_on_once_so_that_a_training_saves(tmp_path, monkeypatch):
    signals = []

    def start(_run, folder, _gpu, _threads):
        command = [sys.executable, "-c", WAITS, str(folder / "told")]
        process = subprocess.Popen(command)
        while not (folder / "told.ready").exists():
            time.sleep(0.01)
        signals.append(signal.SIGTERM)
        return process

    monkeypatch.setattr(run, "_start", start)
    monkeypatch.setattr(run, "POLL_S", 0.05)
    waiting = list(load_study("quick").runs())[:2]
    ended = run._run_all(waiting, tmp_path, [None], advance=lambda _: None, signals=signals)
    assert list(ended) == [(waiting[0], ""), (waiting[0], "")]  # it starts, and ends
    assert (tmp_path / "told").read_text() == "1"


def tried_on(slots, tmp_path, monkeypatch, *, bad):
    """The GPUs that six runs are started on, of which the bad ones fail at once."""
    on = []

    def start(_run, _folder, gpu, _threads):
        on.append(gpu)
        codes = iter([1] if gpu in bad else [None] * 5 + [0])
        return SimpleNamespace(poll=lambda: next(codes))

    monkeypatch.setattr(run, "_start", start)
    monkeypatch.setattr(run, "_why", lambda *_: "no memory")
    monkeypatch.setattr(run, "POLL_S", 0.0)
    waiting = list(load_study("quick").runs())[:6]
    ended = list(run._run_all(waiting, tmp_path, slots, advance=int, signals=[]))
    assert len(ended) == 12
    assert sum(failed == "no memory" for _, failed in ended) == sum(gpu in bad for gpu in on)
    return on


@pytest.mark.parametrize("slots", [["0", "1"], ["0", "1", "0", "1"]])
def test_a_gpu_on_which_nothing_starts_does_not_try_all(slots, tmp_path, monkeypatch, capsys):
    on = tried_on(slots, tmp_path, monkeypatch, bad=["1"])
    assert sorted(on) == ["0"] * 4 + ["1"] * 2
    assert "GPU 1: its last trainings failed before their first step" in capsys.readouterr().err


@pytest.mark.parametrize("slots", [["0"], ["0", "1"], [None]])
def test_runs_that_fail_everywhere_are_all_tried(slots, tmp_path, monkeypatch):
    assert len(tried_on(slots, tmp_path, monkeypatch, bad=slots)) == 6


def test_a_training_that_was_killed_says_so_whatever_its_log_ends_with(tmp_path):
    (tmp_path / "log").write_text("step 20: reward 0.5\nerror: no such file\n")
    assert run._why(-9, tmp_path / "log") == "killed by signal 9"
    assert run._why(1, tmp_path / "log") == "error: no such file"


def test_a_folder_without_results_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"results\.json: No such file"):
        read_results(tmp_path)


A_RUN = {"cell": "a", "arm": "b", "seed": 1, "steps": 2, "failed": "", "series": {}}
UNEVEN = {"reward/mean": [[1, 2], [0.5]]}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{}", "study: Field required"),
        ("[]", "should be an object"),
        ("[" * 100_000, "recursion limit"),
        ("not JSON", "Invalid JSON"),
        ('{"study": {"cells": {}, "arms": []}, "base": {}, "runs": []}', "study.arms: "),
        ('{"study": {"cells": {}, "arms": {}, "lines": [["a"]]}, "base": {}, "runs": []}', "lines"),
        (json.dumps({"runs": [A_RUN | {"seed": "1"}]}), r"runs\.0\.seed: "),
        (json.dumps({"runs": [A_RUN | {"series": UNEVEN}]}), "2 steps and 1 values"),
    ],
)
def test_results_that_no_study_wrote_are_one_line(tmp_path, text, why):
    if text.startswith('{"runs"'):
        text = json.dumps({"study": {"cells": {}, "arms": {}}, "base": {}} | json.loads(text))
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(InputError, match=why) as caught:
        read_results(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}/results.json: is not what a study writes (")
    assert "\n" not in str(caught.value)
