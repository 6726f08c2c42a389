import json
from pathlib import Path

import pytest
import torch

from stage_rl.errors import InputError
from stage_rl.prompts.geneval import counting_record, position_record, single_object_record
from stage_rl.rewards.base import Detection, DetectorConfig
from stage_rl.rewards.geneval import GenEvalReward, GenEvalRewardConfig, judge, relative_position
from stage_rl.types import Prompt

GOLDEN = json.loads((Path(__file__).parents[1] / "data/geneval/golden_scoring.json").read_text())
CASES = GOLDEN["geneval"]
DOG = single_object_record("dog")
BOX = (0.0, 0.0, 9.0, 9.0)


def detections(case):
    return [
        Detection(label, box[4], tuple(box[:4]), case["colors"].get(label, [None] * 99)[i])
        for label, boxes in case["detections"].items()
        for i, box in enumerate(boxes)
    ]


def dogs(*scores):
    return [Detection("dog", score, BOX) for score in scores]


def test_all_golden_cases_are_there():
    assert len(CASES) == 31
    assert len(GOLDEN["relative_position"]) == 8


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_the_fixed_form_agrees_with_the_golden_case(case):
    verdict = judge(detections(case), case["metadata"])
    assert verdict.reward == pytest.approx(case["fixed"], abs=1e-6)
    assert verdict.strict is case["strict"]
    assert verdict.correct is case["official_correct"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_the_released_form_agrees_with_the_golden_case(case):
    verdict = judge(detections(case), case["metadata"], compat="release")
    assert verdict.reward == pytest.approx(case["release_soft"], abs=1e-6)
    assert verdict.strict is case["strict"]
    assert verdict.correct is case["official_correct"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_the_reward_is_the_mean_of_the_clauses_and_each_has_its_reason(case):
    verdict = judge(detections(case), case["metadata"])
    assert verdict.reward == pytest.approx(
        sum(clause.value for clause in verdict.clauses) / len(verdict.clauses)
    )
    assert all(clause.why in verdict.why for clause in verdict.clauses)
    assert ("not correct" in verdict.why) is not verdict.correct


@pytest.mark.parametrize("case", GOLDEN["relative_position"])
def test_relative_positions_are_the_golden_ones(case):
    assert relative_position(tuple(case["a"]), tuple(case["b"])) == set(case["relations"])


def test_two_relations_may_hold_at_once():
    # Centres 30 apart along both axes, sizes 10: (30 - 2) / 42.4 = 0.66 > 0.5 along both.
    assert relative_position((0, 0, 10, 10), (30, 30, 40, 40)) == {"left of", "above"}
    assert relative_position((30, 30, 40, 40), (0, 0, 10, 10)) == {"right of", "below"}


def test_count_clipping_can_be_set_apart_from_the_form():
    # 3 found, 1 wanted: 1 - 2 / 1 = -1.
    three = dogs(0.9, 0.9, 0.9)
    assert judge(three, DOG, clip_count=False).reward == -1
    assert judge(three, DOG, compat="release", clip_count=True).reward == 0


def test_an_object_counts_strictly_above_the_threshold():
    assert judge(dogs(0.3), DOG).reward == 0
    assert judge(dogs(0.31), DOG).reward == 1
    assert judge(dogs(0.31), DOG, threshold=0.4).reward == 0


def test_counting_prompts_have_a_threshold_of_their_own():
    two = counting_record("dog", 2)
    assert judge(dogs(0.95, 0.91), two).reward == 1
    assert judge(dogs(0.95, 0.90), two).reward == 0.5
    assert judge(dogs(0.95, 0.50), two, counting_threshold=0.4).reward == 1


def test_no_more_than_max_objects_of_a_class_are_looked_at():
    # 20 found, 16 looked at: 1 - 15 / 1 = -14.
    many = dogs(*[0.95] * 20)
    assert judge(many, DOG, compat="release").reward == -14
    assert judge(many, DOG, compat="release", max_objects=2).reward == 0


def test_the_most_confident_object_is_the_one_whose_colour_decides():
    # Official: the first of the two cars; the soft score asks for exactly one.
    red_car = {"tag": "colors", "include": [{"class": "car", "count": 1, "color": "red"}]}
    cars = [Detection("car", 0.5, BOX, "blue"), Detection("car", 0.9, BOX, "red")]
    assert judge(cars, red_car).correct
    assert judge(cars[::-1], red_car).correct
    swapped = [Detection("car", 0.9, BOX, "blue"), Detection("car", 0.5, BOX, "red")]
    assert not judge(swapped, red_car).correct


def test_a_missed_relation_gives_the_share_of_right_pairs():
    # Two dogs wanted below a cat, one is: terms 1 (cat), 1 (dogs), 1/2 (pairs): 2.5 / 3.
    # Released: the pair terms are 0 and the further 1: (1 + 1 + 0 + 1) / 4.
    two_below = {
        "tag": "position",
        "include": [
            {"class": "cat", "count": 1},
            {"class": "dog", "count": 2, "position": ["below", 0]},
        ],
    }
    found = [
        Detection("cat", 0.9, (0, 0, 10, 10)),
        Detection("dog", 0.9, (0, 50, 10, 60)),
        Detection("dog", 0.9, (50, 0, 60, 10)),
    ]
    assert judge(found, two_below).reward == pytest.approx(2.5 / 3)
    assert judge(found, two_below, compat="release").reward == pytest.approx(3 / 4)


def test_keys_with_none_are_absent_in_both_forms():
    record = {
        "tag": "single_object",
        "include": [{"class": "dog", "count": 1, "color": None, "position": None}],
        "exclude": None,
    }
    assert judge(dogs(0.9), record).reward == 1
    assert judge(dogs(0.9), record, compat="release").reward == 1
    assert judge([], record, compat="release").clauses[0].value == 0
    assert len(judge([], record, compat="release").clauses) == 1


def test_the_reason_of_a_count_can_be_audited():
    three = counting_record("dog", 3)
    assert judge(dogs(0.95, 0.95), three).why == (
        "wanted 3 dogs, found 2 (count 0.67); not correct: dog: 2 of 3"
    )
    assert judge(dogs(*[0.95] * 5), three).why == (
        "wanted 3 dogs, found 5 (count 0.33); not correct: 5 dogs, fewer than 4 wanted"
    )


def test_the_reason_of_a_relation_names_what_was_found():
    below = position_record("car", "below", "dog")
    found = [Detection("dog", 0.9, (20, 0, 30, 10)), Detection("car", 0.9, (0, 0, 10, 10))]
    assert judge(found, below).why == (
        "wanted 1 dog, found 1 (count 1.00); wanted 1 car, found 1 (count 1.00); "
        "wanted car below dog, found left of (position 0.00); not correct: car: not below dog"
    )


def test_the_reason_of_a_colour_names_what_was_found():
    record = {"tag": "colors", "include": [{"class": "car", "count": 1, "color": "red"}]}
    why = judge([Detection("car", 0.9, BOX, "blue")], record).why
    assert "wanted red car, found blue (color 0.00)" in why
    assert "found no colour" in judge([Detection("car", 0.9, BOX)], record).why


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "tag: unknown None"),
        ({**DOG, "tag": "single"}, "did you mean 'single_object'?"),
        ({"tag": "counting"}, "include: no clause"),
        ({**DOG, "include": [{"class": "dog", "count": 0}]}, "count: 0; write 1 or more"),
        ({**DOG, "include": [{"class": "dog", "count": -3}]}, "count: -3; write 1 or more"),
        (
            {**DOG, "include": [{"class": "dog", "count": 1, "position": ["below", 0]}]},
            "index 0 is not an earlier include clause; no clause comes before this one",
        ),
    ],
)
def test_metadata_that_is_not_genevals_is_an_input_error(metadata, message):
    with pytest.raises(InputError) as caught:
        judge([], metadata)
    assert str(caught.value).startswith("GenEval metadata: ")
    assert message in str(caught.value)


