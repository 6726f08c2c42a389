"""The built-in rules of token credit, losses and advantages in a run."""

from dataclasses import replace

import methods
import pytest
import torch
from run_files import steps_of, untimed

from stage_rl.algorithm import exact_kl
from stage_rl.errors import RecipeError
from stage_rl.policies.base import Policy
from stage_rl.policies.janus import JanusPolicy
from stage_rl.policies.logprobs import CONDITIONAL, UNCONDITIONAL, Scoring
from stage_rl.training.loop import train
from stage_rl.training.measure import Precision, measure, micro_batches, needed_inputs
from stage_rl.training.trainer import build_trainer

TWO_REWARDS = (
    "rewards=[{kind: 'loop_parts:Brightness'}, {kind: 'loop_parts:Coarse', name: low,"
    " weight: 0.5, requires: {reward: Brightness, at_least: 0.45}}]"
)
RULES = {
    "critical": ("algorithm.credit={kind: critical, daw_gradient: through}",),
    "guidance": (
        "algorithm.credit=guidance",
        "algorithm.entropy={mode: reward, centred: true}",
        "algorithm.importance_sampling=geometric_mask",
    ),
    "exact": ("algorithm.credit={kind: guidance, eta: exact}", "algorithm.kl.estimator=rk3"),
    "bonus": ("algorithm.credit={kind: entropy_bonus, form: paper}", "algorithm.loss=cispo"),
    "high": ("algorithm.credit={kind: high_entropy, scope: group}", "algorithm.loss=dr_grpo"),
    "divergence": (
        "algorithm.kl.estimator=exact",
        "algorithm.beta=1",
        "training.reference=streamed",
    ),
    "gdpo": (TWO_REWARDS, "algorithm.advantage=gdpo", "algorithm.loss=gspo_token"),
}
GAPS = [f"mismatch/{of}logprobs_{how}" for of in ("", "guided_") for how in ("mean", "max")]
"""Rounding alone: two of them have no digit in common."""
SAME = ("probe.every=0", "run.log_images_every=0", "optimizer.schedule=constant")


@pytest.mark.parametrize("name", RULES)
def test_micro_batches_change_nothing(recipe, tmp_path, name):
    lines = []
    for groups in (1, 2):
        overrides = (*SAME, "steps=2", "optimizer.lr=1e-4", f"run.dir={tmp_path}/{groups}")
        pieces = f"training.groups_per_microbatch={groups}"
        lines += untimed(steps_of(train(recipe(*overrides, pieces, *RULES[name]))))[-1:]
    gaps = [line.pop(key) for line in lines for key in GAPS if key in line]
    assert max(gaps) < 1e-5
    assert lines[0] == pytest.approx(lines[1], rel=1e-3, abs=1e-6)
    assert lines[0]["grad/norm"] > 0
    assert 0 < lines[0]["credit/ess"] <= 1 + 1e-6


def needed_by(recipe, *overrides):
    """What a function that needs everything was given in one step, and the trainer."""
    methods.SEEN.clear()
    loaded = recipe("steps=1", *SAME, "algorithm.credit=methods:needs_everything", *overrides)
    train(loaded)
    (seen,) = methods.SEEN
    trainer = build_trainer(loaded, loaded.prompts.build())
    return seen, trainer


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_what_a_rule_needs_is_what_it_says(recipe, temperature):
    seen, trainer = needed_by(recipe, f"rollout.temperature={temperature}")
    rollout = trainer.sample(trainer.engine, trainer.prompts_of(0), step=0)
    (batch,) = micro_batches(rollout, None, torch.device("cpu"))
    embeds_NTD = trainer.policy.embed(batch.tokens_NT)
    assert torch.equal(seen.embeddings_PGTD.flatten(0, 1), embeds_NTD)
    # At temperature 1 whatever the sampling temperature: by the trainer, under the same guidance.
    guided = measure(trainer.policy, batch, Precision(scoring=Scoring("guided_detached", 2.0)))
    assert torch.allclose(seen.guided_entropy_PGT.flatten(0, 1), guided.entropy_NT, atol=1e-4)
    cond, uncond = (
        trainer.policy.head(
            trainer.policy.states(batch.prompts, batch.tokens_NT, group_size=3, scoring=scoring)
        )
        for scoring in (CONDITIONAL, UNCONDITIONAL)
    )
    by_hand = exact_kl(cond, uncond)
    assert torch.allclose(seen.guidance_kl_PGT.flatten(0, 1), by_hand, atol=1e-5)
    of_token = uncond.log_softmax(-1).gather(-1, batch.tokens_NT[..., None])[..., 0]
    assert torch.allclose(seen.uncond_logprobs_PGT.flatten(0, 1), of_token, atol=1e-5)


def test_without_guidance_the_guided_entropy_is_the_samplers_own(recipe):
    seen, trainer = needed_by(recipe, "rollout.guidance_scale=1")
    rollout = trainer.sample(trainer.engine, trainer.prompts_of(0), step=0)
    assert torch.equal(seen.guided_entropy_PGT.flatten(0, 1), rollout.entropy_NT)


