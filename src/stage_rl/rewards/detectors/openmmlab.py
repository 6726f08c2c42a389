"""GenEval's own detector: OpenMMLab's Mask2Former (MMDetection 2.x), read into transformers' model.

Same architecture, another training run and other preprocessing than transformers' checkpoint. Every
tensor of the file must find its place, and every place of the model must be filled.

Shape suffixes: N images, C colour channels, H x W pixels, X x Y pixels after resizing.
"""

from __future__ import annotations

import functools
import hashlib
import math
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from stage_rl.errors import WeightsError
from stage_rl.policies.loading import refused
from stage_rl.rewards.pretrained import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    load_model,
    normalize,
    read_tensors,
    rename,
)

WEIGHTS_URL = (
    "https://download.openmmlab.com/mmdetection/v2.0/mask2former/"
    "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco/"
    "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth"
)
"""The file that GenEval's evaluation downloads."""

OFFICIAL_SHA256 = "743b7d99"
"""The digits that its name ends in: those its SHA-256 begins with."""

STRIDE = 32
"""Both sides of the model's input are multiples of this."""

GREY = 128
"""Level of the padding, before normalising."""

NUM_STAGES, NUM_LEVELS, NUM_POINTS = 4, 3, 4
"""Of the backbone; feature levels and sampling points of the deformable attention."""

ENCODER = "model.pixel_level_module.encoder."
DECODER = "model.pixel_level_module.decoder."
TRANSFORMER = "model.transformer_module."

THIRDS = {
    r"attn\.w_msa\.qkv\.(weight|bias)$": "attention.self.{query,key,value}",
    r"attentions\.1\.attn\.in_proj_(weight|bias)$": "self_attn.{q,k,v}_proj",
}
"""Query, key and value in one, and what the three are called."""

NAMES = {
    **{rf"^backbone\.norm{s}\.": f"{ENCODER}hidden_states_norms.stage{s + 1}." for s in range(4)},
    r"^backbone\.patch_embed\.projection\.": f"{ENCODER}embeddings.patch_embeddings.projection.",
    r"^backbone\.patch_embed\.norm\.": f"{ENCODER}embeddings.norm.",
    r"^backbone\.stages\.": f"{ENCODER}encoder.layers.",
    r"\.norm1\.": ".layernorm_before.",
    r"\.norm2\.": ".layernorm_after.",
    r"\.attn\.w_msa\.proj\.": ".attention.output.dense.",
    r"\.attn\.w_msa\.": ".attention.self.",
    r"\.ffn\.layers\.0\.0\.": ".intermediate.dense.",
    r"\.ffn\.layers\.1\.": ".output.dense.",
    r"^panoptic_head\.pixel_decoder\.": DECODER,
    r"\.input_convs\.(\d)\.": r".input_projections.\1.",
    r"\.lateral_convs\.0\.": ".adapter_1.",
    r"\.output_convs\.0\.": ".layer_1.",
    r"\.conv\.": ".0.",
    r"\.gn\.": ".1.",
    r"\.level_encoding\.weight$": ".level_embed",
    r"\.mask_feature\.": ".mask_projection.",
    r"^panoptic_head\.transformer_decoder\.": f"{TRANSFORMER}decoder.",
    r"\.post_norm\.": ".layernorm.",
    # Self-attention is the first of two in the pixel decoder, the second in the transformer's.
    r"(transformer_module.*)\.attentions\.0\.attn\.": r"\1.cross_attn.",
    r"(transformer_module.*)\.attentions\.1\.attn\.": r"\1.self_attn.",
    r"(transformer_module.*)\.norms\.0\.": r"\1.cross_attn_layer_norm.",
    r"(transformer_module.*)\.norms\.1\.": r"\1.self_attn_layer_norm.",
    r"(transformer_module.*)\.norms\.2\.": r"\1.final_layer_norm.",
    r"\.attentions\.0\.": ".self_attn.",
    r"\.norms\.0\.": ".self_attn_layer_norm.",
    r"\.norms\.1\.": ".final_layer_norm.",
    r"\.ffns\.0\.layers\.0\.0\.": ".fc1.",
    r"\.ffns\.0\.layers\.1\.": ".fc2.",
    r"^panoptic_head\.query_embed\.": f"{TRANSFORMER}queries_embedder.",
    r"^panoptic_head\.query_feat\.": f"{TRANSFORMER}queries_features.",
    r"^panoptic_head\.level_embed\.": f"{TRANSFORMER}level_embed.",
    r"^panoptic_head\.cls_embed\.": "class_predictor.",
    **{
        rf"^panoptic_head\.mask_embed\.{2 * i}\.": (
            f"{TRANSFORMER}decoder.mask_predictor.mask_embedder.{i}.0."
        )
        for i in range(3)
    },
}
"""From OpenMMLab's names to those of transformers' checkpoints, one after the other."""


