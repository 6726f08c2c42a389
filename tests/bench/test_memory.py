"""The memory benchmark: what a plan predicts is what a step takes."""

import pytest
import torch

from stage_rl.bench import memory
from stage_rl.shapes.model import JanusSize, build_janus, save_janus
from stage_rl.shapes.prompts import WORDS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Wide enough that activations, and not the image decoder alone, decide."""
    size = JanusSize(width=64, layers=4, heads=2, mlp=176, codebook_size=512)
    path = tmp_path_factory.mktemp("shapes")
    save_janus(*build_janus(size, words=WORDS, seed=0), path)
    return str(path)


@pytest.mark.parametrize(
    ("dtype", "checkpointing", "groups", "estimator"),
    [
        ("mixed", "selective", 1, "k3"),
        pytest.param("mixed", "none", 1, "k3", marks=pytest.mark.slow),
        pytest.param("mixed", "selective", 1, "exact", marks=pytest.mark.slow),
        pytest.param("float32", "full", 2, "k3", marks=pytest.mark.slow),
    ],
)
def test_every_phase_is_predicted_within_15_percent(
    folder, dtype, checkpointing, groups, estimator
):
    result = memory.run(
        model=folder,
        num_prompts=2,
        group_size=4,
        overrides=f"algorithm.kl.estimator={estimator} rollout.dtype={dtype} "
        f"training.groups_per_microbatch={groups} "
        f"training.dtype={dtype} training.activation_checkpointing={checkpointing}",
    )
    assert result.reached, result.table
    # Parameters, their copies and moments lie there in every phase.
    assert result.measures["sample_seen_mib"] > 1


def test_live_tensors_are_counted_once_each():
    before = memory.live_tensor_bytes()
    tensor = torch.zeros(1000)
    views = [tensor[:10], tensor.view(10, 100)]
    assert memory.live_tensor_bytes() - before == 4000
    del tensor, views
    assert memory.live_tensor_bytes() == before
