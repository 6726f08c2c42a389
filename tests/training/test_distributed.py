"""Several processes of one run: what they tell each other, and that they equal one process."""

import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from run_files import steps_of, untimed
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader

from stage_rl.api import load
from stage_rl.bench import fsdp2
from stage_rl.config import resolved_json
from stage_rl.distributed import SINGLE, World, concat, launched
from stage_rl.errors import InputError, RecipeError
from stage_rl.training.checkpoint import checkpoints, damage
from stage_rl.training.loop import train, train_on
from stage_rl.training.metrics import over_ranks


@dataclass(frozen=True)
class Part:
    values_P: Tensor
    columns: dict[str, Tensor]
    names: tuple[str, ...]
    size: int = 3


def test_parts_of_ranks_are_concatenated_field_by_field():
    one = Part(torch.tensor([1.0]), {"a": torch.ones(1)}, ("x",))
    other = Part(
        torch.tensor([2.0, 3.0]),
        {"a": torch.zeros(1), "b": torch.ones(1)},
        ("y", "z"),
    )
    both = concat([one, other])
    assert both.values_P.tolist() == [1, 2, 3]
    assert both.columns["a"].tolist() == [1, 0]
    # The first rank's reward had no such part: NaN is what a reward says that does not apply.
    assert both.columns["b"].isnan().tolist() == [True, False]
    assert both.names == ("x", "y", "z")
    assert both.size == 3
    assert concat([None, None]) is None


def test_numbers_of_ranks_are_means_largest_and_sums():
    parts = [
        {"kl/mean": 1.0, "mismatch/logprobs_max": 1.0, "kl/own_max": 1.0, "resample/groups": 1.0},
        {"kl/mean": 2.0, "mismatch/logprobs_max": 3.0, "kl/own_max": 2.0, "resample/groups": 2.0},
        {"only": 5.0},
    ]
    assert over_ranks(parts) == {
        "kl/mean": 1.5,
        "mismatch/logprobs_max": 3.0,
        "kl/own_max": 1.5,
        "resample/groups": 3.0,
        "only": 5.0,
    }


def test_without_torchrun_there_is_one_rank_and_with_it_ranks_share_groups_in_order(monkeypatch):
    names = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    for name in names:
        monkeypatch.delenv(name, raising=False)
    assert launched() == SINGLE
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    assert launched() == World(5, 8, 1)
    assert [World(rank, 3).share("abcdef") for rank in range(3)] == ["ab", "cd", "ef"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        # 2 prompts on 3 processes: no common divisor but 1.
        ((), r"rollout\.prompts_per_step: 2 groups .* 3 processes; write a multiple of 3, or st"),
        (("rollout.prompts_per_step=3",), r"probe\.num_prompts: 2 groups cannot be split"),
        (
            ("rollout.prompts_per_step=3", "probe.every=0", "optimizer.kind=adamw_8bit"),
            "adamw_8bit is for one process; write adamw",
        ),
        (
            ("rollout.prompts_per_step=3", "probe.every=0", "training.reference=streamed"),
            "streamed is for one process; write resident",
        ),
        (
            ("rollout.prompts_per_step=3", "probe.every=0", "training.shard_ranks=2"),
            r"shard_ranks: 3 processes cannot be split into groups of 2",
        ),
    ],
)
def test_what_cannot_be_spread_is_refused_before_anything_is_loaded(recipe, overrides, message):
    with pytest.raises(RecipeError, match=message):
        train_on(recipe(*overrides, "policy.path=/no/such/weights"), World(0, 3))


def compared(recipe, tmp_path, *overrides, num_ranks=2):
    settings = ("optimizer.lr=1e-5", "training.groups_per_microbatch=1", "run.log_images_every=0")
    found = fsdp2.compare(recipe(*settings, *overrides), num_ranks, tmp_path)
    assert found["tokens_identical"] == 1
    for name in ("gradients_relative", *(n for n in found if n.startswith("parameters"))):
        assert found[name] <= 1e-6, name


