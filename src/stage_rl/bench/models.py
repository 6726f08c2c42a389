"""What the benchmarks run on: models of the published sizes with random weights, and recipes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stage_rl.config import load_recipe
from stage_rl.errors import RecipeError
from stage_rl.policies.base import Policy
from stage_rl.policies.janus import PUBLISHED, JanusConfig, size_of_config
from stage_rl.policies.loading import DTYPES
from stage_rl.policies.sizes import ModelSize
from stage_rl.recipe import Recipe
from stage_rl.rewards.base import RewardConfig, Score
from stage_rl.shapes.model import JanusSize, build_janus
from stage_rl.shapes.prompts import WORDS
from stage_rl.types import Prompt

MAX_POSITIONS = 16384
SIZES = {
    name: JanusSize(
        width=width,
        layers=layers,
        heads=heads,
        mlp=mlp,
        codebook_size=16384,
        image_size=384,
        patch_size=16,
        base_channels=128,
        latent_channels=256,
        channel_multiplier=(1, 1, 2, 2, 4),
        res_blocks=2,
        max_positions=MAX_POSITIONS,
    )
    for name, (layers, width, mlp, heads) in zip(
        ("janus-1b", "janus-7b"), PUBLISHED.values(), strict=True
    )
}
"""The published models but for what drawing does not use: text vocabulary and image encoder."""
FITTING = {
    "janus-1b": "training.groups_per_microbatch=2",
    "janus-7b": "optimizer.kind=adamw_8bit rollout.release_cache=true "
    "training.groups_per_microbatch=1 training.activation_checkpointing=selective",
}
"""Settings with which a step of 64 images fits one GPU of 141 GB."""
ADAPTER_7B = (
    "policy.lora.rank=64 policy.dtype=bfloat16 optimizer.kind=adamw rollout.release_cache=true "
    "training.groups_per_microbatch=2 training.activation_checkpointing=full"
)
"""Settings with which janus-7b trains an adapter on one of 80 GB."""
TEXT = "a photo of a red square"
LONG_TEXT = " and ".join([TEXT] * 4)
"""29 tokens with begin of sequence and of image, as long as a prompt of GenEval."""


def recipe_of(
    model: str,
    overrides: Sequence[str],
    *,
    num_prompts: int,
    group_size: int,
    random: bool | None = None,
) -> Recipe:
    """The recipe shapes_geneval at guidance 3 with steps that are alike: no picture, no probe, one
    learning rate.

    `random`: weights of a size are drawn and the reward takes no time (None: for a published size).
    """
    settings = [f"policy.path={model}", "seed=0", "rollout.guidance_scale=3"]
    settings += [f"rollout.prompts_per_step={num_prompts}", f"rollout.group_size={group_size}"]
    if model in SIZES if random is None else random:
        policy, reward = (f"{__name__}:{c.__name__}" for c in (RandomConfig, RandomRewardConfig))
        settings += [f"policy.kind={policy}", f"rewards=[{{kind: '{reward}'}}]"]
        fitting = FITTING.get(model, "training.groups_per_microbatch=null")
        settings += ["training.logprob_rows=2048", *fitting.split()]
    settings += ["run.log_images_every=0", "probe.every=0", "probe.mismatch_images=0"]
    return load_recipe("shapes_geneval", [*settings, "optimizer.schedule=constant", *overrides])


def policy_of(model: str, device: torch.device) -> Policy:
    """A policy to sample from: a size in bf16, or the weights of a folder, a hub id or `shapes`."""
    if model in SIZES:
        return RandomConfig(path=model, trainable=(), dtype="bfloat16").build(device)
    return JanusConfig(path=model, trainable=()).build(device)


def prompts_of(model: str, count: int) -> list[Prompt]:
    """The same text many times, for a size as long as a prompt of GenEval."""
    return [Prompt(LONG_TEXT if model in SIZES else TEXT, index) for index in range(count)]


class RandomConfig(JanusConfig):
    """A policy of a known size whose weights are drawn on the device itself."""

    path: str = "janus-1b"
    """janus-1b, janus-7b or shapes."""
    image_size: int | None = None
    """Pixels of a side, and with them the tokens of an image; null: those of the size."""

    def size(self) -> ModelSize:
        """The dimensions of what `load` draws."""
        with torch.device("meta"):
            module, _ = build_janus(self._chosen(), words=WORDS, seed=0)
        return size_of_config(module.config)

    def _chosen(self) -> JanusSize:
        sizes = SIZES | {"shapes": JanusSize()}
        if self.path not in sizes:
            raise RecipeError(
                f"policy.path: '{self.path}' is not a size; write one of: {', '.join(sizes)}"
            )
        size = sizes[self.path]
        if self.image_size:
            size = replace(size, image_size=self.image_size, max_positions=MAX_POSITIONS)
        return size

    def load(self, device: torch.device) -> tuple[Any, Any]:
        """The module and its processor, which knows the words of the shapes world."""
        size = self._chosen()
        before = torch.get_default_dtype()
        torch.set_default_dtype(DTYPES[self.dtype])
        try:
            with device:
                return build_janus(size, words=WORDS, seed=0)
        finally:
            torch.set_default_dtype(before)


class RandomRewardConfig(RewardConfig):
    """A reward that takes no time: the fraction of a large multiple of the mean brightness."""

    def build(self, device: torch.device) -> Any:
        """The reward; images that differ have scores that differ."""

        def score(images_NHWC: Tensor, prompts: list[Prompt]) -> list[Score]:
            means = images_NHWC.float().mean(dim=(1, 2, 3)).tolist()
            return [Score(math.modf(mean * 1e3)[0], "random") for mean in means]

        return score
