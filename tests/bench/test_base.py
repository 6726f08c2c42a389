"""Timing, memory and results of the benchmarks."""

from __future__ import annotations

import json

import pytest
import torch

from stage_rl.bench.base import BenchResult, interleaved, one_thread, peak_bytes

MIB = 2**20


def test_peak_counts_what_is_alive_together() -> None:
    def function() -> None:
        a = torch.ones(MIB, dtype=torch.uint8)  # 1 MiB
        b = a + 1  # 2 MiB
        del a  # 1 MiB
        c = b.view(-1, 2) + 1  # 2 MiB, the view is free
        c.add_(1)  # in place: 2 MiB
        del b, c

    assert peak_bytes(function) == 2 * MIB


def test_peak_leaves_out_what_was_there_before() -> None:
    before = torch.ones(MIB, dtype=torch.uint8)
    assert peak_bytes(lambda: before.view(2, -1).add_(1)) == 0


def test_peak_sees_what_the_backward_pass_needs() -> None:
    leaf = torch.ones(MIB // 4, requires_grad=True)  # 1 MiB, there before
    # exp keeps its result for the backward pass (1); its gradient, a product, is new (2).
    assert 2 * MIB <= peak_bytes(lambda: leaf.exp().sum().backward()) <= 2 * MIB + 64


def test_interleaved_calls_each_function_in_turn_and_gives_its_median() -> None:
    order: list[str] = []
    ticks = iter([0.0, 1.0, 0.0, 10.0, 0.0, 3.0, 0.0, 30.0, 0.0, 2.0, 0.0, 20.0])
    seconds = interleaved(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")},
        3,
        timer=lambda: next(ticks),
    )
    # One call each to warm up, then a takes 1, 3, 2 and b takes 10, 30, 20.
    assert order == ["a", "b"] * 4
    assert seconds == {"a": 2.0, "b": 20.0}


def test_interleaved_divides_by_the_calls_of_a_round() -> None:
    ticks = iter([0.0, 6.0])
    calls: list[int] = []
    seconds = interleaved({"a": lambda: calls.append(1)}, 1, calls=3, timer=lambda: next(ticks))
    assert seconds == {"a": 2.0}
    assert len(calls) == 1 + 3


def test_one_thread_gives_the_threads_back() -> None:
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
def test_a_result_says_whether_its_bar_is_reached(reached: bool | None, verdict: str) -> None:
    result = BenchResult("decode", "3.0x", ">= 2x", reached, {"rows": 4}, {"speedup": 3.0})
    assert result.line() == f"decode: 3.0x; bar >= 2x: {verdict}"
    loaded = json.loads(json.dumps(result.to_dict()))
    assert loaded["measures"] == {"speedup": 3.0}
    assert loaded["settings"] == {"rows": 4}
    assert loaded["machine"]["torch"] == torch.__version__
