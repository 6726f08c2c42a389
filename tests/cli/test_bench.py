"""`stage bench`: what it lists, and the options each benchmark names."""

import pytest

BENCHMARKS = (
    "rollout",
    "decode-attention",
    "scale",
    "logprobs",
    "reweight",
    "reward-overlap",
    "rewards",
    "step",
)


def test_bench_lists_every_benchmark_without_loading_torch(stage_process):
    done = stage_process("bench", "--help")
    assert done.returncode == 0, done.stderr
    for name in BENCHMARKS:
        assert f"\n  {name} " in done.stdout


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_answers_help_with_its_options(name, stage):
    done = stage("bench", name, "--help")
    assert done.exit_code == 0, done.output
    assert "Options and their defaults:" in done.stdout
    assert "  --rounds " in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rollout", "--rounds", 0], "--rounds: 0 is out of range; write at least 1"),
        (["rollout", "--num-prompts", 0], "--num-prompts: 0 is out of range; write at least 1"),
        (["rollout", "--group-size=-1"], "--group-size: -1 is out of range; write at least 1"),
        (["rollout", "--guidance-scale", 1], "--guidance-scale: transformers' generate needs"),
        (["scale", "--group-sizes=8,1"], "--group-sizes: 1 is out of range; write at least 2"),
        (["mismatch", "--num-prompts", 0], "--num-prompts: 0 is out of range; write at least 1"),
        (["decode-attention", "--rows=0"], "--rows: 0 is out of range; write at least 1"),
        (["step", "--rounds", 0], "--rounds: 0 is out of range; write at least 1"),
        (["step", "--num-prompts", 0], "--num-prompts: 0 is out of range; write at least 1"),
        (["step", "--group-size", 1], "--group-size: 1 is out of range; write at least 2"),
        (["step", "--guidance-scale", 1], "--guidance-scale: transformers' generate needs"),
        (["logprobs", "--rows", 0], "--rows: 0 is out of range; write at least 1"),
        (["logprobs", "--chunk-rows", 0], "--chunk-rows: 0 is out of range; write at least 1"),
        (["logprobs", "--device", "x"], "--device: 'x' is not here; write cpu"),
        (["reweight", "--rounds", 0], "--rounds: 0 is out of range; write at least 1"),
        (["reweight", "--group-sizes=8,1"], "--group-sizes: 1 is out of range; write at least 2"),
    ],
)
def test_an_option_out_of_range_is_one_line_and_exit_code_2(arguments, message, run_main):
    code, printed = run_main("bench", *arguments)
    assert code == 2
    assert printed.startswith(f"error: {message}")
    assert printed.count("\n") == 1


def test_a_model_that_is_not_there_is_one_line_and_exit_code_2(run_main):
    code, printed = run_main("bench", "step", "--model", "no/such/folder")
    assert code == 2
    assert printed.startswith("error: no/such/folder: no such folder")
    assert printed.count("\n") == 1
