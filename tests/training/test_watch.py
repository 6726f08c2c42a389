"""Held-out validation of a run: its metrics, its best checkpoint, RUN@best."""

import pytest
import torch
from run_files import parameters_of, steps_of

from stage_rl.api import load
from stage_rl.errors import DivergedError, InputError
from stage_rl.evaluation.results import ImageScore, Results
from stage_rl.training import monitor
from stage_rl.training.checkpoint import checkpoints, step_of
from stage_rl.training.loop import train
from stage_rl.training.monitor import Best, best_of

NORM = "model.language_model.norm.weight"


class Scripted:
    """A benchmark that scores the policies it is shown in turn as it was told to."""

    def __init__(self, *golds):
        self.golds, self.setups, self.weights = list(golds), [], []

    def run(self, policy, setup, *, name, engine):
        assert engine.policy is policy
        self.setups.append(setup)
        self.weights.append(engine.decoder.final_norm.clone())
        scores = {"gold": self.golds.pop(0), "detector": 0.25}
        rows = {m: (ImageScore("task", 0, 0, value),) for m, value in scores.items()}
        return Results(name, setup, rows, ("gold", "detector"))


@pytest.fixture
def scripted(monkeypatch):
    def script(*golds):
        benchmark = Scripted(*golds)
        monkeypatch.setitem(monitor.BENCHMARKS, "shapes-geneval", benchmark)
        return benchmark

    return script


VALIDATION = ("evaluation={benchmark: shapes-geneval, every: 1, validation_images_per_task: 3}",)
KEPT = (*VALIDATION, "run.keep_checkpoints=1", "run.save_every=0", "probe.every=0")


def steps_kept(run):
    return sorted(step_of(folder) for folder in checkpoints(run / "checkpoints"))


def test_the_best_checkpoint_is_kept_beside_the_newest_and_is_a_model(recipe, scripted, capsys):
    benchmark = scripted(0.2, 0.6, 0.6, 0.4)
    run = train(recipe(*KEPT))
    assert [line["validation/score"] for line in steps_of(run)] == [0.2, 0.6, 0.6, 0.4]
    assert [line["validation/detector"] for line in steps_of(run)] == [0.25] * 4
    assert steps_of(run)[0]["time/validation_s"] > 0
    # The first of two equal validations stays the best.
    assert steps_kept(run) == [2, 4]
    best = dict(load(f"{run}@best", torch.device("cpu")).module.named_parameters())
    assert torch.equal(best[NORM], parameters_of(run, 2)[NORM])
    # Validation saw the policy after the update, its own images and the rollout's guidance.
    assert torch.equal(benchmark.weights[1], parameters_of(run, 2)[NORM])
    setup = benchmark.setups[0]
    assert (setup.images_per_task, setup.seed, setup.guidance_scale) == (3, 1, 2.0)
    said = capsys.readouterr().out
    assert "held-out validation after step 2: 0.600, best so far: this one" in said
    assert "held-out validation after step 4: 0.400, best so far: step 2" in said


def test_a_resumed_run_knows_its_best(recipe, scripted):
    scripted(0.9, 0.5)
    train(recipe(*KEPT, "steps=2"))
    scripted(0.8, 0.7)
    run = train(recipe(*KEPT))
    assert steps_kept(run) == [1, 4]


def test_validation_is_scored_every_so_many_steps_and_after_the_last(recipe, scripted):
    scripted(0.1, 0.2)
    run = train(recipe(*VALIDATION, "evaluation.every=2", "steps=3", "probe.every=0"))
    assert [line["step"] for line in steps_of(run) if "validation/score" in line] == [1, 2]


def test_a_validation_that_falls_stops_the_run_and_names_the_best(recipe, scripted):
    scripted(0.9, 0.5)
    stops = ("tripwires.validation_drop=0.3", "tripwires.action=stop")
    with pytest.raises(DivergedError, match=r"0\.4 below its best.*the best .* is that of step 1"):
        train(recipe(*KEPT, *stops))


def test_a_run_without_validation_has_no_best(recipe):
    run = train(recipe("steps=1", "probe.every=0"))
    assert "validation/score" not in steps_of(run)[0]
    with pytest.raises(InputError, match=r"no held-out validation has chosen .* evaluation\.every"):
        load(f"{run}@best", torch.device("cpu"))


def test_of_equal_validations_the_earlier_is_the_best():
    assert best_of(None, Best(1, 0.5)) == Best(1, 0.5)
    assert best_of(Best(1, 0.5), Best(2, 0.5)) == Best(1, 0.5)
    assert best_of(Best(1, 0.5), Best(2, 0.6)) == Best(2, 0.6)


def test_shapes_validation_draws_with_the_engine_it_is_given(tiny_shapes):
    from stage_rl.recipe import EvaluationConfig
    from stage_rl.rollout.engine import Engine

    settings = EvaluationConfig(every=1, validation_images_per_task=1)
    engine = Engine(tiny_shapes)
    numbers = monitor.score_validation(engine, settings, guidance_scale=1.0)
    assert numbers["validation/score"] == numbers["validation/gold"]
    assert {"validation/detector", "validation/retention"} <= set(numbers)
