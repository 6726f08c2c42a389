"""The base of every settings class, and the mechanism that lets a recipe name a component.

A component is one frozen settings class with a `build` method, and the object it builds. Where a
recipe expects a family (policy, prompts, reward, detector) it writes a mapping with a `kind`, a
built-in name or `module:Class`; the class behind the kind validates the rest of the mapping.

Token credit and loss are functions instead: a name, or a mapping of a `kind` and keyword arguments.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial, update_wrapper
from typing import Annotated, Any, ClassVar, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    computed_field,
    create_model,
    model_validator,
)
from pydantic_core import PydanticCustomError

from stage_rl.errors import RecipeError

Fraction = Annotated[float, Field(gt=0, le=1)]

MAX_GUIDANCE, MIN_TEMPERATURE, MAX_TEMPERATURE = 1e4, 1e-4, 1e4
"""Beyond them the guided logits leave what fp32 holds, or say nothing any more."""

Guidance = Annotated[float, Field(ge=0, le=MAX_GUIDANCE)]

Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]


def did_you_mean(name: str, known: Iterable[str], *, other: str | None = None) -> str:
    """What to write instead of a wrong name: the near one, else the allowed ones and `other`."""
    names = list(known)
    if not names:
        return "none is allowed here"
    near = difflib.get_close_matches(name, names, n=1) or [
        n for n in names if name and n.startswith(name)
    ]
    allowed = ", ".join(names if other is None else [*names, other])
    return f"did you mean '{near[0]}'?" if near else f"write one of: {allowed}"


def validation_error(key: str, text: str) -> PydanticCustomError:
    """A validation error about `key` (relative, dotted) of the mapping that is being read."""
    return PydanticCustomError("stage", "{text}", {"text": text, "key": key})


class Settings(BaseModel):
    """A frozen, strict mapping: an unknown key, a wrong type, NaN and infinity are errors."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        validate_default=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        polymorphic_serialization=True,
    )

    @model_validator(mode="before")
    @classmethod
    def _read_mapping(cls, data: Any) -> Any:
        """Refuses unknown keys; sequences become tuples, which strict YAML and JSON lack."""
        if not isinstance(data, dict):
            return data
        for key in data:
            if key not in cls.model_fields:
                hint = did_you_mean(str(key), cls.model_fields)
                raise validation_error(str(key), f"unknown key; {hint}")
        return {k: _read(v, cls.model_fields[k].annotation) for k, v in data.items()}


def _read(value: Any, annotation: Any) -> Any:
    """A list as a tuple; 1e30 as the whole number that it is: what is wrong with it is its size."""
    if annotation is int and isinstance(value, float) and 2**53 < abs(value) < math.inf:
        return int(value)
    return tuple(value) if isinstance(value, list) else value


