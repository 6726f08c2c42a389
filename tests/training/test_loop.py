"""The trainer end to end on a tiny Janus: resumes to the bit, stops cleanly, loses nothing."""

import errno
import json
import logging
import os
import signal

import numpy as np
import pytest
import torch
from run_files import parameters_of, steps_of, untimed

from stage_rl.api import load
from stage_rl.config import run_folder
from stage_rl.errors import CheckpointError, DivergedError, InputError, RecipeError, Stopped
from stage_rl.policies.janus import JanusPolicy
from stage_rl.training import checkpoint as checkpoint_module
from stage_rl.training import checkpoint as contents
from stage_rl.training.loop import check_prompts, train
from stage_rl.types import Prompt


def test_two_steps_and_two_more_equal_four_to_the_bit(recipe, tmp_path):
    same = ("optimizer.schedule=constant", "probe.every=1")
    whole = train(recipe(f"run.dir={tmp_path}/whole", *same))
    train(recipe(f"run.dir={tmp_path}/halves", *same, "steps=2"))
    resumed = train(recipe(f"run.dir={tmp_path}/halves", *same))
    one, other = parameters_of(whole, 4), parameters_of(resumed, 4)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    start = parameters_of(whole, 2)
    assert any(not torch.equal(one[name], start[name]) for name in one)
    assert untimed(steps_of(whole)) == untimed(steps_of(resumed))


def test_resume_after_a_refreshed_reference_is_exact(recipe, tmp_path):
    refresh = ("algorithm.reference_refresh_every=1", "optimizer.schedule=constant")
    whole = train(recipe(f"run.dir={tmp_path}/whole", *refresh))
    train(recipe(f"run.dir={tmp_path}/halves", *refresh, "steps=2"))
    resumed = train(recipe(f"run.dir={tmp_path}/halves", *refresh))
    one, other = parameters_of(whole, 4), parameters_of(resumed, 4)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_folder_holds_what_a_report_needs(recipe):
    run = train(recipe())
    assert [line["step"] for line in steps_of(run)] == [0, 1, 2, 3]
    last = steps_of(run)[-1]
    for name in ("reward/mean", "reward/Brightness", "entropy/gap", "kl/mean", "grad/norm"):
        assert np.isfinite(last[name])
    # At the first step policy and reference are the same model.
    first = steps_of(run)[0]
    assert first["kl/mean"] == 0
    assert first["entropy/gap"] == 0
    assert first["mismatch/logprobs_max"] < 1e-4
    assert first["probe/kl"] > 0  # after the update
    assert first["time/log_s"] > 0
    assert "time/log_s" not in steps_of(run)[1]
    # Every second step, and the last one.
    assert [line["step"] for line in steps_of(run) if "probe/kl" in line] == [0, 2, 3]
    arrays = np.load(run / "samples" / "000002.npz")
    assert arrays["tokens"].shape == arrays["similarity"].shape == (1, 3, 16)
    assert arrays["advantages"].shape == arrays["kl_weight"].shape == (1, 3, 16)
    reasons = json.loads((run / "images" / "000002.json").read_text())
    assert "luminance" in reasons[0]["reason"]
    assert (run / "images" / "000002.png").stat().st_size > 0
    assert (run / "recipe.yaml").read_text().startswith("\nsteps: 4")
    assert json.loads((run / "environment.json").read_text())["packages"]["torch"]


def test_a_finished_run_says_so_and_changes_nothing(recipe, capsys):
    run = train(recipe())
    before = (run / "metrics.jsonl").read_text()
    train(recipe())
    assert "finished after 4 steps; raise steps to go on" in capsys.readouterr().out
    assert (run / "metrics.jsonl").read_text() == before


