"""Tripwires: when they trip, what they say, and that they count on after a resume."""

import pytest
from run_files import steps_of

from stage_rl.errors import DivergedError, RecipeError
from stage_rl.recipe import TripwiresConfig
from stage_rl.training.loop import train
from stage_rl.training.monitor import Best, Tripwires


def wires(counters=None, **settings):
    return Tripwires(TripwiresConfig(**settings), counters)


def take(tripwires, *, best=None, **numbers):
    """The counts and lines of one step."""
    names = {
        "gap": "entropy/gap",
        "kl": "kl/mean",
        "norm": "grad/norm",
        "validation": "validation/score",
    }
    counts = tripwires.count({names[key]: value for key, value in numbers.items()}, best)
    return counts, list(tripwires.check())


def test_a_wire_trips_once_after_so_many_steps_in_a_row_and_again_after_a_return():
    tripwires = wires(kl=0.5, steps=2)
    said = [take(tripwires, kl=kl) for kl in (0.6, 0.4, 0.6, 0.7, 0.8, 0.1, 0.9, 0.9)]
    assert [counts.get("tripwires/kl", 0) for counts, _ in said] == [1, 0, 1, 2, 3, 0, 1, 2]
    assert [len(lines) for _, lines in said] == [0, 0, 0, 1, 0, 0, 0, 1]
    (line,) = said[3][1]
    assert line.startswith("tripwire kl: the KL from the reference is 0.7 nats a token, above 0.5")
    assert "for 2 steps in a row; lower optimizer.lr, raise algorithm.beta, or raise" in line


def test_an_entropy_that_falls_counts_like_one_that_rises():
    tripwires = wires(entropy_gap=0.5, steps=1)
    assert len(take(tripwires, gap=-0.6)[1]) == 1
    assert take(tripwires, gap=-0.4) == ({}, [])
    assert len(take(tripwires, gap=0.6)[1]) == 1


def test_a_step_that_learned_nothing_neither_trips_nor_resets():
    tripwires = wires(grad_norm=1.0, steps=2)
    take(tripwires, norm=2.0)
    assert take(tripwires) == ({}, [])
    assert len(take(tripwires, norm=2.0)[1]) == 1


def test_the_first_fall_of_validation_below_its_best_trips():
    tripwires = wires(validation_drop=0.1)
    assert take(tripwires, validation=0.8, best=Best(1, 0.8)) == ({}, [])
    assert take(tripwires, validation=0.75, best=Best(1, 0.8)) == ({}, [])
    counts, (line,) = take(tripwires, validation=0.6, best=Best(1, 0.8))
    assert counts == {"tripwires/validation_drop": 1}
    assert "0.2 below its best, above 0.1 (the best checkpoint is that of step 1)" in line


def test_a_count_goes_on_where_a_checkpoint_left_it():
    before = wires(kl=0.5, steps=2)
    take(before, kl=0.6)
    after = wires(kl=0.5, steps=2, counters={**before.counters, "zero_gradient_steps": 1})
    assert len(take(after, kl=0.6)[1]) == 1
    assert after.counters == {"tripwires.kl": 2}


def test_an_unwatched_number_never_trips():
    assert take(wires(kl=None, grad_norm=None), kl=1e9, norm=1e9) == ({}, [])


WIDE_OFF = ("optimizer.lr=0.05", "tripwires.kl=0.01", "tripwires.steps=2", "probe.every=0")


def test_a_run_warns_and_goes_on(recipe, capsys):
    run = train(recipe(*WIDE_OFF))
    assert capsys.readouterr().out.count("tripwire kl: the KL from the reference is") == 1
    assert [line.get("tripwires/kl", 0) for line in steps_of(run)] == [0, 1, 2, 3]


def test_a_run_stops_where_the_recipe_says_so_and_its_metrics_show_why(recipe, tmp_path):
    with pytest.raises(DivergedError, match=r"tripwire kl: .* above 0\.01 for 2 steps in a row"):
        train(recipe(*WIDE_OFF, "tripwires.action=stop"))
    assert [line.get("tripwires/kl", 0) for line in steps_of(tmp_path / "run")] == [0, 1, 2]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["tripwires.validation_drop=0.1"],
            r"tripwires\.validation_drop: needs validation while training",
        ),
        (["tripwires.action=halt"], r"tripwires\.action: unknown value 'halt'"),
        (
            ["evaluation={benchmark: shapes-geneval, every: 2, validation_seed: 0}"],
            r"evaluation\.validation_seed: is evaluation\.seed too",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(recipe, overrides, message):
    with pytest.raises(RecipeError, match=message):
        recipe(*overrides)
