"""Instances from the outputs of a Mask2Former, against figures of MMDetection's post-processing."""

import pytest
import torch

from stage_rl.rewards.mask2former import find_instances, tight_box

SIZES = {"padded": (96, 96), "resized": (96, 96), "image": (48, 48)}


def golden(outside=-6.0):
    """Three queries on a grid of 12 x 12; `outside` is query 1's logit around its mask."""
    classes = torch.full((3, 81), -10.0)
    classes[:, 80] = 0.0
    classes[0, 16], classes[1, 16], classes[2, 2] = 8.0, 3.0, 5.0
    masks = torch.full((3, 12, 12), -6.0)
    masks[1] = outside
    masks[0, 2:6, 2:6] = 6.0
    masks[1, 7:10, 7:10] = 2.0
    masks[2, 0:3, 8:12] = 6.0
    return classes, masks


def rounded(instances):
    return [(one.label, round(one.score, 4), one.box) for one in instances]


def test_the_golden_outputs_give_the_published_scores_and_boxes():
    # the figures were computed with MMDetection's functions on the same tensors
    found = find_instances(*golden(), **SIZES, min_score=0.01)
    assert rounded(found) == [
        (2, 0.9634, (32.0, 0.0, 48.0, 12.0)),
        (16, 0.9493, (8.0, 8.0, 24.0, 24.0)),
        (16, 0.7799, (29.0, 29.0, 39.0, 39.0)),
    ]
    found = find_instances(*golden(outside=-2.0), **SIZES, min_score=0.01)
    assert rounded(found)[2] == (16, 0.7470, (28.0, 28.0, 40.0, 40.0))


def test_masks_have_the_size_of_the_image_and_fill_their_box():
    first = find_instances(*golden(), **SIZES, min_score=0.01)[0]
    assert first.mask_HW.shape == (48, 48)
    assert first.mask_HW.dtype == torch.bool
    assert tight_box(first.mask_HW) == first.box


def test_padding_plays_no_part():
    classes, masks = golden()
    # one more cell repeats the edge, as up-sampling without padding does; the rest is full
    wider = torch.nn.functional.pad(masks[None], (0, 1, 0, 1), mode="replicate")[0]
    wider = torch.nn.functional.pad(wider, (0, 3, 0, 7), value=9.0)
    # 12 + 8 rows and 12 + 4 columns of 8 pixels
    padded = {**SIZES, "padded": (160, 128)}
    assert rounded(find_instances(classes, wider, **padded)) == rounded(
        find_instances(classes, masks, **SIZES)
    )


def test_the_best_hundred_are_taken_over_all_queries_and_classes():
    # 2 queries x 80 classes = 160 pairs, equal but for query 0's class 5
    classes = torch.zeros(2, 81)
    classes[0, 5] = 3.0
    masks = torch.full((2, 4, 4), 8.0)
    found = find_instances(classes, masks, padded=(16, 16), resized=(16, 16), image=(8, 8))
    assert len(found) == 100
    assert found[0].label == 5
    # one query stands for several classes
    assert len({one.label for one in found}) > 50
    # e^3 / (e^3 + 80) = 20.0855 / 100.0855; sigmoid(8) = 0.99966
    assert found[0].score == pytest.approx(0.20068 * 0.99966, abs=1e-5)


def test_the_lowest_score_changes_nothing_above_it():
    everything = find_instances(*golden(), **SIZES)
    kept = find_instances(*golden(), **SIZES, min_score=0.8)
    assert rounded(kept) == [one for one in rounded(everything) if one[1] > 0.8]
    assert find_instances(*golden(), **SIZES, min_score=0.99999) == []


def test_an_empty_mask_scores_nothing_and_has_an_empty_box():
    classes, _ = golden()
    found = find_instances(classes, torch.full((3, 12, 12), -5.0), **SIZES, min_score=-1.0)
    assert {one.score for one in found} == {0.0}
    assert {one.box for one in found} == {(0.0, 0.0, 0.0, 0.0)}
