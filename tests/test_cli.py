"""The command line: what it prints, its exit codes, and that it answers without torch."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from stage_rl import cli
from stage_rl.cli.options import call
from stage_rl.cli.sample import grid
from stage_rl.config import load_recipe, resolved_json, run_folder
from stage_rl.errors import DivergedError, InputError, Stopped

RUN = """
import sys
from stage_rl.cli import main
sys.argv = ["stage", *sys.argv[1:]]
try:
    main()
finally:
    heavy = {"torch", "transformers", "scipy"} & set(sys.modules)
    assert not heavy, heavy
"""


def stage(*arguments):
    """Runs a verb in this process."""
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def stage_process(*arguments):
    """Runs a verb in a process of its own, which fails where torch was loaded."""
    command = [sys.executable, "-c", RUN, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def stand_in(monkeypatch):
    """Puts a module with one name in place of a real one."""

    def put(module, name, value):
        replacement = ModuleType(module)
        setattr(replacement, name, value)
        monkeypatch.setitem(sys.modules, module, replacement)

    return put


def run_main(monkeypatch, *arguments):
    """Runs main() with these arguments; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["stage", *map(str, arguments)])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code


def test_help_names_every_verb_without_loading_torch():
    done = stage_process("--help")
    assert done.returncode == 0, done.stderr
    for verb in ("train", "sample", "eval", "recipes", "bench", "shapes"):
        assert f"\n  {verb} " in done.stdout


def test_recipes_are_listed_without_loading_torch():
    done = stage_process("recipes")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        "shapes_entropy",
        "shapes_geneval",
        "shapes_grpo",
    ]


def test_a_wrong_recipe_is_one_line_and_exit_code_2_without_loading_torch():
    done = stage_process("train", "shapes_geneval", "rollout.guidance=3")
    assert done.returncode == 2
    assert done.stderr == (
        "error: shapes_geneval: rollout.guidance: unknown key; did you mean 'guidance_scale'?\n"
    )


