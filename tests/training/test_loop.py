"""The trainer end to end on a tiny Janus: resumes to the bit, stops cleanly, loses nothing."""

import errno
import json
import logging
import os
import shutil
import signal
import time

import loop_parts
import numpy as np
import pytest
import torch
from run_files import assert_resumes_to_the_bit, parameters_of, steps_of
from safetensors.torch import load_file, save_file

from stage_rl.api import load
from stage_rl.config import load_recipe, resolved_json, run_folder
from stage_rl.errors import (
    CheckpointError,
    DivergedError,
    InputError,
    RecipeError,
    RewardError,
    Stopped,
)
from stage_rl.policies.digest import SUMS, base_digest
from stage_rl.policies.janus import JanusPolicy
from stage_rl.rewards import threads
from stage_rl.training import checkpoint, trainer
from stage_rl.training.loop import check_prompts, train
from stage_rl.types import Prompt


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("optimizer.updates_per_rollout=2", "training.groups_per_microbatch=1"),
        ("algorithm.reference_refresh_every=1",),
        ("rollout.resample_equal_groups=2", "rewards=[{kind: 'loop_parts:Coarse'}]"),
    ],
    ids=["plain", "updates", "refresh", "resample"],
)
def test_two_steps_and_two_more_equal_four_to_the_bit(recipe, tmp_path, overrides):
    whole = steps_of(assert_resumes_to_the_bit(recipe, tmp_path, *overrides))
    if "rollout.resample_equal_groups=2" in overrides:
        assert sum(line["resample/groups"] for line in whole) > 0


def test_a_run_whose_base_was_recorded_by_a_gpu_goes_on_on_a_cpu(recipe, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(trainer, "base_digest", lambda policy, **_: base_digest(policy, like=SUMS))
        run = train(recipe("steps=2"))
    state = json.loads((run / "checkpoints/step_000002/state.json").read_text())
    assert state["base"].startswith(SUMS)
    train(recipe("steps=3"))
    assert [line["step"] for line in steps_of(run)] == [0, 1, 2]
    assert load(str(run)).device.type == "cpu"


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
    # 2 x 3 images of 16 tokens
    assert first["images_per_s"] == pytest.approx(6 / first["time/step_s"])
    assert first["tokens_per_s"] == pytest.approx(96 / first["time/step_s"])
    assert "time/log_s" not in steps_of(run)[1]
    # Every second step, and the last one.
    assert [line["step"] for line in steps_of(run) if "probe/kl" in line] == [0, 2, 3]
    arrays = np.load(run / "samples" / "000002.npz")
    assert arrays["tokens"].shape == arrays["similarity"].shape == (1, 3, 16)
    assert arrays["advantages"].shape == arrays["kl_weight"].shape == (1, 3, 16)
    reasons = json.loads((run / "images" / "000002.json").read_text())
    assert "luminance" in reasons[0]["reason"]
    assert (run / "images" / "000002.png").stat().st_size > 0
    for folder in ("images", "samples"):  # no temporary file is left
        assert all(path.name.startswith("0000") for path in (run / folder).iterdir())
    assert resolved_json(load_recipe(run / "recipe.yaml")) == resolved_json(recipe())
    assert json.loads((run / "environment.json").read_text())["packages"]["torch"]


def test_another_recipe_in_the_same_folder_is_refused_with_the_differing_key(recipe):
    train(recipe("steps=1"))
    with pytest.raises(InputError, match=r"differs in optimizer\.lr"):
        train(recipe("optimizer.lr=0.5"))


@pytest.mark.parametrize(
    ("number", "code", "steps"),
    [(signal.SIGINT, 130, 4), (signal.SIGTERM, 143, 4), (signal.SIGTERM, 143, 1)],
)
def test_a_stop_signal_finishes_the_step_even_the_last_and_saves(recipe, number, code, steps):
    stops = f"rewards=[{{kind: 'loop_parts:SendsSignal', number: {int(number)}}}]"
    with pytest.raises(Stopped, match="stopped after step 1 and saved") as stopped:
        train(recipe(stops, f"steps={steps}"))
    assert stopped.value.exit_code == code
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    saved = checkpoint.checkpoints(run_folder(recipe(stops)) / "checkpoints")
    assert [path.name for path in saved] == ["step_000001"]


def test_a_damaged_checkpoint_is_passed_over_and_none_left_is_an_error(recipe, caplog):
    run = train(recipe("steps=2"))
    train(recipe("steps=4"))
    newest = run / "checkpoints" / "step_000004" / "policy.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"x")
    with caplog.at_level(logging.WARNING):
        found = checkpoint.latest_checkpoint(run / "checkpoints")
    assert found is not None
    assert found.state.step == 2
    assert "policy.safetensors is damaged; falling back" in caplog.text
    with pytest.raises(CheckpointError, match="name another checkpoint"):
        load(f"{run}@4", torch.device("cpu"))
    (run / "checkpoints" / "step_000002" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no good checkpoint is left"):
        train(recipe())


@pytest.mark.parametrize("cap", [0, 1])
def test_a_run_whose_reward_hangs_is_stopped_by_one_signal_and_saved(recipe, monkeypatch, cap):
    monkeypatch.setattr(threads, "STOP_S", 0.1)
    hangs = "rewards=[{kind: 'loop_parts:HangsAtCall', call: 2}]"
    settings = recipe(hangs, f"rollout.resample_equal_groups={cap}")
    started = time.monotonic()
    with pytest.raises(Stopped, match="stopped in step 2, whose rewards did not") as stopped:
        train(settings)
    assert time.monotonic() - started < 30  # of the 60 s that it hangs
    assert stopped.value.exit_code == 128 + signal.SIGHUP
    folder = run_folder(settings) / "checkpoints"
    assert [path.name for path in checkpoint.checkpoints(folder)] == ["step_000001"]


@pytest.mark.parametrize(
    ("kind", "reason"), [("Failing", "Failing failed"), ("DoesNotApply", "DoesNotApply does not")]
)
def test_a_run_in_which_no_group_had_a_reward_is_no_success(recipe, kind, reason):
    with pytest.raises(RewardError, match=f"no step had a reward to learn from.*{reason}"):
        train(recipe(f"rewards=[{{kind: 'loop_parts:{kind}'}}]", "steps=2"))
    # Nor is the same command again.
    with pytest.raises(RewardError, match="no step had a reward"):
        train(recipe(f"rewards=[{{kind: 'loop_parts:{kind}'}}]", "steps=2"))


def test_a_run_that_learned_before_it_was_stopped_is_a_success(recipe, monkeypatch):
    train(recipe("steps=1"))
    failing = loop_parts.Failing().build(torch.device("cpu"))
    monkeypatch.setattr(loop_parts.Brightness, "build", lambda self, device: failing)
    run = train(recipe("steps=2"))
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_full_disk_leaves_the_checkpoint_before(recipe, monkeypatch):
    run = train(recipe("steps=2"))

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*goes on from"):
        train(recipe("steps=4"))
    monkeypatch.undo()
    folders = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert folders == ["step_000002"]
    # The steps whose checkpoint was lost are done again, and logged once.
    train(recipe("steps=4"))
    assert [line["step"] for line in steps_of(run)] == [0, 1, 2, 3]


def test_rewards_that_always_fail_stop_the_run_and_are_never_a_zero(recipe):
    failing = "rewards=[{kind: 'loop_parts:Failing'}]"
    with pytest.raises(
        DivergedError,
        match=r"for 3 steps in a row a reward failed .*\(at last: .+\(loop_parts\.py:\d+\)\)",
    ):
        train(recipe(failing))
    lines = steps_of(run_folder(recipe(failing)))
    assert [line["reward/failed_groups"] for line in lines] == [2, 2, 2]
    assert all("reward/mean" not in line for line in lines)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((), r"2 steps in a row .*equal"),
        # One reward for all images is named before equal groups.
        (
            ("liveness.constant_reward_steps=2",),
            r"every image had the same reward; .*constant_reward",
        ),
    ],
)
def test_rewards_that_never_differ_stop_the_run(recipe, overrides, message):
    constant = ("rewards.0.constant=true", "liveness.equal_reward_steps=2")
    with pytest.raises(DivergedError, match=message):
        train(recipe(*constant, *overrides))


