"""What run folders say: state and why, newest numbers, runs side by side."""

import contextlib
import fcntl
import json
import random

import numpy as np
import pytest
from PIL import Image
from run_files import write_run

from stage_rl.errors import InputError
from stage_rl.files import read_metrics
from stage_rl.report import run_page
from stage_rl.report.compare import compare
from stage_rl.report.runs import find_runs, read_run
from stage_rl.report.series import over_seeds, read_cells
from stage_rl.training.export import _environment, _figures


def test_a_run_says_its_state_its_time_and_the_mean_of_its_last_steps(tmp_path):
    status = {
        "recipe": "shapes",
        "overrides": ["seed=2"],
        "state": "failed",
        "why": "NaN; lower lr",
    }
    run = read_run(write_run(tmp_path / "one", [9.0] + [0.25] * 5 + [0.75] * 5, status=status))
    # The newest ten: five of 0.25 and five of 0.75.
    assert run.recent("reward/mean") == 0.5
    assert run.recent("kl/mean") is None
    assert (run.state, run.why, run.seconds) == ("failed", "NaN; lower lr", 22.0)
    assert (run.recipe, run.overrides) == ("shapes", ("seed=2",))
    assert (len(run.steps), run.num_steps, run.score()) == (11, 10, None)


def test_a_run_that_ended_without_a_word_was_killed_and_a_locked_one_runs(tmp_path):
    folder = write_run(tmp_path / "one", [1.0], status={"state": "running"})
    with (folder / ".lock").open("w") as handle:
        assert read_run(folder).state == "killed"
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert read_run(folder).state == "running"
    # Runs of former versions have no status.
    assert read_run(write_run(tmp_path / "old", [1.0] * 10)).state == "finished"
    assert read_run(write_run(tmp_path / "older", [1.0] * 9)).state == "stopped"