def finds_brightness(images_NHWC, prompts):
    return [dogs(0.8) if image.float().mean() > 100 else [] for image in images_NHWC]


class BrightnessDetectorConfig(DetectorConfig):
    def build(self, device):
        return finds_brightness


IMAGES = torch.stack([torch.zeros(4, 4, 3), torch.full((4, 4, 3), 200)]).to(torch.uint8)
PROMPTS = [Prompt(DOG["prompt"], 0, DOG)] * 2


def test_the_reward_scores_each_image_with_its_verdicts():
    dark, bright = GenEvalReward(finds_brightness)(IMAGES, PROMPTS)
    assert (dark.value, bright.value) == (0, 1)
    assert dark.extras == {"correct": 0.0, "strict": 0.0}
    assert bright.extras == {"correct": 1.0, "strict": 1.0}
    assert "found 0" in dark.why


def test_the_score_may_be_a_verdict():
    # One dog too many; the official rules take the most confident one.
    two_dogs = torch.full((1, 4, 4, 3), 200, dtype=torch.uint8)
    values = {
        kind: GenEvalReward(lambda *_: [dogs(0.8, 0.7)], score=kind)(two_dogs, PROMPTS[:1])[0]
        for kind in ("soft", "correct", "strict")
    }
    assert {kind: score.value for kind, score in values.items()} == {
        "soft": 0,  # 1 - |1 - 2| / 1
        "correct": 1,
        "strict": 0,
    }
    assert values["correct"].extras == {"soft": 0.0, "correct": 1.0, "strict": 0.0}


def test_the_recipe_sets_detector_and_thresholds():
    fields = {"detector": BrightnessDetectorConfig(), "threshold": 0.85}
    config = GenEvalRewardConfig.model_validate(fields)
    assert [score.value for score in config.build(torch.device("cpu"))(IMAGES, PROMPTS)] == [0, 0]
    assert config.required_fields == ("tag", "include")
    assert config.name == config.kind == "geneval"
