"""The numbers of a step: throughput by formula, sampler against trainer, the table in the docs."""

import fnmatch
import math
import re
import time
from pathlib import Path

import pytest
import torch
from run_files import steps_of

from stage_rl.algorithm_config import AlgorithmConfig
from stage_rl.errors import RecipeError
from stage_rl.evaluation.results import ImageScore, Results, Setup
from stage_rl.policies.logprobs import Scoring
from stage_rl.rollout.engine import Engine, PassStats
from stage_rl.rollout.sample import rollout
from stage_rl.rollout.sampling import Sampling
from stage_rl.training import monitor
from stage_rl.training.loop import train
from stage_rl.training.measure import Precision, micro_batches
from stage_rl.training.metrics import (
    DecoderSize,
    RolloutStats,
    Timer,
    mismatch_metrics,
    rates,
    rollout_bytes,
    row_flops,
    trained_mismatch,
    untrained_mismatch,
)
from stage_rl.types import Measured, Prompt, Rollout

SMALL = DecoderSize(
    num_layers=2,
    query_width=3,
    trunk_parameters=100,
    head_parameters=10,
    weight_bytes=1000,
    position_bytes=7,
)
JANUS_PRO_7B = DecoderSize(
    num_layers=30,
    query_width=4096,
    trunk_parameters=30 * (4 * 4096**2 + 3 * 4096 * 11008),
    head_parameters=4096**2 + 4096 * 16384,
    weight_bytes=12_300_000_000,
    position_bytes=480 * 1024,
)
SECONDS = {"time/sample_s": 2.0, "time/reference_s": 1.0, "time/learn_s": 4.0}


def test_bytes_and_operations_of_a_decode_by_hand():
    # T = 4, P = 5: a row's live positions are 4 x 5 + 4 x 5 / 2 = 30.
    drawn = RolloutStats(num_rows=6, num_tokens=4, prompt_length=5, num_passes=2)
    # 2 passes x 4 tokens x 1000 + 6 rows x 7 x 30
    assert rollout_bytes(SMALL, drawn) == 8000 + 1260
    # S = 9: 2 x (100 x 9 + 10 x 4) = 1880; attention 4 x 2 x 3 x 9 x 10 / 2 = 1080
    assert row_flops(SMALL, drawn) == 1880 + 1080
    # The step of the paper: 576 x 12.3 GB = 7.1 TB of weights, 11.5 TB of live cache
    drawn = RolloutStats(num_rows=128, num_tokens=576, prompt_length=30)
    assert rollout_bytes(JANUS_PRO_7B, drawn) == pytest.approx(7.1e12 + 11.5e12, rel=0.01)
    # reference f, policy f, backward 2 f: 1.9 PFLOP for 64 images
    assert 4 * 64 * row_flops(JANUS_PRO_7B, drawn) == pytest.approx(1.9e15, rel=0.03)


@pytest.mark.parametrize(
    ("logprobs", "forward", "backward"),
    [("conditional", 1, 1), ("guided_detached", 2, 1), ("guided", 2, 2)],
)
def test_rates_count_each_pass_and_two_for_a_backward(logprobs, forward, backward):
    drawn = RolloutStats(num_rows=6, num_tokens=4, prompt_length=5)
    numbers = rates(
        SMALL,
        drawn,
        SECONDS,
        num_images=3,
        scoring=Scoring(logprobs, 5.0),
        num_updates=2,
    )
    assert numbers == pytest.approx(
        {
            "throughput/sample_tflop_per_s": 6 * 2960 / 2.0 / 1e12,
            "throughput/sample_gb_per_s": (4000 + 1260) / 2.0 / 1e9,
            "throughput/reference_tflop_per_s": forward * 3 * 2960 / 1e12,
            "throughput/learn_tflop_per_s": 2 * 3 * (forward + 2 * backward) * 2960 / 4.0 / 1e12,
        }
    )


def test_the_share_of_a_peak_is_there_where_the_peak_is_known():
    drawn = RolloutStats(num_rows=6, num_tokens=4, prompt_length=5)
    options = {"num_images": 3, "scoring": Scoring(), "num_updates": 2}
    numbers = rates(SMALL, drawn, SECONDS, **options, peak_tflop_per_s=2e-6)
    for phase in ("reference", "learn"):
        reached = numbers[f"throughput/{phase}_tflop_per_s"]
        assert numbers[f"throughput/{phase}_mfu"] == pytest.approx(reached / 2e-6)
    assert not [name for name in rates(SMALL, drawn, SECONDS, **options) if "mfu" in name]


def test_passes_of_unequal_size_add_up():
    passes = [
        PassStats(num_rows=4, num_tokens=9, lengths_B=torch.tensor([5, 7])),
        PassStats(num_rows=2, num_tokens=9, lengths_B=torch.tensor([3])),
    ]
    # rows of 5, 5, 7, 7, 3, 3 positions: 30 / 6
    assert RolloutStats.of(passes) == RolloutStats(
        num_rows=6, num_tokens=9, prompt_length=5.0, num_passes=2
    )


