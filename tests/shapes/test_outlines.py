"""The whole shape that lies closest to a coverage."""

import numpy as np
import pytest

from stage_rl.shapes.gold import Part, fit_outlines, inspect
from stage_rl.shapes.scenes import SHAPES, render, scene_for, template


def window(shape, radius):
    return np.pad(template(shape, radius), 1)[None].astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_drawn_shape_is_within_a_tenth_of_a_pixel_of_itself(shape):
    record = {"include": [{"class": shape, "count": 1}]}
    scenes = [scene_for(record, np.random.default_rng(seed)) for seed in range(10)]
    for inspection in inspect(render(scenes)):
        (seen,) = inspection.parts
        assert seen.shape == shape
        assert seen.edge_error < 0.1


def test_the_perimeter_of_a_circle_is_two_pi_times_its_radius():
    covered = template("circle", 8).sum()
    radius = np.sqrt(covered / np.pi)
    # Four over pi holds on average over all directions, which a circle has in equal parts.
    perimeter = fit_outlines(window("circle", 8)).perimeter_M[0]
    assert perimeter == pytest.approx(2 * np.pi * radius, rel=0.03)


def part(outline, edge_error):
    return Part("ring", outline, edge_error, 1.0, "red", 1.0, (0.0, 0.0, 9.0, 9.0), 60)


def test_an_object_overlaps_well_or_has_its_outline_in_place():
    # A ring of 80 pixels outline and 110 area: a quarter pixel off is 20 pixels, overlap 0.83.
    assert part(0.83, 0.25).is_object
    assert part(0.91, 0.40).is_object
    assert not part(0.83, 0.30).is_object
