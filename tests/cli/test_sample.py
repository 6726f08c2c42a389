"""`stage sample`: the grid it writes, and what it refuses."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from stage_rl.cli.sample import grid


@dataclass
class Images:
    images_NHWC: object


class Array(np.ndarray):
    def numpy(self):
        return np.asarray(self)


def test_sample_writes_a_grid_of_one_row_per_prompt(tmp_path, stand_in, stage):
    seen = {}

    def draw(model, prompts, **options):
        seen.update(model=model, prompts=prompts, **options)
        return Images(np.zeros((4, 48, 48, 3), np.uint8).view(Array))

    stand_in("stage_rl.rollout.sample", "sample", draw)
    out = tmp_path / "grid.png"
    done = stage("sample", "shapes", "a", "b", "--images", 2, "--seed", 3, "--out", out)
    assert done.exit_code == 0, done.output
    assert seen == {
        "model": "shapes",
        "prompts": ["a", "b"],
        "images_per_prompt": 2,
        "guidance_scale": 5.0,
        "temperature": 1.0,
        "seed": 3,
    }
    # 48 pixels are shown as 192; two tiles and three gaps of 4: 2 x 192 + 3 x 4 = 396.
    with Image.open(out) as picture:
        assert picture.size == (396, 396)


def test_a_grid_places_images_row_by_row():
    images_NHWC = np.zeros((3, 192, 192, 3), np.uint8)
    images_NHWC[1] = 100
    images_NHWC[2] = 200
    picture = np.asarray(grid(images_NHWC, columns=2))
    # Tiles start at 4 and at 4 + 196 = 200; the fourth place stays white.
    assert [picture[y, x, 0] for y in (4, 200) for x in (4, 200)] == [0, 100, 200, 255]


def test_a_grid_needs_a_png_in_a_folder_that_is(tmp_path, run_main):
    for out in (tmp_path / "none" / "grid.png", tmp_path / "grid.jpg"):
        code, printed = run_main("sample", "shapes", "a", "--out", out)
        assert code == 2
        assert printed.startswith(f"error: --out {out}: ")


def test_a_grid_that_cannot_be_written_is_one_line(tmp_path, stand_in, run_main):
    blank = Images(np.zeros((1, 48, 48, 3), np.uint8).view(Array))
    stand_in("stage_rl.rollout.sample", "sample", lambda *_, **__: blank)
    out = tmp_path / "taken.png"
    out.mkdir()
    assert run_main("sample", "shapes", "a", "--images", 1, "--out", out) == (
        1,
        f"error: --out {out}: Is a directory; name another file\n",
    )


def test_an_option_that_is_not_a_number_or_not_finite_is_refused(stage):
    for value in ("nan", "inf", "much", "-1"):
        assert stage("sample", "shapes", "a", "--guidance-scale", value).exit_code == 2
