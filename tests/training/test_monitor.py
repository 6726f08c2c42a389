"""What watches over a run: held-out validation and its best checkpoint, tripwires."""

import json
import os
import signal
import time
from dataclasses import replace

import pytest
import tiny_models
import torch
from run_files import parameters_of, steps_of

from stage_rl.api import evaluate_run, find_source, load
from stage_rl.config import run_folder
from stage_rl.errors import DivergedError, InputError, RecipeError, StageError, Stopped
from stage_rl.evaluation.results import ImageScore, Results, Setup
from stage_rl.evaluation.suites import GENEVAL
from stage_rl.policies.janus import JanusConfig
from stage_rl.prompts.files import as_prompts
from stage_rl.prompts.geneval import TASKS, geneval_prompts
from stage_rl.recipe import TripwiresConfig
from stage_rl.rewards.threads import RewardsPendingError
from stage_rl.shapes.model import JanusSize, build_janus, save_janus
from stage_rl.training import monitor
from stage_rl.training.checkpoint import checkpoints, step_of
from stage_rl.training.loop import train
from stage_rl.training.monitor import Best, Tripwires

NORM = "model.language_model.norm.weight"


class Scripted:
    """A benchmark that scores the policies it is shown in turn as it was told to."""

    def __init__(self, *golds):
        self.golds, self.requests, self.weights = list(golds), [], []

    def __call__(self, policy, benchmark, request, *, engine, silent, signals):
        assert engine.policy is policy
        self.requests.append(request)
        self.weights.append(engine.decoder.final_norm.clone())
        scores = {"gold": self.golds.pop(0), "detector": 0.25}
        rows = {m: (ImageScore("task", 0, 0, value),) for m, value in scores.items()}
        setup = Setup(benchmark, "", None, None, None)
        return Results("policy", setup, rows, ("gold", "detector"))


@pytest.fixture
def scripted(monkeypatch):
    def script(*golds):
        benchmark = Scripted(*golds)
        monkeypatch.setattr(monitor, "run_suite", benchmark)
        return benchmark

    return script


VALIDATION = (
    "evaluation={benchmark: shapes-geneval, every: 1, validation_images_per_task: 3}",
    "run.fixed_prompts=0",  # the tiny model lacks words of that benchmark
)
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
    request = benchmark.requests[0]
    assert (request.images_per_task, request.seed, request.guidance_scale) == (3, 1, 2.0)
    said = capsys.readouterr().out
    assert "held-out validation after step 2: 0.600, best so far: this one" in said
    assert "held-out validation after step 4: 0.400, best so far: step 2" in said


def test_a_resumed_run_knows_its_best_and_validates_after_its_last_step_too(recipe, scripted):
    scripted(0.9, 0.5)
    # Every second step and after the last: steps 1 and 2.
    run = train(recipe(*KEPT, "evaluation.every=2", "steps=3"))
    assert [line["step"] for line in steps_of(run) if "validation/score" in line] == [1, 2]
    assert steps_kept(run) == [2, 3]
    scripted(0.8)
    run = train(recipe(*KEPT, "evaluation.every=2"))
    assert steps_kept(run) == [2, 4]


def test_the_best_of_another_validation_is_forgotten(recipe, scripted):
    scripted(0.9, 0.5)
    train(recipe(*KEPT, "steps=2"))
    scripted(0.4, 0.3)
    run = train(recipe(*KEPT, "evaluation.validation_images_per_task=4"))
    assert steps_kept(run) == [3, 4]


def test_a_validation_that_falls_stops_the_run_and_names_the_best(recipe, scripted):
    scripted(0.9, 0.5)
    stops = ("tripwires.validation_drop=0.3", "tripwires.action=stop")
    with pytest.raises(DivergedError, match=r"0\.4 below its best.*the best .* is that of step 1"):
        train(recipe(*KEPT, *stops))


def test_a_validation_whose_rewards_do_not_come_after_a_signal_is_left_out(
    recipe, monkeypatch, capsys
):
    def hangs(*args, signals, **named):
        os.kill(os.getpid(), signal.SIGHUP)
        while not signals:
            time.sleep(0.01)
        raise RewardsPendingError

    monkeypatch.setattr(monitor, "run_suite", hangs)
    settings = recipe(*KEPT, "evaluation.every=2", "steps=3")
    with pytest.raises(Stopped, match="stopped after step 2 and saved"):
        train(settings)
    assert "validation after step 2: left out, its rewards did not come" in capsys.readouterr().out
    folder = run_folder(settings)
    assert steps_kept(folder) == [2]
    assert [sorted(n for n in line if "validation/" in n) for line in steps_of(folder)] == [[], []]


def test_a_run_without_validation_has_no_best(recipe):
    run = train(recipe("steps=1", "probe.every=0"))
    assert "validation/score" not in steps_of(run)[0]
    with pytest.raises(InputError, match=r"no held-out validation has chosen .* evaluation\.every"):
        load(f"{run}@best", torch.device("cpu"))


