"""How policy and reference run on several GPUs: FSDP2 shards, checkpointed and compiled layers.

Every decoder layer is a unit of its own: its parameters are gathered for its forward and backward
pass and given back after each. The policy itself, the root unit, holds what trains outside the
layers, the text embedding and the last norm; what neither trains nor lies in a layer is whole on
every rank.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from stage_rl.errors import InputError
from stage_rl.policies.base import Policy


def shard(
    policy: Policy,
    reference: Policy,
    *,
    num_ranks: int,
    mixed: bool,
    shard_ranks: int | None = None,
) -> None:
    """Spreads policy and reference over all ranks, in place.

    Each `shard_ranks` ranks in a row share a copy (HSDP): what a layer gathers stays among them,
    and only gradients go to the others. None: all share one. `mixed` gathers the decoder layers in
    bf16; gradients are summed in fp32, over all ranks. A reference in the memory of the policy
    shares its shards.
    """
    each = shard_ranks or num_ranks
    sizes = (num_ranks,) if each == num_ranks else (num_ranks // each, each)
    names = ("replicate", "shard")[-len(sizes) :]
    mesh = init_device_mesh(policy.device.type, sizes, mesh_dim_names=names)
    # Inputs and outputs stay fp32 as on one device, where autocast alone lowers the precision.
    exact = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    lowered = replace(exact, param_dtype=torch.bfloat16) if mixed else exact
    trained = {name for name, p in policy.module.named_parameters() if p.requires_grad}
    for model in [policy] if reference.module is policy.module else [policy, reference]:
        in_blocks = {p for block in model.trunk_blocks for p in block.parameters()}
        replicated = {
            p
            for name, p in model.module.named_parameters()
            if p not in in_blocks and name not in trained
        }
        units: list[FSDPModule] = [
            fully_shard(block, mesh=mesh, mp_policy=lowered) for block in model.trunk_blocks
        ]
        units.append(
            fully_shard(
                model,
                mesh=mesh,
                mp_policy=exact,
                reshard_after_forward=True,
                ignored_params=replicated,
            )
        )
        for unit in units:
            # A loss is a rank's share of the step's: the gradients add up to that of one device.
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)


def is_sharded(module: nn.Module) -> bool:
    """Whether parameters of a module are spread over ranks."""
    return any(isinstance(p, DTensor) for p in module.parameters())


def spread_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's shard of a whole tensor, where `like` of the same shape is sharded."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    tensor = tensor.to(like.device)
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def require_compiler(key: str, *, instead: str) -> None:
    """torch.compile calls a C++ compiler on a CPU; InputError at `key` where there is none."""
    usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    compiler = os.environ.get("CXX") or usual
    if shutil.which(compiler) is None:
        text = f"no C++ compiler {compiler!r} found; install it, name another in CXX, or write"
        raise InputError(f"{key}: {text} {instead}")


def prepare_blocks(
    blocks: Sequence[nn.Module], *, checkpointing: str = "none", compiled: bool = False
) -> None:
    """Sets how decoder layers run in training, in place; values and gradients stay what they are.

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


def _keep(_context: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    must = operation in KEPT
    return CheckpointPolicy.MUST_SAVE if must else CheckpointPolicy.PREFER_RECOMPUTE
