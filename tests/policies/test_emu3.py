"""Emu3 against transformers' own code, on random weights of a few thousand parameters."""

import json
import shutil
from types import SimpleNamespace

import policy_contract
import pytest
import torch
from run_files import assert_resumes_to_the_bit
from safetensors.torch import load_file, save_file
from tiny_emu3 import CODES, COLUMNS, NEGATIVE, ROWS, SIZE
from tiny_emu3 import load_emu3 as load
from torch.testing import assert_close
from transformers import (
    AutoProcessor,
    Emu3ForConditionalGeneration,
    Emu3Processor,
)

from stage_rl.api import export, sample
from stage_rl.api import load as load_policy
from stage_rl.bench import fsdp2
from stage_rl.config import load_recipe
from stage_rl.errors import InputError, RecipeError, WeightsError
from stage_rl.policies.emu3 import (
    NEGATIVE_PROMPT,
    Emu3Config,
    Emu3Policy,
    decode_first_frame,
    grid_of,
    size_of,
)
from stage_rl.policies.loading import policy_config
from stage_rl.rollout.engine import Engine
from stage_rl.rollout.sample import rollout
from stage_rl.rollout.sampling import Sampling
from stage_rl.types import Prompt

SHORT = Prompt("a red square", 0)
LONG = Prompt("a photo of two blue circle and a star", 1)
CPU = torch.device("cpu")


@pytest.fixture
def emu3(emu3_folder):
    return load(emu3_folder)


@pytest.fixture
def folder(emu3_folder, tmp_path):
    """A copy to damage."""
    return shutil.copytree(emu3_folder, tmp_path / "emu3")


def rewrite(file, **changes):
    content = json.loads(file.read_text())
    for key, value in changes.items():
        content[key] = {**content[key], **value} if isinstance(value, dict) else value
    file.write_text(json.dumps(content))


def transformers_inputs(policy, text):
    """Inputs by the recipe of transformers' documentation."""
    return policy.processor(
        text=[text], return_for_image_generation=True, return_tensors="pt", **SIZE
    )


def allowed_tokens(policy):
    """Which ids may come next, as transformers' documentation constrains its generate."""
    tokenizer, codes = policy.processor.tokenizer, policy.module.vocabulary_mapping.image_tokens
    ends = ["<|extra_201|>", "<|image end|>", "<|extra_204|>"]

    def allowed(batch, ids):
        start = int((ids == tokenizer.image_wrapper_token_id).nonzero()[0, 0])
        offset = len(ids) - start
        if offset % (COLUMNS + 1) == 0:
            return [tokenizer.convert_tokens_to_ids("<|extra_200|>")]
        past = offset - (COLUMNS + 1) * ROWS
        return codes if past <= 0 else [tokenizer.convert_tokens_to_ids(ends[past - 1])]

    return allowed


def test_emu3_keeps_the_contract(emu3):
    assert emu3.trunk_blocks[0].self_attn.k_proj.weight.shape == (16, 32)
    # The negative prompt is longer than one prompt and shorter than the other.
    lengths = emu3.encode([Prompt("star"), LONG]).lengths_P.tolist()
    assert lengths[0] < int(emu3.encode([SHORT]).uncond.lengths_P) < lengths[1]
    policy_contract.check(emu3, SHORT, LONG)


def test_prompts_become_the_ids_that_transformers_gives(emu3):
    for prompt in (SHORT, LONG):
        inputs = transformers_inputs(emu3, prompt.text)
        assert emu3.prompt_ids(prompt) == inputs["input_ids"][0].tolist()
        assert tuple(inputs["image_sizes"][0]) == emu3.layout.grid == (ROWS, COLUMNS)


@pytest.mark.parametrize(
    ("area", "ratio", "grid"),
    [(518_400, "1:1", (90, 90)), (518_400, "16:9", (68, 120)), (262_144, "1:1", (64, 64))],
)
def test_the_grid_is_that_of_the_published_sizes(area, ratio, grid):
    assert grid_of(area, ratio, 8) == grid
    theirs = Emu3Processor.calculate_generate_size(SimpleNamespace(), ratio, area, 8)
    assert theirs == grid


def test_an_image_without_tokens_is_refused():
    with pytest.raises(RecipeError, match=r"policy\.image_area: .* 1:999 has no token of 8 x 8"):
        Emu3Config(image_area=10_000, ratio="1:999").size()