class Component(Settings):
    """A settings class that a recipe names by `kind`; a base of a family sets `family`."""

    family: ClassVar[str]

    @computed_field
    @property
    def kind(self) -> str:
        """The built-in name of this class, else module:Class."""
        return name_of(self.family, type(self))

    @model_validator(mode="wrap")
    @classmethod
    def _pick_class(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """On the base of a family, hands the mapping to the class behind its kind."""
        if "family" not in vars(cls) or not isinstance(data, dict):
            return handler(data)
        fields = dict(data)
        kind = fields.pop("kind", None)
        if not isinstance(kind, str):
            hint = did_you_mean("", BUILT_IN[cls.family], other="or module:Class")
            raise validation_error("kind", f"is required; {hint}")
        try:
            picked = resolve(cls.family, kind)
        except RecipeError as error:
            raise validation_error("kind", str(error)) from error
        if not (isinstance(picked, type) and issubclass(picked, cls)):
            raise validation_error(
                "kind", f"'{kind}' is not a {cls.__name__}; name a subclass of it"
            )
        return picked.model_validate(fields)


BUILT_IN = {
    "policy": {
        "janus": "stage_rl.policies.janus:JanusConfig",
        "llamagen": "stage_rl.policies.llamagen:LlamaGenConfig",
        "emu3": "stage_rl.policies.emu3:Emu3Config",
    },
    "prompts": {
        "geneval": "stage_rl.prompts.geneval:GenEvalPromptsConfig",
        "t2i_r1": "stage_rl.prompts.sets:T2IR1PromptsConfig",
        "t2i_compbench": "stage_rl.prompts.sets:T2ICompBenchPromptsConfig",
        "ocr": "stage_rl.prompts.sets:OcrPromptsConfig",
        "drawbench": "stage_rl.prompts.sets:DrawBenchPromptsConfig",
        "hps": "stage_rl.prompts.sets:HpsPromptsConfig",
        "file": "stage_rl.prompts.sets:FilePromptsConfig",
        "questions": "stage_rl.prompts.questions:QuestionsPromptsConfig",
        "shapes": "stage_rl.shapes.prompts:ShapesPromptsConfig",
    },
    "reward": {
        "geneval": "stage_rl.rewards.geneval:GenEvalRewardConfig",
        "hps": "stage_rl.rewards.clip:HpsConfig",
        "pickscore": "stage_rl.rewards.clip:PickScoreConfig",
        "clip_score": "stage_rl.rewards.clip:ClipScoreConfig",
        "image_reward": "stage_rl.rewards.image_reward:ImageRewardConfig",
        "aesthetic": "stage_rl.rewards.clip:AestheticConfig",
        "grounding_dino": "stage_rl.rewards.t2i_r1:GroundingDinoRewardConfig",
        "git": "stage_rl.rewards.vqa:GitRewardConfig",
        "yes_no": "stage_rl.rewards.vlm.yes_no:YesNoRewardConfig",
        "judge": "stage_rl.rewards.vlm.judge:JudgeRewardConfig",
        "vqa_score": "stage_rl.rewards.vlm.vqa_score:VqaScoreConfig",
        "hps_v3": "stage_rl.rewards.vlm.hps_v3:HpsV3Config",
        "unified_reward": "stage_rl.rewards.vlm.unified_reward:UnifiedRewardConfig",
        "q_sit": "stage_rl.rewards.vlm.q_sit:QSitConfig",
        "aesthetic_v2_5": "stage_rl.rewards.aesthetic_v2_5:AestheticV25Config",
        "ocr": "stage_rl.rewards.ocr:OcrRewardConfig",
        "external": "stage_rl.rewards.external:ExternalRewardConfig",
        "remote": "stage_rl.rewards.remote:RemoteRewardConfig",
        "compbench_attributes": "stage_rl.rewards.compbench:AttributesConfig",
        "compbench_spatial": "stage_rl.rewards.compbench:PlaneConfig",
        "compbench_depth": "stage_rl.rewards.compbench:DepthConfig",
        "compbench_numeracy": "stage_rl.rewards.compbench:NumeracyConfig",
        "variety": "stage_rl.rewards.clip:VarietyConfig",
    },
    "detector": {
        "shapes": "stage_rl.shapes.detector:ShapesDetectorConfig",
        "mask2former": "stage_rl.rewards.detectors.mask2former:Mask2FormerConfig",
        "grounding_dino": "stage_rl.rewards.detectors.grounding_dino:GroundingDinoDetectorConfig",
    },
    # Functions and objects, not settings classes.
    "credit": {
        "stage": "stage_rl.objective.stage:stage",
        "uniform": "stage_rl.objective.stage:uniform",
        "critical": "stage_rl.objective.critical:critical",
        "guidance": "stage_rl.objective.guidance:guidance",
        "entropy_bonus": "stage_rl.objective.entropy:entropy_bonus",
        "high_entropy": "stage_rl.objective.entropy:high_entropy",
    },
    "loss": {
        name: f"stage_rl.objective.loss:{name}"
        for name in ["clip", "unclipped", "gspo", "gspo_token", "gmpo", "cispo", "sapo", "dr_grpo"]
    },
    "tracker": {
        "tensorboard": "stage_rl.training.trackers:TensorBoard",
        "wandb": "stage_rl.training.trackers:Wandb",
        "trackio": "stage_rl.training.trackers:Trackio",
    },
    "benchmark": {
        "geneval": "stage_rl.evaluation.suites:GENEVAL",
        "t2i-compbench": "stage_rl.evaluation.suites:T2I_COMPBENCH",
        "hps": "stage_rl.evaluation.suites:HPS",
        "drawbench": "stage_rl.evaluation.suites:DRAWBENCH",
        "ocr": "stage_rl.evaluation.suites:OCR",
        "diversity": "stage_rl.evaluation.suites:DIVERSITY",
        "geneval2": "stage_rl.evaluation.judged:GENEVAL2",
        "dpg": "stage_rl.evaluation.judged:DPG",
        "wise": "stage_rl.evaluation.judged:WISE",
        "oneig-alignment": "stage_rl.evaluation.judged:ONEIG_ALIGNMENT",
        "oneig-text": "stage_rl.evaluation.judged:ONEIG_TEXT",
        "longtext": "stage_rl.evaluation.judged:LONGTEXT",
        "cvtg": "stage_rl.evaluation.judged:CVTG",
        "unigenbench": "stage_rl.evaluation.judged:UNIGENBENCH",
        "tiif": "stage_rl.evaluation.judged:TIIF",
        "shapes-geneval": "stage_rl.shapes.suite:SHAPES_GENEVAL",
    },
}


MODEL_TYPES = {
    "janus": "janus",
    "multi_modality": "janus",
    "llamagen": "llamagen",
    "emu3": "emu3",
}
"""Built-in policy by the model_type of a checkpoint's config.json."""

WITHOUT_CONFIG = {"llamagen": ("peizesun/llamagen_t2i", "vq_ds16_t2i.pt")}
"""Built-in policies that are published without one: hub id, and a file that tells a folder."""

EXAMPLE_MODEL = "deepseek-community/Janus-Pro-1B"
"""A hub id, for what is said of a path that names nothing."""

SHIPPED_MODELS = {"shapes": "shapes/checkpoint"}
"""Weights that come with the package: short name and folder in it."""

TOKEN_ENV = "STAGE_REWARD_TOKEN"
"""Environment variable with a reward server's token, where no other is named."""


def resolve(family: str, name: str) -> Any:
    """The class behind a name of a family (policy, prompts, reward, detector, tracker), the
    function (credit, loss) or the object (benchmark).
    """
    target = BUILT_IN[family].get(name, name)
    what = {"credit": "function", "loss": "function", "benchmark": "NAME"}.get(family, "Class")
    module_name, _, class_name = target.partition(":")
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", target):
        hint = did_you_mean(name, BUILT_IN[family], other=f"or module:{what}")
        raise RecipeError(f"unknown {family} kind '{name}'; {hint}")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise RecipeError(
            f"cannot import '{module_name}' ({error}); write an importable module:{what}"
        ) from error
    # The module may be anyone's, and so may what it raises.
    except (Exception, SystemExit) as error:
        text = " ".join(str(error).split())
        raise RecipeError(
            f"cannot import '{module_name}' ({type(error).__name__}: {text}); fix the module"
        ) from error
    if not hasattr(module, class_name):
        raise RecipeError(
            f"'{module_name}' has no '{class_name}'; write the name of a "
            f"{'benchmark' if family == 'benchmark' else what.lower()} in it"
        )
    return getattr(module, class_name)


FunctionName = str | dict[str, Any]
"""A function by its name, or by `kind` with the keyword arguments that it is called with."""


def resolve_function(family: str, name: FunctionName) -> Callable[..., Any]:
    """The function of a family (credit, loss), its keyword arguments bound to it."""
    kind, parameters = _split(name)
    function = resolve(family, kind)
    return update_wrapper(partial(function, **parameters), function) if parameters else function


def needs_of(function: Callable[..., Any]) -> tuple[str, ...]:
    """What a credit function is marked to need, with the parameters that are bound to it."""
    names = getattr(function, "needs", ())
    if not names or isinstance(names[0], str):
        return names
    return names[0](**_bound(function))


def refusals_of(
    function: Callable[..., Any], settings: Any, num_updates: int
) -> Iterator[tuple[str, str]]:
    """What a function of credit or loss is marked to refuse of the parameters that are bound to it,
    beside the `algorithm` section and so many updates per rollout: keys of that section, and what
    is wrong with them.
    """
    check = getattr(function, "refuses", None)
    return iter(()) if check is None else check(settings, num_updates, **_bound(function))


def _bound(function: Callable[..., Any]) -> dict[str, Any]:
    """The keyword arguments that a function is called with, its defaults among them."""
    parameters = inspect.signature(function, follow_wrapped=False).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def check_function(family: str, name: Any) -> FunctionName:
    """What a recipe says, in its shortest form, where there is such a function and it takes the
    keyword arguments, by name and type; else a validation error. A built-in one without any is not
    imported.
    """
    kind, parameters = _split(name)
    if kind in BUILT_IN[family] and not parameters:
        return kind
    if not isinstance(kind, str):
        hint = did_you_mean("", BUILT_IN[family], other="or module:function")
        raise validation_error("kind" if isinstance(name, dict) else "", f"is required; {hint}")
    try:
        function = resolve(family, kind)
    except RecipeError as error:
        raise validation_error("", str(error)) from error
    if not callable(function) or isinstance(function, type):
        raise validation_error("", f"'{kind}' is not a function; name one")
    _parameters_of(function, kind).model_validate(parameters)
    return {"kind": kind, **parameters} if parameters else kind


def _parameters_of(function: Callable[..., Any], kind: str) -> type[Settings]:
    """The keyword arguments of a function behind its two first, as settings of their types."""
    signature = inspect.signature(function)
    try:
        positional = signature.bind_partial(None, None).arguments
    except TypeError:
        text = f"'{kind}' does not take two arguments; write def NAME(inputs, settings)"
        raise validation_error("", text) from None
    # A name for a type checker alone stays a text, and any value will do.
    with contextlib.suppress(NameError):
        signature = inspect.signature(function, eval_str=True)
    fields: dict[str, Any] = {}
    for parameter in signature.parameters.values():
        if parameter.name in positional or parameter.kind is parameter.VAR_KEYWORD:
            continue
        unknown = parameter.annotation is parameter.empty or isinstance(parameter.annotation, str)
        required = parameter.default is parameter.empty
        default = ... if required else parameter.default
        fields[parameter.name] = (Any if unknown else parameter.annotation, default)
    return create_model(f"{kind} parameters", __base__=Settings, **fields)


def _split(name: Any) -> tuple[Any, dict[str, Any]]:
    """Kind and keyword arguments."""
    parameters = dict(name) if isinstance(name, dict) else {"kind": name}
    return parameters.pop("kind", None), parameters


def name_of(family: str, component: type) -> str:
    """The name by which `resolve` finds a class: the short one where there is one."""
    target = f"{component.__module__}:{component.__qualname__}"
    return next((name for name, known in BUILT_IN[family].items() if known == target), target)
