"""Models of a few thousand random parameters behind the real ones' interfaces.

A reward whose `path` is `tiny` runs through all of its code and its scores mean nothing: for tests
and smoke runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import (
    BertTokenizer,
    BlipTextConfig,
    BlipVisionConfig,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    SwinConfig,
)

from stage_rl.rewards.config_scorers import TINY

__all__ = [
    "TINY",
    "random_model",
    "tiny_bert_tokenizer",
    "tiny_blip_configs",
    "tiny_clip",
    "tiny_clip_tokenizer",
    "tiny_mask2former",
]

CLIP_WIDTH = 32
"""Width of the tiny CLIP's joint space."""
Model = TypeVar("Model", bound=nn.Module)


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Draws the same numbers each time and leaves the global stream where it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def random_model(build: Callable[[], Model], *, scale: float = 1.0) -> Model:
    """A frozen model in eval mode, the same each time; matrices `scale` times their usual size."""
    with seeded():
        model = build()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(scale)
    return model.requires_grad_(False).eval()


def tiny_clip() -> CLIPModel:
    """A CLIP of two layers that reads images of 32 x 32."""
    tokenizer = tiny_clip_tokenizer()
    tower = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": CLIP_WIDTH,
    }
    text = {**tower, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    text |= {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    vision = {**tower, "image_size": 32, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=CLIP_WIDTH)
    # At its initial scale a random tower says nearly the same of everything.
    return random_model(lambda: CLIPModel(config), scale=4.0)


def tiny_clip_tokenizer() -> CLIPTokenizer:
    """One token per byte: 512 of them, then begin and end of text."""
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])


def tiny_mask2former(num_labels: int = 80) -> Mask2FormerForUniversalSegmentation:
    """A Mask2Former of 12 queries on a Swin of width 8."""
    stages: dict[str, Any] = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
    swin = SwinConfig(
        image_size=64,
        patch_size=4,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=7,
        **stages,
    )
    settings: dict[str, Any] = dict.fromkeys(
        ("feature_size", "mask_feature_size", "hidden_dim"), 32
    )
    settings |= dict.fromkeys(("encoder_layers", "num_attention_heads", "decoder_layers"), 2)
    settings |= dict.fromkeys(("dim_feedforward", "encoder_feedforward_dim"), 32)
    settings |= {"num_queries": 12, "num_labels": num_labels}
    config = Mask2FormerConfig(backbone_config=swin, **settings)
    return random_model(lambda: Mask2FormerForUniversalSegmentation(config))


def tiny_blip_configs() -> tuple[BlipVisionConfig, BlipTextConfig]:
    """The towers of a tiny ImageReward, which reads images of 32 x 32."""
    size: dict[str, Any] = dict.fromkeys(("hidden_size", "intermediate_size"), 32)
    size["num_hidden_layers"] = 2
    # The library initialises the image tower with a deviation of 1e-10: it would say nothing.
    vision = BlipVisionConfig(
        **size,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        layer_norm_eps=1e-6,
        initializer_range=0.1,
    )
    text = BlipTextConfig(
        **size,
        bos_token_id=None,
        num_attention_heads=2,
        encoder_hidden_size=32,
        vocab_size=len(tiny_bert_tokenizer()),
        max_position_embeddings=64,
        initializer_range=0.1,
    )
    return vision, text


def tiny_bert_tokenizer() -> BertTokenizer:
    """One token per printable ASCII character, at the beginning of a word and inside it."""
    letters = [chr(code) for code in range(33, 127)]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*special, *letters, *(f"##{letter}" for letter in letters)]
    return BertTokenizer(vocab={word: i for i, word in enumerate(words)})
