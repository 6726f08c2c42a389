"""What the trainer and the rollout engine ask of a model family.

Shape suffixes: P prompts, N completions, T image tokens, U columns of the image (its tokens, and
control tokens between them), A rotary axes, L prompt positions, D model width, R rotary dimensions,
C codebook channels, V codebook size, H x W pixels.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from stage_rl.errors import InputError
from stage_rl.policies.logprobs import CONDITIONAL, ReferenceRows, Scoring, head_logprobs
from stage_rl.policies.lora import LoraConfig, adapter_off, has_adapter
from stage_rl.policies.sizes import ModelSize
from stage_rl.settings import Component, validation_error
from stage_rl.types import Prompt, is_text


@dataclass(frozen=True)
class Prefix:
    """Prompts as input embeddings, right-padded to a common number of positions.

    Row b is used up to `lengths_P[b]`; what stands behind is never attended.
    """

    embeds_PLD: Tensor
    lengths_P: Tensor
    uncond: Prefix | None = None
    """The unconditional rows, of lengths of their own; None for a family without guidance."""

    def repeat(self, group_size: int) -> Prefix:
        """Each prompt `group_size` times, group by group: P -> N rows."""
        return Prefix(
            self.embeds_PLD.repeat_interleave(group_size, 0),
            self.lengths_P.repeat_interleave(group_size, 0),
            self.uncond and self.uncond.repeat(group_size),
        )

    def part(self, first: int, last: int) -> Prefix:
        """Rows `first` to `last` - 1, padded to the longest of them."""
        lengths_P = self.lengths_P[first:last]
        embeds_PLD = self.embeds_PLD[first:last, : int(lengths_P.max())]
        return Prefix(embeds_PLD, lengths_P, self.uncond and self.uncond.part(first, last))

    def unconditional(self) -> Prefix:
        """The unconditional rows; an InputError for a family without guidance."""
        if self.uncond is None:
            raise InputError("guidance_scale: this policy has no unconditional rows; write 1")
        return self.uncond


@dataclass(frozen=True)
class TokenLayout:
    """How the T sampled tokens of an image lie on its grid, and the U columns of the decode.

    Control columns exist inside the engine and `Policy.hidden` alone; everything else sees T.
    """

    grid: tuple[int, int]
    """Rows and columns of the image that is shown."""
    num_tokens: int
    fixed_U: Tensor | None = None
    """-1 where a token is sampled (T times, and last), else the row of `input_embeds`, V or above,
    of a control token. None: U = T."""
    coords_UA: Tensor | None = None
    """Rotary coordinates of each column; None: 0, 1, 2, ... on one axis. Where they are not
    absolute the prompt's length is added, and prompt position p has p on every axis."""
    absolute: bool = False
    """Columns have `coords_UA` as written, prompt positions 0; needs `coords_UA`."""

    def token_columns(self) -> Tensor:
        """The columns of the tokens, T."""
        if self.fixed_U is None:
            return torch.arange(self.num_tokens)
        return (self.fixed_U < 0).nonzero()[:, 0]

    def with_control(self, tokens_NT: Tensor) -> Tensor:
        """The columns of images: their tokens, and control tokens between them, NU."""
        if self.fixed_U is None:
            return tokens_NT
        columns_NU = self.fixed_U.to(tokens_NT.device).repeat(len(tokens_NT), 1)
        columns_NU[:, self.token_columns()] = tokens_NT
        return columns_NU


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
    attention_out_norm: Tensor | None = None
    """Of what attention adds to the residual stream; likewise of what the MLP adds."""
    mlp_out_norm: Tensor | None = None


@dataclass(frozen=True)
class DecoderWeights:
    """Everything the rollout engine copies; views of the module's own tensors where they can be."""

    layers: Iterable[LayerWeights]
    """Read once, one after the other: what is made for one is gone before the next is made."""
    final_norm: Tensor
    norm_eps: float
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_cos_SR: Tensor
    """Cosines by coordinate and rotary dimension, fp32; R = head_dim, half-split convention."""
    rotary_sin_SR: Tensor
    input_embeds: Tensor
    """What a token becomes as an input of the decoder: V image tokens, then control tokens."""
    head: Sequence[tuple[Tensor, Tensor | None]]
    """(weight, bias) of the linear layers of the image head, exact GELU between them."""
    rotary_axis_R: Tensor | None = None
    """Axis whose coordinate turns each rotary dimension; None: there is one axis."""


