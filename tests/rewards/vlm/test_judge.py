"""The judge: what each mode makes of an answer, and that an unreadable one is never 0."""

import math
import os
import re

import pytest
import torch
from tiny_vlms import save_vlm
from transformers import AutoTokenizer

from stage_rl.prompts.questions import Question
from stage_rl.rewards.base import RewardConfig
from stage_rl.rewards.judge import RewardFunctions, WeightedReward
from stage_rl.rewards.vlm.chat import Reply
from stage_rl.rewards.vlm.judge import JudgeReward, JudgeRewardConfig, read_score
from stage_rl.types import Prompt, Rollout

IMAGES = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)

TWO = [{"id": 1, "text": "Is there a cat?"}, {"id": 2, "text": "Is it red?", "expected": "no"}]


class Tokenizer:
    """A token for each of a few words; what is longer begins with the token of its first letter."""

    words = ("Yes", "yes", " ", "No", "no", "t")
    unk_token_id = None

    def __call__(self, text, add_special_tokens=False):
        first = text if text in self.words else text[0]
        return {"input_ids": [self.words.index(first if first in self.words else "t")]}


class Chat:
    """Says what it was told to say, cut off at three dots, and remembers what it was asked."""

    tokenizer = Tokenizer()

    def __init__(self, *says):
        self.says = list(says)
        self.asked = []

    def next_logits_NV(self, images_NHWC, conversations):
        self.asked += conversations
        # P(Yes) .5, P(yes) .25, P(" ") .125, P(No) .125 and nothing else.
        logits_V = torch.tensor([0.5, 0.25, 0.125, 0.125, 0, 0]).log()
        return logits_V.expand(len(conversations), -1)

    def replies(self, images_NHWC, conversations, *, max_new_tokens):
        self.asked += [(one, max_new_tokens) for one in conversations]
        said = [self.says.pop(0) for _ in conversations]
        return [Reply(text.removesuffix("..."), text.endswith("...")) for text in said]


def prompt(index=0, questions=TWO, **metadata):
    return Prompt("a red cat", index, {"questions": questions, **metadata})


def judge(mode, *says, **settings):
    known = {"kind": "judge", "path": "x", "mode": mode, "template": "{questions}"} | settings
    config = RewardConfig.model_validate(known)
    assert isinstance(config, JudgeRewardConfig)
    chat = Chat(*says)
    return chat, JudgeReward(chat, config)


def score(mode, *says, prompts=None, **settings):
    _, reward = judge(mode, *says, **settings)
    (one,) = reward(IMAGES[:1], prompts or [prompt()])
    return one


def test_the_probability_is_that_of_the_first_tokens_each_counted_once():
    # Yes .5 and yes .25; " yes" and " Yes" both begin with " ", .125, which counts once.
    one = score("token_probability", template="{question}", prompts=[prompt(questions=TWO[:1])])
    assert one.extras == {"missing": 0, "q0": pytest.approx(0.875)}
    assert "of tokens [0, 1, 2]" in one.why
    # A question's own spellings take the place of the judge's.
    own = [{"id": 1, "text": "How many?", "answers": ["two", "t"]}]
    one = score("token_probability", template="{question}", prompts=[prompt(questions=own)])
    assert one.value == 0


@pytest.mark.skipif("STAGE_QWEN" not in os.environ, reason="names no folder of a Qwen3-VL")
def test_the_tokens_of_geneval_2_are_those_of_qwens_vocabulary():
    config = RewardConfig.model_validate(
        {"kind": "judge", "path": "x", "mode": "token_probability"}
    )
    assert isinstance(config, JudgeRewardConfig)
    chat = Chat()
    chat.tokenizer = AutoTokenizer.from_pretrained(os.environ["STAGE_QWEN"])
    reward = JudgeReward(chat, config)
    forms = ("two", "Two", "2", " two", " Two", " 2")
    two = Question(id=1, text="How many?", expected="two", answers=forms)
    # " 2" begins with the token of a space, which is kept.
    assert set(reward.first_tokens(two)) == {19789, 11613, 1378, 9043, 17, 220}
    assert set(reward.first_tokens(Question(id=1, text="?"))) == {9454, 9693, 9834, 7414}


