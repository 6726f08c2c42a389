"""The values that pass between the floors of the package.

Shape suffixes: P prompts, G group, N = P x G completions (group by group), T image tokens,
H x W pixels, C colour channels.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from torch import Tensor

from stage_rl.pictures import image_grid
from stage_rl.vector_math import choose_kernels

choose_kernels()


@dataclass(frozen=True)
class Prompt:
    """A text to draw, with what the rewards need to judge the drawing."""

    text: str
    index: int = 0
    """Place in its prompt set; with seed, step and image number it keys the random stream."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """The record the prompt came from, such as GenEval's tag, include and exclude clauses."""
    source: str = field(default="", compare=False)
    """File and line it was read from."""

    @property
    def place(self) -> str:
        """Where it stands, in words, for messages."""
        return self.source or f"prompt {self.index}"


def is_text(text: str) -> bool:
    """Whether it has no lone surrogates, which no tokenizer takes and no file holds."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True)
class Rollout:
    """The completions of one step. Row i * G + k is image k of prompt i."""

    prompts: tuple[Prompt, ...]
    group_size: int
    tokens_NT: Tensor
    images_NHWC: Tensor
    """uint8, on the CPU."""
    logprobs_NT: Tensor | None = None
    """Conditional log-probability of each token at temperature 1, by the sampler (nats)."""
    guided_logprobs_NT: Tensor | None = None
    """Log-probability under the distribution that was sampled from (nats)."""
    entropy_NT: Tensor | None = None
    """Entropy of the conditional distribution at temperature 1, by the sampler (nats)."""
    guided_entropy_NT: Tensor | None = None
    """That of the guided distribution at temperature 1, where the rollout was asked for it."""
    cut_mass_NT: Tensor | None = None
    """Probability of the tokens that top-k and top-p left out, under guidance and temperature;
    None where neither was set."""
    cut_conditional_mass_NT: Tensor | None = None
    """That of the same tokens under the conditional distribution at temperature 1."""

    def pil_images(self) -> list[Image.Image]:
        """The images, in the order of the rows."""
        return [Image.fromarray(image_HWC) for image_HWC in self.images_NHWC.numpy()]

    def grid(self) -> Image.Image:
        """All images in one picture, a row for each prompt under its text."""
        titles = [prompt.text for prompt in self.prompts]
        return image_grid(self.images_NHWC, columns=self.group_size, titles=titles)

    def _repr_png_(self) -> bytes:
        """What a notebook shows."""
        file = io.BytesIO()
        self.grid().save(file, "PNG")
        return file.getvalue()


@dataclass(frozen=True)
class Measured:
    """Teacher-forced log-probabilities and entropies of one rollout or group (fp32, nats)."""

    logprobs_NT: Tensor
    entropy_NT: Tensor
    kl_NT: Tensor | None = None
    """Of the policy from its reference, summed over the codebook, where the loss needs it."""
    states_NTW: Tensor | None = None
    """What they were computed from, without gradient, where it was asked for: of a reference for
    the divergence, of the policy for a rule of token credit."""


@dataclass(frozen=True)
class Rewards:
    """What the rewards said of a rollout."""

    rewards_PG: Tensor
    """Weighted sum of the scores, fp32; 0 in groups dropped from the step."""
    valid_P: Tensor
    """False where a reward failed and the whole group is dropped from the step."""
    columns: Mapping[str, Tensor]
    """What is logged under `reward/`, PG: raw scores by reward name, and the extras of a reward and
    its share of a group's spread under names of their own; NaN where a reward does not apply to the
    prompt."""
    reasons: tuple[str, ...]
    """One sentence per completion, in the order of the rollout."""
    components: Mapping[str, Tensor] = field(default_factory=dict)
    """What is weighted and added, by reward name, PG: the scores, 0 where a condition is not met;
    NaN as in `columns`."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Of the components."""
