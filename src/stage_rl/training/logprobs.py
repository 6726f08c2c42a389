"""Log-probability and entropy of the image head without the N x V logits in memory.

The head runs on chunks of rows. A frozen head (the default) takes the gradient of the hidden states
in the forward pass, while the logits of the chunk are there: both outputs depend on their own row
alone, so their derivatives are one vector of width D per row, which the backward pass only scales.
No logits are computed twice. A head with trainable parameters runs again in the backward pass.

Shape suffixes: N rows (completions x tokens), D model width, V codebook size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from stage_rl.policies.products import onednn_products

Head = Callable[[Tensor], Tensor]


def head_logprobs(
    head: Head,
    hidden_ND: Tensor,
    tokens_N: Tensor,
    *,
    chunk_rows: int,
    entropy_grad: bool = True,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the tokens and entropies of their distributions, (logprobs_N, entropy_N)
    in nats (equation 9), fp32, or fp64 where the logits are.

    `head` maps rows of width D to logits over V, each row by itself; at most `chunk_rows` rows of
    logits exist at a time. Without `entropy_grad` the entropy is a constant, which saves a matrix
    product.
    """
    assert hidden_ND.ndim == 2, hidden_ND.shape
    assert tokens_N.shape == hidden_ND.shape[:1], (tokens_N.shape, hidden_ND.shape)
    assert chunk_rows > 0, chunk_rows
    with onednn_products(hidden_ND.device):
        if torch.is_grad_enabled() and _has_trainable(head, hidden_ND):
            run = _recomputed
        elif torch.is_grad_enabled() and hidden_ND.requires_grad:
            return _FrozenHead.apply(hidden_ND, tokens_N, head, chunk_rows, entropy_grad)
        else:
            run = _without_gradient
        parts = [run(head, *chunk) for chunk in _chunks(hidden_ND, tokens_N, chunk_rows)]
    logprobs_N, entropy_N = (torch.cat(part) for part in zip(*parts, strict=True))
    return logprobs_N, entropy_N if entropy_grad else entropy_N.detach()


def _has_trainable(head: Head, hidden_ND: Tensor) -> bool:
    """Whether parameters of the head take a gradient; asked of zero rows, which costs nothing."""
    return head(hidden_ND[:0].detach()).requires_grad


def _chunks(hidden_ND: Tensor, tokens_N: Tensor, chunk_rows: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(hidden_ND.split(chunk_rows), tokens_N.split(chunk_rows), strict=True))


def _distributions(logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and probabilities; on a CPU a second softmax is faster than exp."""
    dtype = torch.promote_types(logits_NV.dtype, torch.float32)
    return logits_NV.log_softmax(-1, dtype=dtype), logits_NV.softmax(-1, dtype=dtype)


def _plain(head: Head, hidden_ND: Tensor, tokens_N: Tensor) -> tuple[Tensor, Tensor]:
    logprobs_NV, probs_NV = _distributions(head(hidden_ND))
    entropy_N = -torch.linalg.vecdot(probs_NV, logprobs_NV)
    return logprobs_NV.gather(-1, tokens_N[:, None]).squeeze(-1), entropy_N


@torch.no_grad()
def _without_gradient(head: Head, hidden_ND: Tensor, tokens_N: Tensor) -> tuple[Tensor, Tensor]:
    return _plain(head, hidden_ND, tokens_N)


def _recomputed(head: Head, hidden_ND: Tensor, tokens_N: Tensor) -> tuple[Tensor, Tensor]:
    return checkpoint(_plain, head, hidden_ND, tokens_N, use_reentrant=False)


def _with_slopes(
    head: Head, hidden_ND: Tensor, tokens_N: Tensor, entropy_grad: bool
) -> tuple[Tensor, ...]:
    """(logprobs_N, entropy_N) and the derivative of the first, or of both, by the hidden state of
    its row, slope_ND.
    """
    rows_ND = hidden_ND.detach().requires_grad_()
    with torch.enable_grad():
        logits_NV = head(rows_ND)
    logprobs_NV, probs_NV = _distributions(logits_NV.detach())
    entropy_N = -torch.linalg.vecdot(probs_NV, logprobs_NV)
    index_N1 = tokens_N[:, None]
    outputs = [logprobs_NV.gather(-1, index_N1).squeeze(-1), entropy_N]

    def slope(by_logits_NV: Tensor, retain_graph: bool) -> Tensor:
        grad_NV = by_logits_NV.to(logits_NV.dtype)
        return torch.autograd.grad(logits_NV, rows_ND, grad_NV, retain_graph=retain_graph)[0]

    entropy_slopes = []
    if entropy_grad:
        # d H / dz = -p (log p + H)
        by_logits_NV = logprobs_NV.add_(entropy_N[:, None]).mul_(probs_NV).neg_()
        entropy_slopes = [slope(by_logits_NV, True)]
    # d log p_y / dz = onehot(y) - p
    by_logits_NV = probs_NV.neg_().scatter_add_(-1, index_N1, torch.ones_like(probs_NV[:, :1]))
    return *outputs, slope(by_logits_NV, False), *entropy_slopes


class _FrozenHead(torch.autograd.Function):
    """head_logprobs with a gradient for the hidden states only."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        tokens_N: Tensor,
        head: Head,
        chunk_rows: int,
        entropy_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        chunks = _chunks(hidden_ND, tokens_N, chunk_rows)
        parts = [_with_slopes(head, *chunk, entropy_grad) for chunk in chunks]
        logprobs_N, entropy_N, *slopes = (torch.cat(part) for part in zip(*parts, strict=True))
        ctx.save_for_backward(*slopes)
        ctx.set_materialize_grads(False)
        if not entropy_grad:
            ctx.mark_non_differentiable(entropy_N)
        return logprobs_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (once_differentiable's type)
        ctx: Any, *grads: Tensor | None
    ) -> tuple[Tensor | None, None, None, None, None]:
        grad_ND = None
        # One slope for the log-probabilities alone, two with the entropy.
        for slope_ND, grad_N in zip(ctx.saved_tensors, grads, strict=False):
            if grad_N is not None:
                term_ND = (slope_ND * grad_N[:, None]).to(slope_ND.dtype)
                grad_ND = term_ND if grad_ND is None else grad_ND.add_(term_ND)
        return grad_ND, None, None, None, None