def test_a_share_of_yes_is_turned_where_no_is_right():
    one = score("yes_share", template="{question}")
    share = 0.875 / (0.875 + 0.25)  # this tokenizer's " " is a spelling of both words
    assert one.extras["q0"] == pytest.approx(share)
    assert one.extras["q1"] == pytest.approx(1 - share)
    assert one.value == pytest.approx(0.5)


def test_a_reply_is_right_letter_by_letter():
    one = score("reply_equals", "Yes", "yes, it is", template="{question}", answers=["Yes"])
    assert (one.extras["q0"], one.extras["q1"]) == (1, 0)
    assert one.replies == ("Yes", "yes, it is")


def test_lines_are_held_against_the_expected_word():
    one = score("one_reply_lines", "Here you are:\nyes there is.\n\n  No, it is blue")
    assert (one.value, one.extras) == (1, {"missing": 0, "q0": 1, "q1": 1})
    # As the published script, which takes no line that begins with anything else.
    assert score("one_reply_lines", "1. yes\n2. No").value is None


def test_a_list_is_read_between_its_tags():
    one = score("binary_lists", "<analysis>['a', 'b']</analysis>\n<score>[1, 0]</score>")
    assert (one.value, one.extras["q1"]) == (0.5, 0)
    # As the published script, which wants as many texts as scores.
    for analysis in ("", "<analysis>['a']</analysis>", "<analysis>a, b</analysis>"):
        assert score("binary_lists", f"{analysis}<score>[1, 0]</score>").value is None


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("Score: 1", 1),
        ("**Score**: 0", 0),
        ("<think>Score: 0</think> score 1", 1),
        ("\n1\n", 1),
        ("Score: 2", None),
        ("Score: 0.5", None),
        ("0\n1", None),
        ("no idea", None),
    ],
)
def test_a_score_line_holds_one_of_the_numbers(reply, value):
    assert score("score_line", reply, tries=1, template="{prompt}").value == value
    assert read_score("Score: 4", (1, 5, 4)) == [0.8]


def test_what_is_read_is_kept_and_counted_by_word():
    about = [prompt(questions=[], fields={"text": "Open, now!"})]
    one = score("read_text", "OPEN 24 h", template="read", prompts=about)
    assert (one.value, one.replies, one.extras) == (0.5, ("OPEN 24 h",), {"missing": 0})


@pytest.mark.parametrize("reply", ["yes...", "...", "yes\nno\nyes..."])
def test_an_answer_that_was_cut_off_is_asked_for_again_and_then_missing(reply):
    chat, reward = judge("one_reply_lines", reply, reply, "yes\nno", max_new_tokens=10)
    assert reward(IMAGES[:1], [prompt()])[0].value == 1
    assert [longest for _, longest in chat.asked] == [10, 20, 40]
    _, reward = judge("one_reply_lines", reply, reply, tries=2)
    (one,) = reward(IMAGES[:1], [prompt()])
    assert (one.value, one.extras, one.why) == (
        None,
        {"missing": 2},
        "2 of 2 answers cannot be read",
    )
    assert one.replies == (reply.removesuffix("..."),)


def test_a_reply_that_ended_is_not_asked_for_again():
    # A judge without chance would say the same.
    chat, reward = judge("one_reply_lines", "I cannot tell.", tries=3)
    assert reward(IMAGES[:1], [prompt()])[0].value is None
    assert len(chat.asked) == 1


def test_only_what_is_missing_is_asked_for_again():
    says = ["yes\nyes", "?...", "yes\nno"]
    chat, reward = judge("one_reply_lines", *says)
    first, second = reward(IMAGES, [prompt(), prompt(1)])
    assert (first.value, second.value, len(chat.asked)) == (0.5, 1, 3)


