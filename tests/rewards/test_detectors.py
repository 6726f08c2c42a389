"""Mask2Former and CLIP colours behind the detector's call, on tiny random weights."""

import pytest
import torch

from stage_rl.config import load_reward
from stage_rl.errors import WeightsError
from stage_rl.prompts.geneval import CLASSES, COLORS, colors_record, single_object_record
from stage_rl.rewards.base import Detection
from stage_rl.rewards.clip import CLIP_L14, Clip, load_clip
from stage_rl.rewards.geneval import GenEvalReward
from stage_rl.rewards.mask2former import (
    ColorClassifier,
    Instance,
    Mask2FormerConfig,
    cut_out,
    load_mask2former,
    sentences_of,
)
from stage_rl.rewards.selftest import check_reward
from stage_rl.rewards.tiny import tiny_clip, tiny_clip_tokenizer, tiny_mask2former
from stage_rl.types import Prompt

CPU = torch.device("cpu")
SIDES = {"shortest_side": 64, "longest_side": 96, "min_score": 0.005}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A Mask2Former and a CLIP as transformers saves them."""
    root = tmp_path_factory.mktemp("detector")
    tiny_mask2former().save_pretrained(root / "mask2former")
    tiny_clip().save_pretrained(root / "clip")
    tiny_clip_tokenizer().save_pretrained(root / "clip")
    return {"path": str(root / "mask2former"), "clip": str(root / "clip")}


def noise(num=3, height=40, width=56):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num, height, width, 3), generator=generator, dtype=torch.uint8)


def prompts(num=3):
    record = single_object_record("cat")
    return [Prompt(record["prompt"], i, record) for i in range(num)]


def test_a_saved_detector_finds_what_the_one_in_memory_finds(folders):
    saved = Mask2FormerConfig(**folders, **SIDES).build(CPU)(noise(), prompts())
    tiny = Mask2FormerConfig(path="tiny", clip="tiny", **SIDES).build(CPU)(noise(), prompts())
    assert saved == tiny
    found = saved[0]
    assert found
    assert {one.label for one in found} <= set(CLASSES)
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    assert all(
        0 <= x0 < x1 <= 56 and 0 <= y0 < y1 <= 40 for x0, y0, x1, y1 in (d.box for d in found)
    )


def test_an_image_is_judged_the_same_in_any_batch():
    images = noise(5)
    whole = Mask2FormerConfig(path="tiny", clip="tiny", **SIDES, batch_size=4).build(CPU)
    single = Mask2FormerConfig(path="tiny", clip="tiny", **SIDES, batch_size=1).build(CPU)
    for one, other in zip(whole(images, prompts(5)), single(images, prompts(5)), strict=True):
        assert [d.label for d in one] == [d.label for d in other]
        assert [d.box for d in one] == [d.box for d in other]
        assert [d.score for d in one] == pytest.approx([d.score for d in other], abs=1e-5)


def test_swapped_channels_are_those_of_a_swapped_image():
    plain = Mask2FormerConfig(path="tiny", clip="tiny", **SIDES).build(CPU)
    swapped = Mask2FormerConfig(path="tiny", clip="tiny", **SIDES, swap_rb=True).build(CPU)
    assert swapped(noise().flip(-1), prompts()) == plain(noise(), prompts())
    assert swapped(noise(), prompts()) != plain(noise(), prompts())


def test_colours_are_told_only_for_classes_that_the_prompt_gives_a_colour():
    detector = Mask2FormerConfig(path="tiny", clip="tiny", **SIDES).build(CPU)
    name = detector(noise(1), prompts(1))[0][0].label
    asked, other = colors_record("red", name), single_object_record(name)
    colored, plain = (
        detector(noise(1), [Prompt(record["prompt"], 0, record)])[0] for record in (asked, other)
    )
    assert {one.color is None for one in colored if one.label == name} == {False}
    assert {one.color for one in colored if one.label != name} == {None}
    assert {one.color for one in plain} == {None}


def test_names_go_by_the_output_not_by_the_model_of_coco():
    # COCO calls outputs 64 to 66 mouse, remote and keyboard
    assert CLASSES[64:67] == ("computer mouse", "tv remote", "computer keyboard")
    assert (CLASSES[0], CLASSES[16], CLASSES[79]) == ("person", "dog", "toothbrush")


def test_a_prompt_for_what_is_never_found_is_told_before_training():
    reward = load_reward("geneval")
    assert reward.detector == Mask2FormerConfig()
    circle = {**single_object_record("cat"), "include": [{"class": "circle", "count": 1}]}
    assert reward.unsupported_reason(prompts()[0]) is None
    assert reward.unsupported_reason(Prompt("a photo of a circle", 0, circle)) == (
        "finds the 80 classes of GenEval, not 'circle'"
    )
    shapes = load_reward("geneval", ["detector.kind=shapes"])
    assert shapes.unsupported_reason(Prompt("a photo of a circle", 0, circle)) is None
    assert "needs 'tag'" in reward.unsupported_reason(Prompt("a cat", 0))


def test_a_model_of_other_classes_is_refused(tmp_path):
    tiny_mask2former(num_labels=150).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="knows 150 classes; GenEval needs the 80"):
        load_mask2former(str(tmp_path))


class RedClip:
    """In place of a CLIP: vectors of red, green and blue, of an image or of a sentence."""

    side = 8

    def __init__(self):
        self.num_sentences = 0

    def pixels_ND(self, pixels_NCXX):
        return torch.nn.functional.normalize(pixels_NCXX.mean((2, 3)), dim=-1)

    def texts_MD(self, texts):
        self.num_sentences += len(texts)
        names = ("red", "green", "blue")
        rows = [[float(name in text.split(" ")[4]) for name in names] for text in texts]
        return torch.tensor(rows) + 1e-3


def test_a_colour_is_that_of_the_mask_and_text_vectors_are_kept():
    image = torch.full((40, 40, 3), 255, dtype=torch.uint8)
    image[10:20, 10:20] = torch.tensor([0, 0, 255], dtype=torch.uint8)
    image[20:30, 10:20] = torch.tensor([255, 0, 0], dtype=torch.uint8)
    mask = torch.zeros(40, 40, dtype=torch.bool)
    mask[10:20, 10:20] = True
    objects = [
        Instance(16, 0.9, (10.0, 10.0, 20.0, 20.0), mask),
        Instance(16, 0.8, (10.0, 20.0, 20.0, 30.0), mask.roll(10, 0)),
        Instance(16, 0.7, (0.0, 0.0, 0.0, 0.0), torch.zeros_like(mask)),
    ]
    clip = RedClip()
    classifier = ColorClassifier(clip)  # type: ignore[arg-type]
    assert classifier(image, objects, "dog") == ["blue", "red", "unknown"]
    classifier(image, objects, "dog")
    # ten colours of three sentences, once
    assert clip.num_sentences == 30


def test_the_cut_out_is_grey_around_the_mask():
    image = torch.arange(48, dtype=torch.uint8).view(4, 4, 3)
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[1, 1] = True
    crop = cut_out(image, Instance(0, 1.0, (1.0, 1.0, 3.0, 2.0), mask))
    assert crop is not None
    # row 1, columns 1 and 2: the pixel of the mask starts at (1 x 4 + 1) x 3 = 15
    assert crop.tolist() == [[[15, 16, 17], [153, 153, 153]]]


def test_a_colour_is_three_sentences():
    assert sentences_of("red", "tv remote") == (
        "a photo of a red tv remote",
        "a photo of a red-colored tv remote",
        "a photo of a red object",
    )


def test_colours_by_a_real_clip_are_of_the_ten():
    clip = load_clip("tiny")
    assert isinstance(clip, Clip)
    mask = torch.ones(40, 56, dtype=torch.bool)
    told = ColorClassifier(clip)(noise(1)[0], [Instance(0, 1.0, (0, 0, 56, 40), mask)] * 2, "dog")
    assert told[0] == told[1]
    assert told[0] in COLORS


def test_the_reference_cases_are_ordered_by_one_who_sees():
    config = load_reward("geneval", ["detector.kind=mask2former"])
    assert config.detector.clip == CLIP_L14  # type: ignore[attr-defined]

    def sees(images_NHWC, prompts):
        """The cup's table is warm, the cat's picture not; a tint is where one channel leads."""
        found = []
        for image in images_NHWC.float():
            red, green, blue = image.mean((0, 1)).tolist()
            if red > 2 * blue and green > 1.2 * blue:
                found.append([Detection("cup", 0.9, (0, 0, 9, 9))])
            else:
                color = "green" if green > 1.2 * red else "red" if red > 2 * green else "brown"
                found.append([Detection("cat", 0.9, (0, 0, 9, 9), color)])
        return found

    outcomes = check_reward(config, GenEvalReward(sees))
    assert [outcome.sentence() for outcome in outcomes if not outcome.is_right] == []
    assert len(outcomes) == 4
    # 1 against 0 for objects; for colours count and colour against the count alone
    assert [(o.better.value, o.worse.value) for o in outcomes] == [
        *[(1.0, 0.0)] * 2,
        *[(1.0, 0.5)] * 2,
    ]
