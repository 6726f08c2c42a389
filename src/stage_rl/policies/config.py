"""What a recipe may say of a policy; free of torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from stage_rl.schema import Count, PolicyConfig, Positive
from stage_rl.settings import Settings, complaint

if TYPE_CHECKING:
    import torch
    from transformers import JanusForConditionalGeneration, JanusProcessor

    from stage_rl.policies.janus import JanusPolicy


class LoraConfig(Settings):
    """A low-rank adapter on the decoder layers; it alone trains, in fp32 (PEFT; `[lora]`)."""

    rank: Count = 64
    """Rank of the product that is added to each weight."""
    alpha: Positive = 64.0
    """The product is multiplied by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, le=0)
    """0: with dropout no two passes would give one log-probability."""
    targets: tuple[str, ...] = Field(
        default=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        min_length=1,
    )
    """Names of the linear layers that get an adapter, in every decoder layer."""


class JanusConfig(PolicyConfig):
    """Janus and Janus-Pro of any size, in transformers' layout or DeepSeek's own."""

    path: str = "shapes"
    """Folder of the weights, or hub id: OWNER/NAME, OWNER/NAME/FOLDER, with @REVISION or without;
    shapes: the small model that comes with the package."""
    prompt_format: Literal["checkpoint", "deepseek", "deepseek_old"] = "checkpoint"
    """What stands around a prompt: the checkpoint's own; <|User|>: and <|Assistant|>: (deepseek);
    User: and Assistant: (deepseek_old), with which the paper's released code trains Janus-Pro."""
    trainable: tuple[str, ...] = ("model.language_model.*",)
    """Name patterns of the parameters that train, in the spelling of `fnmatch`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision the parameters are held in; updates of the usual size are lost in bfloat16, but
    base weights under an adapter keep what they were published with."""
    lora: LoraConfig | None = None
    """A low-rank adapter that trains in place of the weights; null: the weights train."""

    @model_validator(mode="after")
    def _one_thing_trains(self) -> Self:
        if self.lora and self.trainable != type(self).model_fields["trainable"].default:
            text = "with policy.lora the adapter alone trains; leave trainable out, or lora=null"
            raise complaint("trainable", text)
        return self

    def load(self, device: torch.device) -> tuple[JanusForConditionalGeneration, JanusProcessor]:
        """The module and its processor; wrong weights are a `WeightsError`."""
        from stage_rl.policies.weights import load_janus

        module, processor = load_janus(self.path, dtype=self.dtype, device=device)
        if self.prompt_format != "checkpoint":
            from stage_rl.policies.deepseek.processor import set_prompt_format

            set_prompt_format(processor, self.prompt_format)
        return module, processor

    def build(self, device: torch.device) -> JanusPolicy:
        """The policy; wrong weights are a `WeightsError`, wrong patterns a `RecipeError`."""
        from stage_rl.policies.janus import JanusPolicy

        module, processor = self.load(device)
        trainable = self.trainable
        if self.lora:
            from stage_rl.policies.lora import PATTERN, add_adapter

            lora = self.lora
            trunk = module.model.language_model
            add_adapter(trunk, rank=lora.rank, alpha=lora.alpha, targets=lora.targets)
            module.model.generation_head.float()  # log-probabilities are fp32
            trainable = (PATTERN,)
        return JanusPolicy(module, processor, trainable=trainable)
