"""GroundingDINO with tiny random weights: tokens, boxes, batches, and the reward on them."""

import pytest
import torch

from stage_rl.errors import RewardError, WeightsError
from stage_rl.rewards.grounding_dino import (
    GroundingDinoDetectorConfig,
    GroundingDinoRewardConfig,
    SceneReward,
    corners,
    load_grounding_dino,
    token_weights,
)
from stage_rl.rewards.pretrained import detr_pixels
from stage_rl.rewards.t2i_r1 import caption_of, judge_scene
from stage_rl.rewards.tiny import tiny_grounding_dino, tiny_scene_tokenizer
from stage_rl.types import Prompt

SMALL = {"shortest_side": 96, "longest_side": 128, "min_score": 0.3}
CPU = torch.device("cpu")


def images(count, height=48, width=48):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, height, width, 3), generator=generator, dtype=torch.uint8)


def asking(*nouns):
    return Prompt("a scene", 0, {"task_type": "object", "nouns": list(nouns)})


@pytest.fixture(scope="module")
def detector():
    return load_grounding_dino("tiny", **SMALL)


def test_a_noun_is_the_mean_of_its_tokens():
    nouns = ["ab", "c de"]
    caption, spans = caption_of(nouns)
    assert caption == "ab . c de."
    text = tiny_scene_tokenizer()(caption, return_tensors="pt")
    # One token a letter: [CLS] a b . c d e . [SEP]
    weights = token_weights(text, spans, nouns)
    assert weights.shape == (2, 9)
    assert weights[0].tolist() == pytest.approx([0, 0.5, 0.5, 0, 0, 0, 0, 0, 0], abs=1e-5)
    assert weights[1].tolist() == pytest.approx([0, 0, 0, 0, *[1 / 3] * 3, 0, 0], abs=1e-5)


def test_the_middle_of_a_noun_of_three_words_is_left_out():
    caption, spans = caption_of(["a b c"])
    text = tiny_scene_tokenizer()(caption, return_tensors="pt")
    # [CLS] a b c . [SEP]
    weights = token_weights(text, spans, ["a b c"])
    assert weights[0].tolist() == pytest.approx([0, 0.5, 0, 0.5, 0, 0], abs=1e-5)


def test_a_noun_without_tokens_is_refused_by_name(detector):
    with pytest.raises(RewardError, match="'\x00' holds no word"):
        detector.detect(images(1), ["cat", "\x00"])


def test_a_caption_beyond_the_model_is_refused(detector):
    with pytest.raises(RewardError, match="longer than 256 tokens"):
        detector.detect(images(1), ["x"] * 130)  # a token each, and one for every stop


def test_a_prompt_without_nouns_is_refused(detector):
    with pytest.raises(RewardError, match="looks for 'nouns', which prompt 3 lacks"):
        detector(images(1), [Prompt("a", 3, {"tag": "counting"})])


def test_corners_are_half_a_size_from_the_centre():
    boxes = torch.tensor([[0.5, 0.25, 0.2, 0.1]])
    assert corners(boxes)[0].tolist() == pytest.approx([0.4, 0.2, 0.6, 0.3])


def test_detections_are_the_models_boxes_in_pixels_most_confident_first(detector):
    picture, nouns = images(1, 48, 32), ["cat", "dog"]
    found = detector.detect(picture, nouns)[0]
    caption, spans = caption_of(nouns)
    text = detector.tokenizer(caption, return_tensors="pt")
    with torch.inference_mode():
        output = detector.module(
            pixel_values=detr_pixels(picture, shortest=96, longest=128, device="cpu"), **text
        )
    shares = output.logits[0].sigmoid()
    wanted = []
    for noun, weights in zip(nouns, token_weights(text, spans, nouns), strict=True):
        for query in range(20):
            score = sum((shares[query, : len(weights)] * weights).tolist())
            cx, cy, w, h = output.pred_boxes[0, query].tolist()
            box = [(cx - w / 2) * 32, (cy - h / 2) * 48, (cx + w / 2) * 32, (cy + h / 2) * 48]
            wanted += [(score, noun, box)] if score > 0.3 else []
    wanted.sort(key=lambda item: -item[0])
    assert len(found) == len(wanted) > 2
    for detection, (score, noun, box) in zip(found, wanted, strict=True):
        assert detection.label == noun
        assert detection.score == pytest.approx(score, abs=1e-5)
        assert detection.box == pytest.approx(box, abs=1e-3)


