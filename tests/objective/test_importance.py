"""Importance weights by hand: two images of three tokens, ratio 1."""

import pytest
import torch
from credit_parts import tensor

from stage_rl.algorithm_config import AlgorithmConfig
from stage_rl.objective.importance import importance_metrics, importance_weights

RHO = tensor([[[1.1, 0.9, 3], [0.4, 1.05, 1.2]]])
ADVANTAGES = tensor([[[1.0], [-1]]])


@pytest.mark.parametrize(
    ("kind", "weights", "loss", "ess", "cut"),
    [
        ("token_truncate", [1.1, 0.9, 2, 0.4, 1.05, 1.2], -0.225, 0.844989, 1 / 6),
        ("token_mask", [1.1, 0.9, 0, 0, 1.05, 1.2], 0.041667, 0.659817, 2 / 6),
        ("sequence_truncate", [2] * 3 + [0.504] * 3, -0.748, 0.736953, 0.5),
        ("sequence_mask", [0] * 3 + [0.504] * 3, 0.252, 0.5, 0.5),
        # The geometric means, 1.437426 and .795811, are both within [.5, 2].
        ("geometric_mask", [1] * 6, 0, 1, 0),
    ],
)
def test_what_ratios_to_the_sampler_weigh(kind, weights, loss, ess, cut):
    settings = AlgorithmConfig(importance_sampling=kind)
    found = importance_weights(RHO.log().requires_grad_(), torch.zeros_like(RHO), settings)
    assert not found.requires_grad
    assert found.flatten().tolist() == pytest.approx(weights)
    assert -(found * ADVANTAGES).mean().item() == pytest.approx(loss, abs=1e-6)
    metrics = importance_metrics(found, settings)
    assert metrics["importance/ess"].item() == pytest.approx(ess, abs=1e-6)
    assert metrics["importance/weight"].item() == pytest.approx(sum(weights) / 6)
    assert metrics["importance/cut"].item() == pytest.approx(cut)


@pytest.mark.parametrize(
    ("cap", "floor", "kept"),
    [(1.437427, 0.795810, [1, 1]), (1.437425, 0.5, [0, 1]), (2, 0.795812, [1, 0])],
)
def test_the_geometric_filter_keeps_or_drops_whole_images(cap, floor, kept):
    """By (1.1 .9 3)^(1/3) = 1.437426 and (.4 1.05 1.2)^(1/3) = .795811."""
    settings = AlgorithmConfig(
        importance_sampling="geometric_mask", importance_cap=cap, importance_floor=floor
    )
    found = importance_weights(RHO.log(), torch.zeros_like(RHO), settings)
    assert found.tolist() == [[[image] * 3 for image in kept]]


@pytest.mark.parametrize("kind", ["token_truncate", "sequence_truncate", "geometric_mask"])
def test_tokens_that_do_not_count_are_in_no_weight(kind):
    settings = AlgorithmConfig(importance_sampling=kind)
    counts = torch.tensor([[[True, True, False]] * 2])
    zeros = torch.zeros_like(RHO)
    found = importance_weights(RHO.log(), zeros, settings, counts)
    shorter = importance_weights(RHO[..., :2].log(), zeros[..., :2], settings)
    assert torch.allclose(found[..., :2], shorter)
    metrics = importance_metrics(found, settings, counts)
    expected = importance_metrics(shorter, settings)
    for name, value in expected.items():
        assert metrics[name].item() == pytest.approx(value.item())
