"""The published benchmarks: what is drawn, who scores it, and how scores become figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from yaml import YAMLError

from stage_rl.config import explain
from stage_rl.errors import InputError
from stage_rl.evaluation.images import numbered
from stage_rl.evaluation.smoke import smoke_prompts
from stage_rl.prompts.files import as_prompts
from stage_rl.prompts.geneval import geneval_prompts
from stage_rl.prompts.sets import NOUN_LIST, load_drawbench, load_hps, load_ocr, load_t2i_compbench
from stage_rl.rewards.base import RewardConfig, Score
from stage_rl.settings import near_or_all
from stage_rl.types import Prompt

Scores = Mapping[str, Score]
"""Of one image, by the name of the scorer; without those that were not asked."""


@dataclass(frozen=True)
class Scorer:
    """A reward as a recipe writes it, and the prompts whose images it is asked about."""

    settings: Mapping[str, Any]
    asks: Callable[[Prompt], bool] = lambda prompt: True
    tiny: Mapping[str, Any] = field(default_factory=lambda: {"path": "tiny"})
    """Changes that make its models tiny and random."""


@dataclass(frozen=True)
class Suite:
    """One benchmark."""

    name: str
    prompt_set: str
    """Benchmarks of one set share its images."""
    images_per_prompt: int
    scorers: Mapping[str, Scorer]
    task_of: Callable[[Prompt], str]
    """The row of the table that a prompt belongs to."""
    measures_of: Callable[[Prompt, Scores], Mapping[str, float]]
    """The figures of one image; a figure that a scorer does not apply to is left out."""
    by_task: tuple[str, ...]
    """The measures whose table is printed by task."""
    pooled: bool = False
    """The overall mean is that of all images, not of the tasks."""


def values(prompt: Prompt, scores: Scores) -> dict[str, float]:
    """The value of every scorer under its own name."""
    return {name: one.value for name, one in scores.items() if one.value is not None}


def _geneval(prompt: Prompt, scores: Scores) -> dict[str, float]:
    if "geneval" not in scores:
        return values(prompt, scores)
    seen = scores["geneval"]
    figures = {"correct": seen.extras["correct"], "strict": seen.extras["strict"]}
    return figures | {"reward": _value(seen)} | values(prompt, _others(scores, "geneval"))


def _hps(prompt: Prompt, scores: Scores) -> dict[str, float]:
    """As the published tables have it, a hundredfold."""
    hundredfold = {"hps": 100 * _value(scores["hps"])} if "hps" in scores else {}
    return hundredfold | values(prompt, _others(scores, "hps"))


def _compbench(prompt: Prompt, scores: Scores) -> dict[str, float]:
    """The score of the prompt's category; the mean of up to three for a complex prompt."""
    own = [_value(scores[name]) for name in COMPBENCH_SCORERS if name in scores]
    others = _others(scores, *COMPBENCH_SCORERS)
    mean = {"score": sum(own) / len(own)} if own else {}
    return mean | values(prompt, others)


def _value(score: Score) -> float:
    assert score.value is not None, "this reward applies to every prompt of its benchmark"
    return score.value


def _others(scores: Scores, *names: str) -> dict[str, Score]:
    return {name: score for name, score in scores.items() if name not in names}


def _category(*categories: str, not_part: str = "") -> Callable[[Prompt], bool]:
    """Asks about some categories and, with `not_part`, about complex prompts but for one part."""

    def asks(prompt: Prompt) -> bool:
        metadata = prompt.metadata
        if metadata["category"] == "complex":
            return bool(not_part) and metadata["complex_part"] != not_part
        return metadata["category"] in categories

    return asks


def _is_placed(prompt: Prompt) -> bool:
    """One complex prompt of the published set names no relation of the plane."""
    return _category("spatial", not_part="action")(prompt) and "spatial_info" in prompt.metadata


TINY_OCR = "stage_rl.evaluation.smoke:TinyOcrConfig"

GROUNDED = {"detector": {"kind": "grounding_dino"}}

TINY_GROUNDED = {"detector": {"kind": "grounding_dino", "path": "tiny", "shortest_side": 128}}

TINY_GENEVAL = {
    "detector": {"kind": "mask2former", "path": "tiny", "clip": "tiny", "shortest_side": 64}
}

