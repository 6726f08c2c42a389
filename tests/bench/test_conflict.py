"""The conflict benchmark."""

import pytest
import torch

from stage_rl.bench.signal import conflict
from stage_rl.bench.signal.conflict import Tokens, report, slopes
from stage_rl.config import load_recipe
from stage_rl.errors import InputError
from stage_rl.training.loop import train
from stage_rl.training.measure import micro_batches
from stage_rl.training.trainer import build_trainer

SMALL = (
    "rollout.prompts_per_step=2 rollout.group_size=4 rollout.dtype=float32 training.dtype=float32"
)


def test_opposed_gradients_conflict_and_the_mask_takes_their_part_away():
    # Ten positions, two samples: at the five most similar ones |g1 + g2| is 0 of 2, at the others
    # 2 of 2. A mask of 2 and 0 leaves the latter alone.
    pull = torch.tensor([[2.0] * 5 + [0.0] * 5])
    plain = torch.stack([pull, torch.full((1, 10), 2.0), torch.full((1, 10), 2**0.5)], -1)
    mask = torch.tensor([[2.0] * 5 + [0.0] * 5])
    result = report(
        Tokens(
            similarity_PT=torch.linspace(0, 0.9, 10)[None],
            plain_PTK=plain,
            masked_PTK=plain * mask[..., None],
            objects_PT=torch.tensor([[1.0] * 4 + [0.0] * 6]),
            background_PT=torch.tensor([[0.0] * 4 + [4.0] + [0.0] * 5]),
            advantage_PT=torch.tensor([[4.0] * 5 + [0.0] * 5]),
            equal_P=torch.tensor([False]),
            size_P=torch.tensor([1.0]),
        )
    )
    measures = result.measures
    assert result.reached
    assert (measures["decile_1_conflict"], measures["decile_10_conflict"]) == (0, 1)
    assert (measures["all_conflict"], measures["all_masked"]) == (0.5, 0)
    # Two gradients of the same size at right angles: |g1 + g2| = sqrt(2) of 2.
    assert measures["all_unrelated"] == pytest.approx(1 - 2**-0.5)
    # One of the six background positions pulls: C = 1 - 2 / 12.
    assert measures["background_conflict"] == pytest.approx(5 / 6)
    assert measures["background_tokens"] == pytest.approx(0.6)
    assert measures["background_advantage_share"] == pytest.approx(0.2)


def test_a_slope_is_the_derivative_of_the_log_probability_by_the_last_state():
    recipe = load_recipe("shapes_strict", SMALL.split())
    trainer = build_trainer(recipe, recipe.prompts.build())
    trainer.engine.reload()
    rollout = trainer.sample(trainer.engine, trainer.prompts_of(0), step=0)
    batch = next(micro_batches(rollout, 1, trainer.policy.device))
    found_NTW = slopes(trainer, batch)
    with torch.no_grad():
        states_NTW = trainer.policy.states(batch.prompts, batch.tokens_NT, group_size=4)
    for image, place in ((0, 0), (3, 143)):
        state_W, step_W = states_NTW[image, place], torch.randn(states_NTW.shape[-1])

        def logprob(state_W, token=batch.tokens_NT[image, place]):
            return trainer.policy.head(state_W[None].double().float()).log_softmax(-1)[0, token]

        with torch.no_grad():
            difference = logprob(state_W + 0.01 * step_W) - logprob(state_W - 0.01 * step_W)
        assert (found_NTW[image, place] @ step_W).item() == pytest.approx(
            difference.item() / 0.02, rel=0.02, abs=2e-3
        )


@pytest.mark.slow
def test_a_trained_policy_is_looked_at_beside_the_reference_of_its_run(tmp_path):
    pairs = f"{SMALL} rollout.prompts_per_step=4 rollout.group_size=2"  # often both wrong
    settings = f"{pairs} steps=1 optimizer.warmup_steps=0 optimizer.lr=1e-3 evaluation=null"
    settings += f" run.dir={tmp_path / 'run'}"
    run = train(load_recipe("shapes_strict", settings.split()))
    at_first = conflict.run(steps=1, overrides=pairs)
    found = conflict.run(trained=f"{run}@1", steps=1)
    # Policy and reference are one before the first step: differences of entropy make nothing.
    assert at_first.measures["equal_group_advantage"] == 0 < found.measures["equal_group_advantage"]
    with pytest.raises(InputError, match="--trained: shapes is no run; write the folder of one"):
        conflict.run(trained="shapes")


def test_it_runs_on_a_recipe_and_needs_a_mask():
    result = conflict.run(steps=1, overrides=SMALL)
    assert 0 <= result.measures["all_conflict"] <= 1
    assert 0 <= result.measures["background_advantage_share"] <= 1
    with pytest.raises(InputError, match=r"algorithm\.credit=stage"):
        conflict.run(steps=1, overrides=f"{SMALL} algorithm.credit=uniform")
