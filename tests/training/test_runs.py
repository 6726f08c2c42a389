"""The run folder: who may take it, and that what lies in it is whole."""

import json
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from run_files import parameters_of, steps_of

from stage_rl import api
from stage_rl.config import load_recipe, run_folder
from stage_rl.errors import CheckpointError, InputError, StageError, Stopped
from stage_rl.files import read_metrics, replace_file
from stage_rl.rollout.engine import Engine
from stage_rl.rollout.sample import rollout
from stage_rl.rollout.sampling import Sampling
from stage_rl.training import loop
from stage_rl.training.loop import train
from stage_rl.training.run import RunFolder, check_run, open_run
from stage_rl.training.trainer import FIXED_STEP
from stage_rl.types import Prompt


def test_a_recipe_that_is_refused_leaves_no_folder(recipe, tmp_path):
    for wrong in ("policy.trainable=[nothing.*]", "policy.path=/no/such/weights"):
        with pytest.raises(StageError):
            train(recipe(wrong))
        assert not (tmp_path / "run").exists()
    assert train(recipe("steps=1")) == tmp_path / "run"


def test_a_start_that_failed_before_its_first_step_leaves_the_folder_to_any_recipe(
    recipe, monkeypatch
):
    def out_of_memory(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(loop, "train_step", out_of_memory)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(recipe("steps=1"))
    monkeypatch.undo()
    run = train(recipe("steps=1", "training.groups_per_microbatch=1"))
    saved = json.loads((run / "recipe.json").read_text())
    assert saved["training"]["groups_per_microbatch"] == 1


def test_a_run_that_was_moved_goes_on(recipe, tmp_path):
    train(recipe("steps=1", "optimizer.schedule=constant"))
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    moved = train(
        recipe("steps=2", "optimizer.schedule=constant", f"run.dir={tmp_path}/elsewhere/")
    )
    assert moved == tmp_path / "elsewhere"
    assert len((moved / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("steps", [1, 2])
def test_a_finished_run_says_so_and_writes_nothing(recipe, capsys, steps):
    run = train(recipe("steps=2"))
    files = [run / name for name in ("recipe.json", "metrics.jsonl")]
    before = [file.read_bytes() for file in files]
    train(recipe(f"steps={steps}"))
    said = capsys.readouterr().out
    assert "finished after 2 steps; raise steps to go on" in said
    assert ("(in a longer run the linear" in said) or steps == 2
    assert [file.read_bytes() for file in files] == before


def test_a_run_goes_on_with_other_means_and_ends_as_if_it_had_not(recipe, tmp_path):
    same = ("optimizer.schedule=constant", "probe.every=0")
    whole = train(recipe(*same, f"run.dir={tmp_path}/whole"))
    halves = train(recipe(*same, "steps=2"))
    means = ("rollout.max_images=2", "run.save_every=1")
    more = ("probe.every=1", "run.log_images_every=1", "liveness.zero_gradient_steps=0")
    assert train(load_recipe(halves, ["steps=4", *means, *more])) == halves
    one, other = parameters_of(whole, 4), parameters_of(halves, 4)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert "probe/kl" in steps_of(halves)[2]
    overrides = json.loads((halves / "status.json").read_text())["overrides"]
    assert set(overrides) == {"optimizer.schedule=constant", "steps=4", *means, *more}
    with pytest.raises(InputError, match=r"differs in optimizer\.lr\)"):
        train(load_recipe(halves, ["steps=5", "optimizer.lr=0.5", "run.keep_checkpoints=1"]))


def test_the_status_says_how_a_run_ended_and_why(recipe, monkeypatch):
    def status_of(*overrides, error):
        with pytest.raises(error):
            train(recipe(*overrides))
        return json.loads((run_folder(recipe()) / "status.json").read_text())

    stops = f"rewards=[{{kind: 'loop_parts:SendsSignal', number: {int(signal.SIGTERM)}}}]"
    stopped = status_of(stops, f"run.dir={run_folder(recipe())}", error=Stopped)
    assert stopped["state"] == "stopped"
    assert "stopped after step 1 and saved" in stopped["why"]
    shutil.rmtree(run_folder(recipe()))

    def out_of_memory(*args):
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(loop, "train_step", out_of_memory)
    failed = status_of(error=RuntimeError)
    assert (failed["state"], failed["why"]) == ("failed", "RuntimeError: out of memory")
    assert failed["error"] == "RuntimeError"
    monkeypatch.undo()
    run = train(recipe("steps=1"))
    finished = json.loads((run / "status.json").read_text())
    assert (finished["state"], finished["why"], finished["steps"]) == ("finished", "", 1)
    assert finished["overrides"] == ["steps=1"]


def test_a_file_in_place_of_the_folder_is_refused(recipe, tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(InputError, match=r"run: is a file; give another run\.dir"):
        train(recipe())
    with (
        pytest.raises(InputError, match=r"cannot be made \(Not a directory\)"),
        open_run(recipe(f"run.dir={tmp_path}/run/deeper")),
    ):
        pass


def test_a_folder_of_something_else_is_refused_and_a_copied_run_is_not(recipe, tmp_path):
    run = train(recipe("steps=1"))
    (run / ".lock").unlink()
    assert check_run(recipe()).path == run
    (run / "recipe.json").unlink()
    with pytest.raises(InputError, match=r"holds a run without recipe\.json"):
        check_run(recipe())
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.jpg").write_text("")
    with pytest.raises(InputError, match="is not empty and not a run folder"):
        check_run(recipe(f"run.dir={other}"))


def test_a_run_that_is_open_or_cannot_be_locked_is_refused(recipe, tmp_path):
    with (
        open_run(recipe()),
        pytest.raises(InputError, match="another process trains this run"),
        open_run(recipe()),
    ):
        pass
    (tmp_path / "other" / ".lock").mkdir(parents=True)
    with (
        pytest.raises(CheckpointError, match=r"\.lock: could not be written"),
        open_run(recipe(f"run.dir={tmp_path}/other")),
    ):
        pass


@pytest.mark.parametrize("name", ["000001.png", "000001.npz", "000001.json"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path, name):
    (tmp_path / name).write_text("old")

    def half(path):
        assert path.suffix == (tmp_path / name).suffix  # Pillow and numpy go by it
        path.write_text("ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left"):
        replace_file(tmp_path / name, half)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "old")]


def test_logged_images_come_with_their_boxes_and_fixed_prompts_with_their_own_stream(recipe):
    run = train(recipe("steps=3", "run.fixed_prompts=1"))
    records = json.loads((run / "images" / "000002.json").read_text())
    with Image.open(run / "images" / "000002.png") as picture:
        shown = [np.asarray(picture.crop(record["box"])) for record in records]
    # The reward of an image is its brightness, which enlarging does not change.
    means = [image.mean() / 255 for image in shown]
    assert means == pytest.approx([record["reward"] for record in records], abs=1e-6)

    own = sorted((run / "fixed").glob("*.json"))
    assert [file.name for file in own] == ["000000.json", "000002.json"]
    pictures = []
    for file in own:
        (record,) = json.loads(file.read_text())
        with Image.open(file.with_suffix(".png")) as picture:
            pictures.append(np.asarray(picture.crop(record["box"]))[::12, ::12])
    base = api.load(recipe().policy.path)
    drawn = rollout(
        Engine(base),
        [Prompt(record["prompt"], 0)],
        group_size=1,
        sampling=Sampling(2.0),
        seed=0,
        step=FIXED_STEP,
    )
    assert (pictures[0] == drawn.images_NHWC[0].numpy()).all()
    assert (pictures[0] != pictures[1]).any()


def test_the_codebook_gives_the_similarity_of_the_logged_tokens(recipe):
    run = train(recipe("steps=1"))
    codes_VC = np.load(run / "codebook.npy").astype(float)
    with np.load(run / "samples" / "000000.npz") as arrays:
        codes_GTC = codes_VC[arrays["tokens"][0]]
        above_G = arrays["rewards"][0] > arrays["rewards"][0].mean()
        similarity_GT = arrays["similarity"][0]
    for image, others in ((i, above_G != above_G[i]) for i in range(3)):
        cosines_OT = (codes_GTC[others] * codes_GTC[image]).sum(-1)
        assert similarity_GT[image] == pytest.approx(cosines_OT.mean(0), abs=2e-3)


def test_metrics_of_no_run_are_dropped_when_steps_are_done_again(tmp_path):
    run = RunFolder(tmp_path)
    foreign = [b"[1]", b"\xff\xfe\x00", b'{"step": "x"}', b"[" * 100_000, b'{"step": 1e999}']
    run.metrics.write_bytes(b"\n".join([b'{"step": 0, "a": 1}', *foreign, b'{"step": 1, "a"']))
    assert read_metrics(run.metrics) == [{"step": 0, "a": 1}]
    run.forget_after(1)
    assert run.metrics.read_text() == '{"step": 0, "a": 1}\n'


def test_a_lock_that_is_a_link_is_not_written_through(recipe, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "precious")
    with (
        pytest.raises(CheckpointError, match=r"\.lock: could not be written \(Too many levels"),
        open_run(recipe()),
    ):
        pass
    assert not (tmp_path / "precious").exists()


def test_an_image_whose_reward_failed_has_no_score_and_not_0(recipe):
    # Two steps of two prompts take each of the four once.
    images = ("run.log_images_every=1", "run.log_groups=2")
    run = train(recipe("steps=2", "rewards=[{kind: 'loop_parts:FailsOnPhotos'}]", *images))
    scores = {"the photo": [], "others": []}
    for file in sorted((run / "images").glob("*.json")):
        records = json.loads(file.read_text())
        for record in records:
            scores.get(record["prompt"], scores["others"]).append(record["reward"])
        with np.load(run / "samples" / f"{file.stem}.npz") as arrays:
            kept = [None if np.isnan(x) else x for x in arrays["rewards"].flatten().tolist()]
        assert kept == [record["reward"] for record in records]
        failed = [r for r in records if r["reward"] is None]
        assert all("failed: OSError: cannot look at this" in r["reason"] for r in failed)
    assert scores["the photo"] == [None] * 3
    assert len(scores["others"]) == 9
    assert all(scores["others"])
