"""The step benchmark, on models of a few thousand parameters; the eager step is no straw man."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from stage_rl.bench import step
from stage_rl.bench.models import recipe_of
from stage_rl.bench.rollout import generate, with_plain_layers
from stage_rl.errors import InputError, StageError
from stage_rl.objective.loss import clip
from stage_rl.objective.stage import stage
from stage_rl.rewards.judge import RewardFunctions
from stage_rl.rollout.engine import Engine
from stage_rl.rollout.sample import rollout as sample_rollout
from stage_rl.rollout.sampling import Sampling
from stage_rl.training.measure import Precision, measure_all, micro_batches
from stage_rl.training.update import Update, learn, measure_to_learn
from stage_rl.types import Prompt, Rewards, Rollout

PROMPTS = [
    Prompt("a red square", 0),
    Prompt("a photo of two blue circle and three green star", 1),
    Prompt("the star above a square", 2),
]
GROUP_SIZE = 4
# A best one, two best ones, all equal.
REWARDS_PG = torch.tensor([[1.0, 0.0, 0.5, 0.25], [0.0, 1.0, 1.0, 0.0], [0.3, 0.3, 0.3, 0.3]])
SMALL = {"num_prompts": 2, "group_size": 3, "rounds": 1}


def test_every_phase_of_both_forms_is_measured(tiny_shapes_folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    # The recipe's own rewards are asked, which read 48 x 48 pixels.
    result = step.run(model=str(tiny_shapes_folder), **SMALL, overrides="optimizer.lr=2e-5")
    assert result.reached is None
    for phase in step.PHASES:
        trainer, eager = (result.measures[f"{phase}_{form}_ms"] for form in ("trainer", "eager"))
        assert min(trainer, eager) > 0
        assert result.measures[f"{phase}_speedup"] == pytest.approx(eager / trainer)
    head, *rows = (line.split() for line in result.table[:6])
    assert head == ["trainer_ms", "eager_ms", "ideal_ms", "speedup"]
    assert [row[0] for row in rows] == list(step.PHASES)
    assert not list(tmp_path.iterdir())


def test_a_published_size_is_trained_alone_beside_its_ideal(tiny_published):
    result = step.run(
        model="janus-7b", **SMALL, overrides="training.dtype=float32 optimizer.kind=adamw"
    )
    assert result.reached is None
    for phase in ("sample", "reference", "learn", "step"):
        assert result.measures[f"{phase}_trainer_ms"] > 0
        assert result.measures[f"{phase}_ideal_ms"] > 0
    assert result.headline.endswith("s ideal")
    assert result.table[0].split() == ["trainer_ms", "ideal_ms"]


@pytest.mark.parametrize(("speedup", "reached"), [(3.0, True), (2.9, False)])
def test_the_bar_holds_for_the_shapes_sizes(monkeypatch, tiny_shapes_folder, speedup, reached):
    def medians(forms, rounds):
        return {
            "trainer": dict.fromkeys(step.PHASES.values(), 1.0),
            "eager": dict.fromkeys(step.PHASES.values(), speedup),
        }

    monkeypatch.setattr(step, "medians_in_turn", medians)
    monkeypatch.setattr(step, "ideal_ms", lambda _: dict.fromkeys(step.PHASES, 1.0))
    monkeypatch.setattr(step, "IMAGES", 2 * 3)
    monkeypatch.setattr(step, "TOKENS", 144)
    result = step.run(model=str(tiny_shapes_folder), **SMALL)
    assert result.reached is reached
    assert result.headline == f"{speedup:.1f}x the eager step, 1000 against {speedup * 1e3:.0f} ms"


def test_the_recipe_of_a_benchmark_has_its_options():
    recipe = recipe_of(
        "shapes", ["steps=7", "rollout.guidance_scale=2"], num_prompts=2, group_size=4
    )
    assert (recipe.rollout.prompts_per_step, recipe.rollout.group_size) == (2, 4)
    assert (recipe.rollout.guidance_scale, recipe.steps) == (2, 7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overrides": "rollout.dtype=bf16"}, "rollout.dtype"),
        ({"model": "no/folder"}, "no/folder: no such folder"),
        ({"overrides": "algorithm.credit=uniform"}, "the eager form has the default objective"),
    ],
)
def test_a_wrong_option_is_one_line(options, message):
    with pytest.raises(StageError) as caught:
        step.run(**options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, InputError)


@pytest.fixture
def eager(tiny_janus_folder):
    """An eager step in fp32 whose policy has moved from its reference."""
    # The policy term of a first update is a mean of advantages, near 0: rounding errors would
    # decide the loss without the KL term.
    recipe = recipe_of(
        str(tiny_janus_folder),
        ["algorithm.beta=1", "rollout.dtype=float32", "training.dtype=float32"],
        num_prompts=3,
        group_size=GROUP_SIZE,
    )
    eager = step.EagerStep(recipe, RewardFunctions([]), torch.device("cpu"))
    with torch.no_grad():
        for parameter in eager.policy.module.model.language_model.parameters():
            parameter.mul_(1.05)
    return eager


class Recorder(torch.optim.SGD):
    """Keeps the gradient of the update."""

    def step(self, closure=None):
        self.gradient = flat(p.grad for p in self.param_groups[0]["params"])
        return super().step(closure)


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def trained(policy):
    return [p for p in policy.module.parameters() if p.requires_grad]


def test_eager_loss_and_gradient_are_the_trainers(eager, tiny_janus):
    tokens = torch.randint(64, (12, 16), generator=torch.Generator().manual_seed(0))
    images = torch.zeros(len(tokens), 16, 16, 3, dtype=torch.uint8)
    rollout = Rollout(tuple(PROMPTS), GROUP_SIZE, tokens, images)
    reference = tiny_janus.reference()
    tiny_janus.module.load_state_dict(eager.policy.module.state_dict())
    batches = list(micro_batches(rollout, None, torch.device("cpu")))
    optimizer = Recorder(trained(tiny_janus), lr=1e-3)
    update = Update(eager.recipe.algorithm, stage, clip, Precision(), 1, 1e-3, None)
    learned = learn(
        tiny_janus,
        optimizer,
        batches,
        first=measure_to_learn(tiny_janus, batches[0], update),
        rewards=Rewards(REWARDS_PG, torch.ones(3, dtype=torch.bool), {}, ()),
        reference=measure_all(reference, batches, Precision()),
        update=update,
    )
    with torch.no_grad():
        measured = eager.measure(eager.reference, rollout)
    loss = eager.loss(rollout, REWARDS_PG, measured)
    loss.backward()
    gradient = flat(p.grad for p in trained(eager.policy))
    # Sums of terms of the size of 1 in fp32.
    assert loss.item() == pytest.approx(learned.losses["loss/total"].item(), abs=1e-6)
    assert abs(loss.item()) > 1e-3
    assert (gradient - optimizer.gradient).norm() <= 1e-5 * optimizer.gradient.norm()


def test_left_padded_generate_draws_what_the_engine_draws(tiny_janus):
    greedy = Sampling(guidance_scale=3.0, temperature=0.0)
    ours = sample_rollout(
        Engine(tiny_janus), PROMPTS, group_size=1, sampling=greedy, seed=0, step=0
    )
    baseline = with_plain_layers(copy.deepcopy(tiny_janus))
    theirs = generate(baseline, PROMPTS, guidance_scale=3.0, greedy=True)
    assert torch.equal(ours.tokens_NT, theirs)


def test_the_eager_models_use_transformers_attention_and_norms(eager):
    for policy in (eager.policy, eager.reference):
        assert policy.module.model.language_model.config._attn_implementation == "sdpa"
        for block in policy.trunk_blocks:
            assert isinstance(block.input_layernorm, LlamaRMSNorm)
            assert isinstance(block.post_attention_layernorm, LlamaRMSNorm)