def test_runs_are_found_below_a_folder_and_what_is_none_is_refused(tmp_path):
    for name in ("a", "study/stage/1", "study/grpo/1"):
        write_run(tmp_path / name, [1.0])
    found = {folder.relative_to(tmp_path).as_posix() for folder in find_runs(tmp_path)}
    assert found == {"a", "study/stage/1", "study/grpo/1"}
    with pytest.raises(InputError, match="is not a run folder"):
        read_run(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        find_runs(tmp_path / "none")


def test_two_runs_stand_side_by_side(tmp_path):
    one = write_run(
        tmp_path / "one", [0.0, 1.0] * 5, scores=(0.25, 0.375, 0.0625, 0.1875), seed=1, beta=0.5
    )
    two = write_run(tmp_path / "two", [0.5] * 4, seed=2, beta=0.5)
    text = compare([one, two])
    cells = [line.split() for line in text.splitlines()]
    assert ["seed", "1", "2"] in cells
    assert not any(row[:1] in (["beta"], ["run.dir"]) for row in cells)
    # Ten steps in five spans of two; the second run has no step after the fourth.
    assert ["reward/mean,", "1", "to", "2", "0.5000", "0.5000"] in cells
    assert ["reward/mean,", "9", "to", "10", "0.5000"] in cells
    assert ["gold", "0.375", "+0.125", "[+0.062,", "+0.188]"] in cells


HOSTILE = (
    *(None, True, [], {}, 0, 5, -1, 0.5, 1e308, 10**400, float("nan"), "", "x", "\ud800", [1, 2]),
    *({"mean": "x"}, [None], [[]], {"": {}}),
)
TEXTS = ("", "[" * 100_000, "5", "null", "[]", '"x"', "9" * 5000, "\x00", '{"step": 1')
SMALL = ("recipe", "status", "environment", "evaluation", "before_after", "images/000001")


@pytest.fixture
def whole(tmp_path):
    """A run with all the small files."""
    status = {"recipe": "shapes", "overrides": ["seed=2"], "state": "failed", "why": "NaN"}
    run = write_run(tmp_path / "one", [1.0, 2.0], status=status, scores=(0.25, 0.5, 0.1, 0.4))
    environment = {"python": "3", "packages": {"torch": "2"}, "devices": []}
    sides = {side: {"value": 1.0, "box": [0, 0, 8, 8]} for side in ("base", "trained")}
    images = [{"prompt": "a star", "task": "x", "image": 0, **sides}]
    logged = [{"prompt": "a star", "reward": 1.0, "reason": "", "box": [0, 0, 8, 8]}]
    (run / "environment.json").write_text(json.dumps(environment))
    (run / "before_after.json").write_text(json.dumps({"images": images}))
    (run / "images").mkdir()
    (run / "images" / "000001.json").write_text(json.dumps(logged))
    (run / "samples").mkdir()
    np.savez(run / "samples" / "000001.npz", tokens=np.zeros((1, 1, 4), int))
    for name in ("before_after", "images/000001"):
        Image.new("RGB", (8, 8)).save(run / f"{name}.png")
    return run


def readings(run):
    """Each reading of a run, as the commands do it."""
    yield lambda: compare([run])
    yield lambda: (read_run(run).score(), read_run(run).recent("reward/mean"))
    yield lambda: json.dumps(run_page.about_run(run), allow_nan=False)
    yield lambda: run_page.comparison(run)
    yield lambda: run_page.before_after(run, budget=10**6)
    yield lambda: run_page.logged_steps(run, budget=10**6)
    yield lambda: [over_seeds(runs, "reward/mean", 3, base=None) for runs in arms(run)]
    yield lambda: (_environment(run / "environment.json"), _figures(run / "metrics.jsonl", 9))


def arms(run):
    return [runs for cell in read_cells([run]) for runs in cell.arms.values()]


def changed(tree, made):
    """A tree in which something is something else."""
    if not isinstance(tree, dict | list) or not tree or made.random() < 0.2:
        return made.choice(HOSTILE)
    items = dict(tree) if isinstance(tree, dict) else dict(enumerate(tree))
    key = made.choice(list(items))
    items[key] = changed(items[key], made)
    if made.random() < 0.2:
        del items[key]
    return items if isinstance(tree, dict) else list(items.values())


@pytest.mark.parametrize("name", SMALL)
def test_a_foreign_file_of_a_run_is_named_and_never_a_traceback(whole, name):
    file, made = whole / f"{name}.json", random.Random(name)
    for read in readings(whole):
        read()
    tree = json.loads(file.read_text())
    for text in (*TEXTS, *(json.dumps(changed(tree, made)) for _ in range(100))):
        file.write_text(text)
        for read in readings(whole):
            with contextlib.suppress(InputError):
                read()


def test_foreign_metrics_are_left_out(whole):
    made, file = random.Random(1), whole / "metrics.jsonl"
    steps = [{"step": n, "reward/mean": 1.0, "time/step_s": 1.0} for n in range(5)]
    for _ in range(100):
        file.write_text("".join(f"{json.dumps(changed(step, made))}\n" for step in steps))
        for read in readings(whole):
            with contextlib.suppress(InputError):
                read()
    file.write_text(
        '{"step": 1, "reward/mean": "x", "a": 2}\n'
        f'{{"step": {10**400}}}\n{{"step": {2**53}}}\n{{"step": true}}\n{{"step": -1}}\n'
        f'{{"step": 2, "a": {10**400}, "b": NaN, "c": null, "d": true}}\n'
    )
    assert read_metrics(file) == [{"step": 1, "a": 2}, {"step": 2, "c": None}]


def test_a_report_runs_nothing_that_a_run_names(tmp_path, monkeypatch):
    run = write_run(tmp_path / "one", [1.0], trackers=["stranger:X"])
    (tmp_path / "stranger.py").write_text("open('was_run', 'w')\nclass X: pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert run_page.about_run(run)["settings"]["trackers.0"] == "stranger:X"
    assert arms(run)
    assert not (tmp_path / "was_run").exists()