def test_shapes_validation_draws_with_the_engine_it_is_given(tiny_shapes):
    from stage_rl.recipe import EvaluationConfig
    from stage_rl.rollout.engine import Engine

    settings = EvaluationConfig(every=1, validation_images_per_task=1, guidance_scale=1.0)
    engine = Engine(tiny_shapes)
    numbers = monitor.validation_scores(engine, settings)
    assert numbers["validation/score"] == numbers["validation/gold"]
    assert {"validation/detector", "validation/retention"} <= set(numbers)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A random Janus that knows the words of GenEval, and the models of GenEval's detector."""
    words = sorted(
        {word for prompt in as_prompts(geneval_prompts()) for word in prompt.text.split()}
    )
    size = JanusSize(
        width=16, layers=1, heads=2, mlp=16, codebook_size=16, image_size=16, max_positions=48
    )
    folder = tmp_path_factory.mktemp("weights")
    save_janus(*build_janus(size, words=words, seed=0), folder / "janus")
    for kind in ("mask2former", "clip"):
        tiny_models.save(kind, folder / kind)
    return folder


def geneval_of(weights):
    """Overrides: validation on GenEval, judged by the models of its reward."""
    sides = "shortest_side: 64, longest_side: 96"
    detector = f"{{path: {weights}/mask2former, clip: {weights}/clip, {sides}}}"
    return (
        f"policy.path={weights}/janus",
        "prompts.texts=[a photo of a bench, a photo of two clocks]",
        f"evaluation.scorers={{geneval: {{detector: {detector}}}}}",
        *("evaluation.benchmark=geneval", "evaluation.every=1"),
        *("evaluation.validation_images_per_task=1", "evaluation.images_per_task=2"),
    )


def test_geneval_validates_a_run_keeps_its_best_and_compares_it_with_its_base(recipe, weights):
    settings = recipe(*geneval_of(weights), *KEPT[1:], "steps=2")
    run = train(settings)
    for line in steps_of(run):
        by_task = [line[f"validation/correct/{task}"] for task in TASKS]
        assert line["validation/score"] == pytest.approx(sum(by_task) / 6)
        assert {"validation/correct", "validation/strict", "validation/reward"} <= set(line)
    scores = [line["validation/score"] for line in steps_of(run)]
    best = 1 + scores.index(max(scores))
    assert steps_kept(run) == sorted({best, 2})
    assert find_source(f"{run}@best").checkpoint.state.step == best
    assert "geneval, 2 images per task, guidance 2" in evaluate_run(settings, run)
    compared = json.loads((run / "evaluation.json").read_text())
    assert {task: len(rows) for task, rows in compared["trained"]["scores"]["correct"].items()} == (
        dict.fromkeys(TASKS, 2)
    )
    assert compared["trained"]["scorers"]["geneval"]["detector"]["kind"] == "mask2former"


MINE = replace(GENEVAL, name="mine")
NO_SUITE = {}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["benchmark=genevl"], r"evaluation\.benchmark: .*'genevl'; did you mean 'geneval'\?"),
        (["benchmark=geneval:X"], r"evaluation\.benchmark: cannot import 'geneval'"),
        ([f"benchmark={__name__}:OURS"], r"evaluation\.benchmark: .* has no 'OURS'"),
        ([f"benchmark={__name__}:NO_SUITE"], r"'.*:NO_SUITE' is not a Suite"),
        (["benchmark=ocr"], r"--data is not given; .* \(in a recipe: evaluation\.data\)"),
        ([f"benchmark={__name__}:MINE", "scorers={gold: {}}"], r"^gold: no scorer of that name"),
        (["benchmark=geneval", "scorers={geneval: {detector: 1}}"], r"^geneval: geneval\.detector"),
        (["benchmark=geneval", "scorers={geneval: null}"], r"leaves every reward out; keep one"),
    ],
)
def test_a_wrong_benchmark_of_a_recipe_is_refused_before_a_model_is_loaded(
    recipe, overrides, message, monkeypatch
):
    monkeypatch.setattr(JanusConfig, "build", None)
    with pytest.raises(StageError, match=message) as caught:
        train(recipe(*(f"evaluation.{text}" for text in overrides)))
    assert "\n" not in str(caught.value)


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


def test_a_fall_counts_like_a_rise_and_a_step_without_the_number_neither_trips_nor_resets():
    tripwires = wires(entropy_gap=0.5, steps=2, kl=None)
    assert take(tripwires, kl=1e9) == ({}, [])  # is not watched
    take(tripwires, gap=-0.6)
    assert take(tripwires) == ({}, [])
    assert len(take(tripwires, gap=0.6)[1]) == 1
    assert take(tripwires, gap=-0.4) == ({}, [])


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