def test_the_size_of_a_decoder_is_that_of_its_parts(tiny_janus):
    engine = Engine(tiny_janus, max_images=4)
    size = DecoderSize.of(engine.decoder)
    trunk = [
        parameter.numel()
        for name, parameter in tiny_janus.module.model.language_model.layers.named_parameters()
        if parameter.ndim == 2
    ]
    head = tiny_janus.module.model.generation_head
    assert size.trunk_parameters == sum(trunk)
    assert size.head_parameters == head.proj_out.weight.numel() + head.vision_head.weight.numel()
    # 2 layers of width 32 in fp32, keys and values
    assert size.position_bytes == 2 * 2 * 32 * 4
    prompts = (Prompt("a red circle", 0), Prompt("a star", 1))
    rollout(engine, prompts, group_size=4, sampling=Sampling(3.0), seed=0, step=0)
    drawn = RolloutStats.of(engine.passes)
    assert (drawn.num_rows, drawn.num_tokens, drawn.num_passes) == (16, 16, 2)
    assert drawn.prompt_length == tiny_janus.encode(prompts).lengths_P.float().mean().item()
    engine.reload()
    assert engine.passes == []


def test_a_clock_books_times_by_name_and_the_peak_of_the_process():
    timer = Timer()
    timer.record("sample_s")
    timer.record("learn_s")
    times = timer.times()
    assert times["time/step_s"] == pytest.approx(times["time/sample_s"] + times["time/learn_s"])
    before = times["time/learn_s"]
    time.sleep(0.002)
    timer.record("learn_s")  # a phase with another in between
    assert timer.times()["time/learn_s"] >= before + 0.002
    if not torch.cuda.is_available():
        assert 0.05 < times["memory/process_gib"] < 1000


@pytest.mark.gpu
def test_on_a_gpu_each_phase_has_its_own_peak():
    torch.cuda.empty_cache()
    timer = Timer()
    buffer = torch.zeros(2**28, device="cuda")  # 1 GiB
    timer.record("sample_s")
    del buffer
    timer.record("learn_s")
    timer.record("log_s")
    numbers = timer.times()
    assert numbers["memory/sample_gib"] - numbers["memory/log_gib"] == pytest.approx(1, abs=0.01)
    # The buffer was still there when the phase began.
    assert numbers["memory/learn_gib"] == pytest.approx(numbers["memory/sample_gib"], abs=0.01)


CPU = torch.device("cpu")


def test_the_figures_of_the_mismatch_by_hand():
    # Differences ln 2 and -ln 4: mean ln 8 / 2, largest ln 4; weights 2 and 1/4, mean 1.125.
    trainer, sampler = torch.tensor([[math.log(0.5), -3.0]]), torch.tensor([[math.log(0.25), -3.0]])
    sampler[0, 1] += math.log(4)
    numbers = mismatch_metrics(trainer, sampler, "guided")
    assert numbers == pytest.approx(
        {
            "mismatch/guided_logprobs_mean": math.log(8) / 2,
            "mismatch/guided_logprobs_max": math.log(4),
            "mismatch/guided_logprobs_weight": 1.125,
        }
    )


def test_a_rollout_without_log_probabilities_has_no_mismatch():
    drawn = Rollout((Prompt("a"),), 1, torch.zeros(1, 4), torch.zeros(1))
    measured = Measured(torch.zeros(1, 4), torch.zeros(1, 4))
    assert trained_mismatch(measured, drawn, AlgorithmConfig()) == {}


def untrained(policy, sampling, logprobs="conditional", num_images=2):
    prompts = (Prompt("a red circle", 0), Prompt("a star", 1))
    drawn = rollout(Engine(policy), prompts, group_size=3, sampling=sampling, seed=0, step=0)
    batch = next(micro_batches(drawn, None, CPU))
    precision = Precision(scoring=sampling.scoring(logprobs))
    return untrained_mismatch(policy, batch, precision, sampling=sampling, num_images=num_images)


@pytest.mark.parametrize(
    ("logprobs", "name"), [("conditional", "guided_logprobs"), ("guided", "logprobs")]
)
def test_the_distribution_that_is_not_trained_is_measured_too(tiny_janus, logprobs, name):
    numbers = untrained(tiny_janus, Sampling(3.0, 0.9), logprobs, num_images=100)
    assert set(numbers) == {f"mismatch/{name}_{figure}" for figure in ("mean", "max", "weight")}
    assert 0 < numbers[f"mismatch/{name}_max"] < 1e-3
    assert numbers[f"mismatch/{name}_weight"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("sampling", "num_images"),
    [
        (Sampling(1.0, 1.0), 2),  # one distribution
        (Sampling(3.0, 1.0, top_k=5), 2),  # sampled from a truncated one
        (Sampling(3.0, 1.0), 0),
    ],
)
def test_nothing_is_measured_where_there_is_nothing_to_compare(tiny_janus, sampling, num_images):
    assert untrained(tiny_janus, sampling, num_images=num_images) == {}


