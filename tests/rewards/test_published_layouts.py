"""Checkpoints as they were published: without tensors that only newer models have, with old tables.

transformers saved them when a Swin backbone had no last norm (2022), when tables such as position
ids were stored, and from a DPT whose deepest fusion layer has one residual unit only.
"""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from stage_rl.errors import WeightsError
from stage_rl.rewards.clip import load_clip
from stage_rl.rewards.compbench import load_blip_vqa, load_depth, tiny_blip_vqa, tiny_depth
from stage_rl.rewards.grounding_dino import load_grounding_dino
from stage_rl.rewards.mask2former import load_mask2former
from stage_rl.rewards.tiny import (
    tiny_clip,
    tiny_clip_tokenizer,
    tiny_git,
    tiny_grounding_dino,
    tiny_mask2former,
    tiny_scene_tokenizer,
)
from stage_rl.rewards.vqa import load_git

IMAGES = torch.randint(
    256, (2, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)
PIXELS = IMAGES.permute(0, 3, 1, 2) / 255
WINDOW = "layers.0.blocks.0.attention.self.relative_position_index"


def mask2former(folder):
    module = load_mask2former(folder)
    return module(pixel_values=PIXELS).masks_queries_logits


def grounding_dino(folder):
    found = load_grounding_dino(folder, shortest_side=64, longest_side=64, min_score=0.0)
    return torch.tensor([one.score for one in found.detect(IMAGES, ["cat"])[0]])


def depth(folder):
    return torch.from_numpy(load_depth(folder, side=32, batch_size=2)(IMAGES))


def git(folder):
    answers = load_git(folder).ask(IMAGES, [("cat?",), ("dog?",)])
    return torch.tensor([answer.yes for (answer,) in answers])


def blip(folder):
    return torch.tensor(load_blip_vqa(folder, side=32).ask(IMAGES, [["a cat?"], ["a dog?"]]))


def clip(folder):
    return load_clip(folder).cosines_N(IMAGES, ["a cat", "a dog"])


# what makes it, what reads it, what the published file lacks, what it holds besides
LAYOUTS = {
    "mask2former": (
        *(tiny_mask2former, mask2former, r"swin\.layernorm|^criterion"),
        [f"model.pixel_level_module.encoder.encoder.{WINDOW}"],
    ),
    "grounding_dino": (
        *(tiny_grounding_dino, grounding_dino, r"swin\.layernorm"),
        [
            f"model.backbone.conv_encoder.model.encoder.{WINDOW}",
            "model.text_backbone.embeddings.position_ids",
        ],
    ),
    "depth": (tiny_depth, depth, r"fusion_stage\.layers\.0\.residual_layer1", []),
    "git": (
        *(tiny_git, git, r"^$"),
        [
            "git.embeddings.position_ids",
            "git.image_encoder.vision_model.embeddings.position_ids",
        ],
    ),
    "blip": (
        *(tiny_blip_vqa, blip, r"^$"),
        ["text_encoder.embeddings.position_ids", "text_decoder.bert.embeddings.position_ids"],
    ),
    "clip": (
        *(tiny_clip, clip, r"^$"),
        ["text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"],
    ),
}


def save(module, folder, *, lacks="^$", holds=()):
    """Saves a model in the published layout, with the tokenizer that its reader wants."""
    module.save_pretrained(folder)
    words = tiny_clip_tokenizer() if module.config.model_type == "clip" else tiny_scene_tokenizer()
    words.save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = {name: t for name, t in load_file(file).items() if not re.search(lacks, name)}
    tables = {name: torch.zeros(1, 4, dtype=torch.long) for name in holds}
    save_file({**tensors, **tables}, file, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_published_layout_says_what_the_whole_model_says(kind, tmp_path):
    make, read, lacks, holds = LAYOUTS[kind]
    module = make()
    # What the file lacks is not what the library would draw, and still plays no part.
    unread = [t for name, t in module.state_dict().items() if re.search(lacks, name)]
    assert bool(unread) is (lacks != r"^$")
    with torch.no_grad():
        for tensor in unread:
            tensor.add_(1.5)
    save(module, tmp_path / "whole")
    save(module, tmp_path / "published", lacks=lacks, holds=holds)
    whole = read(str(tmp_path / "whole"))
    assert whole.unique().numel() > 1
    assert torch.equal(read(str(tmp_path / "published")), whole)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_tensor_that_no_published_file_has_is_an_error_that_names_it(kind, tmp_path):
    make, read, _, _ = LAYOUTS[kind]
    save(make(), tmp_path, holds=["more.weight"])
    with pytest.raises(WeightsError, match=r"unexpected: more\.weight; write a checkpoint"):
        read(str(tmp_path))