@torch.no_grad()
def test_greedy_tokens_under_guidance_are_those_of_transformers(emu3):
    sampling = Sampling(guidance_scale=3.0, temperature=0.0)
    drawn = rollout(Engine(emu3), [SHORT, LONG], group_size=1, sampling=sampling, seed=0, step=0)
    first = emu3.module.vocabulary_mapping.img2bpe[0]
    for row, prompt in enumerate((SHORT, LONG)):
        inputs = transformers_inputs(emu3, prompt.text)
        negative = transformers_inputs(emu3, NEGATIVE)
        ids = emu3.module.generate(
            inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=ROWS * (COLUMNS + 1) + 3,
            do_sample=False,
            guidance_scale=3.0,
            prefix_allowed_tokens_fn=allowed_tokens(emu3),
            negative_prompt_ids=negative["input_ids"],
            negative_prompt_attention_mask=negative["attention_mask"],
        )
        new = ids[:, inputs["input_ids"].shape[1] :]
        tokens = new[0, :-3].view(ROWS, COLUMNS + 1)[:, :-1].flatten() - first
        assert torch.equal(drawn.tokens_NT[row], tokens)
        pixels = emu3.module.decode_image_tokens(image_tokens=new, height=ROWS, width=COLUMNS)
        (image,) = emu3.processor.postprocess(list(pixels.float()))["pixel_values"]
        theirs = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        # Transformers cuts off what we round.
        ours = drawn.images_NHWC[row].flatten()
        assert (ours.int() - theirs.int()).abs().max() <= 1


def by_hand(policy, prompt, tokens_T):
    """Log-probabilities of the tokens of one image: one forward pass of transformers a token."""
    ids = transformers_inputs(policy, prompt.text)["input_ids"][0].tolist()
    mapping = policy.module.vocabulary_mapping
    codes = torch.tensor(mapping.image_tokens)
    logprobs = []
    for index, token in enumerate(tokens_T.tolist()):
        if index and index % COLUMNS == 0:
            ids.append(mapping.eol_token_id)
        logits_V = policy.module(input_ids=torch.tensor([ids])).logits[0, -1, codes]
        logprobs.append(logits_V.log_softmax(-1)[token])
        ids.append(mapping.img2bpe[token])
    return torch.stack(logprobs)


def test_the_gradient_with_control_tokens_is_that_of_a_loop_by_hand(emu3):
    tokens_NT = torch.arange(2 * ROWS * COLUMNS).view(2, -1) * 7 % CODES
    weight_NT = torch.linspace(-1, 2, tokens_NT.numel()).view(2, -1)
    trained = {n: p for n, p in emu3.module.named_parameters() if p.requires_grad}
    ours_NT, _ = emu3([SHORT, LONG], tokens_NT)
    ours = torch.autograd.grad((weight_NT * ours_NT).sum(), list(trained.values()))
    theirs_NT = torch.stack(
        [by_hand(emu3, *row) for row in zip((SHORT, LONG), tokens_NT, strict=True)]
    )
    theirs = torch.autograd.grad((weight_NT * theirs_NT).sum(), list(trained.values()))
    assert_close(ours_NT, theirs_NT, atol=1e-5, rtol=0)
    for name, one, other in zip(trained, ours, theirs, strict=True):
        assert other.abs().max() > 1e-3, name
        assert (one - other).norm() < 1e-4 * other.norm(), name


@torch.no_grad()
def test_the_first_frame_alone_is_the_image_that_all_frames_give(emu3):
    vqmodel = emu3.module.model.vqmodel
    tokens_NHW = torch.arange(2 * ROWS * COLUMNS).view(2, ROWS, COLUMNS) % CODES
    expected = vqmodel.decode(tokens_NHW)
    for _ in range(2):
        assert_close(decode_first_frame(vqmodel, tokens_NHW), expected, atol=1e-5, rtol=0)
    # The hook is gone.
    assert torch.equal(vqmodel.decode(tokens_NHW), expected)


@torch.no_grad()
def test_codes_are_the_rows_of_the_codebook_as_they_are(emu3):
    tokens_NT = torch.arange(ROWS * COLUMNS)[None]
    rows = emu3.module.model.vqmodel.quantize.embedding.weight
    assert torch.equal(emu3.codes(tokens_NT)[0], rows[: ROWS * COLUMNS])


def test_a_suffix_stands_behind_the_prompt_and_not_behind_the_negative_one(emu3_folder):
    policy = load(emu3_folder, prompt_suffix=" low quality")
    ids = policy.prompt_ids(SHORT)
    assert ids == policy.prompt_ids(Prompt("a red square", 0))
    assert ids == load(emu3_folder).prompt_ids(Prompt("a red square low quality", 0))
    # BOS, two words, begin of image, three of the size, begin of the tokens.
    assert policy.encode([SHORT]).uncond.lengths_P.tolist() == [8]


