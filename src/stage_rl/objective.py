"""The settings of the objective, with a preset for each reading of it.

The presets set every point where the paper and its released code differ.

A recipe names a preset under `algorithm.preset`; a key written beside it overrides that one point.
The defaults of the classes are the preset `default`, so PRESETS lists only what the others change.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from stage_rl.settings import NonNegative, Settings, complaint

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "mask_normalization": "none",
        "self_similarity": 1,
    },
    "release": {
        "self_similarity": 0,
        "equal_group_similarity": 1.0,
        "ratio": "unclipped",
        "logprob_dtype": "bfloat16",
        "entropy": {"centred": True},
    },
}

class EntropyConfig(Settings):
    """How the policy is held to the reference's entropy."""

    mode: Literal["reward", "loss", "none"] = "reward"
    """reward: equations 11 and 12; loss: the penalty of equations 13 and 14; none: neither."""
    scale: NonNegative = 0.4
    """lambda of equation 12."""
    penalty_scale: NonNegative = 0.01
    """Factor of the penalty of equation 14; as in the released code."""
    scope: Literal["best", "all"] = "best"
    """Which samples of a group get the bonus: those that share its best reward, or all."""
    centred: bool = False
    """Subtract the mean bonus of the samples that get one first."""


class KlConfig(Settings):
    """The pull towards the reference."""

    estimator: Literal["k3"] = "k3"
    """exp(d) - d - 1 with d = reference - policy log-probability, per token."""
    a: NonNegative = 0.5
    """Factor of beta is a + b x clip(similarity + 1)."""
    b: NonNegative = 0.5
    """See a."""
    weight_clip: tuple[NonNegative, NonNegative] = (0.0, 1.0)
    """Range of the clip; with (0, 1) the factor is a + b at every similarity >= 0."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        low, high = self.weight_clip
        if low > high:
            raise complaint("weight_clip", f"{low} is above {high}; write the lower bound first")
        return self


class AlgorithmConfig(Settings):
    """The objective."""

    preset: Literal["default", "paper", "release"] = "default"
    """default: ours; paper: its equations read literally; release: the released code, mended."""
    beta: NonNegative = 0.03
    """KL coefficient."""
    clip: float = Field(default=0.2, gt=0, lt=1)
    """epsilon of equation 3."""
    clip_high: Annotated[float, Field(gt=0)] | None = None
    """epsilon of the upper side; null: clip."""
    ratio: Literal["clipped", "unclipped"] = "clipped"
    """Equation 4, or exp(logprob - its detached self) without clip; the same for one update."""
    advantage_eps: Annotated[float, Field(gt=0)] = 1e-4
    """Added to the standard deviation of equation 2."""
    advantage_std_floor: NonNegative = 0.0
    """Least standard deviation in equation 2; above 0 it silences small differences, those of the
    entropy reward among them."""
    reweight: Literal["both", "advantages", "kl", "none"] = "both"
    """What the similarity weighs: advantages (equation 8) and beta, one of them, or nothing."""
    mask_normalization: Literal["group_mean", "none"] = "group_mean"
    """Divide the mask by its group's mean, or take it as it is (the literal equation 3)."""
    self_similarity: Literal[0, 1] | None = None
    """Cosine with which a sample of advantage 0 opposes itself; null: it never does."""
    equal_reward_groups: Literal["keep", "drop_policy", "drop_kl", "drop_all"] = "keep"
    """Which terms leave the loss in groups whose summed rewards are all equal."""
    equal_group_similarity: Annotated[float, Field(ge=-1, le=1)] | None = None
    """Similarity of all tokens in groups without any advantage; null: as computed."""
    logprobs: Literal["conditional", "guided", "guided_detached"] = "conditional"
    """Distribution that is scored: conditional, at temperature 1; or guided, the one that images
    are drawn from, with or without a gradient through its unconditional pass."""
    importance_sampling: Literal["none", "truncated"] = "none"
    """truncated: weigh the policy term by trainer's over sampler's probability of each token."""
    importance_cap: Annotated[float, Field(gt=0)] = 2.0
    """Largest of these weights."""
    logprob_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of log-probabilities and entropies; in bfloat16 a small KL is exactly 0."""
    reference_refresh_every: int = Field(default=0, ge=0)
    """Steps after which the reference becomes the current policy; 0: never."""
    entropy: EntropyConfig = EntropyConfig()
    kl: KlConfig = KlConfig()

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, data: Any) -> Any:
        """Lays the written keys over those of the preset."""
        if not isinstance(data, dict):
            return data
        preset = PRESETS.get(str(data.get("preset")), {})
        nested = {
            key: {**value, **data[key]}
            for key, value in preset.items()
            if isinstance(value, dict) and isinstance(data.get(key), dict)
        }
        return {**preset, **data, **nested}

    @property
    def reweights_advantages(self) -> bool:
        """Whether equation 8 is applied."""
        return self.reweight in ("both", "advantages")

    @property
    def weights_kl(self) -> bool:
        """Whether beta is weighted by similarity."""
        return self.reweight in ("both", "kl")
