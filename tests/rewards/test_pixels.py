"""Pixels for models against the library's own processors."""

import pytest
import torch
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.grounding_dino.image_processing_pil_grounding_dino import (
    GroundingDinoImageProcessorPil,
)

from stage_rl.rewards.pretrained import clip_pixels, detr_pixels, shortest_side_size

LEVEL = 1 / 255 / 0.224
"""One step of 8 bits on the smallest standard deviation of ImageNet."""
SIZES = [(48, 48), (60, 80), (40, 160), (90, 70)]


def noise(height, width):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, height, width, 3), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_clip_pixels_are_those_of_the_library_within_two_levels(height, width):
    images = noise(height, width)
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}
    )
    wanted = processor(images=[i.numpy() for i in images], return_tensors="pt")["pixel_values"]
    got = clip_pixels(images, 56, device="cpu")
    assert got.shape == (2, 3, 56, 56)
    assert (got - wanted).abs().max() <= 2 * LEVEL
    assert (got - wanted).abs().mean() <= 0.05 * LEVEL


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_detr_pixels_are_those_of_the_library_within_two_levels(height, width):
    images = noise(height, width)
    processor = GroundingDinoImageProcessorPil(size={"shortest_edge": 96, "longest_edge": 160})
    wanted = processor(images=[i.numpy() for i in images], return_tensors="pt")["pixel_values"]
    got = detr_pixels(images, shortest=96, longest=160, device="cpu")
    assert got.shape == wanted.shape
    assert (got - wanted).abs().max() <= 2.1 * LEVEL


def test_an_image_that_would_grow_too_long_is_scaled_to_the_longest_side():
    assert shortest_side_size(384, 384, shortest=800, longest=1333) == (800, 800)
    # 64 x 200 at 800 would be 2500 long: 1333 x 64 / 200 = 426.56 on the short side
    assert shortest_side_size(64, 200, shortest=800, longest=1333) == (427, 1333)
    # 300 x 400: 800 x 4 / 3 = 1066.67, rounded down
    assert shortest_side_size(300, 400, shortest=800, longest=1333) == (800, 1066)


def test_an_image_of_the_wanted_size_is_only_normalized():
    images = torch.full((1, 32, 32, 3), 255, dtype=torch.uint8)
    # (1 - 0.485) / 0.229 = 2.2489
    assert detr_pixels(images, shortest=32, longest=64, device="cpu")[0, 0].unique().tolist() == (
        pytest.approx([2.2489], abs=1e-4)
    )
