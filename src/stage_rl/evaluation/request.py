"""What is asked of an evaluation: by a command, or by a recipe while it trains and at its end."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stage_rl.config import values_to_show
from stage_rl.errors import InputError
from stage_rl.evaluation.suites import Overrides, Suite
from stage_rl.policies.base import Policy, resolve_guidance
from stage_rl.recipe import EvaluationConfig, Recipe
from stage_rl.rollout.sampling import Sampling, check_seed


@dataclass(frozen=True)
class Request:
    """What to draw, with what to score it, and where everything goes."""

    out: Path | None = None
    """None: evaluations/MODEL-HASH8, by model, weights and way of sampling."""
    data: Path | None = None
    """Folder of the published prompt sets, or one of them."""
    images: Path | None = None
    """External images, in place of a model."""
    images_per_prompt: int | None = None
    """None: as the benchmark has it."""
    images_per_task: int | None = None
    """Images of each task, spread evenly over its prompts; where a benchmark counts by prompt,
    images_per_prompt goes before."""
    guidance_scale: float | None = None
    """None: the benchmark's own, else that of the model's family, 1 without guidance."""
    temperature: float = 1.0
    """Divides the guided logits; 0 draws the likeliest token."""
    top_k: int | None = None
    """Draw from so many likeliest tokens; 0: from all, None: as the family of the model."""
    seed: int = 0
    dtype: str = "mixed"
    """Precision of the sampler: float32, or mixed for bf16 linear layers."""
    smoke: bool = False
    """A few prompts of the shapes world and made-up scores."""
    scorers: Overrides = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Wrong numbers are an `InputError`."""
        numbers = {"images_per_prompt": 1, "images_per_task": 1, "seed": 0}
        for name, minimum in numbers.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise InputError(f"{name}: {value} is out of range; write at least {minimum}")
        check_seed(self.seed)

    def sampling(self, suite: Suite, policy: Policy) -> Sampling:
        """How a benchmark is drawn with a policy."""
        scale = resolve_guidance(policy, self.guidance_scale, default=suite.guidance_scale)
        top_k = policy.default_top_k if self.top_k is None else self.top_k
        return Sampling(guidance_scale=scale, temperature=self.temperature, top_k=top_k)


def recipe_request(
    evaluation: EvaluationConfig, *, validation: bool = False, **more: Any
) -> Request:
    """What a recipe asks for after its last step, or as validation while it trains."""
    number, seed = evaluation.images_per_task, evaluation.seed
    if validation:
        number, seed = evaluation.validation_images_per_task, evaluation.validation_seed
    return Request(
        data=evaluation.data_folder,
        scorers=evaluation.scorers,
        images_per_task=number,
        guidance_scale=evaluation.guidance_scale,
        top_k=evaluation.top_k,
        seed=seed,
        **more,
    )


def evaluation_of(recipe: Recipe) -> EvaluationConfig | None:
    """What a recipe evaluates: drawn as in the rollout where it does not say, its rewards with
    references to the environment, which are read where they are used and written as they are.
    """
    own = recipe.evaluation
    if own is None:
        return None
    changes = {
        "scorers": values_to_show(recipe)["evaluation"]["scorers"],
        "guidance_scale": recipe.guidance_scale
        if own.guidance_scale is None
        else own.guidance_scale,
        "top_k": recipe.rollout.top_k if own.top_k is None else own.top_k,
    }
    return own.model_copy(update=changes)


def asked_of(evaluation: EvaluationConfig) -> dict[str, Any]:
    """What decides the comparison of `compare_policies`, as plain values."""
    kept = {"benchmark", "scorers", "images_per_task", "guidance_scale", "top_k", "seed"}
    return evaluation.model_dump(mode="json", include=kept)