@pytest.mark.parametrize("logprobs", ["conditional", "guided", "guided_detached"])
def test_a_run_logs_both_distributions_in_every_form(recipe, logprobs):
    run = train(recipe("steps=2", "probe.every=2", f"algorithm.logprobs={logprobs}"))
    for line in steps_of(run):
        for name in ("logprobs", "guided_logprobs"):
            assert 0 < line[f"mismatch/{name}_max"] < 1e-3
            assert line[f"mismatch/{name}_mean"] <= line[f"mismatch/{name}_max"]
        assert line["grad/norm"] > 0
    # Policy and reference are the same at first, under either distribution.
    assert steps_of(run)[0]["entropy/gap"] == 0
    assert steps_of(run)[0]["kl/mean"] == 0


def test_weights_near_1_change_nothing_and_a_low_cap_shrinks_the_gradient(recipe, tmp_path):
    plain = "algorithm.importance_sampling=none", "algorithm.importance_sampling=token_truncate"
    low = (*plain[1:], "algorithm.importance_cap=0.5")
    norms, capped = [], []
    for number, overrides in enumerate((plain[:1], plain[1:], low)):
        settings = ("steps=1", "probe.every=0", "algorithm.beta=0", f"run.dir={tmp_path}/{number}")
        line = steps_of(train(recipe(*settings, *overrides)))[0]
        norms.append(line["grad/norm"])
        capped.append(line.get("importance/cut"))
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)
    # Every weight is the cap, 0.5: half the gradient.
    assert norms[2] == pytest.approx(norms[0] / 2, rel=1e-3)
    assert capped == [None, 0.0, 1.0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.top_k=5"], r"rollout\.top_k: guided log-probabilities .* write 0, or"),
        (["rollout.top_p=0.9"], r"rollout\.top_p: guided log-probabilities .* write 1, or"),
        # Scale and temperature of the scores are the rollout's: there is no key to differ by.
        (["algorithm.guidance_scale=3"], "unknown key; did you mean 'rollout.guidance_scale'"),
        (["algorithm.temperature=0.5"], "unknown key; did you mean 'rollout.temperature'"),
    ],
)
def test_scores_of_another_distribution_than_the_sampled_are_refused(recipe, overrides, message):
    with pytest.raises(RecipeError, match=message):
        recipe("algorithm.logprobs=guided", *overrides)


DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"


def documented():
    """The names of the table's first column; NAME and PHASE stand for any word."""
    rows = [line for line in DOCS.read_text().splitlines() if line.startswith("| `")]
    names = re.findall(r"`([^`]+)`", " ".join(row.split("|")[1] for row in rows))
    return [re.sub(r"NAME|PHASE", "*", name) for name in names]


def constant(_policy, benchmark, _request, **_options):
    scores = {"gold": (ImageScore("task", 0, 0, 0.5),)}
    return Results("policy", Setup(benchmark, "", None, None, None), scores, ("gold",))


OTHER_RULES = (
    *("algorithm.credit=critical", "algorithm.credit=guidance", "algorithm.credit=entropy_bonus"),
    "algorithm.advantage=gdpo",
)
TWO_REWARDS = "rewards=[{kind: 'loop_parts:Brightness'}, {kind: 'loop_parts:Coarse'}]"


@pytest.fixture
def written(recipe, monkeypatch, tmp_path):
    """The names of all metrics of runs that have everything between them."""
    monkeypatch.setattr(monitor, "run_suite", constant)
    runs = [
        train(recipe("steps=1", TWO_REWARDS, rule, f"run.dir={tmp_path}/{number}"))
        for number, rule in enumerate(OTHER_RULES)
    ]
    # A reward that says the same of every image.
    same = "rewards=[{kind: 'loop_parts:Coarse', edge: 1000}]"
    cut = ("rollout.top_k=5", f"run.dir={tmp_path}/same")
    runs.append(train(recipe("steps=1", same, *cut)))
    full = train(
        recipe(
            "steps=2",
            "evaluation={benchmark: shapes-geneval, every: 1}",
            "run.fixed_prompts=0",  # the tiny model lacks words of that benchmark
            "rollout.resample_equal_groups=1",
            "algorithm.importance_sampling=token_truncate",
            "tripwires.kl=1e-9",
        )
    )
    return set().union(*(line for run in (*runs, full) for line in steps_of(run)))


def test_every_metric_of_a_run_is_in_the_table(written):
    names = documented()
    missing = [n for n in written if not any(fnmatch.fnmatchcase(n, known) for known in names)]
    assert missing == []
    groups = {name.partition("/")[0] for name in written}
    assert groups >= {"resample", "validation", "tripwires", "mismatch", "throughput", "memory"}


def test_every_exact_name_of_the_table_is_written_by_some_run(written):
    unwritten = {n for n in documented() if "*" not in n and n not in written}
    assert unwritten <= {"memory/process_gib"}  # absent on a machine with a GPU
