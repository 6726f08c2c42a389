"""The decode-attention benchmark where there is no GPU."""

import pytest
import torch

from stage_rl.bench.gpu import decode_attention

pytest.importorskip("triton")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is timed instead")
def test_without_a_gpu_the_interpreter_checks_the_results_alone():
    result = decode_attention.run()
    assert result.reached is None
    assert "correctness alone" in result.headline
    assert len(result.measures) == 10
    assert max(result.measures.values()) <= 1e-5