def test_by_default_the_layers_and_their_norm_train(emu3):
    emu3([SHORT], torch.zeros(1, ROWS * COLUMNS).long())[0].sum().backward()
    with_grad = {n for n, p in emu3.module.named_parameters() if p.grad is not None}
    layers = tuple(f"model.text_model.{part}." for part in ("layers", "norm"))
    assert with_grad == {n for n, _ in emu3.module.named_parameters() if n.startswith(layers)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (" \n", "prompt 7: is empty"),
        ("a red zebra", r"prompt 7: '<\|unknown\|>' is a special token of the model, or stands"),
        ("a <|visual token 000003|> square", r"prompt 7: '<\|visual token 000003\|>' is a special"),
        # BOS, 40 words and 5 for the size; 48 positions less 3 x 5 - 1 columns are 34.
        ("red " * 40, "prompt 7 .*: 46 tokens, but the model has room for 34"),
    ],
)
def test_a_prompt_that_cannot_be_drawn_is_one_clear_line(emu3, text, message):
    with pytest.raises(InputError, match=message) as caught:
        emu3.encode([SHORT, Prompt(text, 7)])
    assert "\n" not in str(caught.value)


def test_an_image_that_is_too_large_is_refused(emu3_folder):
    config = Emu3Config(path=str(emu3_folder), negative_prompt=NEGATIVE, image_area=64 * 49)
    # 7 x 8 - 1 = 55 columns, and the model has 48 positions.
    with pytest.raises(RecipeError, match=r"policy\.image_area: 7 x 7 tokens .* write a smaller"):
        config.build(CPU)


PUBLISHED_NAMES = {
    "model.text_model.norm.weight": "text_model.model.norm.weight",
    "model.vqmodel.quantize.embedding.weight": "vqmodel.quantize.embedding.weight",
    "lm_head.weight": "text_model.lm_head.weight",
}
"""Of the tensors in the files on the hub, by those of the module; transformers reads both."""


