"""Trackers: what they are given, and that none of them stops a run."""

import importlib
import json
import re
import sys

import pytest
from run_files import steps_of

from stage_rl.errors import InputError, RecipeError
from stage_rl.training.loop import train

FAKE = """
calls = []


class Image:
    def __init__(self, image, caption):
        self.size, self.caption = image.size, caption


def init(**options):
    calls.append(("init", options))


def log(values, step):
    calls.append(("log", step, values))


def finish():
    calls.append(("finish",))
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Puts a stand-in of a tracker's package on the import path; the module."""

    def make(package):
        (tmp_path / f"{package}.py").write_text(FAKE)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, package, raising=False)
        importlib.invalidate_caches()
        return importlib.import_module(package)

    return make


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_a_tracker_gets_the_recipe_the_metrics_and_the_grids(recipe, fake, package, monkeypatch):
    module = fake(package)
    monkeypatch.setenv("COLUMN", "secret")
    column = "rewards.0.name=${oc.env:COLUMN}"
    run = train(recipe("steps=2", f"trackers=[{package}]", column))
    (_, options), *logged, end = module.calls
    assert (options["project"], options["resume"]) == ("stage-rl", "allow")
    assert re.fullmatch("run-[0-9a-f]{8}", options["name"])
    assert options["config"]["optimizer"]["lr"] == 1e-3
    assert options["config"]["rewards"][0]["name"] == "${oc.env:COLUMN}"
    assert end == ("finish",)
    numbers = [(step, values) for _, step, values in logged if "images" not in values]
    lines = [(line.pop("step"), line) for line in steps_of(run)]
    assert numbers == lines
    # Images are logged at step 0, every second one, and at the last.
    grids = {step: values["images"] for _, step, values in logged if "images" in values}
    assert sorted(grids) == [0, 1]
    first = json.loads((run / "images" / "000000.json").read_text())[0]["prompt"]
    assert grids[0].caption == first
    assert grids[0].size[0] > 3 * 192


def test_a_resumed_run_is_one_run_of_a_tracker_and_one_of_its_name_is_not(recipe, fake, tmp_path):
    module = fake("wandb")
    every = ("optimizer.schedule=constant", "run.log_images_every=0", "trackers=[wandb]")
    for steps, folder in ((1, "a"), (2, "a"), (1, "b")):
        train(recipe(f"steps={steps}", f"run.dir={tmp_path}/{folder}/run", *every))
    first, resumed, other = [call[1] for call in module.calls if call[0] == "init"]
    assert (first["id"], first["name"]) == (resumed["id"], resumed["name"])
    assert first["id"] != other["id"]
    assert first["name"] != other["name"]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("BrokenTracker", "OSError: the server is gone"), ("LeavingTracker", "SystemExit: 3")],
)
def test_a_tracker_that_fails_warns_once_and_the_run_goes_on(recipe, fake, caplog, kind, reason):
    module = fake("wandb")
    broken = f"trackers=['loop_parts:{kind}', wandb]"
    run = train(recipe("steps=3", "run.log_images_every=0", broken))
    warnings = [record.message for record in caplog.records if "tracker" in record.message]
    assert len(warnings) == 1
    assert f"loop_parts:{kind} failed and is left out, the run goes on" in warnings[0]
    assert f"({reason})" in warnings[0]
    assert [line["step"] for line in steps_of(run)] == [0, 1, 2]
    assert [call[0] for call in module.calls] == ["init", "log", "log", "log", "finish"]


def test_a_tracker_that_is_unknown_or_not_installed_is_refused_before_the_first_step(
    recipe, tmp_path, monkeypatch
):
    with pytest.raises(RecipeError, match=r"trackers\.0: unknown tracker kind 'wandbb'; did you"):
        recipe("trackers=[wandbb]")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"trackio is not installed; run pip install 'stage-rl\["):
        train(recipe("trackers=[trackio]"))
    assert not (tmp_path / "run").exists()


def test_tensorboard_holds_every_metric_of_every_step(recipe):
    pytest.importorskip("tensorboard", reason="pip install 'stage-rl[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(recipe("steps=2", "trackers=[tensorboard]"))
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    for line in steps_of(run):
        step = line.pop("step")
        for name, value in line.items():
            (found,) = [event for event in events.Scalars(name) if event.step == step]
            assert found.value == pytest.approx(value, rel=1e-6)
    assert [event.step for event in events.Images("images")] == [0, 1]
