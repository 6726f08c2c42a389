"""The published benchmarks: what is drawn, who scores it, and how scores become figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from yaml import YAMLError

from stage_rl.config import explain, masked, read_environment
from stage_rl.errors import InputError
from stage_rl.evaluation.aggregation import PromptAnswers
from stage_rl.evaluation.results import ImageScore
from stage_rl.evaluation.scores import settings_that_score
from stage_rl.evaluation.smoke import smoke_prompts
from stage_rl.policies.base import Policy
from stage_rl.prompts.files import PromptsConfig, as_prompts
from stage_rl.prompts.geneval import geneval_prompts
from stage_rl.prompts.sets import NOUN_LIST
from stage_rl.rewards.base import RewardConfig, Score
from stage_rl.settings import BUILT_IN, did_you_mean, resolve
from stage_rl.types import Prompt, Rollout

Scores = Mapping[str, Score]
"""Of one image, by the name of the scorer; without those that were not asked."""


@dataclass(frozen=True)
class PromptSet:
    """The prompts of a benchmark, by what the user has of them on disk."""

    name: str
    load: Callable[[], Sequence[Prompt]] | None = None
    """None: they are read from `where`, as the prompts of kind `name`."""
    where: str = ""
    """Below the folder of all sets."""
    kind: str = ""
    """Kind of the prompts, where it is not the name."""
    size: int | None = None
    """How many prompts it has, as published."""
    is_set: Callable[[Path], bool] = lambda path: False
    """Whether a path is the set itself."""
    first_index: int = 0
    """Index of its first prompt; sets apart by 100,000 share no random stream."""
    departure: Callable[[Path], str | None] = lambda path: None
    """In what a set that was found is not the published one, in words."""
    has_smoke_prompts: bool = True
    """False: its own prompts and scorers are quick enough to try."""

    def find(self, data: Path | None) -> Path | None:
        """The set below the folder of all sets, or the given path itself; None: is not there."""
        if data is None:
            return None
        for below in (data / self.where, data / f"{self.where}.gz"):
            if below.exists():
                return below
        return data if data.exists() and self.is_set(data) else None

    def unlike_published(self, data: Path | None) -> str | None:
        """In what the prompts of `data` are not the published ones, in words."""
        found = None if self.load is not None else self.find(data)
        return None if found is None else self.departure(found)

    def prompts(self, data: Path | None, *, smoke: bool = False) -> Sequence[Prompt]:
        """The prompts with indices of their own; what is missing is an `InputError`."""
        if smoke and self.has_smoke_prompts:
            prompts = smoke_prompts(self.name)
        elif self.load is not None:
            prompts = self.load()
        elif found := self.find(data):
            settings = {"kind": self.kind or self.name, "path": str(found)}
            settings |= {"benchmark": self.name} if self.kind == "questions" else {}
            prompts = PromptsConfig.model_validate(settings).build()
        else:
            given = f"{data}: has no {self.where}" if data else "is not given"
            raise InputError(
                f"--data {given}; write the folder with {self.where}, or the set itself (in a "
                "recipe: evaluation.data)"
            )
        return tuple(replace(prompt, index=self.first_index + prompt.index) for prompt in prompts)


@dataclass(frozen=True)
class Scorer:
    """A reward as a recipe writes it, and the prompts whose images it is asked about."""

    settings: Mapping[str, Any]
    asks: Callable[[Prompt], bool] = lambda prompt: True
    verdicts: tuple[str, ...] = ()
    """Its extras that are 0 or 1, which a smoke run makes up."""
    smoke_settings: Mapping[str, Any] = field(default_factory=dict)
    """Those without a default, for a smoke run."""


def values(prompt: Prompt, scores: Scores) -> dict[str, float]:
    """The value of every scorer under its own name."""
    return {name: one.value for name, one in scores.items() if one.value is not None}


@dataclass(frozen=True)
class Suite:
    """One benchmark."""

    name: str
    prompt_set: PromptSet
    """Benchmarks of one set share its images."""
    scorers: Mapping[str, Scorer]
    task_of: Callable[[Prompt], str]
    """The row of the table that a prompt belongs to."""
    by_task: tuple[str, ...]
    """The measures whose table is printed by task."""
    overall: tuple[str, ...] = ()
    """The first of the others, of which the overall mean is printed."""
    images_per_prompt: int = 1
    images_per_task: int | None = None
    """Images of each task, spread evenly over its prompts, in place of `images_per_prompt`."""
    guidance_scale: float | None = None
    """Where nobody says; None: that of the model's family."""
    measures_of: Callable[[Prompt, Scores], Mapping[str, float]] = values
    """The measures of one image; one that a scorer does not apply to is left out."""
    measures_of_groups: Callable[[Policy, Rollout], Sequence[Mapping[str, float]]] | None = None
    """The measures of each prompt's images together that take more than pixels: their tokens."""
    figures_of: Callable[[Sequence[ImageScore]], Mapping[str, float]] = lambda scores: {}
    """What the published tools print besides, from the scores of the first measure."""
    pooled: bool = False
    """The overall mean is that of all images, not of the tasks."""
    answers: str = ""
    """The scorer whose answers to questions, or whose replies, are aggregated."""
    aggregate: Callable[[Sequence[PromptAnswers]], Mapping[str, float]] | None = None
    """The figures that papers print, from all of them."""
    gpu_gb: float | None = None
    """Memory that its judge takes of a GPU, in GB; 0: it needs none; None: not known."""
    minutes: float | None = None
    """How long scoring takes with one GPU, or an upper bound of it; None: not known."""

    def examples(self, data: Path | None, number: int) -> list[Prompt]:
        """So many prompts, the first of each task, then the second of each, and so on."""
        seen, placed = Counter[str](), []
        for prompt in self.prompt_set.prompts(data):
            task = self.task_of(prompt)
            placed.append((seen[task], prompt))
            seen[task] += 1
        return [prompt for _, prompt in sorted(placed, key=lambda one: one[0])[:number]]


