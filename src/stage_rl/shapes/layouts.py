"""Scenes for records: places the objects that a GenEval record asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from stage_rl.shapes.scenes import (
    COLORS,
    IMAGE_SIZE,
    RADII,
    SHAPES,
    SIZES,
    Object,
    Scene,
    apart,
    random_background,
)

UNSEEN_PAIRS = frozenset(
    {
        ("circle", "purple"),
        ("square", "orange"),
        ("triangle", "white"),
        ("star", "blue"),
        ("cross", "pink"),
        ("ring", "red"),
        ("heart", "brown"),
        ("moon", "green"),
    }
)
"""Class and colour pairs that no training image or caption contains."""

SAME_COLOR_SHARE = 0.7
"""Share of scenes in which the objects of one clause that names no colour have the same one."""

CUT_OFF = 0.12
"""Share of pretraining pictures whose border cuts an object, as in badly framed photographs."""


def seen_colors(shape: str) -> list[str]:
    """The colours a shape has in training images."""
    return [color for color in COLORS if (shape, color) not in UNSEEN_PAIRS]


def scene_for(
    record: Mapping[str, Any], rng: np.random.Generator, *, cut_off: float = 0.0
) -> Scene:
    """A scene that satisfies a record; everything the record leaves open is drawn.

    In a share `cut_off` of the scenes the border of the image cuts a quarter to a half off one
    object. Beyond GenEval's keys the record may carry `size` ("small", "large") of its objects,
    and `tone` and `texture` of the background.
    """
    clauses = record["include"]
    wanted = [
        (clause, index, color)
        for index, clause in enumerate(clauses)
        for color in _colors(clause, rng)
    ]
    cut = int(rng.integers(len(wanted))) if cut_off and rng.uniform() < cut_off else None
    objects = None
    while objects is None:
        objects = _place(wanted, record.get("size"), rng, cut=cut)
    background = random_background(rng, record.get("tone"), record.get("texture"))
    return Scene(tuple(objects), background)


def random_scene(rng: np.random.Generator, *, cut_off: float = 0.0) -> Scene:
    """A scene of one to four objects of any seen class and colour, with no caption in mind."""
    shapes = rng.choice(SHAPES, rng.integers(1, 5))
    record = {"include": [{"class": str(s), "count": 1} for s in shapes]}
    return scene_for(record, rng, cut_off=cut_off)


def _colors(clause: Mapping[str, Any], rng: np.random.Generator) -> list[str]:
    count = clause["count"]
    if clause.get("color"):
        return [clause["color"]] * count
    palette = seen_colors(clause["class"])
    if rng.uniform() < SAME_COLOR_SHARE:
        return [str(rng.choice(palette))] * count
    return [str(color) for color in rng.choice(palette, count)]


def _place(
    wanted: Sequence[tuple[Mapping[str, Any], int, str]],
    size: str | None,
    rng: np.random.Generator,
    *,
    cut: int | None,
) -> list[Object] | None:
    """One attempt to place all objects, number `cut` across the border; None when it fails."""
    placed: list[tuple[int, Object]] = []
    largest = max(RADII) if len(wanted) <= 2 else 8
    radii = SIZES[size] if size else tuple(r for r in RADII if r <= largest)
    for number, (clause, index, color) in enumerate(wanted):
        for _ in range(30):
            thing = _draw(clause["class"], color, radii, rng)
            thing = _across_border(thing, rng) if number == cut else thing
            if all(apart(thing, other) for _, other in placed) and _fits(clause, thing, placed):
                placed.append((index, thing))
                break
        else:
            return None
    return [thing for _, thing in placed]


def _draw(shape: str, color: str, radii: Sequence[int], rng: np.random.Generator) -> Object:
    radius = int(rng.choice(radii))
    x, y = (int(rng.integers(radius + 1, IMAGE_SIZE - radius - 1)) for _ in range(2))
    return Object(shape, color, x, y, radius)


def _across_border(thing: Object, rng: np.random.Generator) -> Object:
    """The object with its centre at most half its radius from one side of the image."""
    near = int(rng.integers(thing.radius // 2 + 1))
    far = IMAGE_SIZE - 1 - near
    side = rng.integers(4)
    if side < 2:
        return replace(thing, x=(near, far)[side])
    return replace(thing, y=(near, far)[side - 2])


def _fits(clause: Mapping[str, Any], thing: Object, placed: Sequence[tuple[int, Object]]) -> bool:
    """Whether an object stands clearly where its clause wants it."""
    if not clause.get("position"):
        return True
    relation, target = clause["position"]
    return all(
        _clearly(relation, thing.x - other.x, thing.y - other.y)
        for index, other in placed
        if index == target
    )


def _clearly(relation: str, dx: int, dy: int) -> bool:
    """One axis carries the relation, the other stays below half of it."""
    along, across = {
        "left of": (-dx, dy),
        "right of": (dx, dy),
        "above": (-dy, dx),
        "below": (dy, dx),
    }[relation]
    return along > 0 and abs(across) <= along / 2
