"""The frame of the benchmarks: options, results, timing and memory."""

from __future__ import annotations

import json

import pytest
import torch

from stage_rl.bench.base import (
    BenchResult,
    benchmark,
    columns,
    copy_bytes_per_s,
    interleaved,
    matmul_flops_per_s,
    medians_in_turn,
    one_thread,
    peak_bytes,
)
from stage_rl.errors import InputError

MIB = 2**20


def test_peak_counts_what_is_alive_together():
    def function() -> None:
        a = torch.ones(MIB, dtype=torch.uint8)  # 1 MiB
        b = a + 1  # 2 MiB
        del a  # 1 MiB
        c = b.view(-1, 2) + 1  # 2 MiB, the view is free
        c.add_(1)  # in place: 2 MiB
        del b, c

    assert peak_bytes(function) == 2 * MIB


def test_peak_leaves_out_what_was_there_before():
    before = torch.ones(MIB, dtype=torch.uint8)
    assert peak_bytes(lambda: before.view(2, -1).add_(1)) == 0


def test_peak_sees_what_the_backward_pass_needs():
    leaf = torch.ones(MIB // 4, requires_grad=True)  # 1 MiB, there before
    # exp keeps its result for the backward pass (1); its gradient, a product, is new (2).
    assert 2 * MIB <= peak_bytes(lambda: leaf.exp().sum().backward()) <= 2 * MIB + 64


def test_interleaved_calls_each_function_in_turn_and_gives_its_median():
    order: list[str] = []
    took = iter([9.0, 9.0, 1.0, 10.0, 3.0, 30.0, 2.0, 20.0])
    ticks = (tick for seconds in took for tick in (0.0, seconds))
    forms = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    # One round to warm up, then a takes 1, 3, 2 and b takes 10, 30, 20.
    assert interleaved(forms, 3, timer=lambda: next(ticks)) == {"a": 2.0, "b": 20.0}
    assert order == ["a", "b"] * 4


def test_interleaved_divides_by_the_calls_of_a_round():
    ticks = iter([0.0, 1.0, 0.0, 6.0])
    calls: list[int] = []
    seconds = interleaved({"a": lambda: calls.append(1)}, 1, calls=3, timer=lambda: next(ticks))
    assert seconds == {"a": 2.0}
    assert len(calls) == 2 * 3


def test_every_figure_has_its_own_median():
    figures = iter([(9.0, 0.0), (1.0, 5.0), (3.0, 5.0), (2.0, 8.0)])
    forms = {"form": lambda: dict(zip(("x", "y"), next(figures), strict=True))}
    assert medians_in_turn(forms, 3) == {"form": {"x": 2.0, "y": 5.0}}


def test_one_thread_gives_the_threads_back():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("reached", "verdict"),
    [(True, "reached"), (False, "MISSED"), (None, "not set for these sizes")],
)
def test_a_result_says_its_options_and_whether_its_bar_is_reached(reached, verdict):
    @benchmark(">= 2x")
    def run(*, rows: int = 4, sizes: tuple[int, ...] = (1, 2)) -> BenchResult:
        return BenchResult("3.0x", reached, {"speedup": 3.0})

    result = run(rows=8)
    assert result.line() == f"test-base: 3.0x; bar >= 2x: {verdict}"
    loaded = json.loads(json.dumps(result.to_dict()))
    assert loaded["measures"] == {"speedup": 3.0}
    assert loaded["settings"] == {"rows": 8, "sizes": [1, 2]}
    assert loaded["machine"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, "--rows: 0 is out of range; write at least 1"),
        ({"group_sizes": (8, 1)}, "--group-sizes: 1 is out of range; write at least 2"),
        ({"seed": -1}, "--seed: -1 is out of range; write at least 0"),
    ],
)
def test_a_number_below_its_least_is_named(options, message):
    @benchmark("", group_sizes=2)
    def run(*, rows=1, group_sizes=(2,), seed=0, flag=False, rate=0.5) -> BenchResult:
        raise AssertionError("not reached")

    with pytest.raises(InputError, match=message):
        run(**options)


def test_a_table_is_aligned():
    assert columns(("form", "s"), ("a", "10.5"), ("b", "")) == ("form     s", "a     10.5", "b")


def test_rates_of_the_machine_are_positive():
    cpu = torch.device("cpu")
    assert copy_bytes_per_s(cpu) > 1e8
    assert matmul_flops_per_s(cpu, torch.float32) > 1e8
