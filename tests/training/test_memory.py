"""The memory plan at full size, what a run that does not fit is told, and the dry run."""

import pytest

from stage_rl.config import load_recipe
from stage_rl.errors import RecipeError
from stage_rl.policies.janus import JanusConfig, size_of
from stage_rl.training.memory import (
    GB,
    Work,
    check_memory,
    layer_bytes,
    plan_of,
    predict,
    report,
    suggest_overrides,
    with_overrides,
)
from stage_rl.training.trainer import build_trainer

SMALLEST = {"training.groups_per_microbatch": 1, "training.activation_checkpointing": "full"}
SIZE_7B = size_of("deepseek-community/Janus-Pro-7B")


def recipe_7b(*overrides):
    path = "policy.path=deepseek-community/Janus-Pro-7B"
    both = ("rollout.dtype=mixed", "training.dtype=mixed", "rollout.guidance_scale=5.0")
    return load_recipe("shapes_geneval", [path, *both, *overrides])


def gb(plan, phase, part):
    return plan.phases[phase][part] / GB


def test_the_parts_at_7b_are_those_worked_out_by_hand():
    plan = predict(recipe_7b(), SIZE_7B)
    # 6.071 B matrices in bf16, and in fp32 16,384 x 4,096 embeddings, 84 M of the head, the norms.
    assert gb(plan, "sample", "sampler's copy") == pytest.approx(12.143 + 0.268 + 0.336, abs=0.03)
    # 128 rows x 608 positions (32 + 575 in blocks of 32) x 480 KiB
    assert gb(plan, "sample", "key-value cache") == pytest.approx(128 * 608 * 491_520 / 1e9)
    # 8 and 4 bytes for each of 6.071 B and 102,400 x 4,096 of the text embedding.
    assert gb(plan, "learn", "moments") == pytest.approx(8 * 6.491, abs=0.01)
    assert gb(plan, "learn", "gradients") == pytest.approx(4 * 6.491, abs=0.01)
    assert gb(plan, "learn", "weights") == pytest.approx(4 * 7.408, abs=0.01)
    # Layers in bf16, the text embedding in fp32.
    assert gb(plan, "learn", "reference") == pytest.approx(12.143 + 1.678, abs=0.01)


def test_an_exact_kl_keeps_the_states_of_the_reference():
    plain, exact, guided = (
        predict(recipe_7b(f"algorithm.kl.estimator={estimator}", logprobs), SIZE_7B)
        for estimator, logprobs in (
            ("k3", "algorithm.logprobs=conditional"),
            ("exact", "algorithm.logprobs=conditional"),
            ("exact", "algorithm.logprobs=guided"),
        )
    )
    # 64 images x 576 tokens x 4,096 in fp32, twice with an unconditional pass.
    states = 64 * 576 * 4096 * 4 / 1e9
    for phase in ("reference", "learn", "probe"):
        assert gb(exact, phase, "reference's states") == pytest.approx(states)
        assert gb(guided, phase, "reference's states") == pytest.approx(2 * states)
    assert all("reference's states" not in parts for parts in plain.phases.values())
    assert "reference's states" not in exact.phases["sample"]


def test_what_a_rule_of_credit_needs_lies_beside_the_activations():
    # 4 groups of 8 images a micro-batch, of 576 tokens and 640 positions; logits of 64 rows.
    narrow = ("training.groups_per_microbatch=4", "training.logprob_rows=64")

    def learning(credit, logprobs="conditional"):
        settings = (f"algorithm.credit={credit}", f"algorithm.logprobs={logprobs}")
        plan = predict(recipe_7b(*narrow, *settings), SIZE_7B)
        return plan.phases["learn"]["activations"]

    beside = learning("uniform") - 4 * 64 * (4 * 16_384 + 2 * 4096)
    states = 32 * 576 * 4096 * 4
    one_pass = 32 * 640 * (8 * 4096 + 12 * 4096 + 8 * 11_008)
    assert learning("guidance") - beside == one_pass
    # The conditional states are kept, those of the first micro-batch to the end.
    assert learning("{kind: guidance, eta: exact}") - beside == 2 * states + one_pass
    # Scored by guidance, both passes' are, and the head fits where it was.
    guided = (learning(credit, "guided_detached") for credit in ("guidance", "uniform"))
    assert next(guided) - next(guided) == 4 * states
    assert learning("critical") - beside == 2 * states
    assert learning("high_entropy") == learning("uniform")


def test_an_adapter_at_7b():
    recipe = recipe_7b("policy.lora.rank=64", "policy.dtype=bfloat16")
    plan = predict(recipe, SIZE_7B)
    # 30 layers x 64 x (4 x (4096 + 4096) + 3 x (4096 + 11008)) = 149.9 M in fp32
    assert gb(plan, "learn", "gradients") == pytest.approx(0.600, abs=0.001)
    assert gb(plan, "learn", "moments") == pytest.approx(1.199, abs=0.001)
    assert plan.phases["learn"]["reference"] == 0
    # 7.408 B in bf16, the image head in fp32, the adapter
    assert gb(plan, "learn", "weights") == pytest.approx(14.82 + 0.168 + 0.600, abs=0.01)


