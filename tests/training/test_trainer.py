"""What a trainer refuses before the first step."""

import sys

import pytest
import torch

from stage_rl.errors import InputError, RecipeError, RewardError
from stage_rl.policies.base import PolicyConfig
from stage_rl.policies.janus import JanusConfig
from stage_rl.training.trainer import build_trainer
from stage_rl.types import Prompt


def test_parameters_in_bfloat16_do_not_train(recipe):
    wanted = recipe("policy.dtype=bfloat16")
    with pytest.raises(RecipeError, match=r"policy\.dtype: .* write policy\.dtype=float32"):
        build_trainer(wanted, wanted.prompts.build())


class Plain(PolicyConfig):
    """A family that takes neither an adapter nor another precision."""

    path: str
    lora_targets = ("qkv", "gate_up_proj")
    default_trainable = ("model.language_model.norm.*",)

    def build(self, device):
        return JanusConfig(path=self.path, trainable=self.trainable).build(device)


PLAIN = f"policy.kind={__name__}:Plain"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("policy.lora.rank=2", r"policy\.lora: the policy .*:Plain takes no adapter; write null"),
        ("policy.dtype=bfloat16", r"policy\.dtype: the policy .*:Plain holds .* in float32"),
    ],
)
def test_what_a_family_does_not_know_is_refused(recipe, override, message):
    wanted = recipe(PLAIN, override)
    with pytest.raises(RecipeError, match=message):
        build_trainer(wanted, wanted.prompts.build())


def test_a_family_says_what_trains_and_gets_an_adapter_where_nothing_is_written(recipe):
    policy = recipe(PLAIN, "policy.lora.rank=2").policy
    assert policy.lora.targets == ("qkv", "gate_up_proj")
    assert policy.trainable == ("model.language_model.norm.*",)
    assert recipe(PLAIN, "policy.lora.targets=[out]").policy.lora.targets == ("out",)
    assert recipe(PLAIN, "policy.trainable=[a, b]").policy.trainable == ("a", "b")
    with pytest.raises(
        RecipeError, match=r"policy\.trainable: with policy\.lora the adapter alone"
    ):
        recipe(PLAIN, "policy.lora.rank=2", "policy.trainable=[a]")


def test_each_text_is_tried_once_and_the_first_bad_prompt_is_named(recipe, tiny_janus, monkeypatch):
    seen = []
    kind, encode = type(tiny_janus), type(tiny_janus).encode
    monkeypatch.setattr(kind, "encode", lambda *a: seen.extend(a[1]) or encode(*a))
    prompts = tuple(Prompt(("a star", "a circle")[i % 2], i) for i in range(10))
    build_trainer(recipe(), prompts)
    assert [prompt.index for prompt in seen] == [0, 1]
    with pytest.raises(InputError, match="prompt 3"):
        build_trainer(recipe(), (prompts[0], Prompt(" ", 3), Prompt(" ", 4)))


def test_without_a_probe_no_probe_is_drawn(recipe, monkeypatch):
    wanted = recipe("probe.every=0")
    trainer = build_trainer(wanted, wanted.prompts.build())
    monkeypatch.setattr(trainer, "sample", None)
    name = "model.language_model.norm.weight"
    trained, held = (
        dict(p.module.named_parameters())[name] for p in (trainer.policy, trainer.reference)
    )
    with torch.no_grad():
        trained.mul_(2)
    trainer.refresh_reference()
    assert torch.equal(held, trained)


def test_a_reward_that_fails_its_self_test_does_not_train_unless_told_to(recipe):
    wanted = recipe("rewards.0.kind=loop_parts:Darkness")
    with pytest.raises(RewardError, match="'Darkness': 1 of 1 reference pairs are in the wrong"):
        build_trainer(wanted, wanted.prompts.build())
    wanted = recipe("rewards.0.kind=loop_parts:Darkness", "rewards.0.self_test=false")
    assert build_trainer(wanted, wanted.prompts.build()).recipe is wanted


@pytest.mark.parametrize("release", [True, False])
def test_the_recipe_says_how_many_images_are_sampled_at_one_time_and_what_is_kept(recipe, release):
    wanted = recipe("rollout.max_images=2", f"rollout.release_cache={str(release).lower()}")
    trainer = build_trainer(wanted, wanted.prompts.build())
    assert trainer.engine.max_images == 2
    whole = build_trainer(recipe(), wanted.prompts.build())
    few, all_ = (t.sample(t.engine, t.prompts_of(0), step=0) for t in (trainer, whole))
    assert torch.equal(few.tokens_NT, all_.tokens_NT)
    assert (trainer.engine._cache is None) is release


def test_layers_of_policy_and_reference_are_compiled(recipe, monkeypatch):
    compiled = []
    monkeypatch.setenv("CXX", sys.executable)  # any program: nothing is compiled here
    monkeypatch.setattr(torch, "compile", lambda f: compiled.append(f.__self__) or f)
    wanted = recipe("training.compile=true")
    trainer = build_trainer(wanted, wanted.prompts.build())
    layers = [*trainer.policy.trunk_blocks, *trainer.reference.trunk_blocks]
    assert [id(layer) for layer in compiled] == [id(layer) for layer in layers]


def test_without_a_compiler_a_run_that_compiles_is_refused(recipe, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    wanted = recipe("training.compile=true")
    with pytest.raises(InputError) as caught:
        build_trainer(wanted, wanted.prompts.build())
    assert str(caught.value) == (
        "training.compile: no C++ compiler 'no-such-compiler' found; install it, name another in "
        "CXX, or write false"
    )
