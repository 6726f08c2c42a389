"""LlamaGen: what the original code makes of the same weights, its files, its text encoder."""

import argparse
import importlib.util
import json
import os
import shutil
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import policy_contract
import pytest
import torch
from run_files import assert_resumes_to_the_bit
from tiny_llamagen import DATA, original_tensors
from torch.testing import assert_close
from transformers import AutoTokenizer, T5ForConditionalGeneration

from stage_rl.api import export, load, sample
from stage_rl.bench import fsdp2
from stage_rl.config import load_recipe
from stage_rl.errors import InputError, WeightsError
from stage_rl.policies import text_encoder
from stage_rl.policies.llamagen import LlamaGenConfig, write_folder
from stage_rl.policies.loading import find, policy_config
from stage_rl.training.loop import train
from stage_rl.training.memory import plan_of
from stage_rl.training.trainer import build_trainer
from stage_rl.types import Prompt

REFERENCE = dict(np.load(DATA / "reference.npz"))
TOKENS_NT = torch.from_numpy(REFERENCE["tokens"])
PROMPTS = [Prompt(f"caption {i}", i) for i in range(3)]
SHORT, LONG = Prompt("a red square", 0), Prompt("a photo of two blue circle and a star", 1)
TRANSFORMER, TOKENIZER = "t2i_8.pt", "vq_ds16_t2i.pt"
CPU = torch.device("cpu")


class RecordedFeatures:
    """In place of a text encoder: the features that the original code was given, 5, 9 and 12."""

    def features(self, prompt):
        return torch.from_numpy(REFERENCE[f"features_{prompt.index}"])


@pytest.fixture
def recorded(tiny_llamagen):
    tiny_llamagen.processor = RecordedFeatures()
    return tiny_llamagen


@pytest.fixture
def folder(tiny_llamagen_folder, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(tiny_llamagen_folder, tmp_path / "weights")


def build(folder, **settings):
    return LlamaGenConfig.model_validate({"path": str(folder), **settings}).build(CPU)


def test_it_keeps_the_contract(tiny_llamagen):
    policy_contract.check(tiny_llamagen, SHORT, LONG)


@torch.no_grad()
def test_logits_are_those_of_the_original_code(recorded):
    prefix = recorded.encode(PROMPTS)
    assert prefix.lengths_P.tolist() == [5, 9, 12]
    for given, name in ((prefix, "cond_logits"), (prefix.unconditional(), "uncond_logits")):
        logits_NTV = recorded.head(recorded.hidden(given, TOKENS_NT))
        expected_NTV = torch.from_numpy(REFERENCE[name])
        assert expected_NTV.std() > 5
        assert_close(logits_NTV, expected_NTV, atol=1e-4, rtol=0)


@pytest.mark.parametrize("together", [True, False])
def test_the_likeliest_tokens_are_those_of_the_original_code(recorded, together):
    batches = [PROMPTS] if together else [[prompt] for prompt in PROMPTS]
    drawn = [sample(recorded, b, temperature=0.0, guidance_scale=3.0).tokens_NT for b in batches]
    assert torch.equal(torch.cat(drawn), TOKENS_NT)


@torch.no_grad()
def test_images_are_those_of_the_original_code(recorded):
    expected_NCHW = torch.from_numpy(REFERENCE["pixels"])
    decoded_NCHW = recorded.module.vqmodel.decode(TOKENS_NT)
    assert_close(decoded_NCHW, expected_NCHW, atol=1e-5, rtol=0)  # equal with one thread
    scaled_NHWC = (expected_NCHW.permute(0, 2, 3, 1).clamp(-1, 1) + 1) * 127.5
    difference = recorded.images(PROMPTS, TOKENS_NT) - scaled_NHWC
    assert difference.abs().max() <= 0.5 + 1e-4


@torch.no_grad()
def test_features_are_those_of_the_padded_batch_that_the_original_code_encodes(
    tiny_llamagen_folder,
):
    policy = build(tiny_llamagen_folder, text_encoder_dtype="float32")
    whole = T5ForConditionalGeneration.from_pretrained(tiny_llamagen_folder / "t5")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llamagen_folder / "t5")
    texts = [SHORT.text, LONG.text]
    batch = tokenizer(texts, padding="max_length", max_length=12, return_tensors="pt")
    states_PLF = whole.encoder(**batch).last_hidden_state
    for prompt, mask_L, states_LF in zip(
        (Prompt(" A RED square "), LONG), batch.attention_mask, states_PLF, strict=True
    ):
        features_LF = policy.processor.features(prompt)
        assert_close(features_LF, states_LF[mask_L.bool()], atol=1e-5, rtol=0)