def test_a_batch_gives_what_each_image_gives_alone(detector):
    pictures = images(5)
    prompts = [asking(*nouns) for nouns in (("cat",), ("red dog", "cat"), ("cat",), (), ("cat",))]
    together = load_grounding_dino("tiny", **SMALL, batch_size=2)(pictures, prompts)
    assert together[3] == []
    for i, prompt in enumerate(prompts):
        (alone,) = detector(pictures[i : i + 1], [prompt])
        assert [d.label for d in together[i]] == [d.label for d in alone]
        for a, b in zip(together[i], alone, strict=True):
            assert (a.score, *a.box) == pytest.approx((b.score, *b.box), abs=1e-3)


@pytest.mark.gpu
def test_a_gpu_finds_what_the_cpu_finds(detector):
    on_gpu = load_grounding_dino("tiny", device="cuda", **SMALL).detect(images(2), ["cat"])
    for there, here in zip(on_gpu, detector.detect(images(2), ["cat"]), strict=True):
        assert there[0].label == here[0].label
        assert there[0].score == pytest.approx(here[0].score, abs=1e-2)
        assert there[0].box == pytest.approx(here[0].box, abs=0.5)


def test_saved_weights_give_the_same_detections(detector, tmp_path):
    tiny_grounding_dino().save_pretrained(tmp_path)
    tiny_scene_tokenizer().save_pretrained(tmp_path)
    again = load_grounding_dino(str(tmp_path), **SMALL)
    assert again.detect(images(2), ["cat"]) == detector.detect(images(2), ["cat"])


def test_weights_without_a_tokenizer_are_refused(tmp_path):
    tiny_grounding_dino().save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="no tokenizer there"):
        load_grounding_dino(str(tmp_path), **SMALL)


def test_the_reward_judges_what_the_detector_finds(detector):
    prompts = [asking("cat", "dog"), asking("cat", "a")]
    reward = GroundingDinoRewardConfig(
        detector=GroundingDinoDetectorConfig(path="tiny", **SMALL), threshold=0.5
    ).build(CPU)
    assert isinstance(reward, SceneReward)
    found = detector(images(2), prompts)
    assert reward(images(2), prompts) == [
        judge_scene(one, prompt.metadata, size=(48, 48), threshold=0.5)
        for one, prompt in zip(found, prompts, strict=True)
    ]


SPATIAL = {"task_type": "spatial", "nouns": ["a", "b"]}
NUMERACY = {"task_type": "numeracy", "nouns": ["a"]}


@pytest.mark.parametrize(
    ("metadata", "compat", "unsupported_reason"),
    [
        ({"nouns": ["a"]}, "fixed", "needs 'task_type'"),
        (SPATIAL, "fixed", "needs 'spatial_info'"),
        (NUMERACY, "fixed", "needs 'numeracy_info'"),
        (
            {**NUMERACY, "numeracy_info": [{"obj_name": "c", "num": 1}]},
            "fixed",
            "'c' is not among them",
        ),
        (
            {**SPATIAL, "spatial_info": {"obj1": "a", "obj2": "b", "locality": "inside"}},
            "fixed",
            "does not know the locality 'inside'; write one of: next to, near",
        ),
        (
            {**SPATIAL, "spatial_info": {"obj1": "a", "obj2": "b", "locality": "inside"}},
            "release",
            None,
        ),
        ({"task_type": "object", "nouns": ["a"]}, "fixed", None),
    ],
)
def test_a_prompt_that_cannot_be_judged_is_told_before_training(
    metadata, compat, unsupported_reason
):
    said = GroundingDinoRewardConfig(compat=compat).unsupported_reason(Prompt("a", 0, metadata))
    assert (unsupported_reason in said) if unsupported_reason else said is None


def test_a_detector_that_hides_what_counts_is_refused():
    with pytest.raises(ValueError, match=r"leaves out what the threshold of 0\.3 counts"):
        GroundingDinoRewardConfig(detector=GroundingDinoDetectorConfig(min_score=0.4))


def test_reference_images_come_with_what_the_reward_needs_and_random_weights_have_none():
    config = GroundingDinoRewardConfig()
    cases = config.reference_cases()
    assert [case.prompt.text for case in cases] == ["a photo of a cat", "a photo of a cup"]
    assert [config.unsupported_reason(case.prompt) for case in cases] == [None, None]
    assert all(len(case.images_NHWC()) == 2 for case in cases)
    assert (
        GroundingDinoRewardConfig(
            detector=GroundingDinoDetectorConfig(path="tiny")
        ).reference_cases()
        == ()
    )