def test_weights_that_do_not_fit_are_named(folder):
    weights = load_file(folder / "model.safetensors")
    norm, head = "model.text_model.norm.weight", "lm_head.weight"
    del weights[PUBLISHED_NAMES[norm]]
    weights[PUBLISHED_NAMES[head]] = weights[PUBLISHED_NAMES[head]][:5].clone()
    weights["model.extra.weight"] = torch.zeros(1)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError) as caught:
        load(folder)
    for part in (f"missing: {norm}", "unexpected: model.extra.weight", f"another shape: {head}"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.safetensors", None, "cannot load the weights"),
        ("tokenizer.json", None, "processor"),
        ("config.json", None, r"no config\.json"),
        ("config.json", {"model_type": "Emu3"}, "model_type is 'Emu3'; .*BAAI/Emu3-Gen-hf"),
        ("config.json", {"text_config": {"mlp_bias": True}}, "mlp_bias is true; .* needs false"),
        (
            "config.json",
            {"vocabulary_map": {"<|visual token 000003|>": 1}},
            r"has '<\|visual token 000003\|>' at 1; image tokens must follow each other",
        ),
        ("config.json", {"vocabulary_map": {"<|extra_200|>": 1}}, "end of a line be that of"),
    ],
)
def test_a_damaged_folder_is_one_clear_line(folder, file, content, message):
    if content:
        rewrite(folder / file, **content)
    else:
        (folder / file).unlink()
    with pytest.raises(WeightsError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_a_saved_policy_loads_in_plain_transformers_and_here(emu3, tmp_path):
    with torch.no_grad():
        emu3.trunk_blocks[0].mlp.up_proj.weight.add_(1)
    emu3.save(tmp_path)
    module = Emu3ForConditionalGeneration.from_pretrained(tmp_path)
    saved = emu3.module.state_dict()
    assert module.state_dict().keys() == saved.keys()
    assert all(torch.equal(value, saved[name]) for name, value in module.state_dict().items())
    assert load_file(tmp_path / "model.safetensors").keys() >= {*PUBLISHED_NAMES.values()}
    again = policy_config(str(tmp_path)).build(CPU)
    assert again.layout.grid == (ROWS, COLUMNS)
    lengths = [policy.encode([SHORT]).uncond.lengths_P for policy in (emu3, again)]
    assert torch.equal(*lengths)
    assert isinstance(AutoProcessor.from_pretrained(tmp_path), Emu3Processor)
    assert again.prompt_ids(LONG) == emu3.prompt_ids(LONG)
    rewrite(tmp_path / "config.json", stage_rl={"image_size": 3})
    with pytest.raises(WeightsError, match=r"stage_rl\.image_size of config\.json: unknown key"):
        policy_config(str(tmp_path))


def test_files_with_the_names_of_the_module_are_read_too(folder, emu3):
    assert load_file(folder / "model.safetensors").keys() >= {*PUBLISHED_NAMES.values()}
    state = emu3.module.state_dict()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    loaded = load(folder).module.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_an_adapter_trains_alone_and_is_merged_where_it_is_saved(emu3_folder, tmp_path):
    pytest.importorskip("peft")
    policy = load(emu3_folder, lora={"rank": 2}, dtype="bfloat16")
    trained = {n: p for n, p in policy.module.named_parameters() if p.requires_grad}
    # 2 layers, 7 matrices, A and B of each.
    assert len(trained) == 28
    tokens_NT = torch.zeros(1, ROWS * COLUMNS).long()
    with torch.no_grad():
        for name, parameter in trained.items():
            if "lora_B" in name:
                parameter.fill_(0.1)
        changed, _ = policy([SHORT], tokens_NT)
        base, _ = policy.reference()([SHORT], tokens_NT)
    assert changed.dtype == torch.float32
    assert (changed - base).abs().max() > 1e-2
    policy.save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert not any("lora" in name for name in weights)
    assert {tensor.dtype for n, tensor in weights.items() if "tracked" not in n} == {torch.bfloat16}


@pytest.fixture
def recipe(tmp_path, emu3_folder):
    """A function from overrides to a recipe that runs in seconds."""
    file = tmp_path / "tiny.yaml"
    file.write_text(f"""
steps: 4
policy:
  kind: emu3
  path: {emu3_folder}
  negative_prompt: {NEGATIVE}
  image_area: {SIZE["image_area"]}
  ratio: "{SIZE["ratio"]}"
prompts: {{kind: "loop_parts:Texts", texts: [a red circle, two blue square and a star]}}
rewards: [{{kind: "loop_parts:Brightness"}}]
rollout: {{prompts_per_step: 2, group_size: 2, top_k: 20}}
optimizer: {{lr: 1.0e-3}}
probe: {{every: 2, num_prompts: 1, images_per_prompt: 1}}
run: {{save_every: 2, log_images_every: 0}}
""")
    return lambda *overrides: load_recipe(file, overrides)


def test_a_run_resumes_to_the_bit_and_its_export_draws_what_it_draws(recipe, tmp_path):
    assert recipe().guidance_scale == 3.0
    run = assert_resumes_to_the_bit(recipe, tmp_path)
    trained, out = load_policy(str(run), CPU), export(str(run), tmp_path / "out")
    again = load_policy(str(out), CPU)
    assert torch.equal(*(sample(p, [SHORT.text], seed=3).tokens_NT for p in (trained, again)))
    assert "Emu3ForConditionalGeneration.from_pretrained" in (out / "README.md").read_text()


@pytest.mark.slow
def test_two_processes_equal_one(recipe, tmp_path):
    """Sharded, with grouped keys and values and end-of-line tokens between the codes."""
    settings = ("optimizer.lr=1e-5", "training.groups_per_microbatch=1", "probe.every=0")
    found = fsdp2.compare(recipe(*settings, "steps=2"), 2, tmp_path)
    assert found["tokens_identical"] == 1
    assert found["gradients_relative"] <= 1e-6


def test_the_published_size_is_that_of_the_model():
    size = size_of("BAAI/Emu3-Gen-hf", image_area=518_400, ratio="1:1")
    # 32 layers of 218,112,000, embedding and head of 184,622 x 4,096, a norm, and the tokenizer.
    assert sum(size.in_layers.values()) == 32 * 218_112_000
    assert size.total == 32 * 218_112_000 + 2 * 184_622 * 4096 + 4096 + 270_740_287
    assert (size.image_tokens, size.columns, size.inputs) == (8100, 8189, 32_769)
    assert (size.pixels, size.positions, size.kv_width) == (720**2, 9216, 1024)
    assert size_of("somebody/Emu3-Gen-hf", image_area=518_400, ratio="1:1") is None


def test_the_size_of_a_folder_is_that_of_the_loaded_model(emu3_folder, emu3):
    size = Emu3Config(path=str(emu3_folder), **SIZE).size()
    theirs = dict(emu3.module.named_parameters())
    assert size.total == sum(p.numel() for p in theirs.values())
    assert all(theirs[name].numel() == count for name, count in size.parameters.items())
    assert (size.image_tokens, size.columns, size.pixels) == (12, 14, 24 * 32)
    assert size.image_head == emu3._head_weight.numel()


def test_a_ratio_that_is_none_is_one_clear_line(recipe):
    with pytest.raises(RecipeError, match=r"policy\.ratio: '1:0' is none; write WIDTH:HEIGHT"):
        recipe("policy.ratio='1:0'")


def test_the_negative_prompt_of_the_published_code_is_the_default():
    assert Emu3Config().negative_prompt == NEGATIVE_PROMPT
    assert Emu3Policy.default_guidance == 3.0
