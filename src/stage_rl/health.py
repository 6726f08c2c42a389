"""The settings of what watches over a run: its drift, what it is evaluated on, signs of being dead.

Free of torch, like every settings module.
"""

from __future__ import annotations

from typing import Literal

from stage_rl.settings import Count, Every, NonNegative, Positive, Seed, Settings


class ProbeConfig(Settings):
    """The fixed reference samples on which exact KL and entropy drift are measured."""

    every: Every = 10
    """Steps between measurements; 0: never."""
    num_prompts: Count = 8
    """Prompts of the set, the first of the training set."""
    images_per_prompt: Count = 2
    """Reference samples per prompt."""
    mismatch_images: Every = 2
    """Images of each step on which sampler and trainer are compared under the distribution that is
    not trained, at most a group; 0: none. Under the trained one all images are, at no cost."""


class EvaluationConfig(Settings):
    """What base and trained policy are compared on after the last step."""

    benchmark: Literal["shapes-geneval"] = "shapes-geneval"
    """Name of the benchmark, as `stage eval` takes it."""
    images_per_task: Count = 100
    """Images per task."""
    guidance_scale: NonNegative | None = None
    """Guidance while evaluating; null: that of the rollout."""
    seed: Seed = 0
    """Seed of the random streams, the same for both policies."""
    every: Every = 0
    """Steps between evaluations on the held-out panel while training; 0: none. The checkpoint that
    is best by it is kept as RUN@best."""
    panel_images_per_task: Count = 16
    """Images per task of the panel."""
    panel_seed: Seed = 1
    """Seed of the panel's random streams; another than seed, so that the choice is not judged on
    the images it was made by."""


class LivenessConfig(Settings):
    """Steps in a row with a sign of being dead after which a run stops; 0: it never does."""

    equal_reward_steps: Every = 10
    """Every group's rewards are equal."""
    zero_gradient_steps: Every = 3
    """The gradient is exactly 0."""
    constant_reward_steps: Every = 10
    """The summed reward is one and the same number for all images."""
    failed_reward_steps: Every = 3
    """A reward failed and groups left the step."""


class TripwiresConfig(Settings):
    """Thresholds of a run that goes astray; null: not watched."""

    action: Literal["warn", "stop"] = "warn"
    """What happens when a number stays beyond its threshold: a line on the console, or the end."""
    steps: Count = 3
    """Steps in a row beyond a threshold before something happens."""
    entropy_gap: Positive | None = 1.0
    """Largest size of entropy/gap, nats."""
    kl: Positive | None = 1.0
    """Largest kl/mean, nats."""
    grad_norm: Positive | None = None
    """Largest grad/norm, before clipping."""
    panel_drop: Positive | None = None
    """Largest fall of the held-out panel below its best; needs evaluation.every."""
