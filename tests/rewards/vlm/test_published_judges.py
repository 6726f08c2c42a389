"""VQAScore, UnifiedReward, Q-SiT and HPSv3 on tiny random weights, against slow ways."""

import hashlib
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import noise
from tiny_vlms import save_vlm, token, tokenizer
from transformers import Qwen2VLForConditionalGeneration

from stage_rl.errors import WeightsError
from stage_rl.rewards.base import Score
from stage_rl.rewards.vlm.chat import ChatModel, Reply, published_template, question
from stage_rl.rewards.vlm.hps_v3 import HpsV3Config
from stage_rl.rewards.vlm.q_sit import WORDS, QSitConfig
from stage_rl.rewards.vlm.unified_reward import UnifiedReward, UnifiedRewardConfig, score_reply
from stage_rl.rewards.vlm.vqa_score import VqaScoreConfig, log_odds
from stage_rl.types import Prompt

CPU = torch.device("cpu")
PROMPTS = [Prompt("a red cat"), Prompt("a {cup}")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a tiny model of a kind."""
    root = tmp_path_factory.mktemp("judges")

    def folder(kind):
        if not (root / kind).exists():
            save_vlm(kind, root / kind)
        return root / kind

    return folder


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()


def test_templates_are_the_published_words():
    # The sums of the sources' own strings, their fields in braces.
    hpsv3 = published_template("hps_v3", prompt="{text_prompt}")
    assert digest(hpsv3[:2523]).startswith("0393599dad45a971")
    assert digest(hpsv3[2523:]).startswith("2471faca094ae5bd")
    assert digest(published_template("unified_reward_2")).startswith("75d52d3ae771f89b")
    assert published_template("unified_reward_2", prompt="a {cup}").endswith("Caption: [a {cup}]")


def test_vqa_score_is_the_probability_of_yes_among_all_tokens(folder):
    path = str(folder("qwen2_5_vl"))
    images = noise(2, 64, 96)
    scores = VqaScoreConfig(path=path, dtype="float32", batch_size=1).build(CPU)(images, PROMPTS)
    model = ChatModel.load(path, dtype="float32", device="cpu")
    asked = [
        question(f'Does this figure show "{prompt.text}"? Please answer Yes or No.')
        for prompt in PROMPTS
    ]
    for score, image, text in zip(scores, images, asked, strict=True):
        shares = model.next_logits_NV(image[None], [text])[0].double().softmax(-1)
        p = shares[token("Yes")].item()
        assert score.value == pytest.approx(p, rel=1e-4)
        assert score.extras["log_odds"] == pytest.approx(math.log(p / (1 - p)), rel=1e-4)
    odds = VqaScoreConfig(path=path, dtype="float32", score="log_odds").build(CPU)
    assert odds(images, PROMPTS)[0].value == pytest.approx(scores[0].extras["log_odds"], rel=1e-4)


def test_log_odds_tell_images_apart_where_the_probability_is_1():
    odds = log_odds(torch.tensor([[40.0, 0.0, 0.0], [50.0, 0.0, 0.0]]), 0)
    # p = e^40 / (e^40 + 2): ln p / (1 - p) = 40 - ln 2.
    assert odds.tolist() == pytest.approx([40 - math.log(2), 50 - math.log(2)])


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        # The authors' own example: (2.6947 + 2.3715 + 2.8025) / 15.
        (
            "Alignment Score (1-5): 2.694700002670288\nCoherence Score (1-5): 2.371500015258789\n"
            "Style Score (1-5): 2.802500009536743",
            0.52458,
        ),
        ("alignment score: 5\n**Coherence Score (1-5):** 4\nStyle Score (1-5): 3", 0.8),
        ("Alignment Score (1-5): 4\nCoherence Score (1-5): 4", None),
        ("Alignment Score (1-5): X\nCoherence Score (1-5): 4\nStyle Score (1-5): 4", None),
        ("Alignment Score (1-5): 9\nCoherence Score (1-5): 4\nStyle Score (1-5): 4", None),
    ],
)
def test_marks_are_read_and_one_that_is_missing_is_no_score(reply, value):
    score = score_reply(reply)
    assert score.value == (None if value is None else pytest.approx(value, abs=1e-5))
    assert score.replies == (reply,)


def test_unified_reward_asks_with_the_published_words_and_keeps_what_is_said(folder):
    class Model:
        def replies(self, images_NHWC, conversations, *, max_new_tokens):
            picture, text = conversations[0][0]["content"]
            assert (len(images_NHWC), picture["type"]) == (1, "image")
            assert text["text"].endswith("Text Caption: [a red cat]")
            marks = zip(("Alignment", "Coherence", "Style"), (5, 4, 3), strict=True)
            return [Reply("\n".join(f"{name} Score (1-5): {mark}" for name, mark in marks))]

    (score,) = UnifiedReward(Model(), 8)(noise(1), PROMPTS[:1])
    assert score.extras == {"alignment": 5.0, "coherence": 4.0, "style": 3.0}
    tiny = UnifiedRewardConfig(path=str(folder("qwen3_vl")), dtype="float32").build(CPU)
    babble = tiny(noise(2, 64, 64), PROMPTS)
    assert [one.value for one in babble] == [None, None]
    assert all(one.replies for one in babble)


def test_q_sit_weighs_five_words_after_the_start_of_the_reply(folder):
    path = str(folder("llava_onevision"))
    images = noise(2, 64, 96)
    scores = QSitConfig(path=path, dtype="float32").build(CPU)(images, PROMPTS)
    model = ChatModel.load(path, dtype="float32", device="cpu")
    asked = question(published_template("q_sit"), image_first=False)
    assert asked[0]["content"][0]["text"].startswith("Assume you are an image quality evaluator.")
    start = [token(letter) for letter in "The quality of this image is "]
    for score, image in zip(scores, images, strict=True):
        inputs = model.inputs(image[None], [asked])
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([start])], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        shares = model.module(**inputs).logits[0, -1].softmax(-1)
        five = torch.stack([shares[token(word)] for word in WORDS])
        weights = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])
        assert score.value == pytest.approx(((five / five.sum()) @ weights).item(), abs=1e-5)
        assert score.extras["answered"] == pytest.approx(five.sum().item(), abs=1e-5)


@pytest.fixture
def hpsv3(folder, tmp_path):
    """Settings of a tiny HPSv3: a Qwen2-VL with one token more, in the names of transformers 4."""
    base = folder("qwen2_vl")
    module = Qwen2VLForConditionalGeneration.from_pretrained(base)
    module.resize_token_embeddings(len(tokenizer()) + 1)
    module.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert {name.split(".")[0] for name in tensors} == {"model", "visual", "lm_head"}
    generator = torch.Generator().manual_seed(1)
    for place, (out, width) in {0: (1024, 32), 3: (16, 1024), 5: (2, 16)}.items():
        tensors[f"rm_head.{place}.weight"] = torch.randn(out, width, generator=generator) / 4
        tensors[f"rm_head.{place}.bias"] = torch.randn(out, generator=generator) / 4
    save_file(tensors, tmp_path / "HPSv3.safetensors")
    return HpsV3Config(path=str(tmp_path), base=str(base), dtype="float32", batch_size=2)


def slow_hpsv3(reward, image_HWC, text):
    """As the published code goes: embeddings, pictures into their places, positions 0 to L - 1."""
    module = reward.model.module
    inputs = reward.model.inputs(image_HWC[None], [question(text)])
    ids = inputs["input_ids"]
    embeddings = module.get_input_embeddings()(ids)
    pictures = module.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    places = (ids == token("<|image_pad|>"))[..., None].expand_as(embeddings)
    embeddings = embeddings.masked_scatter(places, pictures.pooler_output)
    hidden = module.model.language_model(inputs_embeds=embeddings).last_hidden_state
    at = ids[0].tolist().index(module.get_input_embeddings().num_embeddings - 1)
    return reward.head(hidden[0, at])[0].item()


def test_hpsv3_reads_its_token_at_plain_positions(hpsv3):
    reward = hpsv3.build(CPU)
    images = noise(2, 48, 48)
    scores = reward(images, PROMPTS)
    for score, image, prompt in zip(scores, images, PROMPTS, strict=True):
        text = published_template("hps_v3", prompt=prompt.text)
        assert score.value == pytest.approx(slow_hpsv3(reward, image, text), abs=1e-4)
    # 16 x 16 places of 28 pixels, whatever the size of a square image.
    inputs = reward.model.inputs(images[:1], [question("a")])
    assert inputs["image_grid_thw"].tolist() == [[1, 32, 32]]
    # Qwen2-VL's own positions say something else.
    own = reward.model.inputs(images[:1], [question(published_template("hps_v3", prompt="x"))])
    hidden = reward.model.module.model(**own).last_hidden_state
    at = own["input_ids"][0].tolist().index(reward.model.module.config.text_config.vocab_size - 1)
    plain = reward(images[:1], [Prompt("x")])[0].value
    assert abs(reward.head(hidden[0, at])[0].item() - plain) > 1e-3


def test_a_prompt_that_holds_the_reward_token_is_scored_at_the_last_one(hpsv3):
    (score,) = hpsv3.build(CPU)(noise(1, 48, 48), [Prompt("a <|Reward|> cat")])
    assert isinstance(score, Score)
    assert math.isfinite(score.value)


def test_hpsv3_without_a_tensor_is_refused(hpsv3, tmp_path):
    tensors = load_file(tmp_path / "HPSv3.safetensors")
    for missing in ("rm_head.3.bias", "visual.merger.ln_q.weight"):
        rest = {name: tensor for name, tensor in tensors.items() if name != missing}
        save_file(rest, tmp_path / "HPSv3.safetensors")
        with pytest.raises(WeightsError, match=missing.removeprefix("rm_head.")):
            hpsv3.build(CPU)
