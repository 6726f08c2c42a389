"""Trains the VQ tokenizer of the shapes world.

The codebook lives on the unit sphere, as `get_codebook_entry` of transformers reads it, and follows
the encoder by moving averages; codes that fall out of use are put back where the encoder is.

Shape suffixes: N images, C channels, H x W pixels or grid cells, V codebook, M = N x H x W vectors,
T = H x W image tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stage_rl.shapes.pretrain_stage import train_stage
from stage_rl.shapes.scenes import CUT_OFF, coverage, random_scene, render
from stage_rl.training.optim import apply_gradient


@dataclass(frozen=True)
class TokenizerTraining:
    """How long and how fast the tokenizer is trained."""

    steps: int = 6000
    batch: int = 32
    lr: float = 1e-3
    warmup_steps: int = 100
    quantize_from: int = 150
    """First step that decodes from the codebook; before it the autoencoder is continuous."""
    decoder_steps: int = 1000
    """The last steps train the decoder alone, so that the tokens of an image no longer change."""
    object_weight: float = 3.0
    """Extra weight of the pixels that an object covers."""
    commitment: float = 0.25
    decay: float = 0.98
    """Of the moving averages behind the codebook."""


def train_tokenizer(vq: Any, training: TokenizerTraining, *, seed: int, state_file: Path) -> None:
    """Trains `vq` (a JanusVQVAE) in place; continues from `state_file` when it exists."""
    vq.to(memory_format=torch.channels_last).train()
    vectors_VC = vq.quantize.embedding.weight.data
    codebook = SphereCodebook(F.normalize(vectors_VC, dim=1), training.decay)
    parameters = [p for n, p in vq.named_parameters() if not n.startswith("quantize")]
    optimizer = torch.optim.AdamW(parameters, lr=training.lr, betas=(0.9, 0.95), weight_decay=0.01)

    def train_step(step: int, rate: float) -> str:
        reconstruction, commitment = _losses(vq, codebook, training, seed=seed, step=step)
        (reconstruction + training.commitment * commitment).backward()
        apply_gradient(optimizer, rate=rate, max_grad_norm=1.0)
        vectors_VC.copy_(codebook.vectors_VC)
        codes = int((codebook.counts_V > 0.05).sum())
        return f"reconstruction {reconstruction:.4f} commitment {commitment:.4f} codes {codes}"

    train_stage(
        state_file,
        {"vq": vq, "optimizer": optimizer, "codebook": codebook},
        train_step,
        steps=training.steps,
        lr=training.lr,
        warmup_steps=training.warmup_steps,
    )
    vq.eval()


@torch.inference_mode()
def tokenize(vq: Any, images_NHWC: np.ndarray) -> Tensor:
    """The tokens of images, NT."""
    codebook_VC = F.normalize(vq.quantize.embedding.weight, dim=1)
    unit_NHWC = _unit_codes(vq, to_pixels(images_NHWC).to(codebook_VC.device)).permute(0, 2, 3, 1)
    return (unit_NHWC.flatten(0, 2) @ codebook_VC.T).argmax(1).view(len(unit_NHWC), -1)


def to_pixels(images_NHWC: np.ndarray) -> Tensor:
    """uint8 images as the tokenizer reads them: NCHW in [-1, 1], channels last in memory."""
    pixels = torch.from_numpy(images_NHWC).permute(0, 3, 1, 2).float() / 127.5 - 1
    return pixels.contiguous(memory_format=torch.channels_last)


class SphereCodebook(nn.Module):
    """Unit codebook vectors that follow their assigned encoder outputs."""

    vectors_VC: Tensor
    sums_VC: Tensor
    counts_V: Tensor

    def __init__(self, vectors_VC: Tensor, decay: float) -> None:
        super().__init__()
        self.register_buffer("vectors_VC", vectors_VC)
        self.register_buffer("sums_VC", vectors_VC.clone())
        self.register_buffer("counts_V", torch.ones(len(vectors_VC)))
        self.decay = decay

    def restart(self, unit_MC: Tensor, generator: torch.Generator) -> None:
        """Puts every code on an encoder output, on some of them twice where there are too few."""
        size = len(self.counts_V)
        start = torch.randperm(len(unit_MC), generator=generator)[:size]
        repeats = -(-size // len(start))
        self.sums_VC.copy_(unit_MC[start.repeat(repeats)[:size]])
        self.vectors_VC.copy_(self.sums_VC)

    def update(self, unit_MC: Tensor, tokens_M: Tensor, generator: torch.Generator) -> None:
        """Moves the codes towards what was assigned to them and revives unused ones."""
        counts = torch.bincount(tokens_M, minlength=len(self.counts_V)).float()
        sums = torch.zeros_like(self.sums_VC).index_add_(0, tokens_M, unit_MC)
        self.counts_V.mul_(self.decay).add_(counts, alpha=1 - self.decay)
        self.sums_VC.mul_(self.decay).add_(sums, alpha=1 - self.decay)
        dead = (self.counts_V < 0.02).nonzero().squeeze(1)
        if len(dead):
            fresh = torch.randint(len(unit_MC), (len(dead),), generator=generator)
            self.sums_VC[dead] = unit_MC[fresh]
            self.counts_V[dead] = 1.0
        self.vectors_VC.copy_(F.normalize(self.sums_VC, dim=1))


def _losses(
    vq: Any, codebook: SphereCodebook, training: TokenizerTraining, *, seed: int, step: int
) -> tuple[Tensor, Tensor]:
    """Of a step: the weighted reconstruction error, L1 + L2, and the commitment loss."""
    images_NCHW, mask_N1HW = _batch(seed, step, training.batch)
    frozen = step >= training.steps - training.decoder_steps
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    with torch.set_grad_enabled(not frozen):
        unit_NCHW = _unit_codes(vq, images_NCHW)
    unit_NHWC = unit_NCHW.permute(0, 2, 3, 1)
    unit_MC = unit_NHWC.reshape(-1, unit_NCHW.shape[1])
    if step == training.quantize_from:
        codebook.restart(unit_MC.detach(), generator)
    latents, commitment = unit_NCHW, torch.zeros(())
    if step >= training.quantize_from:
        tokens_M = (unit_MC.detach() @ codebook.vectors_VC.T).argmax(1)
        codes_MC = codebook.vectors_VC[tokens_M]
        if not frozen:
            codebook.update(unit_MC.detach(), tokens_M, generator)
        commitment = (unit_MC - codes_MC).square().sum(1).mean()
        codes_NCHW = codes_MC.view(*unit_NHWC.shape).permute(0, 3, 1, 2)
        latents = unit_NCHW + (codes_NCHW - unit_NCHW).detach()
    difference = vq.decoder(vq.post_quant_conv(latents)) - images_NCHW
    weight = 1 + training.object_weight * mask_N1HW
    reconstruction = (weight * (difference.abs() + difference.square())).sum() / weight.sum() / 3
    return reconstruction, commitment


def _batch(seed: int, step: int, size: int) -> tuple[Tensor, Tensor]:
    """Images NCHW in [-1, 1] and the pixels that objects cover, N1HW."""
    rng = np.random.Generator(np.random.Philox(key=[seed, step]))
    scenes = [random_scene(rng, cut_off=CUT_OFF) for _ in range(size)]
    masks = [np.max([coverage(thing) > 0 for thing in scene.objects], axis=0) for scene in scenes]
    return to_pixels(render(scenes)), torch.from_numpy(np.stack(masks)).float()[:, None]


def _unit_codes(vq: Any, images_NCHW: Tensor) -> Tensor:
    """The encoder's output on the unit sphere, NCHW."""
    return F.normalize(vq.quant_conv(vq.encoder(images_NCHW)), dim=1)
