"""GenEval's detector: instances against figures of MMDetection, colours, the detector's call."""

import pytest
import torch
from tiny_models import noise, tiny_mask2former

from stage_rl.config import load_reward
from stage_rl.errors import WeightsError
from stage_rl.prompts.geneval import CLASSES, COLORS, make_record
from stage_rl.rewards.base import Detection
from stage_rl.rewards.check import check_reward
from stage_rl.rewards.clip import CLIP_L14
from stage_rl.rewards.detectors.mask2former import (
    ColorClassifier,
    Instance,
    Mask2FormerConfig,
    cut_out,
    find_instances,
    sentences_of,
    tight_box,
)
from stage_rl.rewards.geneval import GenEvalReward
from stage_rl.rewards.judge import WeightedReward
from stage_rl.types import Prompt

CPU = torch.device("cpu")
SIDES = {"shortest_side": 64, "longest_side": 96, "min_score": 0.005}


@pytest.fixture
def build(saved):
    """Builds the detector of tiny models with these settings."""

    def build(**settings):
        paths = {"path": saved("mask2former"), "clip": saved("clip")}
        return Mask2FormerConfig(**paths, **SIDES, **settings).build(CPU)

    return build


def prompts(num=3):
    record = make_record("single_object", "cat")
    return [Prompt(record["prompt"], i, record) for i in range(num)]


def test_detections_lie_in_the_image_most_confident_first(build):
    found = build()(noise(), prompts())[0]
    assert found
    assert {one.label for one in found} <= set(CLASSES)
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    assert all(
        0 <= x0 < x1 <= 56 and 0 <= y0 < y1 <= 40 for x0, y0, x1, y1 in (d.box for d in found)
    )


def test_swapped_channels_are_those_of_a_swapped_image(build):
    plain, swapped = build(), build(swap_rb=True)
    assert swapped(noise().flip(-1), prompts()) == plain(noise(), prompts())
    assert swapped(noise(), prompts()) != plain(noise(), prompts())


def test_colours_are_told_only_for_classes_that_the_prompt_gives_a_colour(build):
    detector = build()
    name = detector(noise(1), prompts(1))[0][0].label
    asked, other = make_record("colors", name, "red"), make_record("single_object", name)
    colored, plain = (
        detector(noise(1), [Prompt(record["prompt"], 0, record)])[0] for record in (asked, other)
    )
    assert {one.color for one in colored if one.label == name} <= set(COLORS)
    assert {one.color for one in colored if one.label != name} == {None}
    assert {one.color for one in plain} == {None}


def test_a_prompt_for_what_is_never_found_is_told_before_training():
    reward = load_reward("geneval")
    assert reward.detector == Mask2FormerConfig()
    circle = {**make_record("single_object", "cat"), "include": [{"class": "circle", "count": 1}]}
    assert reward.unsupported_reason(prompts()[0]) is None
    assert reward.unsupported_reason(Prompt("a photo of a circle", 0, circle)) == (
        "finds the 80 classes of GenEval, not 'circle'"
    )
    shapes = load_reward("geneval", ["detector.kind=shapes"])
    assert shapes.unsupported_reason(Prompt("a photo of a circle", 0, circle)) is None
    assert "needs 'tag'" in reward.unsupported_reason(Prompt("a cat", 0))


def test_names_go_by_the_output_and_a_model_of_other_classes_is_refused(tmp_path):
    # COCO calls outputs 64 to 66 mouse, remote and keyboard
    assert CLASSES[64:67] == ("computer mouse", "tv remote", "computer keyboard")
    assert (CLASSES[0], CLASSES[16], CLASSES[79]) == ("person", "dog", "toothbrush")
    tiny_mask2former(num_labels=150).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="knows 150 classes; GenEval needs the 80"):
        Mask2FormerConfig(path=str(tmp_path)).build(CPU)


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
    for _ in range(2):
        assert classifier(image, objects, "dog") == ["blue", "red", "unknown"]
    # ten colours of three sentences, once
    assert clip.num_sentences == 30
    assert sentences_of("red", "tv remote") == (
        "a photo of a red tv remote",
        "a photo of a red-colored tv remote",
        "a photo of a red object",
    )
    # The cut-out is grey around the mask.
    image = torch.arange(48, dtype=torch.uint8).view(4, 4, 3)
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[1, 1] = True
    crop = cut_out(image, Instance(0, 1.0, (1.0, 1.0, 3.0, 2.0), mask))
    # row 1, columns 1 and 2: the pixel of the mask starts at (1 x 4 + 1) x 3 = 15
    assert crop is not None
    assert crop.tolist() == [[[15, 16, 17], [153, 153, 153]]]


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

    outcomes = check_reward(config, WeightedReward("geneval", 1.0, GenEvalReward(sees)))
    assert [outcome.sentence() for outcome in outcomes if not outcome.is_right] == []
    assert len(outcomes) == 4
    # 1 against 0 for objects; for colours count and colour against the count alone
    assert [(o.better.value, o.worse.value) for o in outcomes] == [
        *[(1.0, 0.0)] * 2,
        *[(1.0, 0.5)] * 2,
    ]


# Instances from the outputs of a Mask2Former.

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
    # Masks have the size of the image and fill their box.
    assert found[0].mask_HW.shape == (48, 48)
    assert found[0].mask_HW.dtype == torch.bool
    assert tight_box(found[0].mask_HW) == found[0].box
    # The lowest score changes nothing above it.
    assert rounded(find_instances(*golden(), **SIZES, min_score=0.8)) == rounded(found)[:2]
    assert find_instances(*golden(), **SIZES, min_score=0.99999) == []
    found = find_instances(*golden(outside=-2.0), **SIZES, min_score=0.01)
    assert rounded(found)[2] == (16, 0.7470, (28.0, 28.0, 40.0, 40.0))
    # An empty mask scores nothing and has an empty box.
    empty = golden()[0], torch.full((3, 12, 12), -5.0)
    found = find_instances(*empty, **SIZES, min_score=-1.0)
    assert {(one.score, one.box) for one in found} == {(0.0, (0.0, 0.0, 0.0, 0.0))}


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
