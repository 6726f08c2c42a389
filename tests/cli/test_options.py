"""`stage bench` and `stage shapes`: options from a function's own signature."""

import json

import pytest
import torch

from stage_rl.bench import reweight
from stage_rl.bench.base import BenchResult, Group
from stage_rl.cli.options import free_name, read_options
from stage_rl.errors import InputError
from stage_rl.settings import Seed


def test_bench_prints_the_ratio_and_writes_the_figures(tmp_path, monkeypatch, stage):
    seen = {}

    def run(*, rounds: int = 3, dtype: str = "float32", sizes: tuple[int, ...] = (8, 64)):
        """Times it."""
        seen.update(rounds=rounds, dtype=dtype, sizes=sizes)
        return BenchResult("12x", True, {"ratio": 12.0}, ("G  ratio", "8  12x"))

    monkeypatch.setattr(reweight, "run", run)
    monkeypatch.setattr(reweight, "BAR", ">= 10x")
    file = tmp_path / "out.json"
    done = stage("bench", "reweight", "--rounds", 5, "--json", file, "--sizes=4,16")
    assert done.exit_code == 0, done.output
    assert done.stdout == "G  ratio\n8  12x\nreweight: 12x; bar >= 10x: reached\n"
    assert seen == {"rounds": 5, "dtype": "float32", "sizes": (4, 16)}
    figures = json.loads(file.read_text())
    assert figures["settings"] == {"rounds": 5, "dtype": "float32", "sizes": [4, 16]}
    assert figures["measures"] == {"ratio": 12.0}
    assert figures["machine"]["torch"] == torch.__version__
    helped = stage("bench", "reweight", "--help")
    assert "Times it." in helped.stdout
    assert "--rounds 3" in helped.stdout


def test_figures_for_a_folder_that_is_not_there_are_refused_first(tmp_path, run_main):
    file = tmp_path / "none" / "out.json"
    code, printed = run_main("bench", "reweight", "--json", file)
    assert code == 2
    assert "name a folder that is" in printed


def test_a_name_that_nobody_asked_for_is_one_that_is_free(tmp_path):
    figure = tmp_path / "curves.png"
    assert free_name(figure) == figure
    for name in ("curves.csv", "curves-2.png"):
        (tmp_path / name).touch()
    assert free_name(figure) == figure
    assert free_name(figure, ".csv") == tmp_path / "curves-3.png"


@pytest.mark.parametrize("verb", ["pretrain", "show"])
def test_shapes_verbs_pass_their_options_on(stand_in, verb, stage):
    seen = {}

    def main(*, seed: int = 0, start_from: str = "", fast: bool = False):
        seen.update(seed=seed, start_from=start_from, fast=fast)

    stand_in(f"stage_rl.shapes.{verb}", "main", main)
    assert stage("shapes", verb, "--seed", 2, "--start-from", "shipped", "--fast").exit_code == 0
    assert seen == {"seed": 2, "start_from": "shipped", "fast": True}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sed", "1"], "--sed: unknown option; did you mean '--seed'?"),
        (["seed", "1"], "seed: unknown option; did you mean '--seed'?"),
        (["--seed"], "--seed: the value is missing; write --seed VALUE"),
        (["--seed", "x"], "--seed: expected a whole number, not 'x'"),
        (["--seed", "-1"], "--seed: '-1' is out of range; write a number of at least 0"),
        (["--rate=x"], "--rate: expected a number, not 'x'"),
        (["--rate", "nan"], "--rate: expected a finite number, not 'nan'"),
        (["--rate=-inf"], "--rate: expected a finite number, not '-inf'"),
        (["--sizes", "4,1"], "--sizes.1: '1' is out of range; write a number of at least 2"),
        (["--fast=maybe"], "--fast: expected true or false, not 'maybe'"),
    ],
)
def test_a_wrong_option_is_answered_with_the_right_one(arguments, message):
    with pytest.raises(InputError) as caught:
        read_options(options, arguments)
    assert str(caught.value) == message


def options(
    *, seed: Seed = 0, rate: float = 0.5, fast: bool = False, sizes: tuple[Group, ...] = (4, 8)
):
    """Options of each kind."""