@pytest.mark.parametrize(
    ("credit", "passes"),
    # Beside the pass that learns and the reference's: the unconditional one alone costs a pass.
    [("stage", 0), ("critical", 0), ("guidance", 1), ("high_entropy", 0)],
)
def test_only_what_a_rule_needs_is_computed_and_its_time_is_logged(
    recipe, monkeypatch, credit, passes
):
    calls, forward = [], Policy.forward
    monkeypatch.setattr(
        Policy, "forward", lambda self, *a, **k: calls.append(1) or forward(self, *a, **k)
    )
    settings = ("steps=1", *SAME, "probe.mismatch_images=0", f"algorithm.credit={credit}")
    (line,) = steps_of(train(recipe(*settings)))
    assert len(calls) == 2 + passes
    assert ("time/credit_s" in line) == (credit in ("critical", "guidance"))


@pytest.mark.parametrize("logprobs", ["conditional", "guided", "guided_detached"])
@pytest.mark.parametrize("eta", ["sampled", "exact"])
def test_states_that_are_measured_anyway_spare_the_guidance_a_pass(
    recipe, monkeypatch, logprobs, eta
):
    passes, hidden = [], JanusPolicy.hidden
    monkeypatch.setattr(
        JanusPolicy, "hidden", lambda self, *a, **k: passes.append(1) or hidden(self, *a, **k)
    )
    credit = f"algorithm.credit={{kind: guidance, eta: {eta}}}"
    scored = ("rollout.guidance_scale=2", f"algorithm.logprobs={logprobs}")
    train(recipe("steps=1", *SAME, "probe.mismatch_images=0", credit, *scored))
    # Of policy and reference one pass each and the unconditional one; or two each and no other.
    assert len(passes) == (3 if logprobs == "conditional" else 4)


@pytest.mark.parametrize("round_to_bf16", [False, True])
def test_what_kept_states_give_is_what_passes_of_their_own_do(recipe, round_to_bf16):
    _, trainer = needed_by(recipe)
    rollout = trainer.sample(trainer.engine, trainer.prompts_of(0), step=0)
    (batch,) = micro_batches(rollout, None, torch.device("cpu"))
    names = ("conditional", "unconditional", "exact_guidance")
    scoring = Scoring("guided_detached", 2.0)
    precision = Precision(scoring=scoring, round_to_bf16=round_to_bf16, logprob_rows=50)
    with torch.no_grad():
        kept = measure(trainer.policy, batch, precision, with_states=True)
    without = replace(kept, states_NTW=None)
    found, expected = (
        needed_inputs(trainer.policy, batch, known, precision, names) for known in (kept, without)
    )
    for name in expected:
        assert torch.allclose(found[name], expected[name], atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["loss=gspo"],
            r"loss: gspo has one ratio per image, .* write gspo_token, or algo",
        ),
        (["loss={kind: gmpo, size: 0.3}", "credit=high_entropy"], r"loss: gmpo has one ratio per"),
        (
            ["loss=gspo", "credit=uniform", "importance_sampling=token_mask"],
            r"importance_sampling: gspo has .* write sequence_mask, or geometric_mask",
        ),
        (["advantage=gdpo", "loss=dr_grpo"], r"advantage: gdpo divides by deviations, which dr_g"),
        (
            ["clip_high=0.1", "loss=cispo"],
            r"clip_high: 0\.1 is below algorithm\.clip \(0\.2\); write",
        ),
        (["loss={kind: gspo, low: 3.0}", "credit=uniform"], r"loss\.low: 3\.0 is out of range"),
        (
            ["loss={kind: gspo, low: 0.01}", "credit=uniform"],
            r"loss\.high: 0\.0004 is below loss\.low \(0\.01\); write a larger one",
        ),
        (["loss={kind: gspo_token, high: 0.0001}"], r"loss\.high: 0\.0001 is below loss\.low \("),
        (
            ["advantage=gdpo"],
            r"advantage: gdpo is sum with a single reward; write sum, or a second",
        ),
        (["loss=methods:for_one_update"], r"loss\.limit: 2\.0 is too much; write less"),
        (["clip_high=0.1", "loss=dr_grpo"], r"clip_high: 0\.1 is below algorithm\.clip"),
        (
            ["credit={kind: critical, daw: paper}"],
            r"credit\.daw: paper is 0 .* and so they stay; w",
        ),
        (
            ["credit={kind: critical, daw: none, daw_gradient: through}"],
            r"credit\.daw_gradient: has no effect with daw: none; write detached, or daw: release",
        ),
        (
            ["credit={kind: entropy_bonus, kappa: 0.5}"],
            r"credit\.kappa: has no effect with form: release; write form: paper",
        ),
        (["beta=0", "kl.estimator=exact"], r"kl\.estimator: exact takes memory .* is 0; write k3"),
        (["kl.estimator=k1", "logprobs=guided"], r"kl\.estimator: k1 pulls nowhere .* write k2"),
        (
            ["importance_floor=3", "importance_sampling=token_mask"],
            r"importance_floor: 3\.0 is above importance_cap; write a lower",
        ),
        (["credit={kind: guidance, eta: exakt}"], r"credit\.eta: unknown value 'exakt'; did you"),
        (["credit={kind: high_entropy, share: 1.5}"], r"credit\.share: 1\.5 is out of range; wri"),
        (["credit={kind: critical, daw: 3}"], r"credit\.daw: unknown value 3; write 'release', "),
        (["loss={kind: sapo, tau: 0}"], r"loss\.tau: 0 is out of range; write a number above 0"),
    ],
)
def test_what_makes_no_sense_is_refused_when_the_recipe_is_read(recipe, overrides, message):
    with pytest.raises(RecipeError, match=r"algorithm\." + message):
        recipe(*(f"algorithm.{override}" for override in overrides))


