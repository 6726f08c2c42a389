"""Which checkpoints are kept, and which weights they go with."""

import logging

from stage_rl.training import checkpoint as checkpoint_module
from stage_rl.training.checkpoint import checkpoints
from stage_rl.training.loop import train


def test_checkpoints_are_told_by_their_whole_name_and_ordered_by_number(tmp_path):
    for name in ("step_000009", "step_1000000", "step_000010", "step_old", "step_000009.bak"):
        (tmp_path / name).mkdir()
    found = [path.name for path in checkpoints(tmp_path)]
    assert found == ["step_1000000", "step_000010", "step_000009"]


def test_a_manifest_that_lists_nothing_is_damage(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    assert checkpoint_module.damage(tmp_path) == "manifest.json lists no state.json"


def test_a_damaged_checkpoint_does_not_count_among_those_that_are_kept(recipe, caplog):
    every = ("run.save_every=1", "run.keep_checkpoints=2", "optimizer.schedule=constant")
    run = train(recipe("steps=3", *every))
    root = run / "checkpoints"
    (root / "step_000003" / "policy.safetensors").write_bytes(b"")
    (root / "step_000009").mkdir()  # as a run that went further would leave it
    with caplog.at_level(logging.WARNING):
        train(recipe("steps=3", *every))
    assert [path.name for path in checkpoints(root)] == ["step_000003", "step_000002"]
    assert all(checkpoint_module.damage(path) is None for path in checkpoints(root))
