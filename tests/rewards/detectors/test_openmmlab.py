"""OpenMMLab's Mask2Former in transformers' model, against what MMDetection 2.28.2 computed."""

import hashlib
import json
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from stage_rl.errors import WeightsError
from stage_rl.rewards.detectors.mask2former import IGNORED_KEYS, Mask2FormerConfig, find_instances
from stage_rl.rewards.detectors.openmmlab import (
    fitted_size,
    from_openmmlab,
    is_openmmlab,
    load_openmmlab,
    openmmlab_pixels,
)
from stage_rl.rewards.pretrained import IMAGENET_MEAN, IMAGENET_STD, normalize

DATA = Path(__file__).parents[2] / "data" / "openmmlab"
SIDES = {"shortest": 64, "longest": 96}
REDUCTION = "backbone.stages.1.downsample.reduction.weight"


def weights():
    """The tensors of the reference: each drawn by its name, as in tests/data/README.md."""
    shapes = json.loads((DATA / "mask2former_shapes.json").read_text())
    return {name: weight(name, shape) for name, shape in shapes.items()}


def weight(name, shape):
    if name.endswith("relative_position_index"):
        return torch.zeros(shape, dtype=torch.long)
    spread = 0.5 if len(shape) < 2 else 2 / np.sqrt(np.prod(shape[1:]))
    spread = 3.0 if "query" in name else 0.1 if name.endswith("cls_embed.bias") else spread
    drawn = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()))).random(shape) * 2 - 1
    is_norm = name.endswith("weight") and len(shape) == 1
    return torch.from_numpy(is_norm + spread * drawn).float()


@pytest.fixture(scope="module")
def reference():
    return np.load(DATA / "mask2former.npz")


@pytest.fixture
def load(tmp_path):
    """The model of these tensors, from a file as OpenMMLab writes it."""

    def load(tensors, meta=("person",)):
        file = tmp_path / "detector.pth"
        torch.save({"meta": {"CLASSES": meta, "epoch": 50}, "state_dict": tensors}, file)
        return load_openmmlab(str(file), device="cpu", ignore_keys=IGNORED_KEYS)

    return load


def logits(module, padded_CXY):
    pixels = normalize(torch.from_numpy(padded_CXY).float()[None], IMAGENET_MEAN, IMAGENET_STD)
    with torch.inference_mode():
        output = module(pixel_values=pixels)
    return output.class_queries_logits[0], output.masks_queries_logits[0]


@pytest.mark.parametrize("case", ["enlarged", "reduced"])
def test_logits_and_instances_are_those_of_mmdetection(load, reference, case):
    classes_QK, masks_QYX = logits(load(weights()), reference[f"{case}_padded"])
    of_mmdet = {key: reference[f"{case}_{key}"] for key in ("class_logits", "mask_logits", "boxes")}
    np.testing.assert_allclose(classes_QK, of_mmdet["class_logits"], atol=3e-5)
    np.testing.assert_allclose(masks_QYX[::4], of_mmdet["mask_logits"], atol=1e-4)
    height, width = reference[f"{case}_image"].shape[:2]
    found = find_instances(
        classes_QK,
        masks_QYX,
        padded=reference[f"{case}_padded"].shape[1:],
        resized=fitted_size(height, width, **SIDES),
        image=(height, width),
    )
    # The best 40 of 100: corners, score, label.
    for ours, (*box, score, label) in zip(found, of_mmdet["boxes"].tolist(), strict=False):
        assert (ours.label, list(ours.box)) == (label, box)
        assert ours.score == pytest.approx(score, abs=1e-5)
    assert len({row[5] for row in of_mmdet["boxes"].tolist()}) > 5


@pytest.mark.parametrize(("case", "size"), [("enlarged", (58, 96)), ("reduced", (75, 64))])
def test_pixels_are_those_of_mmdetection_to_a_grey_level(reference, case, size):
    image = torch.from_numpy(reference[f"{case}_image"])
    pixels, resized = openmmlab_pixels(image[None], **SIDES, device="cpu")
    # 48 x 80 by 1.2 = min(96 / 80, 64 / 48); 84 x 72 by 64 / 72: 74.67 rounds to 75.
    assert resized == size
    mean, std = (torch.tensor(row).view(3, 1, 1) * 255 for row in (IMAGENET_MEAN, IMAGENET_STD))
    difference = pixels[0] * std + mean - torch.from_numpy(reference[f"{case}_padded"]).float()
    assert difference.abs().max() < 1.001
    assert (difference.abs() > 0.5).float().mean() < 0.15
    # Grey below the picture, or beside it.
    assert difference[:, size[0] :].abs().max() < 1e-3


