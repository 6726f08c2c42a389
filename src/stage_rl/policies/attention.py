"""The attention of the training module: transformers' SDPA, in fp32 on a CPU.

On a CPU, attention in bf16 is slower than in fp32, while linear layers in bf16 are faster where the
processor has the arithmetic: under bf16 autocast the attention stays in fp32.

Shape suffixes: N rows, A heads, S slots, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

FP32_CAUSAL = "stage_fp32_causal"
"""The name to give to `set_attn_implementation`."""


def fp32_causal_attention(
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
    with torch.autocast("cpu", enabled=False):
        query, key, value = (part.float() for part in inputs)
        out_NSAD, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return out_NSAD.to(value_NASD.dtype), None


def use_fp32_causal(model: Any) -> None:
    """Makes a transformers decoder use `fp32_causal_attention`, with the masks of SDPA."""
    ALL_ATTENTION_FUNCTIONS.register(FP32_CAUSAL, fp32_causal_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(FP32_CAUSAL, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation(FP32_CAUSAL)