COMPBENCH_SCORERS = {
    "attributes": Scorer(
        {"kind": "compbench_attributes"},
        _category("color", "shape", "texture", not_part="none"),
        {"path": "tiny", "side": 32},
    ),
    "spatial": Scorer({"kind": "compbench_spatial"} | GROUNDED, _is_placed, TINY_GROUNDED),
    "depth": Scorer(
        {"kind": "compbench_depth"} | GROUNDED,
        _category("3d_spatial"),
        {**TINY_GROUNDED, "depth": "tiny"},
    ),
    "numeracy": Scorer(
        {"kind": "compbench_numeracy"} | GROUNDED, _category("numeracy"), TINY_GROUNDED
    ),
    "clip": Scorer({"kind": "clip_score"}, _category("non_spatial", not_part="spatial")),
}

SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            name="geneval",
            prompt_set="geneval",
            images_per_prompt=4,
            scorers={
                "geneval": Scorer(
                    {"kind": "geneval", "detector": {"kind": "mask2former"}}, tiny=TINY_GENEVAL
                )
            },
            task_of=lambda prompt: prompt.metadata["tag"],
            measures_of=_geneval,
            by_task=("correct", "strict", "reward"),
        ),
        Suite(
            name="t2i-compbench",
            prompt_set="t2i_compbench",
            images_per_prompt=10,
            scorers=COMPBENCH_SCORERS,
            task_of=lambda prompt: prompt.metadata["category"],
            measures_of=_compbench,
            by_task=("score",),
        ),
        Suite(
            name="hps",
            prompt_set="hps",
            images_per_prompt=1,
            scorers={"hps": Scorer({"kind": "hps"})},
            task_of=lambda prompt: prompt.metadata["style"],
            measures_of=_hps,
            by_task=("hps",),
        ),
        Suite(
            name="drawbench",
            prompt_set="drawbench",
            images_per_prompt=1,
            scorers={
                "image_reward": Scorer({"kind": "image_reward"}),
                "pickscore": Scorer({"kind": "pickscore"}),
                "aesthetic": Scorer({"kind": "aesthetic"}, tiny={"path": "tiny", "head": "tiny"}),
            },
            task_of=lambda prompt: prompt.metadata["category"],
            measures_of=values,
            by_task=("image_reward", "pickscore", "aesthetic"),
            pooled=True,
        ),
        Suite(
            name="ocr",
            prompt_set="ocr",
            images_per_prompt=1,
            scorers={"ocr": Scorer({"kind": "ocr"}, tiny={"kind": TINY_OCR})},
            task_of=lambda prompt: prompt.metadata["level"],
            measures_of=values,
            by_task=("ocr",),
            pooled=True,
        ),
        Suite(
            name="diversity",
            prompt_set="geneval",
            images_per_prompt=4,
            scorers={"diversity": Scorer({"kind": "variety"})},
            task_of=lambda prompt: prompt.metadata["tag"],
            measures_of=values,
            by_task=("diversity",),
        ),
    )
}


def more_figures(suite: Suite, rows: Iterable[tuple[str, int, float]]) -> dict[str, float]:
    """What the published tools print besides, from (task, prompt, value) of the main measure.

    GenEval: the share of correct images and of prompts with one; HPS: the deviation of the means
    of ten parts of each style, in the mean over the styles.
    """
    kept = list(rows)
    if suite.name == "geneval":
        best: dict[int, float] = {}
        for _, prompt, value in kept:
            best[prompt] = max(value, best.get(prompt, 0.0))
        images = sum(value for *_, value in kept) / len(kept)
        return {"images correct": images, "prompts with any correct": _mean(best.values())}
    if suite.name == "hps":
        return {"deviation over ten parts": _mean(_deviation(kept, task) for task in _tasks(kept))}
    return {}


def _tasks(rows: Iterable[tuple[str, int, float]]) -> list[str]:
    return list(dict.fromkeys(task for task, *_ in rows))


