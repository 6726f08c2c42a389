"""What a recipe may say of a policy; free of torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from stage_rl.schema import PolicyConfig

if TYPE_CHECKING:
    import torch

    from stage_rl.policies.janus import JanusPolicy


class JanusConfig(PolicyConfig):
    """Janus and Janus-Pro of any size, in transformers' layout."""

    path: str = "shapes"
    """Folder or hub id of the weights; shapes: the small model that comes with the package."""
    trainable: tuple[str, ...] = ("model.language_model.*",)
    """Name patterns of the parameters that train, in the spelling of `fnmatch`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision the parameters are held in; updates of the usual size are lost in bfloat16."""

    def build(self, device: torch.device) -> JanusPolicy:
        """The policy; wrong weights are a `WeightsError`, wrong patterns a `RecipeError`."""
        from stage_rl.policies.janus import JanusPolicy
        from stage_rl.policies.weights import load_janus

        module, processor = load_janus(self.path, dtype=self.dtype, device=device)
        return JanusPolicy(module, processor, trainable=self.trainable)