def test_two_processes_equal_one_and_each_resumes_what_the_other_saved(recipe, tmp_path):
    compared(recipe, tmp_path)
    (saved,) = checkpoints(tmp_path / "several")
    assert damage(saved) is None
    part = saved / "shards" / "__1_0.distcp"
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    assert damage(saved) == "shards/__1_0.distcp is damaged"


@pytest.mark.slow
def test_two_processes_train_in_mixed_precision(recipe, tmp_path):
    """Gathered in bf16, the layers round as autocast does; images of other passes may differ."""
    mixed = ("training.dtype=mixed", "training.groups_per_microbatch=1", "run.log_images_every=0")
    found = fsdp2.compare(recipe("optimizer.lr=1e-5", *mixed), 2, tmp_path)
    assert found["tokens_identical"] == 1  # the sampler is fp32 here
    # A bf16 number has 8 bits: 2^-8 = 0.004 for one rounding, here of many.
    assert found["gradients_relative"] < 0.02
    assert found["parameters"] <= 3e-5  # at most 3 steps of lr 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ("rollout.prompts_per_step=4", "training.groups_per_microbatch=2"),
        ("policy.lora={rank: 4, alpha: 8}",),
        ("policy.trainable=['*']", "training.activation_checkpointing=full"),
        ("algorithm.logprobs=guided", "optimizer.updates_per_rollout=2"),
        ("algorithm.reference_refresh_every=1", "algorithm.entropy.mode=loss"),
        ("rewards=[{kind: 'loop_parts:FailsOn', text: a star}]", "rollout.prompts_per_step=4"),
        ("rewards=[{kind: 'loop_parts:Coarse'}]", "rollout.resample_equal_groups=3"),
        ("algorithm.credit=methods:first_half", "algorithm.loss=methods:reinforce"),
        (
            "rewards=[{kind: 'loop_parts:Brightness'}, {kind: 'loop_parts:Coarse', weight: 0.5}]",
            *("algorithm.advantage=gdpo", "algorithm.credit=critical"),
        ),
        (
            "algorithm.credit={kind: guidance, eta: exact}",
            *("algorithm.importance_sampling=geometric_mask", "algorithm.loss=gspo_token"),
        ),
        ("algorithm.credit=guidance", "algorithm.loss=cispo", "algorithm.logprobs=guided"),
        ("algorithm.kl.estimator=exact", "optimizer.updates_per_rollout=2"),
        ("algorithm.kl.estimator=exact", "policy.trainable=['*']"),
        (
            *("algorithm.credit={kind: entropy_bonus, form: paper}", "algorithm.kl.estimator=k1"),
            *("algorithm.loss=dr_grpo", "algorithm.importance_sampling=token_mask"),
        ),
        (
            *("algorithm.credit={kind: high_entropy, scope: group}", "algorithm.kl.estimator=k2"),
            *("algorithm.loss=sapo", "algorithm.importance_sampling=token_truncate"),
        ),
        (
            *("algorithm.credit=uniform", "algorithm.kl.estimator=k3+", "algorithm.loss=gspo"),
            "algorithm.importance_sampling=sequence_truncate",
        ),
        (
            *("algorithm.kl.estimator=rk3", "optimizer.updates_per_rollout=2"),
            *("algorithm.loss=gmpo", "algorithm.credit=uniform"),
            "algorithm.importance_sampling=sequence_mask",
        ),
    ],
    ids=[
        *("microbatch", "lora", "all", "guided", "refresh", "failing", "resample", "methods"),
        *(
            "gdpo",
            "guidance",
            "sampled",
            "exact",
            "exact all",
            "bonus",
            "high",
            "sequence",
            "ratio",
        ),
    ],
)
def test_two_processes_equal_one_in_other_recipes(recipe, tmp_path, overrides):
    compared(recipe, tmp_path, *overrides)