def test_features_are_made_once_and_a_number_of_them_is_kept(tiny_llamagen, monkeypatch):
    monkeypatch.setattr(text_encoder, "MAX_KEPT", 2)
    encoder, calls = tiny_llamagen.processor, []
    encode = encoder._encode
    monkeypatch.setattr(encoder, "_encode", lambda *given: calls.append(1) or encode(*given))
    for text, num_calls in (("a", 1), ("the", 2), ("a", 2), ("star", 3), ("a", 3), ("the", 4)):
        encoder.features(Prompt(text))
        assert len(calls) == num_calls


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (" ", "prompt 7: is empty"),
        ("a </s> star", "holds the special token '</s>'"),
        ("a </S> star", "holds the special token '</s>'"),  # which lower case makes of it
        ("a red star and " * 3, "13 tokens, but the model reads at most 12"),
    ],
)
def test_prompts_that_the_model_cannot_read_are_refused(tiny_llamagen, text, message):
    with pytest.raises(InputError, match=message):
        tiny_llamagen.encode([Prompt(text, 7)])


@pytest.mark.parametrize("key", ["model", "module", "state_dict"])
def test_a_file_with_a_training_state_gives_the_same_weights(folder, key, tiny_llamagen):
    tensors = original_tensors()[TRANSFORMER] | {"freqs_cis": torch.zeros(28, 8, 2)}
    state = {"optimizer": {"state": {0: {"step": torch.ones(1)}}}, "steps": 7}
    torch.save({key: tensors, **state, "args": argparse.Namespace(lr=1e-4)}, folder / TRANSFORMER)
    found = build(folder).module.state_dict()
    assert all(torch.equal(t, found[n]) for n, t in tiny_llamagen.module.state_dict().items())


def test_tensors_that_do_not_fit_are_named_as_the_file_names_them(folder):
    tensors = original_tensors()[TRANSFORMER]
    del tensors["norm.weight"]
    tensors["output.bias"] = torch.zeros(50)
    wqkv = "layers.1.attention.wqkv.weight"
    tensors[wqkv] = tensors[wqkv][:-1].clone()
    torch.save({"model": tensors}, folder / TRANSFORMER)
    faults = rf"missing: norm\.weight; unexpected: output\.bias; of another shape: {wqkv};"
    with pytest.raises(WeightsError, match=faults):
        build(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 9}, "image_size is 9; this policy needs a multiple of 2"),
        ({"num_attention_heads": 3}, "hidden_size is 64; this policy needs a multiple of 12"),
        ({"caption_dim": 32}, "of another shape: cls_embedding"),
        ({"hidden": 64}, "config.json: hidden: unknown key; did you mean 'hidden_size'"),
        ({"hidden_size": "64"}, "config.json: hidden_size: Input should be a valid integer"),
        ({"model_type": "llama"}, 'model_type is "llama"; this policy needs "llamagen"'),
        ({"image_size": 16}, r"lacks t2i_16\.pt; put the published"),
    ],
)
def test_settings_that_do_not_fit_are_one_clear_line(folder, change, message):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(WeightsError, match=message) as caught:
        build(folder)
    assert "\n" not in str(caught.value)


def test_an_image_size_other_than_the_folders_is_refused(folder):
    with pytest.raises(WeightsError, match="image_size is 8; this policy needs 512"):
        build(folder, image_size=512)


def test_a_text_encoder_of_another_width_is_refused(folder):
    config = json.loads((folder / "t5" / "config.json").read_text())
    other = T5ForConditionalGeneration.config_class.from_dict(config | {"d_model": 16})
    T5ForConditionalGeneration(other).save_pretrained(folder / "t5")
    with pytest.raises(WeightsError, match=r"t5: d_model is 16; this policy needs 24"):
        build(folder, text_encoder=str(folder / "t5"))