GENEVAL_PROMPTS = PromptSet("geneval", lambda: as_prompts(geneval_prompts()), size=553)


def _geneval(prompt: Prompt, scores: Scores) -> dict[str, float]:
    measures = values(prompt, scores)
    if "geneval" not in scores:
        return measures
    reward, extras = measures.pop("geneval"), scores["geneval"].extras
    return {"correct": extras["correct"], "strict": extras["strict"], "reward": reward} | measures


def _correct_images(scores: Sequence[ImageScore]) -> dict[str, float]:
    """The share of correct images, and of prompts with one."""
    best = {one.prompt: one.value for one in sorted(scores, key=lambda one: one.value)}
    return {
        "images correct": _mean([one.value for one in scores]),
        "prompts with any correct": _mean(list(best.values())),
    }


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else 0.0


GENEVAL = Suite(
    name="geneval",
    prompt_set=GENEVAL_PROMPTS,
    images_per_prompt=4,
    scorers={
        "geneval": Scorer(
            {"kind": "geneval", "detector": {"kind": "mask2former"}}, verdicts=("correct", "strict")
        )
    },
    task_of=lambda prompt: prompt.metadata["tag"],
    measures_of=_geneval,
    by_task=("correct", "strict", "reward"),
    figures_of=_correct_images,
    minutes=4,
)

DIVERSITY = Suite(
    name="diversity",
    prompt_set=GENEVAL_PROMPTS,
    images_per_prompt=4,
    scorers={"diversity": Scorer({"kind": "variety"})},
    task_of=lambda prompt: prompt.metadata["tag"],
    by_task=("diversity",),
)


def _about(*labels: str) -> Callable[[Prompt], bool]:
    """Asks about some categories; of the complex prompts, about some parts."""

    def asks(prompt: Prompt) -> bool:
        category, part = prompt.metadata["category"], prompt.metadata.get("complex_part")
        return (f"{category} {part}" if part else category) in labels

    return asks


def _is_placed(prompt: Prompt) -> bool:
    """One complex prompt of the published set names no relation of the plane."""
    is_in_plane = _about("spatial", "complex spatial", "complex all")
    return is_in_plane(prompt) and "spatial_info" in prompt.metadata


def _compbench(prompt: Prompt, scores: Scores) -> dict[str, float]:
    """The score of the prompt's category; the mean of up to three for a complex prompt."""
    measures = values(prompt, scores)
    own = [measures.pop(name) for name in T2I_COMPBENCH.scorers if name in measures]
    return ({"score": _mean(own)} if own else {}) | measures


