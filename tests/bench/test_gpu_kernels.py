"""The benchmarks of single kernels where there is no GPU."""

import pytest
import torch

from stage_rl.bench.gpu import decode_attention, draw

pytest.importorskip("triton")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is timed instead")
def test_without_a_gpu_the_interpreter_checks_the_results_alone():
    result = decode_attention.run()
    assert result.reached is None
    assert "correctness alone" in result.headline
    assert len(result.measures) == 10
    assert max(result.measures.values()) <= 1e-5


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is timed instead")
def test_the_tokens_of_the_kernel_that_draws_are_compared_with_torchs():
    result = draw.run()
    assert result.reached is None
    assert "correctness alone" in result.headline
    assert result.measures["equal_tokens"] == 1
    assert result.measures["difference"] <= 1e-4
