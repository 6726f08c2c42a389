"""Measuring and learning: independent of the number of micro-batches, and right."""

import copy
from dataclasses import replace

import pytest
import torch
from fake_family import CONTROL, COORDS, FakePolicy

from stage_rl.algorithm_config import AlgorithmConfig
from stage_rl.errors import DivergedError
from stage_rl.policies.janus import JanusPolicy
from stage_rl.settings import resolve_function
from stage_rl.training.measure import Precision, measure, measure_all, micro_batches
from stage_rl.training.update import Update, learn, measure_to_learn, measured_groups
from stage_rl.types import Prompt, Rewards, Rollout

TEXTS = ("a red circle", "the photo of two blue square and three green star", "a star")
SIZE = 3


@pytest.fixture
def policy(tiny_janus):
    return tiny_janus


def a_rollout(seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(64, (len(TEXTS) * SIZE, 16), generator=generator)
    prompts = tuple(Prompt(text, i) for i, text in enumerate(TEXTS))
    images = torch.zeros(len(tokens), 16, 16, 3, dtype=torch.uint8)
    return Rollout(prompts, SIZE, tokens, images)


def some_rewards(kept=(True, True, True), dtype=torch.float32):
    first = torch.tensor([[1.0, 0.0, 0.5], [0.0, 0.0, 1.0], [0.3, 0.3, 0.3]], dtype=dtype)
    second = torch.tensor([[0.2, 0.7, 0.1], [0.4, 0.4, 0.4], [0.0, 1.0, 0.3]], dtype=dtype)
    known = {"components": {"first": first, "second": second}}
    weights = {"weights": {"first": 1.0, "second": 0.5}}
    return Rewards(first, torch.tensor(kept), {}, ("",) * first.numel(), **known, **weights)


def test_the_scores_that_a_rule_sees_are_those_of_rewards_alone(policy):
    columns = {"first": 1, "second": 2, "first_share": 3, "first_luminance": 4}
    shown = {name: torch.full((3, SIZE), float(value)) for name, value in columns.items()}
    rewards = replace(some_rewards(), columns=shown)
    (batch,) = micro_batches(a_rollout(), None, torch.device("cpu"))
    (known,) = measure_all(policy, [batch], Precision())
    seen = measured_groups(policy, batch, known, known, rewards=rewards, update=update_of())
    assert {name: value[0, 0].item() for name, value in seen.scores.items()} == {
        "first": 1,
        "second": 2,
    }


class Recorder(torch.optim.SGD):
    """Keeps the gradient of each update."""

    def step(self, closure=None):
        self.gradients = [p.grad.clone() for p in self.param_groups[0]["params"]]
        return super().step(closure)


def update_of(*, num_updates=1, lr=1e-3, precision=None, **settings):
    algorithm = AlgorithmConfig.model_validate(settings)
    credit = resolve_function("credit", algorithm.credit)
    loss = resolve_function("loss", algorithm.loss)
    return Update(algorithm, credit, loss, precision or Precision(), num_updates, lr, None)


def move(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.01)


def learned(policy, *, groups=None, rollout=None, rewards=None, lr=1e-3, num_updates=1, **settings):
    """What `learn` does to a policy that has moved from its reference, and the gradient."""
    rollout = rollout or a_rollout()
    reference = policy.reference()
    move(policy.module.model.language_model if isinstance(policy, JanusPolicy) else policy)
    parameters = [p for p in policy.module.parameters() if p.requires_grad]
    optimizer = Recorder(parameters, lr=lr)
    precision = Precision(logprob_rows=50)
    batches = list(micro_batches(rollout, groups, torch.device("cpu")))
    update = update_of(num_updates=num_updates, lr=lr, precision=precision, **settings)
    result = learn(
        policy,
        optimizer,
        batches,
        first=measure_to_learn(policy, batches[0], update),
        rewards=rewards or some_rewards(),
        reference=measure_all(reference, batches, precision),
        update=update,
    )
    return result, torch.cat([g.flatten() for g in optimizer.gradients])


IMPORTANCE = {
    **dict.fromkeys(("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"), 0.9),
    "geometric_mask": 0.99,
}
"""Forms of importance sampling, and a floor that some of the images below are under."""
METHODS = {
    "stage": {},
    "penalty": {"entropy": {"mode": "loss"}},
    "uniform": {"credit": "uniform", "loss": "gspo"},
    "critical": {"credit": {"kind": "critical", "daw_gradient": "through"}},
    "guidance": {"credit": "guidance", "loss": "gspo_token"},
    "exact": {"credit": {"kind": "guidance", "eta": "exact"}, "loss": "gmpo"},
    "bonus": {"credit": {"kind": "entropy_bonus", "form": "paper"}, "loss": "cispo"},
    "high": {"credit": {"kind": "high_entropy", "scope": "group"}, "loss": "sapo"},
    "gdpo": {"advantage": "gdpo"},
} | {
    name: {"importance_sampling": name, "importance_floor": floor}
    for name, floor in IMPORTANCE.items()
}


def measured_rollout(policy):
    """With what a sampler says whose arithmetic is a tenth of a nat from the trainer's."""
    rollout = a_rollout()
    (batch,) = micro_batches(rollout, None, torch.device("cpu"))
    measured = measure(policy, batch, Precision())
    noise = torch.randn(rollout.tokens_NT.shape, generator=torch.Generator().manual_seed(3)) / 10
    sampler = measured.logprobs_NT.detach() + noise
    return replace(rollout, logprobs_NT=sampler, guided_entropy_NT=measured.entropy_NT.detach())


@pytest.mark.parametrize(
    ("name", "dtype", "limit"),
    [(name, torch.float64, 1e-12) for name in METHODS]
    + [(name, torch.float32, 1e-6) for name in ("stage", "penalty", "critical")],
)
def test_gradients_do_not_depend_on_the_number_of_micro_batches(policy, name, dtype, limit):
    policy.to(dtype)
    known = {"rollout": measured_rollout(policy), "rewards": some_rewards(dtype=dtype)}
    found = [
        learned(copy.deepcopy(policy), groups=groups, **known, **METHODS[name])
        for groups in ((None, 1, 2) if name == "stage" else (None, 2))
    ]
    (whole, expected), *parts = found
    assert expected.norm() > 1e-3
    for part, gradient in parts:
        assert (gradient - expected).norm() <= limit * expected.norm()
        total = whole.losses["loss/total"].item()
        assert part.losses["loss/total"].item() == pytest.approx(total, abs=1e-7)
    if name in IMPORTANCE:
        assert whole.credit.metrics["importance/ess"].min() < 1


def test_a_group_that_left_the_step_changes_nothing_for_the_others(policy):
    other = copy.deepcopy(policy)
    full = a_rollout()
    first_two = Rollout(full.prompts[:2], SIZE, full.tokens_NT[: 2 * SIZE], full.images_NHWC)
    rewards = some_rewards()
    two = Rewards(rewards.rewards_PG[:2], rewards.valid_P[:2], {}, ())
    _, expected = learned(policy, rollout=first_two, rewards=two)
    result, gradient = learned(other, rewards=some_rewards((True, True, False)), groups=1)
    assert (gradient - expected).norm() <= 1e-6 * expected.norm()
    # One update: every ratio is 1, and the third group is not among them.
    assert result.losses["ratio/mean"].item() == pytest.approx(1)
    assert result.losses["ratio/max"].item() == 1


def test_a_step_of_another_family_has_the_gradient_of_a_loop_by_hand():
    """The default preset on a family with control tokens and two rotary axes, a token at a time."""
    policy = FakePolicy()
    prompts = (Prompt("a red square", 0), Prompt("a blue circle and two red square", 1))
    tokens = torch.randint(11, (6, 6), generator=torch.Generator().manual_seed(1))
    drawn = Rollout(prompts, 3, tokens, torch.zeros(6, 2, 3, 3, dtype=torch.uint8))
    rewards = [[1.0, 0.0, 1.0], [0.2, 0.9, 0.4]]
    judged = Rewards(torch.tensor(rewards), torch.ones(2, dtype=torch.bool), {}, ("",) * 6)
    reference, kept = policy.reference(), copy.deepcopy(policy)
    result, gradient = learned(policy, rollout=drawn, rewards=judged, groups=1)
    move(kept)
    loss = sum(
        group_loss_by_hand(kept, reference, prompt, tokens[3 * i : 3 * i + 3].tolist(), rewards[i])
        for i, prompt in enumerate(prompts)
    )
    (loss / 36).backward()
    expected = torch.cat([p.grad.flatten() for p in kept.module.parameters()])
    assert (gradient - expected).norm() <= 1e-4 * expected.norm()
    assert result.losses["loss/total"].item() == pytest.approx(loss.item() / 36, abs=1e-6)


def group_loss_by_hand(policy, reference, prompt, images, rewards):
    """Equations 2 to 12 and section 3.2 of a group; the sum over its tokens."""
    size, places = len(images), range(len(images[0]))
    rows = [
        [[logprobs_by_hand(model, prompt, image, t) for t in places] for image in images]
        for model in (policy, reference)
    ]
    entropy, ref_entropy = (
        [sum(-(row.exp() * row).sum().item() for row in image) / len(places) for image in model]
        for model in rows
    )
    bonus = [1 / (1 + (r - h) ** 2) for h, r in zip(entropy, ref_entropy, strict=True)]
    totals = [r + 0.4 * b * (r == max(rewards)) for r, b in zip(rewards, bonus, strict=True)]
    mean = sum(totals) / size
    std = (sum((r - mean) ** 2 for r in totals) / (size - 1)) ** 0.5
    advantages = [(r - mean) / (std + 1e-4) for r in totals]
    codes = [[policy.codes(torch.tensor([[c]]))[0, 0] for c in image] for image in images]

    def similarity(i, t):
        opposed = [j for j in range(size) if j != i and advantages[i] * advantages[j] <= 0]
        return sum(codes[i][t] @ codes[j][t] for j in opposed) / max(1, len(opposed))

    sims = [[float(similarity(i, t)) for t in places] for i in range(size)]
    mask_mean = sum((1 - sim) / 2 for image in sims for sim in image) / (size * len(places))
    loss = torch.zeros(())
    for i, image in enumerate(images):
        for t in places:
            logprob, ref_logprob = (model[i][t][image[t]] for model in rows)
            weight = (1 - sims[i][t]) / 2 / mask_mean
            gap = ref_logprob.detach() - logprob
            kl_weight = 0.5 + 0.5 * min(max(sims[i][t] + 1, 0), 1)
            loss = loss - (logprob - logprob.detach()).exp() * advantages[i] * weight
            loss = loss + 0.03 * kl_weight * (gap.exp() - gap - 1)
    return loss


def logprobs_by_hand(policy, prompt, tokens, place):
    """Of all codes at one place: the prompt and all tokens before it as one plain sequence."""
    embeds_1LD, column = policy.encode([prompt]).embeds_PLD, [0, 1, 2, 4, 5, 6][place]
    ids = [*tokens[:3], CONTROL, *tokens[3:]][:column]
    states = torch.cat([embeds_1LD[0], policy.embed(torch.tensor(ids, dtype=torch.long))])[None]
    coords = torch.tensor([(0, 0)] * embeds_1LD.shape[1] + COORDS[:column])[None]
    rotation = policy.rotary(states, coords)
    for layer in policy.trunk_blocks:
        states = layer(states, position_embeddings=rotation)
    return policy.head(policy.module["trunk"].norm(states)[0, -1]).log_softmax(-1)


def test_a_second_update_meets_the_clip_and_if_it_diverges_parameters_have_changed(policy):
    other = copy.deepcopy(policy)
    result, _ = learned(policy, num_updates=2, lr=0.5, clip=0.01)
    assert result.losses["clip/fraction"] > 0
    with pytest.raises(DivergedError, match=r"is nan|is inf") as diverged:
        learned(other, num_updates=2, lr=1e30)
    assert "left as they were" not in str(diverged.value)


def test_entropy_as_a_loss_moves_the_entropy_towards_the_reference(policy):
    reference = policy.reference()
    rollout = a_rollout()
    (batch,) = micro_batches(rollout, None, torch.device("cpu"))

    def gap():
        means = [measure(p, batch, Precision()).entropy_NT.mean(1) for p in (policy, reference)]
        return (means[0] - means[1]).square().mean().item()

    settings = {"beta": 0.0, "entropy": {"mode": "loss", "penalty_scale": 1.0}}
    equal = Rewards(torch.zeros(3, SIZE), torch.ones(3, dtype=torch.bool), {}, ())
    _, _ = learned(policy, rewards=equal, lr=0.0, **settings)  # moves the policy away by 1 %
    optimizer = torch.optim.SGD([p for p in policy.module.parameters() if p.requires_grad])
    before = gap()
    update = update_of(**settings)
    learn(
        policy,
        optimizer,
        [batch],
        first=measure_to_learn(policy, batch, update),
        rewards=equal,
        reference=measure_all(reference, [batch], Precision()),
        update=update,
    )
    assert 0 < gap() < before


def test_a_loss_that_is_not_finite_stops_and_leaves_the_parameters(policy):
    with torch.no_grad():
        policy.module.model.language_model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    before = copy.deepcopy(policy.module.state_dict())
    with pytest.raises(DivergedError, match=r"loss is nan.*the parameters were left as they were"):
        learned(policy)
    after = policy.module.state_dict()
    norm = "model.language_model.norm.weight"
    assert torch.equal(before[norm] * 1.01, after[norm])


def test_bf16_log_probabilities_hide_small_differences(policy):
    (batch,) = micro_batches(a_rollout(), None, torch.device("cpu"))
    rounded = measure(policy, batch, Precision(round_to_bf16=True)).logprobs_NT
    assert torch.equal(rounded, rounded.bfloat16().float())
    exact = measure(policy, batch, Precision()).logprobs_NT
    assert torch.allclose(rounded, exact, rtol=2**-8)
    assert not torch.equal(rounded, exact)
