"""The attention of the training module: transformers' SDPA, and our own for bf16 on a CPU.

On a CPU, SDPA in bf16 is slower than in fp32, while matrix products in bf16 are faster where the
processor has the arithmetic. Under bf16 autocast, short sequences therefore go through plain
products, of which all but that of queries and keys are bf16; everything else is fp32.

Shape suffixes: N rows, A heads, S slots, D head width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

CAUSAL = "stage_causal"
"""The name to give to `set_attn_implementation`."""

MOST_SLOTS = 256
"""The longest sequence whose attention weights are kept for the backward pass."""


def causal_attention(
    module: nn.Module,
    query_NASD: Tensor,
    key_NASD: Tensor,
    value_NASD: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal where there is no mask. Returns NSAD in the dtype of the values."""
    inputs = (query_NASD, key_NASD, value_NASD)
    if query_NASD.device.type != "cpu":
        return sdpa_attention_forward(module, *inputs, attention_mask, **options)
    if _in_products(query_NASD, key_NASD, attention_mask, options):
        out_NASD = _MixedCausal.apply(*inputs, options["scaling"])
        return out_NASD.transpose(1, 2), None
    with torch.autocast("cpu", enabled=False):
        query, key, value = (part.float() for part in inputs)
        out_NSAD, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return out_NSAD.to(value_NASD.dtype), None


def _in_products(
    query_NASD: Tensor, key_NASD: Tensor, attention_mask: Tensor | None, options: dict[str, Any]
) -> bool:
    """Whether plain products take it: a short whole sequence, no mask, no grouped heads."""
    if not torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return False
    plain = attention_mask is None and not options.get("dropout")
    return plain and query_NASD.shape == key_NASD.shape and query_NASD.shape[2] <= MOST_SLOTS


class _MixedCausal(torch.autograd.Function):
    """Causal attention in bf16 with scores and softmax in fp32, NASD in bf16.

    Head by head: then no input is copied, and the scores of one stay in the processor's cache.
    """

    @staticmethod
    def forward(
        ctx: Any, query_NASD: Tensor, key_NASD: Tensor, value_NASD: Tensor, scale: float
    ) -> Tensor:
        num_rows, num_heads, num_slots, width = query_NASD.shape
        queries, keys = query_NASD.float().unbind(1), key_NASD.float().unbind(1)
        value_NASD = value_NASD.bfloat16()
        # Without a gradient, all heads take turns with the memory of one.
        num_kept = num_heads if any(ctx.needs_input_grad) else 1
        weights_ANSS = value_NASD.new_empty(num_kept, num_rows, num_slots, num_slots)
        out_ANSD = value_NASD.new_empty(num_heads, num_rows, num_slots, width)
        scores_NSS = torch.empty(num_rows, num_slots, num_slots)
        unseen_SS = _unseen(num_slots)
        with onednn_matmul(value_NASD.device):
            for head, (query, key) in enumerate(zip(queries, keys, strict=True)):
                weights_NSS = weights_ANSS[head % num_kept]
                torch.baddbmm(unseen_SS, query, key.transpose(1, 2), alpha=scale, out=scores_NSS)
                weights_NSS.copy_(torch.softmax(scores_NSS, -1, out=scores_NSS))
                torch.bmm(weights_NSS, value_NASD[:, head], out=out_ANSD[head])
        ctx.save_for_backward(query_NASD.bfloat16(), key_NASD.bfloat16(), value_NASD, weights_ANSS)
        ctx.scale = scale
        return out_ANSD.transpose(0, 1)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (once_differentiable's type)
        ctx: Any, grad_NASD: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        *saved, weights_ANSS = ctx.saved_tensors
        inputs = [part.unbind(1) for part in (*saved, grad_NASD.bfloat16())]
        grads = [weights_ANSS.new_empty(saved[0].transpose(0, 1).shape) for _ in range(3)]
        by_weights_NSS = torch.empty_like(weights_ANSS[0])
        softmax_backward = torch.ops.aten._softmax_backward_data
        for query, key, value, grad, weights, by_query, by_key, by_value in zip(
            *inputs, weights_ANSS, *grads, strict=True
        ):
            torch.bmm(weights.transpose(1, 2), grad, out=by_value)
            torch.bmm(grad, value.transpose(1, 2), out=by_weights_NSS)
            by_scores = softmax_backward(by_weights_NSS, weights, -1, weights.dtype)
            torch.bmm(by_scores, key, out=by_query)
            torch.bmm(by_scores.transpose(1, 2), query, out=by_key)
        by_query, by_key, by_value = (grad.transpose(0, 1) for grad in grads)
        return by_query.mul_(ctx.scale), by_key.mul_(ctx.scale), by_value, None


@lru_cache(maxsize=4)
def _unseen(num_slots: int) -> Tensor:
    """-inf where a slot may not look, 0 elsewhere, SS."""
    return torch.full((num_slots, num_slots), -math.inf).triu_(1)


def use_causal(model: Any) -> None:
    """Makes a transformers decoder use `causal_attention`, with the masks of SDPA."""
    ALL_ATTENTION_FUNCTIONS.register(CAUSAL, causal_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(CAUSAL, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation(CAUSAL)


# Products of fp32 matrices on a CPU by oneDNN, where it keeps their precision.


ROUNDS_TO_BF16 = ("amx_bf16", "amx_fp16", "avx10_2")
"""Capabilities with which oneDNN may take bf16 for fp32, once it is asked for at all."""


@contextmanager
def onednn_matmul(device: torch.device) -> Iterator[None]:
    """Lets oneDNN multiply matrices inside the block, in fp32.

    Torch asks oneDNN for fp32 products only where bf16 is allowed for them. A processor without
    matrix units for bf16 computes them in fp32 all the same, on AMD's faster than MKL; on any other
    processor or device the block changes nothing. The setting is the process's: products of
    other threads meanwhile may differ in the last bit.
    """
    if device.type != "cpu" or not _in_fp32():
        yield
        return
    # Its type is not declared.
    onednn: Any = torch.backends.mkldnn
    matmul = onednn.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@functools.cache
def _in_fp32() -> bool:
    """Whether the processor is known to compute fp32 products in fp32 even so."""
    # Not every torch that the package allows has it.
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    known = torch.backends.mkldnn.is_available() and capabilities.get("architecture") == "x86_64"
    return known and not any(capabilities.get(name) for name in ROUNDS_TO_BF16)
