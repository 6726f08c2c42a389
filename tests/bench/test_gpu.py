"""The acceptance run of a GPU: every check of every part, on a CPU at toy size."""

import json
import math

import pytest
import torch

from stage_rl.bench.base import BenchResult
from stage_rl.bench.gpu import acceptance, learning
from stage_rl.bench.gpu.acceptance import PARTS, combined, run_checks
from stage_rl.bench.gpu.checks import Sizes
from stage_rl.bench.gpu.drawing import grouped_ms
from stage_rl.bench.models import ADAPTER_7B, recipe_of
from stage_rl.bench.record import CPU_ROWS, GPU_ROWS, PREDICTED
from stage_rl.errors import InputError
from stage_rl.training.memory import GB, predict

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is measured instead")
GPU_TEST = """
import pytest

@pytest.mark.gpu
def test_one():
    assert {}

def test_without_a_gpu():
    raise AssertionError
"""


@pytest.fixture
def sizes(tiny_published, tmp_path, monkeypatch):
    # What inductor would compile is tested in test_blocks.py.
    monkeypatch.setattr(torch, "compile", lambda forward: forward)
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "test_a.py").write_text(GPU_TEST.format(True))
    settings = "rollout.dtype=float32 training.dtype=float32 optimizer.kind=adamw"
    return Sizes(
        num_prompts=2, group_size=2, rounds=1, num_lengths=5, overrides=settings, tests=folder
    )


@on_cpu
@pytest.mark.parametrize(
    "part",
    [name if name == "rollout" else pytest.param(name, marks=pytest.mark.slow) for name in PARTS],
)
def test_every_check_of_a_part_runs_on_a_cpu_at_toy_size(part, sizes):
    checks = PARTS[part](sizes)
    result = run_checks(checks)
    assert "failed" not in "\n".join(result.table), result.table
    # Random weights may miss a bar of the published sizes; what must be equal is.
    exact = {"correctness": ("tests", "kernels-1b", "graph", "lengths", "repeated")}
    exact |= {"train-1b": ("shards", "streamed")}
    for name in exact.get(part, ()):
        (line,) = (line for line in result.table if line.startswith(f"{name}: "))
        assert line.endswith("; holds"), line
    assert all(math.isfinite(value) for value in result.measures.values())
    for _, _, file, key in PREDICTED:
        if file == f"gpu-{part}":
            assert key in result.measures


@on_cpu
def test_without_a_gpu_it_is_refused(tmp_path):
    with pytest.raises(InputError, match="no GPU is visible here"):
        acceptance.run(folder=str(tmp_path / "records"))
    assert not (tmp_path / "records").exists()


def test_each_part_leaves_a_record_and_a_check_that_fails_does_not_end_it(tmp_path, monkeypatch):
    class CompilationError(Exception):
        """As Triton has it: no RuntimeError."""

    def fails(error):
        raise error

    too_large = torch.OutOfMemoryError("CUDA out of memory\nTried to allocate 2 GiB")
    kept = []

    def looks():
        kept.append(json.loads((tmp_path / "gpu-rollout.json").read_text())["headline"])
        raise CompilationError("at 7:4")

    checks = {
        "bad": lambda: fails(too_large),
        "worse": looks,
        "good": lambda: BenchResult("1 ms", True, {"ms": 1.0}, ("table",)),
    }
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H200")
    # Nothing on a GPU works after an illegal access.
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: fails(RuntimeError("illegal access")))
    monkeypatch.setattr(acceptance, "PARTS", {"rollout": lambda _: checks, "step-7b": lambda _: {}})
    result = acceptance.run(part="rollout", folder=str(tmp_path))
    assert result.headline == "0 of 1 hold, not: rollout"
    record = json.loads((tmp_path / "gpu-rollout.json").read_text())
    assert record["headline"] == "1 of 3 hold, not: bad, worse"
    assert record["measures"] == {"good_ms": 1.0}
    assert record["table"] == [
        "bad: failed: OutOfMemoryError: CUDA out of memory Tried to allocate 2 GiB; MISSED",
        *("", "worse: failed: CompilationError: at 7:4; MISSED"),
        *("", "table", "good: 1 ms; holds"),
    ]
    assert kept == ["0 of 1 hold, not: bad"]
    assert record["machine"]["gpu"] == "H200"
    assert not (tmp_path / "gpu-step-7b.json").exists()


@pytest.mark.slow
def test_a_test_of_a_gpu_that_fails_is_named(sizes):
    (sizes.tests / "test_a.py").write_text(GPU_TEST.format(False))
    result = run_checks({"tests": PARTS["correctness"](sizes)["tests"]})
    assert not result.measures
    assert result.headline == "0 of 1 hold, not: tests"
    assert any("test_a.py::test_one" in line for line in result.table)


@pytest.mark.slow
def test_the_tests_of_a_gpu_run_beside_one_that_cannot_be_read(sizes):
    (sizes.tests / "test_b.py").write_text("import no_such_module\n")
    result = run_checks({"tests": PARTS["correctness"](sizes)["tests"]})
    assert "1 passed" in "\n".join(result.table)
    assert not result.reached


def test_results_without_a_bar_miss_none():
    assert combined({"a": BenchResult("", None, {}), "b": BenchResult("", True, {})}).reached


def test_kernels_are_grouped_by_their_names():
    found = grouped_ms({"_attend": 2e3, "nvjet_hsh_128": 1e3, "_rotate": 500.0, "reduce": 250.0})
    assert found == {"attention": 2.0, "matmul": 1.0, "small": 0.5, "other": 0.25}


def test_an_adapter_on_7b_fits_a_card_of_80_gb():
    recipe = recipe_of("janus-7b", ADAPTER_7B.split(), num_prompts=8, group_size=8)
    plan = predict(recipe, recipe.policy.size(), prompt_length=29)
    # The design's estimate: 69 GB.
    assert plan.peak / GB == pytest.approx(69, rel=0.1)
    assert plan.fits(80)
    assert learning.ADAPTER_7B is ADAPTER_7B


def test_every_row_of_the_page_has_a_command():
    assert all(command.startswith("stage bench ") for command in (CPU_ROWS | GPU_ROWS).values())
    assert {f"gpu-{part}" for part in PARTS} <= set(GPU_ROWS)