def test_another_recipe_in_the_same_folder_is_refused_with_the_differing_key(recipe):
    train(recipe("steps=1"))
    with pytest.raises(InputError, match=r"differs in optimizer\.lr"):
        train(recipe("optimizer.lr=0.5"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_signal_finishes_the_step_and_saves(recipe, number, code):
    stops = f"rewards=[{{kind: 'loop_parts:SendsSignal', number: {int(number)}}}]"
    with pytest.raises(Stopped, match="stopped after step 1 and saved") as stopped:
        train(recipe(stops))
    assert stopped.value.exit_code == code
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    saved = checkpoint_module.checkpoints(run_folder(recipe(stops)) / "checkpoints")
    assert [path.name for path in saved] == ["step_000001"]


def test_a_damaged_checkpoint_is_passed_over_and_none_left_is_an_error(recipe, caplog):
    run = train(recipe("steps=2"))
    train(recipe("steps=4"))
    newest = run / "checkpoints" / "step_000004" / "policy.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"x")
    with caplog.at_level(logging.WARNING):
        found = checkpoint_module.latest_checkpoint(run / "checkpoints")
    assert found is not None
    assert found.state.step == 2
    assert "policy.safetensors is damaged; falling back" in caplog.text
    with pytest.raises(CheckpointError, match="name another checkpoint"):
        load(f"{run}@4", torch.device("cpu"))
    (run / "checkpoints" / "step_000002" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no good checkpoint is left"):
        train(recipe())


def test_a_full_disk_leaves_the_checkpoint_before(recipe, monkeypatch):
    run = train(recipe("steps=2"))

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(contents, "save_file", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*goes on from"):
        train(recipe("steps=4"))
    monkeypatch.undo()
    folders = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert folders == ["step_000002"]
    # The steps whose checkpoint was lost are done again, and logged once.
    monkeypatch.syspath_prepend(run.parent)
    train(recipe("steps=4"))
    assert [line["step"] for line in steps_of(run)] == [0, 1, 2, 3]


def test_rewards_that_always_fail_stop_the_run_and_are_never_a_zero(recipe):
    failing = "rewards=[{kind: 'loop_parts:Failing'}]"
    with pytest.raises(
        DivergedError, match=r"for 3 steps in a row a reward failed .*\(at last: .+\)"
    ):
        train(recipe(failing))
    lines = steps_of(run_folder(recipe(failing)))
    assert [line["reward/failed_groups"] for line in lines] == [2, 2, 2]
    assert all("reward/mean" not in line for line in lines)


def test_rewards_that_never_differ_stop_the_run(recipe):
    with pytest.raises(DivergedError, match=r"2 steps in a row .*equal"):
        train(recipe("rewards.0.constant=true", "liveness.equal_reward_steps=2"))


def test_one_reward_for_all_images_is_named_before_equal_groups(recipe):
    both = ("liveness.equal_reward_steps=2", "liveness.constant_reward_steps=2")
    with pytest.raises(DivergedError, match=r"every image had the same reward; .*constant_reward"):
        train(recipe("rewards.0.constant=true", *both))


def test_a_prompt_the_model_cannot_take_fails_before_the_run_begins(recipe, tmp_path):
    with pytest.raises(InputError, match="prompt 1"):
        train(recipe("prompts.texts=[a star, '   ']", "rollout.prompts_per_step=2"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_more_prompts_per_step_than_there_are_is_refused(recipe):
    with pytest.raises(RecipeError, match="a step takes 9 prompts"):
        train(recipe("rollout.prompts_per_step=9"))


def test_a_run_is_a_model_at_its_newest_or_a_named_step(recipe):
    run = train(recipe())
    newest = load(str(run), torch.device("cpu"))
    named = load(f"{run}@2", torch.device("cpu"))
    assert isinstance(newest, JanusPolicy)
    name = "model.language_model.norm.weight"
    for policy, step in ((newest, 4), (named, 2)):
        weights = dict(policy.module.named_parameters())
        assert torch.equal(weights[name], parameters_of(run, step)[name])
    with pytest.raises(InputError, match="no checkpoint of step 3; the run has: 2, 4"):
        load(f"{run}@3", torch.device("cpu"))


def test_micro_batches_and_several_updates_train_too(recipe):
    run = train(recipe("training.groups_per_microbatch=1", "optimizer.updates_per_rollout=2"))
    assert len(steps_of(run)) == 4


def test_a_stop_signal_in_the_last_step_stops_too(recipe):
    stops = f"rewards=[{{kind: 'loop_parts:SendsSignal', number: {int(signal.SIGTERM)}}}]"
    with pytest.raises(Stopped, match="stopped after step 1 and saved"):
        train(recipe(stops, "steps=1"))


def test_prompts_that_share_an_index_are_refused(recipe):
    prompts = (Prompt("a star", 3), Prompt("a circle", 4), Prompt("a square", 3))
    with pytest.raises(InputError, match="2 prompts have index 3"):
        check_prompts(recipe(), prompts)


def test_weights_are_a_model_too(tiny_janus_folder):
    policy = load(str(tiny_janus_folder), torch.device("cpu"))
    assert policy.layout.num_tokens == 16
