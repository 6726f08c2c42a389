"""CLIP weights in open_clip's layout, for transformers' CLIPModel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from stage_rl.rewards.conversion import Names, rename

NORMS = {"ln_1": "layer_norm1", "ln_2": "layer_norm2"}
LINEARS = {"attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
TRANSPOSED = ("text_projection.weight", "visual_projection.weight")
"""open_clip multiplies by these from the right, a linear layer by their transpose."""


def open_clip_names(config: Any) -> Names:
    """Every tensor of an open_clip CLIP with the towers of a `CLIPConfig`."""
    names: dict[str, str | tuple[str, ...]] = {
        "logit_scale": "logit_scale",
        "text_projection": "text_projection.weight",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "visual.proj": "visual_projection.weight",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    }
    norms = {
        "ln_final": "text_model.final_layer_norm",
        "visual.ln_pre": "vision_model.pre_layrnorm",
        "visual.ln_post": "vision_model.post_layernorm",
    }
    for theirs, ours in norms.items():
        names |= _with_bias(theirs, ours)
    towers = (
        ("", "text_model", config.text_config),
        ("visual.", "vision_model", config.vision_config),
    )
    for prefix, tower, size in towers:
        for layer in range(size.num_hidden_layers):
            names |= _block_names(
                f"{prefix}transformer.resblocks.{layer}", f"{tower}.encoder.layers.{layer}"
            )
    return names


def from_open_clip(tensors: Mapping[str, Tensor], config: Any, *, source: str) -> dict[str, Tensor]:
    """The tensors of an open_clip CLIP by the names of a CLIPModel of this configuration."""
    renamed = rename(tensors, open_clip_names(config), source=source)
    return renamed | {name: renamed[name].T.contiguous() for name in TRANSPOSED}


def _block_names(theirs: str, ours: str) -> dict[str, str | tuple[str, ...]]:
    """One transformer block; query, key and value are one tensor in open_clip."""
    names: dict[str, str | tuple[str, ...]] = {}
    for part, new in {**NORMS, **LINEARS}.items():
        names |= _with_bias(f"{theirs}.{part}", f"{ours}.{new}")
    for kind in ("weight", "bias"):
        split = tuple(f"{ours}.self_attn.{name}_proj.{kind}" for name in "qkv")
        names[f"{theirs}.attn.in_proj_{kind}"] = split
    return names


def _with_bias(theirs: str, ours: str) -> dict[str, str]:
    return {f"{theirs}.{kind}": f"{ours}.{kind}" for kind in ("weight", "bias")}
