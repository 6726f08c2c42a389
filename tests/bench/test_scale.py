"""The scale benchmark, on models of a few thousand parameters."""

import pytest

from stage_rl.bench import scale
from stage_rl.errors import InputError


def test_group_sizes_and_tokens_are_measured_for_each_image(tiny_published):
    result = scale.run(
        model="janus-1b", num_prompts=1, group_sizes=(2, 3), image_sizes=(16, 24), rounds=1
    )
    assert result.reached is None
    # Patches of 4 pixels: (16 / 4)^2 and (24 / 4)^2 tokens.
    assert [result.measures[f"tokens_{name}"] for name in ("g2", "g3", "t16px", "t24px")] == [
        *(16, 16, 16, 36)
    ]
    for name in ("g2", "g3", "t16px", "t24px"):
        assert result.measures[f"step_ms_per_image_{name}"] > 0
    assert "at G = 3" in result.headline


def test_on_a_gpu_an_image_in_a_group_of_16_costs_at_most_92_percent(monkeypatch):
    measures = {"step_ms_per_image_g8": 100.0, "step_ms_per_image_g16": 92.0}
    assert scale._reached(measures) is None
    monkeypatch.setattr(scale, "bench_device", lambda: type("Gpu", (), {"type": "cuda"}))
    assert scale._reached(measures) is True
    assert scale._reached(measures | {"step_ms_per_image_g16": 92.1}) is False
    assert scale._reached({"step_ms_per_image_g8": 100.0}) is None


def test_an_option_out_of_range_is_named():
    with pytest.raises(InputError, match="--group-sizes: 1 is out of range"):
        scale.run(group_sizes=(1, 8))