def _grounded(name: str) -> dict[str, Any]:
    return {"kind": f"compbench_{name}", "detector": {"kind": "grounding_dino"}}


# All eight categories: T2I-CompBench++.
T2I_COMPBENCH = Suite(
    name="t2i-compbench",
    prompt_set=PromptSet(
        "t2i_compbench",
        where="t2i_compbench",
        is_set=lambda path: (path / NOUN_LIST).exists(),
        size=2400,
        first_index=100_000,
    ),
    images_per_prompt=10,
    scorers={
        "attributes": Scorer(
            {"kind": "compbench_attributes"},
            _about(
                *("color", "shape", "texture"),
                *("complex spatial", "complex action", "complex all"),
            ),
        ),
        "spatial": Scorer(_grounded("spatial"), _is_placed),
        "depth": Scorer(_grounded("depth"), _about("3d_spatial")),
        "numeracy": Scorer(_grounded("numeracy"), _about("numeracy")),
        "clip": Scorer(
            {"kind": "clip_score"}, _about("non_spatial", "complex action", "complex all")
        ),
    },
    task_of=lambda prompt: prompt.metadata["category"],
    measures_of=_compbench,
    by_task=("score",),
)


def _hps(prompt: Prompt, scores: Scores) -> dict[str, float]:
    """As the published tables have it, a hundredfold."""
    measures = values(prompt, scores)
    return {name: 100 * value if name == "hps" else value for name, value in measures.items()}


