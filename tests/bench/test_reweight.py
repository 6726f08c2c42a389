"""The reweight benchmark and its slow form."""

import pytest
import torch

from stage_rl.bench import reweight


def test_the_pair_loop_is_the_mean_cosine_with_opponents():
    # Unit vectors in the plane. Completion 0 (A > 0) opposes 1 and 2 (A < 0):
    # cosines 0 and -1, mean -0.5. Completions 1 and 2 oppose 0 alone: 0 and -1.
    codes_PGTC = torch.tensor([[[[1.0, 0.0]], [[0.0, 2.0]], [[-3.0, 0.0]]]])
    sim_PGT = reweight.pair_loop_similarity(codes_PGTC, torch.tensor([[1.0, -0.5, -0.5]]))
    assert sim_PGT.flatten().tolist() == pytest.approx([-0.5, 0.0, -1.0])


def test_the_benchmark_reports_both_forms_for_every_group_size():
    result = reweight.run(group_sizes=(2, 4), num_tokens=3, rounds=1)
    assert result.reached is None
    for size in (2, 4):
        assert result.measures[f"difference_g{size}"] <= 1e-6
        assert result.measures[f"speedup_g{size}"] > 0


@pytest.mark.parametrize(
    ("speedup", "difference", "reached"),
    [(10.0, 1e-6, True), (9.9, 1e-7, False), (50.0, 2e-6, False)],
)
def test_the_bar_asks_for_speed_and_agreement(speedup, difference, reached, monkeypatch):
    measured = {"speedup_g8": speedup, "difference_g8": difference}
    monkeypatch.setattr(reweight, "_measure", lambda *_: measured)
    assert reweight.run(group_sizes=(8,)).reached is reached
    assert reweight.run(group_sizes=(8,), num_tokens=576).reached is None
