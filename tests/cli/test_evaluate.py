"""`stage eval`: the table it prints and the figures it writes."""

import importlib
import json
from dataclasses import dataclass

import pytest


@dataclass
class Scores:
    """Stands in for a benchmark's results."""

    model: str

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

    module = importlib.import_module("stage_rl.evaluation.runner")
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