def test_patch_merging_is_permuted_from_neighbours_to_crops(load, reference):
    # Channels a and b of 4 neighbours each: row by row there, crop by crop (second: below) here.
    rows = torch.tensor([[10.0, 11, 12, 13, 20, 21, 22, 23]])
    name = "model.pixel_level_module.encoder.encoder.layers.1.downsample.reduction.weight"
    expected = [[10, 20, 12, 22, 11, 21, 13, 23]]
    assert from_openmmlab({REDUCTION: rows})[name].tolist() == expected
    # Without it all tensors fit, and the scores are wrong.
    tensors = weights()
    tensors[REDUCTION] = tensors[REDUCTION].unflatten(-1, (-1, 4)).transpose(1, 2).flatten(1)
    classes_QK, _ = logits(load(tensors), reference["enlarged_padded"])
    assert np.abs(classes_QK.numpy() - reference["enlarged_class_logits"]).max() > 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("panoptic_head.pixel_decoder.mask_feature.bias"), "mask_projection.bias"),
        (lambda t: t.pop("backbone.norm2.weight"), "hidden_states_norms.stage3.weight"),
        (lambda t: t.pop("panoptic_head.cls_embed.weight"), "no 'panoptic_head.cls_embed.weight'"),
        (lambda t: t.update({"panoptic_head.more": torch.ones(1)}), "unexpected: panoptic_head.mo"),
        (lambda t: t.update({REDUCTION: torch.ones(3, 64)}), "of another shape: .*reduction"),
    ],
)
def test_a_tensor_that_is_missing_over_or_of_another_shape_is_named(load, change, message):
    tensors = weights()
    change(tensors)
    with pytest.raises(WeightsError, match=message):
        load(tensors)


def test_files_that_are_something_else_are_refused_with_what_to_get(load, tmp_path):
    layer = "panoptic_head.transformer_decoder.layers.0."
    newer = {
        name.replace(f"{layer}attentions.1.", f"{layer}self_attn."): tensor
        for name, tensor in weights().items()
    }
    with pytest.raises(WeightsError, match=r"is of MMDetection 3.*743b7d99\.pth"):
        load(newer)
    with pytest.raises(WeightsError, match=r"holds a fractions\.Fraction beside its tensors"):
        load(weights(), meta=Fraction(1, 2))
    with pytest.raises(WeightsError, match=r"no such file; get https://download\.openmmlab"):
        Mask2FormerConfig(path=str(tmp_path / "none.pth")).build(torch.device("cpu"))


@pytest.mark.parametrize(("digits", "is_whole"), [(None, True), ("743b7d99", False)])
def test_a_file_whose_name_holds_another_sum_is_damaged_or_converted(
    load, tmp_path, digits, is_whole
):
    load(weights())
    file = tmp_path / "detector.pth"
    digits = digits or hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    named = str(file.rename(tmp_path / f"mask2former_swin-s-{digits}.pth"))
    options = {"device": "cpu", "ignore_keys": IGNORED_KEYS}
    if is_whole:
        assert load_openmmlab(named, **options)
        return
    with pytest.raises(WeightsError, match="is damaged or converted, for its SHA-256 does not"):
        load_openmmlab(named, **options)


def test_a_file_of_any_ending_is_openmmlabs(load, tmp_path):
    load(weights())
    copy = (tmp_path / "detector.pth").rename(tmp_path / "detector.pt")
    assert is_openmmlab(str(copy))
    assert load_openmmlab(str(copy), device="cpu", ignore_keys=IGNORED_KEYS)
    assert is_openmmlab("weights/not_there.pth")
    assert not is_openmmlab(str(tmp_path))


def test_a_pth_file_brings_its_own_preprocessing(load, saved, reference, tmp_path):
    load(weights())
    config = Mask2FormerConfig(
        path=str(tmp_path / "detector.pth"),
        clip=saved("clip"),
        shortest_side=64,
        longest_side=96,
        min_score=0.0,
    )
    image = torch.from_numpy(reference["reduced_image"])[None]
    found = config.build(torch.device("cpu")).instances(image)[0]
    # The pixels differ by rounding, so scores do by as much; other preprocessing is further off.
    scores = [one.score for one in found[:3]]
    assert scores == pytest.approx(reference["reduced_boxes"][:3, 4].tolist(), abs=0.01)
