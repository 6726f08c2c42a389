"""`stage bench`: what it lists, and the options each benchmark names."""

import pytest

BENCHMARKS = ("rollout", "logprobs", "reweight", "step")


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


def test_a_model_that_is_not_there_is_one_line_and_exit_code_2(run_main):
    code, printed = run_main("bench", "step", "--model", "no/such/folder")
    assert code == 2
    assert printed.startswith("error: no/such/folder: no such folder; write a folder")
    assert printed.count("\n") == 1
