"""The image tokenizer that Janus and LlamaGen share: VQ-16, as transformers' `JanusVQVAE`.

Shape suffixes: N images, T image tokens, C codebook channels, H x W pixels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import JanusVQVAE

IMAGES_PER_CHUNK = 32

IMAGES_PER_CHUNK_ON_CPU = 16
"""Images that are decoded at one time; so few stay in a processor's cache."""


@torch.no_grad()
def unit_codes(tokenizer: JanusVQVAE, tokens_NT: Tensor) -> Tensor:
    """The codebook vectors as the image decoder sees them: codes_NTC, fp32, of length 1."""
    return normalize(tokenizer.quantize.embedding(tokens_NT).float(), dim=-1)


@torch.no_grad()
def decode_images(tokenizer: Any, tokens_NT: Tensor) -> Tensor:
    """The images of tokens, images_NHWC uint8 on the CPU."""
    on_cpu = tokenizer.device.type == "cpu"
    chunks = []
    # -1 is black and 1 is white.
    for tokens in tokens_NT.split(IMAGES_PER_CHUNK_ON_CPU if on_cpu else IMAGES_PER_CHUNK):
        pixels = tokenizer.decode(tokens).float().permute(0, 2, 3, 1)
        chunks.append(pixels.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).cpu())
    return torch.cat(chunks)
