"""ImageReward (Xu et al. 2023, arXiv 2304.05977): human preference by a BLIP that reads both.

The published weights are a BLIP in its authors' own layout with a head; here they fill
transformers' image and text towers.

Shape suffixes: N images, H x W pixels, C colour channels, P image patches, L text tokens, D width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BertTokenizer,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
)

from stage_rl.errors import WeightsError
from stage_rl.rewards.base import Reward, Score
from stage_rl.rewards.clip import AffineHead
from stage_rl.rewards.pretrained import (
    ScorerConfig,
    clip_pixels,
    fill,
    fill_part,
    find_file,
    load_part,
    read_tensors,
    rename,
    weight_and_bias,
)
from stage_rl.types import Prompt

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the head's output over the authors' data; the reward is standardised by them."""

MAX_TOKENS = 35

WEIGHTS_FILE, TEXT_FILE = "ImageReward.pt", "med_config.json"

VIT_L16 = BlipVisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=224,
    patch_size=16,
    layer_norm_eps=1e-6,
)

TEXT_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "max_position_embeddings", "layer_norm_eps", "hidden_act"),
)
"""What is taken from the text tower's published configuration."""

UNUSED = (
    "blip.text_encoder.embeddings.position_ids",
    *(f"blip.{side}_proj.{kind}" for side in ("vision", "text") for kind in ("weight", "bias")),
)
"""What the published file may hold beside the model: a table, and the heads of BLIP's training."""


class ImageRewardConfig(ScorerConfig):
    """ImageReward: human preference by a BLIP that reads image and prompt, about -2 to 2."""

    path: str = "THUDM/ImageReward"
    """Folder or hub id with ImageReward.pt and med_config.json."""
    tokenizer: str = "google-bert/bert-base-uncased"
    """Folder or hub id of the tokenizer."""

    def build_scorer(self, device: torch.device) -> Reward:
        """The reward."""
        model = load_image_reward(self.path, tokenizer=self.tokenizer, device=device)
        return ImageReward(model, self.batch_size)


@dataclass(frozen=True)
class ImageReward:
    """The reward on batches of images."""

    model: ImageRewardModel
    batch_size: int = 16

    def __call__(self, images_NHWC: Tensor, prompts: list[Prompt]) -> list[Score]:
        """One score per image, each image with its own prompt and no other."""
        assert len(images_NHWC) == len(prompts)
        scores: list[float] = []
        for images in images_NHWC.split(self.batch_size):
            texts = [prompt.text for prompt in prompts[len(scores) :][: len(images)]]
            scores += self.model.scores_N(images, texts).tolist()
        return [Score(score, f"preferred by {score:.2f} deviations") for score in scores]


@dataclass(frozen=True)
class ImageRewardModel:
    """The towers, the head and the tokenizer."""

    vision: BlipVisionModel
    text: BlipTextModel
    head: AffineHead
    tokenizer: BertTokenizer

    @torch.inference_mode()
    def scores_N(self, images_NHWC: Tensor, texts: Sequence[str]) -> Tensor:
        """The standardised reward of each image (uint8) with its own text."""
        device = self.vision.device
        side: Any = self.vision.config.image_size
        pixels = clip_pixels(images_NHWC, side, device=device)
        patches_NPD = self.vision(pixel_values=pixels).last_hidden_state
        tokens = self.tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=MAX_TOKENS,
            return_tensors="pt",
        )
        read_NLD = self.text(
            input_ids=tokens["input_ids"].to(device),
            attention_mask=tokens["attention_mask"].to(device),
            encoder_hidden_states=patches_NPD,
        ).last_hidden_state
        return (self.head(read_NLD[:, 0].float()) - MEAN) / STD


def load_image_reward(
    path: str,
    *,
    tokenizer: str,
    vision: BlipVisionConfig = VIT_L16,
    device: torch.device | str = "cpu",
) -> ImageRewardModel:
    """The published files in a folder or hub repository."""
    words = load_part(BertTokenizer.from_pretrained, tokenizer, "the tokenizer")
    text = _text_config(path, vision)
    tensors = read_tensors(find_file(path, WEIGHTS_FILE))
    source = f"{path}/{WEIGHTS_FILE}"
    kept = {name: tensor for name, tensor in tensors.items() if name not in UNUSED}
    renamed = rename(kept, foreign_names(vision, text), source=source)
    options: dict[str, Any] = {"source": source, "device": device}
    return ImageRewardModel(
        fill(BlipVisionModel, vision, _below("vision.", renamed), **options),
        fill(BlipTextModel, text, _below("text.", renamed), add_pooling_layer=False, **options),
        fill_part(AffineHead(text.hidden_size), _below("mlp.", renamed), **options),
        words,
    )


def _text_config(path: str, vision: BlipVisionConfig) -> BlipTextConfig:
    """The sizes of the text tower from its published configuration."""
    file = find_file(path, TEXT_FILE)
    try:
        published = json.loads(file.read_text(encoding="utf-8"))
        sizes = {name: published[name] for name in TEXT_SIZES}
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"{file}: is no configuration of the text tower ({type(error).__name__}: {error}); "
            "write the file as published"
        ) from error
    return BlipTextConfig(**sizes, encoder_hidden_size=vision.hidden_size, bos_token_id=None)


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def foreign_names(vision: BlipVisionConfig, text: BlipTextConfig) -> dict[str, str]:
    """Every tensor of the published file, and what it is called below vision, text and mlp."""
    eyes = "blip.visual_encoder"
    names = {
        f"{eyes}.cls_token": "vision.embeddings.class_embedding",
        f"{eyes}.pos_embed": "vision.embeddings.position_embedding",
        **weight_and_bias(f"{eyes}.patch_embed.proj", "vision.embeddings.patch_embedding"),
        **weight_and_bias(f"{eyes}.norm", "vision.post_layernorm"),
    }
    parts = {"norm1": "layer_norm1", "norm2": "layer_norm2", "mlp.fc1": "mlp.fc1"}
    parts |= {"attn.qkv": "self_attn.qkv", "attn.proj": "self_attn.projection"}
    for layer in range(vision.num_hidden_layers):
        for theirs, ours in {**parts, "mlp.fc2": "mlp.fc2"}.items():
            names |= weight_and_bias(
                f"{eyes}.blocks.{layer}.{theirs}", f"vision.encoder.layers.{layer}.{ours}"
            )
    for name in _text_names(text.num_hidden_layers):
        names[f"blip.text_encoder.{name}"] = f"text.{name}"
    # The head and the text tower are called the same on both sides.
    return names | {f"mlp.{name}": f"mlp.{name}" for name in AffineHead(1).state_dict()}


def _text_names(num_layers: int) -> list[str]:
    """The tensors of a BERT with cross-attention."""
    modules = ["embeddings.LayerNorm"]
    for layer in range(num_layers):
        below = f"encoder.layer.{layer}"
        for attention in ("attention", "crossattention"):
            modules += [f"{below}.{attention}.self.{part}" for part in ("query", "key", "value")]
            modules += [f"{below}.{attention}.output.{part}" for part in ("dense", "LayerNorm")]
        modules += [f"{below}.intermediate.dense", f"{below}.output.dense"]
        modules.append(f"{below}.output.LayerNorm")
    tables = [f"embeddings.{kind}_embeddings.weight" for kind in ("word", "position")]
    return [*tables, *(name for module in modules for name in weight_and_bias(module, module))]