def test_a_component_beside_the_recipe_is_found(tiny_recipe):
    command = [sys.executable, "-c", RUN, "train", "tiny.yaml", "--dry-run"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tiny_recipe.parent
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", [["trian"], ["train"], ["train", "x", "--no-such"], ["eval"]])
def test_wrong_usage_exits_with_2(arguments):
    assert stage(*arguments).exit_code == 2


def test_a_dry_run_prints_the_resolved_recipe(tiny_recipe, tmp_path):
    done = stage("train", tiny_recipe, "steps=3", "--dry-run")
    assert done.exit_code == 0
    recipe = load_recipe(tiny_recipe, ["steps=3"])
    assert done.stdout.startswith(f"# Run folder: {run_folder(recipe)}\n")
    (tmp_path / "printed.yaml").write_text(done.stdout)
    assert resolved_json(load_recipe(tmp_path / "printed.yaml")) == resolved_json(recipe)


def test_show_explains_a_recipe(tiny_recipe):
    done = stage("recipes", "show", tiny_recipe)
    assert done.exit_code == 0
    assert "guidance_scale: 5.0" in done.stdout
    assert "# Images per prompt." in done.stdout


def test_train_hands_the_recipe_to_the_loop(tiny_recipe, stand_in):
    seen = []
    stand_in("stage_rl.training.loop", "train", lambda recipe: seen.append(recipe) or Path("r"))
    done = stage("train", tiny_recipe, "steps=7")
    assert done.exit_code == 0
    assert [recipe.steps for recipe in seen] == [7]
    assert done.stdout == "run: r\n"


@pytest.mark.parametrize(
    ("raised", "code", "printed"),
    [
        (InputError("prompt 3 is empty; write a text"), 2, "prompt 3 is empty; write a text"),
        (DivergedError("loss is nan; lower optimizer.lr"), 1, "loss is nan; lower optimizer.lr"),
    ],
)
def test_errors_become_one_line_and_an_exit_code(
    tiny_recipe, stand_in, monkeypatch, capsys, raised, code, printed
):
    def fail(recipe):
        raise raised

    stand_in("stage_rl.training.loop", "train", fail)
    assert run_main(monkeypatch, "train", tiny_recipe) == code
    assert capsys.readouterr().err == f"error: {printed}\n"


def test_a_stopped_run_says_how_to_go_on_and_exits_by_its_signal(
    tiny_recipe, stand_in, monkeypatch, capsys
):
    def stop(recipe):
        raise Stopped("stopped after step 3; run the same command again", signal_number=15)

    stand_in("stage_rl.training.loop", "train", stop)
    assert run_main(monkeypatch, "train", tiny_recipe) == 143
    assert capsys.readouterr().err == "stopped after step 3; run the same command again\n"


def test_an_interrupt_exits_with_130_and_no_traceback(tiny_recipe, stand_in, monkeypatch, capsys):
    def interrupt(recipe):
        raise KeyboardInterrupt

    stand_in("stage_rl.training.loop", "train", interrupt)
    assert run_main(monkeypatch, "train", tiny_recipe) == 130
    assert "Traceback" not in capsys.readouterr().err


@dataclass
class Images:
    images_NHWC: object


class Array(np.ndarray):
    def numpy(self):
        return np.asarray(self)


def test_sample_writes_a_grid_of_one_row_per_prompt(tmp_path, stand_in):
    seen = {}

    def draw(model, prompts, **options):
        seen.update(model=model, prompts=prompts, **options)
        return Images(np.zeros((4, 48, 48, 3), np.uint8).view(Array))

    stand_in("stage_rl.rollout.sample", "sample", draw)
    out = tmp_path / "grid.png"
    done = stage("sample", "shapes", "a", "b", "--images", 2, "--seed", 3, "--out", out)
    assert done.exit_code == 0, done.output
    assert seen == {
        "model": "shapes",
        "prompts": ["a", "b"],
        "images_per_prompt": 2,
        "guidance_scale": 5.0,
        "temperature": 1.0,
        "seed": 3,
    }
    # 48 pixels are shown as 192; two tiles and three gaps of 4: 2 x 192 + 3 x 4 = 396.
    with Image.open(out) as picture:
        assert picture.size == (396, 396)


def test_a_grid_places_images_row_by_row():
    images_NHWC = np.zeros((3, 192, 192, 3), np.uint8)
    images_NHWC[1] = 100
    images_NHWC[2] = 200
    picture = np.asarray(grid(images_NHWC, columns=2))
    # Tiles start at 4 and at 4 + 196 = 200; the fourth place stays white.
    assert [picture[y, x, 0] for y in (4, 200) for x in (4, 200)] == [0, 100, 200, 255]


def test_a_grid_needs_a_png_in_a_folder_that_is(tmp_path, monkeypatch, capsys):
    for out in (tmp_path / "none" / "grid.png", tmp_path / "grid.jpg"):
        assert run_main(monkeypatch, "sample", "shapes", "a", "--out", out) == 2
        assert capsys.readouterr().err.startswith(f"error: --out {out}: ")


def test_a_grid_that_cannot_be_written_is_one_line(tmp_path, stand_in, monkeypatch, capsys):
    blank = Images(np.zeros((1, 48, 48, 3), np.uint8).view(Array))
    stand_in("stage_rl.rollout.sample", "sample", lambda *_, **__: blank)
    out = tmp_path / "taken.png"
    out.mkdir()
    assert run_main(monkeypatch, "sample", "shapes", "a", "--images", 1, "--out", out) == 1
    assert capsys.readouterr().err == f"error: --out {out}: Is a directory; name another file\n"


def test_an_option_that_is_not_a_number_or_not_finite_is_refused():
    for value in ("nan", "inf", "much", "-1"):
        assert stage("sample", "shapes", "a", "--guidance-scale", value).exit_code == 2


@dataclass
class Scores:
    """Stands in for a benchmark's results."""

    model: str

    def table(self):
        return f"table of {self.model}"

    def to_json(self):
        return {"model": self.model}


def test_eval_prints_the_table_and_writes_the_figures(tmp_path, stand_in):
    seen = {}

    def score(model, **options):
        seen.update(options)
        return Scores(model)

    stand_in("stage_rl.evaluation.runner", "evaluate", score)
    file = tmp_path / "out.json"
    done = stage("eval", "shapes", "--images-per-task", 4, "--json", file)
    assert done.exit_code == 0, done.output
    assert done.stdout == "table of shapes\n"
    assert json.loads(file.read_text()) == {"model": "shapes"}
    assert seen == {
        "benchmark": "shapes-geneval",
        "images_per_task": 4,
        "guidance_scale": None,
        "seed": 0,
        "dtype": "mixed",
    }


def test_eval_against_a_base_prints_the_comparison(stand_in):
    stand_in(
        "stage_rl.evaluation.runner",
        "evaluate_against",
        lambda model, base, **options: Scores(f"{model} against {base}"),
    )
    done = stage("eval", "runs/mine", "--against", "shapes")
    assert done.exit_code == 0, done.output
    assert done.stdout == "table of runs/mine against shapes\n"


class Result:
    def line(self):
        return "reweight: 12x"

    def to_dict(self):
        return {"ratio": 12.0}


def test_bench_prints_the_ratio_and_writes_the_figures(tmp_path, stand_in):
    seen = {}

    def run(*, rounds: int = 3, dtype: str = "float32", sizes: tuple[int, ...] = (8, 64)):
        """Times it."""
        seen.update(rounds=rounds, dtype=dtype, sizes=sizes)
        return Result()

    stand_in("stage_rl.bench.reweight", "run", run)
    file = tmp_path / "out.json"
    done = stage("bench", "reweight", "--rounds", 5, "--json", file, "--sizes=4,16")
    assert done.exit_code == 0, done.output
    assert done.stdout == "reweight: 12x\n"
    assert seen == {"rounds": 5, "dtype": "float32", "sizes": (4, 16)}
    assert json.loads(file.read_text()) == {"ratio": 12.0}
    helped = stage("bench", "reweight", "--help")
    assert "Times it." in helped.stdout
    assert "--rounds 3" in helped.stdout


def test_figures_for_a_folder_that_is_not_there_are_refused_first(tmp_path, monkeypatch, capsys):
    file = tmp_path / "none" / "out.json"
    assert run_main(monkeypatch, "bench", "reweight", "--json", file) == 2
    assert "name a folder that is" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["pretrain", "show"])
def test_shapes_verbs_pass_their_options_on(stand_in, verb):
    seen = {}

    def main(*, seed: int = 0, from_: str = "", fast: bool = False):
        seen.update(seed=seed, from_=from_, fast=fast)

    stand_in(f"stage_rl.shapes.{verb}", "main", main)
    assert stage("shapes", verb, "--seed", 2, "--from", "shipped", "--fast").exit_code == 0
    assert seen == {"seed": 2, "from_": "shipped", "fast": True}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sed", "1"], "--sed: unknown option; did you mean '--seed'?"),
        (["seed", "1"], "seed: unknown option; did you mean '--seed'?"),
        (["--seed"], "--seed: the value is missing; write --seed VALUE"),
        (["--seed", "x"], "--seed: 'x' is not a whole number; write a whole number"),
        (["--rate=x"], "--rate: 'x' is not a number; write a number"),
        (["--fast=1"], "--fast: expected true or false, not '1'; write one of them"),
    ],
)
def test_a_wrong_option_is_answered_with_the_right_one(arguments, message):
    def run(*, seed: int = 0, rate: float = 0.5, fast: bool = False):
        raise AssertionError

    with pytest.raises(InputError) as caught:
        call(run, arguments)
    assert str(caught.value) == message