class Policy(nn.Module):
    """An autoregressive text-to-image model, whose forward pass scores image tokens."""

    module: Any
    """The module of the family, which is trained, sharded and saved."""
    codebook_size: int
    """V."""
    layout: TokenLayout
    """The token grid, the same for all prompts."""
    guided: ClassVar[bool] = True
    """Whether `encode` gives unconditional rows."""
    default_guidance: ClassVar[float] = 5.0
    """The guidance scale where none is written, of a family that is guided."""
    default_top_k: ClassVar[int] = 0
    """Of how many likeliest tokens one is drawn where nobody says; 0: of all, as recipes do."""
    folder_layouts: ClassVar[tuple[str, ...]] = ("transformers",)
    """Of the folders that `save` can write."""
    adapter_layouts: ClassVar[tuple[str, ...]] = ("transformers",)
    """Of those in which an adapter can be written alone."""

    understands: ClassVar[bool] = False
    """Whether the family answers questions about images, by `answer_logits`."""

    def __init__(self, module: nn.Module, processor: Any) -> None:
        super().__init__()
        self.module = module
        self.processor = processor
        """What makes token ids of prompts; the reference shares it."""
        self.without_adapter = False
        """Whether this is the reference of a policy with an adapter, in its module."""

    def forward(
        self,
        prompts: Sequence[Prompt],
        tokens_NT: Tensor,
        *,
        group_size: int = 1,
        scoring: Scoring = CONDITIONAL,
        mixed: bool = False,
        chunk_rows: int = 2048,
        entropy_grad: bool = True,
        reference: ReferenceRows | None = None,
        with_states: bool = False,
    ) -> tuple[Tensor, ...]:
        """Log-probabilities of tokens and entropies of their distributions, (logprobs_NT,
        entropy_NT) in nats, fp32, then kl_NT where there is a `reference`; see `head_logprobs` and
        `states`, which come last where they are asked for.
        """
        states_NTW = self.states(
            prompts, tokens_NT, group_size=group_size, scoring=scoring, mixed=mixed
        )
        known = head_logprobs(
            partial(scoring.logits, self.head),
            states_NTW.flatten(0, 1),
            tokens_NT.flatten(),
            chunk_rows=chunk_rows,
            entropy_grad=entropy_grad,
            reference=reference,
        )
        # FSDP2 hooks what a forward pass returns, which may be no view.
        outputs = [values_N.view(tokens_NT.shape).clone() for values_N in known]
        return *outputs, *([states_NTW.detach()] if with_states else [])

    def states(
        self,
        prompts: Sequence[Prompt],
        tokens_NT: Tensor,
        *,
        group_size: int = 1,
        scoring: Scoring = CONDITIONAL,
        mixed: bool = False,
    ) -> Tensor:
        """The states that `scoring.logits` reads, states_NTW, each prompt `group_size` times.

        `mixed` computes the matmuls of the trunk in bf16; the result is fp32 all the same.
        """
        prefix = self.encode(prompts).repeat(group_size)
        if scoring.logprobs == "unconditional":
            prefix = prefix.unconditional()
        # A pass uses each weight once: kept copies in bf16 would only take memory.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=mixed, cache_enabled=False):
            states_NTW = self.hidden(prefix, tokens_NT)
            if scoring.has_two_passes:
                with scoring.unconditional_pass():
                    uncond_NTD = self.hidden(prefix.unconditional(), tokens_NT)
                states_NTW = torch.cat([states_NTW, uncond_NTD], -1)
        return states_NTW.float() if mixed else states_NTW

    def answer_logits(self, image_HWC: Tensor, question: str) -> Tensor:
        """The logits of the first token of the answer to a question about an image (uint8),
        logits_V in fp32, of a family that `understands`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not read images")

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.module.parameters()).device

    @property
    @abstractmethod
    def trunk_blocks(self) -> Sequence[nn.Module]:
        """The decoder layers, bottom up: the units of sharding and checkpointing."""

    @abstractmethod
    def encode(self, prompts: Sequence[Prompt]) -> Prefix:
        """The prompts as embeddings, with a gradient where these train: encode for each backward.

        An empty or over-long prompt is an `InputError`.
        """

    @torch.no_grad()
    def check(self, prompts: Sequence[Prompt]) -> None:
        """Finds prompts that `encode` refuses; a family that encodes at some cost does it for less.

        A prompt that the model cannot take is an `InputError`.
        """
        self.encode(prompts)

    @abstractmethod
    def embed(self, tokens_NU: Tensor) -> Tensor:
        """Image and control tokens as decoder inputs, embeds_NUD."""

    @abstractmethod
    def hidden(self, prefix: Prefix, tokens_NT: Tensor) -> Tensor:
        """Teacher-forced states that predict each image token, hidden_NTD, with gradient."""

    @abstractmethod
    def head(self, hidden: Tensor) -> Tensor:
        """Logits over the codebook; the last axis goes from D to V."""

    @abstractmethod
    def codes(self, tokens_NT: Tensor) -> Tensor:
        """The codebook vectors of tokens, codes_NTC in fp32."""

    @abstractmethod
    def images(self, prompts: Sequence[Prompt], tokens_NT: Tensor) -> Tensor:
        """The images of tokens, images_NHWC uint8 on the CPU; one prompt for each row."""

    @abstractmethod
    def decoder_weights(self) -> DecoderWeights:
        """The weights the engine copies once per step; layers may be shards (`DTensor`)."""

    @abstractmethod
    def save(
        self, folder: str | Path, *, layout: str = "transformers", base: str | Path = ""
    ) -> None:
        """Writes the model in one of `folder_layouts`; an adapter is merged into the weights.

        `base` names the weights it began with, whose other files may come along.
        """

    def frozen_modules(self) -> Mapping[str, nn.Module]:
        """Modules outside of `module` on which the images depend, such as a text encoder.

        They are neither trained, sharded nor saved; `base_digest` covers them.
        """
        return {}

    @contextmanager
    def unsharded(self) -> Iterator[None]:
        """Inside the block the parameters outside the layers are whole, where FSDP2 shards them.

        For what is called outside of a forward pass; all ranks enter it at the same time.
        """
        sharded = isinstance(self, FSDPModule)
        if sharded:
            self.unshard()
        try:
            yield
        finally:
            if sharded:
                self.reshard()

    def adapter(self) -> AbstractContextManager[None]:
        """The context in which the layers run: with the adapter off in a reference."""
        return adapter_off(self.module) if self.without_adapter else nullcontext()

    def reference(self, hold: Callable[[Tensor], Tensor] = torch.clone) -> Policy:
        """This policy as it is now, frozen: copies what trains, shares the rest.

        `hold` makes the copy of a parameter of a decoder layer: in another precision, elsewhere.
        With an adapter nothing is copied: the reference is the same module without it.
        """
        if has_adapter(self.module):
            # The copy shares the hooks too, those that FSDP2 registers later among them.
            reference = copy.copy(self)
            reference.without_adapter = True
            return reference
        made: dict[int, Any] = {id(p): p for p in self.parameters() if not p.requires_grad}
        made[id(self.processor)] = self.processor
        for parameter in (p for block in self.trunk_blocks for p in block.parameters()):
            if parameter.requires_grad:
                made[id(parameter)] = nn.Parameter(hold(parameter.detach()), requires_grad=False)
        reference = copy.deepcopy(self, made).requires_grad_(False)
        for block in reference.trunk_blocks:
            # A compiled or checkpointed forward pass would still run the layer it was made for.
            vars(block).pop("forward", None)
        return reference


class PolicyConfig(Component):
    """Base of the model families."""

    family: ClassVar[str] = "policy"
    policy_class: ClassVar[type[Policy]] = Policy
    """What `build` makes; it says whether the family is guided."""
    tags: ClassVar[tuple[str, ...]] = ()
    """Of a model card."""
    loading_code: ClassVar[Mapping[str, str]] = {}
    """How a model card loads a folder, by its layout, and draws with it, where GUIDANCE stands for
    the scale; `adapter`: an adapter on its BASE."""

    default_trainable: ClassVar[tuple[str, ...]] = ("*",)
    lora_targets: ClassVar[tuple[str, ...]] = LoraConfig().targets
    """The linear layers that get an adapter where a recipe names none."""

    trainable: tuple[str, ...] = ()
    """Name patterns of the parameters that train, in the spelling of `fnmatch`; left out, those of
    the family."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision the parameters are held in; updates of the usual size are lost in bfloat16, but
    base weights under an adapter keep what they were published with."""
    lora: LoraConfig | None = None
    """A low-rank adapter that trains in place of the weights; null: the weights train."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_family(cls, data: Any) -> Any:
        """What the family has where nothing is written."""
        if not isinstance(data, dict):
            return data
        filled = {"trainable": cls.default_trainable} | data
        if isinstance(data.get("lora"), dict):
            filled["lora"] = {"targets": cls.lora_targets} | data["lora"]
        return filled

    @model_validator(mode="after")
    def _one_thing_trains(self) -> Self:
        if self.lora and self.trainable != self.default_trainable:
            text = "with policy.lora the adapter alone trains; leave trainable out, or lora=null"
            raise validation_error("trainable", text)
        return self

    def size(self) -> ModelSize | None:
        """The dimensions of the model, without loading it; None where they are not known."""
        return None

    @abstractmethod
    def build(self, device: torch.device) -> Policy:
        """The policy with its weights on a device."""


def check_text(prompt: Prompt, tokenizer: Any) -> None:
    """An InputError for a prompt that is no text, or holds a special token of its tokenizer."""
    where = check_words(prompt)
    special = next((mark for mark in tokenizer.all_special_tokens if mark in prompt.text), None)
    if special is not None:
        raise InputError(f"{where}: holds the special token '{special}'; write plain words")


def check_words(prompt: Prompt) -> str:
    """Where a prompt stands, in words; an InputError where it is empty or no Unicode text."""
    where = prompt.place
    if not prompt.text.strip():
        raise InputError(f"{where}: is empty; write what to draw")
    if not is_text(prompt.text):
        raise InputError(f"{where}: {prompt.text[:40]!a} is no Unicode text; write plain words")
    return where


def resolve_guidance(
    policy: Policy | type[Policy], scale: float | None, *, default: float | None = None
) -> float:
    """The guidance scale that is written; where none is, 1 for a family without guidance, else
    `default` or the family's own.
    """
    if scale is not None:
        return scale
    if not policy.guided:
        return 1.0
    return policy.default_guidance if default is None else default
