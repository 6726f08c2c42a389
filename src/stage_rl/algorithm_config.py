"""The settings of the objective: presets, the sections of `algorithm`, and which of them have no
effect beside others.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    ValidationInfo,
    field_validator,
    model_validator,
)

from stage_rl.settings import (
    BUILT_IN,
    FunctionName,
    Settings,
    check_function,
    validation_error,
)

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "mask_normalization": "none",
        "self_similarity": 1,
    },
    "release": {
        "self_similarity": 0,
        "equal_group_similarity": 1.0,
        "loss": "unclipped",
        "logprob_dtype": "bfloat16",
        "entropy": {"centred": True},
    },
}
"""What a preset of the objective changes; the defaults of the classes are `default`."""


class EntropyConfig(Settings):
    """How the policy is held to the reference's entropy."""

    mode: Literal["reward", "constant", "loss", "none"] = "reward"
    """reward: equations 11 and 12; constant: equation 12 with R_ent = 1 whatever the entropy, a
    control of the former; loss: the penalty of equations 13 and 14; none: nothing."""
    scale: NonNegativeFloat = 0.4
    """lambda of equation 12."""
    penalty_scale: NonNegativeFloat = 0.01
    """Factor of the penalty of equation 14; as in the released code."""
    scope: Literal["best", "all"] = "best"
    """Which samples of a group get the bonus: those that share its best reward, or all."""
    centred: bool = False
    """Subtract the mean bonus of the samples that get one first."""


class KlConfig(Settings):
    """Pull towards the reference."""

    estimator: Literal["k1", "k2", "k3", "k3+", "rk3", "exact"] = "k3"
    """Of the KL, by the sampled token, d = reference - policy log-probability: k1: -d, which pulls
    nowhere on average; k2: d^2 / 2; k3: exp(d) - d - 1; k3+: k3 with the gradient of k2; rk3: k3
    times the ratio to the old policy; exact: the sum over the codebook, which keeps the reference's
    states and reads three more arrays of logits."""
    a: NonNegativeFloat = 0.5
    """Factor of beta is a + b x clip(similarity + 1)."""
    b: NonNegativeFloat = 0.5
    """See a."""
    weight_clip: tuple[NonNegativeFloat, NonNegativeFloat] = (0.0, 1.0)
    """Range of the clip; with (0, 1) the factor is a + b at every similarity >= 0."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        low, high = self.weight_clip
        if low > high:
            raise validation_error(
                "weight_clip", f"{low} is above {high}; write the lower bound first"
            )
        return self


class AlgorithmConfig(Settings):
    """The objective."""

    preset: Literal["default", "paper", "release"] = "default"
    """default: ours; paper: its equations read literally; release: the released code, fixed."""
    beta: NonNegativeFloat = 0.03
    """KL coefficient."""
    clip: float = Field(default=0.2, gt=0, lt=1)
    """epsilon of equation 3."""
    clip_high: PositiveFloat | None = None
    """epsilon of the upper side; null: clip."""
    advantage: Literal["sum", "gdpo"] = "sum"
    """Of several rewards: sum: that of their weighted sum; gdpo: each is normalized within the
    group, then weighted and added, so that its say is its weight, whatever its spread."""
    whiten: Literal["batch", "none"] = "batch"
    """With gdpo: divide by the standard deviation over all images of the step, or leave it."""
    advantage_eps: PositiveFloat = 1e-4
    """Added to the standard deviation of equation 2."""
    advantage_std_floor: NonNegativeFloat = 0.0
    """Least standard deviation in equation 2, with gdpo of each reward and of the entropy bonus;
    above 0 it silences small differences, those of the entropy reward among them."""
    credit: FunctionName = "stage"
    """What each token's advantage and beta are weighted by: stage, its similarity, as reweight,
    mask_normalization, self_similarity, equal_group_similarity and kl say; uniform, nothing;
    critical, guidance, entropy_bonus, high_entropy: rules of other papers; or module:function. With
    parameters of its own: {kind: NAME, PARAMETER: VALUE}."""
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
    loss: FunctionName = "clip"
    """The policy loss: clip, equation 3; unclipped, without its clip, for one update per rollout;
    gspo, gspo_token, gmpo, cispo, sapo, dr_grpo; or module:function. With parameters like credit.
    """
    logprobs: Literal["conditional", "guided", "guided_detached"] = "conditional"
    """Distribution that is scored: conditional, at temperature 1; or guided, the one that images
    are drawn from, with or without a gradient through its unconditional pass."""
    importance_sampling: Literal[
        "none",
        "token_truncate",
        "token_mask",
        "sequence_truncate",
        "sequence_mask",
        "geometric_mask",
    ] = "none"
    """Weigh the policy term by the trainer's over the sampler's probability of each token or of an
    image, or by 1 where the geometric mean of its tokens' will do: truncate: at most
    importance_cap; mask: 0 outside of [importance_floor, importance_cap]."""
    importance_cap: PositiveFloat = 2.0
    """Largest of these weights."""
    importance_floor: NonNegativeFloat = 0.5
    """Smallest that a mask keeps."""
    logprob_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of log-probabilities and entropies; in bfloat16 a small KL is exactly 0."""
    reference_refresh_every: NonNegativeInt = 0
    """Steps after which the reference becomes the current policy; 0: never."""
    entropy: EntropyConfig = EntropyConfig()
    kl: KlConfig = KlConfig()

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, data: Any) -> Any:
        """Lays the written keys over those of the preset."""
        if not isinstance(data, dict):
            return data
        data = _of_former_version(data)
        preset = PRESETS.get(str(data.get("preset")), {})
        merged = preset | data
        for section in ("entropy", "kl"):
            if isinstance(data.get(section), dict):
                merged[section] = preset.get(section, {}) | data[section]
        return merged

    @field_validator("credit", "loss", mode="before")
    @classmethod
    def _is_known(cls, name: Any, info: ValidationInfo) -> FunctionName:
        """Finds the function, so that what is wrong with it shows before anything is loaded."""
        return check_function(str(info.field_name), name)

    @property
    def loss_kind(self) -> str:
        """Name of the loss, without parameters."""
        return self.loss if isinstance(self.loss, str) else self.loss["kind"]

    @property
    def clip_range(self) -> tuple[float, float]:
        """How far the ratio may go below and above 1."""
        return self.clip, self.clip if self.clip_high is None else self.clip_high

    @property
    def exact_kl(self) -> bool:
        """Whether the KL in the loss is summed over the codebook."""
        return self.kl.estimator == "exact"

    @property
    def one_advantage_per_image(self) -> bool:
        """Whether all tokens of an image have one advantage, by a built-in rule of credit."""
        return self.credit == "uniform" or (
            self.credit == "stage" and not self.reweights_advantages
        )

    @property
    def reweights_advantages(self) -> bool:
        """Whether equation 8 is applied."""
        return self.reweight in ("both", "advantages")

    @property
    def weights_kl(self) -> bool:
        """Whether beta is weighted by similarity."""
        return self.reweight in ("both", "kl")


