"""What a recipe may say, section by section.

The docstring under an attribute is the reference of its key: `stage recipes show` prints it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
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
    field_validator,
    model_validator,
)

from stage_rl.algorithm_config import LIKE_CLIP, AlgorithmConfig, idle_settings
from stage_rl.errors import RecipeError
from stage_rl.policies.base import PolicyConfig, resolve_guidance
from stage_rl.prompts.files import PromptsConfig
from stage_rl.rewards.base import RewardConfig
from stage_rl.settings import (
    BUILT_IN,
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    Fraction,
    Guidance,
    Seed,
    Settings,
    did_you_mean,
    needs_of,
    refusals_of,
    resolve,
    resolve_function,
    validation_error,
)


class RolloutConfig(Settings):
    """How a step's images are sampled."""

    prompts_per_step: int = Field(default=8, ge=1, le=10_000)
    """Prompts of one step."""
    group_size: int = Field(default=8, ge=2, le=10_000)
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
    """Compile each decoder layer (torch.compile), which on a CPU takes a C++ compiler."""
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
    num_prompts: int = Field(default=8, ge=1, le=10_000)
    """Prompts of the set, the first of the training set."""
    images_per_prompt: int = Field(default=2, ge=1, le=10_000)
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
    images_per_task: int = Field(default=100, ge=0, le=100_000)
    """Images per task of the comparison after the last step, spread evenly over the task's
    prompts; 0: none is made."""
    guidance_scale: Guidance | None = None
    """Guidance while evaluating; null: that of the rollout."""
    top_k: NonNegativeInt | None = None
    """Draw from so many likeliest tokens while evaluating, 0: from all; null: as the rollout."""
    seed: Seed = 0
    """Seed of the random streams, the same for both policies."""
    every: NonNegativeInt = 0
    """Steps between validations on held-out prompts while training; 0: none. The checkpoint that
    is best by them is kept as RUN@best."""
    validation_images_per_task: int = Field(default=16, ge=1, le=100_000)
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
    fixed_prompts: int = Field(default=8, ge=0, le=10_000)
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

    @property
    def notes(self) -> list[str]:
        """What makes sense, but may not be what its author expects."""
        loss, once = self.algorithm.loss_kind, self.optimizer.updates_per_rollout == 1
        if loss not in LIKE_CLIP or not once:
            return []
        return [
            f"algorithm.loss: with one update per rollout {loss} has the gradient of clip; write "
            "optimizer.updates_per_rollout=2 or more to tell them apart"
        ]

    @model_validator(mode="after")
    def _agree(self) -> Self:
        """Refuses settings that contradict each other."""
        for key, text in self._contradictions():
            raise validation_error(key, text)
        return self

    def _contradictions(self) -> Iterator[tuple[str, str]]:
        """Keys, and what is wrong with them."""
        for name, count in Counter(reward.name for reward in self.rewards).items():
            if count > 1:
                yield "rewards", f"{count} rewards are named '{name}'; give each its own name"
            if name in ("mean", "std", "equal_groups", "failed_groups"):
                text = f"'{name}' is a metric of the summed reward; give the reward another name"
                yield "rewards", text
        for key, text in idle_settings(self.algorithm):
            yield f"algorithm.{key}", text
        yield from self._contradictions_of_the_functions()
        yield from self._contradictions_of_the_kl()
        yield from self._contradictions_of_the_sampler()
        if self.algorithm.logprobs != "conditional":
            for key, off in (("top_k", 0), ("top_p", 1)):
                if getattr(self.rollout, key) != off:
                    text = "guided log-probabilities are those of the whole distribution; write "
                    yield f"rollout.{key}", f"{text}{off}, or algorithm.logprobs=conditional"
        yield from self._contradictions_of_the_rewards()
        evaluation = self.evaluation
        if not self.policy.policy_class.guided:
            text = f"the policy {self.policy.kind} has no unconditional rows; write 1"
            if self.rollout.guidance_scale not in (None, 1):
                yield "rollout.guidance_scale", text
            if evaluation and evaluation.guidance_scale not in (None, 1):
                yield "evaluation.guidance_scale", text
            needed = needs_of(resolve_function("credit", self.algorithm.credit))
            if {"unconditional", "exact_guidance"} & {*needed}:
                text = "needs unconditional rows, and the policy has none; write another credit"
                yield "algorithm.credit", text
        if self.tripwires.validation_drop is not None and not (evaluation and evaluation.every):
            text = "needs validation while training; write evaluation.every, or null here"
            yield "tripwires.validation_drop", text
        if evaluation and evaluation.every and evaluation.validation_seed == evaluation.seed:
            text = "is evaluation.seed too, so the best checkpoint would be judged on the images it"
            yield "evaluation.validation_seed", f"{text} was chosen by; write another"
        if self.optimizer.warmup_steps > self.steps:
            text = f"{self.optimizer.warmup_steps} is more than steps ({self.steps}); write at "
            text += f"most {self.steps}, or more steps"
            yield "optimizer.warmup_steps", text

    def _contradictions_of_the_sampler(self) -> Iterator[tuple[str, str]]:
        if self.rollout.cache_dtype == "fp8" and self.algorithm.importance_sampling == "none":
            text = "fp8 draws from another distribution than the policy's; write auto, or "
            yield "rollout.cache_dtype", f"{text}algorithm.importance_sampling=token_truncate"

    def _contradictions_of_the_functions(self) -> Iterator[tuple[str, str]]:
        """What the functions of credit and loss refuse themselves, and what several share."""
        settings, num_updates = self.algorithm, self.optimizer.updates_per_rollout
        for family in ("credit", "loss"):
            function = resolve_function(family, getattr(settings, family))
            for key, text in refusals_of(function, settings, num_updates):
                yield f"algorithm.{key}", text
        low, high = settings.clip_range
        if settings.loss_kind in ("clip", "dr_grpo", "cispo") and high < low:
            text = f"{high} is below algorithm.clip ({low}); write a larger one"
            yield "algorithm.clip_high", text
        if settings.importance_floor > settings.importance_cap:
            text = f"{settings.importance_floor} is above importance_cap; write a lower one"
            yield "algorithm.importance_floor", text

    def _contradictions_of_the_kl(self) -> Iterator[tuple[str, str]]:
        settings, rollout = self.algorithm, self.rollout
        if settings.exact_kl and settings.beta == 0:
            text = "exact takes memory and time, and algorithm.beta is 0; write k3"
            yield "algorithm.kl.estimator", text
        unguided = (self.guidance_scale, rollout.temperature) == (1, 1)
        whole = (rollout.top_k, rollout.top_p) == (0, 1)
        own_samples = settings.logprobs != "conditional" or (unguided and whole)
        once = self.optimizer.updates_per_rollout == 1
        if settings.kl.estimator == "k1" and settings.beta and own_samples and once:
            text = "k1 pulls nowhere on samples of the policy that is scored; write k2, k3 or k3+"
            yield "algorithm.kl.estimator", text

    def _contradictions_of_the_rewards(self) -> Iterator[tuple[str, str]]:
        settings, names = self.algorithm, [reward.name for reward in self.rewards]
        if settings.advantage == "gdpo" and settings.loss_kind == "dr_grpo":
            text = "gdpo divides by deviations, which dr_grpo leaves out; write sum, or loss=clip"
            yield "algorithm.advantage", text
        elif (
            settings.advantage == "gdpo" and sum(reward.weight != 0 for reward in self.rewards) < 2
        ):
            text = "gdpo is sum with a single reward; write sum, or a second reward"
            yield "algorithm.advantage", text
        for number, reward in enumerate(self.rewards):
            others = [name for name in names if name != reward.name]
            if reward.requires and reward.requires.reward not in others:
                hint = did_you_mean(reward.requires.reward, others)
                text = f"no other reward is named '{reward.requires.reward}'; {hint}"
                yield f"rewards.{number}.requires.reward", text
