"""Draws the images of a prompt set that are not there yet.

Shape suffixes: N images, H x W pixels, C colour channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stage_rl.errors import Stopped
from stage_rl.evaluation.images import ImageFolder
from stage_rl.rollout.engine import Engine
from stage_rl.rollout.sample import rollout
from stage_rl.rollout.sampling import Sampling
from stage_rl.types import Prompt

IMAGES_AT_ONCE = 64
"""Images after which files are written and a stop is heard."""


@dataclass(frozen=True)
class Painter:
    """Draws images of one model by one way of sampling; equal painters draw equal images."""

    engine: Engine
    sampling: Sampling
    seed: int

    def draw_missing(
        self,
        folder: ImageFolder,
        prompts: Sequence[tuple[int, Prompt]],
        num_images: int,
        *,
        advance: Callable[[int], None] = lambda _: None,
        signals: Sequence[int] = (),
    ) -> None:
        """Draws what the folder lacks of these prompts (by place in their set), `num_images` each.

        Image k of a prompt has the same stream whatever else is drawn. Raises `Stopped` when
        `signals` fills; what is drawn by then is there.
        """
        lacking = [(p, prompt) for p, prompt in prompts if folder.missing(p, num_images)]
        advance(num_images * (len(prompts) - len(lacking)))
        at_once = max(1, IMAGES_AT_ONCE // num_images)
        for first in range(0, len(lacking), at_once):
            if signals:
                raise Stopped(
                    f"{folder.root}: stopped; run the same command again to go on",
                    signal_number=signals[0],
                )
            self._draw(folder, lacking[first : first + at_once], num_images)
            advance(num_images * len(lacking[first : first + at_once]))

    def _draw(
        self, folder: ImageFolder, some: Sequence[tuple[int, Prompt]], num_images: int
    ) -> None:
        drawn = rollout(
            self.engine,
            [prompt for _, prompt in some],
            group_size=num_images,
            sampling=self.sampling,
            seed=self.seed,
            step=0,
        )
        for row, (place, prompt) in enumerate(some):
            folder.begin(place, prompt)
            for image in folder.missing(place, num_images):
                folder.write(place, image, drawn.images_NHWC[row * num_images + image])