def test_half_a_text_encoder_is_refused(folder):
    whole = T5ForConditionalGeneration.from_pretrained(folder / "t5")
    state = whole.state_dict()
    name = "encoder.block.1.layer.0.SelfAttention.q.weight"
    whole.save_pretrained(folder / "t5", state_dict={n: t for n, t in state.items() if n != name})
    with pytest.raises(WeightsError, match=f"missing: {name}"):
        build(folder, text_encoder=str(folder / "t5"))


def test_published_names_and_folders_need_no_config(folder):
    assert policy_config("peizesun/llamagen_t2i") == LlamaGenConfig()
    (folder / "config.json").unlink()
    config = policy_config(str(folder))
    assert isinstance(config, LlamaGenConfig)
    assert config.sizes(None).grid_side == 16
    # The one transformer that there is says the size; of two the smaller is taken.
    for name, side in (("t2i_XL_stage2_512.pt", 32), ("t2i_XL_stage1_256.pt", 16)):
        (folder / name).touch()
        assert config.sizes(find(str(folder))).grid_side == side
    assert LlamaGenConfig(image_size=512).sizes(None).grid_side == 32


def test_a_round_trip_of_the_published_files_is_exact(tiny_llamagen_folder, tmp_path):
    out = export(str(tiny_llamagen_folder), tmp_path / "out")
    for file, tensors in original_tensors().items():
        written = torch.load(out / file, weights_only=True)["model"]
        # Which the original code asks for, and nothing reads.
        used = written.pop("quantize.codebook_used", torch.zeros(65_536))
        assert used.shape == (65_536,)
        assert written.keys() == tensors.keys()
        assert all(torch.equal(tensor, written[name]) for name, tensor in tensors.items())
    config, again = (
        json.loads((at / "config.json").read_text()) for at in (tiny_llamagen_folder, out)
    )
    assert again | config == again
    drawn = [sample(str(at), [LONG.text], seed=3).tokens_NT for at in (tiny_llamagen_folder, out)]
    assert torch.equal(*drawn)


def test_sizes_of_the_published_model_and_of_a_folder(tiny_llamagen_folder, tiny_llamagen):
    size = LlamaGenConfig().size()
    # 777,923,840 values in the file, less 120 x 2048 of the null caption, which is no parameter.
    assert sum(size.parameters.values()) == 777_923_840 - 120 * 2048
    assert size.others == 71_883_403
    assert size.frozen_bytes == 2 * 1_223_527_424
    assert (size.image_tokens, size.codebook, size.pixels) == (256, 16_384, 256**2)
    assert LlamaGenConfig(image_size=512).size().image_tokens == 1024
    tiny = LlamaGenConfig(path=str(tiny_llamagen_folder)).size()
    theirs = dict(tiny_llamagen.module.named_parameters())
    assert tiny.total == sum(parameter.numel() for parameter in theirs.values())
    assert all(theirs[name].numel() == count for name, count in tiny.parameters.items())
    encoder = tiny_llamagen.frozen_modules()["text_encoder"]
    assert tiny.frozen_bytes == 2 * sum(parameter.numel() for parameter in encoder.parameters())
    plan = plan_of(load_recipe("llamagen_xl_256_geneval"))
    assert {phase["text encoder"] for phase in plan.phases.values()} == {size.frozen_bytes}
    assert LlamaGenConfig(path="somebody/llamagen").size() is None
    assert LlamaGenConfig(text_encoder="somebody/t5").size() is None


@pytest.fixture
def recipe(tmp_path, tiny_llamagen_folder):
    """A function from overrides to a recipe that runs in a second."""
    file = tmp_path / "tiny.yaml"
    file.write_text(f"""
steps: 4
policy: {{kind: llamagen, path: {tiny_llamagen_folder}}}
prompts: {{kind: "loop_parts:Texts"}}
rewards: [{{kind: "loop_parts:Brightness"}}]
rollout: {{prompts_per_step: 2, group_size: 3}}
optimizer: {{lr: 1.0e-3}}
probe: {{every: 2, num_prompts: 2, images_per_prompt: 1}}
run: {{dir: {tmp_path}/run, save_every: 1}}
""")
    return lambda *overrides: load_recipe(file, overrides)


def test_the_prompts_of_a_run_are_checked_without_encoding_them(recipe, monkeypatch):
    calls = []
    monkeypatch.setattr(text_encoder.TextEncoder, "_encode", lambda *given: calls.append(given))
    settings = recipe("probe.every=0")
    build_trainer(settings, settings.prompts.build())
    assert not calls
    with pytest.raises(InputError, match=r"prompt 1 .* 13 tokens, but the model reads at most 12"):
        build_trainer(settings, (Prompt("a star"), Prompt("a red star and " * 3, 1)))


