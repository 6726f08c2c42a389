"""Trains the reward's detector on renders of the shapes world.

Shape suffixes: N images, C channels, H x W pixels, Y x X cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from stage_rl.files import replace_file
from stage_rl.shapes.detector import CELL, DetectorNet, DetectorOutput
from stage_rl.shapes.pretrain_stage import train_stage
from stage_rl.shapes.pretrain_tokenizer import to_pixels
from stage_rl.shapes.scenes import COLORS, CUT_OFF, IMAGE_SIZE, SHAPES, Scene, random_scene, render
from stage_rl.training.optim import apply_gradient

BATCH = 64

PEAK_LR = 3e-3


def train_detector(path: Path, *, steps: int, seed: int) -> DetectorNet:
    """Trains a detector and writes its weights in fp16; continues from the .pt file beside."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = DetectorNet()
    optimizer = torch.optim.AdamW(net.parameters(), lr=PEAK_LR)

    def train_step(step: int, rate: float) -> str:
        rng = np.random.Generator(np.random.Philox(key=[seed, 1_000_000 + step]))
        scenes = [random_scene(rng, cut_off=CUT_OFF) for _ in range(BATCH)]
        pixels = to_pixels(render(scenes))
        if rng.uniform() >= 0.5:  # half of the batches are blurred a little, as decoded images are
            blurred = F.avg_pool2d(pixels, 3, 1, 1)
            pixels = torch.lerp(pixels, blurred, float(rng.uniform(0.2, 0.9)))
        loss = detector_loss(net(pixels), *targets(scenes))
        loss.backward()
        apply_gradient(optimizer, rate=rate, max_grad_norm=None)
        return f"loss {loss.item():.4f}"

    parts = {"net": net, "optimizer": optimizer}
    train_stage(
        path.with_suffix(".pt"), parts, train_step, steps=steps, lr=PEAK_LR, warmup_steps=50
    )
    weights = {name: tensor.half().contiguous() for name, tensor in net.state_dict().items()}
    replace_file(path, lambda file: save_file(weights, file))
    return net


def targets(scenes: Sequence[Scene]) -> tuple[Tensor, Tensor]:
    """What the network should say: a centre map (NYX) and, for each whole object, a row of

    image, cell y, cell x, class, colour, and the four sides in tenths of ten pixels.
    """
    center_NYX = torch.zeros(len(scenes), IMAGE_SIZE // CELL, IMAGE_SIZE // CELL)
    rows: list[list[float]] = []
    for n, scene in enumerate(scenes):
        for thing in (thing for thing in scene.objects if thing.whole):
            y, x = thing.y // CELL, thing.x // CELL
            center_NYX[n, y, x] = 1
            x0, y0, x1, y1 = thing.box
            cx, cy = (x + 0.5) * CELL, (y + 0.5) * CELL
            sides = [(cx - x0) / 10, (cy - y0) / 10, (x1 - cx) / 10, (y1 - cy) / 10]
            ids = [n, y, x, SHAPES.index(thing.shape), list(COLORS).index(thing.color)]
            rows.append([*ids, *sides])
    return center_NYX, torch.tensor(rows)


def detector_loss(output: DetectorOutput, center_NYX: Tensor, rows: Tensor) -> Tensor:
    """Cross-entropy of centre, class and colour, L1 of the sides."""
    n, y, x, shape, color = rows[:, :5].long().unbind(1)
    weight = torch.where(center_NYX > 0, 5.0, 1.0)
    center = F.binary_cross_entropy_with_logits(output.object_NYX, center_NYX, weight)
    return (
        10 * center
        + F.cross_entropy(output.shape_NCYX[n, :, y, x], shape)
        + F.cross_entropy(output.color_NCYX[n, :, y, x], color)
        + F.l1_loss(output.sides_NCYX[n, :, y, x], rows[:, 5:])
    )
