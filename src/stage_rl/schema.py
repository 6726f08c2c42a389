"""What a recipe may say: the component families and the typed tree.

Free of torch, so that a wrong recipe is answered at once. The docstring under an attribute is the
reference of its key: `stage recipes show` prints it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, PrivateAttr, model_validator

from stage_rl import registry
from stage_rl.health import EvaluationConfig, LivenessConfig, ProbeConfig, TripwiresConfig
from stage_rl.objective import AlgorithmConfig
from stage_rl.settings import (
    Component,
    Count,
    Every,
    Fraction,
    NonNegative,
    Positive,
    Seed,
    Settings,
    complaint,
)
from stage_rl.types import Prompt

if TYPE_CHECKING:
    import torch

    from stage_rl.policies.base import Policy
    from stage_rl.rewards.base import Detector, Reward
    from stage_rl.rewards.selftest import ReferenceCase

TAKEN_NAMES = ("mean", "std", "equal_groups", "failed_groups")
"""Metrics of the summed reward, beside which each reward's own is logged."""


class PolicyConfig(Component):
    """Base of the model families."""

    family: ClassVar[str] = "policy"

    trainable: tuple[str, ...] = ("*",)
    """Name patterns of the parameters that train, in the spelling of `fnmatch`."""

    @abstractmethod
    def build(self, device: torch.device) -> Policy:
        """The policy with its weights on a device."""


class PromptsConfig(Component):
    """Base of the prompt sets."""

    family: ClassVar[str] = "prompts"

    @abstractmethod
    def build(self) -> tuple[Prompt, ...]:
        """The prompts in their own order; the trainer draws from them by seed."""


class DetectorConfig(Component):
    """Base of the object detectors that a reward can be given."""

    family: ClassVar[str] = "detector"

    @abstractmethod
    def build(self, device: torch.device) -> Detector:
        """The detector with its weights on a device."""

    def objection(self, prompt: Prompt) -> str | None:
        """Why this detector cannot find what a prompt asks for; None: it can."""
        return None

    def reference_cases(self) -> tuple[ReferenceCase, ...]:
        """Image pairs that the GenEval rules must order with this detector; none by default."""
        return ()


class RewardConfig(Component):
    """Base of the rewards."""

    family: ClassVar[str] = "reward"
    required_fields: ClassVar[tuple[str, ...]] = ()
    """Metadata a prompt must carry to be judged."""
    whole_groups: ClassVar[bool] = False
    """A call must hold all images of a prompt, and none of another group of that prompt."""

    name: str = Field(default="", pattern=r"^[A-Za-z0-9_.-]+$")
    """Column of this reward in metrics and reports; the kind where none is given."""
    weight: float = 1.0
    """Factor of the score in the summed reward; 0 only logs it."""
    self_test: bool = True
    """Score reference images of known order before the first step; false: train without."""

    @model_validator(mode="before")
    @classmethod
    def _name_after_kind(cls, data: Any) -> Any:
        if isinstance(data, dict) and not data.get("name"):
            kind = registry.name_of(cls.family, cls)
            return {**data, "name": kind.rpartition(":")[2]}
        return data

    def objection(self, prompt: Prompt) -> str | None:
        """Why this reward cannot judge a prompt, in words that follow its name; None: it can."""
        missing = [field for field in self.required_fields if field not in prompt.metadata]
        return f"needs '{missing[0]}', which this prompt lacks" if missing else None

    @abstractmethod
    def build(self, device: torch.device) -> Reward:
        """The reward with its weights on a device."""

    def reference_cases(self) -> tuple[ReferenceCase, ...]:
        """Image pairs of known order for the self-test; none: the reward has no self-test."""
        return ()


class RolloutConfig(Settings):
    """How a step's images are sampled."""

    prompts_per_step: Count = 8
    """Prompts of one step."""
    group_size: int = Field(default=8, ge=2)
    """Images per prompt."""
    guidance_scale: NonNegative = 5.0
    """Unconditional + scale x (conditional - unconditional); 1 needs no unconditional rows."""
    temperature: Positive = 1.0
    """Divides the guided logits."""
    top_k: Every = 0
    """Draw from the k likeliest tokens; 0: from all, as the policy gradient assumes."""
    top_p: Fraction = 1.0
    """Draw from the likeliest tokens that hold this share; 1: from all."""
    resample_equal_groups: Every = 0
    """Times that a group whose rewards are all equal is drawn again; 0: never."""
    dtype: Literal["float32", "mixed"] = "float32"
    """Precision of the sampler; mixed: bf16 linear layers, the rest in fp32."""
    max_images: Count | None = None
    """Images sampled at one time; null: what a GPU has memory for, 64 on a CPU. Any gives the same
    images."""
    release_cache: bool = False
    """Give the memory of the key-value cache back before the other passes of a step, on a GPU that
    cannot hold both."""


