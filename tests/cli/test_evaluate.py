"""`stage eval`: the table it prints and the figures it writes."""

import importlib
import json
from dataclasses import dataclass

import pytest

from stage_rl.cli.evaluate import PUBLISHED
from stage_rl.evaluation.suites import SUITES


@dataclass
class Scores:
    """Stands in for a benchmark's results."""

    model: str
    benchmark: str = "shapes-geneval"

    def table(self):
        return f"table of {self.model}"

    def to_json(self):
        return {"model": self.model}


@pytest.fixture
def runner(monkeypatch):
    """The evaluation runner, with stand-ins that keep what they are called with."""
    seen = {}

    def evaluate(model, benchmark, **options):
        seen.update(options, benchmark=benchmark)
        return Scores(model)

    def evaluate_against(model, base, benchmark, **options):
        seen.update(options, benchmark=benchmark)
        return Scores(f"{model} against {base}")

    module = importlib.import_module("stage_rl.evaluation.run")
    monkeypatch.setattr(module, "evaluate", evaluate)
    monkeypatch.setattr(module, "evaluate_against", evaluate_against)
    return seen


def test_eval_prints_the_table_and_writes_the_figures(tmp_path, runner, stage):
    file = tmp_path / "out.json"
    done = stage("eval", "shapes", "--images-per-task", 4, "--json", file)
    assert done.exit_code == 0, done.output
    assert done.stdout == "table of shapes\n"
    assert json.loads(file.read_text()) == {"model": "shapes"}
    assert runner == {
        "benchmark": "shapes-geneval",
        "images_per_task": 4,
        "guidance_scale": None,
        "seed": 0,
        "dtype": "mixed",
    }


def test_eval_takes_the_precision_of_the_sampler(runner, stage):
    assert stage("eval", "shapes", "--dtype", "float32").exit_code == 0
    assert runner["dtype"] == "float32"
    assert stage("eval", "shapes", "--dtype", "bf16").exit_code == 2


def test_eval_against_a_base_prints_the_comparison(runner, stage):
    done = stage("eval", "runs/mine", "--against", "shapes", "--seed", 5)
    assert done.exit_code == 0, done.output
    assert done.stdout == "table of runs/mine against shapes\n"
    assert runner["seed"] == 5


@pytest.fixture
def suites(monkeypatch):
    """The published benchmarks, with a stand-in that keeps what it is called with."""
    seen = {}

    def evaluate_suites(model, names, request):
        seen.update(model=model, names=names, request=request)
        return [Scores(str(model), name) for name in names]

    module = importlib.import_module("stage_rl.evaluation.run")
    monkeypatch.setattr(module, "evaluate_suites", evaluate_suites)
    return seen


def test_eval_runs_published_benchmarks_with_settings_of_their_rewards(tmp_path, suites, stage):
    file = tmp_path / "out.json"
    names = ["--benchmark", "hps", "--benchmark", "ocr", "--data", tmp_path]
    done = stage("eval", "runs/mine", "hps.path=x", *names, "--json", file)
    assert done.exit_code == 0, done.output
    assert done.stdout == "table of runs/mine\n\ntable of runs/mine\n\n"
    assert json.loads(file.read_text()) == {
        "hps": {"model": "runs/mine"},
        "ocr": {"model": "runs/mine"},
    }
    assert suites["names"] == ["hps", "ocr"]
    assert suites["request"].scorers == {"hps": {"path": "x"}}
    assert suites["request"].data == tmp_path
    assert suites["request"].scale == 5.0


def test_eval_scores_images_made_elsewhere(tmp_path, suites, stage):
    arguments = ("--images", tmp_path, "--benchmark", "geneval", "geneval.threshold=0.2")
    assert stage("eval", *arguments).exit_code == 0
    assert suites["model"] is None
    assert suites["request"].images == tmp_path
    assert suites["request"].scorers == {"geneval": {"threshold": 0.2}}


def test_eval_smoke_takes_the_shapes_policy_and_every_benchmark(suites, runner, stage):
    done = stage("eval", "--smoke", "--benchmark", "all")
    assert done.exit_code == 0, done.output
    assert suites["model"] == "shapes"
    assert suites["names"] == ["all"]
    assert runner["images_per_task"] == 2


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["geneval.threshold=1"], "settings: shapes-geneval does not take it; leave it out"),
        (["--out", "x"], "--out: shapes-geneval does not take it; leave it out"),
        (["--benchmark", "ocr", "--images-per-task", "3"], "--images-per-task: ocr does not take"),
        (["--benchmark", "shapes_geneval"], "--benchmark: unknown 'shapes_geneval'; did you mean"),
    ],
)
def test_eval_refuses_what_it_would_drop_and_names_that_are_none(arguments, line, run_main):
    code, printed = run_main("eval", "shapes", *arguments)
    assert (code, printed.count("\n")) == (2, 1)
    assert printed.startswith(f"error: {line}")


def test_eval_knows_every_published_benchmark():
    assert set(PUBLISHED) == set(SUITES)


def test_eval_without_anything_to_score_is_one_line(tmp_path, run_main):
    assert run_main("eval") == (2, "error: MODEL: is missing; write one, or --images FOLDER\n")
    code, printed = run_main("eval", "--images", tmp_path)
    assert code == 2
    assert printed.startswith("error: --images: shapes-geneval draws its own; write another")
    code, printed = run_main("eval", "--images", tmp_path, "--benchmark", "ocr", "--against", "x")
    assert (code, printed.count("\n")) == (2, 1)
    assert printed.startswith("error: --against: compares models")
