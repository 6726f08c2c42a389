"""The decoder layers of the training module: packed rows, run layer by layer, causal attention.

On a CPU, SDPA in bf16 is slower than in fp32, while matmuls in bf16 are faster where the
processor has the arithmetic. Under bf16 autocast, short sequences therefore go through plain
matmuls, of which all but that of queries and keys are bf16; everything else is fp32.

Shape suffixes: N rows, T image tokens, U columns of the image, S positions of prompt and image, A
rotary axes (in the attention: heads), D model width (in the attention: head width).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import rms_norm
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from stage_rl.policies.base import DecoderWeights, LayerWeights, Policy, Prefix, TokenLayout
from stage_rl.policies.lora import merged_weight
from stage_rl.policies.matmul import onednn_matmul

GPU_POSITIONS = 64
"""The number of positions on a GPU is a multiple of it."""


def run_trunk(
    layers: Iterable[nn.Module],
    norm: nn.Module,
    rotary: Callable[[Tensor, Tensor], Any],
    *,
    prefix: Prefix,
    columns_NUD: Tensor,
    layout: TokenLayout,
) -> Tensor:
    """The states that predict each image token, states_NTD; `columns_NUD` are the inputs of all
    columns but the last, which predicts none.

    Row b holds its prompt at positions 0 to len - 1 and column u at len + u; what stands behind is
    never attended, because attention is causal. `rotary` makes what the layers rotate by of their
    inputs and coordinates, NSA or 1SA. The layers are called one by one: a model's own forward pass
    would read coordinates that do not count up as several sequences in one row.
    """
    inputs_NSD = torch.cat([prefix.embeds_PLD, columns_NUD], 1)
    num_inputs = inputs_NSD.shape[1]
    if torch.is_autocast_enabled(inputs_NSD.device.type):
        inputs_NSD = inputs_NSD.float()  # layers in bf16 add to an fp32 residual stream too
    length_N1 = prefix.lengths_P[:, None]
    num_positions = padded_positions(num_inputs, on_gpu=inputs_NSD.device.type == "cuda")
    position_1S = torch.arange(num_positions, device=inputs_NSD.device)[None]
    image_NS = (position_1S - length_N1 + prefix.embeds_PLD.shape[1]).clamp(max=num_inputs - 1)
    states_NSD = _take_positions(
        inputs_NSD, torch.where(position_1S < length_N1, position_1S, image_NS)
    )
    rotation = rotary(states_NSD, _coordinates(layout, length_N1, position_1S))
    for layer in layers:
        states_NSD = layer(states_NSD, attention_mask=None, position_embeddings=rotation)
    return _take_positions(
        norm(states_NSD), length_N1 - 1 + layout.token_columns().to(position_1S.device)
    )


def teacher_forced(policy: Policy, trunk: Any, prefix: Prefix, tokens_NT: Tensor) -> Tensor:
    """`Policy.hidden` of a trunk that is built as transformers' Llama, image and control tokens
    behind their prompts. Its rotary embedding takes positions, or coordinates on several axes.
    """

    def rotary(states_NSD: Tensor, coords_NSA: Tensor) -> Any:
        places = coords_NSA[..., 0] if coords_NSA.shape[-1] == 1 else coords_NSA
        return trunk.rotary_emb(states_NSD, position_ids=places)

    with policy.adapter():
        return run_trunk(
            trunk.layers,
            trunk.norm,
            rotary,
            prefix=prefix,
            columns_NUD=policy.embed(policy.layout.with_control(tokens_NT)[:, :-1]),
            layout=policy.layout,
        )


def padded_positions(num_positions: int, *, on_gpu: bool) -> int:
    """Positions of a training pass.

    A GPU's attention makes a plan for each length, which stalls: few lengths, few plans.
    """
    return math.ceil(num_positions / GPU_POSITIONS) * GPU_POSITIONS if on_gpu else num_positions


def _take_positions(values_NSD: Tensor, positions_NT: Tensor) -> Tensor:
    """values_NTD: of each row the positions asked for."""
    return values_NSD.gather(1, positions_NT[..., None].expand(-1, -1, values_NSD.shape[-1]))


def _coordinates(layout: TokenLayout, length_N1: Tensor, position_1S: Tensor) -> Tensor:
    """Rotary coordinates of every position, NSA, or 1SA where they are the same in all rows."""
    if layout.coords_UA is None:
        return position_1S[..., None]
    coords_UA = layout.coords_UA.to(position_1S.device)
    column_NS = position_1S - length_N1
    image_NSA = coords_UA[column_NS.clamp(0, len(coords_UA) - 1)]
    if not layout.absolute:
        image_NSA = image_NSA + length_N1[..., None]
    prompt_1S = 0 * position_1S if layout.absolute else position_1S
    return torch.where(column_NS[..., None] < 0, prompt_1S[..., None], image_NSA)


@torch.no_grad()
def trunk_weights(
    trunk: Any,
    *,
    input_embeds: Tensor,
    head: Sequence[nn.Linear],
    adapter: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> DecoderWeights:
    """What the engine copies of a decoder of transformers that is built as Llama is.

    `head`: the linear layers behind it. Adapters are merged, as they are on or off in `adapter`.
    """
    config, device = trunk.config, input_embeds.device
    positions_1S = torch.arange(config.max_position_embeddings, device=device)[None]
    cos_1SR, sin_1SR = trunk.rotary_emb(torch.empty(0, device=device), position_ids=positions_1S)
    return DecoderWeights(
        layers=(_layer_weights(layer, adapter, device) for layer in trunk.layers),
        final_norm=trunk.norm.weight,
        norm_eps=config.rms_norm_eps,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=trunk.layers[0].self_attn.head_dim,
        rotary_cos_SR=cos_1SR[0],
        rotary_sin_SR=sin_1SR[0],
        input_embeds=input_embeds,
        head=[(layer.weight, layer.bias) for layer in head],
    )


@torch.no_grad()
def _layer_weights(
    layer: Any, adapter: Callable[[], AbstractContextManager[None]], device: torch.device
) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    linears = {f"w{name}": getattr(attention, f"{name}_proj") for name in "qkvo"}
    linears |= {f"w_{name}": getattr(mlp, f"{name}_proj") for name in ("gate", "up", "down")}
    with adapter():
        weights: dict[str, Any] = {n: merged_weight(linear) for n, linear in linears.items()}
    weights["attention_norm"] = layer.input_layernorm.weight
    weights["mlp_norm"] = layer.post_attention_layernorm.weight
    for name in "qkv":
        weights[f"b{name}"] = getattr(attention, f"{name}_proj").bias
    for name in ("q_norm", "k_norm"):
        weights[name] = getattr(getattr(attention, name, None), "weight", None)
    # A streamed reference keeps its layers in host memory.
    return LayerWeights(**{n: w.to(device) for n, w in weights.items() if w is not None})


CAUSAL = "stage_causal"
"""The name to give to `set_attn_implementation`."""

MAX_POSITIONS = 256
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
        return _mixed_causal(*inputs, options["scaling"]).transpose(1, 2), None
    with torch.autocast("cpu", enabled=False):
        query, key, value = (part.float() for part in inputs)
        out_NSAD, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return out_NSAD.to(value_NASD.dtype), None


def _in_products(
    query_NASD: Tensor, key_NASD: Tensor, attention_mask: Tensor | None, options: dict[str, Any]
) -> bool:
    """Whether plain matmuls take it: a short whole sequence, no mask, no grouped heads."""
    if not torch.is_autocast_enabled("cpu"):
        return False
    plain = attention_mask is None and not options.get("dropout")
    return plain and query_NASD.shape == key_NASD.shape and query_NASD.shape[2] <= MAX_POSITIONS


class _MixedCausal(torch.autograd.Function):
    """Causal attention in bf16 with scores and softmax in fp32, NASD in bf16.

    Head by head: then no input is copied, and the scores of one stay in the processor's cache.
    """

    @staticmethod
    def forward(
        ctx: Any, query_NASD: Tensor, key_NASD: Tensor, value_NASD: Tensor, scale: float
    ) -> Tensor:
        num_rows, num_heads, num_positions, width = query_NASD.shape
        queries, keys = query_NASD.float().unbind(1), key_NASD.float().unbind(1)
        value_NASD = value_NASD.bfloat16()
        # Without a gradient, all heads take turns with the memory of one.
        num_kept = num_heads if any(ctx.needs_input_grad) else 1
        weights_ANSS = value_NASD.new_empty(num_kept, num_rows, num_positions, num_positions)
        out_ANSD = value_NASD.new_empty(num_heads, num_rows, num_positions, width)
        scores_NSS = torch.empty(num_rows, num_positions, num_positions)
        unseen_SS = _unseen(num_positions)
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


# A compiled layer calls it as it is, which is faster than what would be made of it.
_mixed_causal: Any = torch.compiler.disable(_MixedCausal.apply)


@lru_cache(maxsize=4)
def _unseen(num_positions: int) -> Tensor:
    """-inf where a position may not look, 0 elsewhere, SS."""
    return torch.full((num_positions, num_positions), -math.inf).triu_(1)


class InputNorm(nn.Module):
    """The RMSNorm in front of linear layers, computed in fp32, of fp64 in fp64.

    Under autocast it gives what they take, in place of a copy of its result for each of them.
    """

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = weight, eps

    def forward(self, states_NSD: Tensor) -> Tensor:
        kind, eps = states_NSD.device.type, self.variance_epsilon
        autocast = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if autocast else states_NSD.dtype
        wide = torch.promote_types(states_NSD.dtype, torch.float32)
        states_NSD, weight_D = states_NSD.to(wide), self.weight.to(wide)
        if autocast and kind == "cpu" and not torch.compiler.is_compiling():
            return _MixedNorm.apply(states_NSD, weight_D, eps, dtype)
        return rms_norm(states_NSD, weight_D.shape, weight_D, eps).to(dtype)


class _MixedNorm(torch.autograd.Function):
    """RMSNorm of fp32 as another dtype, in fewer passes over the states than torch's on a CPU."""

    @staticmethod
    def forward(
        ctx: Any, states_NSD: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype
    ) -> Tensor:
        width = states_NSD.shape[-1]
        length_NS1 = torch.linalg.vector_norm(states_NSD, dim=-1, keepdim=True)
        scale_NS1 = length_NS1.square_().div_(width).add_(eps).rsqrt_()
        unit_NSD = states_NSD * scale_NS1
        ctx.save_for_backward(unit_NSD, scale_NS1, weight_D)
        return torch.mul(unit_NSD, weight_D, out=torch.empty_like(states_NSD, dtype=dtype))

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (once_differentiable's type)
        ctx: Any, grad_NSD: Tensor
    ) -> tuple[Tensor, Tensor, None, None]:
        unit_NSD, scale_NS1, weight_D = ctx.saved_tensors
        grad_NSD = grad_NSD.float()
        product_NSD = grad_NSD * unit_NSD
        by_weight_D = product_NSD.flatten(0, -2).sum(0)
        # What changes the length of a state is taken out.
        along_NS1 = (product_NSD @ weight_D).div_(len(weight_D))[..., None]
        by_states_NSD = torch.mul(grad_NSD, weight_D, out=product_NSD)
        by_states_NSD.addcmul_(unit_NSD, along_NS1, value=-1).mul_(scale_NS1)
        return by_states_NSD, by_weight_D, None, None


INPUT_NORMS = ("input_layernorm", "post_attention_layernorm")


def use_own_parts(model: Any) -> None:
    """Makes a transformers decoder use `causal_attention`, with the masks of SDPA, and `InputNorm`.

    The names of its parameters stay.
    """
    ALL_ATTENTION_FUNCTIONS.register(CAUSAL, causal_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(CAUSAL, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation(CAUSAL)
    for layer in model.layers:
        for name in INPUT_NORMS:
            norm = getattr(layer, name)
            if not isinstance(norm, InputNorm):
                setattr(layer, name, InputNorm(norm.weight, norm.variance_epsilon))