NAMED_SUM = r"-([0-9a-f]{8})\.pth$"
"""How OpenMMLab's files end: with the digits that their SHA-256 begins with."""


def is_openmmlab(path: str) -> bool:
    """Whether a detector's path means a file, as OpenMMLab's are, and not a folder or hub id."""
    return path.endswith(".pth") or Path(path).expanduser().is_file()


def is_official(path: str) -> bool:
    """Whether a path is the very file that GenEval's evaluation downloads."""
    file = Path(path).expanduser()
    return file.is_file() and _sha256(file).startswith(OFFICIAL_SHA256)


@functools.cache
def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def load_openmmlab(
    path: str, *, device: torch.device | str, ignore_keys: str
) -> Mask2FormerForUniversalSegmentation:
    """The model with the weights of a file of MMDetection 2.x; sizes are read off its tensors.

    Another file, one that is not what its name says, a tensor that is missing or one too many is a
    `WeightsError`. Whether the patch merging of a file was permuted before cannot be told.
    """
    tensors = _read(Path(path).expanduser())
    with refused(f"{path}: is not a Mask2Former of OpenMMLab"):
        config = _config(tensors)
    return load_model(
        Mask2FormerForUniversalSegmentation,
        path,
        device=device,
        ignore_keys=ignore_keys,
        config=config,
        state_dict=from_openmmlab(tensors),
    )


