"""What a recipe may say, section by section.

The docstring under an attribute is the reference of its key: `stage recipes show` prints it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PrivateAttr,
    ValidationInfo,
    field_validator,
    model_validator,
)

from stage_rl.contradictions import contradictions
from stage_rl.errors import RecipeError
from stage_rl.policies.base import PolicyConfig, resolve_guidance
from stage_rl.prompts.files import PromptsConfig
from stage_rl.rewards.base import RewardConfig
from stage_rl.settings import (
    BUILT_IN,
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    Fraction,
    FunctionName,
    Guidance,
    Seed,
    Settings,
    check_function,
    resolve,
    validation_error,
)


class RolloutConfig(Settings):
    """How a step's images are sampled."""

    prompts_per_step: PositiveInt = 8
    """Prompts of one step."""
    group_size: int = Field(default=8, ge=2)
    """Images per prompt."""
    guidance_scale: Guidance | None = None
    """Unconditional + scale x (conditional - unconditional); 1 needs no unconditional rows; null:
    that of the policy's family."""
    temperature: float = Field(default=1.0, ge=MIN_TEMPERATURE, le=MAX_TEMPERATURE)
    """Divides the guided logits."""
    top_k: NonNegativeInt = 0
    """Draw from the k likeliest tokens; 0: from all, as the policy gradient assumes."""
    top_p: Fraction = 1.0
    """Draw from the likeliest tokens that hold this share; 1: from all."""
    resample_equal_groups: NonNegativeInt = 0
    """Times that a group whose rewards are all equal is drawn again; 0: never."""
    dtype: Literal["float32", "mixed"] = "float32"
    """Precision of the sampler; mixed: bf16 linear layers, the rest in fp32."""
    cache_dtype: Literal["auto", "fp8"] = "auto"
    """Keys and values of the sampler; auto: as the linear layers; fp8: e4m3, a
    scale for each head and position. Half the bytes, and another sampler than the policy: it needs
    algorithm.importance_sampling."""
    max_images: PositiveInt | None = None
    """Images sampled at one time; null: what a GPU has memory for, 64 on a CPU. Any gives the same
    images."""
    release_cache: bool = False
    """Give the memory of the key-value cache back before the other passes of a step, on a GPU that
    cannot hold both."""


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
    """Least standard deviation in equation 2; above 0 it silences small differences, those of the
    entropy reward among them."""
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
    def of_preset(self) -> dict[str, Any]:
        """What the preset sets, by key."""
        return PRESETS[self.preset]

    @property
    def loss_kind(self) -> str:
        """Name of the loss, without parameters."""
        return self.loss if isinstance(self.loss, str) else self.loss["kind"]

    @property
    def exact_kl(self) -> bool:
        """Whether the KL in the loss is summed over the codebook."""
        return self.kl.estimator == "exact"

    def through_weights(self, daw_gradient: str | None) -> bool:
        """Whether `critical` has the gradient through its dynamic weight: as it is told, else with
        the preset `release`.
        """
        return (daw_gradient or ("through" if self.preset == "release" else "")) == "through"

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


Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Settings):
    """The optimizer. Betas and learning rate are the paper's, schedule and clipping as released."""

    kind: Literal["adamw", "adamw_8bit"] = "adamw"
    """Update rule; with weight_decay 0 adamw is Adam. adamw_8bit: 8-bit optimizer states (torchao;
    `[8bit]`)."""
    lr: float = Field(default=5e-6, gt=0, le=1)
    """Learning rate after warm-up; the paper has 5e-6 for GenEval and 1e-6 for other rewards."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of the first and second moment, as in the paper."""
    eps: float = Field(default=1e-8, ge=1e-30)
    """Added to the root of the second moment; that of PyTorch. fp32 has nothing below 1e-38."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""
    schedule: Literal["linear", "constant", "cosine"] = "linear"
    """How the learning rate goes on after warm-up; linear, as released, and cosine end at 0 with
    the last step."""
    warmup_steps: NonNegativeInt = 0
    """Steps over which the learning rate rises from 0."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Norm the gradient is clipped to, 1 as released; null: not clipped."""
    updates_per_rollout: PositiveInt = 1
    """Optimizer updates on one rollout; more than one needs the clipped ratio."""


