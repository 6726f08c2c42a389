"""The benchmark `shapes-geneval`: held-out prompts of the shapes world, judged by two judges.

The reward's detector gives the official GenEval verdict, the gold judge the strict one. Structure
and diversity are scores that no reward sees; retention and transfer are prompts that none has seen.
Both are judged by the gold judge; of what a retention prompt names, size and tone count as well as
class and colour, the texture of the background does not.

Shape suffixes: N images, T image tokens, G images of a prompt, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from stage_rl.errors import InputError
from stage_rl.evaluation.results import ImageScore, Results, Setup, group_diversity, object_cells
from stage_rl.policies.base import Policy
from stage_rl.prompts.files import as_prompts
from stage_rl.prompts.geneval import TASKS
from stage_rl.rewards.geneval import judge
from stage_rl.rollout.engine import Engine
from stage_rl.rollout.sample import rollout
from stage_rl.rollout.sampling import Sampling
from stage_rl.shapes import gold
from stage_rl.shapes.detector import ShapesDetector
from stage_rl.shapes.prompts import evaluation_records, held_out_sets
from stage_rl.shapes.scenes import IMAGE_SIZE
from stage_rl.types import Prompt, Rollout

NAME = "shapes-geneval"

GUIDANCE_SCALE = 2.5

MAX_IMAGES = 64
"""Images that are drawn at one time."""

INDEX_STRIDE = 10_000
"""Index of the first prompt of the second set, and so on: sets share no random stream."""

BY_TASK = ("gold", "detector")

MEASURES = (
    *BY_TASK,
    *("structure", "diversity_background", "diversity_objects"),
    *("retention", "transfer", "agreement"),
)


@dataclass(frozen=True)
class Batch:
    """Prompts of one task, or of one held-out set under its name, with as many images each."""

    task: str
    prompts: tuple[Prompt, ...]
    images_per_prompt: int

    @property
    def num_images(self) -> int:
        """Images of the batch."""
        return len(self.prompts) * self.images_per_prompt


@dataclass(frozen=True)
class Judges:
    """Scores rollouts and keeps the scores under the names of their measures."""

    detector: ShapesDetector
    scores: dict[str, list[ImageScore]] = field(default_factory=dict)

    def judge(self, task: str, drawn: Rollout, policy: Policy) -> None:
        """Scores every image by both judges and, for GenEval tasks, what no reward sees."""
        size = drawn.group_size
        prompts = [prompt for prompt in drawn.prompts for _ in range(size)]
        detections = self.detector(drawn.images_NHWC, prompts)
        inspections = gold.inspect(drawn.images_NHWC.numpy())
        for n, (prompt, found, seen) in enumerate(
            zip(prompts, detections, inspections, strict=True)
        ):
            strict = judge(seen.detections, prompt.metadata).strict
            if task not in TASKS:
                looks = gold.looks_right(seen, drawn.images_NHWC[n].numpy(), prompt.metadata)
                self._add(task, task, prompt, n % size, strict and looks)
                continue
            correct = judge(found, prompt.metadata).correct
            self._add("gold", task, prompt, n % size, strict)
            self._add("detector", task, prompt, n % size, correct)
            self._add("agreement", task, prompt, n % size, strict == correct)
            structure = gold.structure(seen, prompt.metadata)
            self._add("structure", task, prompt, n % size, structure)
        if task in TASKS:
            self._compare_images(task, drawn, inspections, policy)

    def _compare_images(
        self, task: str, drawn: Rollout, inspections: list[gold.Inspection], policy: Policy
    ) -> None:
        size, grid = drawn.group_size, policy.layout.grid
        codes_NTC = policy.codes(drawn.tokens_NT).cpu()
        object_NT = object_cells(np.stack([one.foreground_HW for one in inspections]), grid)
        for place, prompt in enumerate(drawn.prompts):
            rows = slice(place * size, (place + 1) * size)
            diversity = group_diversity(codes_NTC[rows], object_NT[rows])
            for name, value in diversity._asdict().items():
                if value is not None:
                    self._add(f"diversity_{name}", task, prompt, 0, value)

    def _add(self, measure: str, task: str, prompt: Prompt, image: int, value: float) -> None:
        score = ImageScore(task, prompt.index, image, float(value))
        self.scores.setdefault(measure, []).append(score)


def prompt_sets() -> dict[str, tuple[Prompt, ...]]:
    """The prompts by GenEval task and held-out set; the index of a prompt keys its streams."""
    geneval = as_prompts(evaluation_records())
    sets = {task: tuple(p for p in geneval if p.metadata["tag"] == task) for task in TASKS}
    for number, held_out in enumerate(held_out_sets(), 1):
        first = number * INDEX_STRIDE
        sets[held_out.name] = tuple(
            Prompt(prompt.text, first + prompt.index, prompt.metadata)
            for prompt in as_prompts(held_out.records)
        )
    return sets


def batches(images_per_task: int) -> Iterator[Batch]:
    """Every set's images, spread evenly over its prompts; at most MAX_IMAGES where groups allow."""
    for task, prompts in prompt_sets().items():
        each, more = divmod(images_per_task, len(prompts))
        for size, part in ((each + 1, prompts[:more]), (each, prompts[more:])):
            step = max(1, MAX_IMAGES // max(size, 1))
            for first in range(0, len(part) if size else 0, step):
                yield Batch(task, part[first : first + step], size)


def run(
    policy: Policy,
    setup: Setup,
    *,
    name: str,
    advance: Callable[[int], None] = lambda _: None,
    engine: Engine | None = None,
) -> Results:
    """Draws and judges all images; `advance` is told how many more are done.

    `engine` None is one of its own; another draws by the weights of its last reload.

    A policy whose images are not those of the shapes world is an `InputError`.
    """
    judges = Judges(ShapesDetector.load(policy.device))
    engine = engine or Engine(policy, dtype=setup.dtype, max_images=MAX_IMAGES)
    sampling = Sampling(guidance_scale=setup.guidance_scale)
    for batch in batches(setup.images_per_task):
        drawn = rollout(
            engine,
            batch.prompts,
            group_size=batch.images_per_prompt,
            sampling=sampling,
            seed=setup.seed,
            step=0,
        )
        size = tuple(drawn.images_NHWC.shape[1:3])
        if size != (IMAGE_SIZE, IMAGE_SIZE):
            raise InputError(
                f"{name}: draws images of {size[0]} x {size[1]}; {NAME} judges "
                f"{IMAGE_SIZE} x {IMAGE_SIZE}: name a model of the shapes world"
            )
        judges.judge(batch.task, drawn, policy)
        advance(batch.num_images)
    scores = {m: tuple(judges.scores[m]) for m in MEASURES if m in judges.scores}
    return Results(name, setup, scores, BY_TASK)


def num_images(images_per_task: int) -> int:
    """Images of a whole evaluation."""
    return images_per_task * len(prompt_sets())


def example_prompts(num_per_task: int = 2) -> list[Prompt]:
    """Some prompts of every GenEval task, to show images of."""
    return [p for task in TASKS for p in prompt_sets()[task][:num_per_task]]
