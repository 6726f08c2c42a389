"""Bytes and operations by formula, with hand-worked numbers; the figures of the paper's model."""

import time

import pytest
import torch

from stage_rl.policies.logprobs import Scoring
from stage_rl.rollout.engine import Engine, PassStats
from stage_rl.rollout.sample import rollout
from stage_rl.rollout.sampling import Sampling
from stage_rl.training.metrics import (
    DecoderSize,
    RolloutStats,
    Timer,
    overall_rates,
    rates,
    rollout_bytes,
    row_flops,
)
from stage_rl.types import Prompt, Rollout

SMALL = DecoderSize(
    num_layers=2,
    query_width=3,
    trunk_parameters=100,
    head_parameters=10,
    weight_bytes=1000,
    slot_bytes=7,
)
JANUS_PRO_7B = DecoderSize(
    num_layers=30,
    query_width=4096,
    trunk_parameters=30 * (4 * 4096**2 + 3 * 4096 * 11008),
    head_parameters=4096**2 + 4096 * 16384,
    weight_bytes=12_300_000_000,
    slot_bytes=480 * 1024,
)
SECONDS = {"time/sample_s": 2.0, "time/reference_s": 1.0, "time/learn_s": 4.0}


def test_bytes_of_a_decode_by_hand():
    # T = 4, P = 5: a row's live slots are 4 x 5 + 4 x 5 / 2 = 30.
    drawn = RolloutStats(num_rows=6, num_tokens=4, prompt_slots=5, num_passes=2)
    # 2 passes x 4 tokens x 1000 + 6 rows x 7 x 30
    assert rollout_bytes(SMALL, drawn) == 8000 + 1260


def test_operations_of_a_row_by_hand():
    drawn = RolloutStats(num_rows=6, num_tokens=4, prompt_slots=5)
    # S = 9: 2 x (100 x 9 + 10 x 4) = 1880; attention 4 x 2 x 3 x 9 x 10 / 2 = 1080
    assert row_flops(SMALL, drawn) == 1880 + 1080


def test_the_paper_s_step_reads_and_computes_what_the_estimates_say():
    drawn = RolloutStats(num_rows=128, num_tokens=576, prompt_slots=30)
    # 576 x 12.3 GB = 7.1 TB of weights, 11.5 TB of live cache
    assert rollout_bytes(JANUS_PRO_7B, drawn) == pytest.approx(7.1e12 + 11.5e12, rel=0.01)
    # reference f, policy f, backward 2 f: 1.9 PFLOP for 64 images
    assert 4 * 64 * row_flops(JANUS_PRO_7B, drawn) == pytest.approx(1.9e15, rel=0.03)


@pytest.mark.parametrize(
    ("logprobs", "forward", "backward"),
    [("conditional", 1, 1), ("guided_detached", 2, 1), ("guided", 2, 2)],
)
def test_rates_count_each_pass_and_two_for_a_backward(logprobs, forward, backward):
    drawn = RolloutStats(num_rows=6, num_tokens=4, prompt_slots=5)
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


def test_passes_of_unequal_size_add_up():
    passes = [
        PassStats(num_rows=4, num_tokens=9, lengths_B=torch.tensor([5, 7])),
        PassStats(num_rows=2, num_tokens=9, lengths_B=torch.tensor([3])),
    ]
    # rows of 5, 5, 7, 7, 3, 3 slots: 30 / 6
    assert RolloutStats.of(passes) == RolloutStats(
        num_rows=6, num_tokens=9, prompt_slots=5.0, num_passes=2
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
    assert size.slot_bytes == 2 * 2 * 32 * 4
    prompts = (Prompt("a red circle", 0), Prompt("a star", 1))
    rollout(engine, prompts, group_size=4, sampling=Sampling(3.0), seed=0, step=0)
    drawn = RolloutStats.of(engine.passes)
    assert (drawn.num_rows, drawn.num_tokens, drawn.num_passes) == (16, 16, 2)
    assert drawn.prompt_slots == tiny_janus.encode(prompts).lengths_P.float().mean().item()
    engine.reload()
    assert engine.passes == []


def test_overall_rates_are_those_of_all_devices():
    drawn = Rollout((), 1, torch.zeros(4, 10), torch.zeros(4))
    times = {"time/step_s": 4.0, "time/sample_s": 2.0}
    assert overall_rates(8, drawn, times) == {
        "images_per_s": 2.0,
        "tokens_per_s": 20.0,
        "throughput/sample_images_per_s": 4.0,
    }


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