def _style_deviation(scores: Sequence[ImageScore], num_parts: int = 10) -> dict[str, float]:
    """The deviation of the means of ten parts of each style, in the mean over the styles."""
    styles: dict[str, list[float]] = {}
    for one in scores:
        styles.setdefault(one.task, []).append(one.value)
    deviations = []
    for style in styles.values():
        size = max(1, len(style) // num_parts)
        means = [_mean(style[first : first + size]) for first in range(0, size * num_parts, size)]
        middle = _mean(means)
        deviations.append(_mean([(mean - middle) ** 2 for mean in means]) ** 0.5)
    return {"deviation over ten parts": _mean(deviations)}


HPS = Suite(
    name="hps",
    prompt_set=PromptSet(
        "hps",
        where="hps",
        is_set=lambda path: (path / "anime.json").exists() or path.suffix == ".json",
        size=3200,
        first_index=200_000,
    ),
    scorers={"hps": Scorer({"kind": "hps"})},
    task_of=lambda prompt: prompt.metadata["style"],
    measures_of=_hps,
    by_task=("hps",),
    figures_of=_style_deviation,
)

DRAWBENCH = Suite(
    name="drawbench",
    prompt_set=PromptSet(
        "drawbench",
        where="drawbench/prompts.csv",
        is_set=lambda path: path.suffix == ".csv",
        size=200,
        first_index=300_000,
    ),
    scorers={
        "image_reward": Scorer({"kind": "image_reward"}),
        "pickscore": Scorer({"kind": "pickscore"}),
        "aesthetic": Scorer({"kind": "aesthetic"}, smoke_settings={"head": "none"}),
    },
    task_of=lambda prompt: prompt.metadata["category"],
    by_task=("image_reward", "pickscore", "aesthetic"),
    pooled=True,
)

OCR = Suite(
    name="ocr",
    prompt_set=PromptSet(
        "ocr",
        where="ocr/test.txt",
        size=1018,
        is_set=lambda path: (
            (path.is_file() and path.suffix != ".csv") or path.name == "length_buckets.csv"
        ),
        first_index=400_000,
    ),
    scorers={"ocr": Scorer({"kind": "ocr"})},
    task_of=lambda prompt: prompt.metadata["level"],
    by_task=("ocr",),
    pooled=True,
)

ALL = tuple(name for name in BUILT_IN["benchmark"] if name != "shapes-geneval")
"""What `all` stands for."""


def find_suite(name: str) -> Suite:
    """The benchmark of a built-in name or module:NAME; an unknown one is a `StageError`."""
    if name not in BUILT_IN["benchmark"] and ":" not in name:
        hint = did_you_mean(name, [*BUILT_IN["benchmark"], "all"], other="or module:NAME")
        raise InputError(f"benchmark: unknown '{name}'; {hint}")
    found = resolve("benchmark", name)
    if not isinstance(found, Suite):
        raise InputError(f"benchmark: '{name}' is not a Suite; name one")
    return found


def find_suites(names: Iterable[str]) -> list[Suite]:
    """The benchmarks of these names, each once; `all` stands for the published ones."""
    listed = [one for name in names for one in (ALL if name == "all" else (name,))]
    return [find_suite(name) for name in dict.fromkeys(listed)]


# The rewards of a benchmark with what the command line says of them.

Overrides = Mapping[str, Mapping[str, Any] | None]
"""Settings by the name of a scorer; None leaves the scorer out."""


def parse_overrides(texts: Sequence[str]) -> Overrides:
    """SCORER.key=value as a tree; SCORER=null leaves a scorer out. Else an `InputError`."""
    for text in texts:
        key, equals, _ = text.partition("=")
        if not equals or not all(key.split(".")):
            raise InputError(f"{text}: is not a setting of a scorer; write SCORER.key=value")
    try:
        tree = OmegaConf.to_container(OmegaConf.from_dotlist(list(texts)))
    except (YAMLError, OmegaConfBaseException) as error:
        raise InputError(f"{' '.join(texts)}: the value is not YAML; quote it") from error
    assert isinstance(tree, dict)
    for name, settings in tree.items():
        if settings is not None and not isinstance(settings, dict):
            raise InputError(f"{name}: write {name}.key=value, or {name}=null to leave it out")
    return {str(name): settings for name, settings in tree.items()}


def check_names(suites: Sequence[Suite], overrides: Overrides) -> None:
    """Refuses settings of a scorer that no chosen benchmark has, but for new ones with a kind."""
    known = {name for suite in suites for name in suite.scorers}
    for name, settings in overrides.items():
        if name not in known and not (settings and "kind" in settings):
            hint = did_you_mean(name, sorted(known))
            raise InputError(f"{name}: no scorer of that name; {hint}, or add one: {name}.kind=...")


def own_settings(
    suite: Suite, scorers: Mapping[str, tuple[Scorer, RewardConfig]]
) -> dict[str, dict[str, Any]]:
    """The settings of a benchmark's scorers as it has them; what it leaves open, as in `scorers`.

    Of a scorer that is left out, or is of another kind, only those that the benchmark names.
    """
    own = {}
    for name, scorer in suite.scorers.items():
        own[name] = dict(scorer.settings)
        config = scorers[name][1] if name in scorers else None
        if config is not None and config.kind == scorer.settings["kind"]:
            open_ = [key for key, info in type(config).model_fields.items() if info.is_required()]
            settings = {**config.model_dump(include=set(open_)), **scorer.settings, "name": name}
            own[name] = settings_that_score(RewardConfig.model_validate(settings))
    return own


def scorers_of(
    suite: Suite, overrides: Overrides, *, smoke: bool
) -> dict[str, tuple[Scorer, RewardConfig]]:
    """The scorers of a benchmark with their settings; a wrong setting is an `InputError`.

    A scorer that the settings add is asked about every prompt. `${oc.env:NAME}` is read here.
    """
    added = {name: Scorer({}) for name, own in overrides.items() if own and "kind" in own}
    scorers = {}
    for name, scorer in {**added, **suite.scorers}.items():
        own = overrides.get(name, {})
        if own is None:
            continue
        defaults = dict(scorer.settings) | (dict(scorer.smoke_settings) if smoke else {})
        if own.get("kind", defaults.get("kind")) != defaults.get("kind"):
            defaults = {}  # those of another reward
        tree = OmegaConf.merge(defaults, dict(own), {"name": name})
        with read_environment() as secrets:
            try:
                merged = OmegaConf.to_container(tree, resolve=True)
                scorers[name] = (scorer, RewardConfig.model_validate(merged))
            except OmegaConfBaseException as error:
                message = f"{suite.name}: {name}: {masked(str(error).splitlines()[0], secrets)}"
                raise InputError(f"{message}; set it, or {name}=null leaves it out") from error
            except ValidationError as error:
                message = f"{suite.name}: {name}.{explain(error, secrets)}"
                raise InputError(f"{message}; {name}=null leaves it out") from error
    return scorers