def from_openmmlab(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as transformers' checkpoints have them; unknown names stay as they are."""
    ours: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if ".downsample." in name:
            ours[name] = _crop_major(tensor)
            continue
        pattern = next((p for p in THIRDS if re.search(p, name)), None)
        if pattern is None:
            ours[name] = tensor
            continue
        before, kind, _ = re.split(pattern, name)
        head, choices, tail = re.split("[{}]", THIRDS[pattern])
        for part, third in zip(choices.split(","), tensor.tensor_split(3), strict=True):
            ours[f"{before}{head}{part}{tail}.{kind}"] = third
    return rename(ours, NAMES)


def _crop_major(tensor: Tensor) -> Tensor:
    """The last axis of a patch merging, from 4 neighbours per channel to channels per neighbour.

    OpenMMLab unfolds squares of 2 x 2 row by row, transformers puts crops side by side, of which
    the second lies below the first. Loaded as it is, it would fit and say something else.
    """
    by_channel = tensor.unflatten(-1, (-1, 4))
    return by_channel[..., (0, 2, 1, 3)].transpose(-1, -2).flatten(-2)


def fitted_size(height: int, width: int, *, shortest: int, longest: int) -> tuple[int, int]:
    """Height and width after scaling to fit within both sides, as MMCV rounds them."""
    scale = min(longest / max(height, width), shortest / min(height, width))
    return int(height * scale + 0.5), int(width * scale + 0.5)


def openmmlab_pixels(
    images_NHWC: Tensor, *, shortest: int, longest: int, device: torch.device | str
) -> tuple[Tensor, tuple[int, int]]:
    """pixels_NCXY as MMDetection 2.x makes them, and the size of the image in their upper left.

    Bilinear without a filter against aliasing, to within one grey level of OpenCV; then padded with
    grey, then normalised.
    """
    size = fitted_size(*images_NHWC.shape[1:3], shortest=shortest, longest=longest)
    x_NCHW = images_NHWC.to(device).movedim(-1, 1).float()
    resized = interpolate(x_NCHW, size=size, mode="bilinear", align_corners=False).round()
    height, width = size
    padded = pad(resized, (0, -width % STRIDE, 0, -height % STRIDE), value=GREY)
    return normalize(padded, IMAGENET_MEAN, IMAGENET_STD), size


def _read(file: Path) -> dict[str, Tensor]:
    """The tensors of a file of MMDetection 2.x."""
    if not file.is_file():
        raise WeightsError(f"{file}: no such file; get {WEIGHTS_URL}")
    named = re.search(NAMED_SUM, file.name)
    if named and not _sha256(file).startswith(named[1]):
        raise WeightsError(
            f"{file}: is damaged or converted, for its SHA-256 does not begin with {named[1]}, as "
            f"its name says; get {WEIGHTS_URL}, or give another file another name"
        )
    try:
        tensors = read_tensors(file, entry="state_dict")
    except WeightsError as error:
        held = re.search(r"GLOBAL ([\w.]+)", str(error.__cause__))
        if not isinstance(error.__cause__, pickle.UnpicklingError) or held is None:
            raise
        raise WeightsError(
            f"{file}: holds a {held[1]} beside its tensors, which is not read from a file of "
            "unknown origin; if you trust it, save its state_dict alone: torch.save({'state_dict': "
            "torch.load(FILE, weights_only=False)['state_dict']}, NEW)"
        ) from error
    if any(".self_attn." in name for name in tensors):
        raise WeightsError(
            f"{file}: is of MMDetection 3, whose detector pads its images otherwise; get that of "
            f"version 2, which GenEval uses: {WEIGHTS_URL}"
        )
    return tensors


def _config(tensors: Mapping[str, Tensor]) -> Mask2FormerConfig:
    """The sizes of the model; a tensor that tells one and is missing is a KeyError."""

    def size(name: str, axis: int = 0) -> int:
        return tensors[name].shape[axis]

    def count(pattern: str) -> int:
        return len({match[1] for name in tensors if (match := re.match(pattern, name))})

    stages = range(NUM_STAGES)
    attention = "backbone.stages.{}.blocks.0.attn.w_msa.relative_position_bias_table"
    pixel_layer = "panoptic_head.pixel_decoder.encoder.layers.0."
    layer = "panoptic_head.transformer_decoder.layers.0."
    width = size("backbone.patch_embed.projection.weight")
    hidden = size("panoptic_head.query_feat.weight", 1)
    outputs: dict[str, Any] = {"out_features": [f"stage{stage + 1}" for stage in stages]}
    labels: dict[str, Any] = {"num_labels": size("panoptic_head.cls_embed.weight") - 1}
    backbone = SwinConfig(
        embed_dim=width,
        depths=[count(rf"backbone\.stages\.{stage}\.blocks\.(\d+)\.") for stage in stages],
        num_heads=[size(attention.format(stage), 1) for stage in stages],
        window_size=(math.isqrt(size(attention.format(0))) + 1) // 2,
        mlp_ratio=size("backbone.stages.0.blocks.0.ffn.layers.0.0.weight") / width,
        patch_size=size("backbone.patch_embed.projection.weight", -1),
        **outputs,
    )
    offsets = size(f"{pixel_layer}attentions.0.sampling_offsets.weight")
    return Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=hidden,
        hidden_dim=hidden,
        mask_feature_size=size("panoptic_head.pixel_decoder.mask_feature.weight"),
        encoder_layers=count(r"panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)\."),
        encoder_feedforward_dim=size(f"{pixel_layer}ffns.0.layers.0.0.weight"),
        # transformers counts the prediction before the first layer too.
        decoder_layers=count(r"panoptic_head\.transformer_decoder\.layers\.(\d+)\.") + 1,
        dim_feedforward=size(f"{layer}ffns.0.layers.0.0.weight"),
        num_attention_heads=offsets // (NUM_LEVELS * NUM_POINTS * 2),
        num_queries=size("panoptic_head.query_feat.weight"),
        **labels,
    )
