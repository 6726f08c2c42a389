"""CLIP: unit vectors of images and texts, and how near they are.

Shape suffixes: N images, M texts, H x W pixels, C colour channels, X x X pixels after resizing,
D joint width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize, pad
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from stage_rl.errors import WeightsError
from stage_rl.rewards import pretrained as preprocessing
from stage_rl.rewards.base import ReferenceCase, Reward, RewardConfig, Score
from stage_rl.rewards.pretrained import (
    CLIP_MEAN,
    CLIP_STD,
    TINY,
    AffineHead,
    Names,
    ScorerConfig,
    fill,
    fill_part,
    find_file,
    load_model,
    load_part,
    read_tensors,
    rename,
)
from stage_rl.rewards.tiny import random_model, tiny_clip, tiny_clip_tokenizer
from stage_rl.settings import Count
from stage_rl.types import Prompt

Preprocess = Callable[[Tensor, int], Tensor]
"""From images_NHWC uint8 and a side in pixels to pixels_NCXX on the CPU."""


def clip_pixels(images_NHWC: Tensor, side: int) -> Tensor:
    """pixels_NCXX as CLIP was trained: shortest side by bicubic, middle square, CLIP's scale."""
    return preprocessing.clip_pixels(images_NHWC, side, device="cpu")


