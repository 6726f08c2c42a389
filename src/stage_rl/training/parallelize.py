"""A policy whose trained parameters are spread over the ranks by FSDP2.

Every decoder layer is a unit of its own: its parameters are gathered for its forward and backward
pass and given back after each. The root unit holds what trains outside the layers, the text
embedding and the last norm; what neither trains nor lies in a layer is whole on every rank.

Shape suffixes: N completions, T image tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from stage_rl.policies.base import (
    Codebook,
    DecoderWeights,
    LayersOnDemand,
    LayerWeights,
    Policy,
    Prefix,
    TokenLayout,
)
from stage_rl.types import Prompt

T = TypeVar("T")


def shard_both(
    policy: Policy, reference: Policy, *, num_ranks: int, mixed: bool
) -> tuple[Policy, Policy]:
    """Policy and reference spread over all ranks, in place; the policies to work with from here.

    `mixed` gathers the decoder layers in bf16; gradients are summed in fp32, over all ranks. A
    reference in the memory of the policy shares its shards.
    """
    device = policy.device.type
    mesh = init_device_mesh(device, (num_ranks,))
    names = {name for name, p in policy.module.named_parameters() if p.requires_grad}
    shared = reference.module is policy.module
    sharded = ShardedPolicy(policy, _shard(policy, mesh, names=names, mixed=mixed))
    root = sharded.root if shared else _shard(reference, mesh, names=names, mixed=mixed)
    return sharded, ShardedPolicy(reference, root)


def in_one_pass(policy: Policy, work: Callable[[Policy], T]) -> T:
    """`work(policy)` as one forward pass, after which a backward pass may follow.

    The result is a tensor or a tuple of tensors where a gradient is wanted.
    """
    return policy.run(work) if isinstance(policy, ShardedPolicy) else work(policy)


def is_sharded(module: nn.Module) -> bool:
    """Whether parameters of a module are spread over ranks."""
    return any(isinstance(p, DTensor) for p in module.parameters())


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its shards; every rank asks for it at the same time."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's shard of a whole tensor, where `like` of the same shape is sharded."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    tensor = tensor.to(like.device)
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


class ShardedPolicy:
    """A policy in shards. All ranks call the same methods in the same order.

    `run` is the pass to train with; the single methods are for what needs no gradient.
    """

    def __init__(self, policy: Policy, root: nn.Module) -> None:
        self._policy = policy
        self.root = root

    def run(self, work: Callable[[Policy], T]) -> T:
        """`work` on the policy inside one forward pass of the root unit."""
        return self.root(lambda: work(self._policy))

    @property
    def module(self) -> nn.Module:
        """The module with its shards as parameters, under their usual names."""
        return self._policy.module

    @property
    def trunk_blocks(self) -> Sequence[nn.Module]:
        """The decoder layers, each a unit of sharding."""
        return self._policy.trunk_blocks

    @property
    def codebook(self) -> Codebook:
        """The visual vocabulary; a recipe may train, and so spread, what it is made of."""
        return _ShardedCodebook(self._policy.codebook, self.run)

    @property
    def device(self) -> torch.device:
        """Where this rank's shards are."""
        return self._policy.device

    def layout(self, prompts: Sequence[Prompt]) -> TokenLayout:
        """The token grid."""
        return self._policy.layout(prompts)

    @torch.no_grad()
    def encode(self, prompts: Sequence[Prompt]) -> Prefix:
        """The prompts as embeddings."""
        return self.run(lambda policy: policy.encode(prompts))

    @torch.no_grad()
    def embed(self, tokens_NT: Tensor) -> Tensor:
        """Image tokens as decoder inputs, embeds_NTD."""
        return self.run(lambda policy: policy.embed(tokens_NT))

    @torch.no_grad()
    def hidden(self, prefix: Prefix, tokens_NT: Tensor) -> Tensor:
        """Teacher-forced states that predict each image token, hidden_NTD."""
        return self.run(lambda policy: policy.hidden(prefix, tokens_NT))

    @torch.no_grad()
    def head(self, hidden: Tensor) -> Tensor:
        """Logits over the codebook; the last axis goes from D to V."""
        return self.run(lambda policy: policy.head(hidden))

    @torch.no_grad()
    def decoder_weights(self) -> DecoderWeights:
        """The whole weights, gathered layer by layer as they are read."""
        weights = self.run(_with_own_ends)
        layers = weights.layers
        return replace(
            weights, layers=LayersOnDemand(len(layers), lambda index: _whole_layer(layers[index]))
        )

    def reference(self, hold: Callable[[Tensor], Tensor] = torch.clone) -> Policy:
        """Shards cannot be copied: `shard_both` takes the reference that was made before."""
        raise AssertionError("make the reference before its policy is sharded")

    def save(self, folder: str | Path) -> None:
        """A run is exported from its checkpoint, by one process."""
        raise AssertionError("export the checkpoint of the run")


class _ShardedCodebook:
    """The codebook of a policy in shards."""

    def __init__(self, codebook: Codebook, run: Callable[[Callable[[Policy], Any]], Any]) -> None:
        self._codebook, self._run = codebook, run

    @property
    def size(self) -> int:
        """Number of codebook vectors, V."""
        return self._codebook.size

    @torch.no_grad()
    def vectors(self, tokens_NT: Tensor) -> Tensor:
        """The codebook vectors of tokens, codes_NTC in fp32."""
        return self._run(lambda _: self._codebook.vectors(tokens_NT))

    @torch.no_grad()
    def decode(self, tokens_NT: Tensor) -> Tensor:
        """The images of tokens, images_NHWC uint8 on the CPU."""
        return self._run(lambda _: self._codebook.decode(tokens_NT))


class _Root(nn.Module):
    """The root unit: its forward pass is whatever is done with the module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, work: Callable[[], Any]) -> Any:
        return work()


def _shard(policy: Policy, mesh: DeviceMesh, *, names: Collection[str], mixed: bool) -> nn.Module:
    """Shards the layers, then the root with the parameters of these names; returns the root."""
    in_blocks = {p for block in policy.trunk_blocks for p in block.parameters()}
    replicated = {
        p for n, p in policy.module.named_parameters() if p not in in_blocks and n not in names
    }
    # Inputs and outputs stay fp32 as on one device, where autocast alone lowers the precision.
    exact = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    lowered = replace(exact, param_dtype=torch.bfloat16) if mixed else exact
    root = _Root(policy.module)
    units: list[FSDPModule] = [
        fully_shard(block, mesh=mesh, mp_policy=lowered) for block in policy.trunk_blocks
    ]
    units.append(
        fully_shard(
            root, mesh=mesh, mp_policy=exact, reshard_after_forward=True, ignored_params=replicated
        )
    )
    for unit in units:
        # A loss is a rank's share of the step's: the gradients add up to that of one device.
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    return root


def _with_own_ends(policy: Policy) -> DecoderWeights:
    """The weights outside the layers as copies, which outlive the pass of the root unit."""
    weights = policy.decoder_weights()
    return replace(
        weights,
        final_norm=weights.final_norm.clone(),
        token_embeds_VD=weights.token_embeds_VD.clone(),
        head=[(w.clone(), None if b is None else b.clone()) for w, b in weights.head],
    )


def _whole_layer(layer: LayerWeights) -> LayerWeights:
    values = {field.name: getattr(layer, field.name) for field in fields(layer)}
    return replace(layer, **{name: whole(v) for name, v in values.items() if v is not None})


# How the decoder layers run in training: computed again in the backward pass, compiled.
#
# A layer keeps its class, its name and the names of its parameters; only its forward pass is
# another.


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