def _deviation(rows: Iterable[tuple[str, int, float]], task: str, num_parts: int = 10) -> float:
    """Of the means of parts of a style, in the order of its prompts."""
    mine = [value for one, _, value in rows if one == task]
    size = max(1, len(mine) // num_parts)
    means = [_mean(mine[first : first + size]) for first in range(0, size * num_parts, size)]
    middle = _mean(means)
    return _mean((mean - middle) ** 2 for mean in means) ** 0.5


def _mean(numbers: Iterable[float]) -> float:
    listed = list(numbers)
    return sum(listed) / len(listed) if listed else 0.0


def chosen(names: Iterable[str]) -> list[Suite]:
    """The suites of these names; `all` stands for all of them."""
    picked: dict[str, Suite] = {}
    for name in names:
        if name != "all" and name not in SUITES:
            raise InputError(f"benchmark: unknown '{name}'; write one of: {', '.join(SUITES)}, all")
        picked |= SUITES if name == "all" else {name: SUITES[name]}
    return list(picked.values())


# The prompts of the published benchmarks, by what the user has of them on disk.


INDEX_STRIDE = 100_000
"""Index of the first prompt of the second set, and so on: sets share no random stream."""

WHERE = {
    "geneval": "",
    "t2i_compbench": "t2i_compbench",
    "hps": "hps",
    "drawbench": "drawbench/prompts.csv",
    "ocr": "ocr/test.txt",
}
"""Where the files of a set are below the folder of prompt sets; GenEval's are built."""

LOADERS = {
    "t2i_compbench": load_t2i_compbench,
    "hps": load_hps,
    "drawbench": load_drawbench,
    "ocr": load_ocr,
}


def prompts_of(prompt_set: str, data: Path | None, *, smoke: bool = False) -> tuple[Prompt, ...]:
    """The prompts of a set, with indices of their own; what is missing is an `InputError`."""
    if smoke:
        prompts = smoke_prompts(prompt_set)
    elif prompt_set == "geneval":
        prompts = as_prompts(geneval_prompts())
    else:
        prompts = LOADERS[prompt_set](_find(prompt_set, data))
    return numbered(prompts, list(WHERE).index(prompt_set) * INDEX_STRIDE)


def is_there(prompt_set: str, data: Path | None) -> bool:
    """Whether the files of a set can be found."""
    return prompt_set == "geneval" or _candidate(prompt_set, data) is not None


def _find(prompt_set: str, data: Path | None) -> Path:
    found = _candidate(prompt_set, data)
    if found is None:
        given = f"{data}: has no {WHERE[prompt_set]}" if data else "is not given"
        raise InputError(
            f"--data {given}; write the folder with {WHERE[prompt_set]}, or the set itself"
        )
    return found


def _candidate(prompt_set: str, data: Path | None) -> Path | None:
    """Below the folder of all sets, or the given path itself."""
    if data is None:
        return None
    below = data / WHERE[prompt_set]
    if below.exists():
        return below
    is_set = {
        "t2i_compbench": (data / NOUN_LIST).exists(),
        "hps": (data / "anime.json").exists() or data.suffix == ".json",
        "drawbench": data.suffix == ".csv",
        "ocr": (data.is_file() and data.suffix != ".csv") or data.name == "length_buckets.csv",
    }
    return data if data.exists() and is_set[prompt_set] else None


# The rewards of a benchmark with what the command line says of them.


Overrides = Mapping[str, Mapping[str, Any] | None]
"""Settings by the name of a scorer; None leaves the scorer out."""


def parse_overrides(texts: Sequence[str]) -> Overrides:
    """SCORER.key=value as a tree; SCORER=null leaves a scorer out. Else an `InputError`."""
    for text in texts:
        key, equals, _ = text.partition("=")
        if not equals or not all(key.split(".")):
            raise InputError(f"{text}: is no setting of a scorer; write SCORER.key=value")
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
            hint = near_or_all(name, sorted(known))
            raise InputError(f"{name}: no scorer of that name; {hint}, or add one: {name}.kind=...")


def scorers_of(
    suite: Suite, overrides: Overrides, *, tiny: bool
) -> dict[str, tuple[Scorer, RewardConfig]]:
    """The scorers of a benchmark with their settings; a wrong setting is an `InputError`.

    A scorer that the settings add is asked about every prompt.
    """
    added = {name: Scorer({}) for name, own in overrides.items() if own and "kind" in own}
    scorers = {}
    for name, scorer in {**added, **suite.scorers}.items():
        own = overrides.get(name, {})
        if own is None:
            continue
        settings = _merged(scorer.settings, scorer.tiny if tiny and scorer.settings else {})
        try:
            config = RewardConfig.model_validate({**_merged(settings, own), "name": name})
        except ValidationError as error:
            told = f"{suite.name}: {name}.{explain(error)}"
            raise InputError(f"{told}; {name}=null leaves it out") from error
        scorers[name] = (scorer, config)
    return scorers


def _merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Both trees as one; the other's leaves win."""
    merged = dict(one)
    for key, value in other.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = _merged(old, value) if both else value  # type: ignore[arg-type]
    return merged