@pytest.mark.slow
def test_four_processes_with_a_copy_in_each_two_equal_one(recipe, tmp_path):
    shards = ("training.shard_ranks=2", "rollout.prompts_per_step=4", "probe.num_prompts=4")
    compared(recipe, tmp_path, *shards, num_ranks=4)
    (saved,) = checkpoints(tmp_path / "several")
    # Cut in two, and each piece written once, though two processes hold it.
    index = FileSystemReader(saved / "shards").read_metadata().state_dict_metadata
    even = [e for n, e in index.items() if n.startswith("policy.") and e.size[0] % 4 == 0]
    assert {len(entry.chunks) for entry in even} == {2}


def torchrun(recipe, tmp_path):
    """A run of two processes on this machine, through the command line."""
    file = tmp_path / "resolved.json"
    file.write_text(resolved_json(recipe))
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "stage_rl", "train"]
    paths = os.pathsep.join(filter(None, sys.path))
    return subprocess.run(
        [sys.executable, *command, str(file)],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_in_one(recipe, tmp_path):
    same = ("optimizer.schedule=constant", "optimizer.lr=1e-5")
    same += ("run.log_images_every=1", "probe.every=1")
    whole = train(recipe(*same, f"run.dir={tmp_path}/whole"))
    halves = (*same, f"run.dir={tmp_path}/halves")
    done = torchrun(recipe(*halves, "steps=2"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 2/2") == done.stdout.count("run: ") == 1
    resumed = train(recipe(*halves))
    one, other = (load(str(run), torch.device("cpu")) for run in (whole, resumed))
    pairs = zip(one.module.parameters(), other.module.parameters(), strict=True)
    assert max((a - b).abs().max().item() for a, b in pairs) <= 1e-6
    for alone, together in zip(untimed(steps_of(whole)), untimed(steps_of(resumed)), strict=True):
        assert together == pytest.approx(alone, rel=1e-3, abs=1e-5)
    assert sorted(p.name for p in (resumed / "images").iterdir()) == sorted(
        p.name for p in (whole / "images").iterdir()
    )


@pytest.mark.slow
def test_a_stop_signal_to_any_process_ends_all_after_the_step(recipe, tmp_path):
    stops = "rewards=[{kind: 'loop_parts:OnRank', rank: 1, does: terminate}]"
    done = torchrun(recipe(stops), tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("stopped after step 1 and saved") == 1, done.stderr
    assert [path.name for path in checkpoints(tmp_path / "run" / "checkpoints")] == ["step_000001"]


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_run_and_its_last_checkpoint_resumes(recipe, tmp_path):
    killed = "rewards=[{kind: 'loop_parts:OnRank', rank: 1, does: kill, call: 3}]"
    settings = (killed, "run.save_every=1", "steps=3")
    done = torchrun(recipe(*settings), tmp_path)
    assert done.returncode != 0
    # The other one notices by itself, or torchrun stops it first.
    said = ("another process of the run was killed or fell silent", "stopped; the same command")
    assert any(text in done.stderr for text in said), done.stderr
    assert [path.name for path in checkpoints(tmp_path / "run" / "checkpoints")] == [
        "step_000002",
        "step_000001",
    ]
    assert len(steps_of(train(recipe(*settings)))) == 3


@pytest.mark.slow
def test_an_error_of_one_process_is_told_once(recipe, tmp_path):
    wrong = "rewards=[{kind: 'loop_parts:OnRank', rank: 1, does: lie}]"
    done = torchrun(recipe(wrong), tmp_path)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert lines == [
        "error: reward 'OnRank': returned str; return a list with one Score(value, why) per image"
    ], done.stderr


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"RANK": "abc", "WORLD_SIZE": "2"}, "RANK: 'abc' is not the number of a process; start"),
        ({"WORLD_SIZE": "2"}, "RANK: '' is not the number of a process; start with torchrun"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, r"RANK: 2 is not below WORLD_SIZE \(2\)"),
    ],
)
def test_half_of_what_torchrun_says_is_refused(monkeypatch, given, message):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message):
        launched()