@pytest.mark.parametrize("preset", ["release", "default"])
def test_a_gradient_through_the_weight_is_for_one_update(recipe, preset):
    """Also where the preset says it."""
    written = "{kind: critical, daw_gradient: through}" if preset == "default" else "critical"
    known = (f"algorithm.preset={preset}", f"algorithm.credit={written}", "algorithm.loss=clip")
    assert recipe(*known)
    with pytest.raises(RecipeError, match=r"daw_gradient: through is the gradient of one update"):
        recipe(*known, "optimizer.updates_per_rollout=2")
    # Without the weight there is no gradient through it, whatever the preset says.
    constant = (known[0], "algorithm.credit={kind: critical, daw: none}", "algorithm.loss=clip")
    assert recipe(*constant, "optimizer.updates_per_rollout=2")


@pytest.mark.parametrize(
    ("key", "value", "other", "instead"),
    [
        ("reweight", "kl", "credit=critical", "both"),
        ("mask_normalization", "none", "credit=uniform", "group_mean"),
        ("self_similarity", 0, "credit={kind: high_entropy, scope: group}", "null"),
        ("equal_group_similarity", 0.5, "credit=entropy_bonus", "null"),
        ("kl.a", 0.3, "credit=guidance", "0.5"),
        ("kl.weight_clip", "[0,2]", "credit=uniform", r"\[0\.0, 1\.0\]"),
        ("mask_normalization", "none", "reweight=kl", "group_mean"),
        ("kl.b", 0.3, "reweight=advantages", "0.5"),
        ("clip", 0.1, "loss=sapo", "0.2"),
        ("clip", 0.1, "loss=unclipped", "0.2"),
        ("clip_high", 0.3, "loss=gspo_token", "null"),
        ("advantage_std_floor", 0.1, "loss=dr_grpo", "0.0"),
        ("importance_cap", 3, "importance_sampling=none", "2.0"),
        ("importance_floor", 0.1, "importance_sampling=token_truncate", "0.5"),
        ("whiten", "none", "advantage=sum", "batch"),
        ("entropy.centred", "true", "entropy.mode=loss", "false"),
        ("entropy.penalty_scale", 0.1, "entropy.mode=reward", "scale"),
    ],
)
def test_a_setting_without_effect_is_refused_and_its_default_is_not(
    recipe, key, value, other, instead
):
    other = f"algorithm.{other}"
    with pytest.raises(
        RecipeError, match=f"algorithm.{key}: has no effect with .*; write {instead}"
    ):
        recipe(f"algorithm.{key}={value}", other)
    if key != "entropy.penalty_scale":
        recipe(f"algorithm.{key}={instead}".replace("\\", ""), other)


@pytest.mark.parametrize("credit", ["critical", "uniform", "guidance"])
def test_what_a_preset_says_and_what_is_switched_off_goes_with_every_rule(recipe, credit):
    for preset in ("paper", "release"):
        recipe(
            f"algorithm.preset={preset}", f"algorithm.credit={credit}", "algorithm.reweight=none"
        )


@pytest.mark.parametrize("loss", ["gspo", "gmpo"])
def test_a_ratio_per_image_goes_with_advantages_of_images(recipe, loss):
    for credit in ("algorithm.credit=uniform", "algorithm.reweight=kl", "algorithm.reweight=none"):
        assert recipe(f"algorithm.loss={loss}", credit).algorithm.loss == loss


def test_a_condition_on_a_reward_that_is_not_there_is_refused(recipe):
    one = "rewards=[{kind: 'loop_parts:Brightness', requires: {reward: Brightnes, at_least: 1}}]"
    with pytest.raises(RecipeError, match=r"rewards\.0\.requires\.reward: no other reward is nam"):
        recipe(one)


def test_a_family_without_guidance_has_no_credit_by_guidance(recipe):
    for eta in ("sampled", "exact"):
        credit = f"algorithm.credit={{kind: guidance, eta: {eta}}}"
        with pytest.raises(RecipeError, match=r"algorithm\.credit: needs unconditional rows"):
            recipe("policy={kind: 'methods:UnguidedConfig'}", "rollout.guidance_scale=1", credit)