class TrainingConfig(Settings):
    """Where and in what pieces the gradient is computed."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where there is one."""
    dtype: Literal["float32", "mixed"] = "float32"
    """Compute precision of the trunk; mixed: bf16 linear layers. Parameters stay fp32."""
    groups_per_microbatch: PositiveInt | None = None
    """Most groups that share one backward pass, a matter of memory only; null: all of a step."""
    logprob_rows: PositiveInt = 2048
    """Token rows whose image-head logits exist at one time."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What a decoder layer computes again in the backward pass: selective: all but matmuls
    and attention, full: everything; the gradient is the same."""
    compile: bool = False
    """Compile each decoder layer (torch.compile)."""
    reference: Literal["resident", "streamed"] = "resident"
    """Where the reference's layers are: beside the policy, or in host memory, read layer by layer;
    the numbers are the same. An adapter's reference takes no memory."""
    shard_ranks: Annotated[int, Field(ge=2)] | None = None
    """Of several processes, how many share one copy of parameters and moments, such as those of one
    machine; null: all."""
    profile: NonNegativeInt | None = None
    """Step, from 0, whose trace by torch's profiler is written into the run folder; null: none."""
    memory_gb: PositiveFloat | None = None
    """Memory of the GPU in GB that the run must fit in; null: that of the one it runs on."""


class ProbeConfig(Settings):
    """The fixed reference samples on which exact KL and entropy drift are measured."""

    every: NonNegativeInt = 10
    """Steps between measurements; 0: never."""
    num_prompts: PositiveInt = 8
    """Prompts of the set, the first of the training set."""
    images_per_prompt: PositiveInt = 2
    """Reference samples per prompt."""
    mismatch_images: NonNegativeInt = 2
    """Images of each step on which sampler and trainer are compared under the distribution that is
    not trained, at most a group; 0: none. Under the trained one all images are, at no cost."""


class EvaluationConfig(Settings):
    """What base and trained policy are compared on after the last step."""

    benchmark: str = "shapes-geneval"
    """Name of the benchmark, as `stage eval` takes it: a built-in one, or module:NAME of a
    Suite."""
    data: str | None = None
    """Folder of the published prompt sets, or the benchmark's own; geneval, diversity and
    shapes-geneval need none."""
    scorers: dict[str, dict[str, Any] | None] = Field(default={})
    """Settings of the benchmark's rewards by their names; null leaves a reward out."""
    images_per_task: NonNegativeInt = 100
    """Images per task of the comparison after the last step, spread evenly over the task's
    prompts; 0: none is made."""
    guidance_scale: Guidance | None = None
    """Guidance while evaluating; null: that of the rollout."""
    seed: Seed = 0
    """Seed of the random streams, the same for both policies."""
    every: NonNegativeInt = 0
    """Steps between validations on held-out prompts while training; 0: none. The checkpoint that
    is best by them is kept as RUN@best."""
    validation_images_per_task: PositiveInt = 16
    """Images per task of a validation."""
    validation_seed: Seed = 1
    """Seed of a validation's random streams; another than seed, so that the choice is not judged
    on the images it was made by."""

    @field_validator("benchmark")
    @classmethod
    def _is_known(cls, name: str) -> str:
        """Finds the benchmark, so that a wrong name shows before anything is loaded."""
        if name not in BUILT_IN["benchmark"]:
            try:
                resolve("benchmark", name)
            except RecipeError as error:
                raise validation_error("", str(error)) from error
        return name

    @property
    def data_folder(self) -> Path | None:
        """Where `data` is."""
        return Path(self.data).expanduser() if self.data else None


class RunConfig(Settings):
    """The run folder."""

    dir: str | None = Field(default=None, min_length=1)
    """Folder of the run; null: runs/NAME-HASH8."""
    save_every: NonNegativeInt = 20
    """Steps between checkpoints; 0: only at the end."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints that are kept."""
    log_images_every: NonNegativeInt = 10
    """Steps between image grids with reasons and samples/STEP.npz; 0: never."""
    log_groups: PositiveInt = 2
    """Groups in a grid and in samples/STEP.npz."""
    fixed_prompts: NonNegativeInt = 8
    """Prompts that are drawn whenever images are logged, one image each from the same random
    stream: those of the evaluation, task by task in turn, or of the training; 0: none."""


class LivenessConfig(Settings):
    """Steps in a row with a fault after which a run stops; 0: it never does."""

    equal_reward_steps: NonNegativeInt = 10
    """Every group's rewards are equal."""
    zero_gradient_steps: NonNegativeInt = 3
    """The gradient is exactly 0."""
    constant_reward_steps: NonNegativeInt = 10
    """The summed reward is one and the same number for all images."""
    failed_reward_steps: NonNegativeInt = 3
    """A reward failed and groups were dropped from the step."""


