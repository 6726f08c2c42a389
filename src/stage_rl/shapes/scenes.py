"""Scenes of coloured shapes and their renderer.

A scene is a soft background (tone, light, texture, clouds) and one to four flat shapes that do not
touch. Shapes stand on whole pixels and have whole radii, backgrounds vary smoothly: there is no
per-pixel noise for a tokenizer to spend its codes on.

Shape suffixes: N scenes, H x W pixels, C colour channels, K templates.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IMAGE_SIZE = 48
RADII = (6, 7, 8, 9, 10)
SIZES = {"small": (6, 7), "large": (9, 10)}
GAP = 2
"""Pixels that stay free between the boxes of two objects."""
TEMPLATE_SIZE = 2 * max(RADII) + 5

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "moon")
COLORS = {
    "red": (0.86, 0.10, 0.12),
    "orange": (0.99, 0.52, 0.03),
    "yellow": (0.98, 0.91, 0.10),
    "green": (0.08, 0.60, 0.18),
    "blue": (0.10, 0.22, 0.86),
    "purple": (0.50, 0.10, 0.66),
    "pink": (1.00, 0.54, 0.78),
    "brown": (0.42, 0.23, 0.08),
    "black": (0.04, 0.04, 0.05),
    "white": (0.99, 0.99, 0.98),
}
TONES = {
    "grey": (0.61, 0.61, 0.61),
    "sand": (0.76, 0.70, 0.58),
    "slate": (0.49, 0.57, 0.66),
    "sage": (0.56, 0.65, 0.53),
}
TEXTURES = ("plain", "striped", "dotted", "wavy")


@dataclass(frozen=True)
class Object:
    """A shape with its colour; centre and radius in pixels."""

    shape: str
    color: str
    x: int
    y: int
    radius: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        """x0, y0, x1, y1 of the square that holds the shape."""
        r = self.radius
        return self.x - r, self.y - r, self.x + r + 1, self.y + r + 1

    @property
    def whole(self) -> bool:
        """Whether the image shows all of it."""
        return min(self.box[:2]) >= 0 and max(self.box[2:]) <= IMAGE_SIZE


@dataclass(frozen=True)
class Background:
    """What the objects of a scene stand on."""

    tone: str
    texture: str
    light_angle: float
    """Direction of the brightness gradient, radians."""
    light: float
    """Half of the brightness difference across the image."""
    phase: tuple[float, float]
    """Offset of the texture, in periods."""
    clouds: tuple[float, ...]
    """Brightness at the 7 x 7 knots of a smooth field."""


@dataclass(frozen=True)
class Scene:
    """What an image shows."""

    objects: tuple[Object, ...]
    background: Background


def _star_edges() -> NDArray[np.float64]:
    angles = np.arange(10) * math.pi / 5 - math.pi / 2
    radii = np.where(np.arange(10) % 2 == 0, 1.08, 0.46)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles) + 0.06], 1)


def _inside_star(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.bool_]:
    inside = np.zeros(x.shape, bool)
    corners = _star_edges()
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, 0), strict=True):
        crosses = (y0 > y) != (y1 > y)
        inside ^= crosses & (x < (x1 - x0) * (y - y0) / (y1 - y0) + x0)
    return inside


def _inside(shape: str, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether points (unit radius, y down) lie in a shape."""
    rho = np.hypot(x, y)
    match shape:
        case "circle":
            return rho <= 1.0
        case "square":
            return np.maximum(abs(x), abs(y)) <= 0.93
        case "triangle":
            return (y <= 0.88) & (abs(x) <= (y + 1.0) / 1.76)
        case "star":
            return _inside_star(x, y)
        case "cross":
            return (np.minimum(abs(x), abs(y)) <= 0.32) & (np.maximum(abs(x), abs(y)) <= 1.0)
        case "ring":
            return (rho <= 1.0) & (rho >= 0.52)
        case "heart":
            lobes = np.hypot(abs(x) - 0.48, y + 0.38) <= 0.52
            return lobes | ((y >= -0.2) & (abs(x) <= 0.76 * (1.05 - y)))
        case "moon":
            return (rho <= 1.0) & (np.hypot(x - 0.5, y) >= 0.82)
    raise AssertionError(shape)


