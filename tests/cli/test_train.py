"""`stage train` after the last step: the comparison, its label, and a stop while it is made."""

import os
import signal
from types import SimpleNamespace

import pytest

from stage_rl.cli import train as train_verb
from stage_rl.config import load_recipe
from stage_rl.errors import Stopped
from stage_rl.training import checkpoint


def test_the_comparison_is_labelled_with_the_steps_of_the_run(
    tiny_recipe, tmp_path, stand_in, stage, monkeypatch
):
    """A finished run of 80 steps, asked for 7: the kept comparison of 80 is shown."""
    saved = SimpleNamespace(state=SimpleNamespace(step=80))
    stand_in("stage_rl.training.loop", "train", lambda recipe: tmp_path)
    monkeypatch.setattr(checkpoint, "latest_checkpoint", lambda root: saved)
    (tmp_path / "evaluation.txt").write_text("after 80 steps; better")
    done = stage("train", tiny_recipe, "steps=7", "evaluation={}")
    assert done.exit_code == 0, done.output
    assert done.stdout == f"after 80 steps; better\nrun: {tmp_path}\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_during_the_evaluation_says_how_to_evaluate(number, code):
    before = signal.getsignal(number)
    with (
        pytest.raises(Stopped, match="same command again to evaluate") as stopped,
        train_verb._stopped_by_signals(),
    ):
        os.kill(os.getpid(), number)
    assert stopped.value.exit_code == code
    assert signal.getsignal(number) is before


def test_evaluation_prompts_among_the_training_prompts_are_named(tiny_recipe, capsys):
    """Of single objects there are eight, which the benchmark has too."""
    mix = "prompts={kind: shapes, ratios: {single_object: 1}, num_prompts: 8}"
    train_verb._say_leaks(load_recipe(tiny_recipe, [mix]))
    assert capsys.readouterr().err == ""  # nothing is compared
    train_verb._say_leaks(load_recipe(tiny_recipe, [mix, "evaluation={}"]))
    said = capsys.readouterr().err
    assert said.startswith("shapes-geneval: 8 of 356 evaluation prompts are in the training set")
    assert "(8 word for word, 0 in other words)" in said
