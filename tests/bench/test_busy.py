"""The benchmark of a busy machine; processes that print what they are told stand for the steps."""

import pytest

from stage_rl.bench import busy
from stage_rl.errors import StageError

# 0.8 s with OpenMP's own waiting, else 1 s, 3 s at the third step.
STEPS = """
import os, sys
print("ready", flush=True)
seconds = 0.8 if "GOMP_SPINCOUNT" in os.environ else 1.0
for number, _ in enumerate(sys.stdin):
    print(seconds if number < 2 else 3.0, flush=True)
"""


def test_the_waiting_that_is_set_runs_idle_beside_openmps_own_and_then_busy(monkeypatch):
    monkeypatch.setattr(busy, "SERVE", STEPS)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    result = busy.run(busy_processes=1, rounds=1)
    assert result.measures["own_idle_s"] == 0.8
    assert result.measures["set_idle_s"] == 1.0
    assert result.measures["set_busy_s"] == 3.0
    assert "takes 1.25x its time" in result.headline
    assert "a busy one 3.0x" in result.headline
    assert result.reached is False  # 1.25 > 1.05


@pytest.mark.parametrize(
    ("set_s", "busy_s", "reached"), [(2.0, 8.0, True), (2.2, 8.0, False), (2.0, 8.1, False)]
)
def test_the_bar_holds_for_both_ratios(set_s, busy_s, reached):
    assert busy._result({"own": 2.0, "set": set_s}, busy_s).reached is reached


def test_a_process_that_ends_is_an_error(monkeypatch):
    monkeypatch.setattr(busy, "SERVE", "")
    with pytest.raises(StageError, match="a process that takes the steps ended"):
        busy.run(rounds=1)


@pytest.mark.slow
def test_steps_are_taken_in_processes(tiny_shapes_folder):
    result = busy.run(
        model=str(tiny_shapes_folder), num_prompts=2, group_size=2, busy_processes=1, rounds=1
    )
    assert min(result.measures.values()) > 0