def fitted_pixels(images_NHWC: Tensor, side: int) -> Tensor:
    """pixels_NCXX as HPSv2 was trained: longest side by bicubic, the rest black.

    The filter works on numbers in [0, 1] and may leave that range a little.
    """
    x_NCHW = images_NHWC.cpu().permute(0, 3, 1, 2).float() / 255
    height, width = x_NCHW.shape[-2:]
    scale = side / max(height, width)
    new_height, new_width = round(height * scale), round(width * scale)
    if scale != 1:
        x_NCHW = interpolate(
            x_NCHW,
            size=(new_height, new_width),
            mode="bicubic",
            align_corners=False,
            antialias=True,
        )
    down, across = side - new_height, side - new_width
    edges = (across // 2, across - across // 2, down // 2, down - down // 2)
    return preprocessing.normalize(pad(x_NCHW, edges) * 255, CLIP_MEAN, CLIP_STD)


class Clip:
    """The two towers of a CLIP with its tokenizer. Vectors are fp32 and of length 1."""

    def __init__(self, module: CLIPModel, tokenizer: CLIPTokenizer, *, batch_size: int) -> None:
        self._module: Any = module
        self._tokenizer: Any = tokenizer
        self._batch_size = batch_size
        self.side: int = self._module.config.vision_config.image_size
        self.width: int = self._module.config.projection_dim
        self._max_length: int = self._module.config.text_config.max_position_embeddings

    @property
    def scale(self) -> float:
        """What CLIP multiplies a cosine by."""
        return self._module.logit_scale.exp().item()

    def images_ND(self, images_NHWC: Tensor, preprocess: Preprocess = clip_pixels) -> Tensor:
        """One vector per image (uint8), on the model's device."""
        chunks = images_NHWC.split(self._batch_size)
        return torch.cat([self.pixels_ND(preprocess(images, self.side)) for images in chunks])

    @torch.inference_mode()
    def pixels_ND(self, pixels_NCXX: Tensor) -> Tensor:
        """One vector per image that is preprocessed already."""
        chunks = []
        for pixels in pixels_NCXX.split(self._batch_size):
            pixel_values = pixels.to(self._module.device, self._module.dtype)
            vectors = self._module.get_image_features(pixel_values=pixel_values).pooler_output
            chunks.append(normalize(vectors.float(), dim=-1))
        return torch.cat(chunks)

    @torch.inference_mode()
    def texts_MD(self, texts: Sequence[str]) -> Tensor:
        """One vector per text, cut to the model's length with the end of text kept."""
        chunks = []
        for first in range(0, len(texts), self._batch_size):
            tokens = self._tokenizer(
                list(texts[first : first + self._batch_size]),
                padding="max_length",
                max_length=self._max_length,
                truncation=True,
                return_tensors="pt",
            )
            # No mask: what follows the end of text is never attended.
            ids = tokens["input_ids"].to(self._module.device)
            vectors = self._module.get_text_features(input_ids=ids).pooler_output
            chunks.append(normalize(vectors.float(), dim=-1))
        return torch.cat(chunks)

    def cosines_N(
        self, images_NHWC: Tensor, texts: Sequence[str], preprocess: Preprocess = clip_pixels
    ) -> Tensor:
        """The cosine of each image with its own text; texts that repeat are encoded once."""
        assert len(images_NHWC) == len(texts)
        place = {text: m for m, text in enumerate(dict.fromkeys(texts))}
        texts_ND = self.texts_MD(list(place))[[place[text] for text in texts]]
        return (self.images_ND(images_NHWC, preprocess) * texts_ND).sum(-1)


def load_clip(
    path: str,
    *,
    tokenizer: str | None = None,
    dtype: str = "float32",
    device: torch.device | str = "cpu",
    batch_size: int = 32,
) -> Clip:
    """A CLIP in transformers' layout from a folder or hub id, `tiny`: random weights.

    `tokenizer` is where its tokenizer lies where that is not beside the weights.
    """
    if path == TINY:
        module = tiny_clip()
        nn.Module.to(module, device)
        return Clip(module, tiny_clip_tokenizer(), batch_size=batch_size)
    module = load_model(CLIPModel, path, dtype=dtype, device=device)
    words = _tokenizer(tokenizer or path)
    # Older configurations name another end of text; the library then looks for the highest id.
    module.text_model.eos_token_id = words.eos_token_id
    return Clip(module, words, batch_size=batch_size)


def load_open_clip(
    path: str,
    *,
    file: str,
    base: str,
    dtype: str = "float32",
    device: torch.device | str = "cpu",
    batch_size: int = 32,
) -> Clip:
    """A CLIP whose weights are a file in open_clip's layout, below `state_dict`.

    Sizes and tokenizer are those of `base`, a folder or hub id in transformers' layout.
    """
    weights = find_file(path, file)
    config: Any = load_part(CLIPConfig.from_pretrained, base, "the configuration")
    tokenizer = _tokenizer(base)
    config.text_config.eos_token_id = tokenizer.eos_token_id
    tensors = read_tensors(weights, entry="state_dict")
    converted = from_open_clip(tensors, config, source=f"{path}/{file}")
    module = fill(CLIPModel, config, converted, source=f"{path}/{file}", dtype=dtype, device=device)
    return Clip(module, tokenizer, batch_size=batch_size)


def _tokenizer(path: str) -> CLIPTokenizer:
    return load_part(CLIPTokenizer.from_pretrained, path, "the tokenizer")


# CLIP weights in open_clip's layout, for transformers' CLIPModel.


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


# Rewards that are a cosine of CLIP: HPSv2.1, PickScore and the plain CLIP score.
#
# Shape suffixes: N images, H x W pixels, C colour channels.


@dataclass(frozen=True)
class CosineReward:
    """The cosine of image and prompt times a factor."""

    clip: Clip
    preprocess: Preprocess = clip_pixels
    factor: float = 1.0

    def __call__(self, images_NHWC: Tensor, prompts: list[Prompt]) -> list[Score]:
        """One score per image; a prompt is encoded once, however many images it has."""
        cosines_N = self.clip.cosines_N(
            images_NHWC, [prompt.text for prompt in prompts], self.preprocess
        )
        return [
            Score(self.factor * cosine, f"cosine {cosine:.4f} with the prompt")
            for cosine in cosines_N.tolist()
        ]


# LAION's improved aesthetic predictor, version 2: how well people would rate an image, 1 to 10.
#
# The head was trained on CLIP ViT-L/14 vectors of length 1; it gives other numbers for longer
# ones.
#
# Shape suffixes: N images, H x W pixels, C colour channels.


@dataclass(frozen=True)
class AestheticReward:
    """The predicted rating; the prompt plays no part."""

    clip: Clip
    head: AffineHead

    @torch.inference_mode()
    def __call__(self, images_NHWC: Tensor, prompts: list[Prompt]) -> list[Score]:
        """One score per image."""
        ratings = self.head(self.clip.images_ND(images_NHWC)).tolist()
        return [Score(rating, f"rated {rating:.2f} of 10") for rating in ratings]


def load_head(path: str, *, width: int, device: torch.device | str = "cpu") -> AffineHead:
    """The head for vectors of a width from a published .pth file; `tiny`: random weights."""
    if path == TINY:
        head = random_model(lambda: AffineHead(width), scale=4.0)
    else:
        file = Path(path).expanduser()
        if not file.is_file():
            raise WeightsError(
                f"{path}: no such file; write the path of sac+logos+ava1-l14-linearMSE.pth from "
                "github.com/christophschuhmann/improved-aesthetic-predictor"
            )
        head = AffineHead(width)
        fill_part(head, read_tensors(file), source=path)
    nn.Module.to(head, device)
    return head


# How much the images of one prompt differ from each other, to CLIP.
#
# Shape suffixes: N images, H x W pixels, C colour channels, G images of a prompt, D width.


@dataclass(frozen=True)
class VarietyReward:
    """1 - cosine of an image to the others of its prompt, in the mean over them.

    The mean over a prompt's images is that over its pairs. Each call needs all images of a prompt;
    to an image without others the reward does not apply.
    """

    clip: Clip

    def __call__(self, images_NHWC: Tensor, prompts: list[Prompt]) -> list[Score]:
        """One score per image, in [0, 2]."""
        vectors_ND = self.clip.images_ND(images_NHWC)
        groups: dict[int, list[int]] = {}
        for place, prompt in enumerate(prompts):
            groups.setdefault(prompt.index, []).append(place)
        scores = [Score(None, "no other image of its prompt")] * len(prompts)
        for places in groups.values():
            if len(places) > 1:
                for place, distance in zip(places, _distances(vectors_ND[places]), strict=True):
                    scores[place] = Score(distance, f"{distance:.3f} from the others")
        return scores


def _distances(vectors_GD: Tensor) -> list[float]:
    """Of each unit vector, 1 - the mean cosine to the others."""
    cosine_GG = vectors_GD @ vectors_GD.T
    others_G = (cosine_GG.sum(1) - cosine_GG.diagonal()) / (len(vectors_GD) - 1)
    return (1 - others_G).tolist()


# What a recipe says of the rewards that are one published model.


CLIP_H14 = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
"""The CLIP that HPSv2.1 and PickScore were tuned from."""

CLIP_L14 = "openai/clip-vit-large-patch14"


class ClipScorerConfig(ScorerConfig):
    """Base of the rewards that are a cosine of CLIP."""

    # In bfloat16 cosines of one group would be equal: their spread is about 0.01.
    dtype: Literal["float32", "float16"] = "float32"
    """Precision of the towers."""

    @abstractmethod
    def load(self, device: torch.device) -> Clip:
        """The model that the cosine is taken with."""


class HpsConfig(ClipScorerConfig):
    """HPSv2.1: the cosine of a CLIP tuned on human preference, about 0.2 to 0.35."""

    path: str = "xswu/HPSv2"
    """Folder or hub id with the weights' file; tiny: random ones, whose scores mean nothing."""
    file: str = "HPS_v2.1_compressed.pt"
    """The weights in open_clip's layout. Those of version 2.0 give other numbers."""
    base: str = CLIP_H14
    """Folder or hub id of the CLIP that gives sizes and tokenizer."""

    def load(self, device: torch.device) -> Clip:
        """The tuned CLIP."""

        if self.path == TINY:
            return load_clip(TINY, device=device, batch_size=self.batch_size)
        return load_open_clip(
            self.path,
            file=self.file,
            base=self.base,
            dtype=self.dtype,
            device=device,
            batch_size=self.batch_size,
        )

    def build_scorer(self, device: torch.device) -> Reward:
        """The plain cosine; reports multiply it by 100."""

        return CosineReward(self.load(device), fitted_pixels)


class PickScoreConfig(ClipScorerConfig):
    """PickScore: the scaled cosine of a CLIP tuned on choices of users, about 17 to 24."""

    path: str = "yuvalkirstain/PickScore_v1"
    tokenizer: str = CLIP_H14
    """Folder or hub id of the tokenizer."""

    def load(self, device: torch.device) -> Clip:
        """The tuned CLIP."""

        return load_clip(
            self.path,
            tokenizer=self.tokenizer,
            dtype=self.dtype,
            device=device,
            batch_size=self.batch_size,
        )

    def build_scorer(self, device: torch.device) -> Reward:
        """The cosine times the model's own scale; Flow-GRPO divides it by 26."""

        clip = self.load(device)
        return CosineReward(clip, factor=clip.scale)


class ClipScoreConfig(ClipScorerConfig):
    """The plain cosine of CLIP, as T2I-CompBench takes it: neither scaled nor clipped."""

    path: str = "openai/clip-vit-base-patch32"

    def load(self, device: torch.device) -> Clip:
        """The CLIP."""

        return load_clip(self.path, dtype=self.dtype, device=device, batch_size=self.batch_size)

    def build_scorer(self, device: torch.device) -> Reward:
        """The cosine."""

        return CosineReward(self.load(device))


class AestheticConfig(ClipScorerConfig):
    """LAION's improved aesthetic predictor on CLIP ViT-L/14, about 4 to 7; ignores the prompt."""

    path: str = CLIP_L14
    """Folder or hub id of the CLIP; tiny: random weights, which want a tiny head too."""
    head: str
    """The file sac+logos+ava1-l14-linearMSE.pth, or tiny for random weights."""

    def load(self, device: torch.device) -> Clip:
        """The CLIP."""

        return load_clip(self.path, dtype=self.dtype, device=device, batch_size=self.batch_size)

    def build_scorer(self, device: torch.device) -> Reward:
        """The rating of the head on CLIP's vectors."""

        clip = self.load(device)
        return AestheticReward(clip, load_head(self.head, width=clip.width, device=device))

    def reference_cases(self) -> tuple[ReferenceCase, ...]:
        """A photograph against noise; none for random weights."""
        from stage_rl.rewards.selftest import photograph_cases

        return () if TINY in (self.path, self.head) else photograph_cases()


class VarietyConfig(RewardConfig):
    """How much the images of a prompt differ, by CLIP's image vectors."""

    whole_groups: ClassVar[bool] = True

    path: str = CLIP_L14
    """Folder or hub id of the CLIP; tiny: random weights, for smoke runs."""
    batch_size: Count = 32
    """Images at a time."""

    def build(self, device: torch.device) -> Reward:
        """The reward with its weights on a device."""

        return VarietyReward(load_clip(self.path, device=device, batch_size=self.batch_size))