def test_an_export_finds_its_text_encoder_from_any_folder(
    tiny_llamagen_folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tiny_llamagen_folder.parent)
    encoder = json.loads((tiny_llamagen_folder / "config.json").read_text())["text_encoder"]
    policy = build(tiny_llamagen_folder, text_encoder=os.path.relpath(encoder))
    write_folder(tmp_path, policy.module.state_dict(), policy.sizes)
    assert json.loads((tmp_path / "config.json").read_text())["text_encoder"] == encoder


def test_it_trains_and_exports_what_it_trained(recipe, tmp_path, tiny_llamagen):
    run = train(recipe("steps=2"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert recipe().guidance_scale == 7.5
    assert len(lines) == 2
    assert all(line["grad/norm"] > 0 for line in lines)
    trained = load(str(run), CPU)
    before = tiny_llamagen.module.state_dict()
    moved = {n for n, t in trained.module.state_dict().items() if not torch.equal(t, before[n])}
    assert {name.split(".")[1] for name in moved} == {"layers", "norm"}
    out = export(str(run), tmp_path / "out")
    drawn = [sample(policy, [LONG.text], seed=3).tokens_NT for policy in (trained, str(out))]
    assert torch.equal(*drawn)
    assert "pipeline_tag: text-to-image" in (out / "README.md").read_text()


def test_a_run_resumes_to_the_bit(recipe, tmp_path):
    rate = "optimizer.lr=1e-4"
    assert_resumes_to_the_bit(recipe, tmp_path, rate, "run.save_every=2", "run.log_images_every=0")


def test_mixed_precision_checkpointing_and_critical_tokens_train_it(recipe):
    options = ("training.activation_checkpointing=selective", "training.reference=streamed")
    options += ("algorithm.credit=critical", "algorithm.entropy.mode=none")
    run = train(recipe("steps=1", "training.dtype=mixed", "rollout.dtype=mixed", *options))
    line = json.loads((run / "metrics.jsonl").read_text())
    assert 0 < line["grad/norm"] < float("inf")


@pytest.mark.slow
def test_two_processes_equal_one(recipe, tmp_path):
    settings = ("optimizer.lr=1e-5", "training.groups_per_microbatch=1", "run.log_images_every=0")
    found = fsdp2.compare(recipe(*settings, "policy.trainable=['*']"), 2, tmp_path)
    assert found["tokens_identical"] == 1
    assert found["gradients_relative"] <= 1e-6


@pytest.mark.parametrize("image_size", [512, 768])
def test_the_code_of_its_card_finds_the_weights_of_an_export(
    tmp_path, monkeypatch, tiny_llamagen, image_size
):
    sizes = tiny_llamagen.sizes.model_copy(update={"image_size": image_size})
    write_folder(tmp_path, tiny_llamagen.module.state_dict(), sizes)
    original, read = ModuleType("autoregressive.models.gpt"), {}
    model = SimpleNamespace(load_state_dict=lambda state: read.update(state=state))
    original.GPT_models = {"GPT-XL": lambda **asked: read.update(asked) or model}
    monkeypatch.setitem(sys.modules, "autoregressive.models.gpt", original)
    for name in ("autoregressive", "autoregressive.models"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    exec(LlamaGenConfig.loading_code["llamagen"], {"FOLDER": str(tmp_path)})
    assert read["block_size"] == (image_size // 16) ** 2
    assert read["cls_token_num"] == tiny_llamagen.sizes.caption_tokens
    assert "tok_embeddings.weight" in read["state"]


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs the extra lora")
def test_an_adapter_trains_and_is_exported_merged(recipe, tmp_path, tiny_llamagen):
    run = train(recipe("policy.lora.rank=4", "policy.dtype=bfloat16"))
    with pytest.raises(InputError, match="--layout llamagen: has no form for an adapter"):
        export(str(run), tmp_path / "out")
    out = export(str(run), tmp_path / "out", merge=True)
    state = load(str(out), CPU).module.state_dict()
    assert state.keys() == tiny_llamagen.module.state_dict().keys()
    name = "language_model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(state[name], tiny_llamagen.module.state_dict()[name])
