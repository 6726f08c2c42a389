"""The logprobs benchmark."""

from stage_rl.bench import logprobs


def test_the_benchmark_measures_memory_and_agreement():
    result = logprobs.run(rows=128, width=8, codebook_size=256, chunk_rows=16, rounds=1)
    # The memory and the difference do not depend on the machine's load; the time does.
    assert 0 < result.measures["memory_ratio"] <= 0.40
    assert 0 < result.measures["memory_ratio_both"] <= 0.40
    assert result.measures["fp64_difference"] <= 1e-12
    assert result.measures["time_ratio"] > 0


def test_the_entropy_takes_no_gradient_where_it_is_a_constant():
    # The naive form with a constant entropy must be no straw man: it keeps less than with both.
    result = logprobs.run(rows=64, width=4, codebook_size=128, chunk_rows=16, rounds=1)
    assert result.measures["naive_mib"] < result.measures["naive_both_mib"]
