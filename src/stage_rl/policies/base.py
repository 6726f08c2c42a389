"""What the trainer and the rollout engine ask of a model family.

Shape suffixes: P prompts, N completions, T image tokens, L prompt slots, D model width,
C codebook channels, V codebook size, H x W pixels.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from stage_rl.settings import (
    Component,
)
from stage_rl.types import Prompt


@dataclass(frozen=True)
class Prefix:
    """Prompts as input embeddings, right-padded to a common number of slots.

    Row b is used up to `lengths_P[b]`; what stands behind is never attended.
    """

    embeds_PLD: Tensor
    lengths_P: Tensor
    uncond_embeds_PLD: Tensor | None
    """The same slots for the unconditional row; None for a family without guidance."""

    def repeat(self, group_size: int) -> Prefix:
        """Each prompt `group_size` times, group by group: P -> N rows."""
        uncond = self.uncond_embeds_PLD
        return Prefix(
            self.embeds_PLD.repeat_interleave(group_size, 0),
            self.lengths_P.repeat_interleave(group_size, 0),
            None if uncond is None else uncond.repeat_interleave(group_size, 0),
        )

    def part(self, first: int, last: int) -> Prefix:
        """Rows `first` to `last` - 1, padded to the longest of them."""
        uncond, lengths_P = self.uncond_embeds_PLD, self.lengths_P[first:last]
        slots = slice(0, int(lengths_P.max()))
        return Prefix(
            self.embeds_PLD[first:last, slots],
            lengths_P,
            None if uncond is None else uncond[first:last, slots],
        )

    def unconditional(self) -> Prefix:
        """The unconditional rows as a prefix of their own."""
        assert self.uncond_embeds_PLD is not None
        return Prefix(self.uncond_embeds_PLD, self.lengths_P, None)


@dataclass(frozen=True)
class TokenLayout:
    """How the T tokens of an image lie on its grid."""

    grid: tuple[int, int]
    """Rows and columns; T = rows x columns where no token is forced."""
    num_tokens: int
    forced_T: Tensor | None = None
    """Id where a token is forced (no log-probability), -1 where it is sampled; None: all are."""


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer in the shapes of `nn.Linear` weights; optional parts are None."""

    attention_norm: Tensor
    wq: Tensor
    wk: Tensor
    wv: Tensor
    wo: Tensor
    mlp_norm: Tensor
    w_gate: Tensor
    w_up: Tensor
    w_down: Tensor
    bq: Tensor | None = None
    bk: Tensor | None = None
    bv: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None


class LayersOnDemand(Sequence[LayerWeights]):
    """Layers that are read one by one: what is made for one is gone before the next is made."""

    def __init__(self, num_layers: int, read: Callable[[int], LayerWeights]) -> None:
        self._num_layers, self._read = num_layers, read

    def __len__(self) -> int:
        return self._num_layers

    def __getitem__(self, index: Any) -> Any:
        return self._read(range(self._num_layers)[index])

    def __iter__(self) -> Iterator[LayerWeights]:
        return map(self._read, range(self._num_layers))


@dataclass(frozen=True)
class DecoderWeights:
    """Everything the rollout engine copies; views of the module's own tensors where they can be."""

    layers: Sequence[LayerWeights]
    final_norm: Tensor
    norm_eps: float
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_cos_SR: Tensor
    """Cosines by slot and rotary dimension, fp32; R = head_dim, half-split convention."""
    rotary_sin_SR: Tensor
    token_embeds_VD: Tensor
    """What image token v becomes as an input of the decoder."""
    head: Sequence[tuple[Tensor, Tensor | None]]
    """(weight, bias) of the linear layers of the image head, exact GELU between them."""


class Codebook(Protocol):
    """The visual vocabulary."""

    @property
    def size(self) -> int:
        """Number of codebook vectors, V."""
        ...

    def vectors(self, tokens_NT: Tensor) -> Tensor:
        """The codebook vectors of tokens, codes_NTC in fp32."""
        ...

    def decode(self, tokens_NT: Tensor) -> Tensor:
        """The images of tokens, images_NHWC uint8 on the CPU."""
        ...


class Policy(Protocol):
    """An autoregressive text-to-image model as the trainer and the engine see it."""

    @property
    def module(self) -> nn.Module:
        """What is trained, sharded and saved."""
        ...

    @property
    def trunk_blocks(self) -> Sequence[nn.Module]:
        """The decoder layers, bottom up: the units of sharding and checkpointing."""
        ...

    @property
    def codebook(self) -> Codebook:
        """The visual vocabulary."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        ...

    def encode(self, prompts: Sequence[Prompt]) -> Prefix:
        """The prompts as embeddings, with a gradient where these train: encode for each backward.

        An empty or over-long prompt is an `InputError`.
        """
        ...

    def layout(self, prompts: Sequence[Prompt]) -> TokenLayout:
        """The token grid."""
        ...

    def embed(self, tokens_NT: Tensor) -> Tensor:
        """Image tokens as decoder inputs, embeds_NTD."""
        ...

    def hidden(self, prefix: Prefix, tokens_NT: Tensor) -> Tensor:
        """Teacher-forced states that predict each image token, hidden_NTD, with gradient."""
        ...

    def head(self, hidden: Tensor) -> Tensor:
        """Logits over the codebook; the last axis goes from D to V."""
        ...

    def decoder_weights(self) -> DecoderWeights:
        """The weights the engine copies once per step."""
        ...

    def reference(self, hold: Callable[[Tensor], Tensor] = torch.clone) -> Policy:
        """This policy as it is now, frozen; memory is shared with the parts that do not train.

        `hold` makes the copy of a parameter of a trunk block: in another precision, elsewhere.
        """
        ...

    def save(self, folder: str | Path) -> None:
        """Writes the model in the layout it was loaded from."""
        ...


class PolicyConfig(Component):
    """Base of the model families."""

    family: ClassVar[str] = "policy"

    trainable: tuple[str, ...] = ("*",)
    """Name patterns of the parameters that train, in the spelling of `fnmatch`."""

    @abstractmethod
    def build(self, device: torch.device) -> Policy:
        """The policy with its weights on a device."""


def base_digest(module: nn.Module) -> str:
    """SHA-256 over all parameters as they were loaded: names in order, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)};".encode())
        values = parameter.detach().cpu().contiguous().flatten()
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()
