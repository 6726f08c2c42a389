"""How the decoder layers run in training: computed again in the backward pass, compiled.

A layer keeps its class, its name and the names of its parameters; only its forward pass is another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

_ATEN = torch.ops.aten
KEPT = frozenset(
    operation.default
    for operation in (
        _ATEN.mm,
        _ATEN.addmm,
        _ATEN.bmm,
        _ATEN._scaled_dot_product_flash_attention,
        _ATEN._scaled_dot_product_flash_attention_for_cpu,
        _ATEN._scaled_dot_product_efficient_attention,
        _ATEN._scaled_dot_product_cudnn_attention,
    )
)
"""Operations whose results `selective` keeps: where the time of a layer goes."""


def prepare_blocks(
    blocks: Sequence[nn.Module], *, checkpointing: str = "none", compiled: bool = False
) -> None:
    """Sets how the layers run, in place; values and gradients stay what they are.

    `checkpointing` is `none`, `selective` (keeps the results of `KEPT`) or `full` (keeps the input
    of a layer). A layer is compiled together with its checkpointing.
    """
    for block in blocks:
        forward: Callable[..., Any] = block.forward
        if checkpointing != "none":
            # Nothing in a layer is random, so no random state is kept.
            options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
            if checkpointing == "selective":
                options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep)
            forward = partial(checkpoint, forward, **options)
        if compiled:
            forward = torch.compile(forward)
        # An attribute of the instance goes before the method, and no name of a parameter changes.
        block.forward = forward


def _keep(_context: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    if operation in KEPT:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
