"""Which prompts a step takes: a pure function, so that a resumed run goes on where it stopped."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from stage_rl.errors import RecipeError
from stage_rl.types import Prompt


def prompt_order(num_prompts: int, *, epoch: int, seed: int) -> NDArray[np.int64]:
    """A permutation of the prompts' places, keyed by (seed, epoch)."""
    # The counter's last word keeps these numbers apart from the streams that images are drawn with.
    bits = np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, 1 << 63])
    return np.random.Generator(bits).permutation(num_prompts)


def prompts_of_step(
    prompts: Sequence[Prompt], *, step: int, prompts_per_step: int, seed: int
) -> tuple[Prompt, ...]:
    """The prompts of a step (from 0) in an endless row of epochs, each in an order of its own.

    An epoch has as many full steps as fit; the few prompts left over differ from epoch to epoch.
    So no step holds a prompt twice: its images would be drawn from the same random streams.
    """
    if prompts_per_step > len(prompts):
        raise RecipeError(
            f"a step takes {prompts_per_step} prompts but the set has {len(prompts)}; "
            f"write at most {len(prompts)}"
        )
    epoch, place = divmod(step, len(prompts) // prompts_per_step)
    order = prompt_order(len(prompts), epoch=epoch, seed=seed)
    first = place * prompts_per_step
    return tuple(prompts[i] for i in order[first : first + prompts_per_step])