class TripwiresConfig(Settings):
    """Thresholds of a run that goes astray; null: not watched."""

    action: Literal["warn", "stop"] = "warn"
    """What happens when a number stays beyond its threshold: a line on the console, or the end."""
    steps: PositiveInt = 3
    """Steps in a row beyond a threshold before something happens."""
    entropy_gap: PositiveFloat | None = 1.0
    """Largest size of entropy/gap, nats."""
    kl: PositiveFloat | None = 1.0
    """Largest kl/mean, nats."""
    grad_norm: PositiveFloat | None = None
    """Largest grad/norm, before clipping."""
    validation_drop: PositiveFloat | None = None
    """Largest fall of held-out validation below its best; needs evaluation.every."""


CHANGEABLE = (
    *("steps", "run", "evaluation", "liveness", "tripwires", "trackers"),
    *("probe.every", "probe.mismatch_images", "rollout.max_images", "rollout.release_cache"),
    *("training.device", "training.memory_gb", "training.groups_per_microbatch"),
    *("training.logprob_rows", "training.activation_checkpointing", "training.compile"),
    *("training.reference", "training.shard_ranks", "training.profile"),
)
"""Keys, and sections with all of theirs, that change no step but by rounding: a run may go on with
others. Those of the rewards are in their classes."""


@dataclass(frozen=True)
class Origin:
    """What a recipe was read from."""

    source: str = ""
    """A built-in recipe's name or a file; empty for one that was built in Python."""
    overrides: tuple[str, ...] = ()
    """As they were given, dotted.key=value."""
    comment: str = ""
    """The opening comment of the file."""
    references: Mapping[str, str] = field(default_factory=dict)
    """By dotted key the text of what came from the environment, which is written in its place."""


class Recipe(Settings):
    """Everything that decides a run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Name of the run; the file's name where none is given."""
    steps: int = Field(gt=0, le=10_000_000)
    """Training steps; the same run goes on where this is raised."""
    seed: Seed = 0
    """Keys every random stream of the run."""
    policy: PolicyConfig
    """The model."""
    prompts: PromptsConfig
    """The training prompts."""
    rewards: tuple[RewardConfig, ...] = Field(min_length=1)
    """The reward is the weighted sum of these."""
    rollout: RolloutConfig = RolloutConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    probe: ProbeConfig = ProbeConfig()
    evaluation: EvaluationConfig | None = None
    """null: no comparison after the last step."""
    run: RunConfig = RunConfig()
    liveness: LivenessConfig = LivenessConfig()
    tripwires: TripwiresConfig = TripwiresConfig()
    trackers: tuple[str, ...] = ()
    """Where metrics and image grids go besides the run folder: tensorboard, wandb, trackio (extras
    of the same names), or module:Class."""
    _origin: Origin = PrivateAttr(Origin())

    def model_post_init(self, context: Any) -> None:
        """Keeps what the recipe was read from."""
        if isinstance(context, dict):
            self._origin = context.get("origin", Origin())

    @field_validator("trackers")
    @classmethod
    def _are_known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        """Finds trackers of the user's own; a built-in one is not imported."""
        for number, name in enumerate(names):
            if name not in BUILT_IN["tracker"]:
                try:
                    resolve("tracker", name)
                except RecipeError as error:
                    raise validation_error(str(number), str(error)) from error
        return names

    @property
    def origin(self) -> Origin:
        """What the recipe was read from."""
        return self._origin

    def may_change(self, key: str) -> bool:
        """Whether a run may go on with another value of a dotted key."""
        section, _, rest = key.partition(".")
        if section == "rewards":
            number, _, name = rest.partition(".")
            return int(number) < len(self.rewards) and name in self.rewards[int(number)].changeable
        return any(key == known or key.startswith(f"{known}.") for known in CHANGEABLE)

    @property
    def guidance_scale(self) -> float:
        """That of the rollout: the family's where the recipe names none."""
        return resolve_guidance(self.policy.policy_class, self.rollout.guidance_scale)

    @model_validator(mode="after")
    def _agree(self) -> Self:
        """Refuses settings that contradict each other."""
        for key, text in contradictions(self):
            raise validation_error(key, text)
        return self