@functools.cache
def template(shape: str, radius: int) -> NDArray[np.float32]:
    """How much of each pixel a shape covers, in [0, 1], centred on a square of TEMPLATE_SIZE."""
    fine = 8
    axis = (np.arange(TEMPLATE_SIZE * fine) + 0.5) / fine - TEMPLATE_SIZE / 2
    y, x = np.meshgrid(axis / (radius + 0.5), axis / (radius + 0.5), indexing="ij")
    inside = _inside(shape, x, y).reshape(TEMPLATE_SIZE, fine, TEMPLATE_SIZE, fine)
    return inside.mean((1, 3), dtype=np.float32)


@functools.cache
def _cloud_basis() -> NDArray[np.float32]:
    """Smooth interpolation (cosine windows) of 7 x 7 knots, as a matrix of pixels x knots."""
    position = np.arange(IMAGE_SIZE)[:, None] / (IMAGE_SIZE - 1) * 6
    distance = np.clip(abs(position - np.arange(7)[None]), 0, 1)
    window = 0.5 + 0.5 * np.cos(math.pi * distance)
    return np.einsum("ai,bj->abij", window, window).reshape(-1, 49).astype(np.float32)


@functools.cache
def _grid() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    y, x = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE].astype(np.float32)
    return x, y


def _brightness(background: Background) -> NDArray[np.float32]:
    x, y = _grid()
    angle, half = background.light_angle, IMAGE_SIZE / 2
    light = ((x - half) * math.cos(angle) + (y - half) * math.sin(angle)) / half
    knots = np.asarray(background.clouds, np.float32)
    field = background.light * light + (_cloud_basis() @ knots).reshape(x.shape)
    px, py = background.phase
    turn = 2 * math.pi
    match background.texture:
        case "striped":
            field = field + 0.035 * np.sin(turn * (x / 12 + px))
        case "wavy":
            field = field + 0.035 * np.sin(turn * (y / 12 + py + 0.25 * np.sin(turn * x / 24)))
        case "dotted":
            dots = np.sin(turn * (x / 12 + px)) * np.sin(turn * (y / 12 + py))
            field = field + 0.05 * dots
    return field.astype(np.float32)


def coverage(thing: Object) -> NDArray[np.float32]:
    """How much of each pixel of the image an object covers, HW in [0, 1]."""
    half = TEMPLATE_SIZE // 2
    padded = np.zeros((IMAGE_SIZE + 2 * half, IMAGE_SIZE + 2 * half), np.float32)
    padded[thing.y : thing.y + TEMPLATE_SIZE, thing.x : thing.x + TEMPLATE_SIZE] = template(
        thing.shape, thing.radius
    )
    return padded[half:-half, half:-half]


def render(scenes: Sequence[Scene]) -> NDArray[np.uint8]:
    """Draws scenes; images_NHWC."""
    images = np.empty((len(scenes), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    for image, scene in zip(images, scenes, strict=True):
        tone = np.asarray(TONES[scene.background.tone], np.float32)
        canvas = tone + _brightness(scene.background)[..., None]
        for thing in scene.objects:
            alpha = coverage(thing)[..., None]
            canvas += alpha * (np.asarray(COLORS[thing.color], np.float32) - canvas)
        image[:] = np.clip(np.rint(canvas * 255), 0, 255)
    return images


def random_background(
    rng: np.random.Generator, tone: str | None = None, texture: str | None = None
) -> Background:
    """A background with everything drawn that is not given."""
    return Background(
        tone=tone or str(rng.choice(list(TONES))),
        texture=texture or str(rng.choice(TEXTURES)),
        light_angle=float(rng.uniform(0, 2 * math.pi)),
        light=float(rng.uniform(0, 0.05)),
        phase=(float(rng.uniform()), float(rng.uniform())),
        clouds=tuple((rng.uniform(-1, 1, 49) * 0.035).tolist()),
    )


def apart(a: Object, b: Object) -> bool:
    """Whether at least GAP pixels lie between the boxes of two objects."""
    reach = a.radius + b.radius + 1 + GAP
    return abs(a.x - b.x) >= reach or abs(a.y - b.y) >= reach
