"""Log-probability and entropy of the image head without the N x V logits in memory.

The head runs on chunks of rows. A frozen head (the default) takes the gradient of the hidden states
in the forward pass, while the logits of the chunk are there: both outputs depend on their own row
alone, so their derivatives are one vector of width D per row, which the backward pass only scales.
No logits are computed twice. A head with trainable parameters runs again in the backward pass.

Shape suffixes: N rows (completions x tokens), D model width, V codebook size.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from stage_rl.policies.base import Policy, Prefix
from stage_rl.policies.trunk import onednn_matmul
from stage_rl.rollout.sampling import Sampling, guide

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
    with onednn_matmul(hidden_ND.device):
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


# Which distribution of image tokens is scored: the conditional one, or the guided one.
#
# Guided logits are unconditional + scale x (conditional - unconditional), over the temperature.
# Their
# rows hold both states side by side, so that the chunked image head takes them like any others:
# row
# by row, with its own backward pass.
#
# Shape suffixes: N completions, T image tokens, R rows, D model width, W width of a row (D, or 2
# D
# with guidance), V codebook size.


@dataclass(frozen=True)
class Scoring:
    """The distribution under which policy and reference measure log-probability and entropy."""

    logprobs: Literal["conditional", "guided", "guided_detached"] = "conditional"
    """conditional: at temperature 1; guided_detached: no gradient through the unconditional pass.
    """
    guidance_scale: float = 1.0
    """Of the guided forms; 1 needs no unconditional pass."""
    temperature: float = 1.0
    """Of the guided forms."""

    @property
    def has_two_passes(self) -> bool:
        """Whether an unconditional pass belongs to it."""
        return self.logprobs != "conditional" and self.guidance_scale != 1

    @property
    def has_two_gradients(self) -> bool:
        """Whether a gradient goes through the unconditional pass."""
        return self.has_two_passes and self.logprobs == "guided"

    def states(self, policy: Policy, prefix: Prefix, tokens_NT: Tensor) -> Tensor:
        """The states that `head` reads, states_NTW, with gradient where the form has one."""
        cond_NTD = policy.hidden(prefix, tokens_NT)
        if not self.has_two_passes:
            return cond_NTD
        with self._unconditional():
            uncond_NTD = policy.hidden(prefix.unconditional(), tokens_NT)
        return torch.cat([cond_NTD, uncond_NTD], -1)

    def head(self, policy: Policy) -> Head:
        """Rows of states to logits over V: R x W -> R x V."""
        if self.logprobs == "conditional":
            return policy.head
        if not self.has_two_passes:
            return lambda rows_RD: policy.head(rows_RD) / self.temperature
        return lambda rows_RW: self._guided_logits(policy.head, rows_RW)

    def _guided_logits(self, head: Head, rows_RW: Tensor) -> Tensor:
        cond_RD, uncond_RD = rows_RW.chunk(2, -1)
        with self._unconditional():
            uncond_RV = head(uncond_RD)
        # Guidance amplifies the rounding of a head in bf16, so it is applied in fp32.
        wide = torch.promote_types(uncond_RV.dtype, torch.float32)
        logits_RV = guide(head(cond_RD).to(wide), uncond_RV.to(wide), self.guidance_scale)
        return logits_RV / self.temperature

    def _unconditional(self) -> torch.no_grad | nullcontext[None]:
        return torch.no_grad() if self.logprobs == "guided_detached" else nullcontext()


CONDITIONAL = Scoring()


def scoring_of(
    logprobs: Literal["conditional", "guided", "guided_detached"], sampling: Sampling
) -> Scoring:
    """The scoring of a recipe: guided forms score what was sampled from, so nothing can differ."""
    if logprobs == "conditional":
        return CONDITIONAL
    return Scoring(logprobs, sampling.guidance_scale, sampling.temperature)