class OptimizerConfig(Settings):
    """The optimizer and its schedule; the defaults are those of the paper."""

    kind: Literal["adamw", "adamw_8bit"] = "adamw"
    """Update rule; with weight_decay 0 this is the paper's Adam. adamw_8bit: both moments in 8 bits
    (torchao; `[8bit]`)."""
    lr: Positive = 5e-6
    """Learning rate after warm-up."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.999,
    )
    """Decay of the first and second moment."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay."""
    schedule: Literal["linear", "constant", "cosine"] = "linear"
    """Course of the learning rate after warm-up; linear and cosine end at 0 with the last step."""
    warmup_steps: Every = 0
    """Steps over which the learning rate rises from 0."""
    max_grad_norm: Positive | None = 1.0
    """Norm the gradient is clipped to; null: not clipped."""
    updates_per_rollout: Count = 1
    """Optimizer updates on one rollout; more than one needs the clipped ratio."""


class TrainingConfig(Settings):
    """Where and in what pieces the gradient is computed."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where there is one."""
    dtype: Literal["float32", "mixed"] = "float32"
    """Compute precision of the trunk; mixed: bf16 linear layers. Parameters stay fp32."""
    groups_per_microbatch: Count | None = None
    """Most groups that share one backward pass, a matter of memory only; null: all of a step."""
    logprob_rows: Count = 2048
    """Token rows whose image-head logits exist at one time."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What a decoder layer computes again in the backward pass: selective: all but products of
    matrices and attention, full: everything; the gradient is the same."""
    compile: bool = False
    """Compile each decoder layer (torch.compile)."""
    reference: Literal["resident", "streamed"] = "resident"
    """Where the reference's layers are: beside the policy, or in host memory, read layer by layer;
    the numbers are the same. An adapter's reference takes no memory."""
    memory_gb: Positive | None = None
    """Memory of the GPU in GB that the run must fit in; null: that of the one it runs on."""


class RunConfig(Settings):
    """The run folder."""

    dir: str | None = None
    """Folder of the run; null: runs/NAME-HASH8."""
    save_every: Every = 20
    """Steps between checkpoints; 0: only at the end."""
    keep_checkpoints: Count = 2
    """Newest checkpoints that are kept."""
    log_images_every: Every = 10
    """Steps between image grids with reasons and samples/STEP.npz; 0: never."""
    log_groups: Count = 2
    """Groups in a grid and in samples/STEP.npz."""


class Recipe(Settings):
    """Everything that decides a run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Name of the run; the file's name where none is given."""
    steps: Count
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
    _given: str = PrivateAttr("")

    def model_post_init(self, context: Any) -> None:
        """Keeps the text the recipe was read from."""
        if isinstance(context, dict):
            self._given = context.get("given", "")

    @property
    def given(self) -> str:
        """The file as it was read, with the overrides as comments; empty where built in Python."""
        return self._given

    @model_validator(mode="after")
    def _agree(self) -> Self:
        """Refuses settings that contradict each other."""
        for name, count in Counter(reward.name for reward in self.rewards).items():
            if count > 1:
                text = f"{count} rewards are named '{name}'; give each its own name"
                raise complaint("rewards", text)
            if name in TAKEN_NAMES:
                text = f"'{name}' is a metric of the summed reward; give the reward another name"
                raise complaint("rewards", text)
        if self.optimizer.updates_per_rollout > 1 and self.algorithm.ratio == "unclipped":
            text = "unclipped is for one update per rollout; write clipped, or "
            raise complaint("algorithm.ratio", f"{text}optimizer.updates_per_rollout=1")
        self._check_scoring()
        self._check_panel()
        if self.optimizer.warmup_steps > self.steps:
            text = f"{self.optimizer.warmup_steps} is more than steps ({self.steps}); write fewer"
            raise complaint("optimizer.warmup_steps", text)
        return self

    def _check_scoring(self) -> None:
        """The guided forms score by rollout.guidance_scale and temperature; no form truncates."""
        if self.algorithm.logprobs == "conditional":
            return
        for key, off in (("top_k", 0), ("top_p", 1)):
            if getattr(self.rollout, key) != off:
                text = f"guided log-probabilities are those of the whole distribution; write {off},"
                raise complaint(f"rollout.{key}", f"{text} or algorithm.logprobs=conditional")

    def _check_panel(self) -> None:
        evaluation = self.evaluation
        if self.tripwires.panel_drop is not None and not (evaluation and evaluation.every):
            text = "needs a panel while training; write evaluation.every, or null here"
            raise complaint("tripwires.panel_drop", text)
        if evaluation and evaluation.every and evaluation.panel_seed == evaluation.seed:
            text = "is evaluation.seed too, so the best checkpoint would be judged on the images it"
            raise complaint("evaluation.panel_seed", f"{text} was chosen by; write another")
