import json
import shutil

import policy_contract
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoProcessor, JanusForConditionalGeneration

from stage_rl.errors import InputError, RecipeError, WeightsError
from stage_rl.policies.janus import JanusConfig, JanusPolicy
from stage_rl.types import Prompt

SHORT = Prompt("a red square", 0)
LONG = Prompt("a photo of two blue circle and three green star", 1)
CPU = torch.device("cpu")


def load(path, **settings):
    return JanusConfig(path=str(path), **settings).build(CPU)


@pytest.fixture
def folder(tiny_janus_folder, tmp_path):
    """A copy to damage."""
    return shutil.copytree(tiny_janus_folder, tmp_path / "janus")


def rewrite(file, **changes):
    content = json.loads(file.read_text())
    for key, value in changes.items():
        content[key] = {**content[key], **value} if isinstance(value, dict) else value
    file.write_text(json.dumps(content))


def transformers_ids(policy, text):
    """Input ids by the recipe of transformers' documentation."""
    processor = policy.processor
    messages = [{"role": "user", "content": [{"type": "text", "text": text}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    return processor(text=[prompt], generation_mode="image", return_tensors="pt")


def test_janus_keeps_the_contract(tiny_janus):
    policy_contract.check(tiny_janus, SHORT, LONG)


def test_janus_with_grouped_keys_and_values_keeps_the_contract(tiny_janus):
    config = tiny_janus.module.config
    config.text_config.num_key_value_heads = 1
    torch.manual_seed(0)
    module = JanusForConditionalGeneration(config).eval()
    module.generation_config = tiny_janus.module.generation_config
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    policy = JanusPolicy(module, tiny_janus.processor, trainable=())
    assert policy.trunk_blocks[0].self_attn.k_proj.weight.shape == (16, 32)
    policy_contract.check(policy, SHORT, LONG)


def test_prompts_become_the_ids_that_transformers_gives(tiny_janus):
    for prompt in (SHORT, LONG):
        inputs = transformers_ids(tiny_janus, prompt.text)
        assert tiny_janus.prompt_ids(prompt) == inputs["input_ids"][0].tolist()


@torch.no_grad()
def test_the_unconditional_row_is_bos_pads_and_begin_of_image(folder, tiny_janus):
    tokenizer = tiny_janus.processor.tokenizer
    boi = tokenizer.convert_tokens_to_ids("<begin_of_image>")
    ids = [tokenizer.bos_token_id, *[tokenizer.pad_token_id] * 3, boi]
    expected = tiny_janus.module.get_input_embeddings()(torch.tensor(ids))
    prefix = tiny_janus.encode([SHORT, LONG])
    # BOS, three words, begin-of-image; LONG has ten words.
    assert prefix.lengths_P.tolist() == [5, 12]
    assert torch.equal(prefix.uncond.embeds_PLD[0, :5], expected)
    # The generation settings name the ids; where they do not, the tokenizer does.
    (folder / "generation_config.json").write_text("{}")
    assert torch.equal(load(folder).encode([SHORT]).uncond.embeds_PLD[0], expected)
    rewrite(folder / "generation_config.json", pad_token_id=2)
    policy = load(folder)
    pad = policy.module.get_input_embeddings()(torch.tensor(2))
    assert torch.equal(policy.encode([SHORT]).uncond.embeds_PLD[0, 1], pad)


@torch.no_grad()
def test_logits_are_those_of_transformers_on_the_whole_sequence(tiny_janus):
    tokens_NT = torch.arange(32).view(2, 16)
    logits_NTV = tiny_janus.head(tiny_janus.hidden(tiny_janus.encode([SHORT, LONG]), tokens_NT))
    module = tiny_janus.module
    for row, prompt in enumerate((SHORT, LONG)):
        ids = transformers_ids(tiny_janus, prompt.text)["input_ids"]
        text = module.get_input_embeddings()(ids)
        image = module.prepare_embeddings_for_image_generation(tokens_NT[row : row + 1])
        inputs = torch.cat([text, image], 1)
        states = module.model.language_model(inputs_embeds=inputs).last_hidden_state
        # The state at the last prompt token predicts the first image token, and so on.
        expected = module.model.generation_head(states[0, ids.shape[1] - 1 : -1])
        assert_close(logits_NTV[row], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("settings", "parts", "count"),
    [
        ({}, ("model.language_model.",), 2 * 9 + 2),
        (
            {"trainable": ("*.layers.1.*", "model.generation_head.*")},
            (".language_model.layers.1.", "generation_head"),
            9 + 4,
        ),
    ],
)
def test_only_what_matches_a_pattern_trains(tiny_janus_folder, settings, parts, count):
    policy = load(tiny_janus_folder, **settings)
    policy.head(policy.hidden(policy.encode([SHORT]), torch.zeros(1, 16).long())).sum().backward()
    named = dict(policy.module.named_parameters())
    matching = {name for name in named if any(part in name for part in parts)}
    assert {name for name, p in named.items() if p.requires_grad} == matching
    assert {name for name, p in named.items() if p.grad is not None} == matching
    assert len(matching) == count


def test_a_pattern_that_matches_nothing_is_answered_with_near_names(tiny_janus_folder):
    with pytest.raises(RecipeError, match=r"'model\.langage_model\.\*'.*model\.language_model\.\*"):
        load(tiny_janus_folder, trainable=("model.langage_model.*",))


def test_a_reference_keeps_its_weights_and_shares_what_does_not_train(tiny_janus):
    reference = tiny_janus.reference()
    before = reference.encode([SHORT]).embeds_PLD.clone()
    with torch.no_grad():
        for parameter in tiny_janus.module.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    assert torch.equal(reference.encode([SHORT]).embeds_PLD, before)
    assert not any(p.requires_grad for p in reference.module.parameters())
    theirs = dict(reference.module.named_parameters())
    for name, parameter in tiny_janus.module.named_parameters():
        assert (theirs[name] is parameter) != parameter.requires_grad


def test_a_saved_policy_loads_in_plain_transformers(tiny_janus, tmp_path):
    tiny_janus.save(tmp_path)
    module = JanusForConditionalGeneration.from_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    saved = tiny_janus.module.state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in module.state_dict().items())
    assert processor.chat_template == tiny_janus.processor.chat_template
    assert module.generation_config.generation_kwargs == {"boi_token_id": 5}
    assert module.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_codes_and_images_in_chunks_are_those_of_transformers(tiny_janus):
    tokens_NT = torch.arange(144).view(9, 16) % tiny_janus.codebook_size
    quantizer = tiny_janus.module.model.vqmodel.quantize
    expected_NCT = quantizer.get_codebook_entry(tokens_NT).flatten(2)
    assert_close(tiny_janus.codes(tokens_NT), expected_NCT.transpose(1, 2))
    pixels_NHWC = tiny_janus.module.decode_image_tokens(tokens_NT)
    expected = ((pixels_NHWC + 1) / 2 * 255).round().clamp(0, 255)
    images_NHWC = tiny_janus.images([], tokens_NT)
    # One image alone and in a batch may differ in the last bit before rounding.
    assert (images_NHWC.float() - expected).abs().max() <= 1
    assert (images_NHWC.float() == expected).float().mean() > 0.99


def test_autocast_trains_with_bf16_products(tiny_janus):
    tokens_NT = torch.arange(32).view(2, 16)
    exact_NTD = tiny_janus.hidden(tiny_janus.encode([SHORT, LONG]), tokens_NT)
    with torch.autocast("cpu", torch.bfloat16):
        mixed_NTD = tiny_janus.hidden(tiny_janus.encode([SHORT, LONG]), tokens_NT)
    mixed_NTD.sum().backward()
    difference = (mixed_NTD - exact_NTD).abs().mean() / exact_NTD.abs().mean()
    # bf16 keeps 8 bits: about 0.4 % a layer. Exactly equal would mean autocast did nothing.
    assert 1e-4 < difference < 0.05
    assert tiny_janus.trunk_blocks[0].self_attn.q_proj.weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "prompt 7: is empty"),
        (" \n", "prompt 7: is empty"),
        ("a \ud800 star", r"prompt 7: 'a \\ud800 star' is no Unicode text"),
        ("a red zebra", "prompt 7: the model does not know 'zebra'"),
        ("a <begin_of_image> square", "prompt 7: holds the special token '<begin_of_image>'"),
        # 40 words with BOS and begin-of-image are 42; 48 positions less 16 image tokens are 32.
        ("red " * 40, "prompt 7 .*: 42 tokens, but the model has room for 32"),
    ],
)
def test_a_prompt_that_cannot_be_drawn_is_one_clear_line(tiny_janus, text, message):
    with pytest.raises(InputError, match=message) as caught:
        tiny_janus.encode([SHORT, Prompt(text, 7)])
    assert "\n" not in str(caught.value)


def test_weights_that_do_not_fit_are_named(folder):
    weights = load_file(folder / "model.safetensors")
    norm, head = "model.language_model.norm.weight", "model.generation_head.vision_head.weight"
    del weights[norm]
    weights[head] = weights[head][:5].clone()
    weights["model.extra.weight"] = torch.zeros(1)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError) as caught:
        load(folder)
    for part in (f"missing: {norm}", "unexpected: model.extra.weight", f"another shape: {head}"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.safetensors", "not weights at all", "cannot load the weights"),
        ("model.safetensors", None, "cannot load the weights"),
        ("tokenizer.json", None, "processor"),
        ("config.json", None, r"no config\.json"),
        ("config.json", {"model_type": "llama"}, "model_type is 'llama'"),
        ("config.json", {"vision_config": {"num_image_tokens": 15}}, "is 15; .* needs 16"),
    ],
)
def test_a_damaged_folder_is_one_clear_line(folder, file, content, message):
    if isinstance(content, dict):
        rewrite(folder / file, **content)
    elif content:
        (folder / file).write_text(content)
    else:
        (folder / file).unlink()
    with pytest.raises(WeightsError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
