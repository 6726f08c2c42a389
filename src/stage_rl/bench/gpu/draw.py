"""`stage bench draw`: guidance, softmax, draw and statistics in one kernel, against torch's.

On a CPU the kernel runs in Triton's interpreter, which says nothing about time: only its results
are compared.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from pydantic import PositiveInt

from stage_rl.bench.base import BenchResult, Guidance, interleaved
from stage_rl.bench.gpu.interpreter import in_interpreter
from stage_rl.distributed import pick_device
from stage_rl.errors import InputError
from stage_rl.rollout import sampling as eager
from stage_rl.rollout.engine import CALLS_BEFORE_CAPTURE, CUDAGraph
from stage_rl.rollout.sampling import Drawn, Sampling

BAR = "one kernel in less time than torch's operations, both replayed (GPU); tokens equal in 99.9%"
MIN_EQUAL = 0.999
COLUMNS = 16
"""Whose tokens are compared."""


def run(
    *,
    images: PositiveInt = 64,
    vocabulary: PositiveInt = 16384,
    guidance_scale: Guidance = 5.0,
    rounds: PositiveInt = 20,
) -> BenchResult:
    """A column of so many images; on a CPU smaller ones, whatever the options say."""
    if find_spec("triton") is None:
        raise InputError("draw needs triton; write: pip install 'stage-rl[triton]'")
    if not torch.cuda.is_available():
        measures = in_interpreter(__name__, "compared(16, 3000, 5.0, 4)")
        return BenchResult(f"no GPU, so correctness alone: {_words(measures)}", None, measures)
    measures = compared(images, vocabulary, guidance_scale, COLUMNS)
    times = interleaved(_replayed(images, vocabulary, guidance_scale), rounds, calls=20)
    measures |= {f"{form}_us": seconds * 1e6 for form, seconds in times.items()}
    headline = f"{measures['kernel_us']:.1f} us against {measures['torch_us']:.1f} of torch"
    reached = times["kernel"] < times["torch"] and measures["equal_tokens"] >= MIN_EQUAL
    return BenchResult(f"{headline}; {_words(measures)}", reached, measures)


def compared(images: int, vocabulary: int, guidance_scale: float, columns: int) -> dict[str, float]:
    """Share of equal tokens, and the largest difference of what is known of them (nats)."""
    equal, difference = 0, 0.0
    for column in range(columns):
        ours, theirs = (call() for call in _forms(images, vocabulary, guidance_scale, column))
        same_N = ours.tokens_N == theirs.tokens_N
        equal += int(same_N.sum())
        for name, values_N in vars(theirs).items():
            if name != "tokens_N" and values_N is not None:
                apart_N = (getattr(ours, name) - values_N).abs()[same_N]
                difference = max(difference, apart_N.max().item())
    return {"equal_tokens": equal / (columns * images), "difference": difference}


def _forms(
    images: int, vocabulary: int, guidance_scale: float, column: int
) -> tuple[Callable[[], Drawn], Callable[[], Drawn]]:
    """The kernel and torch's operations, on random logits."""
    from stage_rl.rollout.draw_kernel import draw_tokens  # triton is optional

    device = pick_device("auto")
    generator = torch.Generator(device).manual_seed(column)
    logits_RV = torch.randn(2 * images, vocabulary, device=device, generator=generator) * 2
    uniforms_N = torch.rand(images, device=device, generator=generator)
    inputs = logits_RV, uniforms_N, Sampling(guidance_scale, guided_entropy=True)
    return partial(draw_tokens, *inputs), partial(eager.draw_tokens, *inputs)


def _replayed(images: int, vocabulary: int, guidance_scale: float) -> dict[str, Callable[[], None]]:
    """Both forms as a rollout runs them: captured once and replayed."""
    forms = zip(("kernel", "torch"), _forms(images, vocabulary, guidance_scale, 0), strict=True)
    captured: dict[str, Callable[[], None]] = {}
    for name, form in forms:
        graph = CUDAGraph(partial(_discard, form))
        for _ in range(CALLS_BEFORE_CAPTURE + 1):
            graph()
        captured[name] = partial(_finished, graph)
    return captured


def _discard(form: Callable[[], Drawn]) -> None:
    form()


def _finished(graph: CUDAGraph) -> None:
    graph()
    torch.cuda.synchronize()


def _words(measures: dict[str, float]) -> str:
    return (
        f"{measures['equal_tokens']:.2%} of the tokens equal, "
        f"difference {measures['difference']:.0e} nats"
    )