def test_a_layer_of_7b_keeps_what_bf16_on_a_gpu_leaves():
    recipe = recipe_7b()
    work = Work(recipe, SIZE_7B)
    # 34 bytes a unit of width (4,096) and 8 of the MLP's (11,008); with matmuls kept 16 and 4.
    assert layer_bytes(work, "none") == 34 * 4096 + 8 * 11008
    assert layer_bytes(work, "selective") == 16 * 4096 + 4 * 11008
    assert layer_bytes(work, "full") == 4 * 4096


def test_settings_that_save_memory_lower_the_learning_phase():
    plain = predict(recipe_7b(), SIZE_7B)
    saving = {
        override: predict(recipe_7b(override), SIZE_7B)
        for override in (
            "rollout.release_cache=true",
            "training.activation_checkpointing=selective",
            "optimizer.kind=adamw_8bit",
            "training.reference=streamed",
            "training.groups_per_microbatch=1",
        )
    }
    assert all(plan.totals["learn"] < plain.totals["learn"] for plan in saving.values())
    # Moments in 8 bits take a quarter.
    one, other = (gb(p, "learn", "moments") for p in (plain, saving["optimizer.kind=adamw_8bit"]))
    assert other / one == pytest.approx((1 + 4 / 256) / 4)
    # More processes need less each.
    peaks = [plan_of(recipe_7b(), num_processes=n).peak for n in (1, 2, 4, 8)]
    assert peaks == sorted(peaks, reverse=True)


def test_processes_that_share_a_copy_hold_what_a_run_of_so_many_does():
    alone, several = (recipe_7b(*x) for x in ((), ("training.shard_ranks=4",)))
    four, eight = plan_of(alone, num_processes=4), plan_of(several, num_processes=8)
    for part in ("weights", "moments", "reference"):
        assert gb(eight, "learn", part) == gb(four, "learn", part)
    assert gb(eight, "learn", "activations") < gb(four, "learn", "activations")


def test_several_processes_load_whole_weights_before_they_share_them():
    recipe = recipe_7b("rollout.release_cache=true")
    plan = plan_of(recipe, num_processes=8)
    # All weights in fp32, and the reference: layers in bf16, the text embedding in fp32.
    assert plan.totals["load"] / GB == pytest.approx(29.63 + 13.82, abs=0.01)
    assert "load" not in plan_of(recipe).phases
    with pytest.raises(RecipeError, match="the phase load needs 43 GB"):
        check_memory(with_overrides(recipe, SMALLEST), 40, num_processes=8)


@pytest.mark.parametrize("memory_gb", [96, 141, 192])
def test_the_settings_that_are_named_make_it_fit_and_none_is_superfluous(memory_gb):
    recipe = recipe_7b("probe.every=0")
    found = suggest_overrides(recipe, SIZE_7B, memory_gb)
    assert found
    check_memory(with_overrides(recipe, found), memory_gb)
    for override in found:
        fewer = {key: value for key, value in found.items() if key != override}
        with pytest.raises(RecipeError):
            check_memory(with_overrides(recipe, fewer), memory_gb)


def test_a_run_that_does_not_fit_is_refused_with_what_would():
    learn = r"^memory: the phase learn needs \d+ GB, and the GPU has 141 GB; write "
    with pytest.raises(RecipeError, match=learn + r".*optimizer\.kind=adamw_8bit"):
        check_memory(recipe_7b(), 141)
    with pytest.raises(RecipeError, match=r"policy\.lora\.rank=64.*, or torchrun .* GPUs"):
        check_memory(recipe_7b("training.activation_checkpointing=selective"), 60)


def test_a_policy_without_known_dimensions_is_not_planned(tiny_recipe):
    recipe = load_recipe(tiny_recipe)
    assert plan_of(recipe) is None
    check_memory(recipe, 1.0)
    assert "not predicted" in report(recipe, None)[-1]


def test_stated_memory_is_checked_before_anything_is_loaded(recipe, monkeypatch):
    monkeypatch.setattr(JanusConfig, "build", None)
    wanted = recipe("training.memory_gb=0.0001")
    with pytest.raises(RecipeError, match="memory: the phase"):
        build_trainer(wanted, wanted.prompts.build())


def test_the_report_names_what_would_be_downloaded(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    lines = report(load_recipe("janus_pro_7b_geneval"), None)
    weights = "Would be downloaded: deepseek-community/Janus-Pro-7B: 7.41 billion parameters, 14.8 "
    assert lines[0].startswith(weights)
    assert "Would be downloaded: openai/clip-vit-large-patch14" in lines
    assert "nothing was checked" in lines[-1]
    (tmp_path / "models--openai--clip-vit-large-patch14" / "snapshots").mkdir(parents=True)
    again = report(load_recipe("janus_pro_7b_geneval"), 80.0)
    assert "Would be downloaded: openai/clip-vit-large-patch14" not in again
    assert again[-1] == "Memory of the GPU: 80.0 GB"
    # A folder of a model of the hub is a download too.
    folder = recipe_7b("policy.path=krennic/STAGE/geneval@main")
    assert "Would be downloaded: krennic/STAGE/geneval@main" in report(folder, None)
    (tmp_path / "models--krennic--STAGE" / "snapshots").mkdir(parents=True)
    assert "Would be downloaded: krennic/STAGE/geneval@main" not in report(folder, None)
    several = report(load_recipe("janus_pro_7b_geneval"), 80.0, num_processes=8)
    (head,) = (line for line in several if line.startswith("Memory of one GPU"))
    assert "for each of 8 processes" in head
