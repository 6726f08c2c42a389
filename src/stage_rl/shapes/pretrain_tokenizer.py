"""Trains the VQ tokenizer of the shapes world.

The codebook lives on the unit sphere, as `get_codebook_entry` of transformers reads it, and follows
the encoder by moving averages; codes that fall out of use are put back where the encoder is.

Shape suffixes: N images, C channels, H x W pixels or grid cells, V codebook, M = N x H x W vectors.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from stage_rl.shapes.scenes import CUT_OFF, coverage, random_scene, render


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


class SphereCodebook:
    """Unit codebook vectors that follow their assigned encoder outputs."""

    def __init__(self, vectors_VC: Tensor, decay: float) -> None:
        self.vectors_VC = vectors_VC
        self.sums_VC = vectors_VC.clone()
        self.counts_V = torch.ones(len(vectors_VC))
        self.decay = decay

    def assign(self, unit_MC: Tensor) -> Tensor:
        """The nearest code of each vector."""
        return (unit_MC @ self.vectors_VC.T).argmax(1)

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

    def state(self) -> dict[str, Tensor]:
        """What a resumed training needs."""
        return {"vectors": self.vectors_VC, "sums": self.sums_VC, "counts": self.counts_V}

    def load(self, state: dict[str, Tensor]) -> None:
        """Takes over a saved state."""
        self.vectors_VC.copy_(state["vectors"])
        self.sums_VC.copy_(state["sums"])
        self.counts_V.copy_(state["counts"])


def unit_codes(vq: Any, images_NCHW: Tensor) -> Tensor:
    """The encoder's output on the unit sphere, NCHW."""
    return F.normalize(vq.quant_conv(vq.encoder(images_NCHW)), dim=1)


def to_pixels(images_NHWC: np.ndarray) -> Tensor:
    """uint8 images as the tokenizer reads them: NCHW in [-1, 1], channels last in memory."""
    pixels = torch.from_numpy(images_NHWC).permute(0, 3, 1, 2).float() / 127.5 - 1
    return pixels.contiguous(memory_format=torch.channels_last)


def training_batch(seed: int, step: int, batch: int) -> tuple[Tensor, Tensor]:
    """Images NCHW in [-1, 1] and the part of each pixel that objects cover, N1HW."""
    rng = np.random.Generator(np.random.Philox(key=[seed, step]))
    scenes = [random_scene(rng, cut_off=CUT_OFF) for _ in range(batch)]
    masks = [np.max([coverage(thing) > 0 for thing in scene.objects], axis=0) for scene in scenes]
    return to_pixels(render(scenes)), torch.from_numpy(np.stack(masks)).float()[:, None]


def reconstruction_loss(pixels: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Weighted L1 + L2."""
    difference = pixels - target
    return (weight * (difference.abs() + difference.square())).sum() / weight.sum() / 3


def train_tokenizer(
    vq: Any,
    training: TokenizerTraining,
    *,
    seed: int,
    state_file: Path,
    report: Callable[[str], None],
    save_every: int = 250,
) -> None:
    """Trains `vq` (a JanusVQVAE) in place; continues from `state_file` when it exists."""
    vq.to(memory_format=torch.channels_last).train()
    codebook = SphereCodebook(F.normalize(vq.quantize.embedding.weight.data, dim=1), training.decay)
    parameters = [p for n, p in vq.named_parameters() if not n.startswith("quantize")]
    optimizer = torch.optim.AdamW(parameters, lr=training.lr, betas=(0.9, 0.95), weight_decay=0.01)
    first = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        vq.load_state_dict(state["vq"])
        optimizer.load_state_dict(state["optimizer"])
        codebook.load(state["codebook"])
        first = state["step"]
    progress = Progress("tokenizer", training.steps, first=first, every=100, report=report)
    for step in range(first, training.steps):
        loss = _step(vq, codebook, optimizer, training, seed=seed, step=step)
        done = step + 1
        progress.show(done, f"{loss} codes {int((codebook.counts_V > 0.05).sum())}")
        if done % save_every == 0 or done == training.steps:
            vq.quantize.embedding.weight.data.copy_(codebook.vectors_VC)
            save_state(
                state_file,
                {
                    "vq": vq.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "codebook": codebook.state(),
                    "step": done,
                },
            )
    # Gradients left behind would count when the next stage clips those of the whole model.
    vq.eval().zero_grad()


def _step(
    vq: Any,
    codebook: SphereCodebook,
    optimizer: torch.optim.Optimizer,
    training: TokenizerTraining,
    *,
    seed: int,
    step: int,
) -> str:
    images, mask = training_batch(seed, step, training.batch)
    frozen = step >= training.steps - training.decoder_steps
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    with torch.set_grad_enabled(not frozen):
        unit = unit_codes(vq, images)
    unit_MC = unit.permute(0, 2, 3, 1).reshape(-1, unit.shape[1])
    flat = unit_MC.detach()
    if step == training.quantize_from:
        start = torch.randperm(len(flat), generator=generator)[: len(codebook.counts_V)]
        repeats = -(-len(codebook.counts_V) // len(start))
        codebook.sums_VC.copy_(flat[start.repeat(repeats)[: len(codebook.counts_V)]])
        codebook.vectors_VC.copy_(codebook.sums_VC)
    latents, commitment = unit, torch.zeros(())
    if step >= training.quantize_from:
        tokens_M = codebook.assign(flat)
        codes_MC = codebook.vectors_VC[tokens_M]
        if not frozen:
            codebook.update(flat, tokens_M, generator)
        commitment = (unit_MC - codes_MC).square().sum(1).mean()
        codes = codes_MC.view(*unit.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
        latents = unit + (codes - unit).detach()
    pixels = vq.decoder(vq.post_quant_conv(latents))
    weight = 1 + training.object_weight * mask
    reconstruction = reconstruction_loss(pixels, images, weight)
    loss = reconstruction + training.commitment * commitment
    rate = learning_rate(
        step, steps=training.steps, warmup_steps=training.warmup_steps, peak=training.lr
    )
    set_rate(optimizer, rate)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(vq.parameters(), 1.0)
    optimizer.step()
    return f"reconstruction {reconstruction.item():.4f} commitment {commitment.item():.4f}"


# What the stages of pretraining share: the course of the rate, progress, states that survive.


def learning_rate(step: int, *, steps: int, warmup_steps: int, peak: float) -> float:
    """Linear warm-up, then a cosine down to a fiftieth of the peak."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Gives every parameter of an optimizer the same learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Writes beside the target and renames, so that a stop leaves the old or the new file."""
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


class Progress:
    """Says every `every` steps how far a stage is, and at what pace."""

    def __init__(
        self, stage: str, steps: int, *, first: int, every: int, report: Callable[[str], None]
    ) -> None:
        self.stage, self.steps, self.every, self.report = stage, steps, every, report
        self._started, self._shown = time.monotonic(), first
        if first:
            report(f"{stage}: continues at step {first}")

    def show(self, done: int, note: str) -> None:
        """After step `done`; `note` says how good the stage is."""
        if done % self.every:
            return
        pace_s = (time.monotonic() - self._started) / (done - self._shown)
        left_min = pace_s * (self.steps - done) / 60
        self.report(
            f"{self.stage}: step {done}/{self.steps}, {pace_s:.2f} s/step, "
            f"{left_min:.1f} min left, {note}"
        )
        self._started, self._shown = time.monotonic(), done
