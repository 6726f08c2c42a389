"""`stage bench` and `stage shapes`: options from a function's own signature."""

import json

import pytest

from stage_rl.cli.options import call
from stage_rl.errors import InputError


class Result:
    table = ("G  ratio", "8  12x")

    def line(self):
        return "reweight: 12x"

    def to_dict(self):
        return {"ratio": 12.0}


def test_bench_prints_the_ratio_and_writes_the_figures(tmp_path, stand_in, stage):
    seen = {}

    def run(*, rounds: int = 3, dtype: str = "float32", sizes: tuple[int, ...] = (8, 64)):
        """Times it."""
        seen.update(rounds=rounds, dtype=dtype, sizes=sizes)
        return Result()

    stand_in("stage_rl.bench.reweight", "run", run)
    file = tmp_path / "out.json"
    done = stage("bench", "reweight", "--rounds", 5, "--json", file, "--sizes=4,16")
    assert done.exit_code == 0, done.output
    assert done.stdout == "G  ratio\n8  12x\nreweight: 12x\n"
    assert seen == {"rounds": 5, "dtype": "float32", "sizes": (4, 16)}
    assert json.loads(file.read_text()) == {"ratio": 12.0}
    helped = stage("bench", "reweight", "--help")
    assert "Times it." in helped.stdout
    assert "--rounds 3" in helped.stdout


def test_figures_for_a_folder_that_is_not_there_are_refused_first(tmp_path, run_main):
    file = tmp_path / "none" / "out.json"
    code, printed = run_main("bench", "reweight", "--json", file)
    assert code == 2
    assert "name a folder that is" in printed


@pytest.mark.parametrize("verb", ["pretrain", "show"])
def test_shapes_verbs_pass_their_options_on(stand_in, verb, stage):
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
        (["--rate", "nan"], "--rate: 'nan' is not a finite number; write one"),
        (["--rate=-inf"], "--rate: '-inf' is not a finite number; write one"),
        (["--fast=1"], "--fast: expected true or false, not '1'; write one of them"),
    ],
)
def test_a_wrong_option_is_answered_with_the_right_one(arguments, message):
    def run(*, seed: int = 0, rate: float = 0.5, fast: bool = False):
        raise AssertionError

    with pytest.raises(InputError) as caught:
        call(run, arguments)
    assert str(caught.value) == message
