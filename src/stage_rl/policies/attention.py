"""Causal attention in fp32 inside bf16 autocast.

On a CPU, attention in bf16 is slower than in fp32 (measured: a training step of the shapes policy
takes 1.6 times as long), while its linear layers are faster: the mix wants fp32 just here.

Shape suffixes: N rows, A heads, S slots, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
    """Causal attention over right-padded rows; takes no mask. Returns NSAD."""
    assert attention_mask is None and not options.get("dropout")
    grouped = query_NASD.shape[1] != key_NASD.shape[1]
    with torch.autocast(query_NASD.device.type, enabled=False):
        out = F.scaled_dot_product_attention(
            query_NASD.float(),
            key_NASD.float(),
            value_NASD.float(),
            is_causal=True,
            scale=options.get("scaling"),
            enable_gqa=grouped,
        )
    return out.transpose(1, 2), None


def use_fp32_causal(model: Any) -> None:
    """Makes a transformers decoder use `fp32_causal_attention`."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(FP32_CAUSAL, fp32_causal_attention)
    model.set_attn_implementation(FP32_CAUSAL)
