"""`stage` itself, `stage train` and `stage recipes`: output, exit codes, no torch."""

import json
import sys
from pathlib import Path

import pytest

from stage_rl.config import load_recipe, resolved_json, run_folder
from stage_rl.errors import DivergedError, InputError, Stopped
from stage_rl.recipes import list_recipes


def test_help_names_every_verb_without_loading_torch(stage_process):
    done = stage_process("--help")
    assert done.returncode == 0, done.stderr
    for verb in ("train", "sample", "eval", "export", "recipes", "bench", "shapes"):
        assert f"\n  {verb} " in done.stdout


def test_recipes_are_listed_without_loading_torch(stage_process):
    done = stage_process("recipes")
    assert done.returncode == 0, done.stderr
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert names == sorted(list_recipes())
    assert {"shapes_geneval", "janus_pro_7b_geneval"} < set(names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "No such command 'trian'. Did you mean 'train'?"),
        (["train", "shapes_genevil"], "shapes_genevil: unknown recipe; did you mean 'shapes_"),
        (["recipes", "show", "shapes_genevil"], "shapes_genevil: unknown recipe; did you mean"),
        (["rewards", "serve", "shapes_genevil"], "shapes_genevil: no reward or recipe; did you"),
    ],
)
def test_a_wrong_name_is_one_line_and_exit_code_2_without_loading_torch(
    arguments, message, stage_process
):
    done = stage_process(*arguments)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(f"error: {message}")


def test_a_wrong_key_is_one_line_and_exit_code_2(run_main):
    assert run_main("train", "shapes_geneval", "rollout.guidance=3") == (
        2,
        "error: shapes_geneval: rollout.guidance: unknown key; did you mean 'guidance_scale'?\n",
    )


def test_a_component_beside_the_recipe_is_found(tiny_recipe, run_main, monkeypatch):
    monkeypatch.chdir(tiny_recipe.parent)
    monkeypatch.setattr("sys.path", [p for p in sys.path if p != str(tiny_recipe.parent)])
    assert run_main("train", "tiny.yaml", "--dry-run")[0] in (0, None)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train"], "missing argument 'recipe'"),
        (["train", "x", "--no-such"], "no such option"),
        (["train", "shapes_geneval", "--steps=5"], "; a setting is written key=value"),
        (["sample"], "missing argument 'model'"),
        (["sample", "shapes", "a star", "--images", "0"], "invalid value for '--images'"),
    ],
)
def test_wrong_usage_is_one_line(arguments, words, run_main):
    code, printed = run_main(*arguments)
    assert (code, printed.count("\n")) == (2, 1)
    assert printed.startswith("error: ")
    assert words in printed.lower()


def test_an_interrupt_says_how_to_go_on(monkeypatch, run_main):
    def interrupted(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("stage_rl.config.load_recipe", interrupted)
    assert run_main("train", "shapes_grpo") == (130, "stopped; the same command starts again\n")


def test_a_dry_run_prints_the_resolved_recipe(tiny_recipe, tmp_path, stage):
    done = stage("train", tiny_recipe, "steps=3", "--dry-run")
    assert done.exit_code == 0
    recipe = load_recipe(tiny_recipe, ["steps=3"])
    assert done.stdout.startswith(f"# Run folder: {run_folder(recipe)}\n")
    (tmp_path / "printed.yaml").write_text(done.stdout)
    assert resolved_json(load_recipe(tmp_path / "printed.yaml")) == resolved_json(recipe)


def test_a_dry_run_of_janus_pro_says_what_it_needs_and_is_a_recipe_still(stage, tmp_path):
    done = stage("train", "janus_pro_7b_geneval", "training.device=cpu", "--dry-run")
    assert done.exit_code == 0, done.output
    for words in ("Memory of one GPU in GB", "key-value cache", "nothing was checked"):
        assert words in done.stdout
    (tmp_path / "printed.yaml").write_text(done.stdout)
    assert load_recipe(tmp_path / "printed.yaml").steps == 1600


def test_a_dry_run_refuses_what_cannot_fit(run_main):
    code, printed = run_main(
        "train", "janus_pro_7b_geneval_1gpu", "training.memory_gb=80", "--dry-run"
    )
    assert code == 2
    assert printed.startswith("error: memory: the phase sample needs")
    assert printed.count("\n") == 1


def test_show_explains_a_recipe(tiny_recipe, stage):
    done = stage("recipes", "show", tiny_recipe)
    assert done.exit_code == 0
    assert "guidance_scale: 5.0" in done.stdout
    assert "# Images per prompt." in done.stdout


def test_train_hands_the_recipe_to_the_loop(tiny_recipe, stand_in, stage):
    seen = []
    stand_in("stage_rl.training.loop", "train", lambda recipe: seen.append(recipe) or Path("r"))
    done = stage("train", tiny_recipe, "steps=7")
    assert done.exit_code == 0
    assert [recipe.steps for recipe in seen] == [7]
    assert done.stdout == "run: r\n"


@pytest.mark.parametrize(
    ("tag", "clause", "message"),
    [
        ("counting", {"count": 0}, "include.1.count: 0; write 1 or more"),
        ("position", {"position": ["above", 1]}, "include.1.position: index 1 is"),
        ("colors", {"class": "dog"}, "include.1.class: unknown 'dog'; write one of: c"),
        ("colors", {"color": "rad"}, "include.1.color: unknown 'rad'; did you mean"),
        ("color", {}, "tag: unknown 'color'; did you mean 'colors'?"),
    ],
)
def test_a_fault_in_a_prompt_file_is_one_line_with_its_place(
    tmp_path, monkeypatch, tag, clause, message, run_main
):
    monkeypatch.chdir(tmp_path)
    star = {"class": "star", "count": 1}
    good = {"tag": "colors", "include": [star], "prompt": "a star"}
    bad = {"tag": tag, "include": [star, {**star, **clause}], "prompt": "a star"}
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(json.dumps(record) for record in (good, bad)))
    code, printed = run_main("train", "shapes_geneval", f"prompts.path={file}")
    assert (code, printed.count("\n")) == (2, 1)
    assert printed.startswith(f"error: {file}:2: {message}")


@pytest.mark.parametrize(
    ("raised", "code", "printed"),
    [
        (InputError("prompt 3 is empty; write a text"), 2, "error: prompt 3 is empty"),
        (DivergedError("loss is nan; lower optimizer.lr"), 1, "error: loss is nan; lower"),
        (Stopped("stopped after step 3", signal_number=15), 143, "stopped after step 3\n"),
    ],
)
def test_errors_become_one_line_and_an_exit_code(
    tiny_recipe, stand_in, raised, code, printed, run_main
):
    def fail(recipe):
        raise raised

    stand_in("stage_rl.training.loop", "train", fail)
    ended, said = run_main("train", tiny_recipe)
    assert (ended, said.count("\n")) == (code, 1)
    assert said.startswith(printed)
