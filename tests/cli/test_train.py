"""`stage train`: what it prints before the first step and after the last one."""

import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from stage_rl import api
from stage_rl.cli import train as train_verb
from stage_rl.config import load_recipe, resolved_json, run_folder


def test_a_wrong_key_is_one_line_and_exit_code_2(run_main):
    assert run_main("train", "shapes_geneval", "rollout.guidance=3") == (
        2,
        "error: shapes_geneval: rollout.guidance: unknown key; did you mean 'guidance_scale'?\n",
    )


def test_a_component_beside_the_recipe_is_found(tiny_recipe, run_main, monkeypatch):
    monkeypatch.chdir(tiny_recipe.parent)
    monkeypatch.delitem(sys.modules, "tiny_parts", raising=False)
    monkeypatch.setattr("sys.path", [p for p in sys.path if p != str(tiny_recipe.parent)])
    assert run_main("train", "tiny.yaml", "--dry-run")[0] in (0, None)


def test_a_dry_run_prints_the_resolved_recipe(tiny_recipe, tmp_path, stage):
    done = stage("train", tiny_recipe, "steps=3", "--dry-run")
    assert done.exit_code == 0
    recipe = load_recipe(tiny_recipe, ["steps=3"])
    assert done.stdout.startswith(f"# Run folder: {run_folder(recipe)}\n")
    (tmp_path / "printed.yaml").write_text(done.stdout)
    assert resolved_json(load_recipe(tmp_path / "printed.yaml")) == resolved_json(recipe)


def test_losses_that_are_one_with_a_single_update_are_named(tiny_recipe, stage):
    note = "algorithm.loss: with one update per rollout cispo has the gradient of clip; write opt"
    assert note in stage("train", tiny_recipe, "algorithm.loss=cispo", "--dry-run").stderr
    for other in ("algorithm.loss=clip", "optimizer.updates_per_rollout=2"):
        done = stage("train", tiny_recipe, "algorithm.loss=cispo", other, "--dry-run")
        assert done.exit_code == 0
        assert "has the gradient of clip" not in done.stderr


def test_a_dry_run_of_janus_pro_says_what_it_needs_and_is_a_recipe_still(stage, tmp_path):
    done = stage("train", "janus_pro_7b_geneval", "training.device=cpu", "--dry-run")
    assert done.exit_code == 0, done.output
    for words in ("Memory of one GPU in GB", "key-value cache", "nothing was checked"):
        assert words in done.stdout
    (tmp_path / "printed.yaml").write_text(done.stdout)
    assert load_recipe(tmp_path / "printed.yaml").steps == 1600


def test_a_dry_run_refuses_what_cannot_fit(run_main):
    small = ("janus_pro_7b_geneval_1gpu", "training.memory_gb=80")
    code, printed = run_main("train", *small, "--dry-run")
    assert (code, printed.count("\n")) == (2, 1)
    assert printed.startswith("error: memory: the phase sample needs")


def test_a_dry_run_refuses_the_folder_that_the_run_refuses(tiny_recipe, tmp_path, run_main):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    code, printed = run_main("train", tiny_recipe, f"run.dir={tmp_path}/taken", "--dry-run")
    assert code == 2
    assert "is not empty and not a run folder; give another run.dir" in printed


def test_train_hands_the_recipe_to_the_loop(tiny_recipe, monkeypatch, stage):
    seen = []
    monkeypatch.setattr(api, "train", lambda recipe: seen.append(recipe) or Path("r"))
    monkeypatch.setattr(train_verb, "at_end_of", lambda run: f"report: {run}/report.html")
    done = stage("train", tiny_recipe, "steps=7")
    assert done.exit_code == 0
    assert [recipe.steps for recipe in seen] == [7]
    assert done.stdout == "run: r\nreport: r/report.html\n"


def test_the_comparison_is_labelled_with_the_steps_of_the_run(
    tiny_recipe, tmp_path, stage, monkeypatch
):
    """A finished run of 80 steps, asked for 7: the kept comparison of 80 is shown."""
    saved = SimpleNamespace(state=SimpleNamespace(step=80))
    monkeypatch.setattr(api, "train", lambda recipe: tmp_path)
    monkeypatch.setattr(api, "latest_checkpoint", lambda root: saved)
    (tmp_path / "evaluation.txt").write_text("after 80 steps; better")
    done = stage("train", tiny_recipe, "steps=7", "evaluation={}", "run.log_images_every=0")
    assert done.exit_code == 0, done.output
    assert done.stdout == f"after 80 steps; better\nrun: {tmp_path}\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_during_the_evaluation_says_how_to_evaluate(
    tiny_recipe, tmp_path, run_main, monkeypatch, number, code
):
    before = signal.getsignal(number)
    saved = SimpleNamespace(state=SimpleNamespace(step=80))
    monkeypatch.setattr(api, "train", lambda recipe: tmp_path)
    monkeypatch.setattr(api, "latest_checkpoint", lambda root: saved)
    monkeypatch.setattr(api, "load", lambda *_: os.kill(os.getpid(), number))
    ended, said = run_main("train", tiny_recipe, "evaluation={}")
    assert (ended, said.count("\n")) == (code, 1)
    assert "same command again to evaluate" in said
    assert signal.getsignal(number) is before


def test_evaluation_prompts_among_the_training_prompts_are_named(tiny_recipe, capsys):
    """Of single objects there are eight, which the benchmark has too."""
    mix = "prompts={kind: shapes, ratios: {single_object: 1}, num_prompts: 8}"
    train_verb._say_leaks(load_recipe(tiny_recipe, [mix]))
    assert capsys.readouterr().err == ""  # nothing is compared
    train_verb._say_leaks(load_recipe(tiny_recipe, [mix, "evaluation={}"]))
    said = capsys.readouterr().err
    assert said.startswith("shapes-geneval: 8 of 356 evaluation prompts are in the training set")
    assert "(8 word for word, 0 in other words)" in said
