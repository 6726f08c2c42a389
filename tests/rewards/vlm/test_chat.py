"""Vision-language models of tiny random weights: what they are given, and what they say."""

import json

import pytest
import torch
from tiny_models import noise
from tiny_vlms import QWENS, image_processor, save_vlm, token

from stage_rl.errors import WeightsError
from stage_rl.rewards.vlm.chat import ChatModel, Reply, load_processor, question

KINDS = (*QWENS, "llava_onevision")


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """The model of a kind, loaded from its folder once."""
    root, loaded = tmp_path_factory.mktemp("vlms"), {}

    def load(kind):
        if kind not in loaded:
            save_vlm(kind, root / kind)
            loaded[kind] = ChatModel.load(str(root / kind), dtype="float32", device="cpu")
        return loaded[kind]

    return load


def spelled(*parts):
    """The ids of whole words (in lists) and of the letters of texts."""
    return [token(word) for part in parts for word in part]


@pytest.mark.parametrize("kind", QWENS)
def test_a_qwen_gets_one_place_per_four_patches_padded_on_the_left(chat, kind):
    # At 64 x 96 pixels: patches of 16 give a grid of 4 x 6, six places; patches of 14 are merged to
    # squares of 28, the sides rounded to 56 x 84: a grid of 4 x 6 as well.
    inputs = chat(kind).inputs(noise(2, 64, 96), [question("a"), question("cat")])
    picture = [["<|vision_start|>"], ["<|image_pad|>"] * 6, ["<|vision_end|>"]]
    ends = ["<|im_end|>", "<|im_start|>"]
    turn = [["<|im_start|>"], "user:", *picture]
    # The template marks by ! that it was told not to think.
    long = spelled(*turn, "cat", ends, "assistant:!")
    short = spelled(["<|endoftext|>"] * 2, *turn, "a", ends, "assistant:!")
    assert inputs["input_ids"].tolist() == [short, long]
    assert inputs["attention_mask"].tolist() == [[0, 0] + [1] * 28, [1] * 30]
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 6]] * 2
    is_picture = inputs["input_ids"] == token("<|image_pad|>")
    assert torch.equal(inputs["mm_token_type_ids"], is_picture.long())


@pytest.mark.parametrize("kind", QWENS)
def test_pixels_are_those_of_each_image_in_turn(chat, kind):
    both = noise(2, 64, 96)
    inputs = chat(kind).inputs(both, [question("a")] * 2)
    one_by_one = [
        image_processor(kind)(image.numpy(), return_tensors="pt")["pixel_values"] for image in both
    ]
    assert torch.equal(inputs["pixel_values"], torch.cat(one_by_one))


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_says_what_its_rows_say_alone(chat, kind):
    model, images = chat(kind), noise(2, 64, 96)
    asked = [question("a"), question("a red cat", system="Be brief.", image_first=False)]
    together = model.next_logits_NV(images, asked)
    alone = [model.next_logits_NV(images[n : n + 1], asked[n : n + 1])[0] for n in range(2)]
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-5, rtol=0)
    # The picture is read: another one changes what is said.
    assert (model.next_logits_NV(images.flip(0), asked) - together).abs().max() > 1e-3


def test_the_order_of_picture_text_and_system_turn_is_as_asked(chat):
    def words(**options):
        inputs = chat("qwen3_vl").inputs(noise(1, 64, 64), [question("x", **options)])
        text = chat("qwen3_vl").tokenizer.decode(inputs["input_ids"][0])
        return "".join(text.split()).replace("<|image_pad|>" * 4, "P")

    picture = "<|vision_start|>P<|vision_end|>"
    answer = "<|im_end|><|im_start|>assistant:!"
    assert words() == f"<|im_start|>user:{picture}x{answer}"
    assert words(image_first=False) == f"<|im_start|>user:x{picture}{answer}"
    assert words(system="s") == f"<|im_start|>system:s<|im_end|><|im_start|>user:{picture}x{answer}"


def test_a_reply_is_the_most_probable_token_each_time_whatever_the_checkpoint_samples(tmp_path):
    save_vlm("qwen2_5_vl", tmp_path)
    sampling = {"do_sample": True, "temperature": 5.0, "repetition_penalty": 9.0}
    (tmp_path / "generation_config.json").write_text(json.dumps(sampling))
    model = ChatModel.load(str(tmp_path), dtype="float32", device="cpu")
    image, asked = noise(1, 64, 96), question("a")
    inputs, expected = model.inputs(image, [asked]), []
    for _ in range(6):
        best = model.module(**inputs).logits[:, -1].argmax(-1, keepdim=True)
        expected.append(best.item())
        for name, new in (("input_ids", best), ("attention_mask", 1), ("mm_token_type_ids", 0)):
            row = inputs[name]
            inputs[name] = torch.cat([row, torch.zeros_like(best) + new], dim=1)
    (reply,) = model.replies(image, [asked], max_new_tokens=6)
    assert reply.text == model.tokenizer.decode(expected, skip_special_tokens=True).strip()
    assert len(set(expected)) < len(expected)  # or the penalty would have changed nothing


def test_the_tokens_of_a_reply_come_first_in_the_next_logits(chat):
    model, images = chat("qwen3_vl"), noise(2, 64, 96)
    asked = [question("a"), question("abc")]
    best = model.next_logits_NV(images, asked).argmax(-1)
    replies = model.replies(images, asked, max_new_tokens=1)
    texts = [model.tokenizer.decode([token_id]).strip() for token_id in best]
    assert replies == [Reply(text, is_cut=True) for text in texts]


def test_a_reply_that_ends_by_itself_is_not_cut_off(chat):
    model, image = chat("qwen3_vl"), noise(1, 64, 96)
    # The first word of this model is made the one that ends a reply.
    first = int(model.next_logits_NV(image, [question("a")]).argmax())
    model.module.generation_config.eos_token_id = [first]
    for longest in (1, 3):
        (reply,) = model.replies(image, [question("a")], max_new_tokens=longest)
        assert not reply.is_cut


@pytest.mark.parametrize("kind", KINDS)
def test_a_started_reply_is_gone_on_with_as_one_that_was_generated(chat, kind):
    model, images = chat(kind), noise(2, 64, 96)
    asked = [question("a"), question("abc")]
    tokens = model.module.generate(
        **model.inputs(images, asked),
        max_new_tokens=2,
        output_logits=True,
        do_sample=False,
        return_dict_in_generate=True,
    )
    for row, first in enumerate(tokens.sequences[:, -2].tolist()):
        start = model.tokenizer.decode([first])
        together = model.next_logits_NV(images, asked, reply_start=start)
        torch.testing.assert_close(together[row], tokens.logits[1][row], atol=1e-5, rtol=0)


def test_janus_reads_its_own_template(tiny_janus_folder):
    model = ChatModel.load(str(tiny_janus_folder), dtype="float32", device="cpu")
    logits = model.next_logits_NV(noise(2, 16, 16), [question("a red cat"), question("a cat")])
    assert logits.shape == (2, model.module.config.text_config.vocab_size)
    assert len(model.replies(noise(1, 16, 16), [question("a cat")], max_new_tokens=2)) == 1


def test_a_folder_without_image_processor_is_refused(tmp_path):
    save_vlm("qwen3_vl", tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(WeightsError, match="cannot load the processor"):
        load_processor(str(tmp_path))
