"""CLIP: unit vectors of images and texts, and how near they are.

Shape suffixes: N images, M texts, H x W pixels, C colour channels, X x X pixels after resizing,
D joint width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize, pad
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from stage_rl.rewards import pixels as preprocessing
from stage_rl.rewards.conversion import fill, find_file, read_tensors
from stage_rl.rewards.open_clip import from_open_clip
from stage_rl.rewards.pixels import CLIP_MEAN, CLIP_STD
from stage_rl.rewards.tiny import TINY, tiny_clip, tiny_clip_tokenizer
from stage_rl.rewards.weights import load_model, load_part

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