def _of_former_version(data: dict[str, Any]) -> dict[str, Any]:
    """Recipes of former versions call the losses grpo by `ratio`, and one kind of weight another
    name.
    """
    data = dict(data)
    if "ratio" in data and data.get("loss", "grpo") == "grpo":
        data["loss"] = {"clipped": "clip"}.get(data["ratio"], data["ratio"])
    data.pop("ratio", None)
    if data.get("loss") == "grpo":
        data["loss"] = "clip"
    if data.get("importance_sampling") == "truncated":
        data["importance_sampling"] = "token_truncate"
    return data


class Idle(NamedTuple):
    """Keys of the objective without effect where another key has one of some values."""

    keys: tuple[str, ...]
    other: str
    values: tuple[str, ...]
    instead: str = ""
    """What to write; empty: the default."""


IDLE = (
    Idle(
        (
            *("reweight", "mask_normalization", "self_similarity", "equal_group_similarity"),
            *("kl.a", "kl.b", "kl.weight_clip"),
        ),
        "credit",
        tuple(name for name in BUILT_IN["credit"] if name != "stage"),
    ),
    Idle(("mask_normalization",), "reweight", ("kl",)),
    Idle(("kl.a", "kl.b", "kl.weight_clip"), "reweight", ("advantages",)),
    Idle(("clip", "clip_high"), "loss", ("unclipped", "gspo", "gspo_token", "gmpo", "sapo")),
    Idle(("advantage_eps", "advantage_std_floor"), "loss", ("dr_grpo",)),
    Idle(("importance_cap",), "importance_sampling", ("none",)),
    Idle(
        ("importance_floor",),
        "importance_sampling",
        ("none", "token_truncate", "sequence_truncate"),
    ),
    Idle(("whiten",), "advantage", ("sum",)),
    Idle(("entropy.scale",), "entropy.mode", ("loss",), "penalty_scale"),
    Idle(("entropy.scope", "entropy.centred"), "entropy.mode", ("loss",)),
    Idle(("entropy.penalty_scale",), "entropy.mode", ("reward", "constant"), "scale"),
)
"""Who writes one of these believes that it changes something: it is refused. Not where another key
switches the whole off, as an ablation does (`entropy.mode: none`, `reweight: none`, `beta: 0`)."""


LIKE_CLIP = ("gspo", "gspo_token", "gmpo", "cispo", "sapo")
"""Losses with the gradient of `clip` in the only update on a rollout."""


def idle_settings(settings: AlgorithmConfig) -> Iterator[tuple[str, str]]:
    """Keys of the objective that were changed to no effect, and what to write instead."""
    preset = PRESETS[settings.preset]
    for rule in IDLE:
        other = _value(settings, rule.other)
        for key in rule.keys if other in rule.values else ():
            section, _, name = key.rpartition(".")
            owner = getattr(settings, section) if section else settings
            default = type(owner).model_fields[name].default
            of_preset = preset.get(section, {}) if section else preset
            value = getattr(owner, name)
            # A recipe that is written out in full has the values of its preset.
            if value in (default, of_preset.get(name, default)):
                continue
            if key == "reweight" and value == "none":
                continue
            instead = rule.instead or (default if isinstance(default, str) else json.dumps(default))
            yield key, f"has no effect with {rule.other}: {other}; write {instead}"


def _value(settings: AlgorithmConfig, key: str) -> Any:
    """By its dotted key; of a function its name."""
    section, _, name = key.rpartition(".")
    value = getattr(getattr(settings, section) if section else settings, name)
    return value["kind"] if isinstance(value, dict) else value
