"""The yes-or-no reward on a tiny random LLaVA."""

import pytest
import torch
from PIL import Image

from stage_rl.errors import WeightsError
from stage_rl.rewards.tiny import tiny_vlm
from stage_rl.rewards.vqa import YesNoRewardConfig, load_yes_no
from stage_rl.types import Prompt

CPU = torch.device("cpu")
PROMPTS = [Prompt("a red cat"), Prompt("a dog"), Prompt("x")]


def images(count):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 48, 48, 3), generator=generator, dtype=torch.uint8)


def load(path, **settings):
    return load_yes_no(path, question="Is it {prompt}?", dtype="float32", **settings)


def test_a_padded_batch_gives_what_each_image_gives_alone():
    pictures = images(3)
    together = load("tiny", batch_size=2)(pictures, PROMPTS)
    reward = load("tiny")
    for i, prompt in enumerate(PROMPTS):
        (alone,) = reward(pictures[i : i + 1], [prompt])
        assert together[i].value == pytest.approx(alone.value, abs=1e-5)
        assert together[i].extras["answered"] == pytest.approx(alone.extras["answered"], abs=1e-5)
    assert len({score.value for score in together}) == 3
    assert together[1].why.startswith("Is it a dog? 0.")


def test_the_score_is_read_off_the_next_token_of_the_chat():
    module, processor = tiny_vlm()
    text = "USER: <image> Is it a dog? ANSWER: "
    picture = Image.fromarray(images(1)[0].numpy())
    with torch.inference_mode():
        inputs = processor(images=[picture], text=[text], return_tensors="pt")
        shares = module(**inputs).logits[0, -1].softmax(-1)
    token = processor.tokenizer.convert_tokens_to_ids
    yes, no = (
        sum(shares[token(w)].item() for w in pair) for pair in (("yes", "Yes"), ("no", "No"))
    )
    (score,) = load("tiny")(images(1), [Prompt("a dog")])
    assert score.value == pytest.approx(yes / (yes + no), abs=1e-5)
    assert score.extras["answered"] == pytest.approx(yes + no, abs=1e-5)


def test_braces_in_a_prompt_are_only_text():
    (score,) = load("tiny")(images(1), [Prompt("a {cat}")])
    assert score.why.startswith("Is it a {cat}?")


def test_saved_weights_give_the_same_scores(tmp_path):
    module, processor = tiny_vlm()
    module.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert load(str(tmp_path))(images(2), PROMPTS[:2]) == load("tiny")(images(2), PROMPTS[:2])


def test_a_model_without_a_chat_template_is_refused(tmp_path):
    module, processor = tiny_vlm()
    module.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(WeightsError, match="no chat template"):
        load(str(tmp_path))


def test_the_reward_is_built_from_its_config_in_half_precision():
    reward = YesNoRewardConfig(path="tiny").build(CPU)
    assert all(0 < score.value < 1 for score in reward(images(3), PROMPTS))


def test_a_question_without_the_prompt_is_refused():
    with pytest.raises(ValueError, match="does not name the prompt"):
        YesNoRewardConfig(path="tiny", question="Is it good?")


def test_reference_images_come_with_what_the_reward_needs_and_random_weights_have_none():
    config = YesNoRewardConfig(path="a/model")
    cases = config.reference_cases()
    assert [case.prompt.text for case in cases] == ["a photo of a cat", "a photo of a cup"]
    assert [config.unsupported_reason(case.prompt) for case in cases] == [None, None]
    assert all(len(case.images_NHWC()) == 2 for case in cases)
    assert YesNoRewardConfig(path="tiny").reference_cases() == ()
