"""Diversity in code space, objects and background apart."""

import numpy as np
import pytest
import torch

from stage_rl.evaluation.results import group_diversity, object_cells


def test_a_cell_is_an_objects_where_most_of_it_is_foreground():
    foreground_NHW = np.zeros((1, 4, 8), bool)
    foreground_NHW[0, :, :2] = True  # 4 x 2 of 4 x 4 pixels: half is not most
    foreground_NHW[0, :3, 4:7] = True  # 3 x 3 of 16
    assert object_cells(foreground_NHW, (1, 2)).tolist() == [[False, True]]


def test_diversity_is_one_minus_the_mean_cosine_over_pairs():
    # Three images, two tokens. Token 0 shows codes e1, e1, e2: cosines 1, 0, 0, and is background
    # in all. Token 1 shows e1, -e1, 2 e1: cosines -1, 1, -1; image 0 has an object there, so the
    # pairs (0, 1) and (0, 2) are an object's and (1, 2) is background.
    codes_GTC = torch.tensor([[[1.0, 0], [1, 0]], [[1, 0], [-1, 0]], [[0, 1], [2, 0]]])
    object_GT = torch.tensor([[False, True], [False, False], [False, False]])
    seen = group_diversity(codes_GTC, object_GT)
    assert seen.objects == pytest.approx(1 - (-1 + 1) / 2)
    assert seen.background == pytest.approx(1 - (1 + 0 + 0 - 1) / 4)


def test_equal_images_have_no_diversity():
    codes_GTC = torch.randn(1, 5, 3).expand(4, -1, -1)
    seen = group_diversity(codes_GTC, torch.zeros(4, 5, dtype=torch.bool))
    assert seen.background == pytest.approx(0, abs=1e-6)
    assert seen.objects is None


def test_a_single_image_has_none():
    seen = group_diversity(torch.randn(1, 5, 3), torch.zeros(1, 5, dtype=torch.bool))
    assert seen == (None, None)
