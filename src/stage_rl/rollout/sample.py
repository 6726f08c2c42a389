"""Prompts to images, as training and evaluation draw them.

Shape suffixes: P prompts, G group, N = P x G completions, T image tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from stage_rl.distributed import concat
from stage_rl.errors import DivergedError
from stage_rl.policies.base import Prefix
from stage_rl.rollout.engine import Engine, Generated
from stage_rl.rollout.sampling import Sampling, image_uniforms
from stage_rl.types import Prompt, Rollout


@torch.no_grad()
def rollout(
    engine: Engine,
    prompts: Sequence[Prompt],
    *,
    group_size: int,
    sampling: Sampling,
    seed: int,
    step: int,
) -> Rollout:
    """A group of images for each prompt, by the weights of the engine's last reload.

    The random stream of an image is keyed by (seed, step, prompt.index, image number) alone. All
    prompts are checked (`InputError`) before the first is sampled; passes have at most
    `engine.images_per_pass` images.
    """
    policy = engine.policy
    with policy.unsharded():
        prefix = policy.encode(prompts)
    num_tokens = policy.layout.num_tokens
    uniforms_NT = image_uniforms(
        seed=seed,
        step=step,
        prompt_indices=[prompt.index for prompt in prompts],
        group_size=group_size,
        num_tokens=num_tokens,
    )
    uniforms_PGT = uniforms_NT.view(len(prompts), group_size, num_tokens)
    generated = _in_passes(engine, prefix, sampling=sampling, uniforms_PGT=uniforms_PGT)
    _refuse_divergence(generated, sampling)
    with policy.unsharded():
        images_NHWC = policy.images(
            [prompt for prompt in prompts for _ in range(group_size)], generated.tokens_NT
        )
    return Rollout(
        prompts=tuple(prompts), group_size=group_size, images_NHWC=images_NHWC, **vars(generated)
    )


def _refuse_divergence(generated: Generated, sampling: Sampling) -> None:
    """A DivergedError where tokens were drawn from logits that are not finite."""
    if not generated.logprobs_NT.isfinite().all():
        raise DivergedError(
            "the logits of the policy are not finite: its weights hold NaN or are far too large; "
            "lower optimizer.lr and go on from a checkpoint before, or mend the weights"
        )
    if not generated.guided_logprobs_NT.isfinite().all():
        raise DivergedError(
            f"guidance_scale {sampling.guidance_scale:g} at temperature {sampling.temperature:g} "
            "makes logits that are not finite; lower rollout.guidance_scale, or raise "
            "rollout.temperature"
        )


def _in_passes(
    engine: Engine,
    prefix: Prefix,
    *,
    sampling: Sampling,
    uniforms_PGT: Tensor,
) -> Generated:
    """Whole groups per pass where they fit, else pieces of one group, as even as they can be."""
    num_prompts, group_size, _ = uniforms_PGT.shape
    max_images = engine.images_per_pass(prefix, sampling)
    prompts_per_pass = _even(num_prompts, max(1, max_images // group_size))
    passes: list[Generated] = []
    for first in range(0, num_prompts, prompts_per_pass):
        last = min(first + prompts_per_pass, num_prompts)
        part = prefix.part(first, last)
        pieces = [
            engine.generate(
                part,
                group_size=uniforms.shape[1],
                sampling=sampling,
                uniforms_NT=uniforms.flatten(0, 1),
            )
            for uniforms in uniforms_PGT[first:last].split(_even(group_size, max_images), dim=1)
        ]
        passes.append(_concat_groups(pieces, last - first))
    return concat(passes)


def _even(count: int, max_part: int) -> int:
    """The largest part where `count` is cut into the fewest parts of at most `max_part`."""
    return math.ceil(count / math.ceil(count / max_part))


def _concat_groups(pieces: list[Generated], num_prompts: int) -> Generated:
    """The pieces of every group side by side."""

    def whole_groups(column: list[Tensor]) -> Tensor:
        parts = [part.unflatten(0, (num_prompts, -1)) for part in column]
        return torch.cat(parts, dim=1).flatten(0, 1)

    columns = {name: [getattr(piece, name) for piece in pieces] for name in vars(pieces[0])}
    known = {name: column for name, column in columns.items() if column[0] is not None}
    return Generated(**{name: whole_groups(column) for name, column in known.items()})