def test_prompts_that_will_not_do_fail_before_the_run_begins(recipe, tmp_path):
    with pytest.raises(InputError, match="prompt 1"):
        train(recipe("prompts.texts=[a star, '   ']", "rollout.prompts_per_step=2"))
    with pytest.raises(RecipeError, match="a step takes 9 prompts"):
        train(recipe("rollout.prompts_per_step=9"))
    prompts = (Prompt("a star", 3), Prompt("a circle", 4), Prompt("a square", 3))
    with pytest.raises(InputError, match="2 prompts have index 3"):
        check_prompts(recipe(), prompts)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_run_is_a_model_at_its_newest_or_a_named_step(recipe, tmp_path):
    run = train(recipe(f"run.dir={tmp_path}/a@b"))
    newest, named = load(str(run), torch.device("cpu")), load(f"{run}@2", torch.device("cpu"))
    assert isinstance(newest, JanusPolicy)
    name = "model.language_model.norm.weight"
    for policy, step in ((newest, 4), (named, 2)):
        weights = dict(policy.module.named_parameters())
        assert torch.equal(weights[name], parameters_of(run, step)[name])
    with pytest.raises(InputError, match="no checkpoint of step 3; the run has: 2, 4"):
        load(f"{run}@3", torch.device("cpu"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_a_policy_whose_logits_are_not_finite_is_named_before_anything_is_drawn(
    recipe, tiny_janus_folder, tmp_path, value
):
    folder = shutil.copytree(tiny_janus_folder, tmp_path / "broken")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "generation_head" in name and "weight" in name)
    tensors[name].fill_(value)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(DivergedError, match=r"^step 1: the logits of the policy are not finite"):
        train(recipe(f"policy.path={folder}"))


@pytest.mark.parametrize(
    "wrong",
    [
        *("optimizer.lr=1e10", "optimizer.eps=1e-300", "rollout.guidance_scale=1e38"),
        *("rollout.temperature=1e-45", "rewards.0.weight=1e39"),
    ],
)
def test_a_setting_that_fp32_does_not_bear_is_refused_by_its_key(recipe, wrong):
    with pytest.raises(RecipeError, match=rf"{wrong.partition('=')[0]}: .* is out of range; write"):
        recipe(wrong)


def test_an_update_that_destroys_the_policy_is_not_saved(recipe):
    with pytest.raises(DivergedError, match=r"step \d: .*(not finite|is nan|is inf)"):
        train(recipe("optimizer.lr=1", "optimizer.weight_decay=1e38", "run.save_every=1"))
    saved = checkpoint.checkpoints(run_folder(recipe()) / "checkpoints")
    tensors = [t for folder in saved for t in load_file(folder / "policy.safetensors").values()]
    assert all(t.isfinite().all() for t in tensors)