def test_images_are_taken_a_batch_at_a_time():
    class Images:
        taken: tuple = ()

        def __getitem__(self, rows):
            self.taken += (tuple(rows),)
            return IMAGES[rows]

    images = Images()
    _, reward = judge("token_probability", template="{question}", batch_size=3)
    reward(images, [prompt(), prompt(1)])  # two questions each
    assert images.taken == ((0, 0, 1), (1,))


def test_a_missing_answer_is_no_zero_of_a_training_either():
    _, reward = judge("score_line", "Score: 1", "?", tries=1, template="{prompt}")
    rollout = Rollout((prompt(),), 2, torch.zeros(2, 1), IMAGES)
    rewards = RewardFunctions([WeightedReward("judge", 1.0, reward)]).score(rollout)
    assert math.isnan(rewards.columns["judge"][0, 1])
    assert rewards.rewards_PG.tolist() == [[0, 0]]  # the term drops out for the whole group


def test_a_template_is_filled_from_prompt_question_and_fields():
    template = "{prompt} | {question} | {explanation}"
    asked = prompt(questions=TWO[:1], fields={"explanation": "a {prompt}"})
    chat, reward = judge("reply_equals", "Yes", template=template, system="Be strict.")
    reward(IMAGES[:1], [asked])
    ((system, user), _) = chat.asked[0]
    assert system["content"] == [{"type": "text", "text": "Be strict."}]
    assert [part["type"] for part in user["content"]] == ["image", "text"]
    # What a field holds is no template.
    assert user["content"][1]["text"] == "a red cat | Is there a cat? | a {prompt}"


@pytest.mark.parametrize(
    ("settings", "metadata", "reason"),
    [
        ({"template": None}, {}, "has no template, nor has the prompt"),
        ({"template": "{explanation}"}, {}, "asks for {explanation}, which this prompt lacks"),
        ({"mode": "binary_lists"}, {"questions": []}, "needs questions"),
        ({"mode": "read_text"}, {}, "needs fields.text"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_the_first_image(settings, metadata, reason):
    known = {"kind": "judge", "path": "x", "mode": "score_line", "template": "{prompt}"}
    config = RewardConfig.model_validate(known | settings)
    assert re.match(re.escape(reason), str(config.unsupported_reason(prompt(**metadata))))
    with_template = prompt(template="{prompt}", fields={"text": "x", "explanation": "y"})
    assert config.unsupported_reason(with_template) is None


MODES = (
    *("token_probability", "yes_share", "reply_equals", "one_reply_lines", "binary_lists"),
    *("score_line", "read_text"),
)


def test_every_mode_goes_through_a_model(tmp_path):
    save_vlm("qwen3_vl", tmp_path)
    about = [prompt(i, fields={"text": "open"}) for i in range(2)]
    for mode in MODES:
        settings = {"path": str(tmp_path), "mode": mode, "template": "{question}"}
        given = {"dtype": "float32", "max_new_tokens": 2, "tries": 2, "answers": ["Yes", "yes"]}
        config = RewardConfig.model_validate({"kind": "judge", **settings, **given})
        images = torch.randint(256, (2, 64, 64, 3), dtype=torch.uint8)
        for one in config.build(torch.device("cpu"))(images, about):
            # A random model writes nothing that can be read, but every word of it is kept.
            answered = sum(name.startswith("q") for name in one.extras)
            asked = {"read_text": 0, "score_line": 1}.get(mode, 2)
            assert answered + one.extras["missing"] == asked
            assert (one.value is None) == (one.extras["missing"] > 0)
            assert bool(one.replies) == (mode not in ("token_probability", "yes_share"))


def test_a_question_of_the_file_is_checked():
    with pytest.raises(ValueError, match="unknown key"):
        Question.model_validate({"id": 1, "txt": "x"})
