"""`stage sample`: the grid it writes, and what it refuses."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import stage_rl
from stage_rl.config import load_recipe, resolved_json
from stage_rl.training.checkpoint import Progress, TrainState, save_checkpoint


@pytest.fixture
def run_folder(tmp_path, tiny_janus, tiny_janus_folder):
    """A run with checkpoints of steps 1 and 2, by weights of its own each; no optimizer state."""
    recipe = load_recipe("shapes_geneval", [f"policy.path={tiny_janus_folder}"])
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.json").write_text(resolved_json(recipe))
    optimizer = torch.optim.SGD(p for p in tiny_janus.module.parameters() if p.requires_grad)
    for step in (1, 2):
        with torch.no_grad():
            for parameter in tiny_janus.module.parameters():
                parameter.mul_(1 + 0.5 * parameter.requires_grad)
        state = Progress(step=step, counters={})
        train_state = TrainState(tiny_janus.module, optimizer)
        save_checkpoint(folder / "checkpoints", train_state, state=state)
    return folder


def test_sample_draws_a_grid_of_one_row_per_prompt(tmp_path, tiny_janus_folder, stage):
    out = tmp_path / "grid.png"
    texts, options = ["a red circle", "a star"], ["--images", 2, "--seed", 3, "--out", out]
    done = stage("sample", tiny_janus_folder, *texts, *options, "--dtype", "mixed")
    assert done.exit_code == 0, done.output
    how = {"images_per_prompt": 2, "seed": 3}
    drawn = stage_rl.sample(str(tiny_janus_folder), texts, **how, dtype="mixed")
    plain = stage_rl.sample(str(tiny_janus_folder), texts, **how)
    assert not torch.equal(drawn.logprobs_NT, plain.logprobs_NT)
    with Image.open(out) as picture:
        # 16 pixels are shown as 192; two tiles and three gaps of 4: 2 x 192 + 3 x 4 = 396.
        assert picture.size == (396, 396)
        shown = np.asarray(picture)[4 : 4 + 192 : 12, 200 : 200 + 192 : 12]
    assert np.array_equal(shown, drawn.images_NHWC[1].numpy())


def test_sample_draws_with_what_a_run_has_learned(run_folder, tmp_path, stage, run_main):
    pictures = {}
    for name in (f"{run_folder}@1", f"{run_folder}@2", str(run_folder)):
        out = tmp_path / f"{len(pictures)}.png"
        done = stage("sample", name, "a red circle", "--images", 1, "--out", out)
        assert done.exit_code == 0, done.output
        pictures[name] = out.read_bytes()
    first, second, newest = pictures.values()
    assert newest == second != first
    code, printed = run_main("sample", f"{run_folder}@7", "a", "--out", tmp_path / "none.png")
    assert code == 2
    assert printed == f"error: {run_folder}@7: no checkpoint of step 7; the run has: 1, 2\n"


def test_prompts_of_a_file_become_single_images(tmp_path, tiny_janus_folder, stage):
    (tmp_path / "mine.txt").write_text("a red circle\na star\n")
    how = ["--prompts", tmp_path / "mine.txt", "--images", 2, "--device", "cpu"]
    done = stage("sample", tiny_janus_folder, "the photo", *how, "--out", tmp_path / "each")
    assert done.exit_code == 0, done.output
    texts = ["the photo", "a red circle", "a star"]
    drawn = stage_rl.sample(str(tiny_janus_folder), texts, images_per_prompt=2)
    names = [f"{prompt:05d}-{image:02d}.png" for prompt in range(3) for image in range(2)]
    assert sorted(path.name for path in (tmp_path / "each").iterdir()) == names
    for name, image_HWC in zip(names, drawn.images_NHWC, strict=True):
        with Image.open(tmp_path / "each" / name) as picture:
            assert np.array_equal(np.asarray(picture), image_HWC.numpy())


def test_sample_without_a_prompt_is_refused(run_main):
    assert run_main("sample", "shapes") == (
        2,
        "error: PROMPTS: are missing; write some, or --prompts FILE\n",
    )


def test_a_grid_needs_a_png_in_a_folder_that_is(tmp_path, run_main):
    for out in (tmp_path / "none" / "grid.png", tmp_path / "grid.jpg"):
        code, printed = run_main("sample", "shapes", "a", "--out", out)
        assert code == 2
        assert printed.startswith(f"error: --out {out}: ")


def test_a_grid_that_cannot_be_written_is_one_line(tmp_path, tiny_janus_folder, run_main):
    out = tmp_path / "taken.png"
    out.mkdir()
    assert run_main("sample", tiny_janus_folder, "a", "--images", 1, "--out", out) == (
        1,
        f"error: --out {out}: Is a directory; name another file\n",
    )


def test_an_option_that_is_not_a_number_or_not_finite_is_refused(stage):
    for value in ("nan", "inf", "much", "-1"):
        assert stage("sample", "shapes", "a", "--guidance-scale", value).exit_code == 2


@pytest.mark.parametrize("words", [("sample", "shapes", "a star", "--out"), ("export", "shapes")])
def test_a_place_where_nothing_can_be_written_is_refused_before_the_work(
    words, tmp_path, monkeypatch, run_main
):
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    monkeypatch.setattr("stage_rl.api.sample", None)
    monkeypatch.setattr("stage_rl.training.export._write", None)
    code, printed = run_main(*words, tmp_path / "drawn")
    assert (code, printed.count("\n")) == (2, 1)
    assert "can be" in printed
    assert printed.endswith("; name another\n")
