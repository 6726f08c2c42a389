"""Sizes of models that are not loaded."""

import subprocess
import sys

import pytest
import torch
from transformers import (
    JanusConfig,
    JanusForConditionalGeneration,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
)

from stage_rl.policies.janus import JanusConfig as JanusPolicyConfig
from stage_rl.policies.janus_sizes import KNOWN, size_of


@pytest.mark.parametrize(("name", "stored"), [("1B", 2.08e9), ("7B", 7.41e9)])
def test_a_known_size_is_that_of_transformers_module(name, stored):
    size = KNOWN[f"deepseek-community/Janus-Pro-{name}"]
    width = size.width
    config = JanusConfig(
        text_config=LlamaConfig(
            vocab_size=size.parameters["model.language_model.embed_tokens.weight"] // size.width,
            hidden_size=width,
            intermediate_size=size.mlp,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
        ),
        vision_config=JanusVisionConfig(image_size=384, projection_dim=width, depth=2),
        vq_config=JanusVQVAEConfig(projection_dim=width, image_token_embed_dim=width, depth=2),
    )
    with torch.device("meta"):
        module = JanusForConditionalGeneration(config)
    parts = dict(module.model.named_children())
    mine = {
        "language_model": sum(n for k, n in size.parameters.items() if "language_model" in k),
        "generation_head": size.image_head,
    }
    for part, count in mine.items():
        assert count == sum(p.numel() for p in parts[part].parameters())
    others = [m for part, m in parts.items() if part not in mine]
    text_head = width * size.parameters["model.language_model.embed_tokens.weight"] // size.width
    counted = sum(p.numel() for m in others for p in m.parameters())
    assert size.others == counted + text_head
    assert size.total == pytest.approx(stored, rel=2e-3)


def test_the_trunk_of_7b_has_6_07_billion_parameters():
    size = KNOWN["deepseek-ai/Janus-Pro-7B"]
    # 30 x (4 x 4096^2 + 3 x 4096 x 11008)
    assert size.layers * size.layer_matrices == 6_071_255_040
    assert size.image_head == 83_906_560


def test_the_size_of_a_folder_is_that_of_the_loaded_model(tiny_janus_folder, tiny_janus):
    size = size_of(str(tiny_janus_folder))
    assert (size.layers, size.width, size.mlp, size.codebook) == (2, 32, 48, 64)
    assert (size.image_tokens, size.image_side) == (16, 16)
    assert size.total == sum(p.numel() for p in tiny_janus.module.parameters())
    theirs = dict(tiny_janus.module.named_parameters())
    for name, count in size.parameters.items():
        if "language_model" in name:
            assert theirs[name].numel() == count


def test_the_size_of_a_folder_in_deepseeks_layout_is_that_of_the_loaded_model(
    original_janus_folder,
):
    size = size_of(str(original_janus_folder))
    module = JanusPolicyConfig(path=str(original_janus_folder)).load(torch.device("cpu"))[0]
    config = module.config
    text, vq = config.text_config, config.vq_config
    assert (size.layers, size.width, size.mlp) == (
        text.num_hidden_layers,
        text.hidden_size,
        text.intermediate_size,
    )
    assert (size.codebook, size.image_tokens) == (vq.num_embeddings, vq.num_patches**2)
    assert size.positions == text.max_position_embeddings
    # A pickle is taken for one in bf16, as published; this one is in fp32, and its zip counts too.
    loaded = sum(p.numel() for p in module.parameters())
    assert loaded <= size.total <= 2.2 * loaded


def test_nothing_is_known_of_other_ids_and_layouts(tmp_path):
    assert size_of("somebody/else") is None
    (tmp_path / "config.json").write_text('{"model_type": "multi_modality"}')
    assert size_of(str(tmp_path)) is None


def test_a_size_needs_no_torch():
    code = "import sys; from stage_rl.policies.janus_sizes import size_of; size_of('shapes'); "
    code += "assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
