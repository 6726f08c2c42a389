"""How the tensors of transformers' Janus are called in DeepSeek's layout.

Two tensors differ in more than their name: the three projections of an attention layer of the
image encoder are one tensor, and its position embedding has a leading axis of 1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

POSITIONS = "vision_model.vision_tower.pos_embed"
UNUSED = ("vision_model.vision_tower.attn_pool.", "gen_vision_model.quantize.codebook_used")
"""Beginnings of tensors that are published and that no forward pass reads."""

# (pattern of transformers' name, DeepSeek's); each is tried in turn, on what the ones before left.
RULES = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^model\.language_model\.", "language_model.model."),
        (r"^model\.generation_embeddings\.", "gen_embed."),
        (r"^model\.generation_aligner\.", "gen_aligner."),
        (r"^model\.aligner\.", "aligner."),
        (r"^((?:gen_)?aligner)\.fc1\.", r"\1.layers.0."),
        (r"^model\.generation_head\.proj_out\.", "gen_head.output_mlp_projector."),
        (r"^model\.generation_head\.", "gen_head."),
        (r"^model\.vqmodel\.", "gen_vision_model."),
        (r"^(gen_vision_model\.(?:encoder|decoder))\.(?:down|up)\.", r"\1.conv_blocks."),
        (r"^(gen_vision_model\.\w+\.conv_blocks\.\d+)\.block\.", r"\1.res."),
        (r"^(gen_vision_model\.\w+\.mid)\.block_1\.", r"\1.0."),
        (r"^(gen_vision_model\.\w+\.mid)\.attn_1\.", r"\1.1."),
        (r"^(gen_vision_model\.\w+\.mid)\.block_2\.", r"\1.2."),
        (r"^model\.vision_model\.embeddings\.position_embedding\.weight$", POSITIONS),
        (r"^model\.vision_model\.embeddings\.patch_embedding\.", "VIT.patch_embed.proj."),
        (r"^model\.vision_model\.post_layernorm\.", "VIT.norm."),
        (r"^model\.vision_model\.encoder\.layers\.", "VIT.blocks."),
        (r"^(VIT\.blocks\.\d+)\.layer_norm(\d)\.", r"\1.norm\2."),
        (r"^(VIT\.blocks\.\d+)\.self_attn\.[qkv]_proj\.", r"\1.attn.qkv."),
        (r"^(VIT\.blocks\.\d+)\.self_attn\.projection_layer\.", r"\1.attn.proj."),
        (r"^VIT\.", "vision_model.vision_tower."),
    )
)
HIDDEN_LAYER = re.compile(r"^((?:gen_)?aligner)\.hidden_layers\.(\d+)\.")


@dataclass(frozen=True)
class Entry:
    """A tensor of DeepSeek's layout."""

    parts: tuple[str, ...]
    """transformers' names of what it holds, one behind the other along axis 0."""
    shape: torch.Size


def deepseek_name(name: str) -> str:
    """DeepSeek's name of the tensor that transformers calls `name`."""
    for pattern, replacement in RULES:
        name = pattern.sub(replacement, name)
    # Layers and activations alternate: hidden layer 0 is layer 2.
    return HIDDEN_LAYER.sub(lambda m: f"{m[1]}.layers.{2 * int(m[2]) + 2}.", name)


def entries(shapes: Mapping[str, torch.Size]) -> dict[str, Entry]:
    """The tensors of DeepSeek's layout for a Janus with these tensors, in transformers' order."""
    found: dict[str, Entry] = {}
    for name, shape in shapes.items():
        theirs = deepseek_name(name)
        if theirs == POSITIONS:
            found[theirs] = Entry((name,), torch.Size((1, *shape)))
        elif theirs in found:
            before = found[theirs]
            rows = before.shape[0] + shape[0]
            found[theirs] = Entry((*before.parts, name), torch.Size((rows, *shape[1:])))
        else:
            found[theirs] = Entry((name,), shape)
    return found


def to_transformers(
    layout: Mapping[str, Entry], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The state of transformers' Janus from tensors of DeepSeek's layout.

    Whole tensors stay views of the given ones; parts are copied, so that none share their memory.
    """
    state = {}
    for name, entry in layout.items():
        tensor = tensors[name].squeeze(0) if name == POSITIONS else tensors[name]
        parts = tensor.chunk(len(entry.parts))
        copies = parts if len(parts) == 1 else [part.clone() for part in parts]
        state |= zip(entry.parts, copies, strict=True)
    return state


def to_deepseek(layout: Mapping[str, Entry], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of DeepSeek's layout from the state of transformers' Janus."""
    tensors = {}
    for name, entry in layout.items():
        parts = [state[part] for part in entry.parts]
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        tensors[name] = tensor[None] if name == POSITIONS else tensor
    return tensors


def is_unused(name: str) -> bool:
    """Whether a tensor of DeepSeek's layout has no place in transformers' Janus."""
    return name.startswith(UNUSED)
